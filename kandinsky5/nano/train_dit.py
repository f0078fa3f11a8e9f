"""The third stage: `nano` itself, text and image to video in one network; a long run, and a last one from there.

    python -m kandinsky5.nano.train_dit --folder runs/start --vae runs/vae --text runs/text
    python -m kandinsky5.nano.train_dit --folder runs/dit --start-from runs/start --clips runs/start/clips …

The clips' latents are drawn and encoded once and kept on disk, but a new one is added at every step; their
captions are written anew each time. A sample is given its first frame in 30 % of the cases, and no prompt in 10 %.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky5 import video_io
from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.files import make_folder, write_text
from kandinsky5.nano import presets
from kandinsky5.nano.judge import judge_clip, score
from kandinsky5.nano.train_text import LANGUAGES, load_text_encoder
from kandinsky5.nano.train_vae import as_checkpoint, check_folder, draw_videos, load_vae, single_frame
from kandinsky5.nano.world import Caption, Scene, caption, draw_scene, sample_scene
from kandinsky5.pipeline import Pipeline
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.training.loop import (
    GOES_ON,
    FlowBatch,
    FlowTimes,
    Recipe,
    ask,
    autocast_dit,
    digest,
    drop_condition,
    flow_batch,
    flow_loss,
    generator,
    load_average,
    refusals_in_one_line,
    train,
)
from kandinsky5.vae import VAE

RECIPE = Recipe(
    steps=12_000, learning_rate=1.5e-3, warmup=300, constant=0.5, ema=0.999, weight_decay=0.01, muon=presets.MUON
)
TIMES = FlowTimes("logit-normal", mean=1.0, std=2.2)  # 19 % above 0.95, where it is decided what goes where
# After that run 15 clips of 100 show a halo: whose weights answer above 0.7 is all the same to it, below it is not.
# One cycle nearer the data leaves 5 of 100.
LAST_RECIPE = replace(RECIPE, steps=6000, learning_rate=6e-4, constant=0.3, cycles=2)
LAST_TIMES = FlowTimes("logit-normal", mean=0.0, std=1.6)  # 56 % from 0.15 to 0.7, in place of 37
BATCH = 48
FIRST_FRAME_GIVEN, PROMPT_DROPPED = 0.3, 0.1
CLIPS_AT_FIRST, CLIPS_A_STEP, CLIPS_AT_MOST = 8000, 1, 80_000
STOPPED = f"{GOES_ON}; clips that were drawn are kept"
CLIP_SEED, TEST_SEED = 4, 2 * 10**6  # of the scenes: training, samples during training


def main() -> None:
    """Train nano's DiT, as far as it is not done."""
    parser = argparse.ArgumentParser("python -m kandinsky5.nano.train_dit", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the run lives; it goes on from there")
    parser.add_argument("--vae", type=Path, required=True, help="of which run; or of which checkpoint, such as nano")
    parser.add_argument("--text", type=Path, required=True, help="encoders of which run, or checkpoint")
    parser.add_argument(
        "--clips",
        type=Path,
        help=f"folder of latents, up to 1 GB; {CLIPS_AT_FIRST:,} are drawn before the first step, which takes some "
        "minutes, and kept (default: clips in the run's own)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        help="run or checkpoint to go on from, with a lower rate and nearer the data; without it begins at random",
    )
    parser.add_argument("--steps", type=int, help=f"default: {RECIPE.steps}, with --start-from {LAST_RECIPE.steps}")
    parser.add_argument(
        "--cycles",
        type=int,
        help=f"how often that many, the rate rising and falling anew; more of them go on from a run that is done "
        f"(default: {RECIPE.cycles}, with --start-from {LAST_RECIPE.cycles})",
    )
    parser.add_argument(
        "--seed", type=int, default=RECIPE.seed, help="of batches and noise; with --start-from not that run's own"
    )
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more work, the same result")
    arguments = parser.parse_args()
    recipe, times = (LAST_RECIPE, LAST_TIMES) if arguments.start_from else (RECIPE, TIMES)
    steps = recipe.steps if arguments.steps is None else arguments.steps
    cycles = recipe.cycles if arguments.cycles is None else arguments.cycles
    if min(steps, cycles) < 1 or arguments.seed < 0:
        parser.error(f"--steps {steps} and --cycles {cycles} must be at least 1, --seed {arguments.seed} at least 0")
    options = {"steps": steps, "cycles": cycles, "seed": arguments.seed, "checkpointing": arguments.checkpointing}
    recipe = replace(recipe, **options, origin=str(arguments.start_from or ""))
    check_folder(arguments.folder, holds_runs=False)
    vae, text_encoder = load_vae(arguments.vae), load_text_encoder(arguments.text)
    torch.manual_seed(recipe.seed)
    dit = DiT(presets.DIT)
    if arguments.start_from:
        dit.load_state_dict(load_dit(arguments.start_from).state_dict())
    clips = ClipStore(arguments.clips or arguments.folder / "clips", vae)
    train_dit(arguments.folder, dit, clips, text_encoder, recipe, times)


def load_dit(source: Path) -> DiT:
    """What the run in folder `source` has trained so far, or the DiT of a checkpoint; frozen, float32, without NABLA.

    ValueError where that has other sizes than nano.
    """
    checkpoint = as_checkpoint(source)
    if checkpoint and replace(checkpoint.config.dit, nabla=None) != presets.DIT:
        raise ValueError(f"the DiT of {source} has other sizes than nano's: training goes on from one of that family")
    if not checkpoint:
        return load_average(DiT(presets.DIT), source)
    dit = DiT(presets.DIT)
    dit.load_state_dict(checkpoint.dit.state_dict())
    return dit.eval().requires_grad_(False)


def train_dit(
    folder: Path, dit: DiT, clips: "ClipStore", text_encoder: TextEncoder, recipe: Recipe, times: FlowTimes
) -> DiT:
    """Train `nano` in `folder`, or go on; returns the DiT with averaged weights."""
    nothing = encode_text(text_encoder, [""])

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        available = min(CLIPS_AT_FIRST + CLIPS_A_STEP * seed[1], CLIPS_AT_MOST)
        batch, features = draw_batch(seed, dit, clips, available, text_encoder, nothing, sample_times=times.sample)
        with autocast_dit(dit):
            predicted = ask(dit, batch.x, batch.t, features)
        value = flow_loss(predicted, batch.velocity, batch.asked)
        return value, loss_by_time(predicted.detach(), batch)

    def sample(dit: DiT, step: int) -> dict[str, float]:
        return test(presets.NANO, dit, clips.vae, text_encoder, folder / f"sample_{step:06d}.png")

    return train(dit, loss, recipe, folder, sample=sample, sample_every=2000)


def draw_batch(
    seed: list[int],
    dit: DiT,
    clips: "ClipStore",
    available: int,
    text_encoder: TextEncoder,
    nothing: TextFeatures,
    batch_size: int = BATCH,
    sample_times: Callable[[int, torch.Generator], Tensor] = TIMES.sample,
    prompt_dropped: float = PROMPT_DROPPED,
) -> tuple[FlowBatch, TextFeatures]:
    """What a step trains on; it depends on nothing but `seed` and the number of clips that there are by then.

    B = batch_size clips of those below `available`, at times (B,), and what the DiT is told of them: nothing of a share
    `prompt_dropped`.
    """
    rng, random = np.random.default_rng(seed), generator(seed)
    chosen = rng.integers(available, size=batch_size)
    latents, first_frame = clips.read(chosen, available)  # (B, 5, 8, 8, 16), (B, 1, 8, 8, 16)
    said = [caption(clips.scene(int(i)), LANGUAGES[rng.integers(2)], rng).text for i in chosen]
    dropped = torch.from_numpy(rng.random(batch_size) < prompt_dropped)
    given = torch.from_numpy(rng.random(batch_size) < FIRST_FRAME_GIVEN)
    noise = torch.randn(latents.shape, generator=random)
    batch = flow_batch(dit, latents, sample_times(batch_size, random), noise, first_frame, given)
    return batch, drop_condition(encode_text(text_encoder, said), dropped, nothing)


def encode_text(text_encoder: TextEncoder, prompts: list[str]) -> TextFeatures:
    """`text_encoder.encode`, as tensors that a gradient may pass by."""
    return TextFeatures(*(x.clone() for x in text_encoder.encode(prompts)))


def loss_by_time(predicted: Tensor, batch: FlowBatch) -> dict[str, float]:
    """The loss of the samples near the noise and of those near the data: motion and fine detail.

    predicted: velocity (B, T, H, W, C). A part that no sample of the batch falls into is left out.
    """
    asked = batch.asked.expand_as(batch.velocity).flatten(1)
    each = ((predicted - batch.velocity).square().flatten(1) * asked).sum(dim=1) / asked.sum(dim=1)  # (B,)
    parts = {"loss_noise": batch.t > 0.8, "loss_data": batch.t < 0.4}
    return {name: float(each[where].mean()) for name, where in parts.items() if where.any()}


class ClipStore:
    """Latents of the training clips 0, 1, 2, … on disk, drawn and encoded when they are first asked for.

    A record is the clip's latents and, behind them, those of its first frame encoded alone as the pipeline does
    it: (T + 1, h, w, 16) in float16. What is in it does not depend on when it was written.
    """

    CHUNK = 8  # clips that are encoded together, always the same ones

    def __init__(self, folder: Path, vae: VAE, num_frames: int = 17, size: int = 64, seed: int = CLIP_SEED):
        make_folder(folder)
        self.vae, self.num_frames, self.size, self.seed = vae, num_frames, size, seed
        path, self.count_file = folder / "latents.f16", folder / "count.json"
        origin = folder / "origin.txt"
        if not path.is_file():
            if not origin.is_file() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds other things than clips: name a new folder for them, or one of clips")
            self.count_file.unlink(missing_ok=True)  # of latents that somebody removed
        self._check_origin(origin)
        self.count = self._read_count()
        T, side = (num_frames - 1) // vae.config.time_factor + 1, size // vae.config.space_factor
        shape = (CLIPS_AT_MOST, T + 1, side, side, vae.config.latent_channels)
        if path.is_file() and path.stat().st_size != 2 * math.prod(shape):
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes in place of {2 * math.prod(shape):,}: remove it, and the "
                "clips will be drawn and encoded again"
            )
        self.records = np.memmap(path, dtype=np.float16, mode="r+" if path.is_file() else "w+", shape=shape)

    def scene(self, index: int) -> Scene:
        """What clip `index` shows; it follows from the store's seed."""
        return sample_scene([self.seed, index])

    def read(self, indices: np.ndarray, available: int) -> tuple[Tensor, Tensor]:
        """Clips `indices`, all below `available`: latents (B, T, h, w, 16), first frames (B, 1, h, w, 16); scaled."""
        self.fill(available)
        records = torch.from_numpy(self.records[indices].astype(np.float32)) * self.vae.config.scaling_factor
        return records[:, :-1], records[:, -1:]

    def fill(self, available: int) -> None:
        """Draw and encode until there are at least `available` clips, unless another process has done so.

        OSError where the disk is full.
        """
        if self.count < available:
            self.count = self._read_count()
        if self.count >= available:
            return
        bar = tqdm(total=available, initial=self.count, desc="drawing and encoding", unit="clip", delay=2, leave=False)
        try:
            while self.count < available:
                self._check_free_space()
                rows = range(self.count, self.count + self.CHUNK)
                self.records[rows.start : rows.stop] = self._encode([self.scene(i) for i in rows])
                self.count += self.CHUNK
                bar.update(self.CHUNK)
                if self.count % 512 == 0:
                    self._keep_count()
        finally:  # after Ctrl-C the next one goes on from here
            bar.close()
            self._keep_count()

    def _check_origin(self, path: Path) -> None:
        """What is on disk belongs to scenes and an encoder that are not: with others it would be wrong.

        ValueError also where latents lie there whose origin nobody wrote down.
        """
        scenes = [self.scene(i) for i in range(8)]
        origin = hashlib.sha256(f"{scenes} {self.num_frames}".encode())
        for scene in scenes:
            origin.update(draw_scene(scene, 3, self.size, self.size).tobytes())
        for part in (self.vae.encoder, self.vae.quant_conv):
            origin.update(digest(part).encode())
        if not (path.parent / "latents.f16").is_file():
            write_text(path, origin.hexdigest())
        if not path.is_file() or path.read_text() != origin.hexdigest():
            raise ValueError(
                f"the latents in {path.parent} are of another world, VAE or number of frames: name another folder for "
                "clips, or the VAE of these; if nothing needs them, remove it, and they will be drawn and encoded again"
            )

    def _check_free_space(self) -> None:
        """The file is as long as it may ever be and takes room as it fills: a full disk would end the process."""
        free = shutil.disk_usage(self.count_file.parent).free
        if free < max(self.CHUNK * self.records[0].nbytes, 2**24):
            raise OSError(f"{self.count_file.parent} has {free / 1e6:.0f} MB free, too few for more clips: make room")

    def _read_count(self) -> int:
        return json.loads(self.count_file.read_text()) if self.count_file.is_file() else 0

    def _keep_count(self) -> None:
        self.records.flush()
        write_text(self.count_file, json.dumps(self.count))

    @torch.no_grad()
    def _encode(self, scenes: list[Scene]) -> np.ndarray:
        video = draw_videos(scenes, self.num_frames, self.size)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.vae.encode(video).mean
            with single_frame(self.vae):
                first = self.vae.encode(video[:, :, :1]).mean
        return torch.cat([z, first], dim=2).permute(0, 2, 3, 4, 1).to(torch.float16).numpy()  # (B, T + 1, h, w, 16)


