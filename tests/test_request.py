"""What a request says when nothing is asked, and what is refused, in one line, before any model works."""

import io
import sys
from collections import deque
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.config import PRESETS
from kandinsky5.request import Request, check_functions
from random_weights import SMALL, SMALL_DIT, SMALL_NABLA, build_small_pipeline

PIXELS = torch.zeros(32, 48, 3, dtype=torch.uint8)
HUGE = 10**60


def resolve(prompt="a fox", config=SMALL, **arguments):
    return Request.resolve(config, prompt, **arguments)


@pytest.mark.parametrize("config", [SMALL, *PRESETS.values()], ids=lambda config: config.name)
def test_what_is_not_asked_is_the_checkpoints_own(config):
    image = PIXELS if config.tasks[0].startswith("i2") and len(config.tasks) == 1 else None
    request, sampling = resolve(config=config, image=image), config.sampling
    assert request.negative_prompts == (sampling.negative_prompt,) and request.seeds == (0,)
    assert (request.steps, request.guidance_scale) == (sampling.num_inference_steps, sampling.guidance_scale)
    assert request.guided == (sampling.guidance_scale != 1) and not any(request.skips)
    if image is None:
        assert (request.height, request.width) == (sampling.height, sampling.width)
        assert request.rope_scale == (sampling.rope_scale or (1.0, 3.16, 3.16))
        assert request.latent_shape[1:] == (sampling.height // 8, sampling.width // 8, 16)


def test_seeds_are_one_for_each_video():
    assert resolve(["a", "b"], seed=3, num_videos_per_prompt=2).seeds == (3, 4, 5, 6)
    assert resolve(["a", "b"], seed=[3, 90], num_videos_per_prompt=2).seeds == (3, 4, 90, 91)


def test_nothing_of_a_request_can_be_changed():
    with pytest.raises(AttributeError):
        resolve().height = 3


def test_images_are_resized_once_to_the_video():
    images = [torch.zeros(40, 90, 3, dtype=torch.uint8), torch.zeros(80, 180, 3, dtype=torch.uint8)]
    request = resolve(["a", "b"], image=images)
    assert (
        [tuple(image.shape) for image in request.images]
        == [(request.height, request.width, 3)] * 2
        == [(32, 64, 3)] * 2
    )


REFUSED = {
    "height": [500, -16, 0, 16400, HUGE, 512.0, "512", True, torch.tensor([32, 48]), torch.tensor(32), {}, np.nan],
    "width": [8, 2**70, np.array([48]), torch.empty(1, device="meta")],
    "num_frames": [24, 0, -3, HUGE, 5.0, "5", [5], torch.ones(2)],
    "num_inference_steps": [0, -1, 10**7, HUGE, 2.5, "3", torch.ones(3), {}],
    "guidance_scale": [float("nan"), float("inf"), HUGE, 10**400, "5", torch.ones(2), {}, [5.0], 1j],
    "shift": [0.0, -1, float("nan"), float("inf"), 10**400, "5", torch.ones(2), {}],
    "schedule": ["linear", None, 3, ["official"], torch.ones(2), {}],
    "prompt": [[], 3, None, {}, {"a": 1}, [3], ["a", None], b"a", torch.ones(2), "x" * 10**6, "\udcff"],
    "negative_prompt": [["a", "b"], [], 3, {}, [3], "x" * 10**6, torch.ones(2)],
    "num_videos_per_prompt": [0, -1, 2**40, HUGE, 1.0, "2", torch.ones(2)],
    "max_sequence_length": [0, -1, HUGE, 8.0, "8", {}],
    "output_type": ["pil", None, 3, ["uint8"], torch.ones(2)],
    "rope_scale": [(1.0, 2.0), (1, 2, 0), (1.0, 2.0, float("inf")), (1, 2, HUGE), "123", 3, torch.ones(3), (1, 2, "2")],
    "latents": [
        torch.zeros(1, 2, 4, 4, 16), torch.full((1, 2, 4, 6, 16), torch.nan), [[0.0]], "noise", {}, 3,
        torch.zeros(1, 2, 4, 6, 16, device="meta"), torch.zeros(1, 2, 4, 6, 16).to_sparse(),
        torch.zeros(1, 2, 4, 6, 16, dtype=torch.complex64),
    ],
    "image": [
        torch.zeros(3, 8, 8), torch.zeros(0, 8, 3, dtype=torch.uint8), np.zeros((0, 0, 3), np.uint8),
        "no/such/file.png", Path("nowhere"), {}, 3, [],
        torch.zeros(1, 10**6, 3, dtype=torch.uint8).numpy(), PIXELS.to("meta"), PIXELS.to_sparse(), [PIXELS, PIXELS],
        [[PIXELS]], np.array("a"), object(),
    ],
    "seed": [-1, 2**63, HUGE, 1.5, "3", None, [1, 2], [], [-1], ["a"], torch.ones(2), torch.empty(1, device="meta")],
    "step_skipping": [7, "no/such.json", {}, {"conditional": "1.0"}, torch.ones(2), [1.0]],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_cannot_be_is_refused_in_one_line(name, value):
    with pytest.raises(ValueError) as caught:
        resolve(**{name: value})
    assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) < 400


class Broken:
    """A value of which nothing can be known."""

    def __repr__(self):
        raise RuntimeError("no\nrepr")

    __array__ = __iter__ = __bool__ = __repr__


class Tall(int):
    """An int of one's own is an int."""


itself: list = []
itself.append(itself)
ODD = [
    HUGE, -HUGE, 10**400, 2**63, -1, 0, 0.0, -0.0, 1e308, 5e-324, np.nan, np.inf, True, False, "", " ", "32",
    "\ud800", "a\0b", "\x1b]0;x\x07", "x" * 200_000, b"a", bytearray(b"a"), memoryview(b"a"), [], [1], [[1]], (1, 2),
    [None], itself, {}, {1: 2}, {1}, range(3), iter([1]), torch.tensor(32), torch.tensor([1, 2]), torch.empty(0),
    torch.empty(2, device="meta"), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64),
    torch.tensor([True]), torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    torch.zeros(1, 2, 4, 6, 16).to(torch.float8_e4m3fn), torch.zeros(1, 2, 4, 6, 16, dtype=torch.int64), np.int64(32),
    np.uint8(1), np.float32(2.5), np.zeros(3), np.array(5), np.array([None, "a"], dtype=object),
    np.zeros(2, dtype=[("a", "i4")]), np.ma.masked_array([1, 2], [0, 1]), np.datetime64("2020-01-01"), np.bool_(True),
    1j, Decimal("5"), Decimal("nan"), Fraction(1, 3), Broken(), [Broken()], Tall(32), int, len, sys, object(), ...,
    slice(1), ValueError("a\nb"), Path("/dev/zero"), io.StringIO("x"), io.BytesIO(b"x"), torch.device("cpu"),
    torch.float32, torch.nn.Linear(1, 1), deque(["a"]), ["a"] * 100_000, ("1",) * 3, [HUGE] * 3, [np.nan] * 3,
    [torch.ones(1)] * 3, Image.new("F", (4, 4)), Image.new("RGB", (0, 3)),
]  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, "max_sequence_length"])
def test_hundreds_of_odd_values_are_taken_or_refused_in_one_line(name):
    refused = 0
    for value in ODD:
        try:
            resolve(**{name: value})
        except ValueError as error:
            refused += 1
            assert str(error).isprintable() and 0 < len(str(error)) < 400
    assert refused > len(ODD) / 2


