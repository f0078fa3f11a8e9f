"""A DiT so small that it trains in a second, for tests of the training code."""

from unittest import mock

import torch

from kandinsky5.config import DiTConfig
from kandinsky5.dit import DiT
from kandinsky5.text_encoder import TextFeatures
from kandinsky5.training import curves, loop
from kandinsky5.training.curves import read_rows
from kandinsky5.training.flow import FlowTimes, flow_batch, flow_loss, predict
from kandinsky5.training.loop import generator
from kandinsky5.training.recipe import Recipe
from random_weights import randomise

TINY = DiTConfig(
    dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=1, rope_axes=(4, 6, 6),
    in_channels=4, out_channels=4, text_dim=8, pooled_dim=8,
)  # fmt: skip
UNSCALED = (1.0, 1.0, 1.0)


def random_dit() -> DiT:
    """All of its parameters are random, none is zero."""
    return randomise(DiT(TINY)).requires_grad_(True)


def tiny_features(batch: int, seed: int = 0, length: int = 3) -> TextFeatures:
    random = generator([seed])
    text, pooled = torch.randn(batch, length, 8, generator=random), torch.randn(batch, 8, generator=random)
    return TextFeatures(text, torch.full((batch,), length), pooled)


def train(*arguments, **options):
    """`loop.train` without curves, which would take most of the time."""
    with mock.patch.object(curves, "plot_losses"):
        return loop.train(*arguments, **options)


def tiny_run(folder, steps=12, stop_after=None, dtype="float32", accumulate=1, muon="", cycles=1, freeze="", **options):
    """A DiT that learns two latents by their prompts; returns it and its average."""
    torch.manual_seed(0)
    dit = DiT(TINY)
    targets = torch.randn(2, 2, 4, 4, 4, generator=generator([9]))
    features = tiny_features(2)

    def loss(seed):
        random = generator(seed)
        t, noise = FlowTimes().sample(2, random), torch.randn(targets.shape, generator=random)
        batch = flow_batch(dit, targets, t, noise)
        predicted = predict(dit, batch.x, batch.t, features, UNSCALED)
        return flow_loss(predicted, batch.velocity, batch.loss_mask), {"noise": float(noise.mean())}

    checkpointing = options.pop("checkpointing", False)
    how = {"dtype": dtype, "accumulate": accumulate, "muon": muon, "checkpointing": checkpointing, "cycles": cycles}
    how["freeze"] = freeze
    recipe = Recipe(steps, 1e-2, warmup=4, **how)
    options = {"log_every": 2} | options
    average = train(dit, loss, recipe, folder, stop_after=stop_after, **options)
    return dit, average


def losses(folder) -> list[float]:
    return [float(row["loss"]) for row in read_rows(folder / "loss.csv")]


def same_weights(a, b) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
