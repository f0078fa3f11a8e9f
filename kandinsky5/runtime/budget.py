"""What fits where: the memory of a device that a checkpoint needs, from its sizes alone; no weights are read.

Sampling has three moments, each with models and what they compute: encoding the prompt, a DiT forward, decoding. The
estimates of what is computed are those that check before the first step (`memory.py`). All of it is computed, not
measured on a GPU.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from kandinsky5.checkpoint import models_of, without_weights
from kandinsky5.config import PipelineConfig
from kandinsky5.runtime.loading import CLASSES
from kandinsky5.runtime.memory import AROUND, LATENTS, dit_memory, text_memory, vae_memory
from kandinsky5.runtime.pieces import PIECE
from kandinsky5.runtime.quantize import Int8Linear, to_int8

CONTEXT = 1_000_000_000  # bytes of a card that CUDA and the allocator's gaps need: an assumption


@dataclass(frozen=True)
class Choice:
    """How a checkpoint is run: options of `Pipeline.load`."""

    offload: str | None = None
    quantize: str | None = None
    tile_space: bool = False
    dtype: torch.dtype = torch.bfloat16

    def flags(self) -> str:
        """The same as options of the command line."""
        values = {"--quantize": self.quantize, "--offload": self.offload}
        given = [f"{flag} {value}" for flag, value in values.items() if value]
        return " ".join(given + ["--tile-space"] * self.tile_space)


class Moment(NamedTuple):
    """Bytes on the device while one of the models runs."""

    name: str
    weights: int
    computed: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.computed


def moments(config: PipelineConfig, choice: Choice) -> list[Moment]:
    """Encoding, a step and decoding of one video of the config's own size.

    The step is in pieces, as it is where memory is short (`all_at_once`). With editing Qwen sees an image of the
    result's size.
    """
    sizes = weigh(config, choice.quantize, choice.dtype)
    here = {name: size.streamed if choice.offload == "blocks" else size.whole for name, size in sizes.items()}
    seen = [(config.sampling.height // 2, config.sampling.width // 2)] if config.edits else []
    texts = 1 if config.sampling.guidance_scale == 1 else 2
    words = text_memory(config, texts, config.text.max_tokens + AROUND, seen, choice.dtype)
    tiling = replace(config.tiling, space=choice.tile_space)
    found = [
        Moment("encoding", sum(here.values()) - here["dit"] - here["vae"], words + sizes["qwen"].widened),
        Moment("sampling", here["dit"], all_at_once(config, choice, PIECE)),
        Moment("decoding", here["vae"], vae_memory(config.vae, latent_grid(config), choice.dtype, tiling)),
    ]
    if choice.offload:
        return found
    return [moment._replace(weights=sum(here.values())) for moment in found]


def all_at_once(config: PipelineConfig, choice: Choice, piece: int | None = None) -> int:
    """Bytes that a step computes with all tokens at once, as where memory is plenty, or in pieces."""
    widened = weigh(config, choice.quantize, choice.dtype)["dit"].widened
    size, channels = (1, *latent_grid(config)), config.vae.latent_channels
    latents = 4 * LATENTS * math.prod(size) * channels
    return dit_memory(config.dit, size, choice.dtype, piece) + latents + widened


def latent_grid(config: PipelineConfig) -> tuple[int, int, int]:
    """Latents (T, h, w) of a video of the config's own size."""
    video = config.sampling
    return config.vae.latent_grid(video.num_frames, video.height, video.width)


def peak(config: PipelineConfig, choice: Choice) -> int:
    """Bytes of the largest moment."""
    return max(moment.total for moment in moments(config, choice))


class Size(NamedTuple):
    """Bytes of a model's weights."""

    whole: int
    streamed: int  # with two blocks of each kind at a time
    widened: int  # the largest weight in int8, as it is while its layer runs


def weigh(config: PipelineConfig, quantize: str | None, dtype: torch.dtype) -> dict[str, Size]:
    """The size of each model. Float32 layers count in half precision where files have them so."""
    return {name: weigh_model(name, getattr(config, name), quantize, dtype) for name in models_of(config)}


@functools.cache
def weigh_model(name: str, sizes: Any, quantize: str | None, dtype: torch.dtype) -> Size:
    """The size of one model; sizes: its config."""
    with without_weights():
        model = CLASSES[name](sizes)
    if quantize:
        to_int8(model)
    whole = _bytes(model, dtype)
    resting = [
        _bytes(blocks, dtype) - 2 * max(_bytes(block, dtype) for block in blocks)
        for blocks in model.children()
        if isinstance(blocks, nn.ModuleList) and hasattr(model, "run_blocks")
    ]
    widest = max((m.weight.numel() for m in model.modules() if isinstance(m, Int8Linear)), default=0)
    return Size(whole, whole - sum(max(rest, 0) for rest in resting), dtype.itemsize * widest)


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    scales = {f"{name}.scale" for name, inside in module.named_modules() if isinstance(inside, Int8Linear)}
    return sum(
        x.numel() * (1 if x.dtype == torch.int8 else 2 if name in scales else dtype.itemsize)
        for name, x in module.state_dict().items()
    )


def choices(dtype: torch.dtype = torch.bfloat16, quantize: str | None = None) -> list[Choice]:
    """What one can choose, from the fastest to the smallest, with this `quantize`."""
    modes = ((None, False), ("model", False), ("model", True), ("blocks", False), ("blocks", True))
    return [Choice(offload, quantize, tiles, dtype) for offload, tiles in modes]


def first_that_fits(config: PipelineConfig, card: int, some: list[Choice]) -> Choice | None:
    """The first of these choices that a card of so many bytes holds; None if none does."""
    return next((choice for choice in some if peak(config, choice) + CONTEXT <= card), None)
