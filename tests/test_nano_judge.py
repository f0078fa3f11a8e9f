"""The judge of nano clips is right about what is drawn, also when blurred, and is not taken in by what is not."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kandinsky5.dit import DiT
from kandinsky5.nano import judge, world
from kandinsky5.nano.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Object, Scene
from random_weights import SMALL_DIT, SMALL_NABLA, randomise


def questions(count: int, seed: int = 7, **options):
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = world.sample_scene(rng, "all", **options)
        yield rng, scene, world.caption(scene, ("english", "russian")[index % 2], rng)


def all_right(frames: np.ndarray, said: world.Caption, **options) -> bool:
    return judge.score(judge.judge_clip(frames, **options), said)["all"]


def test_drawn_clips_are_right():
    right = [all_right(world.draw_scene(scene), said) for _, scene, said in questions(120)]
    assert np.mean(right) >= 0.99


def test_clips_of_twice_the_size_and_of_a_large_canvas_are_right():
    for _, scene, said in questions(10):
        assert all_right(world.draw_scene(scene, 33, 128, 128), said)
    for _, scene, said in questions(10, canvas=(64, 128)):
        assert all_right(world.draw_scene(scene, 33, 64, 128), said, canvas=(64, 128))


def test_clips_as_bad_as_a_poor_decoder_makes_them_are_right():
    results, ratios = [], []
    for rng, scene, said in questions(120):
        drawn = world.draw_scene(scene)
        frames = degrade(drawn, rng)
        results.append(all_right(frames, said))
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
    return change_first(scene, colour=other(rng, COLOURS, *(thing.colour for thing in scene.objects)))


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
            if all(world.relations(more, thing) for thing in scene.objects):
                if same_colour or more.colour not in (thing.colour for thing in scene.objects):
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
    thing = scene.objects[0]
    radius = {"small": 12.5, "big": 8.5}[thing.size]
    return change_first(scene, start=(*thing.start[:2], radius), end=(*thing.end[:2], radius))


def any_motion(thing: Object) -> bool:
    return True


def moves(thing: Object) -> bool:
    return thing.motion in DIRECTIONS


def changes(thing: Object) -> bool:
    return thing.motion != "still"


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
def test_is_not_taken_in_by(name):
    concerns, impostor = IMPOSTORS[name]
    asked = 0
    for rng, scene, said in questions(
        60, seed=8, num_objects=1 if name.startswith(("a second", "another one")) else None
    ):
        if concerns(scene.objects[0]) and asked < 12:
            asked += 1
            assert not all_right(impostor(scene, rng), said), said
    assert asked == 12


@pytest.mark.parametrize(("degrees", "right"), [(-15, True), (15, True), (25, False), (-25, False)])
def test_a_motion_is_that_of_a_direction_20_degrees_from_it_at_most(degrees, right):
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    asked = 0
    for _, scene, said in questions(40, seed=14, num_objects=1):
        thing = scene.objects[0]
        if moves(thing):
            (x, y, radius), (x_end, y_end, _) = thing.start, thing.end
            travel = complex(x_end - x, y_end - y) * turn
            end = x + travel.real, y + travel.imag
            if all(radius < place < 64 - radius for place in end):
                asked += 1
                turned = change_first(scene, end=(*end, radius))
                assert judge.score(judge.judge_clip(world.draw_scene(turned)), said)["motion"] == right, said
    assert asked >= 10


def test_each_wrong_word_is_found_and_no_other():
    def wrong(scene: Scene, said: world.Caption) -> set[str]:
        return {key for key, right in judge.score(judge.judge_clip(world.draw_scene(scene)), said).items() if not right}

    for rng, scene, said in questions(40, seed=9, num_objects=1):
        thing = scene.objects[0]
        said = replace(said, background=scene.background)
        assert wrong(scene, said) == set()
        assert wrong(other_colour(scene, rng), said) == {"colour", "all"}
        assert wrong(other_shape(scene, rng), said) == {"shape", "all"}
        other_background = replace(scene, background=other(rng, BACKGROUNDS, scene.background))
        assert wrong(other_background, said) == {"background", "all"}
        for start, stop in ((0, 8), (8, 17)):
            frames = spliced(lambda *_, changed=other_background: changed, start, stop)(scene, rng)
            assert not judge.score(judge.judge_clip(frames), said)["background"]
        if moves(thing):
            assert wrong(change_first(scene, start=thing.end, end=thing.start), said) == {"motion", "all"}
        if thing.motion == "still" and "size" in said.objects[0]:
            in_the_middle = change_first(scene, start=(32, 32, thing.start[2]), end=(32, 32, thing.start[2]))
            assert wrong(small_for_big(in_the_middle, rng), said) == {"size", "all"}
    asked = 0
    for _, scene, said in questions(40, seed=10, num_objects=2):
        first, second = scene.objects
        # Where two differ in nothing but colour, a wrong relation may as well be called two wrong colours.
        if said.relation and (first.shape, first.motion) != (second.shape, second.motion):
            asked += 1
            assert wrong(scene, said) == set()
            assert wrong(scene, replace(said, relation=world.OPPOSITE[said.relation])) == {"relation", "all"}
    assert asked > 15


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_of_a_small_object_is_known_however_blurred_or_sharp(shape):
    thing = Object("yellow", shape, "left", "small", (40.3, 30.8, 8.2), (20, 30.8, 8.2))
    frames = world.draw_scene(Scene("white", (thing,)))
    for _ in range(4):
        assert judge.judge_clip(frames).objects[0].shape == shape
        frames = degrade(frames, np.random.default_rng(0))


@pytest.mark.parametrize("half_width, half_height, bite", [(16, 7, 0), (7, 16, 0), (12, 12, 0.6)])
def test_an_ellipse_and_a_crescent_are_of_no_shape(half_width, half_height, bite):
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    inside = np.hypot(x / half_width, y / half_height) < 1
    inside &= np.hypot(x / half_width - bite, y / half_height) > (0.8 if bite else 0)
    frame = np.where(inside[..., None], COLOURS["red"], BACKGROUNDS["black"]).astype(np.uint8)
    (thing,) = judge.judge_clip(np.stack([frame] * 17)).objects
    assert (thing.colour, thing.shape, thing.motion) == ("red", None, "still")


def test_an_object_counts_only_if_it_is_there_all_the_time():
    for rng, scene, _ in questions(5, seed=12, num_objects=1):
        frames = spliced(without_first, 16, 17)(scene, rng)
        assert len(judge.judge_clip(frames[:16]).objects) == 1 and judge.judge_clip(frames).objects == ()


def test_what_is_measured_is_what_was_drawn():
    for _, scene, _ in questions(40, seed=11):
        report = judge.judge_clip(world.draw_scene(scene), fps=10)
        assert report.background == scene.background
        np.testing.assert_allclose(report.background_rgb, BACKGROUNDS[scene.background], atol=1)
        for thing in scene.objects:
            seen = next(seen for seen in report.objects if seen.colour == thing.colour)
            (x, y, radius), (x_end, y_end, radius_end) = thing.start, thing.end
            np.testing.assert_allclose(seen.rgb, COLOURS[thing.colour], atol=1)
            np.testing.assert_allclose(seen.position, ((x + x_end) / 2, (y + y_end) / 2), atol=0.15)
            np.testing.assert_allclose(seen.displacement, (x_end - x, y_end - y), atol=0.25)
            assert seen.speed == pytest.approx(np.hypot(x_end - x, y_end - y) * 10 / 16, abs=0.2)
            assert seen.radius == pytest.approx((radius + radius_end) / 2, rel=0.04)
            assert seen.growth == pytest.approx(radius_end / radius, rel=0.06)


def test_psnr_is_the_textbook_one():
    a, b = np.full((2, 4, 4, 3), 100, np.uint8), np.full((2, 4, 4, 3), 110, np.uint8)
    assert judge.psnr(a, b) == judge.psnr(b, a) == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert judge.psnr(a, a) == 100


@pytest.mark.parametrize(("right", "asked"), [(95, 100), (1, 3), (150, 300)])
def test_wilsons_interval_ends_where_the_rate_is_just_not_rejected(right, asked):
    for rate in judge.wilson(right, asked):  # the definition: |measured - rate| is 1.96 standard errors of that rate
        assert abs(right / asked - rate) == pytest.approx(1.96 * np.sqrt(rate * (1 - rate) / asked))
    assert judge.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)  # as published calculators have it
    assert judge.wilson(0, 10)[0] == 0 and judge.wilson(10, 10)[1] == 1 and judge.wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((17, 64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint8), r"\(64, 64, 3\)"),
        (np.zeros((17, 64, 96, 3), np.uint8), r"\(64, 96\)"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(frames, message):
    with pytest.raises(ValueError, match=message) as error:
        judge.judge_clip(frames)
    assert "\n" not in str(error.value)


def test_any_clip_at_all_can_be_judged():
    rng = np.random.default_rng(0)
    for index in range(30):
        frames, height = int(rng.integers(1, 9)), 64
        coarse = rng.integers(0, 256, (frames, *[2 ** (index % 5)] * 2, 3)).astype(np.uint8)
        clip = coarse.repeat(height // coarse.shape[1], 1).repeat(height // coarse.shape[2], 2)
        assert isinstance(judge.judge_clip(clip), judge.ClipReport)


# ---------------------------------------------------------------------------------------------- the command


class IdentityVAE(torch.nn.Module):
    """Keeps everything, and adds noise if asked to."""

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.noise = torch.nn.Parameter(torch.tensor(noise))

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mean=video)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        assert z.ndim == 5 and z.shape[1] == 3
        return z + self.noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


class FakePipeline:
    """Draws what was asked for (it knows the questions by heart), or noise."""

    def __init__(self, honest: bool, clip_noise: float = 0.0, vae_noise: float = 0.0):
        steps = {"num_inference_steps": 50, "guidance_scale": 2.0, "shift": 3.0}
        sampling = SimpleNamespace(num_frames=17, height=64, width=64, fps=10, **steps)
        self.config, self.vae = SimpleNamespace(sampling=sampling), IdentityVAE(vae_noise)
        self.honest, self.clip_noise = honest, clip_noise
        self.scenes, self.calls = {}, []
        for name in judge.EXAM:
            for index in range(12):
                scene, said = judge.question(name, index)
                self.scenes[said.text, index] = scene

    def __call__(self, prompt, image=None, seed=0, num_frames=None, height=None, width=None, progress=True, **options):
        assert isinstance(prompt, list) and not progress
        self.calls.append((prompt, image, seed, options))
        if not self.honest:
            noise = np.random.default_rng(seed).integers(0, 256, (len(prompt), num_frames, height, width, 3))
            return torch.from_numpy(noise.astype(np.uint8))
        scenes = [self.scenes[text, seed + i] for i, text in enumerate(prompt)]
        clips = np.stack([world.draw_scene(scene, num_frames, height, width) for scene in scenes])
        if image is not None:
            np.testing.assert_array_equal(clips[0, 0], image)
        noise = np.random.default_rng(seed).normal(0, self.clip_noise * 127.5, clips.shape)
        return torch.from_numpy(np.clip(clips + noise, 0, 255).round().astype(np.uint8))


def run_command(tmp_path, pipe: FakePipeline, *arguments: str) -> dict:
    def load(name, device, dtype):
        assert (name, device, dtype) == ("some/nano", "cpu", torch.float32)
        return pipe

    output = tmp_path / "scores.json"
    judge.main(["some/nano", "--prompts", "12", "--output", str(output), *arguments], load)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.md"]
    return json.loads(output.read_text(encoding="utf-8"))


def test_what_the_judge_does_not_see():
    """As its docstring says: half of the patches of 4 × 5, most ghosts, a fifth as strong as an object, and jerks."""
    overlooked, jerky, moving = {"patch": 0, "ghost": 0}, {"pairs": 0, "four in a row": 0}, 0
    for i in range(20):
        rng = np.random.default_rng([31, i])
        scene = world.sample_scene(rng, "all", 1)
        said = world.caption(scene, "english", rng)
        colour = next(np.array(rgb) for name, rgb in COLOURS.items() if name != scene.objects[0].colour)
        for name, (height, width), share in (("patch", (4, 5), 1.0), ("ghost", (20, 20), 0.2)):
            frames = world.draw_scene(scene)
            corner = frames[:, 2 : 2 + height, 2 : 2 + width]
            corner[:] = corner + share * (colour - corner)
            overlooked[name] += judge.score(judge.judge_clip(frames), said)["all"]
        if moves(scene.objects[0]):
            moving += 1
            for name, order in (
                ("pairs", [i ^ 1 for i in range(16)] + [16]),
                ("four in a row", np.arange(17) // 4 * 4),
            ):
                jerky[name] += all_right(world.draw_scene(scene)[order], said)
    assert overlooked["patch"] >= 8 and overlooked["ghost"] >= 15, overlooked
    assert moving > 5 and min(jerky.values()) >= 0.9 * moving, (jerky, moving)


def test_a_pipeline_that_draws_what_it_is_asked_scores_all(tmp_path, capsys):
    pipe = FakePipeline(honest=True)
    document = run_command(tmp_path, pipe, "--batch-size", "5", "--steps", "9", "--guidance", "2")
    assert list(document["sets"]) == list(judge.EXAM)
    assert document["sampling"] == {"num_inference_steps": 9, "guidance_scale": 2, "shift": 3}
    for name, summary in document["sets"].items():
        assert summary["clips"] == 12 and document["mistakes"][name] == [], name
        assert summary["answers"]["all"] == {
            "right": 12,
            "asked": 12,
            "rate": 1,
            "interval": list(judge.wilson(12, 12)),
        }
    assert document["sets"]["image to video"]["answers"]["first frame"]["rate"] == 1
    assert document["sets"]["VAE"]["psnr"] > 60
    assert all(options == {"num_inference_steps": 9, "guidance_scale": 2} for *_, options in pipe.calls)
    assert [seed for _, image, seed, _ in pipe.calls if image is None][:3] == [0, 5, 10]

    printed = capsys.readouterr().out
    assert printed == (tmp_path / "scores.md").read_text(encoding="utf-8")
    lines = printed.splitlines()
    assert len(lines) == 2 + len(judge.EXAM) and len({line.count("|") for line in lines}) == 1
    assert "| seen, Russian | 12 | 100.0 | 75.7 to 100.0 |" in printed


def test_a_pipeline_that_draws_noise_scores_nothing(tmp_path):
    sets = ("seen, English", "held out, Russian", "two objects", "image to video")
    document = run_command(tmp_path, FakePipeline(honest=False), "--sets", *sets)
    for name in sets:
        answers = document["sets"][name]["answers"]
        assert answers["all"]["right"] == answers["motion"]["right"] == answers["objects"]["right"] == 0
        assert len(document["mistakes"][name]) == 12 and document["mistakes"][name][0]["text"]
        assert all(mistake["unexplained"] > judge.MAX_UNEXPLAINED for mistake in document["mistakes"][name])
    assert document["sets"]["image to video"]["answers"]["first frame"]["right"] == 0


@pytest.mark.parametrize(("noise", "good"), [(0.06, True), (0.08, True), (0.105, False)])
def test_the_first_frame_is_held_against_the_vaes_own_reconstruction(noise, good):
    """The same clips with noise, where the VAE's is 0.08: 2.5 dB better, as good, and 2.4 dB worse."""
    pipe = FakePipeline(honest=True, clip_noise=noise, vae_noise=0.08)
    results = list(judge.examine(pipe, "image to video", 4))
    assert [result["answers"]["first frame"] for result in results] == [good] * 4


