"""How training changes a model for the time of a run: precision, attention and memory. Each is undone at its end."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kandinsky5.attention import block_sparse_attention, dense_attention
from kandinsky5.config import NablaConfig
from kandinsky5.dit import Attention, DiT, Float32Linear
from kandinsky5.nabla import block_map
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.runtime.fast import FastFloat32Linear


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
    before = {module: module.attend for module in model.modules() if isinstance(module, Attention)}
    for module in before:
        module.attend = attend_written_out if next(model.parameters()).device.type == "cpu" else module.attend
    try:
        with swapped(model, {Float32Linear: Island, FastFloat32Linear: Island}):
            yield
    finally:
        for module, attend in before.items():
            module.attend = attend


class Island(Float32Linear):
    """A Float32Linear that autocast does not reach: (…, in) → (…, out) float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def attend_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    nabla: NablaConfig | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """`attention.attend`, all shapes as there; NABLA's map is computed outside autocast, which would move its cut."""
    if nabla is None or grid is None:
        return dense_attention(q, k, v, mask)
    with torch.autocast(q.device.type, enabled=False):
        tiles = block_map(q, k, grid, nabla)
    return block_sparse_attention(q, k, v, tiles)


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, visual blocks forget their activations and compute them again for the gradient: a third more work.

    The gradient comes after `autocast_dit` has ended, so what is computed again enters it again.
    """
    assert isinstance(model, DiT)

    run_blocks = model.run_blocks

    def contexts():  # of the forward, and of the one that is computed again
        inside = any(isinstance(module, Island) for module in model.modules())
        return contextlib.nullcontext(), autocast_dit(model) if inside else contextlib.nullcontext()

    def run_and_forget(blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        if blocks is not model.visual_blocks:
            return run_blocks(blocks, x, *arguments)
        for block in blocks:
            x = checkpoint(block, x, *arguments, use_reentrant=False, context_fn=contexts)
        return x

    model.run_blocks = run_and_forget  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.run_blocks


@contextlib.contextmanager
def swapped(model: nn.Module, classes: dict[type, type]) -> Iterator[None]:
    """Inside, each module of a class on the left has the class on the right, which holds the same parameters."""
    before = {module: type(module) for module in model.modules() if type(module) in classes}
    for module, kind in before.items():
        module.__class__ = classes[kind]
    try:
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
