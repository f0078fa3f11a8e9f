"""What does a clip of the nano world show? Measured by rules, without learning, and compared with a caption.

    python -m kandinsky5.nano.judge CHECKPOINT    # evaluates a checkpoint: evaluate.py

`judge_clip` takes only the frames. It finds the background (the median pixel), the colours that stand out from it and,
for each colour and frame, position and size (moments) and shape (that whose drawing, there and as large, differs
least); all frames together give the motion (a straight line through positions and sizes, or one up and down again).
`score` then says which words of a caption are true. A clip that is not of this world (noise, a blank, an object that
vanishes, changes or jumps) fails in at least one of them.

Its limits: it does not see what is thinner than three pixels, such as a line across the background; half of the
patches of 4 × 5; a ghost so pale that it is less than 65 from what should be there, in RGB of 0 to 255; nor that a
steady motion rests for a third of the time or is jerky: frames exchanged in pairs, or four in a row that stand still,
pass for it; nor that what bounces rests at the top for a few frames.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from einops import rearrange, reduce

from kandinsky5.nano.captions import Caption
from kandinsky5.nano.world import (
    AREA,
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    DIRECTIONS,
    FPS,
    NEW_MOTION,
    RADII,
    SHAPES,
    coverage,
    progress,
)

# All lengths are in units of the world's canvas, so in pixels of a 64 x 64 clip.
COLOUR_TOLERANCE = 65.0  # from the named colour, in RGB
MIN_AREA = 8  # pixels of one colour, without their rim, that count as an object
MAX_SHAPE_ERROR = 0.10  # squared difference from the shape as drawn, as a share of its area
SHAPE_TIE = 0.01  # by which another shape may fit better for a while; a blurred square is 0.025 from a disc
SHAPE_WINDOW = 5  # frames whose shape is decided together
MAX_UNEXPLAINED = 8  # pixels of a frame, without their rim, that neither background nor objects explain
MOVING, STILL = 8.0, 4.0  # at least, at most, in the whole clip; the world's slowest objects move 13
GROWING, SAME_SIZE = 1.35, 1.2  # at least, at most by this factor; the world's grow by 1.7
MAX_WANDER, MAX_WANDER_OF_TRAVEL = 1.0, 0.1  # root mean square distance from the straight line
MAX_PULSE = 0.08  # the same for the logarithm of the radius
BIG = math.sqrt(RADII["small"][1] * RADII["big"][0])


@dataclass(frozen=True)
class ObjectReport:
    """One object as measured; None: no word fits."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str | None  # "small" or "big"; None for an object that grows or shrinks
    rgb: tuple[float, float, float]
    shape_error: float  # squared difference from the nearest shape, as a share of its area
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
    objects: tuple[ObjectReport, ...]  # those present in every frame
    unexplained: int  # pixels of the worst frame that neither background nor objects explain


def judge_clip(frames: np.ndarray, canvas: tuple[int, int] = CANVAS, fps: float = FPS) -> ClipReport:
    """Measure a clip. frames: uint8 (F, H, W, 3); canvas: of the scenes (height, width in units).

    Raises ValueError unless H and W are the same whole multiple of the canvas.
    """
    video = _in_units(frames, canvas)  # (F, H, W, 3)
    background = np.median(rearrange(video, "F H W C -> F (H W) C"), axis=1)  # (F, 3)
    names = {_nearest(BACKGROUNDS, colour) for colour in background}

    solid = _erode(_share(video, background, np.array([*COLOURS.values()])) > 0.6)  # (6, F, H, W)
    lasting = (solid.sum((2, 3)) >= MIN_AREA).all(1)  # (6,)

    # Again with the colours as they are, not as they should be: a network's red need not be quite the world's.
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


