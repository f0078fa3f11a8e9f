"""Attention as it is defined: softmax(q kᵀ / √D) v, over all keys, those under a mask, or those that NABLA keeps.

q (B, N, L, D), k and v (B, N, S, D). `mask` is bool and True where a key may be seen (a bf16 mask that is added
to the scores masks nothing). Models compute through the function that they hold as their attribute `attend`: this one,
or a kernel that computes the same with less time or memory (runtime/kernels.py).
"""

import math
from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor

from kandinsky5 import nabla as nabla_map
from kandinsky5.config import NablaConfig
from kandinsky5.nabla import TILE

Attend = Callable[..., Tensor]  # the signature of `attend`


def attend(
    q: Tensor,  # (B, N, L, D)
    k: Tensor,  # (B, N, S, D)
    v: Tensor,  # (B, N, S, D)
    mask: Tensor | None = None,  # bool, expands to (B, N, L, S)
    nabla: NablaConfig | None = None,  # with it queries see the tiles of keys that NABLA keeps; tokens in tile order
    grid: tuple[int, int, int] | None = None,  # (T, H, W) of the tokens, for NABLA
) -> Tensor:
    """Attention as it is defined; (B, N, L, D). All L × S scores exist at once: 127 GB for a released model's video."""
    if nabla is not None:
        assert grid is not None, "tiles need the grid of the tokens"
        mask = expand_block_map(nabla_map.block_map(q, k, grid, nabla))  # (B, N, L, L)
    return dense_attention(q, k, v, mask)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The equation: q (B, N, L, D), k, v (B, N, S, D), mask that expands to (B, N, L, S) → (B, N, L, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, N, L, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v  # (B, N, L, D)


def expand_block_map(block_map: Tensor) -> Tensor:
    """bool (B, N, L/64, L/64) over tiles → bool (B, N, L, L) over tokens."""
    return repeat(block_map, "B N Q K -> B N (Q q) (K k)", q=TILE, k=TILE)
