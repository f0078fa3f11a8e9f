"""The nano world is drawn as its scenes say, the same everywhere, and its captions are true and grammatical."""

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from einops import reduce

from kandinsky5.nano import world
from kandinsky5.nano.captions import write_caption
from kandinsky5.nano.world import (
    AREA,
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    TRIPLES,
    Object,
    Scene,
)

SCENE = Scene("black", (Object("red", "diamond", "right", "small", (20, 30, 8), (40, 30, 8)),))


def scenes(count: int, seed: int = 1, **options) -> list[Scene]:
    return [world.sample_scene([seed, index], **options) for index in range(count)]


def test_a_seed_gives_the_same_clips_on_every_machine():
    frames = np.stack([world.draw_scene(scene) for scene in scenes(20, seed=0)])
    assert frames.shape == (20, 17, 64, 64, 3) and frames.dtype == np.uint8
    rng = np.random.default_rng(0)
    captions = [write_caption(scene, language, rng).text for scene in scenes(20) for language in ("english", "russian")]
    digest = hashlib.sha256(frames.tobytes() + "\n".join(captions).encode()).hexdigest()
    assert digest.startswith("edd91f623cdc872e"), "the world has changed: what was trained in it was trained in another"
    assert world.sample_scene([0, 3]) == world.sample_scene([0, 3]) != world.sample_scene([0, 4])


def test_held_out_triples_leave_every_pair_of_words_trained():
    assert set(TRIPLES["all"]) >= HELD_OUT and len(HELD_OUT) >= 0.1 * len(TRIPLES["all"])
    assert len(COLOURS) >= 6 and len(SHAPES) >= 4 and len(MOTIONS) >= 6 and len(BACKGROUNDS) >= 3
    assert not HELD_OUT & set(TRIPLES["train"]) and len(TRIPLES["train"]) + len(HELD_OUT) == len(TRIPLES["all"])
    for i, j in combinations(range(3), 2):
        trained = {(triple[i], triple[j]) for triple in TRIPLES["train"]}
        assert trained == {(triple[i], triple[j]) for triple in TRIPLES["all"]}


def test_a_split_draws_exactly_its_triples_evenly():
    for split, number in (("train", 2), ("held_out", 1)):
        objects = [obj for scene in scenes(3000, split=split, num_objects=number) for obj in scene.objects]
        counts = Counter((obj.colour, obj.shape, obj.motion) for obj in objects)
        assert set(counts) == set(TRIPLES[split])
        assert min(counts.values()) > 0.3 * len(objects) / len(counts)


def test_objects_stay_inside_and_apart_and_move_as_described():
    for scene in scenes(120, split="all"):
        assert len({obj.colour for obj in scene.objects}) == len(scene.objects) in (1, 2)
        background = np.array(BACKGROUNDS[scene.background])
        masks = []
        for obj in scene.objects:
            mask = (world.draw_scene(Scene(scene.background, (obj,))) != background).any(-1)  # (F, H, W)
            assert not (mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any())
            assert mask[:, 1:-1, 1:-1].any((1, 2)).all()
            masks.append(mask.any(0))
            (x, y, radius), (x_end, y_end, radius_end) = obj.start, obj.end
            if obj.motion in world.DIRECTIONS:
                step = np.array([x_end - x, y_end - y])
                assert np.linalg.norm(step) >= 12 and radius == radius_end
                np.testing.assert_allclose(step / np.linalg.norm(step), world.DIRECTIONS[obj.motion])
            else:
                assert (x, y) == (x_end, y_end)
                growth = radius_end / radius
                assert {"grow": growth > 1.6, "shrink": growth < 1 / 1.6, "still": growth == 1}[obj.motion]
            assert obj.size == (None if radius != radius_end else "small" if radius < 10 else "big")
        if len(masks) == 2:
            assert world.relations(*scene.objects)
            grown = np.pad(masks[0], 1)
            grown = np.max([grown[a : a + 64, b : b + 64] for a in range(3) for b in range(3)], axis=0)
            assert not (grown & masks[1]).any()


