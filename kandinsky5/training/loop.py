"""Training, as far as it is the same for any model: one loop, and the losses of flow models.

The loop is a function. What differs from model to model is a function too, `loss(seed)`, which draws its batch
and its noise from the `seed` it is given (a list of numbers: the run's, the step's, the part's) and from nothing
else. So step 7,000 is the same whether the run came there in one go or was cut off and taken up ten times.

    train ──> loss(seed) ──> flow_batch ─ x_t, t, velocity ─> DiT ─> flow_loss
      └─ AdamW (or Muon), warm-up and cosine, clipping, averaged weights, state and curves on disk
"""

import contextlib
import copy
import csv
import functools
import hashlib
import math
import pickle
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kandinsky5 import dit, nabla
from kandinsky5.attention import block_sparse_attention, dense_attention
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.files import locked, make_folder, replacing
from kandinsky5.sampler import guided_velocity
from kandinsky5.text_encoder import TextFeatures

Loss = Callable[[list[int]], tuple[Tensor, dict[str, float]]]
Model = TypeVar("Model", bound=nn.Module)  # what goes in comes out
GOES_ON = "the same command goes on from its last save, which was about a minute ago; in the first minute there is none"


@dataclass(frozen=True)
class Recipe:
    """How `train` takes its steps."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200  # steps over which the rate rises from 0
    constant: float = 0.0  # share of the steps before the rate starts to fall along a cosine
    final_rate: float = 0.02  # where the cosine ends, as a share of the learning rate
    cycles: int = 1  # so often all of `steps`, warm-up to cosine, one after the other; a done run takes more of them
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01  # of matrices and kernels; biases and norms have none
    muon: str = ""  # regular expression: Muon trains the matrices whose names it finds, AdamW everything else
    muon_rate: float = 3.0  # Muon's learning rate, as a multiple of AdamW's
    clip_norm: float = 1.0
    accumulate: int = 1  # batches whose gradients are averaged in a step
    ema: float = 0.999  # decay of the averaged weights; (1 + step) / (10 + step) while that is less
    bf16: bool = True  # autocast; on a CPU with avx512_bf16 a 3-D conv gains 20×, a Linear 3×
    checkpointing: bool = False  # of a DiT's visual blocks: less memory, a third more work, the same result
    seed: int = 0
    origin: str = ""  # where the weights come from, in words; empty where they are random and any will do


def train(
    model: Model,
    loss: Loss,
    recipe: Recipe,
    folder: str | Path,
    sample: Callable[[Model, int], dict[str, float] | None] | None = None,
    sample_every: int = 1000,
    log_every: int = 20,
    save_seconds: float = 60,
    stop_after: int | None = None,
    progress: bool = True,
) -> Model:
    """Train `model` in place; returns a copy of it with the averaged weights.

    loss: seed → a scalar and figures for the log; it uses no other randomness than what it derives from the seed.
    folder: of the run. `state.pt` is all that is needed to go on, `loss.csv` and `loss.png` are the curves. If
        there is a state already the run goes on from it, with exactly the result of a run that was never cut;
        ValueError where that had another recipe or, if the recipe names an origin, other weights to begin with,
        where another process is training in it, or where anything but a DiT is to checkpoint gradients.
    sample: called with the averaged model every `sample_every` steps; its figures go to `samples.csv`.
    log_every: steps a row of the log averages over. The state is saved with a row, every `save_seconds`.
    stop_after: leave after this step as if cut off (the schedule is still the recipe's).
    progress: show steps, rate, time left and loss.
    """
    forget_activations: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    if recipe.checkpointing:
        if not isinstance(model, DiT):
            raise ValueError(f"checkpointing is for a DiT and not for a {type(model).__name__}: leave it out")
        forget_activations = functools.partial(gradient_checkpointing, model)

    folder = Path(folder)
    make_folder(folder)
    with locked(folder, f"another process trains in {folder}: wait for it, stop it, or name another folder"):
        average = copy.deepcopy(model).eval().requires_grad_(False)
        optimizers = build_optimizers(model, recipe)
        began_with = digest(model) if recipe.origin else ""
        step, seconds = load_state(folder, model, average, optimizers, recipe, began_with)
        for name in ("loss.csv", "samples.csv"):
            drop_rows_after(folder / name, step)
        began = saved = time.monotonic()
        seconds_before = seconds
        rows: list[dict[str, float]] = []
        total = recipe.cycles * recipe.steps
        last = total if stop_after is None else min(stop_after, total)

        model.train()
        if step:
            tqdm.write(f"{folder} {'goes on from' if step < last else 'is done to'} step {step:,}", file=sys.stderr)
        bar = tqdm(total=total, initial=step, desc=folder.name, unit="step", disable=not progress)
        while step < last:
            rate = learning_rate(step, recipe)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (recipe.muon_rate if isinstance(optimizer, torch.optim.Muon) else 1)
            for part in range(recipe.accumulate):
                with forget_activations(), torch.autocast(_device(model).type, torch.bfloat16, enabled=recipe.bf16):
                    value, figures = loss([recipe.seed, step, part])
                (value.float() / recipe.accumulate).backward()
                rows.append({"loss": float(value.detach()), **figures})
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            rows[-1]["gradient"] = float(norm)
            if torch.isfinite(norm):  # one bad batch must not spoil the run
                for optimizer in optimizers:
                    optimizer.step()
            model.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))

            if step % sample_every == 0 and sample is not None:
                append_row(folder / "samples.csv", {"step": step, **(sample(average, step) or {})})
                model.train()
            if step % log_every == 0 or step == last:
                seconds = seconds_before + time.monotonic() - began
                row = {"step": step, "seconds": round(seconds, 1), "rate": rate, **_mean(rows)}
                append_row(folder / "loss.csv", row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                rows = []
                if time.monotonic() - saved > save_seconds or step == last:
                    save_state(folder, model, average, optimizers, recipe, began_with, step, seconds)
                    plot_losses(folder / "loss.csv", folder / "loss.png")
                    saved = time.monotonic()
        bar.close()
    return average


@contextlib.contextmanager
def refusals_in_one_line(stopped: str = GOES_ON) -> Iterator[None]:
    """A command ends on ValueError or OSError with exit code 2, on Ctrl-C or SIGTERM with 130 and what is left then."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped: {stopped}", file=sys.stderr)
        sys.exit(130)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a constant share, then half a cosine down to `final_rate`; and again in each cycle.

    Cycles are the warm restarts of Loshchilov and Hutter (arXiv 1608.03983).
    """
    step %= recipe.steps
    warm = min(1.0, (step + 1) / max(recipe.warmup, 1))
    start = recipe.constant * recipe.steps
    fallen = min(max(step - start, 0) / max(recipe.steps - start, 1), 1.0)
    cosine = (1 + math.cos(math.pi * fallen)) / 2
    return recipe.learning_rate * warm * (recipe.final_rate + (1 - recipe.final_rate) * cosine)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, whose weight decay leaves vectors (biases, norms) alone; and Muon, where the recipe asks for it.

    Muon takes the nearest orthogonal matrix of the averaged gradient as its step, so that it moves in all directions
    alike; scaled as in arXiv 2502.16982. It is for the matrices inside a network, not for embeddings or the output.
    ValueError where recipe.muon finds no matrix.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [n for n, p in trained.items() if recipe.muon and p.ndim == 2 and re.search(recipe.muon, n)]
    if recipe.muon and not muon:
        raise ValueError(f"muon {recipe.muon!r} is in no matrix's name: correct it, or leave it out for AdamW alone")
    rest = [p for n, p in trained.items() if n not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=recipe.betas, foreach=True)]
    if muon:
        matrices = [trained[name] for name in muon]
        optimizers.append(torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, in float32; buffers are the model's."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    for buffer, current in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(current)


def generator(seed: list[int]) -> torch.Generator:
    """A generator that depends on every number of `seed` (`torch.manual_seed` takes only one)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------------------------------------- flow matching
