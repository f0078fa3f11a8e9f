"""Videos of the model in training next to those of the base model, from the same prompts and seeds."""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kandinsky5 import video_io
from kandinsky5.dit import DiT
from kandinsky5.files import make_folder, read_utf8
from kandinsky5.request import Request
from kandinsky5.screen import showing
from kandinsky5.text_encoder import TextFeatures
from kandinsky5.training.data import Clips
from kandinsky5.training.folder import Clip

if TYPE_CHECKING:
    from kandinsky5.pipeline import Pipeline

MOST = 8  # prompts; four by default
COLUMNS = 5  # frames of a video in a contact sheet


@dataclass
class Previews:
    """What is sampled, with the features of its prompts: text encoders are not needed again."""

    pipe: "Pipeline"
    folder: Path
    requests: list[Request]
    features: list[TextFeatures]
    base: list[Tensor]  # (F, H, W, 3) of each, by the base model
    writes: bool = True  # of several ranks, which all sample, one does

    @classmethod
    def prepare(cls, pipe: "Pipeline", options: Namespace, clips: Clips) -> "Previews":
        """Requests for the prompts of a file, or the captions of some clips; image models are given first frames."""
        shapes = Counter((clip.num_frames, *clip.size) for clip in clips.clips)
        usual = shapes.most_common(1)[0][0]  # one shape, as videos are shown next to each other
        some = [clip for clip in clips.clips if (clip.num_frames, *clip.size) == usual]
        some = list({clip.caption: clip for clip in some}.values())[:4]
        requested: list[tuple[str, Clip]] = [(clip.caption, clip) for clip in some]
        if options.prompts:
            prompts = read_prompts(options.prompts)
            requested = [(f"{options.trigger} {prompt}".strip(), some[0]) for prompt in prompts]
        requests = [
            Request.resolve(
                pipe.config, prompt, clip.read()[0] if "t2v" not in pipe.config.tasks else None,
                height=clip.size[0], width=clip.size[1], num_frames=clip.num_frames,
                num_inference_steps=options.sample_steps, seed=i,
            )
            for i, (prompt, clip) in enumerate(requested)
        ]  # fmt: skip
        with torch.no_grad():
            features = [pipe.encode_text(request) for request in requests]
        return cls(pipe, options.to / "samples", requests, features, [])

    def show_base(self) -> None:
        """Sample with the pipeline's model as it is, to compare with; only once."""
        self.base = self.base or self._sample()

    def show(self, step: int, dit: DiT | None = None) -> None:
        """Sample, and write step_N.mp4, base above and this model below, and step_N.png, frames of both.

        dit: the model, if it is not the pipeline's own.
        """
        own, self.pipe.dit = self.pipe.dit, dit or self.pipe.dit
        try:
            videos = self._sample()
        finally:
            self.pipe.dit = own
        if not self.writes:
            return
        name, rows = self.folder / f"step_{step:06d}", [torch.cat(row, dim=2) for row in (self.base, videos)]
        sheet = torch.cat([pick_frames(video) for pair in zip(self.base, videos, strict=True) for video in pair])
        with showing(f"{name.name}.mp4 and .png"):
            make_folder(self.folder)
            if len(videos[0]) > 1:
                video_io.write_video(name.with_suffix(".mp4"), torch.cat(rows, dim=1), self.pipe.config.sampling.fps)
            video_io.write_video(name.with_suffix(".png"), sheet[None])

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        videos = []
        for request, features in zip(self.requests, self.features, strict=True):
            noise, generators = request.noise()
            first = self.pipe.encode_image(request, generators)
            latents = self.pipe.sample(request, features, noise, first, progress=True)
            videos.append(self.pipe.decode(latents)[0])
        return videos


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises ValueError for none, too many, or what is not UTF-8."""
    prompts = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
    if not 1 <= len(prompts) <= MOST:
        raise ValueError(f"{path} holds {len(prompts)} prompts: write 1 to {MOST}, one per line")
    return prompts


def pick_frames(video: Tensor) -> Tensor:
    """A row of frames of a video (F, H, W, 3), evenly spaced: (H, n·W, 3)."""
    picked = torch.linspace(0, len(video) - 1, min(COLUMNS, len(video))).round().long()
    return torch.cat(list(video[picked]), dim=1)