@pytest.mark.parametrize("value", [value for value in ODD if not callable(value) and value is not None])
def test_what_is_no_function_is_refused_in_one_line(value):
    for wrong in ({"callback": value}, {"solver": value}):
        with pytest.raises(ValueError) as error:
            check_functions(**{"callback": None, "progress": True, "solver": len} | wrong)
        assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_solver_returns_latents_of_the_noises_shape():
    pipe = build_small_pipeline()
    for solver in (lambda *a: None, lambda *a: a[1][:, :1]):
        with pytest.raises(ValueError, match="solver returned") as error:
            pipe("a fox", progress=False, solver=solver)
        assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_ten_thousand_videos_are_the_most():
    with pytest.raises(ValueError, match="10,000"):
        resolve(["a"] * 10_001)
    with pytest.raises(ValueError, match="num_videos_per_prompt 5001"):
        resolve(["a", "b"], num_videos_per_prompt=5001)


def test_images_of_two_shapes_need_a_size():
    images = [PIXELS, PIXELS.transpose(0, 1)]
    with pytest.raises(ValueError, match="height"):
        resolve(["a", "b"], image=images)
    assert len(resolve(["a", "b"], image=images, height=32, width=32).images) == 2


def test_the_task_is_the_checkpoints():
    with pytest.raises(ValueError, match="image"):
        resolve(config=replace(SMALL, tasks=("t2v",)), image=PIXELS)
    with pytest.raises(ValueError, match="image"):
        resolve(config=replace(SMALL, tasks=("i2v",)))


def test_with_nabla_sides_are_multiples_of_128():
    config = replace(SMALL, dit=replace(SMALL_DIT, nabla=SMALL_NABLA))
    with pytest.raises(ValueError, match="128 or 256"):
        resolve(config=config, height=144)
    assert resolve(config=config, height=128, width=256).latent_shape == (2, 16, 32, 16)


def test_magcache_is_imported_only_where_steps_are_skipped(monkeypatch):
    """Every file of kandinsky5/extras can be deleted."""
    for name in [name for name in sys.modules if name.startswith("kandinsky5.extras")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kandinsky5.extras", None)
    assert resolve().steps == 2
    with pytest.raises(ImportError):
        resolve(step_skipping=True)


def test_a_single_frame_is_encoded_as_an_image(monkeypatch):
    pipe, seen = build_small_pipeline(), []
    encode = pipe.text_encoder.encode
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda *a: seen.append(a[2]) or encode(*a))
    for num_frames in (1, 5):
        pipe("a fox", num_frames=num_frames, num_inference_steps=1, output_type="latents", progress=False)
    assert seen == [True, False]
