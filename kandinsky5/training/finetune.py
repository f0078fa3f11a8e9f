"""Fine-tune a checkpoint on a folder of clips: a LoRA next to its frozen DiT, or with --full the DiT itself.

    kandinsky5 finetune nano --clips stars --to runs/stars --steps 600
    kandinsky5 finetune weights/t2v-lite-sft-5s --clips foxes --to runs/foxes --trigger "Foxy style," --check

Each clip has its caption in NAME.txt next to it, or all have theirs in captions.jsonl or captions.csv. Clips and
captions are encoded once into a cache. The same command resumes an interrupted run, exactly.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from kandinsky5 import Pipeline, __version__, checkpoint, cli
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import load_config
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.files import check_replaceable, make_folder, read_json, write_json
from kandinsky5.runtime import kernels, launch, offload
from kandinsky5.runtime.device import choose_device, choose_dtype
from kandinsky5.screen import listed, printable, say
from kandinsky5.training import report, spread
from kandinsky5.training.clip_loss import Conditioning, clip_loss, held_out_loss
from kandinsky5.training.data import Clips
from kandinsky5.training.flow import FlowTimes
from kandinsky5.training.folder import CUTS, ClipSettings
from kandinsky5.training.loop import Loss, train
from kandinsky5.training.modes import autocast, gradient_checkpointing, training_precision
from kandinsky5.training.previews import Previews, read_prompts
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.state import write_events
from kandinsky5.training.validation import plot_by_flow_time
from kandinsky5.vae import VAE
from weights_convert.lora import LONGEST_TRIGGER

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

RESUMES = "run the same command to resume; what is encoded and saved is kept"
LARGE = 512  # width of a DiT from which activations are computed twice by default
SAME_RESULT = {  # options that change no result, so a run may resume with others
    "to", "cache", "check", "export", "tensorboard", "checkpointing", "offload", "prompts", "sample_every", "device",
    "sample_steps", "skip_damaged", "clips", "checkpoint", "stop_after", "attention", "shard", "sequence",
}  # fmt: skip
OTHER = {  # what a run was begun with, where it is no option
    "model": "another checkpoint",
    "data": "other clips or captions",
    "order": "clips of other names, so in another order",
}


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what, and where it goes."""

    options: argparse.Namespace
    folder: Path  # of the checkpoint
    config: PipelineConfig
    clips: Clips
    recipe: Recipe
    conditioning: Conditioning
    ranks: "Ranks | None" = None  # the processes that train it together


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    if launch.is_one_of_many():
        return cli.run(lambda: launch.together(lambda: finetune(arguments), cli.explain, RESUMES), stopped=RESUMES)
    return cli.run(lambda: finetune(arguments), stopped=RESUMES)


def finetune(arguments: list[str] | None = None) -> None:
    """Train as the options say, or with --check only say what would be trained on. Raises ValueError or OSError."""
    options = build_parser().parse_args(arguments)
    options.trigger = options.trigger.strip()
    job = prepare(options)
    if options.check:
        print(report.describe(job.clips, job.recipe, options))
        return
    if problem := report.find_misfit(job.clips, job.recipe, options):
        say(problem)
    begin(job)
    quantize = {"quantize": options.quantize} if options.quantize else {}
    pipe = Pipeline.load(
        job.folder, options.device, job.recipe.dtype, options.attention, options.offload or "model", **quantize
    )
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


