"""The trained `nano`, exported to the Diffusers layout, gives the same frames in the real diffusers pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from PIL import Image

import theirs as reference
from kandinsky5 import Pipeline
from kandinsky5.nano.world import draw_scene, sample_scene
from weights_convert import to_diffusers

STEPS, SEED = 4, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    nano = Path(__file__).parents[2] / "kandinsky5" / "nano" / "weights" / "nano"
    folder = tmp_path_factory.mktemp("nano") / "diffusers"
    to_diffusers(nano, folder, progress=False)
    return folder


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@torch.inference_mode()
def test_nano_in_diffusers_gives_the_same_frames(kind, folder, monkeypatch, record):
    reference.make_comparable(monkeypatch)
    monkeypatch.setattr(Kandinsky5I2VPipeline, "normalize_first_frame", lambda self, latents: latents)  # nano has none
    ours = Pipeline.load("nano", dtype=torch.float32)
    theirs = build_pipeline({"t2v": Kandinsky5T2VPipeline, "i2v": Kandinsky5I2VPipeline}[kind], folder, ours)

    prompt = "a small red circle moves left on a white background"
    settings = ours.config.sampling
    options = dict(height=settings.height, width=settings.width, num_frames=settings.num_frames)
    options |= dict(num_inference_steps=STEPS, guidance_scale=settings.guidance_scale)
    image = torch.from_numpy(draw_scene(sample_scene(3), num_frames=1)[0]) if kind == "i2v" else None  # (64, 64, 3)
    given = {} if image is None else {"image": Image.fromarray(image.numpy())}
    expected = theirs(
        prompt=prompt, negative_prompt="", generator=torch.Generator().manual_seed(SEED), output_type="np",
        max_sequence_length=256, **given, **options,
    ).frames  # fmt: skip
    frames = ours(prompt, image=image, seed=SEED, schedule="diffusers", output_type="float", progress=False, **options)
    error = float((frames - torch.as_tensor(expected)).abs().max())
    record(f"nano {kind}, largest difference", "float32", error, 1 / 255)
    assert frames.std() > 1e-2 and error <= 1 / 255


def build_pipeline(kind: type, folder: Path, ours: Pipeline):
    """Their pipeline as `from_pretrained` would make it, with nano's template and shift."""
    settings = ours.config.sampling
    parts = reference.load_components(folder, torch.float32)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.use_framewise_encoding = pipe.vae.use_framewise_decoding = False  # nano's clips are decoded in one piece
    pipe._get_scale_factor = lambda height, width: settings.rope_scale  # theirs knows only released sizes
    pipe.prompt_template = ours.config.text.template
    pipe.prompt_template_encode_start_idx = ours.config.text.dropped_tokens
    return pipe
