"""torch.compile where it pays: the blocks of the DiT, and in the VAE decoder norm and SiLU of large frames.

A block is compiled once for all blocks of its kind and for all sizes. Sizes equal to 1 are specialised: a batch of one,
and with NABLA a single frame, row or column of tiles. A block is one graph in which attention is a single operation,
through the same kernel as without, and without a gradient: for sampling. Rotations are real products instead of
complex ones, for which the compiler generates no code: so a norm and its rotation are one pass through memory.

The decoder is not compiled whole: it loops over frames, for each length others, and the kernels of its convolutions
depend on size and threads. What is compiled is `FastGroupNorm.activate`, which large frames pass (`fast_vae.PIECE`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky5.config import NablaConfig
from kandinsky5.dit import Attention, DiT
from kandinsky5.runtime import fast
from kandinsky5.runtime.device import allow_recompiling, compiler_missing
from kandinsky5.runtime.fast_vae import FastGroupNorm
from kandinsky5.runtime.kernels import attend_through
from kandinsky5.vae import VAE
from kandinsky5.vae2d import VAE2D

HOW: dict[str, Any] = {"dynamic": True, "fullgraph": True}


def check_compile(compile: bool | str, device: torch.device, sharded: bool = False) -> bool:
    """Whether to compile: "auto" is yes on CUDA if Triton and a C compiler are there (a fifth of a step, computed).

    sharded: whether weights are spread over ranks: they come and go inside of blocks, which then cannot be one graph.
    Raises ValueError for another text, and for True where a compiler is missing, in a line that says which.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile {compile!r}: choose True, False or 'auto'")
    if sharded and compile is True:
        raise ValueError("compile: sharded weights come and go inside of a block: leave one of the two out")
    missing = compiler_missing(device.type)
    if compile is True and missing:
        raise ValueError(f"compile: there is no {missing}; or do without (--no-compile)")
    return device.type == "cuda" and not missing and not sharded if compile == "auto" else bool(compile)


def compile_models(dit: DiT, vae: VAE | VAE2D, attention: str = "auto", backend: str = "inductor") -> None:
    """Compile in place; the work is done when a block first runs. `check_compile` says whether that is possible.

    attention: one of `kernels.KERNELS`. The DiT's blocks lose their fast forms, which the compiler does better.
    """
    how = HOW | allow_recompiling() | {"backend": backend}
    for block in [*dit.text_blocks, *dit.visual_blocks]:
        fast.remove(block)
        fast.swap(block, {Attention: RealAttention})
        for module in block.modules():
            if isinstance(module, Attention):
                module.attend = functools.partial(attend_opaquely, attention)
        block.compile(**how)
        vars(block)["compiled_with"] = how  # `pieces.py` compiles its own parts alike
    dit.run_blocks = functools.partial(_run_on_reals, dit.run_blocks)  # type: ignore[method-assign]
    for module in vae.decoder.modules():
        if isinstance(module, FastGroupNorm):  # a graph for each width, and for single frames
            module.activate = torch.compile(module.activate, **how)  # type: ignore[method-assign]


def is_compiled(dit: nn.Module) -> bool:
    """Whether `compile_models` has compiled its blocks."""
    return any("compiled_with" in vars(module) for module in dit.modules())


class RealAttention(Attention):
    """Attention whose rotations are those of `as_real`."""

    @staticmethod
    def rotate(x: Tensor, rotations: Tensor) -> Tensor:
        """RoPE of x (B, N, L, D) without complex numbers, rotations (L, 2 · D) → the same."""
        pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, L, D/2, 2)
        own, other = rotations.unflatten(-1, (-1, 2, 2)).unbind(-1)  # (L, D/2, 2) each
        return (pairs * own + pairs.flip(-1) * other).flatten(-2).type_as(x)


def as_real(rotations: Tensor) -> Tensor:
    """What each coordinate of a point, and the point's other one, is multiplied by when it is turned.

    complex64 (L, D/2) → float32 (L, 2 · D): for the first coordinate cos, −sin, for the second cos, sin, side by side,
    as the compiler would take sizes of 2 for those of a batch of two.
    """
    cos, sin = rotations.real, rotations.imag
    return torch.stack([cos, -sin, cos, sin], dim=-1).flatten(1)


def _run_on_reals(run_blocks: Callable[..., Tensor], blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
    """Rotations become real. The first block's tokens may be a view, which would be compiled apart from the others'."""
    real = (as_real(y) if isinstance(y, Tensor) and y.is_complex() else y for y in arguments)
    return run_blocks(blocks, x.clone(), *real)


def attend_opaquely(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    nabla: NablaConfig | None = None, grid: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
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
