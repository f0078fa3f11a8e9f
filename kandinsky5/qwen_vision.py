"""The vision tower of Qwen2.5-VL: an image → tokens for the language model, one for each 28 × 28 pixels.

    image ─ prepare_image ─> (3, H, W) ─ patches of 14 × 14 ─ blocks ─ merger: 2 × 2 patches each ─> (H/28 · W/28, 3584)

Most blocks see a window of 8 × 8 patches, a few the whole image. Patches are therefore laid out window by window.
Windows begin at the upper left; those at the right and lower edge are filled up with patches that nobody sees.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from kandinsky5.attention import Attend, attend
from kandinsky5.config import QwenVisionConfig
from kandinsky5.qwen import RMSNorm, SwiGLU
from kandinsky5.rope import apply_rope_half_split, build_angles

PATCH = 14  # pixels along a side of a patch
MERGED = 2  # patches along a side of a token of the language model
TOKEN = MERGED * PATCH  # pixels along its side: 28
WINDOW = 8  # patches along a side of a window
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the pixels, as CLIP's


class QwenVision(nn.Module):
    """Patches, blocks, merger."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.config = config
        shape = (2, PATCH, PATCH)  # a patch of a video has two frames
        self.patch_embedder = nn.Conv3d(3, config.dim, shape, stride=shape, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, i in config.full_blocks) for i in range(config.num_layers))
        self.merger = Merger(config)

    def forward(self, image: Tensor) -> Tensor:
        """image (3, H, W) as `prepare_image` gives it → (H/28 · W/28, out_dim), row by row."""
        clip = torch.stack([image, image], dim=1)[None]  # (1, 3, 2, H, W): a clip of two equal frames
        x = rearrange(self.patch_embedder(clip), "1 C 1 h w -> h w C")  # (H/14, W/14, dim)
        h, w, _ = x.shape
        real = to_windows(torch.ones(h, w, 1, dtype=torch.bool, device=x.device))  # (windows, 64, 1)
        angles = to_windows(self.build_angles(h, w, x.device))  # (windows, 64, D/2)
        x = self.run_blocks(self.blocks, to_windows(x), angles, real)  # (windows, 64, dim)
        return self.merger(from_windows(x, h, w))  # (H/28 · W/28, out_dim)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """Tokens x (windows, 64, dim) through the blocks → the same shape. What streams weights wraps this method."""
        for block in blocks:
            x = block(x, *arguments)
        return x

    def build_angles(self, h: int, w: int, device: torch.device) -> Tensor:
        """Rotary angles of a grid of patches: half of a head's pairs turn with the row, half with the column.

        (h, w, D/2) float32, radians.
        """
        half = self.config.head_dim // 2
        rows = build_angles(torch.arange(h, device=device), half)  # (h, D/4)
        columns = build_angles(torch.arange(w, device=device), half)  # (w, D/4)
        return torch.cat([rows[:, None].expand(-1, w, -1), columns[None].expand(h, -1, -1)], dim=-1)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): x (windows, 64, dim) → the same.

    full: attention sees the whole image, not only the window.
    """

    def __init__(self, config: QwenVisionConfig, full: bool):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = WindowAttention(config, full)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.ff_dim, bias=True)

    def forward(self, x: Tensor, angles: Tensor, real: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, real)  # (windows, 64, dim)
        return x + self.feed_forward(self.feed_forward_norm(x))


class WindowAttention(nn.Module):
    """Attention inside each window, or over all of them as if they were one: x (windows, 64, dim) → the same."""

    def __init__(self, config: QwenVisionConfig, full: bool):
        super().__init__()
        self.num_heads, self.full = config.num_heads, full
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.to_out = nn.Linear(config.dim, config.dim)
        self.attend: Attend = attend

    def forward(self, x: Tensor, angles: Tensor, real: Tensor) -> Tensor:
        W, layout = len(x), "1 N (W S) D" if self.full else "W N S D"
        q, k, v = rearrange(self.to_qkv(x), f"W S (A N D) -> A {layout}", A=3, N=self.num_heads)
        angles = rearrange(angles, f"W S (N D) -> {layout}", N=1)
        q, k = (apply_rope_half_split(y.float(), angles).type_as(y) for y in (q, k))
        mask = rearrange(real, f"W S (N D) -> {layout}", N=1).mT  # (windows or 1, 1, 1, 64 or all)
        return self.to_out(rearrange(self.attend(q, k, v, mask), f"{layout} -> W S (N D)", W=W))


class Merger(nn.Module):
    """2 × 2 neighbours side by side → Linear → GELU → Linear: x (h, w, dim) → (h/2 · w/2, out_dim)."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.linear_in = nn.Linear(config.dim * MERGED**2, config.dim * MERGED**2)
        self.linear_out = nn.Linear(config.dim * MERGED**2, config.out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.norm(x), "(h a) (w b) C -> (h w) (a b C)", a=MERGED, b=MERGED)
        return self.linear_out(F.gelu(self.linear_in(x)))


