"""What does a clip of the nano world show? Measured without learning, and compared with what a caption says.

`judge_clip` takes only the frames. It finds the background (the median pixel), the colours that stand out
from it and, for each colour and frame, place and size (moments) and shape (that of which a drawing, there and
as large, differs least); from the frames together it gets the motion (a straight line through places and
sizes). `score` then says which words of a caption are true. A clip that is not of this world (noise, a blank,
an object that vanishes, changes or jumps about) fails in at least one of them. It does not see what is thinner than
three pixels, such as a line across the background; nor, half of the times, a patch of 4 × 5; nor a ghost, so pale that
it is less than 65 from what should be there, in RGB of 0 to 255; nor that an even motion rests for a third of the time
or is jerky: frames exchanged in pairs, or four in a row that stand still, pass for it.

    python -m kandinsky5.nano.judge CHECKPOINT --prompts 300

generates with a checkpoint and writes a table of how often it did what the prompt said.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from tqdm import tqdm

from kandinsky5 import Pipeline, video_io
from kandinsky5.checkpoint import find_checkpoint, fingerprint
from kandinsky5.files import check_replaceable, write_text
from kandinsky5.nano.world import (
    AREA,
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    DIRECTIONS,
    FPS,
    RADII,
    SHAPES,
    Caption,
    Scene,
    caption,
    coverage,
    draw_scene,
    sample_scene,
)
from kandinsky5.training.loop import refusals_in_one_line

# All lengths are in units of the world's canvas, so in pixels of a 64 x 64 clip.
COLOUR_TOLERANCE = 65.0  # from the named colour, in RGB
MIN_AREA = 8  # pixels of one colour, without their rim, that count as something seen
MAX_SHAPE_ERROR = 0.10  # squared difference from the shape as drawn, as a part of its area
SHAPE_TIE = 0.01  # by so little may another shape fit better for a while; a blurred square is 0.025 from a disc
SHAPE_WINDOW = 5  # frames that are asked together for their shape
MAX_UNEXPLAINED = 8  # pixels of a frame, without their rim, that neither background nor objects account for
MOVING, STILL = 8.0, 4.0  # at least, at most so far in the whole clip; the world's slowest objects move 13
GROWING, SAME_SIZE = 1.35, 1.2  # at least, at most by this factor; the world's grow by 1.7
MAX_WANDER, MAX_WANDER_OF_TRAVEL = 1.0, 0.1  # root mean square distance from the straight line
MAX_PULSE = 0.08  # the same for the logarithm of the radius
BIG = math.sqrt(RADII["small"][1] * RADII["big"][0])


@dataclass(frozen=True)
class ObjectReport:
    """One object as measured; None stands for "none of the words fits"."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str | None  # "small" or "big"; None for an object that grows or shrinks
    rgb: tuple[float, float, float]
    shape_error: float  # squared difference from the nearest shape, as a part of its area
    position: tuple[float, float]  # x, y of the centre of mass, mean over the clip
    displacement: tuple[float, float]  # x, y from the first frame to the last
    speed: float  # units per second
    radius: float  # mean over the clip
    growth: float  # last radius / first radius


@dataclass(frozen=True)
class ClipReport:
    """What was measured in a clip. The background by name, None where it changes; its mean colour, 0 to 255."""

    background: str | None
    background_rgb: tuple[float, float, float]
    objects: tuple[ObjectReport, ...]  # those that are there in every frame
    unexplained: int  # pixels of the worst frame that differ from background and objects