# A clean x_0 and noise lie at the ends of a straight line, x_t = (1 − t)·x_0 + t·noise, along which the velocity
# is noise − x_0 everywhere, as in sampler.py. The network learns its mean over all lines through x_t.


@dataclass(frozen=True)
class FlowTimes:
    """At which times the network is trained: the more often, the better it gets there."""

    kind: str = "logit-normal"  # or "uniform"; logit-normal: sigmoid of a normal (arXiv 2403.03206)
    mean: float = 0.0  # of that normal
    std: float = 1.0
    shift: float = 1.0  # t ← s·t / (1 + (s − 1)·t), as in sampling: above 1 towards the noise

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 in (0, 1); ValueError for an unknown kind."""
        if self.kind == "uniform":
            t = torch.rand(count, generator=generator)
        elif self.kind == "logit-normal":
            t = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))
        else:
            raise ValueError(f"flow times {self.kind!r}: choose uniform or logit-normal")
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class FlowBatch:
    """One batch as the DiT sees it, and what it should answer."""

    x: Tensor  # (B, T, H, W, C_in) noisy latents, and with visual_cond conditioning latents and mask
    t: Tensor  # (B,)
    velocity: Tensor  # (B, T, H, W, C) noise − latents
    asked: Tensor  # (B, T, 1, 1, 1) 1 where the velocity is asked for, 0 in a given first frame


def flow_batch(
    model: DiT,
    latents: Tensor,  # (B, T, H, W, C) clean and scaled
    t: Tensor,  # (B,)
    noise: Tensor,  # (B, T, H, W, C)
    first_frame: Tensor | None = None,  # (B, 1, H, W, C) clean
    given: Tensor | None = None,  # (B,) bool: which samples are given their first frame
) -> FlowBatch:
    """Latents (B, T, H, W, C) on their way to noise, presented as the pipeline presents them.

    A given first frame stands clean in frame 0 of the noisy latents and the mask is 1 there; the conditioning
    channels are zeros, as in diffusers' pipeline_kandinsky_i2v.py. Nothing is asked of that frame.
    """
    B, T = latents.shape[:2]
    asked = torch.ones(B, T, 1, 1, 1, device=latents.device)
    x = torch.lerp(latents, noise, t.view(B, 1, 1, 1, 1))
    condition = latents.new_zeros(*latents.shape[:-1], model.config.input_channels - model.config.in_channels)
    if given is not None:
        assert first_frame is not None and condition.shape[-1], (given.shape, condition.shape)
        x = torch.cat([torch.where(given.view(B, 1, 1, 1, 1), first_frame, x[:, :1]), x[:, 1:]], dim=1)
        condition[given, :1, ..., -1] = 1
        asked[given, 0] = 0
    return FlowBatch(torch.cat([x, condition], dim=-1), t, noise - latents, asked)


def ask(
    model: DiT, x: Tensor, t: Tensor, features: TextFeatures, rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """The velocity (B, T, H, W, C), float32, that `model` sees in x (B, T, H, W, C_in) at times t (B,)."""
    return model(x, features.text, features.pooled, t, features.mask, rope_scale).float()


def flow_loss(predicted: Tensor, target: Tensor, asked: Tensor) -> Tensor:
    """Mean squared error of the velocity where it is asked for; any shapes that broadcast."""
    asked = asked.expand_as(target)
    return ((predicted.float() - target).square() * asked).sum() / asked.sum()


def drop_condition(features: TextFeatures, dropped: Tensor, nothing: TextFeatures) -> TextFeatures:
    """Features in which the samples of `dropped` (B,) bool are told `nothing` (the features of the empty prompt).

    The network then also learns what guidance needs, the velocity without a prompt.
    """
    S, n = features.text.shape[1], nothing.text.shape[1]
    assert n <= S, (n, S)
    text = torch.where(dropped[:, None, None], F.pad(nothing.text, (0, 0, 0, S - n)), features.text)
    mask = torch.where(dropped[:, None], F.pad(nothing.mask, (0, S - n)), features.mask)
    return TextFeatures(text, mask, torch.where(dropped[:, None], nothing.pooled, features.pooled))


# ---------------------------------------------------------------------------------------------- distillation


@torch.no_grad()
def guided_target(
    teacher: DiT, batch: FlowBatch, features: TextFeatures, nothing: TextFeatures, guidance_scale: float
) -> Tensor:
    """Guidance distillation: what the teacher answers in two passes, for the student to answer in one.

    Returns the guided velocity (B, T, H, W, C), float32, without gradients.
    """
    negative = drop_condition(features, torch.ones_like(batch.t, dtype=torch.bool), nothing)
    with_prompt, without = (ask(teacher, batch.x, batch.t, f) for f in (features, negative))
    return guided_velocity(with_prompt, without, guidance_scale)


@torch.no_grad()
def step_target(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """Step distillation (progressive, arXiv 2202.00512): the one velocity that leads where the teacher gets in several.

    velocity: the teacher's, (x, t) → dx/dt; x (B, T, H, W, C) at times[0]; times (n + 1, B), falling.
    The student that answers with the result at times[0] lands, in one Euler step to times[-1], where the teacher
    lands in n.
    """
    there = x
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        there = there + (t_next - t).view(-1, 1, 1, 1, 1) * velocity(there, t)
    return (there - x) / (times[-1] - times[0]).view(-1, 1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------- speed and memory


@contextlib.contextmanager
def autocast_dit(model: DiT) -> Iterator[None]:
    """Inside, a DiT trains under autocast with the precision that it has in half precision, and fast on a CPU.

    The layers that stay in float32 do so, and so does NABLA's choice of tiles. Attention is the definition, written
    out, with NABLA over the kept tiles: the gradient of PyTorch's fused kernel in bf16 on a CPU takes five times as
    long (80 tokens, 6 heads of 32).
    """
    layers = [module for module in model.modules() if isinstance(module, Float32Linear)]
    for layer in layers:
        vars(layer)["forward"] = torch.autocast(_device(model).type, enabled=False)(layer.forward)
    build_map, nabla.block_map = nabla.block_map, torch.autocast(_device(model).type, enabled=False)(nabla.block_map)
    fused, dit.attention = dit.attention, _written_out if _device(model).type == "cpu" else dit.attention
    try:
        yield
    finally:
        dit.attention, nabla.block_map = fused, build_map
        for layer in layers:
            del layer.forward


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, block_map: Tensor | None = None):
    return dense_attention(q, k, v, mask) if block_map is None else block_sparse_attention(q, k, v, block_map)


@contextlib.contextmanager
def gradient_checkpointing(model: DiT) -> Iterator[None]:
    """Inside, visual blocks forget their activations and compute them again for the gradient: a third more work.

    The gradient comes after `autocast_dit` has ended, so what is computed again enters it again.
    """

    def contexts():  # of the forward, and of the one that is computed again
        autocast = any("forward" in vars(m) for m in model.modules() if isinstance(m, Float32Linear))
        return contextlib.nullcontext(), autocast_dit(model) if autocast else contextlib.nullcontext()

    for block in model.visual_blocks:
        vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in model.visual_blocks:
            del block.forward


# ---------------------------------------------------------------------------------------------- on disk


def save_state(
    folder: Path,
    model: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    began_with: str,
    step: int,
    seconds: float,
) -> None:
    """All that a run is made of, in one file that is never half written."""
    state = {
        "step": step,
        "seconds": seconds,
        "recipe": asdict(recipe),
        "began_with": began_with,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    _save(state, folder / "state.pt")


def load_state(
    folder: Path,
    model: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    began_with: str,
) -> tuple[int, float]:
    """Fill them with the state in `folder`, if there is one; returns (step, seconds) or (0, 0.0).

    ValueError if the state is of a run with another recipe, or one that `began_with` weights of another `digest`:
    neither could go on as if never cut. Checkpointing changes nothing, and more cycles begin where the fewer end.
    """
    path = folder / "state.pt"
    if not path.is_file():
        return 0, 0.0
    state = _load(folder, _device(model))
    if "model" not in state:
        raise ValueError(f"{path} holds finished weights and no run that could go on: take another folder")
    saved = asdict(recipe) | state.get("recipe", {})  # states of before there was one are taken as they are
    differences = ", ".join(
        f"{name} {saved[name]} and not {value}"
        for name, value in asdict(recipe).items()
        if name not in ("checkpointing", "cycles", "origin") and saved[name] != value
    )
    if differences:
        raise ValueError(
            f"the run in {folder} was begun with {differences}: go on with the same, or take another folder"
        )
    if state.get("began_with", "") != began_with:
        start = f"with what {state['recipe']['origin']} was then" if state.get("began_with") else "at random"
        raise ValueError(
            f"the run in {folder} began {start}, and not with these weights: take those, or another folder"
        )
    fill(model, state["model"], path)
    fill(average, state["average"], path)
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return state["step"], state["seconds"]


def digest(model: nn.Module) -> str:
    """A name for the weights that `model` has now: SHA-256 of their names and bytes, in hex."""
    sha256 = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha256.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def load_recipe(folder: str | Path) -> Recipe:
    """How the run in `folder` takes its steps; FileNotFoundError without a run, ValueError where it is not said."""
    state = _load(folder)
    if "recipe" not in state:
        raise ValueError(f"the run in {folder} does not say its recipe: run its stage once more, which writes it down")
    return Recipe(**state["recipe"])


def load_progress(folder: str | Path) -> tuple[int, float]:
    """Steps that the run in `folder` has taken, and seconds that they took; FileNotFoundError without a run."""
    state = _load(folder)
    return state["step"], state["seconds"]


def load_average(model: Model, folder: str | Path) -> Model:
    """Fill `model` with the averaged weights of the run in `folder`; returns it frozen, in eval mode.

    FileNotFoundError where there has been no such run, ValueError where it trained another model.
    """
    return fill(model, _load(folder)["average"], Path(folder)).eval().requires_grad_(False)


def fill(model: Model, state: dict[str, Tensor], source: Path) -> Model:
    """`model` with the weights of `state`; ValueError, naming their source, where names or shapes do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]  # of what may be a hundred lines
        raise ValueError(f"{source} was written for another model: {first} Begin another run, or remove it") from error
    return model


