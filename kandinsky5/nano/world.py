"""The nano world: flat shapes that move on a plain background, drawn from a seed. Nothing here knows of a network.

    seed ──sample_scene──> Scene ──draw_scene──> clip, uint8 (F, H, W, 3)

Scenes are independent of pixels and frames. Lengths are in units of a canvas of 64 × 64: one unit is one pixel of a
64 × 64 clip and two of a 128 × 128 clip, in which everything is twice as large. Time runs from 0 at the first frame to
1 at the last: a motion fills the clip however many frames it has. For a larger world in which objects keep their size
in pixels, give `sample_scene` a larger `canvas`. x grows to the right and y downwards from the top left corner.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")

CANVAS = (64, 64)  # height, width in units
FPS = 10

# Colours are far apart and backgrounds have no hue: seen from any background, two colours lie in directions at least
# 30 degrees apart, so that the judge can tell them apart even at a blurred edge.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 40),
    "blue": (45, 65, 225),
    "yellow": (245, 210, 40),
    "purple": (185, 45, 200),
    "cyan": (40, 208, 210),
}
BACKGROUNDS = {"black": (12, 12, 12), "grey": (128, 128, 128), "white": (243, 243, 243)}
SHAPES = ("circle", "square", "triangle", "diamond")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "grow", "shrink", "still")
NEW_MOTION = "bounce"  # drawn and judged like the others, but nano was never shown one: docs/teach-a-word.md does
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

RADII = {"small": (8.0, 9.2), "big": (12.0, 13.8)}  # of objects that keep their size
GROWTH_FROM, GROWTH_FACTOR = (7.2, 8.0), (1.7, 2.0)  # radius at the small end; large end / small end
TRAVEL = {1: (14.0, 24.5), 2: (13.0, 19.0)}  # by the number of objects: two have less room
BOUNCE = (10.0, 12.5)  # up, and down again: as fast as the fastest that nano knows
TWO_OBJECTS = 0.6  # of the scenes, unless a number is given
MARGIN, GAP = 2.0, 5.0  # between an object and the canvas; between the areas that two objects sweep

# (colour, shape, motion): those of the file are never drawn for training.
HELD_OUT = frozenset(
    map(tuple, json.loads(Path(__file__).with_name("held_out.json").read_text(encoding="utf-8"))["triples"])
)
ALL_TRIPLES = tuple(product(COLOURS, SHAPES, MOTIONS))
TRIPLES = {
    "all": ALL_TRIPLES,
    "train": tuple(triple for triple in ALL_TRIPLES if triple not in HELD_OUT),
    "held_out": tuple(triple for triple in ALL_TRIPLES if triple in HELD_OUT),
    NEW_MOTION: tuple(product(COLOURS, SHAPES, (NEW_MOTION,))),
}


@dataclass(frozen=True)
class Object:
    """One shape, and between which two places it moves, as `progress` says."""

    colour: str
    shape: str
    motion: str
    size: str | None  # "small" or "big"; None for an object that grows or shrinks
    start: tuple[float, float, float]  # x, y of the centre of mass, radius
    end: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Everything a clip shows: objects on a background of one colour."""

    background: str
    objects: tuple[Object, ...]
    canvas: tuple[int, int] = CANVAS  # height, width in units


def sample_scene(
    seed: int | list[int] | np.random.Generator,
    split: str = "train",
    num_objects: int | None = None,
    canvas: tuple[int, int] = CANVAS,
) -> Scene:
    """A random scene: attributes uniformly from the triples of `split`, then radii, travel and position.

    seed: anything `np.random.default_rng` takes; [seed, index] gives the same scene on every machine.
    split: "train" (no held-out triple), "held_out" (only those), "all", or NEW_MOTION: "bounce" (only that motion).
    num_objects: 1 or 2, or None for two in 60 % of the scenes. Two have different colours and keep apart.
    canvas: height, width in units, at least 64 each.
    Raises ValueError for an unknown split, another number of objects or a small canvas.
    """
    if split not in TRIPLES:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(TRIPLES)}")
    if num_objects not in (None, 1, 2):
        raise ValueError(f"num_objects is {num_objects}, but a scene has 1 or 2 objects: choose one of these, or None")
    if min(canvas) < min(CANVAS):
        raise ValueError(f"canvas {canvas} is too small for motions: take at least {CANVAS}")
    rng = np.random.default_rng(seed)
    if num_objects is None:
        num_objects = 2 if rng.random() < TWO_OBJECTS else 1
    background = pick(rng, tuple(BACKGROUNDS))
    while True:
        triples = [pick(rng, TRIPLES[split]) for _ in range(num_objects)]
        if len({colour for colour, _, _ in triples}) < num_objects:
            continue
        for _ in range(20):  # one object always fits; large moving pairs rarely do
            objects = [_sample_path(rng, *triple, TRAVEL[num_objects]) for triple in triples]
            placed = _place(rng, objects, canvas)
            if placed:
                return Scene(background, placed, canvas)


