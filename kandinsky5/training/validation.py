"""Validation: the loss of held-out samples by flow time, at fixed times and noise, so that steps compare.

The loss of a batch mostly says which times were drawn. Here each of ten times, the middles of ten bins, has its own.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5.dit import DiT
from kandinsky5.files import replacing
from kandinsky5.training.flow import FlowBatch, flow_batch, flow_loss
from kandinsky5.training.loop import generator
from kandinsky5.training.state import read_rows

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


def plot_by_flow_time(path: Path, image: Path, curves: int = 6) -> None:
    """A log with columns "step" and "t …" as a PNG, one curve per row, `curves` rows at most; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [row for row in read_rows(path) if any(name.startswith("t ") and row[name] for name in row)]
    if not rows:
        return
    last = len(rows) - 1
    shown = sorted({round(i * last / max(curves - 1, 1)) for i in range(curves)})
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number in shown:
        points = [(float(name[2:]), float(value)) for name, value in rows[number].items() if name.startswith("t ")]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"step {rows[number]['step']}")
    axes.set(xlabel="flow time (1: noise)", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8)
    with replacing(image) as temporary:
        figure.savefig(temporary, dpi=80)
