"""How training changes a model for the time of a run: precision, attention and memory. Each is undone at its end."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kandinsky5 import dit, nabla
from kandinsky5.attention import block_sparse_attention, dense_attention
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.runtime.device import choose_dtype


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """Autocast in this precision, "auto" as in `choose_dtype`; in float32 it changes nothing."""
    chosen = choose_dtype(dtype, device)
    return torch.autocast(device.type, chosen, enabled=chosen != torch.float32)


@contextlib.contextmanager
def autocast_dit(model: DiT) -> Iterator[None]:
    """Inside, a DiT trains under autocast with the precision that it has in half precision, and fast on a CPU.

    The layers that stay in float32 do so, and so does NABLA's choice of tiles. Attention is the definition, written
    out, with NABLA over the kept tiles: the gradient of PyTorch's fused kernel in bf16 on a CPU takes five times as
    long (80 tokens, 6 heads of 32).
    """
    device = next(model.parameters()).device.type
    layers = [module for module in model.modules() if isinstance(module, Float32Linear)]
    for layer in layers:
        vars(layer)["forward"] = torch.autocast(device, enabled=False)(layer.forward)
    build_map, nabla.block_map = nabla.block_map, torch.autocast(device, enabled=False)(nabla.block_map)
    fused, dit.attention = dit.attention, _written_out if device == "cpu" else dit.attention
    try:
        yield
    finally:
        dit.attention, nabla.block_map = fused, build_map
        for layer in layers:
            del layer.forward


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, block_map: Tensor | None = None):
    return dense_attention(q, k, v, mask) if block_map is None else block_sparse_attention(q, k, v, block_map)


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, visual blocks forget their activations and compute them again for the gradient: a third more work.

    The gradient comes after `autocast_dit` has ended, so what is computed again enters it again.
    """
    assert isinstance(model, DiT)

    def contexts():  # of the forward, and of the one that is computed again
        inside = any("forward" in vars(m) for m in model.modules() if isinstance(m, Float32Linear))
        return contextlib.nullcontext(), autocast_dit(model) if inside else contextlib.nullcontext()

    for block in model.visual_blocks:
        vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in model.visual_blocks:
            del block.forward


@contextlib.contextmanager
def swapped(model: nn.Module, classes: dict[type, type]) -> Iterator[None]:
    """Inside, each module of a class on the left has the class on the right, a subclass with the same parameters."""
    modules = [module for module in model.modules() if type(module) in classes]
    for module in modules:
        module.__class__ = classes[type(module)]
    back = {new: old for old, new in classes.items()}
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = back[type(module)]
