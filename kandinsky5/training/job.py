"""What finetune is asked to do: its options, and the checks of all that can be wrong before a model is loaded."""

import argparse
import hashlib
import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from kandinsky5 import checkpoint, cli
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import load_config
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.files import check_replaceable, make_folder, read_json, write_json
from kandinsky5.runtime import kernels, launch
from kandinsky5.runtime.device import choose_device, choose_dtype
from kandinsky5.screen import listed, printable
from kandinsky5.training import spread
from kandinsky5.training.clip_loss import Conditioning
from kandinsky5.training.data import Clips
from kandinsky5.training.folder import CUTS, ClipSettings, is_read
from kandinsky5.training.previews import read_prompts
from kandinsky5.training.recipe import Recipe, matching
from weights_convert.lora import LONGEST_TRIGGER

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

LARGE = 512  # width of a DiT from which activations are computed twice by default
SAME_RESULT = {  # options that change no result, so a run may resume with others
    "to", "cache", "check", "export", "tensorboard", "checkpointing", "offload", "prompts", "sample_every", "device",
    "sample_steps", "skip_damaged", "clips", "checkpoint", "stop_after", "attention", "shard", "sequence",
}  # fmt: skip
PLACES = {"to", "cache", "clips", "checkpoint"}  # may be called otherwise on another machine
RESULTS = ("README.md", "lora.safetensors", "checkpoint")  # what a run writes that another folder may hold too
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
        matching(dit, options.modules or "", "--modules")
    else:
        options.modules = options.modules or lora.MODULES
        lora.create(dit, options.rank, options.alpha, options.modules)
    options.shift = config.sampling.shift if options.shift is None else options.shift
    recipe = build_recipe(options)
    share = 0.25 if len(config.tasks) > 1 else float("i2v" in config.tasks)
    share = share if options.first_frames is None else options.first_frames
    conditioning = Conditioning(options.caption_dropout, share)
    streamed = options.offload == "blocks"
    if options.checkpointing is None:
        options.checkpointing = config.dit.dim >= LARGE or streamed
    if streamed and not options.checkpointing:
        raise ValueError("--no-checkpointing: with --offload blocks a block is computed again for its gradient")
    for name, place in (("to", options.to), ("cache", options.cache)):
        if place and is_read(place.resolve(), options.clips.resolve()):
            raise ValueError(f"--{name} {place} is in --clips {options.clips}, which is all read: name another folder")
    clips = Clips.open(options.clips, config, settings, decode=options.check)
    clips.hold_out(options.hold_out)
    return Job(options, folder, config, clips, recipe, conditioning, find_ranks(options, config))


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
    """The recipe of the options. Raises ValueError for invalid values."""
    if options.sample_every is None:
        options.sample_every = min(250, options.steps)
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


def begin(job: Job) -> None:
    """Write run.json, or compare with the one of the run that resumes. Raises ValueError for other settings.

    Several ranks must all have the same.
    """
    path = job.options.to / "run.json"
    options = {name: _as_json(value) for name, value in vars(job.options).items()}
    settings = {name: value for name, value in options.items() if name not in SAME_RESULT}
    order = hashlib.sha256("\n".join(clip.content for clip in job.clips.clips).encode()).hexdigest()  # by name
    settings |= {"model": checkpoint.fingerprint(job.folder, ("dit",)), "data": job.clips.digest, "order": order}
    if job.ranks:
        options = {name: value for name, value in options.items() if name not in PLACES}
        launch.agree(**options | settings, precision=job.recipe.dtype)
        make_folder(job.options.to)
        launch.check_shared(job.options.to)
        if not spread.is_first(job.ranks):
            return
    make_folder(job.options.to)
    if not path.is_file():
        if there := [name for name in RESULTS if (job.options.to / name).exists()]:
            raise ValueError(f"{job.options.to} holds {listed(there)} of something else: choose another --to")
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
    if before in (None, ""):
        return f"no {option}"
    return f"{option} {printable(before, 40)}" + ("" if now in (None, "") else f", not {printable(now, 40)}")


def _as_json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


# ---------------------------------------------------------------------------------------------- the command line


def build_parser(description: str | None) -> cli.Parser:
    """All options."""
    parser = cli.Parser(cli.program("kandinsky5.training.finetune"), description=description)
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
    add("--per-file", type=cli.positive, default=1, metavar="N", help="clips of a long video, at most (default: 1)")
    add("--skip-damaged", action="store_true", help="read all first, and leave damaged files out")
    add("--hold-out", type=parse_share, default=0.1, metavar="SHARE", help="of files not trained on (default: 10%%)")
    add("--cache", type=Path, metavar="DIR", help="of encoded clips; runs can share it (default: cache in --to)")
    add("--latents", choices=("sample", "mean"), default="sample",
        help="of clips: new samples in every step, or means, which nano was trained on (default: sample)")  # fmt: skip
    add("--caption-dropout", type=parse_share, default=0.1, metavar="SHARE", help="of samples (default: 10%%)")
    add("--first-frames", type=parse_share, metavar="SHARE",
        help="of samples given their first frame (default: 100%% for i2v, 25%% for t2v and i2v in one)")  # fmt: skip


def _add_how(group) -> None:
    add = group.add_argument
    add("--steps", type=cli.positive, default=1000, metavar="N", help="default: 1000")
    add("--batch-size", type=cli.positive, default=1, metavar="N", help="clips at once (default: 1)")
    add("--accumulate", type=cli.positive, default=1, metavar="N", help="batches per step (default: 1)")
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
        help="compute activations twice: less memory, a third more work (default: for released models and "
        "--offload blocks)")  # fmt: skip
    add("--offload", choices=("model", "blocks"), help="of the frozen DiT keep on the device all, or only one block")
    add("--quantize", choices=("int8",), help="round the frozen DiT to 8 bits: half its memory")
    add("--device", default="auto", metavar="NAME", help="such as cuda:1 (default: auto)")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the frozen DiT (default: auto)")
    add("--attention", default="auto", choices=kernels.KERNELS, help="its kernel (default: auto)")
    add("--shard", action="store_true",
        help="with torchrun: each process keeps only its share of the weights, gradients and averages")  # fmt: skip
    add("--sequence", type=int, default=1, metavar="N",
        help="with torchrun: N processes share the tokens of each clip (default: 1, which shares clips)")  # fmt: skip
    add("--stop-after", type=cli.positive, metavar="N", help="stop after step N as if interrupted")


def _add_watching(group) -> None:
    add = group.add_argument
    add("--prompts", type=Path, metavar="FILE", help="one per line, for samples (default: captions of held-out clips)")
    add("--sample-every", type=cli.positive, metavar="N",
        help="steps between samples and held-out losses; none above --steps (default: 250 or --steps)")  # fmt: skip
    add("--sample-steps", type=cli.positive, metavar="N", help="of sampling (default: the checkpoint's)")
    add("--tensorboard", action="store_true", help="write events for TensorBoard too; needs pip install tensorboard")
    add("--export", action="store_true", help="write the LoRA in the authors' and diffusers' layouts as well")


def parse_size(text: str) -> tuple[int, int]:
    """ "512x768" → (512, 768), height first. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write height and width, such as 512x768")
    return int(match[1]), int(match[2])


def parse_share(text: str) -> float:
    """ "10%" or "0.1" → 0.1. Raises ArgumentTypeError for anything but 0 to 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 0% to 100%, or 0 to 1")
    return share
