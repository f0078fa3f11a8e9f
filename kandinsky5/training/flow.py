"""Flow matching: the batches that a DiT trains on, and its loss.

Clean latents x_0 and noise are the ends of a straight line, x_t = (1 − t)·x_0 + t·noise, along which the velocity is
noise − x_0 everywhere, as in sampler.py. The network learns its mean over all lines through x_t.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5.dit import DiT
from kandinsky5.text_encoder import TextFeatures


@dataclass(frozen=True)
class FlowTimes:
    """Distribution of the times at which the network is trained."""

    kind: str = "logit-normal"  # or "uniform"; logit-normal: sigmoid of a normal (arXiv 2403.03206)
    mean: float = 0.0  # of that normal
    std: float = 1.0
    shift: float = 1.0  # t ← s·t / (1 + (s − 1)·t), as in sampling: above 1 towards the noise

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 in (0, 1). Raises ValueError for an unknown kind."""
        if self.kind == "uniform":
            t = torch.rand(count, generator=generator, device="cpu", dtype=torch.float32)
        elif self.kind == "logit-normal":
            normal = torch.randn(count, generator=generator, device="cpu", dtype=torch.float32)
            t = torch.sigmoid(self.mean + self.std * normal)
        else:
            raise ValueError(f"flow times {self.kind!r}: choose uniform or logit-normal")
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class FlowBatch:
    """One batch of inputs, targets and the mask of the loss."""

    x: Tensor  # (B, T, H, W, C_in) noisy latents, and with visual_cond conditioning latents and mask
    t: Tensor  # (B,)
    velocity: Tensor  # (B, T, H, W, C) noise − latents
    loss_mask: Tensor  # (B, T, 1, 1, 1) 1 where the velocity is requested, 0 in a given first frame


def flow_batch(
    model: DiT,
    latents: Tensor,  # (B, T, H, W, C) clean and scaled
    t: Tensor,  # (B,)
    noise: Tensor,  # (B, T, H, W, C)
    first_frame: Tensor | None = None,  # (B, 1, H, W, C) clean
    given: Tensor | None = None,  # (B,) bool: which samples are given their first frame
) -> FlowBatch:
    """Latents (B, T, H, W, C) at times t on their way to noise, presented as the pipeline presents them.

    A given first frame stands clean in frame 0 of the noisy latents and the mask is 1 there; the conditioning
    channels are zeros, as in diffusers' pipeline_kandinsky_i2v.py. That frame has no loss.
    """
    B, T = latents.shape[:2]
    x = torch.lerp(latents, noise, t.view(B, 1, 1, 1, 1))
    condition = latents.new_zeros(*latents.shape[:-1], model.config.input_channels - model.config.in_channels)
    if given is not None:
        assert first_frame is not None and condition.shape[-1], (given.shape, condition.shape)
        x = torch.cat([torch.where(given.view(B, 1, 1, 1, 1), first_frame, x[:, :1]), x[:, 1:]], dim=1)
        condition[given, :1, ..., -1] = 1
    loss_mask = mask_given(B, T, given).to(latents)
    return FlowBatch(torch.cat([x, condition], dim=-1), t, noise - latents, loss_mask)


def mask_given(B: int, T: int, given: Tensor | None = None) -> Tensor:
    """(B, T, 1, 1, 1): 1, but 0 in frame 0 of the samples that are `given` (B,) it."""
    loss_mask = torch.ones(B, T, 1, 1, 1, device=None if given is None else given.device)
    if given is not None:
        loss_mask[given, 0] = 0
    return loss_mask


def predict(model: DiT, x: Tensor, t: Tensor, features: TextFeatures, rope_scale: tuple[float, float, float]) -> Tensor:
    """Velocity (B, T, H, W, C) in float32 at x (B, T, H, W, C_in) and times t (B,).

    rope_scale: that of sampling at this size; no default is right for all models.
    """
    return model(x, features.text, features.pooled, t, features.mask, rope_scale=rope_scale).float()


def flow_loss(predicted: Tensor, target: Tensor, loss_mask: Tensor, elements: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity where loss_mask is 1; any shapes that broadcast.

    elements: what the sum is divided by, if these are not all samples of a batch.
    """
    loss_mask = loss_mask.expand_as(target)
    elements = loss_mask.sum() if elements is None else elements
    return ((predicted.float() - target).square() * loss_mask).sum() / elements


def drop_condition(features: TextFeatures, dropped: Tensor, empty: TextFeatures) -> TextFeatures:
    """Replace the samples of `dropped` (B,) bool by `empty`, the features of the empty prompt.

    So the network also learns the velocity without a prompt, which guidance needs.
    """
    S, n = features.text.shape[1], empty.text.shape[1]
    assert n <= S, (n, S)
    text = torch.where(dropped[:, None, None], F.pad(empty.text, (0, 0, 0, S - n)), features.text)
    lengths = torch.where(dropped.cpu(), empty.lengths, features.lengths)
    return TextFeatures(text, lengths, torch.where(dropped[:, None], empty.pooled, features.pooled))
