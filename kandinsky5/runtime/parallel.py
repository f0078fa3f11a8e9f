"""Several processes, one per GPU, that compute one video together, joined by PyTorch's collectives.

    data       groups of ranks with different work: prompts of a list, or samples of a batch in training
    guidance   in a group, halves that each compute one of a step's two passes and exchange velocities, once per step
    sequence   in a half, shares of a pass's tokens, which are exchanged for heads and back in each visual block

Outside self-attention a visual block computes each token alone. Inside it a head needs all tokens, so

    q, k, v of own tokens (B, N, L/P, D) ── exchange ── own heads (B, N/P, L, D) ── attend ── exchange ── own tokens

(Ulysses, arXiv 2309.14509.) NABLA selects tiles per head, after the exchange, as it does in one process. What a rank
computes is a part of what one process would, so the result is the same, but for the order of sums in the gradients.
`launch.py` starts and ends the ranks; `shard.py` spreads the weights over them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh

from kandinsky5.attention import Attend
from kandinsky5.config import NablaConfig, PipelineConfig
from kandinsky5.dit import Attention, DiT, VisualBlock
from kandinsky5.runtime import launch

DIMS = ("data", "guidance", "sequence", "team")  # the last: all ranks that make one video
Item = TypeVar("Item")
Skips = tuple[tuple[bool, ...], ...]  # as in Request


class Ranks:
    """All processes as a mesh (data, guidance, sequence); each rank has a place in it. Built alike on every rank."""

    def __init__(self, guidance: int = 1, sequence: int = 1, data: int = 1, device: str = "cpu", shard: bool = False):
        """device: "cpu" or "cuda", whose collectives are used; shard: whether weights are spread too (`shard.py`).

        Raises ValueError unless the product is the number of processes, which have been joined (`launch.py`).
        """
        world = dist.get_world_size()
        if min(guidance, sequence, data) < 1 or data * guidance * sequence != world or guidance > 2:
            raise ValueError(f"{data} x {guidance} x {sequence} ranks: the product must be {world}, guidance 1 or 2")
        self.data, self.guidance, self.sequence, self.shard = data, guidance, sequence, shard
        self.device = torch.device(device)
        self.mesh = init_device_mesh(device, (data, guidance, sequence), mesh_dim_names=DIMS[:3])
        self.team = init_device_mesh(device, (data, guidance * sequence), mesh_dim_names=("data", "team"))["team"]

    def __str__(self) -> str:
        groups = f"{self.data} groups of " if self.data > 1 else ""
        return f"{groups}{self.guidance}x{self.sequence} ranks"

    def place(self, dim: str) -> int:
        """This rank's place along one of DIMS."""
        return (self.team if dim == "team" else self.mesh[dim]).get_local_rank()

    def group(self, dim: str) -> dist.ProcessGroup:
        """The ranks that differ from this one only in their place along that dimension."""
        return (self.team if dim == "team" else self.mesh[dim]).get_group()

    def map(self, dim: str, compute: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
        """Like Python's `map`, but item i is computed by rank i mod P of P along `dim`; all of them get all results.

        As many items are taken at a time as there are ranks. Results may have any shapes, of one precision.
        """
        group, place = self.group(dim), self.place(dim)
        items = iter(items)
        while some := list(itertools.islice(items, group.size())):
            own = compute(some[place]) if place < len(some) else None
            for source in range(len(some)):
                yield broadcast(own if source == place else None, source, group, self.device)

    def spread(self, dit: DiT) -> "Ranks":
        """Let this rank compute its share of the tokens of `dit` (`spread`, below); returns itself."""
        if self.sequence > 1:
            spread(dit, self.group("sequence"))
        return self

    def divide_passes(self, skips: Skips) -> tuple[Callable[..., Iterable[Tensor]], Skips]:
        """How a step's two passes run if they are not one batch: what to use as `map`, and this rank's skips."""
        if self.guidance == 1 or self.shard and any(len(set(step)) > 1 for step in skips):
            return map, skips  # ranks that share weights must run the same blocks, or one waits for the other's share
        place = self.place("guidance")
        return functools.partial(self.map, "guidance"), tuple((step[place],) for step in skips)


def broadcast(x: Tensor | None, source: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """A tensor of any shape from the rank at `source` of the group, where it is `x`, to all of them."""
    known: list[Any] = [None if x is None else (x.shape, x.dtype)]
    dist.broadcast_object_list(known, group=group, group_src=source, device=device)
    shape, dtype = known[0]
    x = torch.empty(shape, dtype=dtype, device=device) if x is None else x.to(device).contiguous()
    dist.broadcast(x.view(-1).view(torch.uint8), group=group, group_src=source)
    return x


def choose_ranks(world: int, heads: int, guided: bool, requested: str | None = None) -> tuple[int, int]:
    """How many ranks along guidance and sequence one video takes, of `world` processes: all of them.

    heads: of the DiT; guided: whether steps have two passes; requested: such as "2x4", guidance x sequence, which may
    take fewer: the rest are groups for other prompts. Raises ValueError, with those that can be, for what cannot.
    """
    can_be = [(g, s) for g in ((1, 2) if guided else (1,)) for s in range(1, heads + 1) if heads % s == 0]
    if requested is None:
        if fitting := [choice for choice in can_be if math.prod(choice) == world]:
            return max(fitting)  # two passes need no exchange but of velocities
        worlds = ", ".join(map(str, sorted({g * s for g, s in can_be})))
        raise ValueError(f"{world} processes cannot share {heads} heads: start {worlds}, or name a part with --ranks")
    fitting = [choice for choice in can_be if world % math.prod(choice) == 0]
    named = {f"{guidance}x{sequence}": (guidance, sequence) for guidance, sequence in fitting}
    found = named.get(requested.lower().replace("×", "x"))
    if found is None:
        raise ValueError(
            f"ranks {requested!r}: give guidance x sequence, of which this model with {heads} heads and {world} "
            f"processes allow {', '.join(named)}"
        )
    return found


def find_ranks(
    ranks: "str | Ranks | None", config: PipelineConfig, device: torch.device, shard: bool = False
) -> Ranks | None:
    """The ranks of a text such as "auto" or "2x4", for a model of this config; None for one process alone.

    Raises ValueError for ranks that do not fit the model, its device, or the processes that have been joined.
    """
    if isinstance(ranks, Ranks) and ranks.device.type != device.type:
        raise ValueError(f"ranks on {ranks.device}, models on {device}: give Ranks device={device.type!r} too")
    if ranks is None or isinstance(ranks, Ranks):
        return ranks
    if not dist.is_initialized():
        if ranks == "auto" and not launch.is_one_of_many():
            return None
        raise ValueError(f"ranks {ranks!r}: start several processes with torchrun, and call launch.join first")
    world, guided = dist.get_world_size(), abs(config.sampling.guidance_scale - 1) > 1e-6
    guidance, sequence = choose_ranks(world, config.dit.num_heads, guided, None if ranks == "auto" else ranks)
    return Ranks(guidance, sequence, world // (guidance * sequence), device.type, shard)


# ---------------------------------------------------------------------------------------------- the DiT


def spread(dit: DiT, group: dist.ProcessGroup) -> None:
    """Let the ranks of a group share the tokens of `dit`'s visual blocks, in place; all of them must run it alike.

    It comes after what else changes how blocks run (offload, compile, training), and before step skipping.
    Raises ValueError where the heads cannot be shared.
    """
    if dit.config.num_heads % group.size():
        raise ValueError(f"{group.size()} ranks cannot share {dit.config.num_heads} heads: choose a divisor")
    for attention in self_attentions(dit):
        attention.attend = functools.partial(attend_together, attention.attend, group)
    dit.run_blocks = functools.partial(run_share, dit.run_blocks, dit.visual_blocks, group)  # type: ignore[method-assign]


def collect(dit: DiT) -> None:
    """Undo `spread`: each process computes all tokens again."""
    if getattr(dit.run_blocks, "func", None) is not run_share:
        return
    dit.run_blocks = dit.run_blocks.args[0]  # type: ignore[attr-defined, method-assign]
    for attention in self_attentions(dit):
        attention.attend = attention.attend.args[0]  # type: ignore[attr-defined]


def self_attentions(dit: DiT) -> list[Attention]:
    """Those of the visual blocks."""
    return [block.self_attention for block in dit.visual_blocks if isinstance(block, VisualBlock)]


def run_share(
    run_blocks: Callable[..., Tensor], visual_blocks: nn.ModuleList, group: dist.ProcessGroup,
    blocks: nn.ModuleList, x: Tensor, *arguments: Any,
) -> Tensor:  # fmt: skip
    """`DiT.run_blocks` with this rank's share of the video's tokens: x (B, L, dim) → (B, L, dim), all of them."""
    if blocks is not visual_blocks:
        return run_blocks(blocks, x, *arguments)
    text, vec, rotations, *others = arguments
    lengths = shares(x.shape[1], group.size())
    own = slice(sum(lengths[: group.rank()]), sum(lengths[: group.rank() + 1]))
    x = run_blocks(blocks, x[:, own], text, vec, rotations[own], *others)  # (B, L/P, dim)
    return Gather.apply(x, lengths, group)


def attend_together(
    attend: Attend, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    nabla: NablaConfig | None = None, grid: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`attend` between all tokens of the grid: q, k, v (B, N, L/P, D) of this rank's tokens → the same."""
    assert grid is not None and mask is None, "a share of the tokens needs the whole grid, and no model masks them"
    lengths = shares(math.prod(grid), group.size())
    q, k, v = (tokens_to_heads(x, lengths, group) for x in (q, k, v))  # (B, N/P, L, D) each
    out = attend(q, k, v, mask=None, nabla=nabla, grid=grid)  # (B, N/P, L, D)
    return heads_to_tokens(out, lengths, group)


# ---------------------------------------------------------------------------------------------- exchanges


def shares(length: int, count: int) -> list[int]:
    """`length` tokens in `count` shares, the first of which may be longer by one."""
    return [length // count + (i < length % count) for i in range(count)]


def tokens_to_heads(x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """Own tokens of all heads → own heads of all tokens: x (B, N, L/P, D) → (B, N/P, L, D)."""
    B, N, own, D = x.shape
    P = len(lengths)
    sent = rearrange(x, "B (P N) L D -> (P B N L D)", P=P)
    sizes = [B * (N // P) * length * D for length in lengths]
    received = all_to_all_single_autograd(sent, sizes, [B * (N // P) * own * D] * P, group)
    del sent
    parts = zip(received.split(sizes), lengths, strict=True)
    return torch.cat([part.view(B, N // P, length, D) for part, length in parts], dim=2)


def heads_to_tokens(x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """The way back: own heads of all tokens x (B, N/P, L, D) → own tokens of all heads (B, N, L/P, D)."""
    B, N, _, D = x.shape
    P, own = len(lengths), lengths[group.rank()]
    sent = torch.cat([part.reshape(-1) for part in x.split(lengths, dim=2)])
    sizes = [B * N * length * D for length in lengths]
    received = all_to_all_single_autograd(sent, [B * N * own * D] * P, sizes, group)
    return rearrange(received, "(P B N L D) -> B (P N) L D", P=P, B=B, N=N, L=own)


class Gather(torch.autograd.Function):
    """Own tokens → all tokens, on every rank: x (B, L/P, dim) → (B, L, dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
        """Shares are sent in the length of the first, which is the longest."""
        ctx.lengths, ctx.group = lengths, group
        sent = F.pad(x, (0, 0, 0, lengths[0] - x.shape[1])).contiguous()
        every = [torch.empty_like(sent) for _ in lengths]
        dist.all_gather(every, sent, group=group)
        return torch.cat([part[:, :length] for part, length in zip(every, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        """Each rank used all tokens: the gradient of the own ones is the sum of what all ranks return for them."""
        whole = grads[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole.split(ctx.lengths, dim=1)[ctx.group.rank()], None, None
