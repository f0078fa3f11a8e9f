"""What weights in 8 bits, and in 4, change and cost: velocity, frames, the judge's verdict, CPU seconds.

    python benchmarks/quantise.py                     # all parts into benchmarks/results/quantise.json and .svg
    python benchmarks/quantise.py nano --clips 300    # one part; the figures of the others stay

nano:   the same prompts and noise through nano with each kind of weights, compared frame by frame
judge:  nano in int8 and bf16 before the judge, next to its verdict on bf16 in docs/judge
blocks: 32 visual blocks of Lite's width, heavy-tailed random weights: how the error grows from block to block
text:   a random Qwen over the real vocabulary, whose features go into a random DiT
speed:  a visual block of Lite's width at 2,688 tokens, in alternating pairs; CPU seconds, so others may run

NF4 (normal floats of 4 bits, blocks of 64) is computed here alone: docs/quantisation.md says why it is not offered.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from compare import describe_machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kandinsky5 import Pipeline  # noqa: E402
from kandinsky5.config import LITE, QwenConfig, TextConfig  # noqa: E402
from kandinsky5.dit import DiT  # noqa: E402
from kandinsky5.files import write_json  # noqa: E402
from kandinsky5.nano import evaluate, judge  # noqa: E402
from kandinsky5.qwen import Qwen  # noqa: E402
from kandinsky5.runtime import fast, kernels  # noqa: E402
from kandinsky5.runtime.quantize import linears, to_int8  # noqa: E402
from random_weights import load_tokenizers, relative_error  # noqa: E402

SETS = ["seen, English", "held out, Russian", "two objects"]
RESULTS = Path(__file__).parent / "results"
VIDEO = (7, 24, 16)  # tokens of the speed row: 2,688
PROMPTS = ["A red fox runs through deep snow, the camera follows it.", "Кот спит на окне.", "a city at night, rain"]


def main() -> None:
    """Run the parts that are named, or all, and write the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--clips", type=int, default=40, help="for frames (default: 40 of each set)")
    parser.add_argument("--prompts", type=int, default=300, help="for the judge (default: 300 of each set)")
    parser.add_argument("--sets", nargs="+", default=SETS, help="for the judge; the others keep their figures")
    parser.add_argument("--pairs", type=int, default=7, help="for times (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "quantise.json"
    for part in options.parts or PARTS:
        measured = PARTS[part](options) | describe_machine(1)
        found = json.loads(path.read_text()) if path.exists() else {}  # now, as another run may have written it
        found[part] = found.get(part, {}) | measured
        write_json(path, found)
        print(part, json.dumps(found[part], indent=1))
    if "blocks" in found:
        draw(found["blocks"]["errors"], RESULTS / "quantise.svg")


# ---------------------------------------------------------------------------------------------- kinds of weights


def to_nf4(model: nn.Module) -> nn.Module:
    """Round the same Linears to NF4, 16 values at quantiles of the normal distribution, and keep them as they were."""
    for _, linear in linears(model):
        blocks = linear.weight.detach().float().unflatten(-1, (-1, 64))
        scale = blocks.abs().amax(-1, keepdim=True)
        places = torch.bucketize(blocks / scale, (LEVELS[1:] + LEVELS[:-1]) / 2)
        linear.weight = nn.Parameter((LEVELS[places] * scale).flatten(-2).type_as(linear.weight), requires_grad=False)
    return model


def normal_levels() -> Tensor:
    """QLoRA's 16 levels (arXiv 2305.14314): 0, 7 quantiles below it and 8 above, scaled to ±1."""
    offset = 0.9677083  # halfway between 1 − 1/32 and 1 − 1/30
    quantile = torch.distributions.Normal(0, 1).icdf
    above, below = quantile(torch.linspace(offset, 0.5, 9))[:-1], -quantile(torch.linspace(offset, 0.5, 8))[:-1]
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    return levels / levels.max()


LEVELS = normal_levels()


def heavy_tailed(model: nn.Module, seed: int) -> nn.Module:
    """Random weights by Student's t with 4 degrees of freedom, of the size that keeps what they multiply."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise(*parameter.shape) + name.endswith("norm.weight"))
                continue
            squares = sum(noise(*parameter.shape).square_() for _ in range(4)) / 4
            parameter.copy_(noise(*parameter.shape) / (2 * squares * parameter.shape[1]).sqrt())  # variance 2 → 1
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- parts


def measure_nano(options) -> dict:
    """PSNR of the frames and errors of the velocity of nano with each kind of weights."""
    kinds = {
        "float32": ("float32", None),
        "float32, int8": ("float32", "int8"),
        "bfloat16": ("bfloat16", None),
        "bfloat16, int8": ("bfloat16", "int8"),
    }
    pipes = {name: Pipeline.load("nano", "cpu", dtype, quantize=kind) for name, (dtype, kind) in kinds.items()}
    pipes["float32, Qwen in NF4"] = Pipeline.load("nano", "cpu", "float32")
    to_nf4(pipes["float32, Qwen in NF4"].text_encoder.qwen)
    exact, found = pipes["float32"], {}
    decibels: dict[str, list[float]] = {name: [] for name in pipes if name != "float32"}
    for chosen in ("seen, English", "two objects"):
        for first in range(0, options.clips, 10):
            texts = [evaluate.sample_prompt(chosen, i)[1].text for i in range(first, min(first + 10, options.clips))]
            clips = {name: pipe(texts, seed=first, progress=False).numpy() for name, pipe in pipes.items()}
            for name, row in decibels.items():
                near = clips["bfloat16" if name == "bfloat16, int8" else "float32"]
                row += [judge.psnr(a, b) for a, b in zip(clips[name], near, strict=True)]
    for name, row in decibels.items():
        found[name] = {"psnr": statistics.median(row)}
        found[name]["velocity"] = velocity_errors(exact, pipes[name])
    return {"clips": 2 * options.clips, "kinds": found}


def measure_judge(options) -> dict:
    """Per cent of clips of each set that the judge calls right, and on how many its verdict on bf16 was another."""
    pipe, before, found = Pipeline.load("nano", "cpu", "bfloat16", quantize="int8"), {}, {}
    stored = json.loads((ROOT / "docs" / "judge" / "judge_nano.json").read_text())
    for name in options.sets:
        wrong = {clip["index"] for clip in stored["mistakes"].get(name, []) if not clip["answers"]["all"]}
        clips = list(evaluate.evaluate(pipe, name, options.prompts))
        now = {clip["index"] for clip in clips if not clip["answers"]["all"]}
        before = {index for index in wrong if index < len(clips)}
        percent = {kind: 100 - 100 * len(some) / len(clips) for kind, some in (("bf16", before), ("int8", now))}
        found[name] = percent | {"clips": len(clips), "other verdicts": len(now ^ before)}
    return found


@torch.no_grad()
def velocity_errors(exact: Pipeline, pipe: Pipeline) -> dict:
    """Relative error of the velocity of four clips at three times, everything but the weights alike."""
    texts = [evaluate.sample_prompt("two objects", i)[1].text for i in range(4)]
    latents = exact(texts, output_type="latents", progress=False)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    features = [one.text_encoder.encode(texts) for one in (exact, pipe)]
    errors = {}
    for t in (0.9, 0.5, 0.1):
        x = (1 - t) * latents + t * noise
        x = torch.cat([x, exact.build_condition(x, None)], dim=-1)
        times = torch.full((4,), t)
        scale = exact.config.sampling.rope_scale
        a, b = (
            one.predict(x.to(one.dtype), text, times, scale) for one, text in zip((exact, pipe), features, strict=True)
        )
        errors[str(t)] = relative_error(b, a)
    return errors


@torch.no_grad()
def measure_blocks(options) -> dict:
    """‖x' − x‖ / ‖x‖ of the tokens after each of 32 visual blocks, next to float32."""
    config = replace(LITE, num_text_blocks=0, num_visual_blocks=1)
    grid, generator = (2, 16, 16), torch.Generator().manual_seed(0)
    first = torch.randn(1, math.prod(grid), config.dim, generator=generator)
    text, vec = (torch.randn(1, n, generator=generator) for n in (60 * config.dim, config.time_dim))
    text = text.view(1, 60, config.dim)
    rotations = DiT.rotate_video(config, grid, (1.0, 2.0, 2.0), torch.device("cpu"))
    x = {"float32": first, "float32, int8": first, "bfloat16": first.bfloat16(), "bfloat16, int8": first.bfloat16()}
    x["float32, NF4"] = first
    errors: dict = {name: [] for name in x if name != "float32"}
    models: list[dict[str, nn.Module]] = []
    for seed in range(4):  # distinct blocks, which take turns
        plain = heavy_tailed(DiT(config), seed)
        plain.visual_blocks[0].modulation.linear.weight.mul_(0.3)  # as trained ones, gates and scales below 1
        models.append({name: build_kind(name, plain).visual_blocks[0] for name in x})
    for i in range(LITE.num_visual_blocks):
        for name, block in models[i % 4].items():
            x[name] = block(x[name], text.to(x[name].dtype), vec, rotations, None, None, grid)
        for name, row in errors.items():
            row.append(relative_error(x[name].float(), x["float32"]))
    return {"tokens": math.prod(grid), "errors": errors}


def build_kind(name: str, model: nn.Module) -> nn.Module:
    """A copy with the weights that the name of a row says."""
    model = copy.deepcopy(model)
    model = to_int8(model) if "int8" in name else to_nf4(model) if "NF4" in name else model
    return model.to(torch.bfloat16 if name.startswith("bfloat16") else torch.float32)


@torch.no_grad()
def measure_text(options) -> dict:
    """Errors of a random Qwen's features of real prompts, and of a random DiT's velocity that reads them."""
    sizes = QwenConfig(dim=1024, num_layers=12, num_heads=8, num_kv_heads=2, ff_dim=4096)
    config = replace(LITE, num_text_blocks=2, num_visual_blocks=4, text_dim=sizes.dim)
    qwen, dit, tokenizer = heavy_tailed(Qwen(sizes), 1), heavy_tailed(DiT(config), 2), load_tokenizers()[0]
    template = TextConfig()
    found: dict = {}
    for name, change in {"exact": lambda m: m, "int8": to_int8, "NF4": to_nf4}.items():
        model, features, velocities = change(copy.deepcopy(qwen)), [], []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(template.template.replace("{}", prompt))])
            text = model(ids)[:, template.dropped_tokens :]
            generator = torch.Generator().manual_seed(0)
            x, pooled = (torch.randn(s, generator=generator) for s in ((1, 2, 16, 16, 33), (1, config.pooled_dim)))
            features.append(text.flatten())
            velocities.append(dit(x, text, pooled, torch.tensor([0.7]), rope_scale=(1.0, 2.0, 2.0)).flatten())
        found[name] = torch.cat(features), torch.cat(velocities)
    rows = {
        name: {"features": relative_error(a, found["exact"][0]), "velocity": relative_error(b, found["exact"][1])}
        for name, (a, b) in found.items()
        if name != "exact"
    }
    return {"prompts": len(PROMPTS), "errors": rows}