def draw_scene(scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """The clip of a scene, uint8 (F, H, W, 3), antialiased by each pixel's distance to the outline.

    A single frame is the scene's first. Raises ValueError if the frame does not have the canvas's aspect ratio.
    """
    if num_frames < 1 or height * scene.canvas[1] != width * scene.canvas[0]:
        raise ValueError(
            f"cannot draw {num_frames} frames of {height} x {width} from a canvas of {scene.canvas}: "
            "draw at least one frame, with the same aspect ratio, or sample the scene with another canvas"
        )
    pixels = height / scene.canvas[0]  # per unit
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    frames[:] = background.astype(np.uint8)
    time = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None, None]
    for obj in scene.objects:
        # Only the part of the canvas that the object sweeps is drawn; no other object enters it.
        left, top, right, bottom = (round(edge * pixels) for edge in swept_box(obj))
        rows, columns = slice(max(top - 2, 0), bottom + 2), slice(max(left - 2, 0), right + 2)
        grid_y = (np.arange(height, dtype=np.float32)[rows, None] + 0.5) / pixels
        grid_x = (np.arange(width, dtype=np.float32)[columns] + 0.5) / pixels
        start, end = np.array([obj.start, obj.end], dtype=np.float32)
        way = progress(obj.motion, time)
        x, y, radius = (start[i] + (end[i] - start[i]) * way for i in range(3))  # (F, 1, 1) each
        share = coverage(obj.shape, grid_x - x, grid_y - y, radius, pixels)[..., None]  # (F, h, w, 1)
        colour = np.array(COLOURS[obj.colour], dtype=np.float32)
        frames[:, rows, columns] = (background + share * (colour - background) + 0.5).astype(np.uint8)
    return frames


def progress(motion: str, time: np.ndarray) -> np.ndarray:
    """How far an object is on its way from start to end at these times in [0, 1]: evenly there, or there and back."""
    return 1 - np.abs(2 * time - 1) if motion == NEW_MOTION else time


def relations(first: Object, second: Object) -> tuple[str, ...]:
    """Where the first object is as seen from the second, if that holds for the whole clip."""
    left, top, right, bottom = swept_box(first)
    left_2, top_2, right_2, bottom_2 = swept_box(second)
    holds = {
        "above": bottom <= top_2,
        "below": bottom_2 <= top,
        "left of": right <= left_2,
        "right of": right_2 <= left,
    }
    return tuple(name for name in holds if holds[name])


def swept_box(obj: Object) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in units, of the area that an object sweeps during the clip."""
    half_width, up, down = EXTENT[obj.shape]
    ends = (obj.start, obj.end)
    return (
        min(x - half_width * radius for x, _, radius in ends),
        min(y - up * radius for _, y, radius in ends),
        max(x + half_width * radius for x, _, radius in ends),
        max(y + down * radius for _, y, radius in ends),
    )


def pick(rng: np.random.Generator, options: tuple[Option, ...]) -> Option:
    """One of the options, uniformly."""
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------------------------------------- shapes
# Distance to the outline in units, negative inside; x and y are relative to the centre of mass. At a corner it is
# that to the line of the nearer edge, not to the corner itself: the same within half a pixel, where it matters.


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, pixels: float = 1.0) -> np.ndarray:
    """The share of each pixel that a shape covers, in [0, 1]; `pixels` are per unit, the other shapes broadcast."""
    return np.clip(0.5 - DISTANCE[shape](x, y, radius) * pixels, 0, 1)


def _triangle(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Equilateral, one corner up: its three sides are half the circumscribed radius from the centre."""
    return np.maximum(y, SIN_60 * np.abs(x) - 0.5 * y) - 0.5 * TRIANGLE_TIP * radius