def score(report: ClipReport, caption: Caption) -> dict[str, bool]:
    """Which claims of a caption are true of a clip; what the caption leaves out is not judged.

    Keys: "objects" (as many as claimed, in every frame, and nothing else), "colour", "shape" and "motion" (of every
    object), "background", "size" and "relation" where claimed, and "all". Objects are matched as fits best.
    """
    seen = [*report.objects, *[None] * len(caption.objects)]
    orders = list(permutations(range(len(seen)), len(caption.objects)))
    results = [_score_objects([seen[i] for i in order], caption) for order in orders]
    result = max(results, key=lambda answers: sum(answers.values()))
    result["objects"] = len(report.objects) == len(caption.objects) and report.unexplained <= MAX_UNEXPLAINED
    if caption.background:
        result["background"] = report.background == caption.background
    return result | {"all": all(result.values())}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images or clips of one shape, in dB; 100 for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return min(10 * math.log10(255**2 / error), 100.0) if error else 100.0


# ---------------------------------------------------------------------------------------------- measuring


def _in_units(frames: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Average pixels so that one is left per unit of the canvas: float32 (F, H, W, 3)."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, but must be uint8 (F, H, W, 3)")
    pixels = frames.shape[1] // canvas[0]
    if pixels < 1 or frames.shape[1:3] != (canvas[0] * pixels, canvas[1] * pixels):
        raise ValueError(
            f"frames of {frames.shape[1:3]} are not a whole multiple of the canvas {canvas}: pass the scenes' canvas"
        )
    return reduce(frames.astype(np.float32), "F (H a) (W b) C -> F H W C", "mean", a=pixels, b=pixels)


def _nearest(palette: dict[str, tuple[int, int, int]], colour: np.ndarray) -> str | None:
    distance = {name: np.linalg.norm(colour - np.array(rgb)) for name, rgb in palette.items()}
    name = min(distance, key=lambda name: distance[name])
    return name if distance[name] <= COLOUR_TOLERANCE else None


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))  # several times as fast as np.linalg.norm


