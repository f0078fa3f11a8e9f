"""Step skipping on nano: how much faster, and how far from the video that all steps would have drawn.

    python benchmarks/magcache.py            # writes benchmarks/results/magcache.md

Fewer steps are the other way to spend less; their rows tell whether skipping is worth it. Times are those of whole
generations without decoding, one prompt each, all settings in turn; the ratio is the median over the rounds.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from compare import describe_machine  # noqa: E402

from kandinsky5 import Pipeline  # noqa: E402
from kandinsky5.extras import magcache  # noqa: E402
from kandinsky5.files import write_text  # noqa: E402
from kandinsky5.nano import evaluate, judge  # noqa: E402
from random_weights import relative_error  # noqa: E402

SETTINGS = {  # what differs from 50 steps, all computed
    "50 steps": {},
    "threshold 0.03": {"threshold": 0.03},
    "threshold 0.06": {"threshold": 0.06},
    "threshold 0.12, the default": {},
    "threshold 0.24, 4 in a row": {"threshold": 0.24, "max_skips": 4},
    "threshold 0.48, 8 in a row": {"threshold": 0.48, "max_skips": 8},
    "23 steps": {"num_inference_steps": 23},
    "18 steps": {"num_inference_steps": 18},
    "15 steps": {"num_inference_steps": 15},
}
SET, SEED = "seen, English", 20_260_000  # of the judge's questions; the seed of the results that are there


def main() -> None:
    """Measure all settings and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32, help="for errors and answers (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="for times (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = Pipeline.load("nano")
    calls = {name: build_call(name, changes) for name, changes in SETTINGS.items()}
    captions = [evaluate.sample_prompt(SET, i, seed=SEED)[1] for i in range(options.clips)]

    rows, exact = {}, None
    for name, call in calls.items():
        latents = torch.cat([
            pipe([c.text for c in captions[i : i + 8]], seed=i, output_type="latents", progress=False, **call)
            for i in range(0, options.clips, 8)
        ])  # fmt: skip
        frames = torch.cat([pipe.decode(z[None]) for z in latents]).numpy()  # (B, F, H, W, 3)
        exact = (latents, frames) if exact is None else exact
        answers = [judge.score(judge.judge_clip(clip), caption) for clip, caption in zip(frames, captions, strict=True)]
        rows[name] = {
            "computed": count_computed(call),
            "error": statistics.median(map(relative_error, latents, exact[0])),
            "psnr": statistics.median(map(judge.psnr, frames, exact[1])),
            "right": statistics.mean(all(answer.values()) for answer in answers),
        }
        print(name, rows[name], flush=True)
    seconds = [{name: measure_time(pipe, call) for name, call in calls.items()} for _ in range(options.rounds + 1)][1:]
    for name, row in rows.items():
        row["ratio"] = statistics.median(times["50 steps"] / times[name] for times in seconds)
    table = build_table(rows, pipe.config.sampling.guidance_scale, options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "magcache.md", table)
    print(table)


def build_call(name: str, changes: dict) -> dict:
    """The arguments of the pipeline for one row."""
    if "steps" in name:
        return changes
    return {"step_skipping": replace(magcache.load(magcache.FOLDER / "nano.json"), **changes)}


def count_computed(call: dict) -> int:
    if "step_skipping" in call:
        return sum(not all(step) for step in magcache.plan_skips(call["step_skipping"], "nano", 50))
    return call.get("num_inference_steps", 50)


def measure_time(pipe: Pipeline, call: dict) -> float:
    start = time.perf_counter()
    pipe("a red circle moves left", output_type="latents", progress=False, **call)
    return time.perf_counter() - start


def build_table(rows: dict, guidance: float, options: argparse.Namespace) -> str:
    """Markdown, and below it where the figures come from."""
    lines = [
        f"| nano, 50 steps, guidance {guidance:g} | steps computed | faster | error of latents | PSNR | judged right |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        far = "" if name == "50 steps" else f"{row['error']:.3f} | {row['psnr']:.1f} dB"
        lines.append(
            f"| {name} | {row['computed']} | {row['ratio']:.2f} | {far or ' | '} | {100 * row['right']:.0f} % |"
        )
    machine = describe_machine(options.threads)
    return "\n".join([
        *lines,
        "",
        "Error: ‖latents − those of 50 steps‖ / ‖those of 50 steps‖, and PSNR of the frames: medians over",
        f"{options.clips} clips of the judge's set “{SET}”. Judged right: all of a clip's answers. Times: median of",
        f"{options.rounds} rounds in bf16. {machine['date']}, load {os.getloadavg()[0]:.1f}. {machine['machine']}.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
