"""How a run takes its steps: the recipe, the learning rate that follows from it, and the optimizers."""

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from kandinsky5.training.muon import Muon


@dataclass(frozen=True)
class Recipe:
    """How `train` takes its steps. A run's state records it, and resumes with no other."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200  # steps over which the rate rises from 0
    constant: float = 0.0  # share of the steps before the rate starts to fall along a cosine
    final_rate: float = 0.02  # where the cosine ends, as a share of the learning rate
    cycles: int = 1  # how often all of `steps`, warm-up to cosine, are repeated; a finished run can take more cycles
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01  # of matrices and kernels; biases and norms have none
    freeze: str = ""  # regular expression: weights whose names match are not trained
    muon: str = ""  # regular expression: Muon trains the matrices whose names match, AdamW everything else
    muon_rate: float = 3.0  # Muon's learning rate, as a multiple of AdamW's
    clip_norm: float = 1.0
    accumulate: int = 1  # batches whose gradients are averaged in a step
    ema: float = 0.999  # decay of the averaged weights; (1 + step) / (10 + step) while that is less; 0: no average
    dtype: str = "auto"  # of autocast: "bfloat16", "float32" (off), or "auto", bfloat16 where it is native
    checkpointing: bool = False  # of a DiT's blocks: less memory, a third more work, the same result
    seed: int = 0
    origin: str = ""  # where the initial weights come from; empty where they are random


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a constant share, then half a cosine down to `final_rate`; repeated in each cycle.

    Cycles are the warm restarts of Loshchilov and Hutter (arXiv 1608.03983).
    """
    step %= recipe.steps
    warm = min(1.0, (step + 1) / max(recipe.warmup, 1))
    start = recipe.constant * recipe.steps
    fallen = min(max(step - start, 0) / max(recipe.steps - start, 1), 1.0)
    cosine = (1 + math.cos(math.pi * fallen)) / 2
    return recipe.learning_rate * warm * (recipe.final_rate + (1 - recipe.final_rate) * cosine)


def matching(model: nn.Module, pattern: str, option: str) -> list[nn.Parameter]:
    """The parameters in whose names the regular expression is found. Raises ValueError if it is invalid or in none."""
    try:
        matched = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{option} {pattern!r} is no regular expression ({error}): correct it") from error
    if not matched:
        raise ValueError(f"{option} {pattern!r} matches no parameter's name: correct it, or leave it out")
    return matched


def freeze(model: nn.Module, pattern: str) -> None:
    """Leave the parameters whose names match the regular expression as they are: no gradient, no optimizer state.

    Raises ValueError as `matching`, and where nothing is left to train.
    """
    for parameter in matching(model, pattern, "freeze"):
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze {pattern!r} leaves nothing to train: let it match fewer names")


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on vectors (biases, norms), and Muon where the recipe names matrices for it.

    Muon is meant for matrices inside a network, not for embeddings or the output layer. Raises ValueError if
    recipe.muon matches no matrix.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [n for n, p in trained.items() if recipe.muon and p.ndim == 2 and re.search(recipe.muon, n)]
    if recipe.muon and not muon:
        raise ValueError(f"muon {recipe.muon!r} matches no matrix's name: correct it, or leave it out for AdamW alone")
    rest = [p for n, p in trained.items() if n not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=recipe.betas, foreach=True)]
    if muon:
        optimizers.append(Muon([trained[name] for name in muon], recipe.weight_decay))
    return optimizers


def prepare_step(optimizers: list[torch.optim.Optimizer], step: int, recipe: Recipe) -> None:
    """Give the optimizers of `build_optimizers` this step's learning rate, and Muon the precision of autocast."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
            if isinstance(optimizer, Muon):
                group["lr"] *= recipe.muon_rate
                group["dtype"] = getattr(torch, recipe.dtype)