@torch.no_grad()
def measure_speed(options) -> dict:
    """CPU seconds of one visual block of Lite's width, and of its int8 form next to it."""
    config = replace(LITE, num_text_blocks=0, num_visual_blocks=1)
    plain, tokens, found = heavy_tailed(DiT(config), 0), math.prod(VIDEO), {}
    rotations = DiT.rotate_video(config, VIDEO, (1.0, 2.0, 2.0), torch.device("cpu"))
    vec = torch.randn(1, config.time_dim)
    for dtype in (torch.bfloat16, torch.float32):
        pair = [copy.deepcopy(plain).to(dtype), to_int8(copy.deepcopy(plain)).to(dtype)]
        for dit in pair:
            fast.install(dit)
            kernels.install(dit, "auto")
        x, text = (torch.randn(1, n, config.dim).to(dtype) for n in (tokens, 200))
        seconds: list[list[float]] = [[], []]
        for i in range(options.pairs + 1):
            for which in (0, 1) if i % 2 else (1, 0):
                start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
                pair[which].visual_blocks[0](x, text, vec, rotations, None, None, VIDEO)
                if i:  # the first warms up
                    seconds[which].append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - start)
        ratios = [b / a for a, b in zip(*seconds, strict=True)]
        found[str(dtype).removeprefix("torch.")] = {
            "plain": statistics.median(seconds[0]),
            "int8": statistics.median(seconds[1]),
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    return {"tokens": tokens, "pairs": options.pairs, "seconds": found}


def draw(errors: dict[str, list[float]], path: Path) -> None:
    """The plot of the part "blocks"."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kandinsky5"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), [100 * value for value in values], label=name, marker=".")
    axes.set(xlabel="visual block", ylabel="error of the tokens, %", yscale="log", xlim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, metadata={"Date": None})


PARTS = {
    "nano": measure_nano,
    "judge": measure_judge,
    "blocks": measure_blocks,
    "text": measure_text,
    "speed": measure_speed,
}


if __name__ == "__main__":
    main()
