"""The training loop, the same for any model.

The loop is a function. What differs between models is a function too, `loss(seed)`, which draws its batch and its
noise from the `seed` it is given (a list of integers: the run's, the step's, the batch's) and from nothing else. So
step 7,000 is the same whether the run got there in one go or was interrupted and resumed ten times.

    train ──> loss(seed) ──> flow_batch ─ x_t, t, velocity ─> DiT ─> flow_loss
      └─ AdamW (or Muon), warm-up and cosine, clipping, averaged weights, state and curves on disk
"""

import contextlib
import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kandinsky5 import screen
from kandinsky5.dit import DiT
from kandinsky5.files import locked, make_folder
from kandinsky5.runtime import launch
from kandinsky5.runtime.device import plain_defaults
from kandinsky5.runtime.memory import during
from kandinsky5.training import curves, spread, state
from kandinsky5.training.modes import autocast, gradient_checkpointing, training_precision
from kandinsky5.training.recipe import Recipe, build_optimizers, freeze, learning_rate, prepare_step
from kandinsky5.training.state import Model, Run

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

Loss = Callable[[list[int]], tuple[Tensor, dict[str, float]]]
MOST_SKIPPED = 20  # steps in a row without a finite gradient, after which a run ends


@plain_defaults()
def train(
    model: Model, loss: Loss, recipe: Recipe, folder: str | Path,
    sample: Callable[[Model, int], dict[str, float] | None] | None = None, sample_every: int = 1000,
    log_every: int = 20, save_seconds: float = 60, stop_after: int | None = None, progress: bool = True,
    ranks: "Ranks | None" = None, average: Model | None = None,
) -> Model:  # fmt: skip
    """Train `model` in place; return a copy of it with the averaged weights, or itself if there is no average.

    loss: seed → a scalar, and values for the log; its only randomness is derived from the seed.
    folder: of the run. An unfinished run in it resumes, with exactly the result of one that was never interrupted.
        Raises ValueError if `state.resume` refuses, if another process is training there, and after `MOST_SKIPPED`
        steps in a row whose gradient was not finite.
    sample: called with the averaged model every `sample_every` steps; what it returns goes to `samples.csv`.
    log_every: steps averaged in one row of the log. The state is saved along with a row, every `save_seconds`.
    stop_after: return after this step as if interrupted (the schedule is still the recipe's).
    ranks: the processes that train it together (`spread.py`); all call this alike, and the first one writes.
    average: what takes the averaged weights instead of a copy, which a sharded model does not allow.
    Ctrl-C and SIGTERM end the run after the step that is being taken, and save it; a second one ends it at once.
    """
    folder, first = Path(folder), spread.is_first(ranks)
    make_folder(folder)
    refusal = f"another process is training in {folder}: wait for it, stop it, or choose another folder"
    with (
        locked(folder, refusal) if first else contextlib.nullcontext(),
        _begin(model, recipe, folder, ranks, average) as run,
        _interrupts(alone=ranks is None) as interrupts,
    ):
        total = recipe.cycles * recipe.steps
        last = min(total, stop_after or total)
        saved = time.monotonic()
        begun = saved - run.seconds
        if run.step:
            screen.say(f"{folder} {'resumes from' if run.step < last else 'is finished at'} step {run.step:,}")
        with screen.bar(total, folder.name, "step", show=progress and first) as bar:
            bar.n = bar.initial = run.step
            while run.step < last:
                rows = _take_step(run, loss)
                wishes = (bool(interrupts), time.monotonic() - saved > save_seconds)
                rows_of_all, (stop, due) = spread.tell_all(rows, wishes, ranks)
                run.rows += rows_of_all
                bar.update()
                if sample is not None and run.step % sample_every == 0:
                    values = sample(run.average, run.step) or {}
                    if first:
                        curves.append_row(folder / "samples.csv", {"step": run.step, **values})
                run.seconds = time.monotonic() - begun
                logs = run.step % log_every == 0 or run.step == last
                if logs:
                    bar.set_postfix(loss=f"{_log(run):.4f}", refresh=False)
                if stop or logs and due or run.step == last:
                    state.save(run)
                    saved = time.monotonic()
                    if first and logs:
                        with screen.showing("plot of the loss"):
                            curves.plot_losses(folder / "loss.csv", folder / "loss.png")
                if stop:
                    raise launch.Stopped
    return run.average