def judge_clip(frames: np.ndarray, canvas: tuple[int, int] = CANVAS, fps: float = FPS) -> ClipReport:
    """Measures a clip. frames: uint8 (F, H, W, 3); canvas: of the scenes (height, width in units).

    Raises ValueError unless H and W are the same whole multiple of the canvas.
    """
    video = _in_units(frames, canvas)  # (F, H, W, 3)
    background = np.median(rearrange(video, "F H W C -> F (H W) C"), axis=1)  # (F, 3)
    names = {_nearest(BACKGROUNDS, colour) for colour in background}

    solid = _erode(_share(video, background, np.array([*COLOURS.values()])) > 0.6)  # (6, F, H, W)
    lasting = (solid.sum((2, 3)) >= MIN_AREA).all(1)  # (6,)

    # Once more with the colours as they are, not as they should be: a network's red need not be quite the world's.
    colours = np.array([np.median(video[where], axis=0) for where in solid[lasting]]).reshape(-1, 3)
    shares = _share(video, background, colours)  # (K, F, H, W)
    explained = np.broadcast_to(background[:, None, None], video.shape).copy()
    objects = []
    for colour, share in zip(colours, shares, strict=True):
        report, template = _judge_object(colour, share, fps)
        objects.append(report)
        explained += template[..., None] * (colour - background)[:, None, None]
    unexplained = _erode(_length(video - explained) > COLOUR_TOLERANCE).sum((1, 2)).max()

    return ClipReport(
        background=names.pop() if len(names) == 1 else None,
        background_rgb=tuple(background.mean(0).tolist()),
        objects=tuple(objects),
        unexplained=int(unexplained),
    )


def score(report: ClipReport, said: Caption) -> dict[str, bool]:
    """Which of the things that a caption says are true of a clip; what it does not say is not asked.

    Keys: "objects" (as many as said, all the time, and nothing else), "colour", "shape" and "motion" (of every
    object), "background", "size" and "relation" where said, and "all". Objects are matched as suits best.
    """
    seen = [*report.objects, *[None] * len(said.objects)]
    orders = list(permutations(range(len(seen)), len(said.objects)))
    results = [_score_objects([seen[i] for i in order], said) for order in orders]
    result = max(results, key=lambda answers: sum(answers.values()))
    result["objects"] = len(report.objects) == len(said.objects) and report.unexplained <= MAX_UNEXPLAINED
    if said.background:
        result["background"] = report.background == said.background
    return result | {"all": all(result.values())}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images or clips of one shape, in dB; 100 for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return min(10 * math.log10(255**2 / error), 100.0) if error else 100.0


# ---------------------------------------------------------------------------------------------- measuring


def _in_units(frames: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Averages pixels so that one is left per unit of the canvas. Returns float32 (F, H, W, 3)."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, but must be uint8 (F, H, W, 3)")
    pixels = frames.shape[1] // canvas[0]
    if pixels < 1 or frames.shape[1:3] != (canvas[0] * pixels, canvas[1] * pixels):
        raise ValueError(
            f"frames of {frames.shape[1:3]} are no whole multiple of the canvas {canvas}: give the scenes' canvas"
        )
    return reduce(frames.astype(np.float32), "F (H a) (W b) C -> F H W C", "mean", a=pixels, b=pixels)


def _nearest(palette: dict[str, tuple[int, int, int]], colour: np.ndarray) -> str | None:
    distance = {name: np.linalg.norm(colour - np.array(rgb)) for name, rgb in palette.items()}
    name = min(distance, key=lambda name: distance[name])
    return name if distance[name] <= COLOUR_TOLERANCE else None


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))  # several times as fast as np.linalg.norm


