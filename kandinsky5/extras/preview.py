"""Previews: a small middle frame of what the video is going to be, every few steps.

    latents x, time t ─ x − t · velocity ─> the data that the step foresees ─ linear map ─> RGB, one pixel per latent

Latents of this kind of VAE hold colour almost linearly: a 17 × 3 matrix, 16 channels and a constant, shows more than
enough to stop a bad seed early, for 0.2 % of a step's time (nano, one core; larger models: less). A file costs 4 to
12 ms more, which is 9 % of one of nano's steps and nothing compared with a large model's. The matrix is fitted to the
VAE once, when it is first needed, which takes nano as long as six steps.

    pipe(prompt, callback=preview.build_callback(pipe.vae, lambda step, frame: …, every=5))
"""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kandinsky5 import video_io
from kandinsky5.runtime.device import plain_defaults
from kandinsky5.runtime.offload import awake
from kandinsky5.screen import Forgiving, say
from kandinsky5.vae import VAE
from kandinsky5.vae2d import VAE2D

Show = Callable[[int, Tensor], None]

SIDE = 384  # pixels of a preview's longer side in a file


def build_callback(vae: VAE | VAE2D, show: Show, every: int = 1) -> Callable[[int, float, Tensor], None]:
    """A callback for `Pipeline.__call__` that calls `show(step, frame)` after every `every`-th step.

    frame: uint8 (B, H/8, W/8, 3), the middle frame. There is none after the first step: the velocity is taken from
    two latents in a row, v = (x' − x) / (t' − t), which is what Euler's method went by.
    ValueError unless every is at least 1.
    """
    if every < 1:
        raise ValueError(f"a preview every {every} steps: it must be at least 1")
    colours, before = fit_colours(vae), None

    def callback(step: int, t: float, latents: Tensor) -> None:
        nonlocal before
        if step == 0:
            before = None  # what is left of another video
        x = latents[:, latents.shape[1] // 2].float()  # (B, H/8, W/8, 16)
        if before is not None and (step + 1) % every == 0:
            t_before, x_before = before
            velocity = (x - x_before) / (t - t_before)
            show(step, draw(x - t * velocity, colours))
        before = t, x.clone()  # not a view, which would keep all the frames

    return callback


def draw(latents: Tensor, colours: Tensor) -> Tensor:
    """Scaled latents (…, 16) → uint8 (…, 3) on the CPU by the map `colours` (17, 3)."""
    rgb = latents @ colours[:-1].to(latents) + colours[-1].to(latents)  # (…, 3) in [-1, 1]
    return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@plain_defaults()
@torch.no_grad()
def fit_colours(vae: VAE | VAE2D, count: int = 32) -> Tensor:
    """The map (17, 3) from scaled latents and 1 to RGB in [-1, 1] that fits best: least squares over simple frames.

    On nano's own videos it explains 88 % of the variance of the colours; no such map could explain more than 91 %.
    """
    frames = _draw_discs(count, size=8 * vae.config.space_factor)
    with awake(vae):
        weight = next(vae.parameters())
        z = vae.encode(frames.to(weight)).mean[:, :, 0].float().cpu()  # (B, 16, 8, 8)
    latents = (z * vae.config.scaling_factor).movedim(1, -1).flatten(0, 2)  # (B·64, 16)
    rgb = F.avg_pool2d(frames[:, :, 0], vae.config.space_factor).movedim(1, -1).flatten(0, 2)  # (B·64, 3)
    return torch.linalg.lstsq(F.pad(latents, (0, 1), value=1.0), rgb).solution  # (17, 3)


def open_place(place: str | Path | Literal[True]) -> Show:
    """What shows frames, uint8 (B, H/8, W/8, 3), in the PNG `place`, or for True in the terminal."""
    return in_terminal() if place is True else in_file(place)


def in_file(path: str | Path) -> Show:
    """Shows the first of each (B, H/8, W/8, 3), enlarged to SIDE at most, in the PNG `path`, replaced in one go.

    A frame of Lite (64 × 96 latents) takes 12 ms. ValueError or OSError, before sampling begins, for a path that
    cannot be written.
    """
    video_io.check_writable(path)

    def show(step: int, frame: Tensor) -> None:
        height, width = frame.shape[1:3]
        scale = max(1, min(8, SIDE // max(height, width)))
        enlarged = video_io.resize_image(frame[0], scale * height, scale * width)
        with contextlib.suppress(OSError):  # a full disk is no reason to lose the video
            video_io.write_video(path, enlarged[None], compress=False)

    return show


def in_terminal() -> Show:
    """Shows the first of each (B, H/8, W/8, 3) on stdout, in 24-bit colour, instead of the one before.

    ValueError if stdout is no terminal.
    """
    if not sys.stdout.isatty():
        raise ValueError("preview: the output is no terminal: give a file, --preview FILE.png")
    try:
        "▀".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        say(f"note: no previews, as this terminal's {sys.stdout.encoding} lacks ▀: give a file, --preview FILE.png")
        return lambda step, frame: None
    up = ""

    def show(step: int, frame: Tensor) -> None:
        nonlocal up
        columns, rows = shutil.get_terminal_size()
        height, width = frame.shape[1:3]
        scale = min((columns - 1) / width, 2 * (rows - 3) / height, 8)
        size = max(1, round(scale * height / 2)) * 2, max(1, int(scale * width))
        lines = half_blocks(video_io.resize_image(frame[0], *size))
        tqdm.write(up + "\n".join(lines), file=Forgiving(sys.stdout))  # takes the bar away and draws it again below
        up = f"\x1b[{len(lines)}A"  # to where this frame begins

    return show


def half_blocks(frame: Tensor) -> list[str]:
    """uint8 (H, W, 3) → H/2 lines: ▀ in the colour of the upper of two pixels on a ground in that of the lower."""
    pairs = frame.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).tolist()  # (H/2, W, 6)
    cells = [["\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*colours) for colours in row] for row in pairs]
    return ["".join(row) + "\x1b[0m" for row in cells]


def _draw_discs(count: int, size: int) -> Tensor:
    """Pictures (count, 3, 1, size, size) in [-1, 1] of one disc each, in greys and full colours; always the same."""
    generator = torch.Generator().manual_seed(0)
    colours = 2 * torch.rand(2, count, 3, 1, 1, 1, generator=generator) - 1
    is_grey = torch.rand(2, count, 1, 1, 1, 1, generator=generator) < 0.5
    disc, ground = torch.where(is_grey, colours[:, :, :1], 0.9 * colours.sign())
    x, y, radius = torch.rand(3, count, 1, 1, 1, 1, generator=generator)
    places = (torch.arange(size) + 0.5) / size
    inside = (places - x) ** 2 + (places[:, None] - y) ** 2 < (0.125 + radius / 4) ** 2  # (count, 1, 1, size, size)
    return torch.where(inside, disc, ground)