@contextlib.contextmanager
def _interrupts(alone: bool = True) -> Iterator[list[int]]:
    """Inside, the first Ctrl-C or SIGTERM is only noted, as no step may be cut in two; from then on they act as before.

    Only in the main thread, which alone receives them. One of many processes (not alone) notes all of them: torchrun
    passes on what its processes have received already, and kills those that do not end.
    """
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ((signal.SIGINT, signal.SIGTERM) if main else ())}

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if alone:
            restore()
            screen.say("interrupted: saving after this step (once more: stop at once)")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


@contextlib.contextmanager
def _begin(
    model: Model, recipe: Recipe, folder: Path, ranks: "Ranks | None", average: Model | None
) -> Iterator[Run[Model]]:
    """The run in `folder`, new or resumed; inside, its model trains as `modes.py` says."""
    if recipe.freeze:
        freeze(model, recipe.freeze)
    if average is None or not recipe.ema:
        average = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema else model
    began_with = state.digest(model) if recipe.origin else ""
    run = Run(folder, model, average, build_optimizers(model, recipe), recipe, began_with, ranks)
    state.resume(run)
    if ranks:
        launch.agree(step=run.step, **asdict(run.recipe))
    for name in ("loss.csv", "samples.csv") if spread.is_first(ranks) else ():
        curves.drop_rows_after(folder / name, run.step)
    model.train()
    with contextlib.ExitStack() as changes:
        changes.enter_context(training_precision(model))
        if recipe.checkpointing:
            if not isinstance(model, DiT):
                raise ValueError(f"checkpointing is for a DiT, not for a {type(model).__name__}: leave it out")
            changes.enter_context(gradient_checkpointing(model))
        changes.enter_context(spread.spread(model, ranks))
        yield run


@during("training")
def _take_step(run: Run, loss: Loss) -> dict[int, dict[str, float]]:
    """One step of the optimizers and of the average; returns the values for the log of this process's batches."""
    recipe, rows, batches = run.recipe, {}, spread.own_batches(run.recipe.accumulate, run.ranks)
    prepare_step(run.optimizers, run.step, recipe)
    for batch in batches:
        with autocast(run.device, recipe.dtype):
            value, values = loss([recipe.seed, run.step, batch])
        (value.float() / len(batches)).backward()
        rows[batch] = {"loss": float(value.detach()), **values}
    if run.ranks:
        spread.average_gradients(run.model)
    blocks = gradient_norms(run.model)
    norm = spread.whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm))
    rows[batches[-1]] |= {"gradient": float(norm), **blocks}
    if torch.isfinite(norm):  # one bad batch must not spoil the run
        for optimizer in run.optimizers:
            optimizer.step()
        run.skipped = 0
    else:
        _skip(run, list(rows.values()))
    run.model.zero_grad(set_to_none=True)
    run.step += 1
    if recipe.ema:
        update_average(run.average, run.model, min(recipe.ema, (1 + run.step) / (10 + run.step)))
    return rows


def _skip(run: Run, rows: list[dict[str, float]]) -> None:
    """Say that this step changes no weights. Raises ValueError where the last ones did not either."""
    run.skipped += 1
    losses = ", ".join(f"{row['loss']:.4g}" for row in rows)
    if run.skipped >= MOST_SKIPPED:
        raise ValueError(
            f"the gradients of {run.skipped} steps in a row, up to step {run.step + 1:,}, are not finite (loss "
            f"{losses}): start another run with a lower learning rate, or in float32"
        )
    if run.skipped == 1:
        screen.say(f"step {run.step + 1:,} is skipped: its gradient is not finite (loss {losses})")


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The gradient's norm in each block of a model's lists of blocks: {"gradient visual_blocks.0": …}."""
    lists = [(name, blocks) for name, blocks in model.named_children() if name.endswith("blocks")]  # or a LoRA's
    norms = {}
    for name, block in ((f"{name}.{i}", block) for name, blocks in lists for i, block in blocks.named_children()):
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        if gradients:
            norms[f"gradient {name}"] = float(spread.whole(torch.nn.utils.get_total_norm(gradients)))
    return norms


def _log(run: Run) -> float:
    """Append the mean of each value, over the rows that have it, to loss.csv; returns that of the loss."""
    rows, run.rows = run.rows, []
    means = {name: float(f"{value:.6g}") for name, value in spread.mean(rows).items()}
    rate = learning_rate(run.step - 1, run.recipe)
    head = {"step": run.step, "seconds": round(run.seconds, 1), "rate": rate}
    if spread.is_first(run.ranks):
        curves.append_row(run.folder / "loss.csv", head | means)
    return means["loss"]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, in float32; buffers are the model's."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    for buffer, current in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(current)


def generator(seed: list[int]) -> torch.Generator:
    """A generator that depends on every number of `seed` (`torch.manual_seed` takes only one)."""
    return torch.Generator("cpu").manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
