"""Look inside a running model without touching it: activations, attention weights, NABLA's maps.

The models know nothing of this module. `record` registers hooks on modules and removes them again; `record_attention`
takes the place of the attribute `attend` of the modules at hand, and sees the very q and k that they attend with.
What the model computes stays the same to the bit.

    with record(pipe.dit, "visual_blocks.*", keep=lambda x: x.float().norm(dim=-1)) as seen:
        pipe("a red circle moves right")
    seen["visual_blocks.3"][10]                      # of the 11th call: norms of the tokens, (B, L)

    name, keep = "visual_blocks.2.cross_attention", weights(heads=[0], queries=range(64))
    with record_attention(pipe.dit, name, keep=keep) as seen:
        pipe("a red circle moves right")
    seen[name][0]                                    # (B, 1, 64, S), rows sum to 1

    with record_attention(pipe.dit, "visual_blocks.*.self_attention", keep=block_map) as seen:   # a DiT with NABLA

Names are those of `model.named_modules()`; a * stands for one part of a name, ** for any number of them. A call is
one pass through the module. With guidance a step of the sampler is one call with 2B samples, those with the prompt
first, or for long clips two calls with B (`memory.ONE_PASS`). Tokens are in the order of the DiT, (T, H, W) row by
row, with NABLA in tile order (`nabla.from_tiles` undoes it). In a VAE with fast forms a convolution is called for each
few frames, and a norm not as a module: `fast.remove(pipe.vae)` first gives each module one call.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Collection, Container, Iterator, Sequence

import torch
from torch import Tensor, nn

from kandinsky5 import nabla as nabla_map
from kandinsky5.attention import Attend
from kandinsky5.dit import Attention
from kandinsky5.nabla import TILE

Recording = dict[str, list]  # name of the module → what was stored, call by call
SCORES = 2**24  # how many attention scores `weights` computes at a time: 64 MB
MOST = 2**28  # elements that `weights` may return for one call: 1 GB


@contextlib.contextmanager
def record(
    model: nn.Module, *names: str, keep: Callable[[Tensor], Tensor] = lambda output: output,
    calls: Container[int] | None = None, max_bytes: float = 2e9,
) -> Iterator[Recording]:  # fmt: skip
    """Inside, what the modules `names` return is stored: {name: [of call 0, of call 1, …]}, copies on the CPU.

    keep: output → what to keep of it, such as a norm or some of the tokens. A module that returns several tensors
        (`Modulation`) gives a tuple of what is stored of each.
    calls: indices of the calls to store, such as range(0, 50, 10); None stores all.
    max_bytes: ValueError once the recording is larger.
    ValueError if a name fits no module.
    """
    modules = find_modules(model, *names)
    seen, keep_result = _new_recording(modules, calls, max_bytes)

    def hang(name: str, module: nn.Module):
        def hook(module: nn.Module, arguments: tuple, output) -> None:
            keep_result(name, lambda: tuple(map(keep, output)) if isinstance(output, tuple) else keep(output))

        return module.register_forward_hook(hook)

    handles = [hang(name, module) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def record_attention(
    model: nn.Module, *names: str, keep: Callable[..., Tensor | tuple[Tensor, ...]],
    calls: Container[int] | None = None, max_bytes: float = 2e9,
) -> Iterator[Recording]:  # fmt: skip
    """Inside, something is stored of every attention that the modules `names` compute: {name: [of call 0, …]}.

    names: of `dit.Attention` modules, such as "visual_blocks.*.self_attention".
    keep: (q, k, v, mask, block_map), in the shapes that attention.py tells → what to keep of them: `weights()`,
        `block_map`, `queries_and_keys`, or a function of your own.
    calls, max_bytes: as in `record`. ValueError if a name fits no module, or one that is no attention.
    """
    modules: dict[str, Attention] = {}
    for name, module in find_modules(model, *names).items():
        if not isinstance(module, Attention):
            raise ValueError(f"{name} is a {type(module).__name__}: give an attention, such as {name}.self_attention")
        modules[name] = module
    seen, keep_result = _new_recording(modules, calls, max_bytes)

    def watch(name: str, attend: Attend) -> Attend:
        def watched(q: Tensor, k: Tensor, v: Tensor, mask=None, nabla=None, grid=None) -> Tensor:
            def compute() -> Tensor | tuple[Tensor, ...]:
                return keep(q, k, v, mask, nabla and nabla_map.block_map(q, k, grid, nabla))

            keep_result(name, compute)
            return attend(q, k, v, mask=mask, nabla=nabla, grid=grid)

        return watched

    before = {name: module.attend for name, module in modules.items()}
    for name, module in modules.items():
        module.attend = watch(name, before[name])
    try:
        yield seen
    finally:
        for name, module in modules.items():
            module.attend = before[name]


def weights(heads: Sequence[int] | None = None, queries: Sequence[int] | None = None) -> Callable[..., Tensor]:
    """For `record_attention`: the attention weights softmax(q kᵀ / √D) of some heads and query tokens.

    None means all. What is stored is float32 (B, heads, queries, S); rows sum to 1, and keys under the mask or outside
    NABLA's map have weight 0. Scores exist for a few queries at a time. ValueError where the result would hold more
    than MOST elements: full self-attention of a released model has 28 heads of 47,616² in every block.
    """

    def keep(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: Tensor | None) -> Tensor:
        B, N, L, D = q.shape
        S = k.shape[2]
        chosen_heads = _check_range(heads, N, "head")
        chosen = torch.tensor(_check_range(queries, L, "query token"), device=q.device)
        if B * len(chosen_heads) * len(chosen) * S > MOST:
            raise ValueError(
                f"weights of {len(chosen_heads)} heads, {len(chosen)} queries and {S} keys in a batch of {B} are more "
                f"than {MOST} elements: choose some with weights(heads=…, queries=…)"
            )
        q, k = q[:, chosen_heads].float(), k[:, chosen_heads].float()
        if block_map is not None:
            block_map = block_map[:, chosen_heads]
        pieces = []
        for rows in chosen.split(max(1, SCORES // (B * len(chosen_heads) * S))):
            scores = q[:, :, rows] @ k.mT / math.sqrt(D)  # (B, heads, rows, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            if block_map is not None:
                tiles = block_map[:, :, rows // TILE]  # (B, heads, rows, S/64)
                scores = scores.masked_fill(~tiles.repeat_interleave(TILE, dim=-1), -torch.inf)
            pieces.append(torch.softmax(scores, dim=-1).cpu())
        return torch.cat(pieces, dim=2)  # (B, heads, queries, S)

    return keep


def block_map(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: Tensor | None) -> Tensor:
    """For `record_attention`: NABLA's map of the kept tiles, bool (B, N, L/64, L/64); ValueError if it has none."""
    if block_map is None:
        raise ValueError("this attention has no block map: record the self-attention of a DiT whose config has nabla")
    return block_map


