"""What fits where: the memory of a device that a checkpoint needs, from its sizes alone; no weights are read.

Sampling has three moments, each with models and what they compute: encoding the prompt, a DiT forward, decoding. The
estimates of what is computed are those that check before the first step (`memory.py`). All of it is computed, not
measured on a GPU.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from kandinsky5.checkpoint import without_weights
from kandinsky5.config import PipelineConfig
from kandinsky5.runtime.loading import build_models
from kandinsky5.runtime.memory import dit_memory, vae_memory
from kandinsky5.runtime.quantize import Int8Linear, to_int8

CONTEXT = 1_000_000_000  # bytes of a card that CUDA and the allocator's gaps need: an assumption
PROMPT = 400  # tokens that Qwen reads of a template and a long prompt


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
    """Encoding, a DiT forward and decoding of one video of the config's own size."""
    sizes = weigh(config, choice.quantize, choice.dtype)
    here = {name: size.streamed if choice.offload == "blocks" else size.whole for name, size in sizes.items()}
    sampling, vae, qwen = config.sampling, config.vae, config.qwen
    frames = (sampling.num_frames - 1) // vae.time_factor + 1
    grid = (frames, sampling.height // vae.space_factor, sampling.width // vae.space_factor)
    tiling = replace(config.tiling, space=choice.tile_space)
    words = choice.dtype.itemsize * PROMPT * (3 * qwen.ff_dim + 6 * qwen.dim)  # of both passes of guidance, in turn
    found = [
        Moment("encoding", sum(here.values()) - here["dit"] - here["vae"], words + sizes["qwen"].widened),
        Moment("sampling", here["dit"], dit_memory(config.dit, (1, *grid), choice.dtype) + sizes["dit"].widened),
        Moment("decoding", here["vae"], vae_memory(vae, grid, choice.dtype, tiling)),
    ]
    if choice.offload:
        return found
    return [moment._replace(weights=sum(here.values())) for moment in found]


def peak(config: PipelineConfig, choice: Choice) -> int:
    """Bytes of the largest moment."""
    return max(moment.total for moment in moments(config, choice))


class Size(NamedTuple):
    """Bytes of a model's weights."""

    whole: int
    streamed: int  # with two blocks of each kind at a time
    widened: int  # the largest weight in int8, as it is while its layer runs


@functools.cache
def weigh(config: PipelineConfig, quantize: str | None, dtype: torch.dtype) -> dict[str, Size]:
    """The size of each model. Float32 layers count in half precision where files have them so."""
    with without_weights():
        models = build_models(config)
    sizes = {}
    for name, model in models.items():
        if quantize:
            to_int8(model)
        whole = _bytes(model, dtype)
        resting = [
            _bytes(blocks, dtype) - 2 * max(_bytes(block, dtype) for block in blocks)
            for blocks in model.children()
            if isinstance(blocks, nn.ModuleList) and hasattr(model, "run_blocks")
        ]
        streamed = whole - sum(max(rest, 0) for rest in resting)
        widest = max((m.weight.numel() for m in model.modules() if isinstance(m, Int8Linear)), default=0)
        sizes[name] = Size(whole, streamed, dtype.itemsize * widest)
    return sizes


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
