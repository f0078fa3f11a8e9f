"""Attention kernels, which compute what `attention.attend` defines with less time or memory; installed by name.

    install                   lets a model compute through a kernel, chosen by name
      choose_kernel             which of the following a name stands for
      dense_attention           the equation itself
      F.scaled_dot_product_…    PyTorch's fused kernels
      chunked_attention         the equation for a few hundred queries at a time: faster than fused on a CPU in bf16
      block_sparse_attention    NABLA: only the kept tiles of keys for each tile of queries; any device, no compiler
      flex                      the same through compiled flex_attention, on CUDA

q (B, N, L, D), k and v (B, N, S, D), mask bool as in attention.py. `block_map` is NABLA's bool (B, N, L/64, L/64), with
tokens in tile order.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5 import nabla as nabla_map
from kandinsky5.attention import attend, dense_attention, expand_block_map
from kandinsky5.config import NablaConfig
from kandinsky5.nabla import TILE
from kandinsky5.runtime.device import allow_recompiling, compiler_missing

KERNELS = ("auto", "sdpa", "chunked", "flex", "dense")
SCORES = 2**20  # scores held at a time on a CPU: 2 MB in bf16, which stay in the cache
TILE_PAIRS = 2**21  # tile pairs indexed per chunk in block_sparse_attention: 16 bytes per kept pair
ON_GPU = 128, 32  # times as many of either on a GPU, where starting kernels costs: 0.3 GB of keys
LONG = 512  # queries from which chunks pay; text stays below
_compiler_missing = functools.cache(compiler_missing)  # for each block and step


def install(model: nn.Module, kernel: str) -> None:
    """Let every attention of `model` compute through this one of KERNELS, in place; "auto" is the fastest.

    Errors in bf16 against float64 (8 heads of 64, 4,992 random tokens): fused 0.0022, chunked 0.0045, because its
    scores are rounded to bf16. "sdpa" never uses chunks: slower on a CPU and, in bf16, closer. With NABLA it gathers
    the kept tiles and needs no compiler, on CUDA too. Raises ValueError for another name.
    """
    check_kernel(kernel)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = functools.partial(attend_through, kernel)  # type: ignore[assignment]


def remove(model: nn.Module) -> None:
    """Undo `install`: every attention of `model` computes as it is defined."""
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attend  # type: ignore[assignment]


def check_kernel(kernel: str, device: torch.device | None = None) -> None:
    """Raise ValueError unless this is one of KERNELS, and can be used on `device`."""
    if kernel == "flex" and device is not None and device.type not in ("cuda", "meta"):
        raise ValueError(f"attention flex is compiled for CUDA, not for {device.type}: choose auto")
    if kernel == "flex" and device is not None and (missing := compiler_missing(device.type)):
        raise ValueError(f"attention flex is compiled, and there is no {missing}; or choose auto, which is slower")
    if kernel not in KERNELS:
        raise ValueError(f"attention {kernel!r}: choose one of {', '.join(KERNELS)}")


def choose_kernel(name: str, device: str, dtype: torch.dtype, length: int, has_map: bool, compiles: bool = True) -> str:
    """The kernel that one of KERNELS stands for: "dense", "sdpa" or "chunked"; with a block map "dense", "gathered",
    "gathered sdpa" (the gathered tiles through PyTorch's kernel) or "flex".

    device: "cpu", "cuda", …; length: number of queries; compiles: whether torch.compile works there. On the meta device
    no data can select tiles: "dense". Apart from CPU and CUDA no fused kernel is known, so none is relied on.
    """
    if name == "dense" or device == "meta":
        return "dense"
    fused = name == "sdpa" or name != "chunked" and device == "cuda"
    if has_map:
        fused = fused or name == "auto" and device == "cpu" and dtype == torch.float32  # a fifth faster there
        if name == "flex" or name == "auto" and device == "cuda" and compiles:
            return "flex"
        return "gathered sdpa" if fused else "gathered"
    chunks = device != "cpu" or dtype == torch.bfloat16
    if name == "chunked" or name == "auto" and not fused and chunks and length >= LONG:
        return "chunked"
    return "sdpa"


def attend_through(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    nabla: NablaConfig | None = None, grid: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`attend`, all shapes as there, through the kernel that `name` stands for."""
    block_map, compiles = None, True
    if nabla is not None:
        assert grid is not None and mask is None, "tiles need the grid of the tokens, and no model masks them"
        block_map = map_head_by_head(q, k, grid, nabla)  # (B, N, L/64, L/64)
        compiles = not _compiler_missing(q.device.type)
    kernel = choose_kernel(name, q.device.type, q.dtype, q.shape[2], block_map is not None, compiles)
    if block_map is not None:
        if kernel == "flex":
            trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            block_mask = build_block_mask(block_map, backward=trained)
            options = flex_options(q.shape[3], q.dtype.itemsize, shared_memory(q.device), backward=trained)
            return _compiled_flex_attention()(q, k, v, block_mask=block_mask, kernel_options=options)
        if kernel != "dense":
            return block_sparse_attention(q, k, v, block_map, fused=kernel == "gathered sdpa")
        mask = expand_block_map(block_map)
    if kernel == "dense":
        return dense_attention(q, k, v, mask)
    if kernel == "chunked":
        return chunked_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def map_head_by_head(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """`nabla.block_map` for one head at a time, since sorting takes some twenty bytes per pair of tiles.

    q, k (B, N, L, D) in tile order → bool (B, N, L/64, L/64).
    """
    window = _keep_window(grid, config.window, q.device)  # (L/64, L/64)
    heads = zip(q.split(1, dim=1), k.split(1, dim=1), strict=True)  # (B, 1, L, D) each
    maps = [nabla_map.select_mass(nabla_map.pooled_attention(q_n, k_n), config.P) | window for q_n, k_n in heads]
    return torch.cat(maps, dim=1)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # cached tensors may be used in training, so they must not be inference tensors
def _keep_window(grid: tuple[int, int, int], window: tuple[int, int, int], device: torch.device) -> Tensor:
    """`nabla.build_window`, cached for all blocks and steps; do not modify in place."""
    return nabla_map.build_window(grid, window, device)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`dense_attention` for chunks of the queries: SCORES scores exist at a time, or those of 256 queries of one head.

    q (B, N, L, D), k, v (B, N, S, D), mask that expands to (B, N, L, S) → (B, N, L, D).
    """
    B, N, L, _ = q.shape
    S, rows = k.shape[2], min(L, 256)
    heads = max(1, piece_sizes(q.device.type)[0] // (rows * S))
    mask = mask.expand(B, N, L, S) if mask is not None else None  # a view
    q, k, v = (x.contiguous() for x in (q, k, v))  # else copied for each chunk
    out = torch.empty_like(q)
    for b, n, i in itertools.product(range(B), range(0, N, heads), range(0, L, rows)):
        some, here = (b, slice(n, n + heads)), (b, slice(n, n + heads), slice(i, i + rows))
        scores = _scaled_scores(q[here], k[some])  # (heads, rows, S)
        if mask is not None:
            scores = scores.masked_fill(~mask[here], -torch.inf)
        out[here] = _softmax(scores) @ v[some]
    return out


def _scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ / √D for (heads, L, D) and (heads, S, D), scaled before it is rounded to the precision of q."""
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=1 / math.sqrt(q.shape[-1]))


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; on a CPU in the memory of `scores`, still in the cache, unless gradients need them."""
    in_place = scores.device.type == "cpu" and not torch.is_grad_enabled()
    return torch.softmax(scores, dim=-1, out=scores if in_place else None)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, fused: bool = False) -> Tensor:
    """Exact softmax attention over the kept tiles; q, k, v (B, N, L, D) in tile order → (B, N, L, D).

    Tiles of queries that keep equally many, of whatever head, are computed together: their kept tiles of keys and
    values are gathered, and what is left is a batch of small attentions, SCORES scores at a time. Memory grows as L
    does, but for the map itself, of a byte for each 64 × 64 of scores. Each tile keeps at least one.
    fused: through PyTorch's kernel, as "sdpa" says.
    """
    B, N, L, D = q.shape
    per_head = L // TILE
    q, k, v = (x.reshape(B * N * per_head, TILE, D) for x in (q, k, v))  # tiles, head after head
    out = torch.empty_like(q)
    scores, pairs = piece_sizes(q.device.type)
    at_once = max(1, pairs // per_head**2) * per_head  # rows of the map, those of a few heads
    numbers, rows = torch.arange(len(q), device=q.device), block_map.reshape(-1, per_head)
    for some, kept in zip(numbers.split(at_once), rows.split(at_once), strict=True):
        counts = kept.sum(dim=-1)
        for count in counts.unique().tolist():
            alike = counts == count
            first = some[alike] // per_head * per_head  # of the head's tiles
            chosen = kept[alike].nonzero()[:, 1].view(-1, count) + first[:, None]  # key tiles of each query tile
            size = max(1, scores // (1 + fused) // (TILE * TILE * count))  # fused, keys fill the cache, not scores
            for where, tiles in zip(some[alike].split(size), chosen.split(size), strict=True):
                keys, values = (x.index_select(0, tiles.flatten()).view(len(tiles), -1, D) for x in (k, v))
                if fused:
                    queries, keys, values = (x[:, None] for x in (q[where], keys, values))  # one head
                    out[where] = F.scaled_dot_product_attention(queries, keys, values)[:, 0]
                else:
                    out[where] = _softmax(_scaled_scores(q[where], keys)) @ values
    return out.view(B, N, L, D)


def piece_sizes(device: str) -> tuple[int, int]:
    """Scores and tile pairs that are in hand at a time on a "cpu", "cuda", …"""
    return (SCORES, TILE_PAIRS) if device == "cpu" else (ON_GPU[0] * SCORES, ON_GPU[1] * TILE_PAIRS)


def build_block_mask(block_map: Tensor, backward: bool = True):
    """PyTorch's BlockMask made of a bool (B, N, L/64, L/64) map, for the compiled kernel.

    Without gradients each kept tile is a block, all of whose tokens are seen: no `mask_mod`. As "full" blocks next to
    one, which is never asked, they cost a second loop, and registers: benchmarks/results/without_gpu.md. Uncompiled,
    flex_attention ignores blocks and would attend to all tokens.
    backward: also list the queries of each key, which gradients need; it takes two sorts of the whole map. Blocks are
    then two tiles wide, as the kernels of gradients on Hopper and Blackwell refuse smaller ones; those with some but
    not all of their four tiles are not "full", and `mask_mod` says which.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def same_as_map(b, n, q, k):
        return block_map[b, n, q // TILE, k // TILE]

    def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
        return kept.sum(dim=-1, dtype=torch.int32), list_tiles(kept)

    lengths = TILE * block_map.shape[-2], TILE * block_map.shape[-1]
    if not backward:
        return BlockMask.from_kv_blocks(
            *listed(block_map), BLOCK_SIZE=TILE, seq_lengths=lengths, compute_q_blocks=False
        )
    pairs = F.pad(block_map, (0, block_map.shape[-1] % 2, 0, block_map.shape[-2] % 2))
    four = rearrange(pairs, "B N (Q q) (K k) -> B N Q K (q k)", q=2, k=2)
    full, some = four.all(dim=-1), four.any(dim=-1) & ~four.all(dim=-1)
    return BlockMask.from_kv_blocks(*listed(some), *listed(full), 2 * TILE, same_as_map, lengths)


def list_tiles(block_map: Tensor) -> Tensor:
    """The kept tiles of each row first, in order, and then the others: bool (B, N, Q, K) → int32 (B, N, Q, K).

    Without sorting: a kept tile's place is the number of kept ones before it. Head by head, as the places are int64.
    """
    tiles = torch.arange(block_map.shape[-1], device=block_map.device, dtype=torch.int32)
    index = torch.empty(block_map.shape, device=block_map.device, dtype=torch.int32)
    for kept, into in zip(block_map.flatten(0, 1), index.flatten(0, 1), strict=True):  # (Q, K) each
        before = kept.cumsum(dim=-1) - 1
        after = before[:, -1:] + tiles - before  # behind all kept ones, the dropped ones in order
        into.scatter_(-1, torch.where(kept, before, after), tiles.expand_as(into))
    return index


def flex_options(head_dim: int, itemsize: int, shared: int, backward: bool = False) -> dict[str, int | str]:
    """Options of the compiled kernel for tiles of 64: as many stages of its pipeline, three at most, as fit.

    A stage holds a tile of keys and one of values in the `shared` bytes of a multiprocessor, next to the queries: for a
    head dim of 128 in bf16 three need 112 KB at most, of which a data-centre GPU has 160 or more and others 99. Four
    warps are what the authors' autotuning ends at; the kernel's own choice, 8, is for tiles of 128, which refuse these
    blocks. In float32, without tensor cores, whole tiles of keys made threads spill up to 16 KB of registers; quarters
    spill none, or 8 bytes, in inference (benchmarks/results/without_gpu.md).
    backward: for blocks of two tiles, of which the last one may reach beyond the tokens.
    """
    keys = TILE if itemsize < 4 else TILE // 4
    stages = max(1, min(3, (shared // (head_dim * itemsize) - TILE) // (2 * keys)))
    blocks: dict[str, int | str] = {"BLOCK_M": TILE, "BLOCK_N": keys, "fwd_num_warps": 4, "fwd_num_stages": stages}
    blocks["BACKEND"] = "TRITON"  # another one takes blocks without a `mask_mod` for full attention
    return blocks if backward else blocks | {"ROWS_GUARANTEED_SAFE": True, "fwd_IS_DIVISIBLE": True}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads may have on a GPU; elsewhere those of a data-centre GPU."""
    if device.type != "cuda":
        return 160 * 2**10
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 2**10)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    # Past the limit an error: uncompiled it would attend to all tokens, and hold all scores.
    return torch.compile(flex_attention, fullgraph=True, **allow_recompiling())
