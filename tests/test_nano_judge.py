"""The judge of nano clips is right about what is drawn, also when blurred, and is not taken in by what is not."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest

from kandinsky5.nano import judge, world
from kandinsky5.nano.captions import Caption, write_caption
from kandinsky5.nano.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Object, Scene


def prompts(count: int, seed: int = 7, **options):
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = world.sample_scene(rng, "all", **options)
        yield rng, scene, write_caption(scene, ("english", "russian")[index % 2], rng)


def all_right(frames: np.ndarray, caption: Caption, **options) -> bool:
    return judge.score(judge.judge_clip(frames, **options), caption)["all"]


def test_drawn_clips_are_right():
    right = [all_right(world.draw_scene(scene), caption) for _, scene, caption in prompts(24)]
    assert np.mean(right) >= 0.99


def test_a_new_motion_is_known_and_no_other_is_taken_for_it():
    right = []
    for i in range(24):
        rng = np.random.default_rng([71, i])
        scene = world.sample_scene(rng, world.NEW_MOTION, 1)
        caption, drawn = write_caption(scene, "english", rng), world.draw_scene(scene)
        assert all_right(drawn, caption)
        right.append(all_right(degrade(drawn, rng), caption))
        for motion in world.MOTIONS:  # among them what nano draws instead of it
            assert not all_right(world.draw_scene(change_first(scene, motion=motion)), caption)
        upside_down = change_first(scene, start=scene.objects[0].end, end=scene.objects[0].start)
        assert not all_right(world.draw_scene(upside_down), caption)
        assert not all_right(drawn[[*range(9), *range(9)][:17]], caption)  # it falls at once
        assert not all_right(drawn[[*range(9)] + 8 * [8]], caption)  # it stays up there
        (x, y, radius), (_, top, _) = scene.objects[0].start, scene.objects[0].end
        aside = x + (6 if x < 32 else -6)
        moved = world.draw_scene(change_first(scene, start=(aside, y, radius), end=(aside, top, radius)))
        sways = np.where(np.arange(17)[:, None, None, None] % 2, moved, drawn)
        assert not all_right(sways, caption)
    assert np.mean(right) >= 0.9


def test_larger_clips_and_canvases_are_right():
    for _, scene, caption in prompts(4):
        assert all_right(world.draw_scene(scene, 33, 128, 128), caption)
    for _, scene, caption in prompts(4, canvas=(64, 128)):
        assert all_right(world.draw_scene(scene, 33, 64, 128), caption, canvas=(64, 128))


def test_clips_as_bad_as_a_poor_decoder_makes_them_are_right():
    results, ratios = [], []
    for rng, scene, caption in prompts(24):
        drawn = world.draw_scene(scene)
        frames = degrade(drawn, rng)
        results.append(all_right(frames, caption))
        ratios.append(judge.psnr(frames, drawn))
    assert np.mean(results) >= 0.97 and np.mean(ratios) < 29


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur in space and a little in time, another white balance, slow and fast noise, and blocks."""
    video = frames.astype(np.float32)
    for axis, weight in ((0, 0.1), (1, 0.25), (1, 0.25), (2, 0.25), (2, 0.25)):
        last = video.shape[axis] - 1
        before, after = np.maximum(np.arange(last + 1) - 1, 0), np.minimum(np.arange(last + 1) + 1, last)
        video = (1 - 2 * weight) * video + weight * (video.take(before, axis) + video.take(after, axis))
    video = video * rng.uniform(0.95, 1.05, 3) + rng.uniform(-8, 8, 3)
    slow = rng.normal(0, 3, (5, 16, 16, 3)).repeat(4, 0).repeat(4, 1).repeat(4, 2)[: len(video)]
    video = video + slow + rng.normal(0, 3, video.shape)
    return np.clip(video, 0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------- impostors


def other(rng: np.random.Generator, options, *but: str) -> str:
    return world.pick(rng, tuple(option for option in options if option not in but))


def change_first(scene: Scene, **attributes) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], **attributes), *scene.objects[1:]))


def other_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    return change_first(scene, colour=other(rng, COLOURS, *(obj.colour for obj in scene.objects)))


def other_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    return change_first(scene, shape=other(rng, SHAPES, scene.objects[0].shape))


