"""What a request says when nothing is asked, and what is refused, in one line, before any model works."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky5.config import PRESETS
from kandinsky5.request import Request
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
        torch.zeros(3, 8, 8), torch.zeros(0, 8, 3, dtype=torch.uint8), "no/such/file.png", Path("nowhere"), {}, 3, [],
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
