"""What nano's training stages share: their options, where they may live, and what they start from."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kandinsky5 import cli
from kandinsky5.checkpoint import find_shipped
from kandinsky5.clip import CLIPText
from kandinsky5.dit import DiT
from kandinsky5.files import make_folder
from kandinsky5.nano import presets
from kandinsky5.nano.clips import ClipStore
from kandinsky5.pipeline import Pipeline
from kandinsky5.qwen import Qwen
from kandinsky5.runtime import ending, launch
from kandinsky5.text_encoder import TextEncoder
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.training import loop, state_folder
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.state import digest, load_average
from kandinsky5.vae import VAE

RESUMES = "run the same command to resume (saved every minute; nothing is saved in the first)"
STOPPED = f"{RESUMES}; clips already drawn are kept"


def run(main: Callable[[], None], stopped: str) -> int:
    """The exit code of a stage's command, on one process or on several under torchrun."""
    return cli.run(lambda: ending.together(main, cli.explain, stopped), stopped)


def train(model: nn.Module, loss: loop.Loss, recipe: Recipe, folder: Path, sample: Any = None, **options: Any) -> Any:
    """`loop.train`; under torchrun each rank computes its share of a step's batches, and the first one samples.

    Raises ValueError where the ranks cannot share them evenly.
    """
    if not launch.is_one_of_many():
        return loop.train(model, loss, recipe, folder, sample, **options)
    from kandinsky5.runtime.parallel import Ranks

    ranks = Ranks(data=dist.get_world_size())
    if recipe.accumulate % ranks.data:
        raise ValueError(
            f"{ranks.data} processes cannot share the {recipe.accumulate} batches of a step: give --accumulate "
            f"{ranks.data}, or another multiple"
        )
    make_folder(folder)
    launch.check_shared(folder)
    launch.agree(weights=digest(model))
    return loop.train(model, loss, recipe, folder, None if launch.rank() else sample, ranks=ranks, **options)


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Inside, the first rank is alone, and then come the others, who find what it has written."""
    if launch.rank():
        launch.meet()
    yield
    if not launch.rank():
        launch.meet()


def open_clips(folder: Path, vae: VAE, count: int, *sizes: int) -> ClipStore:
    """The clips in a folder; on several ranks the first one draws `count` of them while the others wait."""
    with first_rank_first():
        clips = ClipStore(folder, vae, *sizes)
        if launch.is_one_of_many():
            clips.fill(count)
    return clips


def parse(stage: str, description: str | None) -> tuple[Path, int]:
    """The folder of a stage of several runs, and the batches per step, from the command line."""
    parser = cli.Parser(f"python -m kandinsky5.nano.{stage}", description=(description or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; unfinished ones resume")
    add_accumulate(parser)
    options = parser.parse_args()
    check_folder(options.folder, holds_runs=True)
    return options.folder, options.accumulate


def add_accumulate(parser: argparse.ArgumentParser) -> None:
    """How many batches a step has, which processes share under torchrun."""
    parser.add_argument("--accumulate", type=cli.positive, default=1, metavar="N", help="batches per step (default: 1)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of every run of a DiT."""
    add_accumulate(parser)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="of the run; an unfinished one resumes")
    add("--vae", type=Path, required=True, help="folder of the VAE's runs, or a checkpoint such as nano")
    add("--text", type=Path, required=True, help="folder of the text encoders' runs, or a checkpoint")
    add("--steps", type=cli.positive, help="default: the recipe's")
    add("--seed", type=int, default=0, help="of batches and noise; choose another than the run's that it starts from")
    add("--checkpointing", action="store_true", help="less memory, more work, the same result")


def choose_recipe(parser: cli.Parser, arguments: argparse.Namespace, recipe: Recipe, origin: Path | None) -> Recipe:
    """The recipe with these options. Raises ValueError for invalid ones."""
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: it must be at least 0")
    options = {name: getattr(arguments, name) for name in ("seed", "checkpointing", "accumulate")}
    return replace(recipe, **options, steps=arguments.steps or recipe.steps, origin=str(origin or ""))


def check_folder(folder: Path, holds_runs: bool) -> None:
    """Raise ValueError if `folder` belongs to something else; it is meant for several runs (holds_runs) or for one."""
    if str(folder) in presets.PRESETS:
        raise ValueError(f"--folder {folder} would hide the checkpoint of that name: choose another")
    if (folder / "origin.txt").is_file():
        raise ValueError(f"--folder {folder} holds clips, which any stage may read: choose another for the run")
    if holds_runs and (folder / "loss.csv").is_file():
        raise ValueError(f"--folder {folder} is the run of another stage: choose another, or this stage's own")
    if not holds_runs and any(folder.glob("*/loss.csv")):
        raise ValueError(f"--folder {folder} holds other runs: choose another, such as {folder / 'dit'}")


def is_checkpoint(source: Path) -> bool:
    """Whether it is a checkpoint's folder or the name of a bundled one, and not a run's folder."""
    return (find_shipped(source) / "config.json").is_file()


def as_checkpoint(source: Path) -> Pipeline | None:
    """The checkpoint at `source`, in float32 on the CPU; None if it is a run's folder."""
    return Pipeline.load(source, device="cpu", dtype=torch.float32) if is_checkpoint(source) else None


def load_vae(source: Path) -> VAE:
    """The VAE of a run's folder, as far as it is trained, or of a checkpoint; frozen, in float32.

    Its latents are final once they are standardised.
    """
    if checkpoint := as_checkpoint(source):
        vae = VAE(checkpoint.vae.config)
        vae.load_state_dict(checkpoint.vae.state_dict())
        return vae.eval().requires_grad_(False)
    finished = "decoder" if state_folder.find(source / "decoder") else "standardised"
    return load_average(VAE(presets.VAE), source / finished)


def load_text_encoder(source: Path) -> TextEncoder:
    """Both language models with their tokenizers, of a run's folder or of a checkpoint; frozen, in float32."""
    if checkpoint := as_checkpoint(source):
        return checkpoint.text_encoder
    return TextEncoder(
        presets.TEXT,
        load_average(Qwen(presets.QWEN), source / "qwen", "qwen."),
        load_average(CLIPText(presets.CLIP), source / "clip", "clip."),
        Tokenizer.load(source / "qwen_tokenizer"),
        Tokenizer.load(source / "clip_tokenizer"),
    )


def load_dit(source: Path) -> DiT:
    """The DiT of a run's folder, as far as it is trained, or of a checkpoint; frozen, in float32, without NABLA.

    Raises ValueError if it has other sizes than nano.
    """
    checkpoint = as_checkpoint(source)
    if not checkpoint:
        return load_average(DiT(presets.DIT), source)
    if replace(checkpoint.config.dit, nabla=None) != presets.DIT:
        raise ValueError(f"the DiT of {source} has other sizes than nano's: start from a model of that family")
    dit = DiT(presets.DIT)
    dit.load_state_dict(checkpoint.dit.state_dict())
    return dit.eval().requires_grad_(False)
