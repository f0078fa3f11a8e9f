"""What each token undergoes on its own, some tokens at a time; for CPUs.

A norm, a rotation or a gated sum in float32 makes several tensors of all tokens, each written to memory and read again:
at Lite's width 230 MB each for 32,000 tokens. A few hundred tokens at a time stay in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # numbers at a time: 4 MB in float32, 585 tokens of Lite's width


def in_pieces(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """function(x, *others) for some tokens at a time: the same bits, contiguous.

    x (…, L, C); what comes out for a token, in the same place, must depend on that token alone. Of the others, tensors
    with L rows are split as x is. With gradients, in torch.compile and on other devices than a CPU all at once.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x, *others)
    if x.dim() < 2 or x.numel() <= PIECE:
        return function(x, *others)
    L = x.shape[-2]
    step = max(1, PIECE * L // x.numel())

    def some(y: Any, i: int) -> Any:
        return y[..., i : i + step, :] if isinstance(y, Tensor) and y.shape[-2:-1] == (L,) else y

    return torch.cat([function(some(x, i), *(some(y, i) for y in others)) for i in range(0, L, step)], dim=-2)
