"""The last stages, all from `nano`: guidance in one pass, sixteen steps, and twice the length with NABLA in two stages.

python -m kandinsky5.nano.distill nocfg     --folder runs/nocfg     --teacher runs/dit   --clips runs/start/clips …
python -m kandinsky5.nano.distill distilled --folder runs/distilled --teacher runs/nocfg --clips runs/start/clips …
python -m kandinsky5.nano.distill long      --folder runs/long      --teacher runs/dit   --clips runs/long/clips …
python -m kandinsky5.nano.distill sparse    --folder runs/sparse    --teacher runs/long  --clips runs/long/clips …
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.nano import presets
from kandinsky5.nano.train_dit import CLIPS_AT_MOST, STOPPED, TIMES, ClipStore, draw_batch, encode_text, load_dit, test
from kandinsky5.nano.train_text import load_text_encoder
from kandinsky5.nano.train_vae import as_checkpoint, check_folder, load_vae
from kandinsky5.sampler import flow_schedule
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.training.loop import (
    FlowBatch,
    Recipe,
    ask,
    autocast_dit,
    flow_loss,
    guided_target,
    refusals_in_one_line,
    step_target,
    train,
)
from kandinsky5.vae import VAE

RECIPES = {
    "nocfg": Recipe(steps=1000, learning_rate=3e-4, warmup=100, ema=0.995, weight_decay=0.0, muon=presets.MUON),
    "distilled": Recipe(steps=1000, learning_rate=3e-4, warmup=100, ema=0.995, weight_decay=0.0, muon=presets.MUON),
    "long": Recipe(steps=3600, learning_rate=1e-3, warmup=100, constant=0.5, ema=0.998, muon=presets.MUON),
    "sparse": Recipe(
        steps=1800, learning_rate=3e-4, warmup=50, constant=0.3, ema=0.995, weight_decay=0.0, muon=presets.MUON
    ),
}
CONFIGS = {"nocfg": presets.NOCFG, "distilled": presets.DISTILLED, "long": presets.LONG, "sparse": presets.LONG}
TEACHER_STEPS = 3  # of the teacher, for one of the sixteen
DISTILLATION_CLIPS = 12_000
LONG_BATCH = 8  # clips of 33 frames at 128 x 128
LONG_CLIPS_AT_FIRST, LONG_CLIPS_A_STEP = 640, 1  # on disk; each is drawn and encoded in a third of a second
SPARSE_CLIPS = 6656  # what the long stage left, and more
SPARSE_TIMES = replace(TIMES, shift=2.0)  # nearer the noise, where frames have to agree on what goes where
SPARSE_PROMPT_DROPPED = 0.3  # guidance asks twice, so what is answered without a prompt counts nearly as much


def main() -> None:
    """Run one stage of distillation, as far as it is not done.

    ValueError where steps are to be distilled from a checkpoint that needs guidance.
    """
    parser = argparse.ArgumentParser("python -m kandinsky5.nano.distill", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument("--folder", type=Path, required=True, help="where the run lives; it goes on from there")
    parser.add_argument("--teacher", type=Path, required=True, help="run or checkpoint to start from")
    parser.add_argument("--clips", type=Path, required=True, help="folder of latents; drawn as far as needed")
    parser.add_argument("--vae", type=Path, required=True, help="of which run; or of which checkpoint, such as nano")
    parser.add_argument("--text", type=Path, required=True, help="encoders of which run, or checkpoint")
    parser.add_argument("--steps", type=int, help="default: as many as the stage's recipe has")
    parser.add_argument("--seed", type=int, default=0, help="of batches and noise; from a checkpoint, not that one's")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more work, the same result")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.stage]
    steps = recipe.steps if arguments.steps is None else arguments.steps
    if steps < 1 or arguments.seed < 0:
        parser.error(f"--steps {steps} must be at least 1 and --seed {arguments.seed} at least 0")
    options = {"steps": steps, "seed": arguments.seed, "checkpointing": arguments.checkpointing}
    recipe = replace(recipe, **options, origin=str(arguments.teacher))
    check_folder(arguments.folder, holds_runs=False)
    vae = load_vae(arguments.vae)
    text_encoder = load_text_encoder(arguments.text)
    teacher, checkpoint = load_dit(arguments.teacher), as_checkpoint(arguments.teacher)
    if arguments.stage == "distilled" and checkpoint and checkpoint.config.sampling.guidance_scale != 1:
        raise ValueError(f"--teacher {arguments.teacher} needs guidance: steps are distilled from one like nano-nocfg")
    folder, config = arguments.folder, CONFIGS[arguments.stage]
    clips = ClipStore(arguments.clips, vae, config.sampling.num_frames, config.sampling.height)
    stages = {"nocfg": distill, "distilled": distill, "long": train_long, "sparse": train_sparse}
    stages[arguments.stage](folder, config, teacher, clips, text_encoder, recipe)


def distill(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Train a copy of `teacher` to answer in one pass what the teacher answers in more; returns its average.

    With the configuration of nano-nocfg these are the two passes of guidance, at any time. With that of
    nano-distilled16steps they are three steps of a teacher that needs no guidance, at one of the sixteen times.
    """
    torch.manual_seed(recipe.seed)
    student = start_from(teacher, config)
    nothing = encode_text(text_encoder, [""])
    schedule = flow_schedule(config.sampling.num_inference_steps, config.sampling.shift)  # (17,)

    def on_schedule(count: int, generator: torch.Generator) -> Tensor:
        return schedule[torch.randint(len(schedule) - 1, (count,), generator=generator)]

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        arguments = (seed, student, clips, DISTILLATION_CLIPS, text_encoder, nothing)
        if config is presets.NOCFG:
            batch, features = draw_batch(*arguments)
            with autocast_dit(teacher):
                target = guided_target(teacher, batch, features, nothing, presets.SAMPLING.guidance_scale)
        else:
            batch, features = draw_batch(*arguments, sample_times=on_schedule)
            with autocast_dit(teacher):
                target = _several_steps(teacher, batch, features, schedule)
        with autocast_dit(student):
            predicted = ask(student, batch.x, batch.t, features)
        return flow_loss(predicted, target, batch.asked), {}

    return train(student, loss, recipe, folder, _sampler(config, clips.vae, text_encoder, folder), sample_every=400)


