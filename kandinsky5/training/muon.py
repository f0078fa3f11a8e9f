"""Muon, an optimizer for the matrices inside a network (Jordan et al. 2024; scaled as in arXiv 2502.16982).

Its step is the orthogonal matrix nearest to the averaged gradient, so that it moves equally in all directions.
`torch.optim.Muon` computes the same, but always in bfloat16, which most CPUs emulate.
"""

import math

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in the precision `dtype` of its groups, for matrices only."""

    def __init__(self, matrices: list[Tensor], weight_decay: float, dtype: torch.dtype = torch.bfloat16):
        super().__init__(matrices, {"lr": 1e-3, "weight_decay": weight_decay, "momentum": 0.95, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure=None):
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                buffer = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonalise(matrix.grad.lerp(buffer, momentum).to(group["dtype"]))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))  # the size of AdamW's steps


def orthogonalise(x: Tensor) -> Tensor:
    """x (M, N) with all its singular values brought to between about 0.7 and 1.2, by five Newton-Schulz iterations."""
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)  # the largest singular value is at most 1
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x
