"""The nano world: flat shapes that move on a plain background, drawn and captioned from a seed.

A `Scene` says what is to be seen, `sample_scene` makes one up, `draw_scene` draws it and `caption` puts it
into words, English or Russian. Nothing here knows of a network.

Scenes know neither pixels nor frames. Lengths are in units of a canvas of 64 x 64: one unit is one pixel of
a 64 x 64 clip and two of a 128 x 128 clip, in which everything is twice as large. Time runs from 0 at the
first frame to 1 at the last: a motion fills the clip however many frames it has. For a larger world in which
objects keep their size in pixels, give `sample_scene` a larger `canvas`. x grows to the right and y downwards
from the top left corner.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")

CANVAS = (64, 64)  # height, width in units
FPS = 10

# Colours are far from each other and backgrounds have no hue: seen from any background, two colours lie in
# directions at least 30 degrees apart, so that the judge can tell them even at a blurred edge.
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
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

RADII = {"small": (8.0, 9.2), "big": (12.0, 13.8)}  # of objects that keep their size
GROWTH_FROM, GROWTH_FACTOR = (7.2, 8.0), (1.7, 2.0)  # radius at the small end; large end / small end
TRAVEL = {1: (14.0, 24.5), 2: (13.0, 19.0)}  # by the number of objects: two have less room
TWO_OBJECTS = 0.6  # of the scenes, where the number is not given
MARGIN, GAP = 2.0, 5.0  # between an object and the canvas; between the areas that two objects sweep

# (colour, shape, motion): those of the file are never drawn for training.
HELD_OUT = frozenset(map(tuple, json.loads(Path(__file__).with_name("held_out.json").read_text())["triples"]))
ALL_TRIPLES = tuple(product(COLOURS, SHAPES, MOTIONS))
TRIPLES = {
    "all": ALL_TRIPLES,
    "train": tuple(triple for triple in ALL_TRIPLES if triple not in HELD_OUT),
    "held_out": tuple(triple for triple in ALL_TRIPLES if triple in HELD_OUT),
}


@dataclass(frozen=True)
class Object:
    """One shape, and where it is at the first and at the last frame; in between it changes evenly."""

    colour: str
    shape: str
    motion: str
    size: str | None  # "small" or "big"; None for an object that grows or shrinks
    start: tuple[float, float, float]  # x, y of the centre of mass, radius
    end: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """All that a clip shows: objects on a background of one colour."""

    background: str
    objects: tuple[Object, ...]
    canvas: tuple[int, int] = CANVAS  # height, width in units


@dataclass(frozen=True)
class Caption:
    """A caption, and what it says: only that can be asked of a network."""

    text: str
    background: str | None  # None where the caption does not say
    objects: tuple[dict[str, str], ...]  # in order of mention: "colour", "shape", "motion" and, where said, "size"
    relation: str | None = None  # the first object is "above", "below", "left of" or "right of" the second
    about: tuple[int | None, ...] = ()  # for each character, which of `objects` its words are about


def sample_scene(
    seed: int | list[int] | np.random.Generator,
    split: str = "train",
    num_objects: int | None = None,
    canvas: tuple[int, int] = CANVAS,
) -> Scene:
    """Makes up a scene: attributes evenly from the triples of `split`, then radii, travel and place.

    seed: whatever `np.random.default_rng` takes; [seed, index] gives the same scene on every machine.
    split: "train" (no held-out triple), "held_out" (only those) or "all".
    num_objects: 1 or 2, or None for two in 60 % of the scenes. Two have different colours and keep apart.
    canvas: height, width in units, at least 64 each.
    Raises ValueError for an unknown split, another number of objects or a small canvas.
    """
    if split not in TRIPLES:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(TRIPLES)}")
    if num_objects not in (None, 1, 2):
        raise ValueError(f"num_objects is {num_objects}, but a scene has 1 or 2: use one of these, or None")
    if min(canvas) < min(CANVAS):
        raise ValueError(f"canvas {canvas} is too small to move in: use at least {CANVAS}")
    rng = np.random.default_rng(seed)
    if num_objects is None:
        num_objects = 2 if rng.random() < TWO_OBJECTS else 1
    background = pick(rng, tuple(BACKGROUNDS))
    while True:
        triples = [pick(rng, TRIPLES[split]) for _ in range(num_objects)]
        if len({colour for colour, _, _ in triples}) < num_objects:
            continue
        for _ in range(20):  # One object always fits. Large moving pairs rarely do: try before taking another pair.
            objects = [_sample_path(rng, *triple, TRAVEL[num_objects]) for triple in triples]
            placed = _place(rng, objects, canvas)
            if placed:
                return Scene(background, placed, canvas)


def draw_scene(scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """Draws a scene, antialiased: a pixel is as much object as its distance to the outline says.

    Returns uint8 (F, H, W, 3). One frame is the scene's first. Raises ValueError where the frame has not the
    canvas's aspect ratio.
    """
    if num_frames < 1 or height * scene.canvas[1] != width * scene.canvas[0]:
        raise ValueError(
            f"cannot draw {num_frames} frames of {height} x {width} from a canvas of {scene.canvas}: "
            "ask for at least one frame, of the same aspect ratio, or sample the scene with another canvas"
        )
    pixels = height / scene.canvas[0]  # per unit
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    frames[:] = background.astype(np.uint8)
    time = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None, None]
    for thing in scene.objects:
        # Only the part of the canvas that the object sweeps is drawn; no other object enters it.
        left, top, right, bottom = (round(edge * pixels) for edge in swept_box(thing))
        rows, columns = slice(max(top - 2, 0), bottom + 2), slice(max(left - 2, 0), right + 2)
        grid_y = (np.arange(height, dtype=np.float32)[rows, None] + 0.5) / pixels
        grid_x = (np.arange(width, dtype=np.float32)[columns] + 0.5) / pixels
        start, end = np.array([thing.start, thing.end], dtype=np.float32)
        x, y, radius = (start[i] + (end[i] - start[i]) * time for i in range(3))  # (F, 1, 1) each
        share = coverage(thing.shape, grid_x - x, grid_y - y, radius, pixels)[..., None]  # (F, h, w, 1)
        colour = np.array(COLOURS[thing.colour], dtype=np.float32)
        frames[:, rows, columns] = (background + share * (colour - background) + 0.5).astype(np.uint8)
    return frames


def caption(scene: Scene, language: str, rng: np.random.Generator) -> Caption:
    """Puts a scene into words, one of many ways; sizes, background and layout are sometimes left out.

    language: "english" or "russian". Raises ValueError for another.
    """
    if language not in ("english", "russian"):
        raise ValueError(f"language {language!r} is unknown: use 'english' or 'russian'")
    things = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    said = tuple(_said(thing, say_size=rng.random() < 0.7) for thing in things)
    background = scene.background if rng.random() < 0.75 else None
    relation = None
    if len(things) == 2 and rng.random() < 0.6:
        relation = pick(rng, relations(*things))
    write = _write_english if language == "english" else _write_russian
    text, about = _finish(rng, *_unmark(write(rng, said, background, relation)))
    if language == "russian" and rng.random() < 0.2:
        text = text.replace("ё", "е").replace("Ё", "Е")  # as many people type
    return Caption(text, background, said, relation, about)


def relations(first: Object, second: Object) -> tuple[str, ...]:
    """Where the first object is as seen from the second, as far as that holds for the whole clip."""
    left, top, right, bottom = swept_box(first)
    left_2, top_2, right_2, bottom_2 = swept_box(second)
    holds = {
        "above": bottom <= top_2,
        "below": bottom_2 <= top,
        "left of": right <= left_2,
        "right of": right_2 <= left,
    }
    return tuple(name for name in holds if holds[name])


def swept_box(thing: Object) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in units, of all the space that an object takes up during the clip."""
    half_width, up, down = EXTENT[thing.shape]
    ends = (thing.start, thing.end)
    return (
        min(x - half_width * radius for x, _, radius in ends),
        min(y - up * radius for _, y, radius in ends),
        max(x + half_width * radius for x, _, radius in ends),
        max(y + down * radius for _, y, radius in ends),
    )


