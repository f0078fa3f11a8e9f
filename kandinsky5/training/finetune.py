"""Fine-tune a checkpoint on a folder of clips: a LoRA next to its frozen DiT, or with --full the DiT itself.

    kandinsky5 finetune nano --clips bounces --to runs/bounces --steps 600
    kandinsky5 finetune weights/t2v-lite-sft-5s --clips foxes --to runs/foxes --trigger "Foxy style," --check

Each clip has its caption in NAME.txt next to it, or all have theirs in captions.jsonl or captions.csv. Clips and
captions are encoded once into a cache. The same command resumes an interrupted run, exactly.
"""

import contextlib
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from kandinsky5 import Pipeline, checkpoint, cli
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.runtime import ending, kernels, launch, offload
from kandinsky5.screen import say, showing
from kandinsky5.tensor_files import Weights
from kandinsky5.training import report, spread
from kandinsky5.training.clip_loss import clip_loss, held_out_loss
from kandinsky5.training.curves import plot_by_flow_time, write_events
from kandinsky5.training.data import Clips
from kandinsky5.training.flow import FlowTimes
from kandinsky5.training.job import Job, begin, build_parser, prepare
from kandinsky5.training.loop import Loss, train
from kandinsky5.training.modes import autocast, gradient_checkpointing, training_precision
from kandinsky5.training.previews import Previews
from kandinsky5.training.recipe import matching
from kandinsky5.vae import VAE

RESUMES = "run the same command to resume; what is encoded and saved is kept"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: ending.together(lambda: finetune(arguments), cli.explain, RESUMES), stopped=RESUMES)


def finetune(arguments: list[str] | None = None) -> None:
    """Train as the options say, or with --check only say what would be trained on. Raises ValueError or OSError."""
    options = build_parser(__doc__).parse_args(arguments)
    options.trigger = options.trigger.strip()
    job = prepare(options)
    if options.check:
        print(report.describe(job))
        return
    if problem := report.find_misfit(job):
        say(problem)
    begin(job)
    pipe = Pipeline.load(job.folder, options.device, job.recipe.dtype, options.attention, options.offload or "model",
                         quantize=options.quantize)  # fmt: skip
    assert isinstance(pipe.vae, VAE)
    origin, place = checkpoint.fingerprint(job.folder, ("vae", "qwen", "clip")), options.cache or options.to / "cache"
    share = (dist.get_rank(), dist.get_world_size()) if job.ranks else (0, 1)
    clips = job.clips.encode(pipe.vae, pipe.text_encoder, place, origin, True, *share)
    job = dataclasses.replace(job, clips=clips)
    means = dataclasses.replace(job.clips, means=options.latents == "mean")
    training, held = means.hold_out(options.hold_out)
    previews = None
    if options.sample_every <= options.steps:
        previews = Previews.prepare(pipe, options, held if held.clips else training)
        previews.writes = spread.is_first(job.ranks)
    if options.full:
        train_all(job, pipe, training, held, previews)
    else:
        train_lora(job, pipe, training, held, previews)


def train_lora(job: Job, pipe: Pipeline, training: Clips, held: Clips, previews: Previews | None) -> None:
    """Train a LoRA in float32 next to the frozen DiT, and write it."""
    options = job.options
    if options.shard:
        pipe.dit = load_shards(job, pipe.device, getattr(torch, job.recipe.dtype))
    dit = pipe.dit.requires_grad_(False)
    torch.manual_seed(options.seed)
    adapter = lora.create(dit, options.rank, options.alpha, options.modules)
    adapter.trigger = options.trigger
    count = sum(p.numel() for p in adapter.parameters())
    say(f"training {count / 1e6:,.2f} M parameters of a LoRA, next to a frozen DiT")
    with offload.awake(dit), contextlib.ExitStack() as changes:
        lora.add(dit, adapter, dtype=torch.float32)
        changes.enter_context(training_precision(dit))
        if options.checkpointing:
            changes.enter_context(gradient_checkpointing(dit))
        changes.enter_context(spread.spread(dit, job.ranks))

        def sample(average: nn.Module, step: int) -> dict[str, float]:
            assert isinstance(average, lora.LoRA)
            with _instead(dit, adapter, average), autocast(pipe.device, job.recipe.dtype):
                values = validate(dit, job, held)
                if previews:
                    average.set_weight(0)
                    previews.show_base()
                    average.set_weight(1)
                    previews.show(step)
            return values

        average = train(adapter, build_loss(job, dit, training), job.recipe, options.to, sample, options.sample_every,
                        log_every=10, stop_after=options.stop_after, ranks=job.ranks)  # fmt: skip
        lora.remove(dit, adapter)
    finish(job, average)


