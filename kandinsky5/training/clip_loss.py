"""What a DiT learns from clips: to predict the velocity of noisy ones, with and without caption and first frame.

clip_loss       of a batch drawn from a seed, as `loop.train` wants it
held_out_loss   of clips that are not trained on, by flow time, at fixed times and with fixed noise: so steps compare
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.rope import scale_for_size
from kandinsky5.text_encoder import TextFeatures
from kandinsky5.training.data import Clips, read_features, read_latents
from kandinsky5.training.flow import FlowBatch, FlowTimes, drop_condition, flow_batch, flow_loss, mask_given, predict
from kandinsky5.training.loop import Loss, generator

MOST_HELD_OUT = 16  # clips that one evaluation takes
BINS = 10  # of flow times, each with a loss of its own: that of a batch mostly says which times were drawn


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on, and how often."""

    caption_dropout: float = 0.1  # share without its caption: guidance needs the velocity without a prompt
    first_frames: float = 0.0  # share that is given its first frame: image to video


def clip_loss(
    dit: DiT, clips: Clips, batch_size: int, times: FlowTimes, conditioning: Conditioning, accumulate: int = 1,
    rows: tuple[int, int] = (0, 1),
) -> Loss:  # fmt: skip
    """The loss of `batch_size` clips, for `loop.train` with a recipe that accumulates as many batches.

    The seed decides clips, samples of their latents, times, noise and conditioning.
    rows (i, n): compute those of clips i, i + n, … alone, so scaled that the mean over the n parts is the loss of all.
    """
    empty, device, own = clips.empty(), next(dit.parameters()).device, slice(rows[0], None, rows[1])

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        drawn = clips.batch(seed, batch_size, accumulate, *rows)
        random, shape = generator([*seed, 2]), (batch_size, *drawn.latents.shape[1:])
        t, noise = times.sample(batch_size, random), torch.randn(shape, generator=random)
        dropped, given = (
            torch.rand(len(t), generator=random) < share
            for share in (conditioning.caption_dropout, conditioning.first_frames)
        )
        features = drop_condition(drawn.features, dropped[own], empty)
        some = shape[1] > 1 and bool(given.any())  # an image has no other frame
        first = (drawn.first_frame.to(device), given[own].to(device)) if some else ()
        batch = flow_batch(dit, drawn.latents.to(device), t[own].to(device), noise[own].to(device), *first)
        predicted = _predict(dit, clips.config, features, batch)
        mask = mask_given(batch_size, shape[1], given if some else None)
        elements = mask.sum() * math.prod(shape[2:]) / rows[1] if rows[1] > 1 else None
        return flow_loss(predicted, batch.velocity, batch.loss_mask, elements), {}

    return loss


@torch.no_grad()
def held_out_loss(dit: DiT, held: Clips, conditioning: Conditioning, seed: int = 0) -> dict[str, float]:
    """The mean loss of held-out clips by flow time, as `loss_by_flow_time` names it, and of all as `loss`.

    First frames are given if they always are in training; captions always are.
    """
    device, found = next(dit.parameters()).device, []
    for i, (entry, text) in enumerate(zip(held.entries[:MOST_HELD_OUT], held.texts, strict=False)):
        random = None if held.means else generator([seed, i, 3])
        latents, first_frame = (x.to(device) for x in read_latents([entry], held.config, random))
        predicts = partial(_predict, dit, held.config, read_features([text]))
        given = conditioning.first_frames == 1 and latents.shape[1] > 1
        first = (first_frame, torch.ones(1, dtype=torch.bool, device=device)) if given else ()
        found.append(loss_by_flow_time(dit, predicts, latents, [seed, i, 4], *first))
    means = {name: float(f"{sum(one[name] for one in found) / len(found):.6g}") for name in found[0]}
    return {"loss": float(f"{sum(means.values()) / len(means):.6g}"), **means}


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


def _predict(dit: DiT, config: PipelineConfig, features: TextFeatures, batch: FlowBatch) -> Tensor:
    """Velocity (B, T, h, w, 16) of a batch, in the positions that sampling has at its size."""
    device, space = batch.x.device, config.vae.space_factor
    here = TextFeatures(features.text.to(device), features.lengths, features.pooled.to(device))
    scale = config.sampling.rope_scale or scale_for_size(batch.x.shape[2] * space, batch.x.shape[3] * space)
    return predict(dit, batch.x, batch.t, here, scale)
