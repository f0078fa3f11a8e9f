"""Captions of the nano world's scenes, in English or Russian, and what each of them says.

Scene ──write_caption──> Caption: a text, its claims, and which object each character is about
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from kandinsky5.nano.world import DIRECTIONS, NEW_MOTION, OPPOSITE, Object, Scene, pick, relations, sample_scene

LANGUAGES = ("english", "russian")


@dataclass(frozen=True)
class Caption:
    """A text, and what it says of a scene: only that can be demanded of a network."""

    text: str
    background: str | None  # None where the caption does not say
    objects: tuple[dict[str, str], ...]  # in order of mention: "colour", "shape", "motion" and, where said, "size"
    relation: str | None = None  # the first object is "above", "below", "left of" or "right of" the second
    about: tuple[int | None, ...] = ()  # for each character, which of `objects` its words are about


def write_caption(scene: Scene, language: str, rng: np.random.Generator) -> Caption:
    """One of many captions of a scene; sizes, background and layout are sometimes left out.

    language: one of LANGUAGES. Raises ValueError for another.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is unknown: choose {' or '.join(LANGUAGES)}")
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    described = tuple(describe(obj, with_size=rng.random() < 0.7) for obj in objects)
    background = scene.background if rng.random() < 0.75 else None
    relation = None
    if len(objects) == 2 and rng.random() < 0.6:
        relation = pick(rng, relations(*objects))
    write = _write_english if language == "english" else _write_russian
    text, about = _finish(rng, *_unmark(write(rng, described, background, relation)))
    if language == "russian" and rng.random() < 0.2:
        text = text.replace("ё", "е").replace("Ё", "Е")  # as many people type
    return Caption(text, background, described, relation, about)


@cache
def vocabulary(count: int = 2000) -> frozenset[str]:
    """The words of `count` captions in each language, as `split_words` gives them: all that a network can learn of."""
    rng, words = np.random.default_rng(0), set()
    for scene in (sample_scene(rng, "all") for _ in range(count)):
        words |= {word for language in LANGUAGES for word in split_words(write_caption(scene, language, rng).text)}
    return frozenset(words)


def split_words(text: str) -> list[str]:
    """Its words, in lower case and with е for ё."""
    return re.findall(r"\w+", text.lower().replace("ё", "е"))


def describe(obj: Object, with_size: bool = True) -> dict[str, str]:
    """What a caption may say of an object."""
    described = {"colour": obj.colour, "shape": obj.shape, "motion": obj.motion}
    return described | {"size": obj.size} if with_size and obj.size else described


def _write_english(
    rng: np.random.Generator, described: tuple[dict, ...], background: str | None, relation: str | None
) -> str:
    nouns = _mark([_english_noun(rng, obj) for obj in described])
    verbs = [_verb(rng, obj["motion"], ENGLISH_VERB | NEW_VERB, ENGLISH_DIRECTION) for obj in described]
    moves, moving = map(_mark, zip(*verbs, strict=True))
    if len(described) == 1:
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


def _english_noun(rng: np.random.Generator, obj: dict[str, str]) -> str:
    size = f"{pick(rng, ENGLISH_SIZE[obj['size']])} " if "size" in obj else ""
    return f"a {size}{obj['colour']} {obj['shape']}"


ENGLISH_SIZE = {"small": ("small", "little"), "big": ("big", "large")}
ENGLISH_VERB = {
    "move": (("moves", "moving"), ("goes", "going"), ("slides", "sliding")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "becoming smaller")),
    "still": (("stays still", "staying still"), ("does not move", "not moving"), ("stands still", "standing still")),
}
NEW_VERB = {NEW_MOTION: (("bounces", "bouncing"),)}  # which nano was never told
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
    rng: np.random.Generator, described: tuple[dict, ...], background: str | None, relation: str | None
) -> str:
    objects = [_decline(rng, obj) for obj in described]
    nouns = _mark([obj["nominative"] for obj in objects])
    verbs = [_verb(rng, obj["motion"], RUSSIAN_VERB, RUSSIAN_DIRECTION) for obj in described]
    moves, moving = map(_mark, zip(*verbs, strict=True))
    if len(described) == 1:
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
        inflected = _mark([obj[case] for obj in objects])
        text = pick(rng, (
            f"{nouns[0]} {moves[0]} {here} {inflected[1]}, который {moves[1]}",
            f"{nouns[0]} {moves[0]}, а {beside_it} {nouns[1]} {moves[1]}",
            f"{at} {nouns[0]} {moves[0]}, {at_there} {nouns[1]} {moves[1]}",
        ))  # fmt: skip
    if background:
        stem = RUSSIAN_BACKGROUND[background]
        text = pick(rng, (f"{text} на {stem}ом фоне", f"на {stem}ом фоне {text}", f"{text}, фон {stem}ый"))
    return text


def _decline(rng: np.random.Generator, obj: dict[str, str]) -> dict[str, str]:
    """As in "синий круг", "синего круга" and "синим кругом", by case."""
    size = [pick(rng, RUSSIAN_SIZE[obj["size"]])] if "size" in obj else []
    words = (*size, RUSSIAN_COLOUR[obj["colour"]], RUSSIAN_SHAPE[obj["shape"]])
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
RUSSIAN_VERB = {  # "it …", "the … object"
    "move": (("движется", "движущийся"), ("перемещается", "перемещающийся"), ("плывёт", "плывущий")),
    "grow": (("растёт", "растущий"), ("увеличивается", "увеличивающийся"), ("становится больше", "растущий")),
    "shrink": (("уменьшается", "уменьшающийся"), ("сжимается", "сжимающийся"), ("становится меньше", "уменьшающийся")),
    "still": (("стоит на месте", "неподвижный"), ("не движется", "неподвижный"), ("остаётся на месте", "неподвижный")),
}
RUSSIAN_DIRECTION = {
    "left": ("влево", "налево"),
    "right": ("вправо", "направо"),
    "up": ("вверх", "наверх"),
    "down": ("вниз",),
}
RUSSIAN_PLACE = {  # the case that the preposition takes, the preposition, the same with "it", "at that side"
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
