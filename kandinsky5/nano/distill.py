"""The last stages, all from `nano`: one pass without guidance, sixteen steps, and twice the length with NABLA.

python -m kandinsky5.nano.distill nocfg     --folder runs/nocfg     --teacher runs/dit   --clips runs/start/clips …
python -m kandinsky5.nano.distill distilled --folder runs/distilled --teacher runs/nocfg --clips runs/start/clips …
python -m kandinsky5.nano.distill long      --folder runs/long      --teacher runs/dit   --clips runs/long/clips …
python -m kandinsky5.nano.distill sparse    --folder runs/sparse    --teacher runs/long  --clips runs/long/clips …
"""

import argparse
import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5 import cli
from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.nano import presets, stages
from kandinsky5.nano.clips import BATCH, ClipStore, draw_batch
from kandinsky5.nano.samples import sampler
from kandinsky5.nano.train_dit import TIMES, clip_loss
from kandinsky5.sampler import flow_schedule
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.training.distill import guided_target, step_target
from kandinsky5.training.flow import FlowBatch, drop_condition, flow_loss, predict
from kandinsky5.training.modes import replaced, training_precision
from kandinsky5.training.recipe import Recipe

DISTILLATION = Recipe(steps=1000, learning_rate=3e-4, warmup=100, ema=0.995, weight_decay=0.0, muon=presets.MUON)
RECIPES = {
    "nocfg": DISTILLATION,
    "distilled": DISTILLATION,
    "long": Recipe(steps=3600, learning_rate=1e-3, warmup=100, constant=0.5, ema=0.998, muon=presets.MUON),
    "sparse": replace(DISTILLATION, steps=1800, warmup=50, constant=0.3),
}
CONFIGS = {"nocfg": presets.NOCFG, "distilled": presets.DISTILLED, "long": presets.LONG, "sparse": presets.LONG}
TEACHER_STEPS = 3  # of the teacher, for one of the sixteen
DISTILLATION_CLIPS = 12_000
LONG_BATCH = 8  # clips of 33 frames at 128 × 128
LONG_CLIPS_AT_FIRST = 640  # and one more at each step; each is drawn and encoded in a third of a second
LONG_SAMPLES, LONG_SAMPLE_EVERY = 8, 800  # each takes ten times as long as one of nano
SPARSE_CLIPS = 6656  # those that the long stage left, and more
SPARSE_TIMES = replace(TIMES, shift=2.0)  # nearer the noise, where frames have to agree on the layout
SPARSE_PROMPT_DROPPED = 0.3  # guidance has two passes, so the one without a prompt matters nearly as much


def main() -> None:
    """Run one stage of distillation, unless it is finished.

    Raises ValueError if steps are to be distilled from a checkpoint that needs guidance.
    """
    arguments, recipe = _parse()
    stages.check_folder(arguments.folder, holds_runs=False)
    vae = stages.load_vae(arguments.vae)
    text_encoder = stages.load_text_encoder(arguments.text)
    teacher, checkpoint = stages.load_dit(arguments.teacher), stages.as_checkpoint(arguments.teacher)
    if arguments.stage == "distilled" and checkpoint and checkpoint.config.sampling.guidance_scale != 1:
        raise ValueError(f"--teacher {arguments.teacher} needs guidance: distil steps from one like nano-nocfg")
    folder, config = arguments.folder, CONFIGS[arguments.stage]
    count = {"long": LONG_CLIPS_AT_FIRST, "sparse": SPARSE_CLIPS}.get(arguments.stage, DISTILLATION_CLIPS)
    clips = stages.open_clips(arguments.clips, vae, count, config.sampling.num_frames, config.sampling.height)
    teach = {"long": train_long, "sparse": train_sparse}.get(arguments.stage, distill)
    teach(folder, config, teacher, clips, text_encoder, recipe)


def _parse() -> tuple[argparse.Namespace, Recipe]:
    """The options, and the recipe that follows from them."""
    parser = cli.Parser("python -m kandinsky5.nano.distill", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=RECIPES)
    stages.add_run_options(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="run or checkpoint to start from")
    parser.add_argument("--clips", type=Path, required=True, help="folder of latents; missing ones are drawn")
    arguments = parser.parse_args()
    return arguments, stages.choose_recipe(parser, arguments, RECIPES[arguments.stage], arguments.teacher)