@contextlib.contextmanager
def _instead(dit: DiT, trained: lora.LoRA, average: lora.LoRA) -> Iterator[None]:
    """Inside, the DiT computes with the averaged LoRA."""
    if average is trained:
        yield
        return
    lora.remove(dit, trained)
    lora.add(dit, average, dtype=torch.float32)
    try:
        yield
    finally:
        lora.remove(dit, average)
        lora.add(dit, trained, dtype=torch.float32)


def train_all(job: Job, pipe: Pipeline, training: Clips, held: Clips, previews: Previews | None) -> None:
    """Train the DiT's own weights in float32, all or those whose names match, and write a checkpoint."""
    options, device, average = job.options, pipe.device, None
    if options.shard:
        if previews:  # the base model is sharded as well, and leaves before the one that is trained comes
            pipe.dit = load_shards(job, device, getattr(torch, job.recipe.dtype))
            previews.show_base()
            pipe.dit.to("meta")
        dit = load_shards(job, device, torch.float32)
        average = load_shards(job, device, torch.float32) if job.recipe.ema else None
    else:
        dit = load_float32(job).to(device)
        kernels.install(dit, options.attention)
    dit.requires_grad_(False)
    for parameter in matching(dit, options.modules or "", "--modules"):
        parameter.requires_grad_(True)

    def sample(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, DiT)
        with (
            training_precision(average),
            spread.spread(average, job.ranks if average is not dit else None),
            autocast(device, job.recipe.dtype),
        ):
            values = validate(average, job, held)
            if previews:
                with offload.awake(pipe.dit):
                    previews.show_base()
                previews.show(step, average)
        return values

    average = train(dit, build_loss(job, dit, training), job.recipe, options.to, sample, options.sample_every,
                    log_every=10, stop_after=options.stop_after, ranks=job.ranks, average=average)  # fmt: skip
    finish(job, average)


def build_loss(job: Job, dit: DiT, training: Clips) -> Loss:
    """The loss of this process's share of each step."""
    options = job.options
    times = FlowTimes("logit-normal", options.logit_mean, options.logit_std, options.shift)
    rows = spread.own_rows(options.accumulate, job.ranks)
    return clip_loss(dit, training, options.batch_size, times, job.conditioning, options.accumulate, rows)


def validate(dit: DiT, job: Job, held: Clips) -> dict[str, float]:
    """The loss of held-out clips; {} without any. Those before are drawn, and with --tensorboard all that is logged."""
    if spread.is_first(job.ranks):
        draw_curves(job.options)
    if not held.clips:
        return {}
    return held_out_loss(dit, held, job.conditioning, job.options.seed)


def draw_curves(options: Namespace) -> None:
    """held_out.png, the loss of held-out clips by flow time, and TensorBoard's events if requested."""
    with showing("plot or event of the losses"):
        plot_by_flow_time(options.to / "samples.csv", options.to / "held_out.png")
        for name in ("loss", "samples") if options.tensorboard else ():
            write_events(options.to / f"{name}.csv", options.to / "events" / name)


def build_empty(job: Job) -> tuple[DiT, Weights]:
    """The checkpoint's DiT without its weights, and where they are."""
    with checkpoint.without_weights():
        dit = DiT(job.config.dit)
    return dit, checkpoint.find_weights(job.folder, "dit", job.config.base)


def load_float32(job: Job) -> DiT:
    """The checkpoint's DiT with all weights in float32, in memory of their own."""
    dit, weights = build_empty(job)
    checkpoint.load_weights(dit, weights, "cpu", torch.float32)
    for parameter in dit.parameters():
        parameter.data = parameter.data.float().clone()
    return dit


def load_shards(job: Job, device: torch.device, dtype: torch.dtype) -> DiT:
    """The checkpoint's DiT, spread over all ranks, each of which reads its rows of every weight."""
    from torch.distributed.device_mesh import init_device_mesh

    from kandinsky5.runtime import shard

    dit, weights = build_empty(job)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shard.load_shards(dit, weights, device, dtype, mesh, writable=True)
    kernels.install(dit, job.options.attention)
    return dit


def gather(job: Job, dit: DiT) -> DiT:
    """A sharded DiT in one piece on the CPU of the first rank, and without values on the others."""
    whole, _ = build_empty(job)
    place = "cpu" if dist.get_rank() == 0 else "meta"
    whole.load_state_dict({name: spread.whole(x).to(place) for name, x in dit.state_dict().items()}, assign=True)
    return whole


def finish(job: Job, model: nn.Module) -> None:
    """Write what was trained, its card, and the command that samples with it; the first rank does."""
    options = job.options
    if options.stop_after and options.stop_after < options.steps:
        return
    if options.shard and isinstance(model, DiT):
        model = gather(job, model)
    if spread.is_first(job.ranks):
        draw_curves(options)
        report.write_results(job, model)
    if job.ranks:
        launch.meet()


if __name__ == "__main__":
    sys.exit(main())
