"""What fits: the memory that a call needs, and the refusal before hours of work, not after them."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kandinsky5.config import DiTConfig, PipelineConfig, Tiling, VAEConfig
from kandinsky5.nabla import TILE
from kandinsky5.qwen_vision import PATCH, TOKEN, choose_size
from kandinsky5.runtime import fast_vae
from kandinsky5.runtime.device import is_native
from kandinsky5.runtime.free import free_memory
from kandinsky5.runtime.offload import find_place
from kandinsky5.runtime.pieces import PIECE

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

KEPT_BY_HEAP = 300_000_000  # bytes that glibc may retain of what decoding has freed: measured, see `vae_memory`
MAP = 5  # bytes per pair of NABLA's tiles and head: its map, and the indices of flex_attention's BlockMask
AROUND = 16  # tokens of a template behind the prompt, at most; those before it are read once, alone
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


def plan_steps(
    config: DiTConfig, dit: nn.Module, shape: tuple[int, ...], guided: bool, ranks: "Ranks | None" = None
) -> StepPlan:
    """How the steps of latents of that shape, (B, T, h, w, 16), run, and what they need on the DiT's device.

    Short passes of guidance go together, which saves the time of starting each operation but masks the padding of the
    shorter prompts. Blocks compute all tokens at once where a tenth of the free memory is left, else in pieces
    (`pieces.py`). Raises ValueError where not even pieces fit.
    """
    device, dtype = find_place(dit)
    together = guided and math.prod(shape[:4]) < ONE_PASS
    size = (shape[0] * (1 + together), *shape[1:4])
    sequence = ranks.sequence if ranks else 1
    whole, in_parts = (dit_memory(config, size, dtype, piece, sequence) for piece in (None, PIECE))
    weights = bytes_to_come(dit) if device.type == "cuda" else 0  # on a CPU they are pages of files
    rest = weights + 4 * LATENTS * math.prod(shape)
    free = free_memory(device)
    if ranks and ranks.shard and free is not None:
        from kandinsky5.runtime.shard import agree_on_least

        free = agree_on_least(free, ranks.team)
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


def check_encoding(
    config: PipelineConfig, models: Sequence[nn.Module], texts: Sequence[str], most: int, images: Sequence[Tensor] = ()
) -> None:
    """Raises ValueError where the models that encode texts, first of them Qwen, have too little memory on their device.

    most: tokens that are read of a text; images: one (H, W, 3) for each text, or none.
    """
    device, dtype = find_place(models[0])
    longest = min(most, max(len(text.encode()) for text in texts) + AROUND)
    vision = config.qwen_vision
    seen = [choose_size(image.shape[0], image.shape[1], vision) for image in images if vision]
    needed = text_memory(config, len(texts), longest, seen, dtype)
    needed += sum(map(bytes_to_come, models)) if device.type == "cuda" else 0
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"encoding {len(texts)} texts takes about {_gigabytes(needed)} GB of memory and {_gigabytes(free)} GB are "
            f"free: ask for fewer videos at once{', give a smaller image' * bool(images)}, or try --quantize int8 or "
            "--offload blocks"
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
    except BaseException as error:
        error.add_note(phase)
        raise


def release(device: torch.device) -> None:
    """Give back what PyTorch holds of a GPU's memory and does not use: pieces cut for tokens do not fit frames."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_decoding(
    config: PipelineConfig, shape: tuple[int, ...], weights: Iterable[Tensor], device: torch.device,
    dtype: torch.dtype, output_type: str, offloaded: bool,
) -> int:  # fmt: skip
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
    unfolds = device.type == "cpu" and dtype.itemsize == 2 and not is_native(dtype, device)
    needed, tiled = (vae_memory(vae, (T, h, w), dtype, kind, unfolds) + more for kind in (tiling, in_tiles))

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


