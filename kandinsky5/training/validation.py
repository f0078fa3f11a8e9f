"""Validation: the loss of held-out samples by flow time, at fixed times and noise, so that steps compare.

The loss of a batch mostly says which times were drawn. Here each of ten times, the middles of ten bins, has its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kandinsky5.dit import DiT
from kandinsky5.training.flow import FlowBatch, flow_batch, flow_loss
from kandinsky5.training.loop import generator

BINS = 10


@torch.no_grad()
def loss_by_flow_time(
    model: DiT,
    predict: Callable[[FlowBatch], Tensor],
    latents: Tensor,  # (B, T, H, W, C) clean and scaled
    seed: list[int],
    first_frame: Tensor | None = None,  # (B, 1, H, W, C) clean
    given: Tensor | None = None,  # (B,) bool: which samples are given their first frame
) -> dict[str, float]:
    """The loss in each bin of flow times, named by its middle: {"t 0.05": …, … "t 0.95": …}.

    predict: the velocity (B, T, H, W, C) of a batch, with whatever conditioning the model takes. The noise depends on
    `seed` alone and is the same in all bins.
    """
    noise = torch.randn(latents.shape, generator=generator(seed)).to(latents.device)
    losses = {}
    for i in range(BINS):
        middle = (i + 0.5) / BINS
        batch = flow_batch(model, latents, latents.new_full((len(latents),), middle), noise, first_frame, given)
        losses[f"t {middle:.2f}"] = float(flow_loss(predict(batch), batch.velocity, batch.loss_mask))
    return losses
