"""What fits: memory that is free, memory that a call needs, and the refusal before hours of work, not after them."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kandinsky5.config import DiTConfig, PipelineConfig, Tiling, VAEConfig
from kandinsky5.nabla import TILE
from kandinsky5.runtime import fast_vae
from kandinsky5.runtime.offload import find_place
from kandinsky5.runtime.pieces import PIECE, in_pieces

KEPT_BY_HEAP = 300_000_000  # bytes that glibc may retain of what decoding has freed: measured, see `vae_memory`
MAP = 5  # bytes per pair of NABLA's tiles and head: its map, and the indices of flex_attention's BlockMask
LATENTS = 8  # times the initial noise, at least, that sampling holds: noise, condition, both velocities, float32
# Latent positions of a batch below which both passes of guidance go as one (rows guidance-… of benchmarks/compare.py):
# 4 % faster at 2,688 and at 4,096, 1 % here, then as fast (bf16, two threads, small model and Lite's width).
ONE_PASS = 6144


class StepPlan(NamedTuple):
    """How steps run in the memory that is free."""

    needed: int  # bytes, about
    piece: int | None  # tokens that a block computes at a time, None for all
    together: bool  # whether both passes of guidance are one batch

    def __str__(self) -> str:
        return f"takes {self.needed / 1e9:.1f} GB" + " in pieces" * (self.piece is not None)

    @contextlib.contextmanager
    def applied(self, dit: nn.Module) -> Iterator[None]:
        """Inside, the DiT runs like this, and errors say that they came while sampling."""
        with in_pieces(dit, self.piece), during("sampling"):
            yield


def plan_steps(config: DiTConfig, dit: nn.Module, shape: tuple[int, ...], guided: bool) -> StepPlan:
    """How the steps of latents of that shape, (B, T, h, w, 16), run, and what they need on the DiT's device.

    Short passes of guidance go together, which saves the time of starting each operation but masks the padding of the
    shorter prompts. Blocks compute all tokens at once where a tenth of the free memory is left, else in pieces
    (`pieces.py`). Raises ValueError where not even pieces fit.
    """
    device, dtype = find_place(dit)
    together = guided and math.prod(shape[:4]) < ONE_PASS
    size = (shape[0] * (1 + together), *shape[1:4])
    whole, in_parts = (dit_memory(config, size, dtype, piece) for piece in (None, PIECE))
    weights = bytes_to_come(dit) if device.type == "cuda" else 0  # on a CPU they are pages of files
    rest = weights + 4 * LATENTS * math.prod(shape)
    free = free_memory(device)
    if free is None or whole + rest <= 0.9 * free:
        return StepPlan(whole + rest, None, together)
    if in_parts + rest <= free:
        return StepPlan(in_parts + rest, PIECE, together)
    stay = "" if weights or device.type != "cuda" else "keep the other models off the GPU meanwhile (--offload model), "
    blocks = "stream the DiT's blocks (--offload blocks), " if weights > in_parts else ""
    raise ValueError(
        f"a step with latents {tuple(shape)} takes about {_gigabytes(in_parts + rest)} GB of memory and "
        f"{_gigabytes(free)} GB are free: {stay}{blocks}ask for fewer videos at once, or less --height, --width or "
        "--num-frames"
    )


def bytes_to_come(model: nn.Module) -> int:
    """What the weights of a resting model will take of its device: of streamed blocks two at a time."""
    streamed = [m for m in model.modules() if m is not model and "resting" in vars(m)]
    blocks = sorted(sum(x.nbytes for x in block.state_dict().values() if x.is_meta) for block in streamed)
    return sum(x.nbytes for x in model.state_dict().values() if x.is_meta) - sum(blocks[:-2])


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Inside, errors bear a note of what was being done, such as "sampling": who runs out of memory should know."""
    try:
        yield
    except Exception as error:
        error.add_note(phase)
        raise


