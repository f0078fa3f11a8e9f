"""How often does a checkpoint generate what the prompt describes? Clips of unseen scenes, scored by the judge.

    python -m kandinsky5.nano.judge nano --prompts 300

generates the clips of every set and writes two files: a table of rates (.md), and the same with settings, intervals
and all mistakes (.json).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kandinsky5 import Pipeline, cli, screen, video_io
from kandinsky5.checkpoint import find_checkpoint, fingerprint
from kandinsky5.files import check_apart, check_replaceable, write_text
from kandinsky5.nano.captions import Caption, write_caption
from kandinsky5.nano.judge import judge_clip, psnr, score
from kandinsky5.nano.world import CANVAS, NEW_MOTION, Scene, draw_scene, sample_scene
from kandinsky5.runtime.device import choose_device, choose_dtype

# Scenes are seeded with [JUDGE_SEED, set, index]. No model was trained, tuned or chosen on them: use another for that.
JUDGE_SEED = 20_261_130
FIRST_FRAME_LOSS = 1.5  # dB by which the first frame may be worse than the VAE's own reconstruction of the image


@dataclass(frozen=True)
class EvaluationSet:
    """Which scenes are prompted for, and how the clips are made."""

    split: str
    num_objects: int | None
    languages: tuple[str, ...]
    # "text" or "image" to video, or text to a "frame" alone; controls: the "drawn" clip, or what the "vae" makes of it
    task: str = "text"


SETS = {
    "seen, English": EvaluationSet("train", 1, ("english",)),
    "seen, Russian": EvaluationSet("train", 1, ("russian",)),
    "held out, English": EvaluationSet("held_out", 1, ("english",)),
    "held out, Russian": EvaluationSet("held_out", 1, ("russian",)),
    "two objects": EvaluationSet("train", 2, ("english", "russian")),
    "image to video": EvaluationSet("train", 1, ("english", "russian"), "image"),
    "VAE": EvaluationSet("all", None, ("english",), "vae"),
    "ground truth": EvaluationSet("all", None, ("english",), "drawn"),
    "bounce": EvaluationSet(NEW_MOTION, 1, ("english",)),  # nano does not know it; a LoRA can (docs/teach-a-word.md)
    "one frame": EvaluationSet("train", 1, ("english", "russian"), "frame"),  # nano as text-to-image: no motion
}
DEFAULT_SETS = [name for name in SETS if name not in ("bounce", "one frame")]
ANSWERS = (
    "objects", "background", "colour", "shape", "motion", "size", "relation", "first frame", "motion and first frame",
)  # fmt: skip


def evaluate(
    pipe, name: str, num_prompts: int, batch_size: int = 8, canvas: tuple[int, int] = CANVAS, seed: int = JUDGE_SEED,
    **options,
) -> Iterator[dict]:  # fmt: skip
    """Generate the clips of one set of SETS and judge them.

    pipe: a `Pipeline`, called with its own size; canvas: of the scenes, which must fit that size; options: what else
    the pipe is called with, such as num_inference_steps. Clip i of a set has the same scene, caption and noise (seed i)
    in every run, whatever the batch size. Yields per clip its index, text, answers, and the objects and unexplained
    pixels found.
    """
    task, sampling = SETS[name].task, pipe.config.sampling
    num_frames = 1 if task == "frame" else sampling.num_frames
    size = {"num_frames": num_frames, "height": sampling.height, "width": sampling.width}
    options |= size | {"progress": False}
    bar = screen.bar(num_prompts, name, "clip")
    for first in range(0, num_prompts, batch_size):
        indices = range(first, min(first + batch_size, num_prompts))
        scenes, captions = zip(*(sample_prompt(name, i, canvas, seed) for i in indices), strict=True)
        drawn = np.stack([draw_scene(scene, **size) for scene in scenes])  # (B, F, H, W, 3)
        clips = _generate(pipe, task, [caption.text for caption in captions], drawn, indices, options)
        best_first_frames = reconstruct(pipe.vae, drawn[:, :1])[:, 0] if task == "image" else None
        for b, index in enumerate(indices):
            report = judge_clip(clips[b], canvas, sampling.fps)
            answers = score(report, captions[b])
            if task == "frame":
                answers = {name: right for name, right in answers.items() if name not in ("motion", "all")}
                answers["all"] = all(answers.values())
            result = {"index": index, "text": captions[b].text, "answers": answers}
            result |= {"objects": len(report.objects), "unexplained": report.unexplained}
            if task == "vae":
                result["psnr"] = psnr(clips[b], drawn[b])
            if best_first_frames is not None:  # image to video
                result["psnr"] = psnr(clips[b, 0], drawn[b, 0])
                at_best = psnr(best_first_frames[b], drawn[b, 0])
                answers["first frame"] = bool(result["psnr"] >= at_best - FIRST_FRAME_LOSS)
                answers["motion and first frame"] = answers["motion"] and answers["first frame"]
            yield result
        bar.update(len(indices))
    bar.close()


def _generate(pipe, task: str, texts: list[str], drawn: np.ndarray, indices: range, options: dict) -> np.ndarray:
    """The clips of a batch, uint8 (B, F, H, W, 3)."""
    if task == "drawn":
        return drawn
    if task == "vae":
        return reconstruct(pipe.vae, drawn)
    if task in ("text", "frame"):
        return np.asarray(pipe(texts, seed=indices.start, **options))
    one_by_one = zip(texts, drawn, indices, strict=True)
    return np.concatenate([np.asarray(pipe([text], image=clip[0], seed=i, **options)) for text, clip, i in one_by_one])


def sample_prompt(
    name: str, index: int, canvas: tuple[int, int] = CANVAS, seed: int = JUDGE_SEED
) -> tuple[Scene, Caption]:
    """Scene and caption of one clip of a set of SETS: the same in every run."""
    chosen = SETS[name]
    rng = np.random.default_rng([seed, list(SETS).index(name), index])
    scene = sample_scene(rng, chosen.split, chosen.num_objects, canvas)
    return scene, write_caption(scene, chosen.languages[index % len(chosen.languages)], rng)


@torch.no_grad()
def reconstruct(vae, clips: np.ndarray) -> np.ndarray:
    """uint8 (B, F, H, W, 3) through the VAE and back, by the posterior's mean; clip by clip, each in one piece."""
    parameter = next(vae.parameters())
    result = []
    for clip in clips:
        video = video_io.from_uint8(clip[None]).to(parameter.device, parameter.dtype)  # (1, 3, F, H, W)
        result.append(video_io.to_uint8(vae.decode(vae.encode(video).mean)).cpu().numpy())
    return np.concatenate(result)


