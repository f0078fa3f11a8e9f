"""How training changes a model for the time of a run: precision, attention, memory. Each change is undone at its end.

replaced                other attributes of a module for a while
training_precision      float32 layers stay in float32 under autocast; attention is written out
gradient_checkpointing  activations of the blocks are computed twice instead of kept
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kandinsky5.attention import dense_attention
from kandinsky5.config import NablaConfig
from kandinsky5.dit import Attention, DiT, Float32Linear
from kandinsky5.nabla import block_map
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.runtime.kernels import block_sparse_attention
from kandinsky5.runtime.offload import find_place


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """Autocast in this precision, "auto" as in `choose_dtype`; in float32 it changes nothing."""
    chosen = choose_dtype(dtype, device)
    return torch.autocast(device.type, chosen, enabled=chosen != torch.float32)


@contextlib.contextmanager
def replaced(module: nn.Module, **attributes: object) -> Iterator[None]:
    """Inside, these attributes of this one module have other values."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(before)


@contextlib.contextmanager
def training_precision(model: nn.Module) -> Iterator[None]:
    """Inside, a DiT trains under autocast in the precision that it has in half precision, and fast on a CPU.

    Its float32 layers stay in float32, and so does NABLA's choice of tiles. On a CPU attention is the definition,
    written out, with NABLA over the kept tiles: the gradient of PyTorch's fused kernel in bf16 takes five times as long
    there (80 tokens, 6 heads of 32). On CUDA cuDNN's attention is not used, whose gradient with a mask is NaN for some
    lengths (pytorch#196678). The backward pass belongs inside too where activations are computed again.
    """
    with contextlib.ExitStack() as changes:
        changes.enter_context(without_cudnn_attention())
        for module in model.modules():
            if isinstance(module, Float32Linear):
                plain = partial(Float32Linear.forward, module)
                forward = torch.autocast(find_place(model)[0].type, enabled=False)(plain)
                changes.enter_context(replaced(module, forward=forward))
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        if attentions:
            device = find_place(model)[0].type
            for module in attentions:
                attend = attend_written_out if device == "cpu" else torch.autocast(device, enabled=False)(module.attend)
                changes.enter_context(replaced(module, attend=attend))
        yield


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, PyTorch's fused attention takes any of its kernels but cuDNN's."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attend_written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    nabla: NablaConfig | None = None, grid: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """`attention.attend`, all shapes as there; NABLA's map is computed outside autocast, which would move its cut."""
    if nabla is None or grid is None:
        return dense_attention(q, k, v, mask)
    with torch.autocast(q.device.type, enabled=False):
        tiles = block_map(q, k, grid, nabla)  # (B, N, L/64, L/64)
    return block_sparse_attention(q, k, v, tiles)


@contextlib.contextmanager
def gradient_checkpointing(dit: DiT) -> Iterator[None]:
    """Inside, blocks keep only their input and are computed again for the gradient: a third more work.

    Streamed weights (`offload.py`, mode "blocks") come again for that, one block's at a time.
    """
    run = dit.run_blocks

    def run_blocks(blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        for block in blocks:  # autocast is as it was when they are computed again
            x = checkpoint(run, [block], x, *arguments, use_reentrant=False)
        return x

    with replaced(dit, run_blocks=run_blocks):
        yield
