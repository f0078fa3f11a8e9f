"""torch.compile where it pays: the blocks of the DiT, and in the VAE decoder norm and SiLU of large frames.

A block is compiled once for all blocks of its kind and for all sizes. Sizes equal to 1 are specialised: a batch of one,
and with NABLA a single frame, row or column of tiles. A block is one graph in which attention is a single operation,
through the same kernel as without, and without a gradient: for sampling.

The decoder is not compiled whole: it loops over frames, for each length others, and the kernels of its convolutions
depend on size and threads. What is compiled is `FastGroupNorm.activate`, which large frames pass (`fast_vae.PIECE`).
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky5.config import NablaConfig
from kandinsky5.dit import Attention, DiT
from kandinsky5.runtime import fast
from kandinsky5.runtime.fast_vae import FastGroupNorm
from kandinsky5.runtime.kernels import attend_through
from kandinsky5.vae import VAE
from kandinsky5.vae2d import VAE2D


def compile_models(dit: DiT, vae: VAE | VAE2D, attention: str = "auto", backend: str = "inductor") -> None:
    """Compile in place; the work is done when a block first runs. Raises ValueError where there is no C++ compiler.

    attention: one of `kernels.KERNELS`. The DiT's blocks lose their fast forms, which the compiler does better.
    """
    _check_compiler()
    # It leaves RoPE's complex product as it is, which costs little and is nothing to warn users of.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    how: dict[str, Any] = {"dynamic": True, "backend": backend, "recompile_limit": 32}
    for block in [*dit.text_blocks, *dit.visual_blocks]:
        fast.remove(block)
        for module in block.modules():
            if isinstance(module, Attention):
                module.attend = functools.partial(attend_opaquely, attention)
        block.compile(fullgraph=True, **how)
    dit.run_blocks = functools.partial(_run_on_a_copy, dit.run_blocks)  # type: ignore[method-assign]
    for module in vae.decoder.modules():
        if isinstance(module, FastGroupNorm):  # a graph for each width, and for single frames
            module.activate = torch.compile(module.activate, fullgraph=True, **how)  # type: ignore[method-assign]


def _run_on_a_copy(run_blocks: Callable[..., Tensor], blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
    """The first block's tokens may be a view, which would be compiled apart from those of the others."""
    return run_blocks(blocks, x.clone(), *arguments)


def attend_opaquely(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    nabla: NablaConfig | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """`kernels.attend_through`, all shapes as there, as one operation that the compiler calls and does not trace.

    What happens inside depends on sizes and, with NABLA, on data: traced, it would be compiled anew for each.
    """
    if nabla is None or grid is None:
        return _one_operation(q, k, v, mask, kernel, 0.0, [], []).transpose(1, 2)
    return _one_operation(q, k, v, mask, kernel, nabla.P, list(nabla.window), list(grid)).transpose(1, 2)


@torch.library.custom_op("kandinsky5::attend", mutates_args=())
def _one_operation(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str, P: float, window: list[int], grid: list[int]
) -> Tensor:  # (B, L, N, D)
    nabla = NablaConfig(P, (window[0], window[1], window[2])) if window else None
    size = (grid[0], grid[1], grid[2]) if grid else None
    return attend_through(kernel, q, k, v, mask, nabla, size).transpose(1, 2).contiguous()


@_one_operation.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str, P: float, window: list[int], grid: list[int]
) -> Tensor:
    B, N, L, D = q.shape
    return q.new_empty(B, L, N, D)


def _check_compiler() -> None:
    name = os.environ.get("CXX", "g++")  # PyTorch's choice
    if shutil.which(name) is None:
        raise ValueError(
            f"compile: PyTorch needs a C++ compiler, and there is no {name} here: install one (apt install g++), name "
            "yours in the environment variable CXX, or do without (--no-compile)"
        )