def prepare(options: argparse.Namespace) -> Job:
    """Everything that can be wrong before a model is loaded. Raises ValueError or OSError."""
    folder = checkpoint.find_checkpoint(options.checkpoint)
    config = load_config(folder / "config.json")
    if config.makes_images:
        raise ValueError(f"{config.name} makes images: only models of videos can be fine-tuned")
    settings = ClipSettings.of(
        config, options.sizes, options.num_frames, options.fps, cut=options.cut, per_file=options.per_file,
        trigger=options.trigger, seed=options.seed, skip_damaged=options.skip_damaged,
    )  # fmt: skip
    shares = {"--hold-out": options.hold_out, "--caption-dropout": options.caption_dropout}
    shares |= {} if options.first_frames is None else {"--first-frames": options.first_frames}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} {share:g}: give a share from 0 to 1, or 0% to 100%")
    if options.first_frames and "i2v" not in config.tasks:
        raise ValueError(f"--first-frames {options.first_frames:g}: {config.name} makes videos from a prompt alone")
    without_lora = {f"--{name}": getattr(options, name) for name in ("rank", "alpha", "offload", "quantize")}
    if options.full and (useless := [name for name, value in without_lora.items() if value is not None]):
        raise ValueError(f"--full trains the DiT's own weights, all on the device: leave out {', '.join(useless)}")
    options.rank = 32 if options.rank is None else options.rank
    check_watching(options, config)
    if options.alpha is not None and not 0 < options.alpha < math.inf:
        raise ValueError(f"--alpha {options.alpha:g}: updates are scaled by alpha / rank, so it is finite and above 0")
    options.alpha = float(options.rank) if options.alpha is None else options.alpha
    with checkpoint.without_weights():
        dit = DiT(config.dit)
    if options.full:
        check_pattern(dit, options.modules or "")
    else:
        options.modules = options.modules or lora.MODULES
        lora.create(dit, options.rank, options.alpha, options.modules)
    options.shift = config.sampling.shift if options.shift is None else options.shift
    recipe = build_recipe(options)
    share = 0.25 if len(config.tasks) > 1 else float("i2v" in config.tasks)
    conditioning = Conditioning(
        options.caption_dropout, share if options.first_frames is None else options.first_frames
    )
    if options.checkpointing is None:
        options.checkpointing = config.dit.dim >= LARGE
    clips = Clips.open(options.clips, config, settings, decode=options.check)
    clips.hold_out(options.hold_out)
    return Job(options, folder, config, clips, recipe, conditioning, find_ranks(options, config))


