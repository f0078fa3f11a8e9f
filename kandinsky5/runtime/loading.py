"""The models of a checkpoint: built without weights, then filled at once, from resting files, or in int8."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kandinsky5 import checkpoint
from kandinsky5.clip import CLIPText
from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.qwen import Qwen, QwenHead
from kandinsky5.qwen_vision import QwenVision
from kandinsky5.runtime.memory import during
from kandinsky5.runtime.offload import rest
from kandinsky5.runtime.quantize import prepare
from kandinsky5.vae2d import build_vae

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

CLASSES: dict[str, Callable[..., nn.Module]] = {
    "dit": DiT,
    "vae": build_vae,
    "qwen": Qwen,
    "clip": CLIPText,
    "qwen_vision": QwenVision,
    "qwen_head": QwenHead,
}

SHARED = ("dit", "qwen")  # the large ones


def build_models(config: PipelineConfig) -> dict[str, Any]:
    """A checkpoint's models by name, in the order of `checkpoint.models_of`."""
    return {name: CLASSES[name](getattr(config, name)) for name in checkpoint.models_of(config)}


@during("loading the weights")
def load_models(
    folder: Path, config: PipelineConfig, device: torch.device, dtype: torch.dtype, offload: str | None = None,
    quantize: str | None = None, ranks: "Ranks | None" = None,
) -> dict[str, Any]:  # fmt: skip
    """The same with the weights in `folder` or its base, those of DiT and Qwen spread if `ranks` are to share them.

    Raises ValueError if config.json does not fit them.
    """
    with checkpoint.without_weights():
        models = build_models(config)
    for name, model in models.items():
        weights = prepare(model, checkpoint.find_weights(folder, name, config.base), quantize)
        if ranks and ranks.shard and name in SHARED:
            from kandinsky5.runtime.shard import load_shards

            load_shards(model, weights, device, dtype, ranks.team)
        elif offload:
            rest(model, checkpoint.map_weights(model, weights, dtype), device, offload)
        else:
            checkpoint.load_weights(model, weights, device, dtype)
    return models