# ---------------------------------------------------------------------------------------------- rates


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson 1927); (0, 1) where total is 0.

    Unlike right/total plus or minus something it stays meaningful near 0 and 1, where we hope to be.
    """
    if total == 0:
        return 0.0, 1.0
    rate, spread = right / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def summarise(results: list[dict]) -> dict:
    """Correct and requested ("asked") answers of each kind, their rate and its interval; the mean PSNR."""
    rows = {}
    for name in ("all", *ANSWERS):
        answers = [result["answers"][name] for result in results if name in result["answers"]]
        if answers:
            right, total = sum(answers), len(answers)
            rows[name] = {"right": right, "asked": total, "rate": right / total, "interval": wilson(right, total)}
    ratios = [result["psnr"] for result in results if "psnr" in result]
    return {"clips": len(results), "answers": rows} | ({"psnr": float(np.mean(ratios))} if ratios else {})


def format_table(summaries: dict[str, dict]) -> str:
    """Markdown, one row per set; percentages of the clips whose caption mentions the property."""
    lines = ["| set | clips | all right | 95 % interval | " + " | ".join(ANSWERS) + " | PSNR, dB |"]
    lines.append("|---" * (len(ANSWERS) + 5) + "|")
    for name, summary in summaries.items():
        low, high = summary["answers"]["all"]["interval"]
        cells = [name, str(summary["clips"]), _percent(summary, "all"), f"{100 * low:.1f} to {100 * high:.1f}"]
        cells += [_percent(summary, answer) for answer in ANSWERS]
        cells += [f"{summary['psnr']:.1f}" if "psnr" in summary else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(summary: dict, answer: str) -> str:
    return f"{100 * summary['answers'][answer]['rate']:.1f}" if answer in summary["answers"] else ""


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None, load: Callable | None = None) -> None:
    """The command line; tests pass a `load` instead of `Pipeline.load`.

    Raises ValueError for a run that was not exported and for --full-attention without NABLA, OSError if the results
    cannot be written.
    """
    args = _parse(arguments)
    if (Path(args.checkpoint) / "state.pt").is_file():
        raise ValueError(f"{args.checkpoint} is a run: export it first (python -m kandinsky5.nano.export)")
    name = Path(args.checkpoint).resolve().name + "-full-attention" * args.full_attention
    output = Path(args.output or f"judge_{name}.json").with_suffix(".json")
    outputs = {"-o": output, "the table of -o": output.with_suffix(".md")}
    check_apart(outputs, {"CHECKPOINT": args.checkpoint} | {f"--lora {one['file']}": one["file"] for one in args.loras})
    check_replaceable(output)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    pipe = (load or Pipeline.load)(args.checkpoint, device=device, dtype=dtype)
    if args.full_attention:
        if not pipe.dit.config.nabla:
            raise ValueError(f"--full-attention: {args.checkpoint} has no NABLA: leave it out")
        pipe.dit.config = replace(pipe.dit.config, nabla=None)
    for one in args.loras:
        pipe.load_lora(one["file"], one["weight"])
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    sampling = {name: getattr(pipe.config.sampling, name) for name in (*options, "shift")}
    sampling |= {name: value for name, value in options.items() if value is not None}
    settings = vars(args) | {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    document: dict[str, Any] = {"settings": settings, "sampling": sampling, "sets": {}, "mistakes": {}}
    if not load:
        document["fingerprint"] = fingerprint(find_checkpoint(args.checkpoint))
    for name in args.sets:
        results = list(evaluate(pipe, name, args.prompts, args.batch_size, tuple(args.canvas), args.seed, **options))
        document["sets"][name] = summarise(results)
        document["mistakes"][name] = [result for result in results if not all(result["answers"].values())]
        write_text(output, json.dumps(document, indent=1, ensure_ascii=False) + "\n")  # after each set
        write_text(output.with_suffix(".md"), format_table(document["sets"]))
    print(format_table(document["sets"]), end="")
    print(f"written to {output} and {output.with_suffix('.md').name}", file=sys.stderr)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options. Raises ValueError for invalid ones."""
    parser = cli.Parser(cli.program("kandinsky5.nano.judge"), description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, or preset such as nano")
    add("--prompts", type=cli.positive, default=300, metavar="N", help="clips per set (default: 300)")
    add("--batch-size", type=cli.positive, default=8, metavar="N",
        help="clips generated at once; changes clips by rounding (default: 8)")  # fmt: skip
    add("--sets", nargs="+", choices=SETS, default=DEFAULT_SETS, metavar="SET", help="of: " + "; ".join(SETS))
    add("--steps", type=cli.positive, dest="num_inference_steps", metavar="N", help="default: the checkpoint's")
    add("--guidance", type=float, dest="guidance_scale", metavar="W", help="default: the checkpoint's")
    add("--canvas", type=int, nargs=2, default=CANVAS, metavar=("H", "W"), help="of the scenes (default: 64 64)")
    add("--seed", type=int, default=JUDGE_SEED, help="of the scenes; use another for tuning (default: %(default)s)")
    add("--full-attention", action="store_true", help="let a DiT with NABLA attend to all tokens")
    add("--lora", action="append", default=[], dest="loras", type=cli.lora_file, metavar="FILE[:WEIGHT]",
        help="judge the checkpoint with a LoRA; may be repeated (default weight: 1)")  # fmt: skip
    add("--device", default="auto", help="default: auto, a GPU if there is one")
    add("--dtype", choices=cli.DTYPES, default="auto", help="default: auto, bfloat16 where it is native, else float32")
    add("-o", "--output", metavar="FILE",
        help="table as .json, and as .md next to it (default: judge_CHECKPOINT[-full-attention].json)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed {args.seed} must be at least 0")
    if args.output and Path(args.output).suffix not in ("", ".json"):
        parser.error(f"-o {args.output}: the results are a .json file, with a .md next to it")
    return args
