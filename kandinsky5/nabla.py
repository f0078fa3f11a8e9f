"""NABLA: which tiles of the video attend to which (arXiv 2507.13546).

Full attention over L video tokens costs L². Most of its mass lies on few tiles, so NABLA first looks at the
video coarsely: tokens are grouped into tiles of 8×8 in one frame, queries and keys are averaged over each tile,
and a small softmax over tiles says where the mass is. The tiles that hold a share P of it are kept, and a window
of near neighbours in any case. Attention over the kept tiles is then exact (runtime/kernels.py computes only these).

    tokens (T, H, W) ──to_tiles──> tile order ──pool──> softmax over tiles ──select_mass──┐
                                                                                         OR ──> block_map
    grid   (T, H, W) ──────────────build_window──────────────────────────────────────────┘
"""

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from kandinsky5.config import NablaConfig

SIDE = 8  # a tile is SIDE × SIDE tokens of one frame
TILE = SIDE * SIDE


def block_map(q: Tensor, k: Tensor, grid: tuple[int, int, int], config: NablaConfig) -> Tensor:
    """The tiles that each tile attends to, per sample and head.

    q, k (B, N, L, D) after norm and RoPE, in tile order; grid (T, H, W) in tokens, T·H·W = L.
    Returns bool (B, N, L/64, L/64); rows are query tiles. Paper, §3.
    """
    window = build_window(grid, config.window, q.device)  # (L/64, L/64)
    return select_mass(pooled_attention(q, k), config.P) | window  # (B, N, L/64, L/64)


def to_tiles(x: Tensor) -> Tensor:
    """Tokens on their grid → tile order: x (B, T, H, W, C) → (B, L, C), t-major, row-major inside a tile."""
    return rearrange(x, "B T (H h) (W w) C -> B (T H W h w) C", h=SIDE, w=SIDE)


def from_tiles(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_tiles`: x (B, L, C) → (B, T, H, W, C)."""
    T, H, W = grid
    return rearrange(x, "B (T H W h w) C -> B T (H h) (W w) C", T=T, H=H // SIDE, W=W // SIDE, h=SIDE, w=SIDE)


def pooled_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention between tile means: q, k (B, N, L, D) in tile order → (B, N, L/64, L/64), rows sum to 1.

    Float32 from the means on: the references add up thousands of probabilities in bf16, where the result, and
    with it the map, depends on the order in which a device adds.
    """
    q = reduce(q, "B N (L tile) D -> B N L D", "mean", tile=TILE).float()
    k = reduce(k, "B N (L tile) D -> B N L D", "mean", tile=TILE).float()
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


def select_mass(probability: Tensor, P: float) -> Tensor:
    """Keep the largest entries of each row that together hold the mass P.

    An entry stays if it and all smaller ones sum to at least 1 − P. probability (…, L) → bool (…, L).
    """
    ascending, order = probability.sort(dim=-1)
    kept = ascending.cumsum(dim=-1) >= 1 - P
    return torch.zeros_like(kept).scatter(-1, order, kept)


def build_window(grid: tuple[int, int, int], window: tuple[int, int, int], device: torch.device) -> Tensor:
    """The sliding window over tiles: near in time, height and width at once.

    grid (T, H, W) in tokens; window (T, H, W) in tiles, its half is how far a tile sees to each side.
    Returns bool (L/64, L/64).
    """
    T, H, W = grid[0], grid[1] // SIDE, grid[2] // SIDE
    near_t, near_h, near_w = (
        (torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)).abs() <= width // 2
        for size, width in zip((T, H, W), window, strict=True)
    )
    near = (
        near_t[:, None, None, :, None, None]
        & near_h[None, :, None, None, :, None]
        & near_w[None, None, :, None, None, :]
    )  # (T, H, W, T, H, W)
    return near.reshape(T * H * W, T * H * W)