def queries_and_keys(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For `record_attention`: q (B, N, L, D) and k (B, N, S, D), after norm and RoPE."""
    return q, k


def find_modules(model: nn.Module, *names: str) -> dict[str, nn.Module]:
    """The modules of `model` whose names fit; * stands for one part of a name, ** for any number of them.

    ValueError, with the closest names, if a name fits none.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        parts = [{"*": r"[^.]+", "**": r".+"}.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", name)]
        fitting = {n: m for n, m in modules.items() if re.fullmatch("".join(parts), n)}
        if not fitting:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
            raise ValueError(f"no module is called {name!r}: try {' or '.join(close or list(modules)[1:4])}")
        found |= fitting
    return found


def _new_recording(
    modules: Collection[str], calls: Container[int] | None, max_bytes: float
) -> tuple[Recording, Callable[[str, Callable], None]]:
    """An empty recording, and a function that adds to it what a call gave, if that call is to be stored."""
    seen: Recording = {name: [] for name in modules}
    count = dict.fromkeys(modules, 0)
    size = 0

    def keep_result(name: str, compute: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
        nonlocal size
        call, count[name] = count[name], count[name] + 1
        if calls is not None and call not in calls:
            return
        with torch.no_grad():
            kept = compute()
        # copies: a view would keep the whole tensor, and could change later
        copies = tuple(x.detach().to("cpu", copy=True) for x in (kept if isinstance(kept, tuple) else (kept,)))
        size += sum(x.nbytes for x in copies)
        if size > max_bytes:
            raise ValueError(
                f"the recording has passed {max_bytes:.0f} bytes at call {call} of {name}: keep less of each call "
                "(keep=…), fewer calls (calls=…) or modules, or raise max_bytes"
            )
        seen[name].append(copies if isinstance(kept, tuple) else copies[0])

    return seen, keep_result


def _check_range(chosen: Sequence[int] | None, count: int, what: str) -> list[int]:
    indices = list(range(count) if chosen is None else chosen)
    wrong = [i for i in indices if not 0 <= i < count]
    if wrong:
        raise ValueError(f"{what} {wrong[0]}: there are {count}, from 0 to {count - 1}")
    return indices