# ---------------------------------------------------------------------------------------------- looking at it


def build_pipeline(config: PipelineConfig, dit: DiT, vae: VAE, text_encoder: TextEncoder) -> Pipeline:
    """Copies of the models in bf16, as they will be shipped."""
    dit, vae, text_encoder = copy.deepcopy((dit, vae, text_encoder))
    for model in (dit, vae, text_encoder):
        model.to(torch.bfloat16).eval()
    return Pipeline(config, dit, vae, text_encoder)


def test(
    config: PipelineConfig, dit: DiT, vae: VAE, text_encoder: TextEncoder, picture: Path | None, count: int = 32
) -> dict[str, float]:
    """What the judge finds in clips of fresh prompts, one object and two, English and Russian; and a contact sheet."""
    pipe = build_pipeline(config, dit, vae, text_encoder)
    size = (config.sampling.height, config.sampling.width)
    tests = [draw_test(i, 1 if i < count * 3 // 4 else 2) for i in range(count)]
    steps = min(config.sampling.num_inference_steps, 25)
    frames = pipe([said.text for _, said in tests], num_inference_steps=steps, progress=False, seed=TEST_SEED).numpy()
    answers = [score(judge_clip(clip), said) for clip, (_, said) in zip(frames, tests, strict=True)]
    one, two = answers[: count * 3 // 4], answers[count * 3 // 4 :]
    figures = {f"one_{name}": np.mean([a[name] for a in one]) for name in ("all", "colour", "shape", "motion")}
    figures |= {f"two_{name}": np.mean([a[name] for a in two]) for name in ("all", "colour", "shape", "motion")}

    few = tests[:8]
    images = [torch.from_numpy(draw_scene(scene, 1, *size)[0]) for scene, _ in few]
    given = [
        pipe(said.text, image=image, num_inference_steps=steps, progress=False)[0].numpy()
        for image, (_, said) in zip(images, few, strict=True)
    ]
    figures["image_motion"] = np.mean(
        [score(judge_clip(clip), said)["motion"] for clip, (_, said) in zip(given, few, strict=True)]
    )
    if picture:
        rows = [*frames[:8, ::4], *frames[-4:, ::4], *(clip[::4] for clip in given[:4])]  # (5, H, W, 3) each
        video_io.write_video(picture, np.concatenate([np.concatenate(list(row), axis=1) for row in rows])[None])
        text = "\n".join(said.text for _, said in [*tests[:8], *tests[-4:], *few[:4]])
        picture.with_suffix(".txt").write_text(text + "\n")
    return {name: round(float(value), 3) for name, value in figures.items()}


def draw_test(index: int, num_objects: int) -> tuple[Scene, Caption]:
    """A scene that is never trained on, and a caption of it; others may have been put into the same words."""
    rng = np.random.default_rng([TEST_SEED, index])
    scene = sample_scene(rng, "train", num_objects)
    return scene, caption(scene, LANGUAGES[index % 2], rng)


if __name__ == "__main__":
    with refusals_in_one_line(STOPPED):
        main()
