"""Measure how the residual of a model's visual blocks grows from step to step, for `step_skipping`.

    python -m kandinsky5.extras.magcache weights/t2v-lite-sft-5s --prompts prompts.txt -o ratios.json
    python sample.py "a red fox runs through snow" --checkpoint weights/t2v-lite-sft-5s --step-skipping ratios.json

One prompt per line; each costs a whole generation. The ratios hardly depend on them, so a few are enough. Steps,
guidance, shift and size default to the checkpoint's: measure again for others that you use often. A checkpoint larger
than memory is measured with --offload, as it is sampled.
"""

import dataclasses
import json
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5 import cli
from kandinsky5.extras.magcache import StepSkipping
from kandinsky5.files import check_apart, check_replaceable, read_utf8, write_text
from kandinsky5.pipeline import Pipeline
from kandinsky5.runtime.device import plain_defaults
from kandinsky5.runtime.offload import MODES

MOST_PROMPTS = 1000  # each costs a whole generation


def main(arguments: list[str] | None = None) -> None:
    """Run one command line. Raises ValueError or OSError if there are no prompts or the output cannot be written."""
    parser = cli.Parser(cli.program("kandinsky5.extras.magcache"), description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="converted checkpoint folder, or a bundled model such as nano")
    add("--prompts", required=True, type=Path, metavar="FILE", help="one per line")
    add("--image", metavar="FILE", help="first frame of all videos, for an i2v checkpoint")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="default: the checkpoint's")
    add("--guidance", type=float, dest="guidance_scale", metavar="W", help="likewise")
    add("--shift", type=float, metavar="S", help="likewise")
    add("--height", type=int, metavar="PX", help="likewise")
    add("--width", type=int, metavar="PX", help="likewise")
    add("--num-frames", type=int, metavar="N", help="likewise")
    add("--device", default="auto", help="default: auto, a GPU if there is one")
    add("--dtype", choices=cli.DTYPES, default="auto", help="default: auto, bfloat16 where the device computes in it")
    add("--offload", choices=MODES, help="keep only the running model (model) or block (blocks) on the device")
    add("-o", "--output", required=True, type=Path, metavar="RATIOS.json")
    options = parser.parse_args(arguments)
    prompts = [line.strip() for line in read_utf8(options.prompts).splitlines() if line.strip()]
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"{options.prompts} holds {len(prompts):,} prompts: give at most {MOST_PROMPTS}")
    read = {"CHECKPOINT": options.checkpoint, "--prompts": options.prompts, "--image": options.image}
    check_apart({"-o": options.output}, read)
    check_replaceable(options.output)
    pipe = Pipeline.load(options.checkpoint, options.device, options.dtype, offload=options.offload)
    names = ("image", "num_inference_steps", "guidance_scale", "shift", "height", "width", "num_frames")
    settings = {name: getattr(options, name) for name in names}
    measured = measure_ratios(pipe, prompts, **settings)
    save(measured, options.output)
    print(f"{options.output}: {measured.source}")


@plain_defaults()
@torch.no_grad()
def measure_ratios(pipe: Pipeline, prompts: list[str], **settings) -> StepSkipping:
    """The mean ratios over a video from each prompt, with `settings` of the pipeline's call.

    Raises ValueError without prompts, with fewer than two steps, and for what the pipeline's call refuses.
    """
    if not prompts:
        raise ValueError("there are no prompts to measure with: give a file with one per line")
    guidance = settings.get("guidance_scale")
    guidance = pipe.config.sampling.guidance_scale if guidance is None else guidance
    steps = settings.get("num_inference_steps") or pipe.config.sampling.num_inference_steps
    if steps < 2:
        raise ValueError(f"{steps} step: a ratio compares a step with the one before; measure with at least 2")
    passes = 2 if abs(guidance - 1) > 1e-6 else 1
    ratios = [_measure_one(pipe, passes, prompt=prompt, seed=seed, **settings) for seed, prompt in enumerate(prompts)]
    means = torch.tensor(ratios).mean(dim=0)  # (passes × (steps − 1),); the passes alternate
    columns = [tuple(round(float(ratio), 5) for ratio in means[i::passes]) for i in range(passes)]
    source = f"measured with {pipe.config.name}, {steps} steps, guidance {guidance:g}, prompts: {len(prompts)}"
    return StepSkipping(columns[0], columns[1] if passes == 2 else (), source=source)


def _measure_one(pipe: Pipeline, passes: int, **settings) -> list[float]:
    """The ratios of one generation, pass by pass: step 1 conditional, unconditional, step 2 …"""
    ratios: list[float] = []
    before: deque[Tensor] = deque(maxlen=passes)  # residuals of the step before
    entered: list[Tensor] = []

    def enter(block, arguments) -> None:
        entered[:] = arguments[:1]

    def leave(block, arguments, out: Tensor) -> None:
        for residual in (out - entered.pop()).float():  # (L, dim); short passes come as one batch
            if len(before) == passes:
                ratios.append(float((residual.norm(dim=-1) / before[0].norm(dim=-1)).mean()))
            before.append(residual)

    blocks = list(pipe.dit.visual_blocks.children())
    hooks = [blocks[0].register_forward_pre_hook(enter), blocks[-1].register_forward_hook(leave)]
    try:
        pipe(**settings, output_type="latents")
    finally:
        for hook in hooks:
            hook.remove()
    return ratios


def save(skipping: StepSkipping, path: Path) -> None:
    """Write what `magcache.load` reads, one field per line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in dataclasses.asdict(skipping).items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    cli.end(main)
