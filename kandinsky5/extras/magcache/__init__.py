"""Step skipping: leave the visual blocks of the DiT out of some steps (MagCache, arXiv 2506.09045).

All visual blocks together add a residual to their input. From one step to the next its direction hardly changes, and
its size by a ratio that is nearly the same for every prompt, so it is measured once per model. A step may therefore
reuse the residual of the step before, as long as the product of the ratios stays near 1.

The ratios alone decide, before sampling starts: `plan_skips` says which steps to skip, `skip_steps` does it. The JSON
files of this folder hold the ratios that the authors publish with their configurations, and nano's, measured by
`python -m kandinsky5.extras.magcache`, which works for any checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kandinsky5.config_file import from_json
from kandinsky5.dit import DiT
from kandinsky5.files import read_json
from kandinsky5.screen import printable, shown

FOLDER = Path(__file__).parent
COMMAND = "python -m kandinsky5.extras.magcache CHECKPOINT --prompts FILE -o RATIOS.json"


@dataclass(frozen=True)
class StepSkipping:
    """How a model's residual grows, and how much error is allowed; the defaults are the authors'.

    conditional, unconditional: a ratio for each step but the first, the mean over all tokens of
        ‖residual of this step‖ / ‖residual of the step before‖. Without guidance the second is empty.
    """

    conditional: tuple[float, ...]
    unconditional: tuple[float, ...] = ()
    threshold: float = 0.12  # upper bound of the estimated errors of consecutive skips
    max_skips: int = 2  # consecutive ones
    kept: float = 0.2  # share of the steps, at the beginning, that is always computed
    source: str = ""

    def __post_init__(self):
        numbers = [*self.conditional, *self.unconditional, self.threshold, self.max_skips, self.kept]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("its ratios, threshold, max_skips and kept must be finite numbers")
        if not self.conditional:
            raise ValueError("it holds no conditional ratios")


def plan_skips(
    skipping: Literal[True] | str | Path | dict | StepSkipping, model: str, steps: int, guided: bool = True
) -> list[tuple[bool, ...]]:
    """For each step, which of its passes skip: the conditional one and, with guidance, the unconditional one.

    skipping: True for the known ratios of `model`, a file of the command, or ratios. Raises ValueError without any.

    A skip reuses a residual whose size is off by a factor, the product of the ratios since it was computed. Its
    estimated error is |1 − product|; the errors of consecutive skips add up, and the sum stays below the threshold. For
    another number of steps than measured, each step takes the ratio of the nearest one. As in the authors' code each
    pass has a plan of its own, and the passes at the beginning that are always computed are counted together: where
    their number is odd, the unconditional pass starts to skip one step sooner.
    """
    skipping = _find(skipping, model)
    if guided and not skipping.unconditional:
        raise ValueError(
            f"step_skipping: these ratios hold without guidance: set guidance_scale to 1, or measure with `{COMMAND}`"
        )
    passes = [skipping.conditional, skipping.unconditional] if guided else [skipping.conditional]
    plans = [_plan_pass(skipping, ratios, number, steps) for number, ratios in enumerate(passes)]
    return list(zip(*plans, strict=True))


def _plan_pass(skipping: StepSkipping, ratios: tuple[float, ...], number: int, steps: int) -> list[bool]:
    """The steps in which pass `number` of each (0 conditional, 1 unconditional) skips."""
    ratios = (1.0, *ratios)  # no step precedes the first
    scale = (len(ratios) - 1) / max(steps - 1, 1)
    kept = int(2 * steps * skipping.kept)  # passes of both kinds
    product, error, in_a_row, skips = 1.0, 0.0, 0, []
    for step in range(steps):
        product *= ratios[round(step * scale)]
        error += abs(1 - product)
        in_a_row += 1
        within = error < skipping.threshold and in_a_row <= skipping.max_skips
        skips.append(within and 2 * step + number >= kept and step > 0)  # step 0 has nothing to reuse
        if not skips[-1]:
            product, error, in_a_row = 1.0, 0.0, 0
    return skips


def load(path: str | Path) -> StepSkipping:
    """Read a file of `python -m kandinsky5.extras.magcache`. Raises ValueError if it is not one."""
    try:
        return from_json(StepSkipping, read_json(path, most=10**6))
    except (OSError, ValueError) as error:
        reason, name = printable(error, 100), printable(path, 100)
        raise ValueError(f"cannot read ratios from {name} ({reason}): give a file of `{COMMAND}`") from error


def skip_steps(dit: DiT, skips: Sequence[tuple[bool, ...]], together: bool) -> DiT:
    """A DiT with the same weights for one sampling run, whose forwards skip their visual blocks as planned.

    together: both passes of a step come as one batch, else one after the other. Where only one of them skips, the
    batch is computed as a whole, and the residual of the pass that skips is dropped. `dit` itself is not changed, so
    several runs at a time do not disturb each other. Memory: one residual (B, L, dim) per pass.
    """
    passes = [(number, (skip,)) for step in skips for number, skip in enumerate(step)]
    forwards = iter([(0, step) for step in skips] if together else passes)
    residuals: dict[int, Tensor] = {}  # of each pass
    run, visual_blocks = dit.run_blocks, dit.visual_blocks

    def run_blocks(blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        if blocks is not visual_blocks:
            return run(blocks, x, *arguments)
        number, skipping = next(forwards, (0, ()))
        if not skipping:
            raise ValueError("step_skipping: the solver runs the DiT more often than once per step: leave one out")
        if all(skipping):
            return x + residuals[number]
        out = run(blocks, x, *arguments)
        residual = out - x
        if any(skipping):  # one pass of a batch of two
            out = choose(skipping, x + residuals[number], out)
            residual = choose(skipping, residuals[number], residual)
        residuals[number] = residual
        return out

    skipping_dit = object.__new__(type(dit))  # as copy.copy, which a class of FSDP2 does not allow
    vars(skipping_dit).update(vars(dit))
    skipping_dit.run_blocks = run_blocks  # type: ignore[method-assign]
    return skipping_dit


def choose(skipping: tuple[bool, ...], reused: Tensor, computed: Tensor) -> Tensor:
    """Of both passes in one batch (2B, L, dim), the one that skips from `reused`, the other from `computed`."""
    halves = zip(skipping, reused.chunk(2), computed.chunk(2), strict=True)
    return torch.cat([a if skip else b for skip, a, b in halves])


def _find(skipping: Literal[True] | str | Path | dict | StepSkipping, model: str) -> StepSkipping:
    if skipping is True:
        known = sorted(path.stem for path in FOLDER.glob("*.json"))
        if model not in known:
            raise ValueError(
                f"step_skipping: there are ratios for {', '.join(known)}, none for {model}: measure them with "
                f"`{COMMAND}` and give that file"
            )
        skipping = FOLDER / f"{model}.json"
    if isinstance(skipping, (str, Path)):
        skipping = load(skipping)
    if isinstance(skipping, dict):
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in skipping.items()}
        try:
            return from_json(StepSkipping, lists)
        except ValueError as error:
            raise ValueError(f"step_skipping: {error}; give what a file of `{COMMAND}` holds") from error
    if not isinstance(skipping, StepSkipping):
        raise ValueError(f"step_skipping {shown(skipping)}: give True, a file of `{COMMAND}`, or the ratios in it")
    return skipping
