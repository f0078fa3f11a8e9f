"""Distillation: what a student learns to predict in one pass of the network, computed by its teacher in several."""

from collections.abc import Callable

import torch
from torch import Tensor

from kandinsky5.sampler import guided_velocity
from kandinsky5.training.flow import FlowBatch

Velocity = Callable[
    [Tensor, Tensor], Tensor
]  # a network with its conditioning: x (B, T, H, W, C_in), t (B,) → velocity


@torch.no_grad()
def guided_target(conditional: Velocity, unconditional: Velocity, batch: FlowBatch, guidance_scale: float) -> Tensor:
    """Guidance distillation: the teacher's velocity of two passes, for the student to predict in one.

    conditional, unconditional: the teacher with a condition, of any kind, and without. Returns (B, T, H, W, C) in
    float32, without gradients.
    """
    with_condition, without = (velocity(batch.x, batch.t) for velocity in (conditional, unconditional))
    return guided_velocity(with_condition, without, guidance_scale)


@torch.no_grad()
def step_target(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Step distillation (progressive, arXiv 2202.00512): the velocity whose one step ends where the teacher's n end.

    velocity: the teacher's, (x, t) → dx/dt; x (B, T, H, W, C) at times[0]; times (n + 1, B), descending. A student
    that predicts the result at times[0] gets, in one Euler step to times[-1], where the teacher gets in n.
    """
    end = x
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        end = end + (t_next - t).view(-1, 1, 1, 1, 1) * velocity(end, t)
    return (end - x) / (times[-1] - times[0]).view(-1, 1, 1, 1, 1)