def without_first(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, objects=scene.objects[1:])


def spliced(change, start: int, stop: int):
    """The clip, but changed in these frames."""

    def impostor(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        frames = world.draw_scene(scene)
        frames[start:stop] = world.draw_scene(change(scene, rng))[start:stop]
        return frames

    return impostor


def drawn(change):
    return lambda scene, rng: world.draw_scene(change(scene, rng))


def in_order(order):
    """The clip's frames in another order."""
    return lambda scene, rng: world.draw_scene(scene)[order]


def diagonally(scene: Scene, rng: np.random.Generator) -> Scene:
    (x, y, radius), (x_end, y_end, _) = scene.objects[0].start, scene.objects[0].end
    return change_first(scene, end=(x_end + 0.7 * (y_end - y), y_end + 0.7 * (x_end - x), radius))


def with_one_more(same_colour: bool):
    def change(scene: Scene, rng: np.random.Generator) -> Scene:
        first = scene.objects[0]
        while True:
            more = world.sample_scene(rng, "all", 1).objects[0]
            more = replace(more, shape=first.shape, colour=first.colour) if same_colour else more
            if all(world.relations(more, obj) for obj in scene.objects):
                if same_colour or more.colour not in (obj.colour for obj in scene.objects):
                    return replace(scene, objects=(*scene.objects, more))

    return change


def beside_a_patch(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Of no colour of the world, in a free corner, for a quarter of the clip."""
    frames = world.draw_scene(scene)
    background = np.array(BACKGROUNDS[scene.background], np.uint8)
    corners = [frames[6:10, y : y + 7, x : x + 7] for y in (3, 54) for x in (3, 54)]
    free = next(corner for corner in corners if (corner == background).all())
    free[:] = 0 if scene.background == "white" else 255
    return frames


def filled_with_noise(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    frames = world.draw_scene(scene)
    inside = (frames != world.draw_scene(without_first(scene, rng))).any(-1)
    frames[inside] = rng.integers(0, 256, (inside.sum(), 3))
    return frames


def small_for_big(scene: Scene, rng: np.random.Generator) -> Scene:
    obj = scene.objects[0]
    radius = {"small": 12.5, "big": 8.5}[obj.size]
    return change_first(scene, start=(*obj.start[:2], radius), end=(*obj.end[:2], radius))


def any_motion(obj: Object) -> bool:
    return True


def moves(obj: Object) -> bool:
    return obj.motion in DIRECTIONS


def changes(obj: Object) -> bool:
    return obj.motion != "still"


SHUFFLED = [8, 3, 14, 0, 11, 5, 16, 2, 9, 13, 1, 6, 15, 10, 4, 12, 7]
IMPOSTORS = {
    "static": (changes, in_order([0] * 17)),
    "noise": (any_motion, lambda scene, rng: rng.integers(0, 256, (17, 64, 64, 3)).astype(np.uint8)),
    "blank": (any_motion, drawn(without_first)),
    "backwards": (changes, in_order(range(16, -1, -1))),
    "shuffled": (changes, in_order(SHUFFLED)),
    "to and fro": (moves, in_order([*range(0, 17, 2), *range(14, -1, -2)])),
    "stops half way": (moves, in_order([*range(9), *[8] * 8])),
    "jumps": (changes, in_order([0] * 8 + [16] * 9)),
    "diagonal": (moves, drawn(diagonally)),
    "vanishes half way": (any_motion, spliced(without_first, 8, 17)),
    "vanishes at the end": (any_motion, spliced(without_first, 16, 17)),
    "blinks": (any_motion, spliced(without_first, 6, 7)),
    "changes shape half way": (any_motion, spliced(other_shape, 8, 17)),
    "changes shape in the last third": (any_motion, spliced(other_shape, 11, 17)),
    "changes colour half way": (any_motion, spliced(other_colour, 8, 17)),
    "changes colour at the end": (any_motion, spliced(other_colour, 15, 17)),
    "another colour": (any_motion, drawn(other_colour)),
    "another shape": (any_motion, drawn(other_shape)),
    "noise in its outline": (any_motion, filled_with_noise),
    "a patch beside it": (any_motion, beside_a_patch),
    "another one flashes up": (any_motion, spliced(with_one_more(same_colour=False), 6, 7)),
    "a second of its kind": (any_motion, drawn(with_one_more(same_colour=True))),
    "a second of another kind": (any_motion, drawn(with_one_more(same_colour=False))),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_not_right(name):
    concerns, impostor = IMPOSTORS[name]
    judged = 0
    for rng, scene, caption in prompts(
        60, seed=8, num_objects=1 if name.startswith(("a second", "another one")) else None
    ):
        if concerns(scene.objects[0]):
            judged += 1
            assert not all_right(impostor(scene, rng), caption), caption
        if judged == 6:
            break
    assert judged == 6


@pytest.mark.parametrize(("degrees", "right"), [(-15, True), (15, True), (25, False), (-25, False)])
def test_a_motion_may_be_20_degrees_off_its_direction(degrees, right):
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    judged = 0
    for _, scene, caption in prompts(24, seed=14, num_objects=1):
        obj = scene.objects[0]
        if moves(obj):
            (x, y, radius), (x_end, y_end, _) = obj.start, obj.end
            travel = complex(x_end - x, y_end - y) * turn
            end = x + travel.real, y + travel.imag
            if all(radius < place < 64 - radius for place in end):
                judged += 1
                turned = change_first(scene, end=(*end, radius))
                assert judge.score(judge.judge_clip(world.draw_scene(turned)), caption)["motion"] == right, caption
    assert judged >= 6


def test_each_wrong_word_is_found_and_no_other():
    @functools.cache
    def report(scene: Scene) -> judge.ClipReport:
        return judge.judge_clip(world.draw_scene(scene))

    def wrong(scene: Scene, caption: Caption) -> set[str]:
        return {key for key, right in judge.score(report(scene), caption).items() if not right}

    for rng, scene, caption in prompts(16, seed=9, num_objects=1):
        obj = scene.objects[0]
        caption = replace(caption, background=scene.background)
        assert wrong(scene, caption) == set()
        assert wrong(other_colour(scene, rng), caption) == {"colour", "all"}
        assert wrong(other_shape(scene, rng), caption) == {"shape", "all"}
        other_background = replace(scene, background=other(rng, BACKGROUNDS, scene.background))
        assert wrong(other_background, caption) == {"background", "all"}
        for start, stop in ((0, 8), (8, 17)):
            frames = spliced(lambda *_, changed=other_background: changed, start, stop)(scene, rng)
            assert not judge.score(judge.judge_clip(frames), caption)["background"]
        if moves(obj):
            assert wrong(change_first(scene, start=obj.end, end=obj.start), caption) == {"motion", "all"}
        if obj.motion == "still" and "size" in caption.objects[0]:
            in_the_middle = change_first(scene, start=(32, 32, obj.start[2]), end=(32, 32, obj.start[2]))
            assert wrong(small_for_big(in_the_middle, rng), caption) == {"size", "all"}
    judged = 0
    for _, scene, caption in prompts(20, seed=10, num_objects=2):
        first, second = scene.objects
        # Where two differ in nothing but colour, a wrong relation may as well be called two wrong colours.
        if caption.relation and (first.shape, first.motion) != (second.shape, second.motion):
            judged += 1
            assert wrong(scene, caption) == set()
            assert wrong(scene, replace(caption, relation=world.OPPOSITE[caption.relation])) == {"relation", "all"}
    assert judged > 6


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_small_objects_survive_blur(shape):
    obj = Object("yellow", shape, "left", "small", (40.3, 30.8, 8.2), (20, 30.8, 8.2))
    frames = world.draw_scene(Scene("white", (obj,)))
    for _ in range(4):
        assert judge.judge_clip(frames).objects[0].shape == shape
        frames = degrade(frames, np.random.default_rng(0))


@pytest.mark.parametrize("half_width, half_height, bite", [(16, 7, 0), (7, 16, 0), (12, 12, 0.6)])
def test_an_ellipse_and_a_crescent_are_of_no_shape(half_width, half_height, bite):
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    inside = np.hypot(x / half_width, y / half_height) < 1
    inside &= np.hypot(x / half_width - bite, y / half_height) > (0.8 if bite else 0)
    frame = np.where(inside[..., None], COLOURS["red"], BACKGROUNDS["black"]).astype(np.uint8)
    (obj,) = judge.judge_clip(np.stack([frame] * 17)).objects
    assert (obj.colour, obj.shape, obj.motion) == ("red", None, "still")


def test_an_object_counts_only_if_it_is_there_all_the_time():
    for rng, scene, _ in prompts(5, seed=12, num_objects=1):
        frames = spliced(without_first, 16, 17)(scene, rng)
        assert len(judge.judge_clip(frames[:16]).objects) == 1 and judge.judge_clip(frames).objects == ()


def test_measurements_are_what_was_drawn():
    for _, scene, _ in prompts(20, seed=11):
        report = judge.judge_clip(world.draw_scene(scene), fps=10)
        assert report.background == scene.background
        np.testing.assert_allclose(report.background_rgb, BACKGROUNDS[scene.background], atol=1)
        for obj in scene.objects:
            seen = next(seen for seen in report.objects if seen.colour == obj.colour)
            (x, y, radius), (x_end, y_end, radius_end) = obj.start, obj.end
            np.testing.assert_allclose(seen.rgb, COLOURS[obj.colour], atol=1)
            np.testing.assert_allclose(seen.position, ((x + x_end) / 2, (y + y_end) / 2), atol=0.15)
            np.testing.assert_allclose(seen.displacement, (x_end - x, y_end - y), atol=0.25)
            assert seen.speed == pytest.approx(np.hypot(x_end - x, y_end - y) * 10 / 16, abs=0.2)
            assert seen.radius == pytest.approx((radius + radius_end) / 2, rel=0.04)
            assert seen.growth == pytest.approx(radius_end / radius, rel=0.06)


def test_psnr_is_the_textbook_one():
    a, b = np.full((2, 4, 4, 3), 100, np.uint8), np.full((2, 4, 4, 3), 110, np.uint8)
    assert judge.psnr(a, b) == judge.psnr(b, a) == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert judge.psnr(a, a) == 100


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((17, 64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint8), r"\(64, 64, 3\)"),
        (np.zeros((17, 64, 96, 3), np.uint8), r"\(64, 96\)"),
    ],
)
def test_invalid_clips_are_refused_in_one_line(frames, message):
    with pytest.raises(ValueError, match=message) as error:
        judge.judge_clip(frames)
    assert "\n" not in str(error.value)


def test_any_clip_at_all_can_be_judged():
    rng = np.random.default_rng(0)
    for index in range(15):
        frames, height = int(rng.integers(1, 9)), 64
        coarse = rng.integers(0, 256, (frames, *[2 ** (index % 5)] * 2, 3)).astype(np.uint8)
        clip = coarse.repeat(height // coarse.shape[1], 1).repeat(height // coarse.shape[2], 2)
        assert isinstance(judge.judge_clip(clip), judge.ClipReport)


def test_what_the_judge_does_not_see():
    """As its docstring says: half of the patches of 4 × 5, most ghosts, a fifth as strong as an object, and jerks."""
    overlooked, jerky, moving = {"patch": 0, "ghost": 0}, {"pairs": 0, "four in a row": 0}, 0
    for i in range(20):
        rng = np.random.default_rng([31, i])
        scene = world.sample_scene(rng, "all", 1)
        caption = write_caption(scene, "english", rng)
        colour = next(np.array(rgb) for name, rgb in COLOURS.items() if name != scene.objects[0].colour)
        for name, (height, width), share in (("patch", (4, 5), 1.0), ("ghost", (20, 20), 0.2)):
            frames = world.draw_scene(scene)
            corner = frames[:, 2 : 2 + height, 2 : 2 + width]
            corner[:] = corner + share * (colour - corner)
            overlooked[name] += judge.score(judge.judge_clip(frames), caption)["all"]
        if moves(scene.objects[0]):
            moving += 1
            for name, order in (
                ("pairs", [i ^ 1 for i in range(16)] + [16]),
                ("four in a row", np.arange(17) // 4 * 4),
            ):
                jerky[name] += all_right(world.draw_scene(scene)[order], caption)
    assert overlooked["patch"] >= 8 and overlooked["ghost"] >= 15, overlooked
    assert moving > 5 and min(jerky.values()) >= 0.9 * moving, (jerky, moving)
