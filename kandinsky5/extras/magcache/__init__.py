"""Step skipping: leave the visual blocks of the DiT out of some steps (MagCache, arXiv 2506.09045).

All visual blocks together add a residual to their input. From one step to the next it hardly turns; its size changes
by a ratio that is nearly the same for every prompt, so that it is measured once for a model. A step may therefore add
the residual of the step before instead of computing its own, as long as the product of the ratios stays near 1.

The ratios decide alone, before sampling begins: `plan_skips` says which steps to skip, `skip_steps` does it. The JSON
files of this folder hold the ratios that the authors publish with their configurations, and nano's, which
`python -m kandinsky5.extras.magcache` measured, as it does for any checkpoint.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from kandinsky5.config_file import from_json
from kandinsky5.dit import DiT

FOLDER = Path(__file__).parent
COMMAND = "python -m kandinsky5.extras.magcache CHECKPOINT --prompts FILE -o RATIOS.json"


@dataclass(frozen=True)
class StepSkipping:
    """How a model's residual grows, and how much error is allowed; the other defaults are the authors' choice.

    conditional, unconditional: one number for each step but the first, the mean over all tokens of
        ‖residual of this step‖ / ‖residual of the step before‖. Without guidance the second is empty.
    """

    conditional: tuple[float, ...]
    unconditional: tuple[float, ...] = ()
    threshold: float = 0.12  # the largest sum of estimated errors over skips in a row
    max_skips: int = 2  # in a row
    kept: float = 0.2  # this share of the steps, at the beginning, is always computed
    source: str = ""

    def __post_init__(self):
        numbers = [*self.conditional, *self.unconditional, self.threshold, self.max_skips, self.kept]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("its ratios, threshold, max_skips and kept must be finite numbers")
        if not self.conditional:
            raise ValueError("it holds no conditional ratios")


def plan_skips(
    skipping: Literal[True] | str | Path | dict | StepSkipping, model: str, steps: int, guided: bool = True
) -> list[bool]:
    """Which of the steps are skipped.

    skipping: True for the ratios that this package has for `model`, a file of the command, or the ratios.
    ValueError where there are no such ratios.

    A skipped step uses a residual whose size is off by a factor: the product of the ratios since it was computed.
    The estimated error of the skip is |1 − product|; skips in a row add theirs up, and the sum stays below the
    threshold, for both passes of guidance. With another number of steps than measured, each takes the ratio of the
    measured step nearest to it.
    """
    skipping = _find(skipping, model)
    if guided and not skipping.unconditional:
        raise ValueError(
            f"step_skipping: these ratios hold without guidance: set guidance_scale to 1, or measure with `{COMMAND}`"
        )
    passes = [skipping.conditional, skipping.unconditional] if guided else [skipping.conditional]
    passes = [(1.0, *ratios) for ratios in passes]  # no step comes before the first
    first = max(1, round(skipping.kept * steps))
    skips, in_a_row = [], 0
    products, errors = [1.0] * len(passes), [0.0] * len(passes)
    for step in range(steps):
        for i, ratios in enumerate(passes):
            products[i] *= ratios[round(step * (len(ratios) - 1) / max(steps - 1, 1))]
            errors[i] += abs(1 - products[i])
        skip = step >= first and max(errors) < skipping.threshold and in_a_row < skipping.max_skips
        in_a_row += 1
        if not skip:
            products, errors, in_a_row = [1.0] * len(passes), [0.0] * len(passes), 0
        skips.append(skip)
    return skips


def load(path: str | Path) -> StepSkipping:
    """Read a file of `python -m kandinsky5.extras.magcache`; ValueError if it is none."""
    try:
        return from_json(StepSkipping, json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path} ({reason}): give a file that `{COMMAND}` wrote") from error


@contextmanager
def skip_steps(dit: DiT, skips: list[bool], passes: int) -> Iterator[None]:
    """Inside, the forwards of `dit` must come step by step, `passes` in each; those of a step in `skips` are short.

    Each pass keeps one residual, as large as the tokens: (B, L, dim).
    """
    if not any(skips):
        yield
        return
    run_blocks = dit.run_blocks
    calls = ((skip, number) for skip in skips for number in range(passes))
    residuals: dict[int, Tensor] = {}  # of each pass: what all visual blocks added, (B, L, dim)

    def run_or_skip(blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        if blocks is not dit.visual_blocks:
            return run_blocks(blocks, x, *arguments)
        skip, number = next(calls)
        if skip:
            return x + residuals[number]
        out = run_blocks(blocks, x, *arguments)
        residuals[number] = out - x
        return out

    dit.run_blocks = run_or_skip  # type: ignore[method-assign]
    try:
        yield
    finally:
        dit.run_blocks = run_blocks  # type: ignore[method-assign]


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
        raise ValueError(f"step_skipping {skipping!r}: give True, a file of `{COMMAND}`, or the ratios in it")
    return skipping
