"""The only door to attention kernels, beside the definition that each of them must match.

    dense_attention         the definition, written out: softmax(q kᵀ / √D) v with an optional bool mask
    attention               what the models call; it picks among the following
      scaled_dot_product    PyTorch's fused kernels, for anything without a block map
      block_sparse          gathers the kept tiles of keys and values: any device, no compiler
      flex                  the same through compiled flex_attention, on CUDA

q (B, N, L, D), k and v (B, N, S, D). `mask` is bool and True where a key may be seen (a bf16 mask that is added
to the scores masks nothing). `block_map` is NABLA's bool (B, N, L/64, L/64), tokens in tile order.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from kandinsky5.nabla import TILE

# How many gathered keys block_sparse_attention holds at a time: 16 query tiles of 75 kept tiles at D = 64 are
# 5 million elements. More is slower, as the gathered keys then leave the cache.
GATHERED_ELEMENTS = 4_000_000


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, block_map: Tensor | None = None) -> Tensor:
    """Attention through the fastest path that applies here; returns (B, N, L, D).

    Without a block map: `F.scaled_dot_product_attention` (flash kernels where PyTorch has them). With one:
    compiled flex_attention on CUDA, else the gathering path. On the meta device, where there is no data to
    select tiles by, dense attention gives the right shape.
    """
    if block_map is None or q.is_meta:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert mask is None, "a block map and a key mask together are not used by any model"
    if q.is_cuda:
        return _compiled_flex_attention()(q, k, v, block_mask=build_block_mask(block_map))
    return block_sparse_attention(q, k, v, block_map)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition: q (B, N, L, D), k, v (B, N, S, D), mask broadcastable to (B, N, L, S) → (B, N, L, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, N, L, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v  # (B, N, L, D)


def expand_block_map(block_map: Tensor) -> Tensor:
    """bool (B, N, L/64, L/64) over tiles → bool (B, N, L, L) over tokens, for `dense_attention`."""
    return repeat(block_map, "B N Q K -> B N (Q q) (K k)", q=TILE, k=TILE)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
    """Exact softmax attention over the kept tiles; q, k, v (B, N, L, D) in tile order → (B, N, L, D).

    Every query tile of every head is a row of its own. Rows that keep about equally many tiles go together: their
    keys and values are gathered, padded to the longest row, and the padding is masked. Neither an L × L matrix
    nor more than `GATHERED_ELEMENTS` gathered keys exist at any time.
    """
    B, N, L, D = q.shape
    tiles = L // TILE
    query_tiles = rearrange(q, "B N (Q q) D -> (B N Q) 1 q D", q=TILE)
    key_tiles, value_tiles = (rearrange(x, "B N (K k) D -> (B N K) k D", k=TILE) for x in (k, v))

    kept = rearrange(block_map, "B N Q K -> (B N Q) K")
    count = kept.sum(dim=-1)  # (B N Q)
    head = torch.arange(B * N, device=q.device).repeat_interleave(tiles)
    index = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)  # kept tiles first
    index = index + head[:, None] * tiles  # into key_tiles; (B N Q, K)

    out = torch.empty_like(query_tiles)
    order = count.argsort(descending=True)
    start = 0
    while start < len(order):
        most = int(count[order[start]])
        rows = order[start : start + max(1, GATHERED_ELEMENTS // (most * TILE * D))]  # (R,)
        chosen = index[rows, :most]  # (R, most)
        keys, values = (x[chosen].flatten(1, 2)[:, None] for x in (key_tiles, value_tiles))  # (R, 1, most·64, D)
        real = torch.arange(most, device=q.device) < count[rows, None]  # (R, most)
        real = real.repeat_interleave(TILE, dim=-1)[:, None, None]  # (R, 1, 1, most·64)
        out[rows] = F.scaled_dot_product_attention(query_tiles[rows], keys, values, attn_mask=real)
        start += len(rows)
    return rearrange(out, "(B N Q) 1 q D -> B N (Q q) D", B=B, N=N)


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
