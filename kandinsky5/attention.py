"""The DiT's and the text encoders' only door to attention kernels, beside the definition that each of them must match.

    attention                 what the models call; it picks among the following
      dense_attention         the definition, written out: softmax(q kᵀ / √D) v with an optional bool mask
      scaled_dot_product      PyTorch's fused kernels
      chunked_attention       the definition for a few hundred queries at a time: on a CPU in bf16 faster than fused
      block_sparse_attention  NABLA: for each tile of queries its kept tiles of keys; any device, no compiler
      flex                    the same through compiled flex_attention, on CUDA

q (B, N, L, D), k and v (B, N, S, D). `mask` is bool and True where a key may be seen (a bf16 mask that is added
to the scores masks nothing). `block_map` is NABLA's bool (B, N, L/64, L/64), tokens in tile order.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from kandinsky5.nabla import TILE

KERNELS = ("auto", "sdpa", "chunked", "flex", "dense")
SCORES = 2**20  # how many scores are held at a time on a CPU: 2 MB in bf16, which stay in the cache
TILE_PAIRS = 2**21  # of tiles, whose choice block_sparse_attention lists at a time: 16 bytes for each that is kept
LONG = 512  # queries from which chunks are worth their while; text stays below

_kernel = "auto"


@contextlib.contextmanager
def use(kernel: str) -> Iterator[None]:
    """Inside, `attention` computes with this one of KERNELS. ValueError for another name."""
    global _kernel
    check_kernel(kernel)
    before, _kernel = _kernel, kernel
    try:
        yield
    finally:
        _kernel = before


def check_kernel(kernel: str, device: torch.device | None = None) -> None:
    """ValueError unless it is one of KERNELS, and can be used on `device`."""
    if kernel == "flex" and device is not None and device.type not in ("cuda", "meta"):
        raise ValueError(f"attention flex is compiled for CUDA, not for {device.type}: choose auto")
    if kernel not in KERNELS:
        raise ValueError(f"attention {kernel!r}: choose one of {', '.join(KERNELS)}")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, block_map: Tensor | None = None) -> Tensor:
    """Attention through the kernel that `use` names; returns (B, N, L, D).

    "auto": without a block map `F.scaled_dot_product_attention` (flash kernels where PyTorch has them), on a CPU in
    bf16 from LONG queries on `chunked_attention`. With a block map compiled flex_attention on CUDA, else
    `block_sparse_attention`. On the meta device, where no data selects tiles, dense attention gives the right shape.
    Errors in bf16 against float64 (8 heads of 64, 4,992 random tokens): fused 0.0022, chunked 0.0045, as its scores
    are rounded to bf16. "sdpa" never chunks: slower on a CPU and, in bf16, closer.

    What another name changes: without a block map "flex" is as "auto". With one, "dense" is the definition under the
    map's mask, "chunked" as "auto" on a CPU, and "sdpa" the gathered tiles through PyTorch's kernel, on CUDA too, where
    it needs no compiler. No gradient goes through a compiled model (`compile.py`), where this is one operation.
    """
    if torch.compiler.is_compiling():
        return _one_operation(q, k, v, mask, block_map).transpose(1, 2)
    kernel = _kernel
    if block_map is not None and not q.is_meta:
        assert mask is None, "a block map and a key mask together are not used by any model"
        if kernel == "dense":
            return dense_attention(q, k, v, expand_block_map(block_map))
        if kernel == "flex" or kernel == "auto" and q.is_cuda:
            tile = {"BLOCK_M": TILE, "BLOCK_N": TILE}  # the kernel's own default of 128 refuses such blocks
            return _compiled_flex_attention()(q, k, v, block_mask=build_block_mask(block_map), kernel_options=tile)
        return block_sparse_attention(q, k, v, block_map, fused=kernel == "sdpa" or q.device.type != "cpu")
    if kernel == "dense":
        return dense_attention(q, k, v, mask)
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] >= LONG
    if kernel == "chunked" or kernel == "auto" and on_cpu:
        return chunked_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition: q (B, N, L, D), k, v (B, N, S, D), mask broadcastable to (B, N, L, S) → (B, N, L, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, N, L, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v  # (B, N, L, D)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`dense_attention` for chunks of the queries: SCORES scores exist at a time, or those of 256 queries of one head.

    q (B, N, L, D), k, v (B, N, S, D), mask that expands to (B, N, L, S) → (B, N, L, D).
    """
    B, N, L, _ = q.shape
    S, rows = k.shape[2], min(L, 256)
    heads = max(1, SCORES // (rows * S))
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


def expand_block_map(block_map: Tensor) -> Tensor:
    """bool (B, N, L/64, L/64) over tiles → bool (B, N, L, L) over tokens, for `dense_attention`."""
    return repeat(block_map, "B N Q K -> B N (Q q) (K k)", q=TILE, k=TILE)


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
    at_once = max(1, TILE_PAIRS // per_head**2) * per_head  # rows of the map, those of a few heads
    numbers, rows = torch.arange(len(q), device=q.device), block_map.reshape(-1, per_head)
    for some, kept in zip(numbers.split(at_once), rows.split(at_once), strict=True):
        counts = kept.sum(dim=-1)
        for count in counts.unique().tolist():
            alike = counts == count
            first = some[alike] // per_head * per_head  # of the head's tiles
            chosen = kept[alike].nonzero()[:, 1].view(-1, count) + first[:, None]  # key tiles of each query tile
            size = max(1, SCORES // (TILE * TILE * count))
            for where, tiles in zip(some[alike].split(size), chosen.split(size), strict=True):
                keys, values = (x.index_select(0, tiles.flatten()).view(len(tiles), -1, D) for x in (k, v))
                if fused:
                    queries, keys, values = (x[:, None] for x in (q[where], keys, values))  # one head
                    out[where] = F.scaled_dot_product_attention(queries, keys, values)[:, 0]
                else:
                    out[where] = _softmax(_scaled_scores(q[where], keys)) @ values
    return out.view(B, N, L, D)


def build_block_mask(block_map: Tensor):
    """PyTorch's BlockMask made of a bool (B, N, L/64, L/64) map.

    All kept tiles are "full" blocks, which the compiled kernel computes without looking inside. Uncompiled,
    flex_attention ignores blocks and applies `mask_mod` to every pair of tokens, so that must say the same.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def same_as_map(b, n, q, k):
        return block_map[b, n, q // TILE, k // TILE]

    count = block_map.sum(dim=-1, dtype=torch.int32)
    index = block_map.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(torch.zeros_like(count), index, count, index, BLOCK_SIZE=TILE, mask_mod=same_as_map)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@torch.library.custom_op("kandinsky5::attention", mutates_args=())
def _one_operation(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: Tensor | None) -> Tensor:
    """`attention` as torch.compile sees it, (B, L, N, D): one operation that it calls and does not look into.

    What goes on inside depends on sizes and, with NABLA, on data; traced, it would be compiled anew for each.
    """
    return attention(q, k, v, mask, block_map).transpose(1, 2).contiguous()


@_one_operation.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, block_map: Tensor | None) -> Tensor:
    B, N, L, D = q.shape
    return q.new_empty(B, L, N, D)
