"""Training on several ranks: what each computes of a step, what they tell each other, and how they stop.

    torchrun --nproc-per-node 4 -m kandinsky5.training.finetune …

A step has `accumulate` batches. Ranks along `data` share them, and where there are more ranks than batches the rows of
a batch; ranks along `sequence` compute the same rows together. What a rank returns as its loss is so scaled that the
mean over ranks is the loss of one process, and the mean of their gradients its gradient. Nothing else is exchanged
in a step but the values for the log, and whether somebody wants to stop.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from kandinsky5.dit import DiT

if TYPE_CHECKING:  # importing it takes half a second, which one process does not need
    from kandinsky5.runtime.parallel import Ranks

Row = dict[str, float]


def is_first(ranks: "Ranks | None") -> bool:
    """Whether this process writes logs, samples and results."""
    return ranks is None or dist.get_rank() == 0


def own_batches(accumulate: int, ranks: "Ranks | None") -> range:
    """Which of a step's batches this rank computes."""
    if ranks is None:
        return range(accumulate)
    teams = math.gcd(accumulate, ranks.data)
    return range(ranks.place("data") % teams, accumulate, teams)


def own_rows(accumulate: int, ranks: "Ranks | None") -> tuple[int, int]:
    """(i, n): of its batches this rank computes rows i, i + n, i + 2n, …"""
    if ranks is None:
        return 0, 1
    teams = math.gcd(accumulate, ranks.data)
    return ranks.place("data") // teams, ranks.data // teams


def check_shares(accumulate: int, batch_size: int, data: int) -> None:
    """Raise ValueError where a batch has fewer samples than `data` ranks would take rows of."""
    rows = data // math.gcd(accumulate, data)
    if rows > batch_size:
        raise ValueError(
            f"{data} ranks share {accumulate} batches of {batch_size} per step, so {rows} would share one: give at "
            f"least --batch-size {rows}, or --accumulate {data}"
        )


def average_gradients(model: nn.Module) -> None:
    """Each gradient ← its mean over all ranks, but for sharded weights, whose gradients have been averaged already."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p.grad, "full_tensor")]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= dist.get_world_size()


def tell_all(
    rows: dict[int, Row], wishes: tuple[bool, ...], ranks: "Ranks | None"
) -> tuple[list[Row], tuple[bool, ...]]:
    """The rows of all batches of a step, from those of this rank by batch, and what any rank wishes.

    What all do together, such as saving, no rank may decide by its own clock.
    """
    if ranks is None:
        return list(rows.values()), wishes
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (rows, wishes))
    batches = sorted({batch for one, _ in found for batch in one})
    means = [mean([one[batch] for one, _ in found if batch in one]) for batch in batches]
    return means, tuple(any(each) for each in zip(*(one for _, one in found), strict=True))


def mean(rows: list[Row]) -> Row:
    """The mean of each value, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items()}


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, in one piece."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@contextlib.contextmanager
def spread(model: nn.Module, ranks: "Ranks | None") -> Iterator[None]:
    """Inside, the ranks along `sequence` share the tokens of a DiT; it comes after other changes to how blocks run."""
    if ranks is None or ranks.sequence == 1 or not isinstance(model, DiT):
        yield
        return
    from kandinsky5.runtime.parallel import collect

    ranks.spread(model)
    try:
        yield
    finally:
        collect(model)