def train_long(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Go on from `teacher` with clips of 33 frames of 128 × 128, through NABLA; returns the average."""
    torch.manual_seed(recipe.seed)
    dit = start_from(teacher, config)
    nothing = encode_text(text_encoder, [""])

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        available = min(LONG_CLIPS_AT_FIRST + LONG_CLIPS_A_STEP * seed[1], CLIPS_AT_MOST)
        batch, features = draw_batch(seed, dit, clips, available, text_encoder, nothing, batch_size=LONG_BATCH)
        with autocast_dit(dit):
            predicted = _ask_long(dit, batch, features, config)
        return flow_loss(predicted, batch.velocity, batch.asked), {}

    sample = _sampler(config, clips.vae, text_encoder, folder, count=8)  # each takes ten times as long as one of nano
    return train(dit, loss, recipe, folder, sample, sample_every=800)


def train_sparse(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Train a copy of `teacher` to answer through NABLA what the teacher answers with full attention.

    A clip teaches little of how its frames come to agree near the noise, where it is one of very many that fit; the
    teacher's answer is the mean over all of them. Every third step is with full attention, which would else be
    forgotten. Returns the average.
    """
    torch.manual_seed(recipe.seed)
    student = start_from(teacher, config)
    full = copy.copy(student)  # the same weights
    full.config = teacher.config
    nothing = encode_text(text_encoder, [""])

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        arguments = (seed, student, clips, SPARSE_CLIPS, text_encoder, nothing, LONG_BATCH, SPARSE_TIMES.sample)
        batch, features = draw_batch(*arguments, prompt_dropped=SPARSE_PROMPT_DROPPED)
        with torch.no_grad(), autocast_dit(teacher):
            target = _ask_long(teacher, batch, features, config)
        asked = full if seed[1] % 3 == 2 else student
        with autocast_dit(asked):
            predicted = _ask_long(asked, batch, features, config)
        value = flow_loss(predicted, target, batch.asked)
        return value, {"loss_full" if asked is full else "loss_nabla": float(value.detach())}

    sample = _sampler(config, clips.vae, text_encoder, folder, count=8)
    return train(student, loss, recipe, folder, sample, sample_every=800)


def start_from(teacher: DiT, config: PipelineConfig) -> DiT:
    """A DiT of another preset with the teacher's weights."""
    student = DiT(config.dit)
    student.load_state_dict(teacher.state_dict())
    return student


def _ask_long(dit: DiT, batch: FlowBatch, features: TextFeatures, config: PipelineConfig) -> Tensor:
    """What `dit` answers at positions that are scaled, as sampling of clips of this size scales them."""
    assert config.sampling.rope_scale, config
    return ask(dit, batch.x, batch.t, features, config.sampling.rope_scale)


def _several_steps(teacher: DiT, batch: FlowBatch, features: TextFeatures, schedule: Tensor) -> Tensor:
    """Where the teacher gets between two times of the schedule, in steps as even as sampling's; as a velocity."""
    channels = teacher.config.in_channels
    x, condition = batch.x[..., :channels], batch.x[..., channels:]
    end = schedule[(schedule[:, None] - batch.t).abs().argmin(dim=0) + 1]  # (B,)
    parts = torch.linspace(0, 1, TEACHER_STEPS + 1)[:, None]
    times = batch.t + parts * (end - batch.t)  # (4, B)

    def velocity(x: Tensor, t: Tensor) -> Tensor:  # a given first frame stays as it is
        return ask(teacher, torch.cat([x, condition], dim=-1), t, features) * batch.asked

    return step_target(velocity, x, times)


def _sampler(config: PipelineConfig, vae: VAE, text_encoder: TextEncoder, folder: Path, count: int = 32):
    def sample(dit: DiT, step: int) -> dict[str, float]:
        return test(config, dit, vae, text_encoder, folder / f"sample_{step:06d}.png", count)

    return sample


if __name__ == "__main__":
    with refusals_in_one_line(STOPPED):
        main()