def test_what_bounces_goes_up_evenly_and_comes_back():
    for scene in scenes(40, split=world.NEW_MOTION, num_objects=1):
        frames, background = world.draw_scene(scene), np.array(BACKGROUNDS[scene.background])
        share = np.abs(frames.astype(int) - background).sum(-1)  # (F, H, W), in proportion to what is covered
        rows, columns = (
            (share.sum(axis) * np.arange(64)).sum(1) / share.sum((1, 2)) for axis in (2, 1)
        )  # centres of mass, (F,) each  # fmt: skip
        height = scene.objects[0].start[1] - scene.objects[0].end[1]
        there = height * np.array([*range(9), *range(7, -1, -1)]) / 8
        np.testing.assert_allclose(rows[0] - rows, there, atol=0.2)
        np.testing.assert_allclose(columns, columns[0], atol=0.2)
        assert 9 < height < 13 and not (share[:, [0, -1]].any() or share[:, :, [0, -1]].any())


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_equal_an_average_of_eightfold_resolution(shape):
    obj = Object("red", shape, "right", "big", (25.3, 31.7, 9.4), (38.1, 31.7, 9.4))
    scene = Scene("white", (obj,))
    fine = world.draw_scene(scene, 3, 512, 512).astype(float)
    averaged = reduce(fine, "F (H a) (W b) C -> F H W C", "mean", a=8, b=8)
    error = np.abs(world.draw_scene(scene, 3) - averaged)
    assert error.max() < 60 and error.mean() < 0.15  # of 220; without antialiasing more than 100 and 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_area_extent_and_centre_of_mass_are_as_drawn(shape):
    y, x = np.mgrid[-200:200, -200:200].astype(np.float32) + 0.5
    share = world.coverage(shape, x, y, np.float32(100))
    assert share.sum() == pytest.approx(AREA[shape] * 100**2, rel=2e-3)
    assert abs((share * x).sum()) + abs((share * y).sum()) < 0.5 * share.sum()
    rows, columns = np.nonzero((share > 0.5).any(1))[0] - 200, np.nonzero((share > 0.5).any(0))[0] - 200
    drawn = (columns[-1] + 1, -rows[0], rows[-1] + 1)
    np.testing.assert_allclose(drawn, np.array(EXTENT[shape]) * 100, atol=3)  # tips end in less than a pixel


def test_pixels_are_row_then_column_then_rgb():
    obj = Object("red", "square", "left", None, (48, 16, 8), (16, 16, 8))
    frames = world.draw_scene(Scene("black", (obj,)))
    assert tuple(frames[0, 16, 48]) == tuple(frames[16, 16, 16]) == COLOURS["red"]
    assert tuple(frames[0, 16, 16]) == tuple(frames[16, 16, 48]) == tuple(frames[0, 48, 48]) == BACKGROUNDS["black"]
    assert world.DIRECTIONS == {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def test_a_diamond_stands_on_a_corner_and_is_taller_than_wide():
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False, dtype=np.float32)  # from the top
    for distance, corners in ((9, [0, 90, 180, 270]), (12, [0, 180])):
        around = world.coverage("diamond", distance * np.sin(angle), -distance * np.cos(angle), np.float32(10)) > 0.5
        assert (around & ~np.roll(around, 1)).sum() == len(corners) and around[corners].all()


def test_sizes_and_frames_are_free_and_show_the_same_scene():
    scene = world.sample_scene([1, 2])
    large = world.draw_scene(scene, 33, 128, 128)
    assert large.shape == (33, 128, 128, 3)
    averaged = reduce(large[::2].astype(float), "F (H a) (W b) C -> F H W C", "mean", a=2, b=2)
    assert np.abs(averaged - world.draw_scene(scene)).mean() < 0.3
    np.testing.assert_array_equal(world.draw_scene(scene, 1)[0], world.draw_scene(scene)[0])
    wide = world.sample_scene([1, 3], canvas=(64, 128))
    assert world.draw_scene(wide, 5, 64, 128).shape == (5, 64, 128, 3)
    for obj in world.sample_scene([1, 3], canvas=(128, 128)).objects:
        assert obj.start[2] < 16.1  # objects keep their size on a larger canvas


def test_colours_are_far_apart_in_distance_and_direction():
    colours, backgrounds = np.array([*COLOURS.values()], float), np.array([*BACKGROUNDS.values()], float)
    for background in backgrounds:
        rays = colours - background
        lengths = np.linalg.norm(rays, axis=1)
        assert lengths.min() > 120
        cosines = [rays[i] @ rays[j] / lengths[i] / lengths[j] for i, j in combinations(range(6), 2)]
        assert np.degrees(np.arccos(max(cosines))) > 29
    for palette in (colours, backgrounds):
        assert min(np.linalg.norm(a - b) for a, b in combinations(palette, 2)) > 120


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.sample_scene(0, split="test"), "'test'"),
        (lambda: world.sample_scene(0, num_objects=3), "is 3"),
        (lambda: world.sample_scene(0, canvas=(32, 64)), "32"),
        (lambda: world.draw_scene(SCENE, 17, 64, 96), "64 x 96"),
        (lambda: world.draw_scene(SCENE, 0), "0 frames"),
    ],
)
def test_invalid_scenes_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
