"""Distillation: what a student learns to predict in one pass of the network, computed by its teacher in several."""

from collections.abc import Callable

import torch
from torch import Tensor

from kandinsky5.dit import DiT
from kandinsky5.sampler import guided_velocity
from kandinsky5.text_encoder import TextFeatures
from kandinsky5.training.flow import FlowBatch, drop_condition, predict


@torch.no_grad()
def guided_target(
    teacher: DiT,
    batch: FlowBatch,
    features: TextFeatures,
    empty: TextFeatures,
    guidance_scale: float,
    rope_scale: tuple[float, float, float],
) -> Tensor:
    """Guidance distillation: the teacher's velocity of two passes, for the student to predict in one.

    empty: the features of the empty prompt. Returns (B, T, H, W, C) in float32, without gradients.
    """
    negative = drop_condition(features, torch.ones_like(batch.t, dtype=torch.bool), empty)
    conditional, unconditional = (predict(teacher, batch.x, batch.t, f, rope_scale) for f in (features, negative))
    return guided_velocity(conditional, unconditional, guidance_scale)


@torch.no_grad()
def step_target(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """Step distillation (progressive, arXiv 2202.00512): the velocity whose one step ends where the teacher's n end.

    velocity: the teacher's, (x, t) → dx/dt; x (B, T, H, W, C) at times[0]; times (n + 1, B), descending. A student
    that predicts the result at times[0] gets, in one Euler step to times[-1], where the teacher gets in n.
    """
    end = x
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        end = end + (t_next - t).view(-1, 1, 1, 1, 1) * velocity(end, t)
    return (end - x) / (times[-1] - times[0]).view(-1, 1, 1, 1, 1)
