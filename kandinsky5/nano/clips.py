"""The clips that nano's DiT trains on: latents on disk, and batches of them with captions.

The clips' latents are drawn and encoded once and kept on disk, with a new one added at every step; their captions are
written anew each time. A sample is given its first frame in 30 % of the cases, and no prompt in 10 %.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kandinsky5 import screen, video_io
from kandinsky5.dit import DiT
from kandinsky5.files import check_free_space, make_folder, write_text
from kandinsky5.nano.captions import LANGUAGES, write_caption
from kandinsky5.nano.single_frame import single_frame
from kandinsky5.nano.world import Scene, draw_scene, sample_scene
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.training.flow import FlowBatch, drop_condition, flow_batch
from kandinsky5.training.loop import generator
from kandinsky5.training.modes import autocast
from kandinsky5.training.state import digest
from kandinsky5.vae import VAE

BATCH = 48
FIRST_FRAME_GIVEN, PROMPT_DROPPED = 0.3, 0.1
CLIPS_AT_MOST = 80_000
CLIP_SEED = 4  # of the training scenes


def draw_videos(scenes: list[Scene], num_frames: int = 17, size: int = 64) -> Tensor:
    """Scenes drawn for the VAE, (B, 3, F, H, W) in [−1, 1]."""
    return video_io.from_uint8(np.stack([draw_scene(scene, num_frames, size, size) for scene in scenes]))


@torch.no_grad()
def draw_batch(
    seed: list[int], dit: DiT, clips: "ClipStore", available: int, text_encoder: TextEncoder, empty: TextFeatures,
    sample_times: Callable[[int, torch.Generator], Tensor], batch_size: int, prompt_dropped: float = PROMPT_DROPPED,
) -> tuple[FlowBatch, TextFeatures]:  # fmt: skip
    """A batch and its text features; they depend only on `seed` and on the number of clips available by then.

    B = batch_size clips of those below `available`, at times (B,); a share `prompt_dropped` of them has the features of
    the empty prompt.
    """
    rng, random = np.random.default_rng(seed), generator(seed)
    chosen = rng.integers(available, size=batch_size)
    latents, first_frame = clips.read(chosen, available)  # (B, 5, 8, 8, 16), (B, 1, 8, 8, 16)
    texts = [write_caption(clips.scene(int(i)), LANGUAGES[rng.integers(2)], rng).text for i in chosen]
    dropped = torch.from_numpy(rng.random(batch_size) < prompt_dropped)
    given = torch.from_numpy(rng.random(batch_size) < FIRST_FRAME_GIVEN)
    noise = torch.randn(latents.shape, generator=random)
    batch = flow_batch(dit, latents, sample_times(batch_size, random), noise, first_frame, given)
    return batch, drop_condition(text_encoder.encode(texts), dropped, empty)


class ClipStore:
    """Latents of the training clips 0, 1, 2, … on disk, drawn and encoded when they are first needed.

    A record is the clip's latents followed by those of its first frame encoded alone, as the pipeline does it:
    (T + 1, h, w, 16) in float16. It does not depend on when it was written, nor, for one precision of the
    encoder, on the machine; a store of the other precision is refused.
    """

    CHUNK = 8  # clips encoded together, always the same ones

    def __init__(self, folder: Path, vae: VAE, num_frames: int = 17, size: int = 64, seed: int = CLIP_SEED):
        make_folder(folder)
        self.vae, self.num_frames, self.size, self.seed = vae, num_frames, size, seed
        path, self.count_file = folder / "latents.f16", folder / "count.json"
        origin = folder / "origin.txt"
        if not path.is_file():
            if not origin.is_file() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds something else than clips: choose a new folder, or one of clips")
            self.count_file.unlink(missing_ok=True)  # of latents that were removed
        self._check_origin(origin)
        self.count = self._read_count()
        T, h, w = vae.config.latent_grid(num_frames, size, size)
        shape = (CLIPS_AT_MOST, T + 1, h, w, vae.config.latent_channels)
        if path.is_file() and path.stat().st_size != 2 * math.prod(shape):
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes instead of {2 * math.prod(shape):,}: remove it, and the "
                "clips will be drawn and encoded again"
            )
        self.records = np.memmap(path, dtype=np.float16, mode="r+" if path.is_file() else "w+", shape=shape)

    def scene(self, index: int) -> Scene:
        """What clip `index` shows, given the store's seed."""
        return sample_scene([self.seed, index])

    def read(self, indices: np.ndarray, available: int) -> tuple[Tensor, Tensor]:
        """Clips `indices`, all below `available`: latents (B, T, h, w, 16), first frames (B, 1, h, w, 16); scaled."""
        self.fill(available)
        records = torch.from_numpy(self.records[indices].astype(np.float32)) * self.vae.config.scaling_factor
        return records[:, :-1], records[:, -1:]

    def fill(self, available: int) -> None:
        """Draw and encode until there are at least `available` clips, unless another process has done so.

        Raises OSError if the disk is full.
        """
        if self.count < available:
            self.count = self._read_count()
        missing = available - self.count
        if missing <= 0:
            return
        bar = screen.bar(missing, "drawing and encoding", "clip", show=missing > self.CHUNK)  # a chunk is quick
        try:
            while self.count < available:
                # The file is sparse: on a full disk, writing would kill the process.
                check_free_space(self.count_file.parent, max(self.CHUNK * self.records[0].nbytes, 2**24))
                rows = range(self.count, self.count + self.CHUNK)
                self.records[rows.start : rows.stop] = self._encode([self.scene(i) for i in rows])
                self.count += self.CHUNK
                bar.update(self.CHUNK)
                if self.count % 512 == 0:
                    self._write_count()
        finally:  # after Ctrl-C it resumes from here
            bar.close()
            self._write_count()

    def _check_origin(self, path: Path) -> None:
        """Refuse latents of other scenes or of another encoder, and those whose origin was not recorded."""
        scenes = [self.scene(i) for i in range(8)]
        origin = hashlib.sha256(f"{scenes} {self.num_frames} {choose_dtype('auto', torch.device('cpu'))}".encode())
        for scene in scenes:
            origin.update(draw_scene(scene, 3, self.size, self.size).tobytes())
        for part in (self.vae.encoder, self.vae.quant_conv):
            origin.update(digest(part).encode())
        if not (path.parent / "latents.f16").is_file():
            write_text(path, origin.hexdigest())
        if not path.is_file() or path.read_text(encoding="utf-8") != origin.hexdigest():
            raise ValueError(
                f"the latents in {path.parent} are of another world, VAE, number of frames or precision: choose "
                "another folder for clips, or the VAE of these; or remove it, and they will be drawn and encoded again"
            )

    def _read_count(self) -> int:
        return json.loads(self.count_file.read_text(encoding="utf-8")) if self.count_file.is_file() else 0

    def _write_count(self) -> None:
        self.records.flush()
        write_text(self.count_file, json.dumps(self.count))

    @torch.no_grad()
    def _encode(self, scenes: list[Scene]) -> np.ndarray:
        video = draw_videos(scenes, self.num_frames, self.size)
        with autocast(torch.device("cpu")):
            z = self.vae.encode(video).mean
            with single_frame(self.vae):
                first = self.vae.encode(video[:, :, :1]).mean
        return torch.cat([z, first], dim=2).permute(0, 2, 3, 4, 1).to(torch.float16).numpy()  # (B, T + 1, h, w, 16)