def test_full_attention_is_the_same_weights_without_a_map():
    dit = randomise(DiT(replace(SMALL_DIT, nabla=SMALL_NABLA)))
    full = judge.with_full_attention(dit)
    assert full.config == SMALL_DIT and full.state_dict().keys() == dit.state_dict().keys()
    x, text, pooled = torch.randn(1, 2, 32, 32, 33), torch.randn(1, 5, 16), torch.randn(1, 24)
    with torch.no_grad():
        expected = dit(x, text, pooled, torch.tensor([0.5]))
        dense = DiT(SMALL_DIT)
        dense.load_state_dict(dit.state_dict())
        assert full(x, text, pooled, torch.tensor([0.5])).equal(dense(x, text, pooled, torch.tensor([0.5])))
        assert not full(x, text, pooled, torch.tensor([0.5])).equal(expected)


def test_the_command_takes_full_attention_where_there_is_nabla(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, full = FakePipeline(honest=True), object()
    pipe.dit, pipe.config.dit = None, SimpleNamespace(nabla=SMALL_NABLA)
    monkeypatch.setattr(judge, "with_full_attention", lambda dit: full)
    command = ["nano-10s", "--prompts", "1", "--sets", "seen, English"]
    judge.main(command, lambda *_, **__: pipe)
    assert pipe.dit is None
    judge.main([*command, "--full-attention"], lambda *_, **__: pipe)
    assert pipe.dit is full
    names = ("judge_nano-10s", "judge_nano-10s-full-attention")
    assert {path.name for path in tmp_path.iterdir()} == {name + end for name in names for end in (".json", ".md")}
    pipe.config.dit.nabla = None
    with pytest.raises(ValueError, match="--full-attention: nano-10s has no NABLA: leave it out"):
        judge.main([*command, "--full-attention"], lambda *_, **__: pipe)


def test_a_run_that_was_not_exported_is_not_judged(tmp_path):
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="is a run: export it first"):
        judge.main([str(tmp_path)])


def test_the_questions_do_not_depend_on_the_run():
    scene, said = judge.question("two objects", 5)
    assert (scene, said) == judge.question("two objects", 5) != judge.question("two objects", 6)
    assert judge.question("two objects", 5, seed=1) != (scene, said)
    held_out = [judge.question("held out, English", i)[0].objects[0] for i in range(20)]
    assert {(thing.colour, thing.shape, thing.motion) for thing in held_out} <= world.HELD_OUT


@pytest.mark.parametrize(
    "arguments",
    [["nano", "--prompts", "0"], ["nano", "--steps", "0"], ["nano", "--seed", "-1"], ["nano", "--sets", "all"], []],
)
def test_a_wrong_command_ends_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        judge.main(arguments)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err