def _diamond(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """A rhombus that stands on a corner, taller than wide."""
    steepness = DIAMOND_HALF_WIDTH * DIAMOND_HALF_HEIGHT / math.hypot(DIAMOND_HALF_WIDTH, DIAMOND_HALF_HEIGHT)
    return (np.abs(x) / DIAMOND_HALF_WIDTH + np.abs(y) / DIAMOND_HALF_HEIGHT - radius) * steepness


SIN_60 = math.sin(math.pi / 3)
# In radii, chosen so that all shapes of one radius look about as large.
SQUARE_HALF_SIDE, TRIANGLE_TIP = 0.9, 1.3
DIAMOND_HALF_WIDTH, DIAMOND_HALF_HEIGHT = 0.95, 1.35

DISTANCE: dict[str, Callable] = {
    "circle": lambda x, y, radius: np.sqrt(x * x + y * y) - radius,
    "square": lambda x, y, radius: np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius,
    "triangle": _triangle,
    "diamond": _diamond,
}
# Half the width, and the height above and below the centre of mass, of a shape of radius 1; and its area.
EXTENT = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF_SIDE, SQUARE_HALF_SIDE, SQUARE_HALF_SIDE),
    "triangle": (TRIANGLE_TIP * SIN_60, TRIANGLE_TIP, TRIANGLE_TIP / 2),
    "diamond": (DIAMOND_HALF_WIDTH, DIAMOND_HALF_HEIGHT, DIAMOND_HALF_HEIGHT),
}
AREA = {
    "circle": math.pi,
    "square": 4 * SQUARE_HALF_SIDE**2,
    "triangle": 1.5 * SIN_60 * TRIANGLE_TIP**2,
    "diamond": 2 * DIAMOND_HALF_WIDTH * DIAMOND_HALF_HEIGHT,
}


# ---------------------------------------------------------------------------------------------- sampling


def _sample_path(rng: np.random.Generator, colour: str, shape: str, motion: str, travel: tuple[float, float]) -> Object:
    """An object with radii and travel, starting at (0, 0)."""
    size, across, down = None, 0.0, 0.0
    if motion in ("grow", "shrink"):
        small = rng.uniform(*GROWTH_FROM)
        radii = (small, small * rng.uniform(*GROWTH_FACTOR))
        first, last = radii if motion == "grow" else radii[::-1]
    else:
        size = pick(rng, tuple(RADII))
        first = last = rng.uniform(*RADII[size])
        if motion in DIRECTIONS:
            distance = rng.uniform(*travel)
            across, down = (distance * sign for sign in DIRECTIONS[motion])
        elif motion == NEW_MOTION:
            down = -rng.uniform(*BOUNCE)
    return Object(colour, shape, motion, size, (0.0, 0.0, first), (across, down, last))


def _place(rng: np.random.Generator, objects: list[Object], canvas: tuple[int, int]) -> tuple[Object, ...] | None:
    """Move objects to random positions inside the canvas, one after the other; None if they do not fit."""
    height, width = canvas
    room = (width - 2 * MARGIN, height - 2 * MARGIN)  # x, y
    boxes = [swept_box(obj) for obj in objects]
    extents = [(right - left, bottom - top) for left, top, right, bottom in boxes]
    axis = int(rng.integers(2))  # along which two objects follow each other
    spare = room[axis] - sum(extent[axis] for extent in extents) - GAP * (len(objects) - 1)
    if spare < 0:
        return None
    placed = []
    cursor = MARGIN
    for obj, box, extent, cut in zip(objects, boxes, extents, np.sort(rng.random(len(objects))), strict=True):
        corner = [0.0, 0.0]
        corner[axis] = cursor + spare * float(cut)
        corner[1 - axis] = MARGIN + (room[1 - axis] - extent[1 - axis]) * float(rng.random())
        x, y = corner[0] - box[0], corner[1] - box[1]
        placed.append(replace(obj, start=(x, y, obj.start[2]), end=(x + obj.end[0], y + obj.end[1], obj.end[2])))
        cursor += extent[axis] + GAP
    return tuple(placed)