def pick(rng: np.random.Generator, options: tuple[Option, ...]) -> Option:
    """One of the options, evenly."""
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------------------------------------- shapes
# Distance to the outline in units, negative inside; x and y count from the centre of mass. At a corner it is
# that to the nearer edge's line, not to the corner itself: the same where it matters, within half a pixel.


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, pixels: float = 1.0) -> np.ndarray:
    """The part of each pixel that a shape covers, in [0, 1]; `pixels` are per unit, the rest broadcasts."""
    return np.clip(0.5 - DISTANCE[shape](x, y, radius) * pixels, 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius


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
    "circle": _circle,
    "square": _square,
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
    return Object(colour, shape, motion, size, (0.0, 0.0, first), (across, down, last))


def _place(rng: np.random.Generator, objects: list[Object], canvas: tuple[int, int]) -> tuple[Object, ...] | None:
    """Moves objects to a random place inside the canvas, one behind the other; None where they do not fit."""
    height, width = canvas
    room = (width - 2 * MARGIN, height - 2 * MARGIN)  # x, y
    boxes = [swept_box(thing) for thing in objects]
    extents = [(right - left, bottom - top) for left, top, right, bottom in boxes]
    axis = int(rng.integers(2))  # along which two objects follow each other
    spare = room[axis] - sum(extent[axis] for extent in extents) - GAP * (len(objects) - 1)
    if spare < 0:
        return None
    placed = []
    cursor = MARGIN
    for thing, box, extent, cut in zip(objects, boxes, extents, np.sort(rng.random(len(objects))), strict=True):
        corner = [0.0, 0.0]
        corner[axis] = cursor + spare * float(cut)
        corner[1 - axis] = MARGIN + (room[1 - axis] - extent[1 - axis]) * float(rng.random())
        x, y = corner[0] - box[0], corner[1] - box[1]
        placed.append(
            Object(
                thing.colour, thing.shape, thing.motion, thing.size,
                (x, y, thing.start[2]), (x + thing.end[0], y + thing.end[1], thing.end[2]),
            )
        )  # fmt: skip
        cursor += extent[axis] + GAP
    return tuple(placed)


# ---------------------------------------------------------------------------------------------- words


def _said(thing: Object, say_size: bool) -> dict[str, str]:
    said = {"colour": thing.colour, "shape": thing.shape, "motion": thing.motion}
    return said | {"size": thing.size} if say_size and thing.size else said


def _write_english(
    rng: np.random.Generator, said: tuple[dict, ...], background: str | None, relation: str | None
) -> str:
    nouns = _mark([_english_noun(rng, thing) for thing in said])
    verbs = [_verb(rng, thing["motion"], ENGLISH_VERB, ENGLISH_DIRECTION) for thing in said]
    moves, moving = map(_mark, zip(*verbs, strict=True))
    if len(said) == 1:
        text = pick(rng, (f"{nouns[0]} {moves[0]}", f"{nouns[0]} {moving[0]}", f"there is {nouns[0]} {moving[0]}"))
    elif relation is None:
        text = pick(rng, (
            f"{nouns[0]} {moves[0]} and {nouns[1]} {moves[1]}",
            f"{nouns[0]} {moves[0]} while {nouns[1]} {moves[1]}",
            f"{nouns[0]} {moving[0]} and {nouns[1]} {moving[1]}",
        ))  # fmt: skip
    else:
        here, there = ENGLISH_PLACE[relation], ENGLISH_PLACE[OPPOSITE[relation]]
        text = pick(rng, (
            f"{nouns[0]} {moves[0]} {here[0]} {nouns[1]} that {moves[1]}",
            f"{nouns[0]} {moves[0]}, and {there[0]} it {nouns[1]} {moves[1]}",
            f"{here[1]} {nouns[0]} {moves[0]}, {there[1]} {nouns[1]} {moves[1]}",
        ))  # fmt: skip
    if background:
        word = pick(rng, ("grey", "gray")) if background == "grey" else background
        text = pick(rng, (
            f"{text} on a {word} background",
            f"{text} against a {word} background",
            f"on a {word} background, {text}",
            f"{text}, {word} background",
        ))  # fmt: skip
    return text


def _english_noun(rng: np.random.Generator, thing: dict[str, str]) -> str:
    size = f"{pick(rng, ENGLISH_SIZE[thing['size']])} " if "size" in thing else ""
    return f"a {size}{thing['colour']} {thing['shape']}"


ENGLISH_SIZE = {"small": ("small", "little"), "big": ("big", "large")}
ENGLISH_VERB = {
    "move": (("moves", "moving"), ("goes", "going"), ("slides", "sliding")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("stands still", "standing still"),
    ),
}
ENGLISH_DIRECTION = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
ENGLISH_PLACE = {
    "above": ("above", "at the top"),
    "below": ("below", "at the bottom"),
    "left of": ("to the left of", "on the left"),
    "right of": ("to the right of", "on the right"),
}


def _write_russian(
    rng: np.random.Generator, said: tuple[dict, ...], background: str | None, relation: str | None
) -> str:
    things = [_decline(rng, thing) for thing in said]
    nouns = _mark([thing["nominative"] for thing in things])
    verbs = [_verb(rng, thing["motion"], RUSSIAN_VERB, RUSSIAN_DIRECTION) for thing in said]
    moves, moving = map(_mark, zip(*verbs, strict=True))
    if len(said) == 1:
        text = pick(rng, (f"{nouns[0]} {moves[0]}", f"{moving[0]} {nouns[0]}"))
    elif relation is None:
        text = pick(rng, (
            f"{nouns[0]} {moves[0]}, а {nouns[1]} {moves[1]}",
            f"{nouns[0]} {moves[0]} и {nouns[1]} {moves[1]}",
            f"{moving[0]} {nouns[0]} и {moving[1]} {nouns[1]}",
        ))  # fmt: skip
    else:
        case, here, _, at = RUSSIAN_PLACE[relation]
        _, _, beside_it, at_there = RUSSIAN_PLACE[OPPOSITE[relation]]
        inflected = _mark([thing[case] for thing in things])
        text = pick(rng, (
            f"{nouns[0]} {moves[0]} {here} {inflected[1]}, который {moves[1]}",
            f"{nouns[0]} {moves[0]}, а {beside_it} {nouns[1]} {moves[1]}",
            f"{at} {nouns[0]} {moves[0]}, {at_there} {nouns[1]} {moves[1]}",
        ))  # fmt: skip
    if background:
        stem = RUSSIAN_BACKGROUND[background]
        text = pick(rng, (f"{text} на {stem}ом фоне", f"на {stem}ом фоне {text}", f"{text}, фон {stem}ый"))
    return text


def _decline(rng: np.random.Generator, thing: dict[str, str]) -> dict[str, str]:
    """As in "синий круг", "синего круга" and "синим кругом", by case."""
    size = [pick(rng, RUSSIAN_SIZE[thing["size"]])] if "size" in thing else []
    words = (*size, RUSSIAN_COLOUR[thing["colour"]], RUSSIAN_SHAPE[thing["shape"]])
    return {case: " ".join(forms) for case, *forms in zip(CASES, *words, strict=True)}


CASES = ("nominative", "genitive", "instrumental")  # of the words below; all shapes are masculine
RUSSIAN_SIZE = {
    "small": (("маленький", "маленького", "маленьким"), ("небольшой", "небольшого", "небольшим")),
    "big": (("большой", "большого", "большим"), ("крупный", "крупного", "крупным")),
}
RUSSIAN_COLOUR = {
    "red": ("красный", "красного", "красным"),
    "green": ("зелёный", "зелёного", "зелёным"),
    "blue": ("синий", "синего", "синим"),
    "yellow": ("жёлтый", "жёлтого", "жёлтым"),
    "purple": ("фиолетовый", "фиолетового", "фиолетовым"),
    "cyan": ("голубой", "голубого", "голубым"),
}
RUSSIAN_SHAPE = {
    "circle": ("круг", "круга", "кругом"),
    "square": ("квадрат", "квадрата", "квадратом"),
    "triangle": ("треугольник", "треугольника", "треугольником"),
    "diamond": ("ромб", "ромба", "ромбом"),
}
RUSSIAN_BACKGROUND = {"black": "чёрн", "grey": "сер", "white": "бел"}
RUSSIAN_VERB = {  # "it …", "the … thing"
    "move": (("движется", "движущийся"), ("перемещается", "перемещающийся"), ("плывёт", "плывущий")),
    "grow": (
        ("растёт", "растущий"),
        ("увеличивается", "увеличивающийся"),
        ("становится больше", "растущий"),
    ),
    "shrink": (
        ("уменьшается", "уменьшающийся"),
        ("сжимается", "сжимающийся"),
        ("становится меньше", "уменьшающийся"),
    ),
    "still": (
        ("стоит на месте", "неподвижный"),
        ("не движется", "неподвижный"),
        ("остаётся на месте", "неподвижный"),
    ),
}
RUSSIAN_DIRECTION = {
    "left": ("влево", "налево"),
    "right": ("вправо", "направо"),
    "up": ("вверх", "наверх"),
    "down": ("вниз",),
}
RUSSIAN_PLACE = {  # the case that the preposition asks for, the preposition, the same with "it", "at that side"
    "above": ("instrumental", "над", "над ним", "сверху"),
    "below": ("instrumental", "под", "под ним", "снизу"),
    "left of": ("genitive", "слева от", "слева от него", "слева"),
    "right of": ("genitive", "справа от", "справа от него", "справа"),
}


def _verb(rng: np.random.Generator, motion: str, verbs: dict, directions: dict) -> tuple[str, str]:
    """As in "it moves left" and as in "something moving left"."""
    if motion not in DIRECTIONS:
        return pick(rng, verbs[motion])
    moves, moving = pick(rng, verbs["move"])
    where = pick(rng, directions[motion])
    return f"{moves} {where}", f"{moving} {where}"


MARKS = "\ue000\ue001"  # around words about the first and the second object, while a caption is put together


def _mark(words: Sequence[str]) -> list[str]:
    return [f"{mark}{word}{mark}" for mark, word in zip(MARKS, words, strict=False)]


def _unmark(text: str) -> tuple[str, tuple[int | None, ...]]:
    """The text without marks and, for each of its characters, which object it is about."""
    plain, about, now = "", [], None
    for character in text:
        if character in MARKS:
            now = MARKS.index(character) if now is None else None
        else:
            plain += character
            about.append(now)
    return plain, tuple(about)


def _finish(rng: np.random.Generator, text: str, about: tuple[int | None, ...]) -> tuple[str, tuple[int | None, ...]]:
    """People begin with a capital letter and end with a full stop, or not."""
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return (f"{text}.", (*about, None)) if rng.random() < 0.25 else (text, about)