def dit_memory(
    config: DiTConfig, size: tuple[int, ...], dtype: torch.dtype, piece: int | None = None, sequence: int = 1
) -> int:
    """About how many bytes a DiT forward needs for latents of size (B, T, h, w), on top of its weights.

    The largest of what lives at once in a visual block, uncompiled and without gradients: in its feed-forward the two
    hidden layers, in its gated sums four float32 copies of the tokens, in its attention queries, keys, values and
    NABLA's map. The tokens before the first block and before this one come on top, and the rotations. From sizes
    alone; a forward on the meta device holds the same within 5 %. piece: tokens that a block computes at a time
    (`pieces.py`), None for all; sequence: ranks that share the tokens of a block, and heads (`parallel.py`).
    """
    wide, hidden = dtype.itemsize * config.dim, dtype.itemsize * config.ff_dim  # bytes per token
    length = math.prod(size[1:]) // math.prod(config.patch_size)
    all_tokens, tokens = size[0] * length, size[0] * -(-length // sequence)
    pairs = size[0] * config.num_heads // sequence * (length // TILE) ** 2 if config.nabla else 0
    exchanged = 5 if sequence == 1 else 8  # queries, keys, values and results: of own tokens, and of own heads
    sums, feed_forward = 3 * wide + 16 * config.dim, 2 * wide + 2 * hidden
    if piece is None or piece * sequence >= length:
        inside = max(tokens * sums, tokens * feed_forward, tokens * exchanged * wide + MAP * pairs)
    else:
        some = size[0] * piece
        inside = tokens * 2 * wide + max(
            tokens * wide + some * sums, some * feed_forward, tokens * (exchanged - 3) * wide + MAP * pairs
        )
    return all_tokens * wide + tokens * wide + length * 4 * config.head_dim + inside


def text_memory(
    config: PipelineConfig, count: int, longest: int, images: Sequence[tuple[int, int]], dtype: torch.dtype
) -> int:
    """About how many bytes encoding `count` texts of so many tokens takes, on top of the weights.

    images: sides in pixels of the image that the vision tower sees with each text, if any. The texts are one batch,
    padded to the longest. The most is in Qwen's feed-forward, next to the keys and values of all blocks; or in the
    tower, image by image.
    """
    qwen, vision = config.qwen, config.qwen_vision
    cached = 2 * qwen.num_layers * qwen.num_kv_heads * qwen.head_dim
    tokens = count * (longest + max((h * w // TOKEN**2 for h, w in images), default=0))
    reading = dtype.itemsize * tokens * (3 * qwen.ff_dim + 4 * qwen.dim + cached)
    if not images or vision is None:
        return reading
    attention = 6 * dtype.itemsize * vision.dim + 13 * vision.dim  # bytes per patch, with queries and keys in float32
    feed_forward = 3 * dtype.itemsize * (vision.ff_dim + vision.dim)
    held = dtype.itemsize * (vision.dim + 6 * PATCH**2)  # meanwhile the patch's token and its pixels, twice
    seeing = max(h * w for h, w in images) // PATCH**2 * (held + max(attention, feed_forward))
    return max(reading, seeing)


def vae_memory(
    config: VAEConfig, size: tuple[int, int, int], dtype: torch.dtype, tiling: Tiling, unfolds: bool = False
) -> int:
    """About how many bytes decoding needs for one video's latents of size (T, h, w), on top of the VAE's weights.

    Most are needed in the first block of the last stage, which sees the finished video's grid: its input and what its
    first convolution makes of it. Add the copies of a few frames that a convolution works on, and the frames
    themselves: in three channels what a window's tiles are put together of, and the whole video in bytes, twice
    while its windows are. From sizes alone: on a CPU the measured peaks are 0.65 to 0.96 of it, and up to 0.3 GB
    more where glibc keeps what was freed. unfolds: whether PyTorch has no kernel for convolutions in this precision,
    and makes of each pixel its 3×3×3 neighbours first.
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
        whole = height * width * ((15 if unfolds else 4) * before + 2 * last) + (2 * pixels if tiling.space else 0)
        return dtype.itemsize * whole + 16 * pixels

    def copies(channels: int) -> int:
        frame = height * width * channels
        at_a_time = min(window, max(2, fast_vae.PIECE // frame // 2 * 2))
        # Normalised frames, and twice with two of the past; the rest is what the kernels work on. Or, in half
        # precision, normalised frames and two copies of them in float32.
        kernels = max(3 * at_a_time + 13, 5 * at_a_time if dtype.itemsize == 2 else 0)
        return frame * (kernels + (max(27 * at_a_time, 3 * window) if unfolds else 0))

    put_together = 2 * window * (space * h) * (space * w) * config.image_channels if tiling.space else 0
    video = 2 * frames * (space * h) * (space * w) * config.image_channels
    return dtype.itemsize * (inside + max(copies(before), copies(last)) + put_together) + video


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size < 1e15 else "millions of"