def _share(video: np.ndarray, background: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The share of each pixel that is object, if it mixes the background with the colour nearest in direction.

    video (F, H, W, 3), background (F, 3), colours (K, 3). Returns (K, F, H, W), for each colour its share, 0 where
    another colour is nearer.
    """
    share = np.zeros((len(colours), *video.shape[:3]), dtype=np.float32)
    difference = video - background[:, None, None]
    f, y, x = np.nonzero(_length(difference) > 30)  # a few hundred pixels per frame: the rest is background
    if len(colours) and len(f):
        axes = (colours - background[:, None])[f]  # (N, K, 3)
        axes_length = _length(axes)  # (N, K)
        along = np.einsum("nkc,nc->nk", axes, difference[f, y, x]) / axes_length  # (N, K)
        k, n = along.argmax(1), np.arange(len(f))
        share[k, f, y, x] = along[n, k] / axes_length[n, k]
    return share


def _erode(mask: np.ndarray) -> np.ndarray:
    """Remove a rim of one pixel, where a decoder's blur, not the scene, makes colours. (..., H, W) bool."""
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
    mask = mask[..., 1:-1, :] & mask[..., :-2, :] & mask[..., 2:, :]
    return mask[..., 1:-1] & mask[..., :-2] & mask[..., 2:]


def _judge_object(colour: np.ndarray, share: np.ndarray, fps: float) -> tuple[ObjectReport, np.ndarray]:
    """Measure one object from its share of each pixel, (F, H, W); also returns it as it should look."""
    firm = np.clip(0.5 + 1.5 * (share - 0.5), 0, 1)  # noise is neither a bit of object nor a hole
    area = firm.sum((1, 2)) + 1e-3  # (F,)
    grid_y, grid_x = np.indices(share.shape[1:], dtype=np.float32) + 0.5
    x = (firm * grid_x).sum((1, 2)) / area
    y = (firm * grid_y).sum((1, 2)) / area

    share = np.clip(share, 0, 1)
    rows, columns = _where_any(share, axis=1), _where_any(share, axis=2)  # the rest is the same
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
    """A shape drawn as blurred as the clip, so that the difference is due to the shape and not to a decoder's blur.

    Returns it, (F, H, W), and its squared difference from `share` as a share of its area, (F,).
    """
    drawn = coverage(shape, x, y, radius[:, None, None])
    candidates = []
    for times in range(4):  # blurred so often by 1-2-1, a standard deviation of up to 1.2 pixels
        drawn = _blur(drawn) if times else drawn
        error = ((share - drawn) ** 2).sum((1, 2)) / (AREA[shape] * radius**2)
        candidates.append((drawn, error))
    return min(candidates, key=lambda candidate: candidate[1].mean())


def _same_all_the_time(shape: str, errors: dict[str, np.ndarray]) -> bool:
    """Whether a shape fits, and fits best, in every window of a few frames: a single frame may be ambiguous."""
    window = min(SHAPE_WINDOW, len(errors[shape]))
    means = {name: np.convolve(error, np.full(window, 1 / window), "valid") for name, error in errors.items()}
    least = np.min(list(means.values()), axis=0)
    return bool((means[shape] <= MAX_SHAPE_ERROR).all() and (means[shape] <= least + SHAPE_TIE).all())


def _judge_motion(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> tuple[str | None, tuple[float, float], float]:
    """Fit a straight line through positions and sizes, (F,) each; returns motion, displacement and growth.

    The motion is None if the line fits badly (frames out of order, a jump, a turn that is no bounce) or has a direction
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
    elif pulse <= MAX_PULSE and factor <= SAME_SIZE and _bounces(tracks[:2]):
        motion = NEW_MOTION
    return motion, (across, down), growth


def _bounces(places: np.ndarray) -> bool:
    """Whether x and y, (2, F), go up from the first frame on and come down again, evenly."""
    way = progress(NEW_MOTION, np.linspace(0, 1, places.shape[1]))
    way -= way.mean()
    places = places - places.mean(1, keepdims=True)
    across, down = places @ way / (way @ way)  # from the lowest place to the highest
    wander = np.sqrt(((places - np.outer((across, down), way)) ** 2).sum(0).mean())
    travel = -2 * down  # there and back
    return bool(down <= -MOVING and abs(across) <= STILL and wander <= max(MAX_WANDER, MAX_WANDER_OF_TRAVEL * travel))


def _where_any(share: np.ndarray, axis: int) -> slice:
    """From the first to the last row or column that is not empty, and a few more."""
    found = np.flatnonzero(share.any(tuple({0, 1, 2} - {axis})))
    return slice(max(found[0] - 3, 0), found[-1] + 4) if len(found) else slice(0, 1)


def _blur(image: np.ndarray) -> np.ndarray:
    """1-2-1 in both directions, (F, H, W)."""
    image = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 4
    return (image[..., :-2] + 2 * image[..., 1:-1] + image[..., 2:]) / 4


def _score_objects(seen: list[ObjectReport | None], caption: Caption) -> dict[str, bool]:
    pairs = list(zip(seen, caption.objects, strict=True))
    keys = [key for key in ("colour", "shape", "motion", "size") if any(key in words for words in caption.objects)]
    result = {
        key: all(obj is not None and getattr(obj, key) == words[key] for obj, words in pairs if key in words)
        for key in keys
    }
    if caption.relation:
        first, second = seen
        result["relation"] = bool(first and second and _is_so(caption.relation, first.position, second.position))
    return result


def _is_so(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    axis = 0 if relation in ("left of", "right of") else 1
    before = relation in ("left of", "above")
    return (second[axis] - first[axis] if before else first[axis] - second[axis]) >= MOVING


if __name__ == "__main__":
    import sys

    from kandinsky5 import cli
    from kandinsky5.nano.evaluate import main

    sys.exit(cli.run(main, "the finished sets are on disk; run again, it starts with the first"))
