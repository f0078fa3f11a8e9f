"""What each token undergoes on its own, some tokens at a time; for CPUs.

A norm, a rotation or a gated sum in float32 makes several tensors of all tokens, each written to memory and read again:
at Lite's width 230 MB each for 32,000 tokens. A few hundred tokens at a time stay in the cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 512  # tokens at a time


def in_pieces(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """function(x, *others), for PIECE tokens at a time: the same bits.

    x (…, L, C), and so is the result; what it is for a token must depend on that token alone. Of the others those with
    L rows are split as x is. With gradients, in torch.compile and on other devices than a CPU all at once.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x, *others)
    L = x.shape[-2]
    if L <= PIECE:
        return function(x, *others)
    out = torch.empty(x.shape, dtype=x.dtype)
    for i in range(0, L, PIECE):
        tokens = (..., slice(i, i + PIECE), slice(None))
        out[tokens] = function(x[tokens], *(y[tokens] if y.shape[-2:-1] == (L,) else y for y in others))
    return out
