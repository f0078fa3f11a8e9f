"""Captions of the nano world are true, grammatical, and as varied as people type."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from kandinsky5.nano import world
from kandinsky5.nano.captions import write_caption
from kandinsky5.nano.world import COLOURS, Object, Scene


def scenes(count: int) -> list[Scene]:
    return [world.sample_scene([1, index], "all") for index in range(count)]


@cache
def texts(scene: Scene, language: str) -> set[str]:
    """Many captions without the variations in how people type."""
    rng = np.random.default_rng(0)
    return {plain(write_caption(scene, language, rng).text) for _ in range(3000 if len(scene.objects) == 1 else 12000)}


def plain(text: str) -> str:
    return text.lower().rstrip(".").replace("ё", "е")


ONE = Scene("black", (Object("red", "diamond", "right", "small", (20, 30, 8), (40, 30, 8)),))
TWO = Scene(
    "white",
    (
        Object("blue", "diamond", "still", "big", (15, 30, 13), (15, 30, 13)),
        Object("cyan", "triangle", "shrink", None, (48, 30, 13), (48, 30, 7)),
    ),
)
ABOVE = Scene(
    "grey",
    (
        Object("red", "circle", "left", None, (40, 15, 8), (20, 15, 8)),
        Object("blue", "square", "still", None, (30, 45, 8), (30, 45, 8)),
    ),
)


@pytest.mark.parametrize(
    ("scene", "language", "expected"),
    [
        (ONE, "english", "a small red diamond moves right on a black background"),
        (ONE, "english", "on a black background, a red diamond slides to the right"),
        (ONE, "english", "there is a little red diamond going to the right"),
        (ONE, "russian", "маленький красный ромб движется вправо на чёрном фоне"),
        (ONE, "russian", "на чёрном фоне движущийся вправо красный ромб"),
        (ONE, "russian", "небольшой красный ромб плывёт направо, фон чёрный"),
        (ABOVE, "english", "a red circle moves left above a blue square that stays still on a grey background"),
        (ABOVE, "english", "at the top a red circle goes left, at the bottom a blue square does not move"),
        (ABOVE, "russian", "красный круг движется влево над синим квадратом, который стоит на месте"),
        (ABOVE, "russian", "синий квадрат не движется под красным кругом, который плывёт налево"),
        (ABOVE, "russian", "синий квадрат стоит на месте, а над ним красный круг движется влево, фон серый"),
        (TWO, "english", "a cyan triangle shrinks, and to the left of it a big blue diamond stays still"),
        (TWO, "russian", "голубой треугольник уменьшается справа от большого синего ромба, который не движется"),
        (TWO, "russian", "крупный синий ромб стоит на месте слева от голубого треугольника, который сжимается"),
        (TWO, "russian", "слева синий ромб остаётся на месте, справа голубой треугольник сжимается"),
        (TWO, "russian", "неподвижный большой синий ромб и уменьшающийся голубой треугольник на белом фоне"),
        (TWO, "russian", "голубой треугольник сжимается, а слева от него синий ромб не движется"),
    ],
)
def test_captions_of_both_languages_include(scene, language, expected):
    assert plain(expected) in texts(scene, language)


def test_there_are_many_phrasings_typed_in_several_ways():
    assert len(texts(ONE, "english")) > 100 and len(texts(ONE, "russian")) > 100
    rng = np.random.default_rng(0)
    typed = {write_caption(ONE, "russian", rng).text for _ in range(300)}
    for sign in (r"^[А-Я]", r"\.$", "ё", r"черн"):  # ё is often typed as е
        found = sum(bool(re.search(sign, text)) for text in typed)
        assert 0 < found < len(typed), sign


# As a schoolbook has them.
ADJECTIVES = {
    "nominative": "красный зелёный синий жёлтый фиолетовый голубой маленький небольшой большой крупный неподвижный "
    "движущийся перемещающийся плывущий растущий увеличивающийся уменьшающийся сжимающийся",
    "genitive": "красного зелёного синего жёлтого фиолетового голубого маленького небольшого большого крупного",
    "instrumental": "красным зелёным синим жёлтым фиолетовым голубым маленьким небольшим большим крупным",
}
NOUNS = {
    "nominative": "круг квадрат треугольник ромб",
    "genitive": "круга квадрата треугольника ромба него",
    "instrumental": "кругом квадратом треугольником ромбом ним",
}
PREPOSITIONS = {"над": "instrumental", "под": "instrumental", "от": "genitive"}
UNINFLECTED = (
    "движется перемещается плывёт растёт увеличивается уменьшается сжимается становится больше меньше стоит остаётся "
    "не на месте влево налево вправо направо вверх наверх вниз слева справа сверху снизу а и который"
)


def test_russian_words_agree_in_case():
    case_of = {noun: case for case, nouns in NOUNS.items() for noun in nouns.split()}
    adjectives = {case: plain(words).split() for case, words in ADJECTIVES.items()}
    nouns, seen = set(), set()
    rng = np.random.default_rng(0)
    for scene in scenes(2000):
        text = plain(write_caption(scene, "russian", rng).text)
        case = None
        for word in reversed(re.findall(r"\w+", re.sub(r"(на \w+ом фоне|фон \w+ый)", "", text))):
            if word in case_of:
                case = case_of[word]
                nouns.add(word)
            elif word in PREPOSITIONS:
                assert case == PREPOSITIONS[word], text
            elif word not in plain(UNINFLECTED).split():
                assert case and word in adjectives[case], (word, text)
                seen.add((word, case))
    assert nouns == set(case_of)
    assert seen == {(word, case) for case, words in adjectives.items() for word in words}


@pytest.mark.parametrize("language", ["english", "russian"])
def test_claims_of_a_caption_are_true_and_in_its_text(language):
    colour_words = {
        "english": {name: name for name in COLOURS},
        "russian": dict(zip(COLOURS, ("красн", "зелен", "син", "желт", "фиолетов", "голуб"), strict=True)),
    }[language]
    rng = np.random.default_rng(0)
    unsaid = Counter()
    for scene in scenes(400):
        caption = write_caption(scene, language, rng)
        text = plain(caption.text)
        assert caption.background in (None, scene.background)
        objects = [next(obj for obj in scene.objects if obj.colour == words["colour"]) for words in caption.objects]
        for obj, words in zip(objects, caption.objects, strict=True):
            assert all(getattr(obj, key) == word for key, word in words.items())
        places = [text.index(colour_words[obj.colour]) for obj in objects]
        assert len(objects) == len(scene.objects) and places == sorted(places)
        if caption.relation:
            centres = [np.add(obj.start, obj.end) / 2 for obj in objects]
            x, y = centres[1][0] - centres[0][0], centres[1][1] - centres[0][1]
            assert {"left of": x, "right of": -x, "above": y, "below": -y}[caption.relation] > 10
        assert len(caption.about) == len(caption.text)
        for i, obj in enumerate(objects):  # its colour stands in words about it, and no other's does
            about = "".join(c if of == i else " " for c, of in zip(text, caption.about, strict=False))
            assert [name for name, word in colour_words.items() if word in about] == [obj.colour], (about, text)
        unsaid.update(
            background=not caption.background, size="size" not in caption.objects[0], relation=not caption.relation
        )
    assert min(unsaid.values()) > 50  # each is left out at times


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="'french'"):
        write_caption(ONE, "french", np.random.default_rng(0))