def find_ranks(options: argparse.Namespace, config: PipelineConfig) -> "Ranks | None":
    """The processes that torchrun started; None for one. Raises ValueError where they cannot share the work."""
    world, sequence = dist.get_world_size() if dist.is_initialized() else 1, options.sequence
    if world == 1 and (options.shard or sequence > 1):
        raise ValueError("--shard and --sequence are for several processes: start finetune with torchrun")
    if sequence < 1 or world % sequence or config.dit.num_heads % sequence:
        fitting = [str(n) for n in range(1, world + 1) if world % n == 0 and config.dit.num_heads % n == 0]
        raise ValueError(
            f"--sequence {sequence}: {world} processes and {config.dit.num_heads} heads allow {listed(fitting)}"
        )
    if world > 1 and options.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {options.device}: torchrun gives each process a GPU, so leave it out")
    if options.shard and (options.offload or options.quantize):
        raise ValueError("--shard: ranks that share the weights need no --offload or --quantize: leave them out")
    spread.check_shares(options.accumulate, options.batch_size, world // sequence)
    if world == 1:
        return None
    from kandinsky5.runtime.parallel import Ranks

    return Ranks(1, sequence, world // sequence, choose_device(options.device).type, options.shard)


def check_watching(options: argparse.Namespace, config: PipelineConfig) -> None:
    """Raise ValueError for what would be found only at the end of a long run."""
    if options.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard: the library is not installed; pip install tensorboard, or leave it out")
    if options.full and options.export:
        raise ValueError("--export is for LoRAs: leave it out with --full, or convert the checkpoint afterwards")
    if len(options.trigger) > LONGEST_TRIGGER:
        raise ValueError(f"--trigger has {len(options.trigger):,} characters: give at most {LONGEST_TRIGGER:,}")
    if options.prompts and "t2v" not in config.tasks:
        raise ValueError(f"--prompts: {config.name} needs images, so it samples from held-out clips: leave it out")
    if options.prompts:
        read_prompts(options.prompts)


def build_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the options. Raises ValueError for numbers that make none."""
    if options.sample_every is None:
        options.sample_every = min(250, max(options.steps, 1))
    counts = ("steps", "batch_size", "accumulate", "sample_every", "sample_steps", "stop_after")
    given = {name: getattr(options, name) for name in counts if getattr(options, name) is not None}
    if wrong := [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value < 1]:
        raise ValueError(f"{', '.join(wrong)}: give at least 1")
    usual = 1e-5 if options.full else 1e-4
    rate = usual if options.learning_rate is None else options.learning_rate
    if not 0 < rate <= 1 or not 0 <= options.ema < 1 or not options.clip_norm > 0:
        raise ValueError("--learning-rate is above 0 and at most 1, --ema from 0 to below 1, --clip-norm above 0")
    if options.warmup < 0 or not 0 <= options.weight_decay < math.inf or not 0 <= options.seed < 2**63:
        raise ValueError("--warmup and --weight-decay are at least 0 and finite, --seed from 0 to below 2^63")
    if not (0 < options.shift < math.inf and 0 < options.logit_std < math.inf and abs(options.logit_mean) < 20):
        raise ValueError("--shift and --logit-std are above 0 and finite, --logit-mean between -20 and 20")
    dtype = choose_dtype(options.dtype, choose_device(options.device))
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"--dtype {options.dtype}: training is in bfloat16 or float32")
    return Recipe(
        steps=options.steps, learning_rate=rate, warmup=min(options.warmup, options.steps // 10 + 1), constant=0.5,
        betas=(0.9, 0.95), weight_decay=options.weight_decay, clip_norm=options.clip_norm,
        accumulate=options.accumulate, ema=options.ema, dtype=str(dtype).removeprefix("torch."), seed=options.seed,
        checkpointing=bool(options.full and options.checkpointing),
    )  # fmt: skip


def begin(job: Job) -> None:
    """Write run.json, or compare with the one of the run that resumes. Raises ValueError for other settings.

    Several ranks must all have the same.
    """
    path = job.options.to / "run.json"
    settings = {name: _as_json(value) for name, value in vars(job.options).items() if name not in SAME_RESULT}
    order = hashlib.sha256("\n".join(clip.content for clip in job.clips.clips).encode()).hexdigest()  # by name
    settings |= {"model": checkpoint.fingerprint(job.folder, ("dit",)), "data": job.clips.digest, "order": order}
    if job.ranks:
        launch.agree(**settings)
        if not spread.is_first(job.ranks):
            return
    make_folder(job.options.to)
    if not path.is_file():
        check_replaceable(path)
        write_json(path, settings)
        return
    before = read_json(path)
    if other := [name for name, value in settings.items() if before.get(name, value) != value]:  # older ones lack some
        changed = [OTHER.get(name) or _changed(name, before[name], settings[name]) for name in other]
        raise ValueError(
            f"the run in {job.options.to} began with {listed(changed)}: give it the same again to resume, or choose "
            "another --to"
        )


def _changed(name: str, before: Any, now: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"no {option}" if before in (None, "") else f"{option} {printable(before, 40)}, not {printable(now, 40)}"


def _as_json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


# ---------------------------------------------------------------------------------------------- training


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
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(bool(re.search(options.modules or "", name)))

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
    rows = spread.own_rows(options.accumulate, job.ranks)
    return clip_loss(dit, training, options.batch_size, _times(job), job.conditioning, options.accumulate, rows)


def validate(dit: DiT, job: Job, held: Clips) -> dict[str, float]:
    """The loss of held-out clips; {} without any. Those before are drawn, and with --tensorboard all that is logged."""
    if spread.is_first(job.ranks):
        draw_curves(job.options)
    if not held.clips:
        return {}
    return held_out_loss(dit, held, job.conditioning, job.options.seed)


def draw_curves(options: argparse.Namespace) -> None:
    """held_out.png, the loss of held-out clips by flow time, and TensorBoard's events if requested."""
    plot_by_flow_time(options.to / "samples.csv", options.to / "held_out.png")
    for name in ("loss", "samples") if options.tensorboard else ():
        write_events(options.to / f"{name}.csv", options.to / "events" / name)


def load_float32(job: Job) -> DiT:
    """The checkpoint's DiT with all weights in float32, in memory of their own."""
    with checkpoint.without_weights():
        dit = DiT(job.config.dit)
    place = checkpoint.find_part(job.folder, "dit", job.config.base)
    checkpoint.load_weights(dit, place, "dit", "cpu", torch.float32)
    for parameter in dit.parameters():
        parameter.data = parameter.data.float().clone()
    return dit


def load_shards(job: Job, device: torch.device, dtype: torch.dtype) -> DiT:
    """The checkpoint's DiT, spread over all ranks, each of which reads its rows of every weight."""
    from torch.distributed.device_mesh import init_device_mesh

    from kandinsky5.runtime import shard

    with checkpoint.without_weights():
        dit = DiT(job.config.dit)
    place = checkpoint.find_part(job.folder, "dit", job.config.base)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shard.load_shards(dit, place, "dit", device, dtype, mesh, writable=True)
    kernels.install(dit, job.options.attention)
    return dit


def gather(dit: DiT) -> DiT:
    """A sharded DiT in one piece on the CPU of the first rank, and without values on the others."""
    with checkpoint.without_weights():
        whole = DiT(dit.config)
    place = "cpu" if dist.get_rank() == 0 else "meta"
    whole.load_state_dict({name: spread.whole(x).to(place) for name, x in dit.state_dict().items()}, assign=True)
    return whole


def check_pattern(dit: DiT, pattern: str) -> None:
    """Raise ValueError unless the regular expression matches the name of one of the DiT's parameters."""
    try:
        found = any(re.search(pattern, name) for name, _ in dit.named_parameters())
    except re.error as error:
        raise ValueError(f"--modules {pattern!r} is no regular expression ({error})") from error
    if not found:
        raise ValueError(f"--modules {pattern!r} matches none of the DiT's parameters, such as visual_blocks.0.…")


def _times(job: Job) -> FlowTimes:
    return FlowTimes("logit-normal", job.options.logit_mean, job.options.logit_std, job.options.shift)


# ---------------------------------------------------------------------------------------------- what comes out


def finish(job: Job, model: nn.Module) -> None:
    """Write what was trained, its card, and the command that samples with it; the first rank does."""
    options = job.options
    if options.stop_after and options.stop_after < options.steps:
        return
    if options.shard and isinstance(model, DiT):
        model = gather(model)
    if spread.is_first(job.ranks):
        write_results(job, model)
    if job.ranks:
        launch.meet()


def write_results(job: Job, model: nn.Module) -> None:
    """The LoRA or checkpoint, its card, and on the screen the command that samples with it."""
    options = job.options
    draw_curves(options)
    said = {
        "base": job.config.name,
        "base_fingerprint": checkpoint.fingerprint(job.folder),
        "steps": str(options.steps),
        "data": job.clips.digest,
        "recipe": report.recipe_in_words(job.recipe, options),
        "made_by": f"kandinsky5 {__version__}",
    }
    command = ["python", "sample.py", job.clips.clips[0].caption.removeprefix(options.trigger).strip()]
    if isinstance(model, lora.LoRA):
        out = options.to / "lora.safetensors"
        lora.save(model, out, {**said, "rank": str(options.rank)})
        if options.export:
            lora.export(out, options.to)
        command += ["--checkpoint", str(options.checkpoint), "--lora", str(out)]
    else:
        assert isinstance(model, DiT)
        out = options.to / "checkpoint"
        if not out.exists():
            report.save_whole(out, job.folder, job.config, model)
        command[2] = f"{options.trigger} {command[2]}".strip()
        command += ["--checkpoint", str(out)]
    command += report.size_options(job.clips, job.config)
    report.write_card(options.to / "README.md", job.clips, said, shlex.join(command), options)
    print(printable(f"{out}: {options.steps:,} steps on {len(job.clips.clips):,} clips. Sample with it:"))
    print(f"    {printable(shlex.join(command))}")


# ---------------------------------------------------------------------------------------------- the command line


def build_parser() -> cli.Parser:
    """All options."""
    parser = cli.Parser(
        cli.program("kandinsky5.training.finetune"), description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="native checkpoint folder, or nano")
    add("--clips", type=Path, required=True, metavar="DIR", help="videos and images with captions")
    add("--to", type=Path, required=True, metavar="DIR", help="of the run; an unfinished one in it resumes")
    add("--check", action="store_true", help="read all clips, say what would be trained on, and stop")
    _add_what(parser.add_argument_group("what is trained"))
    _add_data(parser.add_argument_group("data"))
    _add_how(parser.add_argument_group("how"))
    _add_watching(parser.add_argument_group("watching and results"))
    return parser


def _add_what(group) -> None:
    add = group.add_argument
    add("--rank", type=int, metavar="N", help="of the LoRA (default: 32)")
    add("--alpha", type=float, metavar="X", help="its updates are scaled by alpha / rank (default: the rank)")
    add("--modules", metavar="REGEX", help="train where this is found in a name (default: ten Linears of each block)")
    add("--full", action="store_true", help="train the DiT's own weights, all or those of --modules, in float32")
    add("--trigger", default="", metavar="PHRASE", help="put before every caption, and by sample.py before prompts")


def _add_data(group) -> None:
    add = group.add_argument
    add("--sizes", type=parse_size, nargs="+", metavar="HxW", help="each clip takes the nearest in shape")
    add("--num-frames", type=int, metavar="N", help="of a clip, 4k + 1 (default: the checkpoint's)")
    add("--fps", type=cli.frame_rate, metavar="N", help="at which clips are read (default: the checkpoint's)")
    add("--cut", choices=CUTS, default="start", help="where clips of longer videos come from (default: start)")
    add("--per-file", type=int, default=1, metavar="N", help="clips of a long video, at most (default: 1)")
    add("--skip-damaged", action="store_true", help="leave damaged files out instead of stopping")
    add("--hold-out", type=parse_share, default=0.1, metavar="SHARE", help="of files not trained on (default: 10%%)")
    add("--cache", type=Path, metavar="DIR", help="of encoded clips; runs can share it (default: cache in --to)")
    add("--latents", choices=("sample", "mean"), default="sample",
        help="of clips: new samples in every step, or means, which nano was trained on (default: sample)")  # fmt: skip
    add("--caption-dropout", type=parse_share, default=0.1, metavar="SHARE", help="of samples (default: 10%%)")
    add("--first-frames", type=parse_share, metavar="SHARE",
        help="of samples given their first frame (default: 100%% for i2v, 25%% for t2v and i2v in one)")  # fmt: skip


def _add_how(group) -> None:
    add = group.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="default: 1000")
    add("--batch-size", type=int, default=1, metavar="N", help="clips at once (default: 1)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step (default: 1)")
    add("--learning-rate", type=float, metavar="X", help="default: 1e-4 for a LoRA, 1e-5 with --full")
    add("--shift", type=float, metavar="X", help="of flow times, above 1 towards the noise (default: the checkpoint's)")
    add("--logit-mean", type=float, default=0.0, metavar="X", help="of logit(t) before the shift (default: 0)")
    add("--logit-std", type=float, default=1.0, metavar="X", help="likewise, its standard deviation (default: 1)")
    add("--warmup", type=int, default=100, metavar="N", help="steps (default: 100, a tenth of --steps at most)")
    add("--weight-decay", type=float, default=1e-3, metavar="X", help="default: 1e-3")
    add("--clip-norm", type=float, default=1.0, metavar="X", help="longest gradient (default: 1)")
    add("--ema", type=float, default=0.0, metavar="X", help="decay of averaged weights, such as 0.99 (default: none)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, data, times and noise (default: 0)")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="compute activations twice: less memory, a third more work (default: for released models)")  # fmt: skip
    add("--offload", choices=("model", "blocks"), help="of the frozen DiT keep on the device all, or only one block")
    add("--quantize", choices=("int8",), help="round the frozen DiT to 8 bits: half its memory")
    add("--device", default="auto", metavar="NAME", help="such as cuda:1 (default: auto)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the frozen DiT (default: auto)")
    add("--attention", default="auto", choices=kernels.KERNELS, help="its kernel (default: auto)")
    add("--shard", action="store_true",
        help="with torchrun: each process keeps only its share of the weights, gradients and averages")  # fmt: skip
    add("--sequence", type=int, default=1, metavar="N",
        help="with torchrun: N processes share the tokens of each clip (default: 1, which shares clips)")  # fmt: skip
    add("--stop-after", type=int, metavar="N", help="stop after step N as if interrupted")


def _add_watching(group) -> None:
    add = group.add_argument
    add("--prompts", type=Path, metavar="FILE", help="one per line, for samples (default: captions of held-out clips)")
    add("--sample-every", type=int, metavar="N",
        help="steps between samples and held-out losses; none above --steps (default: 250 or --steps)")  # fmt: skip
    add("--sample-steps", type=int, metavar="N", help="of sampling (default: the checkpoint's)")
    add("--tensorboard", action="store_true", help="write events for TensorBoard too; needs pip install tensorboard")
    add("--export", action="store_true", help="write the LoRA in the authors' and diffusers' layouts as well")


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" → (512, 768), height first. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write height and width, such as 512x768")
    return int(match[1]), int(match[2])


def parse_share(text: str) -> float:
    """ "10%" or "0.1" → 0.1. Raises ArgumentTypeError for anything else."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 10% or 0.1") from error


if __name__ == "__main__":
    sys.exit(main())