def _share(video: np.ndarray, background: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """How much of each pixel is object, if it mixes the background with the colour nearest in direction.

    video (F, H, W, 3), background (F, 3), colours (K, 3). Returns (K, F, H, W), for each colour the share, which is
    0 where another colour is nearer.
    """
    share = np.zeros((len(colours), *video.shape[:3]), dtype=np.float32)
    difference = video - background[:, None, None]
    f, y, x = np.nonzero(_length(difference) > 30)  # a few hundred pixels a frame: the rest is background
    if len(colours) and len(f):
        axes = (colours - background[:, None])[f]  # (N, K, 3)
        axes_length = _length(axes)  # (N, K)
        along = np.einsum("nkc,nc->nk", axes, difference[f, y, x]) / axes_length  # (N, K)
        k, n = along.argmax(1), np.arange(len(f))
        share[k, f, y, x] = along[n, k] / axes_length[n, k]
    return share


def _erode(mask: np.ndarray) -> np.ndarray:
    """Takes off a rim of one pixel, where a decoder's blur, not the scene, makes colours. (..., H, W) bool."""
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
    mask = mask[..., 1:-1, :] & mask[..., :-2, :] & mask[..., 2:, :]
    return mask[..., 1:-1] & mask[..., :-2] & mask[..., 2:]


def _judge_object(colour: np.ndarray, share: np.ndarray, fps: float) -> tuple[ObjectReport, np.ndarray]:
    """Measures one object from its share of each pixel, (F, H, W). Also returns it as it should look."""
    firm = np.clip(0.5 + 1.5 * (share - 0.5), 0, 1)  # noise counts neither as a bit of object nor as a hole
    area = firm.sum((1, 2)) + 1e-3  # (F,)
    grid_y, grid_x = np.indices(share.shape[1:], dtype=np.float32) + 0.5
    x = (firm * grid_x).sum((1, 2)) / area
    y = (firm * grid_y).sum((1, 2)) / area

    share = np.clip(share, 0, 1)
    rows, columns = _where_any(share, axis=1), _where_any(share, axis=2)  # the rest need not be compared
    place = grid_x[rows, columns] - x[:, None, None], grid_y[rows, columns] - y[:, None, None]
    drawn, errors, radii = {}, {}, {}
    for shape in SHAPES:
        radii[shape] = np.sqrt(area / AREA[shape])
        drawn[shape], errors[shape] = _draw_like(share[:, rows, columns], shape, *place, radii[shape])
    shape = min(SHAPES, key=lambda name: errors[name].mean())
    template = np.zeros_like(share)
    template[:, rows, columns] = drawn[shape]

    motion, displacement, growth = _judge_motion(x, y, radii[shape])
    radius = radii[shape].mean()
    report = ObjectReport(
        colour=_nearest(COLOURS, colour),
        shape=shape if _same_all_the_time(shape, errors) else None,
        motion=motion,
        size=("big" if radius > BIG else "small") if motion not in ("grow", "shrink") else None,
        rgb=tuple(colour.tolist()),
        shape_error=float(errors[shape].mean()),
        position=(float(x.mean()), float(y.mean())),
        displacement=displacement,
        speed=math.hypot(*displacement) * fps / max(len(x) - 1, 1),
        radius=float(radius),
        growth=growth,
    )
    return report, template


def _draw_like(
    share: np.ndarray, shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a shape as blurred as the clip is, so that the difference tells of the shape and not of a decoder's blur.

    Returns it, (F, H, W), and its squared difference from `share` as a part of its area, (F,).
    """
    drawn = coverage(shape, x, y, radius[:, None, None])
    candidates = []
    for _ in range(4):  # blurred by 0, 1, 2 and 3 times 1-2-1, a standard deviation of up to 1.2 pixels
        error = ((share - drawn) ** 2).sum((1, 2)) / (AREA[shape] * radius**2)
        candidates.append((drawn, error))
        drawn = _blur(drawn)
    return min(candidates, key=lambda candidate: candidate[1].mean())


def _same_all_the_time(shape: str, errors: dict[str, np.ndarray]) -> bool:
    """Whether a shape fits in every window of a few frames, and best: one frame alone may be unclear."""
    window = min(SHAPE_WINDOW, len(errors[shape]))
    means = {name: np.convolve(error, np.full(window, 1 / window), "valid") for name, error in errors.items()}
    least = np.min(list(means.values()), axis=0)
    return bool((means[shape] <= MAX_SHAPE_ERROR).all() and (means[shape] <= least + SHAPE_TIE).all())


def _judge_motion(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> tuple[str | None, tuple[float, float], float]:
    """Fits a straight line through places and sizes, (F,) each. Returns motion, displacement and growth.

    The motion is None where the line is a bad fit (frames out of order, a jump, a turn) or goes in a direction
    that is none of the world's.
    """
    if len(x) < 3:
        return None, (0.0, 0.0), 1.0
    time = np.linspace(-0.5, 0.5, len(x))
    tracks = np.stack([x, y, np.log(radius)])  # (3, F)
    slopes = tracks @ time / (time @ time)  # change from first to last frame
    misfit = tracks - tracks.mean(1, keepdims=True) - slopes[:, None] * time
    across, down, growth = float(slopes[0]), float(slopes[1]), math.exp(slopes[2])
    travel, factor = math.hypot(across, down), max(growth, 1 / growth)
    wander, pulse = np.sqrt((misfit[:2] ** 2).sum(0).mean()), np.sqrt((misfit[2] ** 2).mean())

    motion = None
    if wander <= max(MAX_WANDER, MAX_WANDER_OF_TRAVEL * travel) and pulse <= MAX_PULSE:
        if travel <= STILL and factor >= GROWING:
            motion = "grow" if growth > 1 else "shrink"
        elif travel <= STILL and factor <= SAME_SIZE:
            motion = "still"
        elif travel >= MOVING and factor <= SAME_SIZE:
            cosine = {name: (across * a + down * b) / travel for name, (a, b) in DIRECTIONS.items()}
            nearest = max(cosine, key=lambda name: cosine[name])
            motion = nearest if cosine[nearest] > math.cos(math.radians(20)) else None
    return motion, (across, down), growth


def _where_any(share: np.ndarray, axis: int) -> slice:
    """From the first to the last row or column in which there is something, and a few more."""
    found = np.flatnonzero(share.any(tuple({0, 1, 2} - {axis})))
    return slice(max(found[0] - 3, 0), found[-1] + 4) if len(found) else slice(0, 1)


def _blur(image: np.ndarray) -> np.ndarray:
    """1-2-1 in both directions, (F, H, W)."""
    image = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 4
    return (image[..., :-2] + 2 * image[..., 1:-1] + image[..., 2:]) / 4


def _score_objects(seen: list[ObjectReport | None], said: Caption) -> dict[str, bool]:
    pairs = list(zip(seen, said.objects, strict=True))
    keys = [key for key in ("colour", "shape", "motion", "size") if any(key in words for words in said.objects)]
    result = {
        key: all(thing is not None and getattr(thing, key) == words[key] for thing, words in pairs if key in words)
        for key in keys
    }
    if said.relation:
        first, second = seen
        result["relation"] = bool(first and second and _is_so(said.relation, first.position, second.position))
    return result


def _is_so(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    axis = 0 if relation in ("left of", "right of") else 1
    before = relation in ("left of", "above")
    return (second[axis] - first[axis] if before else first[axis] - second[axis]) >= MOVING


# ---------------------------------------------------------------------------------------------- examination

# Scenes are of [JUDGE_SEED, set, index]. No model was trained, tuned or chosen on them: for that, take another number.
JUDGE_SEED = 20_261_130
FIRST_FRAME_LOSS = 1.5  # dB by which the first frame may be worse than the VAE's own reconstruction of the image


@dataclass(frozen=True)
class ExamSet:
    """Scenes to be asked for, and what is done with them."""

    split: str
    num_objects: int | None
    languages: tuple[str, ...]
    task: str = "text"  # "text" or "image" to video; controls: the clip as "drawn", or after the "vae" alone


EXAM = {
    "seen, English": ExamSet("train", 1, ("english",)),
    "seen, Russian": ExamSet("train", 1, ("russian",)),
    "held out, English": ExamSet("held_out", 1, ("english",)),
    "held out, Russian": ExamSet("held_out", 1, ("russian",)),
    "two objects": ExamSet("train", 2, ("english", "russian")),
    "image to video": ExamSet("train", 1, ("english", "russian"), "image"),
    "VAE": ExamSet("all", None, ("english",), "vae"),
    "ground truth": ExamSet("all", None, ("english",), "drawn"),
}


def examine(
    pipe,
    name: str,
    num_prompts: int,
    batch_size: int = 8,
    canvas: tuple[int, int] = CANVAS,
    seed: int = JUDGE_SEED,
    **options,
) -> Iterator[dict]:
    """Generates the clips of one set of EXAM, judges them, and yields for each its text, the answers, and how many
    objects and unexplained pixels were seen.

    pipe: a `Pipeline`, asked for clips of its own size; canvas: of the scenes, which must fit that size; options:
    what else the pipe is called with, such as num_inference_steps. Clip i of a set is of the same scene, words and
    noise (seed i) in every run, whatever the batch size.
    """
    exam, sampling = EXAM[name], pipe.config.sampling
    size = {"num_frames": sampling.num_frames, "height": sampling.height, "width": sampling.width}
    options |= size | {"progress": False}
    bar = tqdm(total=num_prompts, desc=name, unit="clip")
    for first in range(0, num_prompts, batch_size):
        indices = range(first, min(first + batch_size, num_prompts))
        scenes, captions = zip(*(question(name, i, canvas, seed) for i in indices), strict=True)
        drawn = np.stack([draw_scene(scene, **size) for scene in scenes])  # (B, F, H, W, 3)
        texts = [said.text for said in captions]
        if exam.task == "drawn":
            clips = drawn
        elif exam.task == "vae":
            clips = reconstruct(pipe, drawn)
        elif exam.task == "image":
            clips = np.concatenate([
                np.asarray(pipe([text], image=clip[0], seed=i, **options))
                for text, clip, i in zip(texts, drawn, indices, strict=True)
            ])  # fmt: skip
        else:
            clips = np.asarray(pipe(texts, seed=first, **options))
        best_first_frames = reconstruct(pipe, drawn[:, :1])[:, 0] if exam.task == "image" else None
        for b, index in enumerate(indices):
            report = judge_clip(clips[b], canvas, sampling.fps)
            answers = score(report, captions[b])
            result = {"index": index, "text": texts[b], "answers": answers}
            result |= {"objects": len(report.objects), "unexplained": report.unexplained}
            if exam.task == "vae":
                result["psnr"] = psnr(clips[b], drawn[b])
            if best_first_frames is not None:  # image to video
                result["psnr"] = psnr(clips[b, 0], drawn[b, 0])
                at_best = psnr(best_first_frames[b], drawn[b, 0])
                answers["first frame"] = bool(result["psnr"] >= at_best - FIRST_FRAME_LOSS)
                answers["motion and first frame"] = answers["motion"] and answers["first frame"]
            yield result
        bar.update(len(indices))
    bar.close()


def question(name: str, index: int, canvas: tuple[int, int] = CANVAS, seed: int = JUDGE_SEED) -> tuple[Scene, Caption]:
    """Scene and caption of one clip of a set of EXAM: the same in every run."""
    exam = EXAM[name]
    rng = np.random.default_rng([seed, list(EXAM).index(name), index])
    scene = sample_scene(rng, exam.split, exam.num_objects, canvas)
    return scene, caption(scene, exam.languages[index % len(exam.languages)], rng)


def reconstruct(pipe, clips: np.ndarray) -> np.ndarray:
    """uint8 (B, F, H, W, 3) through the VAE and back, one at a time and in one piece."""
    parameter = next(pipe.vae.parameters())
    result = []
    with torch.inference_mode():
        for clip in clips:
            video = video_io.from_uint8(clip[None]).to(parameter.device, parameter.dtype)  # (1, 3, F, H, W)
            result.append(video_io.to_uint8(pipe.vae.decode(pipe.vae.encode(video).mean)).cpu().numpy())
    return np.concatenate(result)


def with_full_attention(dit):
    """The same weights without NABLA."""
    with torch.device("meta"):
        full = type(dit)(replace(dit.config, nabla=None))
    full.load_state_dict(dit.state_dict(), assign=True)
    return full.eval()


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The interval in which the true rate lies with 95 % confidence (Wilson 1927); (0, 1) where nothing was asked.

    Unlike right/asked plus or minus something it keeps sense near 0 and 1, where we hope to be.
    """
    if asked == 0:
        return 0.0, 1.0
    rate, spread = right / asked, z * z / asked
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / asked + spread / (4 * asked))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def summarise(results: list[dict]) -> dict:
    """For each answer, right of asked, the rate and its interval; and the mean PSNR."""
    rows = {}
    for name in ("all", *ANSWERS):
        answers = [result["answers"][name] for result in results if name in result["answers"]]
        if answers:
            right, asked = sum(answers), len(answers)
            rows[name] = {"right": right, "asked": asked, "rate": right / asked, "interval": wilson(right, asked)}
    ratios = [result["psnr"] for result in results if "psnr" in result]
    return {"clips": len(results), "answers": rows} | ({"psnr": float(np.mean(ratios))} if ratios else {})


ANSWERS = (
    "objects",
    "background",
    "colour",
    "shape",
    "motion",
    "size",
    "relation",
    "first frame",
    "motion and first frame",
)


def format_table(summaries: dict[str, dict]) -> str:
    """Markdown: one row a set; in per cent of the clips in which the caption said so much."""
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


def main(arguments: list[str] | None = None, load: Callable | None = None) -> None:
    """The command line; `load` stands in for `Pipeline.load` in tests.

    ValueError for a run that was not exported and for --full-attention without NABLA, OSError where the answers cannot
    be written.
    """
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m kandinsky5.nano.judge",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, or preset such as nano")
    add("--prompts", type=int, default=300, metavar="N", help="clips in each set (default: 300)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="generated at once; changes clips by rounding (default: 8)",
    )
    add("--sets", nargs="+", choices=EXAM, default=list(EXAM), metavar="SET", help="of: " + "; ".join(EXAM))
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="default: the checkpoint's")
    add("--guidance", type=float, dest="guidance_scale", metavar="W", help="default: the checkpoint's")
    add("--canvas", type=int, nargs=2, default=CANVAS, metavar=("H", "W"), help="of the scenes (default: 64 64)")
    add("--seed", type=int, default=JUDGE_SEED, help="of the scenes: for tuning, take another (default: %(default)s)")
    add("--full-attention", action="store_true", help="let a DiT with NABLA see all tokens")
    add("--device", default="cpu", help="default: cpu")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="float32", help="default: float32")
    add(
        "-o",
        "--output",
        metavar="FILE",
        help="table as .json, and as .md beside it (default: judge_CHECKPOINT.json; "
        "with full attention judge_CHECKPOINT-full-attention.json)",
    )
    args = parser.parse_args(arguments)
    counts = {"--prompts": args.prompts, "--batch-size": args.batch_size, "--steps": args.num_inference_steps}
    for option, count in counts.items():
        if count is not None and count < 1:
            parser.error(f"{option} {count} must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} must be at least 0")
    if args.output and Path(args.output).suffix not in ("", ".json"):
        parser.error(f"-o {args.output}: the answers are a .json file, with a .md beside it")

    if (Path(args.checkpoint) / "state.pt").is_file():
        raise ValueError(f"{args.checkpoint} is a run: export it first (python -m kandinsky5.nano.export)")
    name = Path(args.checkpoint).resolve().name + "-full-attention" * args.full_attention
    output = Path(args.output or f"judge_{name}.json").with_suffix(".json")
    check_replaceable(output)
    pipe = (load or Pipeline.load)(args.checkpoint, device=args.device, dtype=getattr(torch, args.dtype))
    if args.full_attention:
        if not pipe.config.dit.nabla:
            raise ValueError(f"--full-attention: {args.checkpoint} has no NABLA: leave it out")
        pipe.dit = with_full_attention(pipe.dit)
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    sampling = {name: getattr(pipe.config.sampling, name) for name in (*options, "shift")}
    sampling |= {name: value for name, value in options.items() if value is not None}
    document: dict[str, Any] = {"settings": vars(args), "sampling": sampling, "sets": {}, "mistakes": {}}
    if not load:
        document["fingerprint"] = fingerprint(find_checkpoint(args.checkpoint))
    for name in args.sets:
        results = list(examine(pipe, name, args.prompts, args.batch_size, tuple(args.canvas), args.seed, **options))
        document["sets"][name] = summarise(results)
        document["mistakes"][name] = [result for result in results if not all(result["answers"].values())]
        write_text(output, json.dumps(document, indent=1, ensure_ascii=False) + "\n")  # what there is, after each set
        write_text(output.with_suffix(".md"), format_table(document["sets"]))
    print(format_table(document["sets"]), end="")
    print(f"written to {output} and {output.with_suffix('.md').name}", file=sys.stderr)


if __name__ == "__main__":
    with refusals_in_one_line("the sets that were done are on disk; begun again, it begins with the first"):
        main()