def distill(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Train a copy of `teacher` to predict in one pass what the teacher predicts in several; returns its average.

    With the configuration of nano-nocfg these are the two passes of guidance, at any time. With that of
    nano-distilled16steps they are three steps of a teacher that needs no guidance, at one of the sixteen times.
    """
    torch.manual_seed(recipe.seed)
    student = start_from(teacher, config)
    empty = text_encoder.encode([""])
    rope_scale = config.sampling.rope_scale
    assert rope_scale
    schedule = flow_schedule(config.sampling.num_inference_steps, config.sampling.shift)  # (17,)

    def on_schedule(count: int, generator: torch.Generator) -> Tensor:
        return schedule[torch.randint(len(schedule) - 1, (count,), generator=generator)]

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        guided = config is presets.NOCFG
        times = TIMES.sample if guided else on_schedule
        batch, features = draw_batch(seed, student, clips, DISTILLATION_CLIPS, text_encoder, empty, times, BATCH)
        if guided:
            unprompted = drop_condition(features, torch.ones(len(batch.t), dtype=torch.bool), empty)
            conditional, unconditional = (
                partial(predict, teacher, features=words, rope_scale=rope_scale) for words in (features, unprompted)
            )
            target = guided_target(conditional, unconditional, batch, presets.SAMPLING.guidance_scale)
        else:
            target = several_steps_target(teacher, batch, features, schedule, rope_scale)
        predicted = predict(student, batch.x, batch.t, features, rope_scale)
        return flow_loss(predicted, target, batch.loss_mask), {}

    with training_precision(teacher):
        sample = sampler(config, clips.vae, text_encoder, folder, 32)
        return stages.train(student, loss, recipe, folder, sample, sample_every=400)


def train_long(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Continue from `teacher` with clips of 33 frames of 128 × 128, through NABLA; returns the average."""
    sample = sampler(config, clips.vae, text_encoder, folder, LONG_SAMPLES)
    dit, count = start_from(teacher, config), LONG_CLIPS_AT_FIRST
    loss = clip_loss(dit, clips, text_encoder, TIMES, config.sampling.rope_scale, count, LONG_BATCH)
    return stages.train(dit, loss, recipe, folder, sample, sample_every=LONG_SAMPLE_EVERY)


def train_sparse(
    folder: Path, config: PipelineConfig, teacher: DiT, clips: ClipStore, text_encoder: TextEncoder, recipe: Recipe
) -> DiT:
    """Train a copy of `teacher` to predict through NABLA what the teacher predicts with full attention.

    Near the noise a single clip, one of very many that fit, teaches little about how its frames come to agree; the
    teacher's prediction is the mean over all of them. Every third step uses full attention, which would otherwise be
    forgotten. Returns the average.
    """
    torch.manual_seed(recipe.seed)
    student = start_from(teacher, config)
    empty = text_encoder.encode([""])
    rope_scale = config.sampling.rope_scale
    assert rope_scale

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        arguments = (seed, student, clips, SPARSE_CLIPS, text_encoder, empty, SPARSE_TIMES.sample, LONG_BATCH)
        batch, features = draw_batch(*arguments, prompt_dropped=SPARSE_PROMPT_DROPPED)
        with torch.no_grad():
            target = predict(teacher, batch.x, batch.t, features, rope_scale)
        full = seed[1] % 3 == 2
        with replaced(student, config=teacher.config) if full else contextlib.nullcontext():
            predicted = predict(student, batch.x, batch.t, features, rope_scale)
        value = flow_loss(predicted, target, batch.loss_mask)
        return value, {"loss_full" if full else "loss_nabla": float(value.detach())}

    sample = sampler(config, clips.vae, text_encoder, folder, LONG_SAMPLES)
    with training_precision(teacher):
        return stages.train(student, loss, recipe, folder, sample, sample_every=LONG_SAMPLE_EVERY)


def start_from(teacher: DiT, config: PipelineConfig) -> DiT:
    """A DiT of another preset with the teacher's weights."""
    student = DiT(config.dit)
    student.load_state_dict(teacher.state_dict())
    return student


def several_steps_target(
    teacher: DiT, batch: FlowBatch, features: TextFeatures, schedule: Tensor, rope_scale: tuple[float, float, float]
) -> Tensor:
    """The velocity (B, T, H, W, C) that leads where TEACHER_STEPS even steps lead, to the next time of the schedule.

    schedule: (steps + 1,); each t of the batch is one of it. A given first frame stays as it is.
    """
    channels = teacher.config.in_channels
    x, condition = batch.x[..., :channels], batch.x[..., channels:]
    end = schedule[(schedule[:, None] - batch.t).abs().argmin(dim=0) + 1]  # (B,)
    parts = torch.linspace(0, 1, TEACHER_STEPS + 1)[:, None]
    times = batch.t + parts * (end - batch.t)  # (4, B)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return predict(teacher, torch.cat([x, condition], dim=-1), t, features, rope_scale) * batch.loss_mask

    return step_target(velocity, x, times)


if __name__ == "__main__":
    sys.exit(stages.run(main, stages.STOPPED))