def release(device: torch.device) -> None:
    """Give back what PyTorch holds of a GPU's memory and does not use: pieces cut for tokens do not fit frames."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_decoding(
    config: PipelineConfig,
    shape: tuple[int, ...],
    weights: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    output_type: str,
    offloaded: bool,
) -> int:
    """Bytes needed on the device to decode latents (B, T, h, w, 16). Raises ValueError where they are not free there.

    weights: the VAE's; those that rest (`offload.py`) are still to come. offloaded: whether the other models rest too.
    Finished videos lie in the CPU's memory, which must hold them.
    """
    batch, T, h, w, _ = shape
    vae, tiling, on_gpu = config.vae, config.tiling, device.type == "cuda"
    frames, height, width = vae.time_factor * (T - 1) + 1, vae.space_factor * h, vae.space_factor * w
    video = 2 * frames * height * width * vae.image_channels  # twice while pieces become one tensor
    finished = batch * video * (1 if output_type == "uint8" else 4)
    resting = sum(weight.nbytes for weight in weights if weight.is_meta)
    more = (resting if on_gpu else finished + KEPT_BY_HEAP) - video  # `vae_memory` includes one video in bytes
    in_tiles = replace(tiling, space=True)
    needed, tiled = (vae_memory(vae, (T, h, w), dtype, kind) + more for kind in (tiling, in_tiles))

    clip, fewer = f"{frames} frames of {height}x{width}", ""
    if batch > 1:
        clip, fewer = f"{batch} × {clip}", "ask for fewer videos at once, or "
    less = f"{fewer}ask for less --height, --width or --num-frames"
    free = free_memory(device)
    if free is not None and needed > free:
        tiles = f"decode in tiles (--tile-space: {_gigabytes(tiled)} GB), or " if tiled < min(needed, free) else ""
        alone = "" if offloaded or not on_gpu else "keep the other models off the GPU meanwhile (--offload model), or "
        raise ValueError(
            f"decoding {clip} takes about {_gigabytes(needed)} GB of memory and {_gigabytes(free)} GB are free: "
            f"{alone}{tiles}{less}"
        )
    left = free_memory(torch.device("cpu"))
    if on_gpu and left is not None and finished > left:
        raise ValueError(
            f"{clip}, when they are decoded, take {_gigabytes(finished)} GB of the CPU's memory and "
            f"{_gigabytes(left)} GB are free: {less}"
        )
    return needed


def dit_memory(config: DiTConfig, size: tuple[int, ...], dtype: torch.dtype, piece: int | None = None) -> int:
    """About how many bytes a DiT forward needs for latents of size (B, T, h, w), on top of its weights.

    The largest of what lives at once in a visual block, uncompiled and without gradients: in its feed-forward the two
    hidden layers, in its gated sums four float32 copies of the tokens, in its attention queries, keys, values and
    NABLA's map. The tokens before the first block and before this one come on top, and the rotations. From sizes
    alone; a forward on the meta device holds the same within 5 %. piece: tokens that a block computes at a time
    (`pieces.py`), None for all.
    """
    wide, hidden = dtype.itemsize * config.dim, dtype.itemsize * config.ff_dim  # bytes per token
    length = math.prod(size[1:]) // math.prod(config.patch_size)
    tokens, pairs = size[0] * length, size[0] * config.num_heads * (length // TILE) ** 2 if config.nabla else 0
    sums, feed_forward = 3 * wide + 16 * config.dim, 2 * wide + 2 * hidden
    if piece is None or piece >= length:
        inside = max(tokens * sums, tokens * feed_forward, tokens * 5 * wide + MAP * pairs)
    else:
        some = size[0] * piece
        inside = tokens * 2 * wide + max(
            tokens * wide + some * sums, some * feed_forward, tokens * 2 * wide + MAP * pairs
        )
    return tokens * 2 * wide + length * 4 * config.head_dim + inside


def vae_memory(config: VAEConfig, size: tuple[int, int, int], dtype: torch.dtype, tiling: Tiling) -> int:
    """About how many bytes decoding needs for one video's latents of size (T, h, w), on top of the VAE's weights.

    Most are needed in the first block of the last stage, which sees the finished video's grid: its input and what its
    first convolution makes of it. Add the copies of a few frames that a convolution works on, and the frames
    themselves: in three channels what a window's tiles are put together of, and the whole video in bytes, twice
    while its windows are. From sizes alone: on a CPU the measured peaks are 0.65 to 0.96 of it, and up to 0.3 GB
    more where glibc keeps what was freed.
    """
    time, space = config.time_factor, config.space_factor
    T, h, w = size
    frames = time * (T - 1) + 1
    window = min(frames, tiling.frames + 1) if tiling.time else frames
    height, width = (min(side, tiling.pixels) if tiling.space else side for side in (space * h, space * w))
    before, last = (config.channels[min(i, len(config.channels) - 1)] for i in (1, 0))
    inside = window * height * width * (before + last)
    pixels = frames * (space * h) * (space * w) * config.image_channels
    if config.dimensions == 2:  # all at once: the block's input, normalised, activated, as the kernel wants it; floats
        whole = height * width * (4 * before + 2 * last) + (2 * pixels if tiling.space else 0)
        return dtype.itemsize * whole + 16 * pixels

    def copies(channels: int) -> int:
        frame = height * width * channels
        at_a_time = min(window, max(2, fast_vae.PIECE // frame // 2 * 2))
        # Normalised frames, and twice with two of the past; the rest is what the kernels work on. Or, in half
        # precision, normalised frames and two copies of them in float32.
        return frame * max(3 * at_a_time + 13, 5 * at_a_time if dtype.itemsize == 2 else 0)

    put_together = 2 * window * (space * h) * (space * w) * config.image_channels if tiling.space else 0
    video = 2 * frames * (space * h) * (space * w) * config.image_channels
    return dtype.itemsize * (inside + max(copies(before), copies(last)) + put_together) + video


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, without swapping; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, unused
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *left_in_container()], default=None)


def left_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes until a container's limit is reached, if there is one: of control groups, version 2 or 1.

    Pages of files, such as mapped weights, count as used there, but are dropped when memory is needed.
    """
    left = []
    for limit, used, stat, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            most, now = (int((cgroup / name).read_text()) for name in (limit, used))
            counts = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            left.append(most - now + sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
    return left


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size < 1e15 else "millions of"
