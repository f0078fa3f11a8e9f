"""Encode and decode in overlapping windows, so that memory does not grow with the clip.

In time a window holds 16 frames and one before them, every 12 frames; in space, on request, tiles of 256 pixels
every 192. Where two of them overlap, the earlier fades linearly into the later. Sizes and defaults are those of
diffusers; the official code picks its tiles from the free GPU memory, so that its pixels depend on the machine.

    frames   0 ─────────── 16                 window 1 gives frames 0 … 12
                       12 ─────────── 28      window 2 gives 13 … 24; over 13 … 16 it fades in
    A window after the first recomputes one frame, only to give its causal convs a past; that frame is dropped.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kandinsky5.config import Tiling
from kandinsky5.vae import VAE, Posterior
from kandinsky5.vae2d import VAE2D

Each = Callable[..., Iterable[Tensor]]  # the signature of `map`


def encode(vae: VAE | VAE2D, video: Tensor, tiling: Tiling) -> Posterior:
    """`vae.encode`, tiled: video (B, 3, F, H, W) → Posterior of (B, 16, T, h, w)."""
    time, space = vae.config.time_factor, vae.config.space_factor

    def encode_window(window: Tensor) -> Tensor:
        if not tiling.space or max(window.shape[3:]) <= tiling.pixels:
            return vae.encode_moments(window)
        out_size, out_stride = tiling.pixels // space, tiling.pixel_stride // space
        return _tile_space(vae.encode_moments, window, tiling.pixels, tiling.pixel_stride, out_size, out_stride)

    if not tiling.time or video.shape[2] <= tiling.frames:
        return Posterior.from_moments(encode_window(video))
    out_size, out_stride = tiling.frames // time, tiling.frame_stride // time
    pieces = _tile_time(encode_window, video, tiling.frames, tiling.frame_stride, out_size, out_stride)
    return Posterior.from_moments(torch.cat(list(pieces), dim=2))


def decode(vae: VAE | VAE2D, z: Tensor, tiling: Tiling) -> Tensor:
    """`vae.decode`, tiled: z (B, 16, T, h, w) → video (B, 3, F, H, W)."""
    return torch.cat(list(decode_pieces(vae, z, tiling)), dim=2)


def decode_pieces(vae: VAE | VAE2D, z: Tensor, tiling: Tiling, each: Each = map) -> Iterator[Tensor]:
    """`decode`, a window at a time: yields (B, 3, f, H, W), in order, that make up the video.

    Whoever turns each piece into bytes as it comes never holds the whole video in floating point.
    each: like Python's map, it runs a function on all windows; on several ranks it is `parallel.Ranks.map`.
    """
    time, space = vae.config.time_factor, vae.config.space_factor

    def decode_window(window: Tensor) -> Tensor:
        size, stride = tiling.pixels // space, tiling.pixel_stride // space
        if not tiling.space or max(window.shape[3:]) <= size:
            return vae.decode(window)
        return _tile_space(vae.decode, window, size, stride, tiling.pixels, tiling.pixel_stride)

    size, stride = tiling.frames // time, tiling.frame_stride // time
    if not tiling.time or z.shape[2] <= size:
        yield decode_window(z)
    else:
        yield from _tile_time(decode_window, z, size, stride, tiling.frames, tiling.frame_stride, each)


def _tile_time(
    run: Callable[[Tensor], Tensor], x: Tensor, size: int, stride: int, out_size: int, out_stride: int, each: Each = map
) -> Iterator[Tensor]:
    """Run over windows of x (B, C, T, H, W) of size + 1 frames, `stride` apart; yields what each adds.

    size and stride count frames of x, out_size and out_stride frames of the result.
    """
    overlap = out_size - out_stride
    tail = None
    starts = range(0, x.shape[2] - 1, stride)  # a last window of one frame would add nothing
    windows = each(run, (x[:, :, start : start + size + 1] for start in starts))
    for start, window in zip(starts, windows, strict=True):
        if tail is not None:
            window = window[:, :, 1:]
            _fade_in(window, tail, dim=2)
        tail = _last(window, overlap, dim=2)
        yield window[:, :, : out_stride if start > 0 else out_stride + 1]


def _tile_space(
    run: Callable[[Tensor], Tensor], x: Tensor, size: int, stride: int, out_size: int, out_stride: int
) -> Tensor:
    """Run over tiles of x (B, C, T, H, W) of size × size, `stride` apart; returns them blended into one.

    size and stride count pixels of x, out_size and out_stride pixels of the result. A tile is faded into the one
    above it and then into the one on its left, both of which are blended already: the order matters in corners.
    """
    overlap = out_size - out_stride
    rows: list[Tensor] = []
    bottoms: list[Tensor] = []
    for top in range(0, x.shape[3], stride):
        row, bottoms_above, bottoms, right = [], bottoms, [], None
        for column, left in enumerate(range(0, x.shape[4], stride)):
            tile = run(x[:, :, :, top : top + size, left : left + size])
            if top > 0:
                _fade_in(tile, bottoms_above[column], dim=3)
            if right is not None:
                _fade_in(tile, right, dim=4)
            bottoms.append(_last(tile, overlap, dim=3))
            right = _last(tile, overlap, dim=4)
            row.append(tile[:, :, :, :out_stride, :out_stride].clone())  # a view would keep the whole tile
        rows.append(torch.cat(row, dim=4))
    return torch.cat(rows, dim=3)


def _fade_in(tile: Tensor, before: Tensor, dim: int) -> None:
    """Blend the end of `before` into the beginning of `tile`, in place: weights 0, 1/n, … (n − 1)/n for `tile`."""
    n = min(before.shape[dim], tile.shape[dim])
    ramp = torch.arange(n, device=tile.device) / n
    ramp = ramp.view([n if d == dim else 1 for d in range(tile.ndim)])
    head, end = tile.narrow(dim, 0, n), _last(before, n, dim)
    head.copy_(end * (1 - ramp) + head * ramp)


def _last(x: Tensor, n: int, dim: int) -> Tensor:
    """A copy of the last n entries along dim (all of them if there are fewer)."""
    n = min(n, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - n, n).clone()
