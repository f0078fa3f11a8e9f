"""Rotary position embedding, in one and three dimensions.

Each pair of channels of a query or key is a point in the plane, rotated by (position · frequency): the dot
product of two rotated vectors depends only on how far apart they stand. Two layouts of the pairs are in use:

    interleaved (the DiT)   channels  0 1 | 2 3 | 4 5 | 6 7      pair i = (x[2i], x[2i+1])
    half-split  (Qwen)      channels  0 1 2 3 | 4 5 6 7          pair i = (x[i], x[i + D/2])

The same weights read with the wrong layout give noise, without an error. Angles are float32, and tables of them are
not buffers of the models, where `.to(torch.bfloat16)` would round them.
"""

import torch
from torch import Tensor


def build_angles(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """Angles of one axis: position · theta^(−i / (dim/2)).

    positions (L,) → (L, dim/2) float32, radians. `get_freqs` in diffusers' transformer_kandinsky.py.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim // 2)
    return torch.outer(positions.float(), theta**-exponents)  # (L, dim/2)


def build_angles_3d(
    grid: tuple[int, int, int], axes: tuple[int, int, int], scale: tuple[float, float, float], device: torch.device
) -> Tensor:
    """Angles of a (T, H, W) grid of tokens: per token those of its three positions, side by side.

    axes: rotary channels per axis, their sum D is the head dim; scale: positions are divided by it (a model
    trained on small frames then sees larger ones as if they were small).
    Returns (T, H, W, D/2) float32, radians. `Kandinsky5RoPE3D` in diffusers' transformer_kandinsky.py.
    """
    T, H, W = grid
    t, h, w = (
        build_angles(torch.arange(size, device=device), dim) / factor
        for size, dim, factor in zip(grid, axes, scale, strict=True)
    )
    return torch.cat(
        [
            t[:, None, None].expand(T, H, W, -1),
            h[None, :, None].expand(T, H, W, -1),
            w[None, None, :].expand(T, H, W, -1),
        ],
        dim=-1,
    )  # (T, H, W, D/2)


def build_rotations(angles: Tensor) -> Tensor:
    """Angles in radians, any shape → complex64 values of length 1, which rotate the points that they multiply."""
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate interleaved pairs: x (B, N, L, D), rotations (L, D/2) complex64 → (B, N, L, D), computed in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, N, L, D/2)
    return torch.view_as_real(pairs * rotations).flatten(-2).type_as(x)


def apply_rope_half_split(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate half-split pairs: x (B, N, L, D), angles (L, D/2) → (B, N, L, D), in x's precision.

    transformers rounds the table to the model's precision first; so does this.
    """
    cos, sin = angles.cos().type_as(x), angles.sin().type_as(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def scale_for_size(height: int, width: int) -> tuple[float, float, float]:
    """The rope scale (T, H, W) for a size in pixels, where a checkpoint names none.

    The rule of `_get_scale_factor` in diffusers' pipeline_kandinsky.py; the official code has it in each config.
    """
    factor = 2.0 if 480 <= height <= 854 and 480 <= width <= 854 else 3.16
    return (1.0, factor, factor)