def _load(folder: str | Path, device: torch.device | str = "cpu") -> dict:
    path = Path(folder) / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: run the stage that trains it first (see the Makefile), or name "
            "a checkpoint such as nano"
        )
    state = None
    with contextlib.suppress(zipfile.BadZipFile, pickle.UnpicklingError), zipfile.ZipFile(path) as archive:
        if archive.testzip() is None:  # every part is as long as it should be, and has its checksum
            state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict) or "average" not in state:
        raise ValueError(f"{path} is damaged, or no run's state: remove it to begin anew, or name another folder")
    return state


def save_average(model: nn.Module, folder: str | Path) -> None:
    """Write a finished model where `load_average` finds it."""
    make_folder(folder)
    _save({"average": model.state_dict()}, Path(folder) / "state.pt")


def _save(state: dict, path: Path) -> None:
    """`torch.save`, whole or not at all; OSError where the disk is full."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:
        raise OSError(f"cannot write {path} ({error}): make room") from error


def append_row(path: Path, row: dict[str, float]) -> None:
    """One more row of a CSV file. A column that the file does not have yet makes it be written anew."""
    rows = read_rows(path)
    columns = list(dict.fromkeys([*(rows[0] if rows else []), *row]))
    if rows and list(rows[0]) == columns:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)
    else:
        _write_rows(path, columns, [*rows, row])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, [] if there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def drop_rows_after(path: Path, step: int) -> None:
    """Forget what a run that was cut off had logged after it last saved its state."""
    rows = read_rows(path)
    kept = [row for row in rows if int(row["step"]) <= step]
    if len(kept) < len(rows):
        _write_rows(path, list(rows[0]), kept)


def plot_losses(path: Path, picture: Path) -> None:
    """The curves of a log as a PNG; nothing without matplotlib (`pip install kandinsky5[train]`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_rows(path)
    columns = [name for name in rows[0] if name not in ("step", "seconds", "rate")]
    figure = Figure(figsize=(8, 2.2 * len(columns)), layout="constrained")
    for axes, name in zip(figure.subplots(len(columns), 1, squeeze=False)[:, 0], columns, strict=True):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points, strict=True), linewidth=0.8)
        axes.set_title(name, fontsize=9)
        if all(value > 0 for _, value in points):
            axes.set_yscale("log")
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=80)


def _write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of the figures, each over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float(f"{sum(v) / len(v):.6g}") for name, v in values.items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