def to_windows(x: Tensor) -> Tensor:
    """Patches (h, w, C) → (windows, 64, C), row by row in and among windows; zeros fill up those at the edges."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % WINDOW, 0, -x.shape[0] % WINDOW))
    return rearrange(x, "(h a) (w b) C -> (h w) (a b) C", a=WINDOW, b=WINDOW)


def from_windows(x: Tensor, h: int, w: int) -> Tensor:
    """Undo `to_windows`: (windows, 64, C) → (h, w, C)."""
    columns = math.ceil(w / WINDOW)
    return rearrange(x, "(h w) (a b) C -> (h a) (w b) C", w=columns, a=WINDOW, b=WINDOW)[:h, :w]


def prepare_image(image: Tensor, config: QwenVisionConfig) -> Tensor:
    """What the tower takes of an image: uint8 (H, W, 3) → (3, H', W') float32, sides multiples of 28, normalised.

    Raises ValueError for an image more than 200 times as long as wide.
    """
    size = choose_size(image.shape[0], image.shape[1], config)
    pixels = resize(image, *size).permute(2, 0, 1) / 255  # (3, H', W')
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (H, W, 3) → uint8 (height, width, 3), bicubic and antialiased, by Pillow as in transformers' processor."""
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def choose_size(height: int, width: int, config: QwenVisionConfig) -> tuple[int, int]:
    """The sides in pixels at which an image is seen: the nearest multiples of 28, or those of an area within limits.

    Raises ValueError for an image more than 200 times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height}x{width}: it may be at most 200 times as long as wide; crop it")
    sides, area = (height, width), height * width
    near = tuple(round(side / TOKEN) * TOKEN for side in sides)
    if math.prod(near) > config.max_pixels:
        factor = math.sqrt(area / config.max_pixels)
        near = tuple(max(1, math.floor(side / factor / TOKEN)) * TOKEN for side in sides)
    elif math.prod(near) < config.min_pixels:
        factor = math.sqrt(config.min_pixels / area)
        near = tuple(math.ceil(side * factor / TOKEN) * TOKEN for side in sides)
    return near[0], near[1]


def build_positions(ids: list[int], image_token: int, grids: list[tuple[int, int]]) -> Tensor:
    """Positions of a text with images on the axes T, H, W: (3, S).

    grids: rows and columns of each image's tokens, of which ids has rows · columns in a row. A word stands at the same
    place on all axes. An image stands at one place in T, and spreads its rows along H, its columns along W from there;
    what follows stands behind its longer side.
    """
    pieces, place, done = [], 0, 0
    count = partial(torch.arange, device="cpu")
    for rows, columns in grids:
        words = ids.index(image_token, done) - done
        pieces.append(count(place, place + words).expand(3, -1))  # (3, words)
        place, done = place + words, done + words + rows * columns
        cells = torch.cartesian_prod(count(1), count(rows), count(columns))
        pieces.append(place + cells.T)  # (3, rows · columns)
        place += max(rows, columns)
    pieces.append(count(place, place + len(ids) - done).expand(3, -1))
    return torch.cat(pieces, dim=1)
