"""The image models: stored results of diffusers, mistakes that these must notice, and what is particular to images."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import image_cases
from image_golden import IMAGES, bfl_names, convert, load_pipeline, measure_error
from kandinsky5 import Pipeline, pipeline, sampler, text_encoder, vae, vae2d, video_io
from kandinsky5.config import FLUX, PRESETS, VAEConfig
from kandinsky5.config_file import load_config
from kandinsky5.extras import lora, preview
from kandinsky5.request import Request
from random_weights import relative_error, save_small_checkpoint
from test_lora import random_lora
from test_mutations import replace_code
from weights_convert import from_diffusers, from_official, to_diffusers, write_native

golden = functools.cache(load_pipeline)
CASES = [("t2i", name) for name in image_cases.OURS if name != "i2i"] + [("i2i", "dit"), ("i2i", "i2i")]


@pytest.mark.parametrize("task, name", CASES)
def test_images_match_the_references(task, name):
    assert measure_error(name, golden(task)) <= image_cases.LIMITS[name]


# fmt: off
MUTATIONS: list[tuple[str, str, Callable, str, str]] = [  # name, case, function, right, wrong
    ("zeros all around before a strided conv", "vae_encode",
     vae2d.Downsample.forward, "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
    ("attention without its input", "vae_decode", vae2d.ImageAttention.forward, "x + rearrange", "rearrange"),
    ("norm without SiLU", "vae_decode", vae.ResidualBlock.forward, "F.silu(self.norm_2(y))", "self.norm_2(y)"),
    ("log-variance before the mean", "vae_encode", vae.Posterior.from_moments, "mean, logvar =", "logvar, mean ="),
    ("shift_factor taken off when encoding", "i2i",
     pipeline.Pipeline.encode_image, "z * self.config.vae.scaling_factor",
     "(z - 0.1159) * self.config.vae.scaling_factor"),
    ("shift_factor added when decoding", "t2i",
     pipeline.Pipeline.decode, "self.config.vae.scaling_factor)", "self.config.vae.scaling_factor + 0.1159)"),
    ("mask zeros in editing", "i2i", sampler.build_condition, "condition[:, :1, ..., -1] = 1", "pass"),
    ("no source in editing", "i2i", sampler.build_condition, "condition[..., :-1] = image", "pass"),
    ("source latents noised", "i2i",
     sampler.build_condition, "condition[..., :-1] = image", "condition[..., :-1] = (image + latents) / 2"),
    ("source also the first frame", "i2i", pipeline.Pipeline.sample, "None if config.edits else image", "image"),
    ("Qwen sees the whole image", "i2i", video_io.halve_image, "image.shape[1] // 2", "image.shape[1]"),
    ("no image with the negative prompt", "i2i", text_encoder.TextEncoder.place_images, "math.prod(next(counts))",
     "math.prod(next(counts)) if len(ids) > 80 else 1"),
    ("all of the template dropped, and none of the prompt", "i2i",
     text_encoder.TextEncoder.template, "config.template, config.dropped_tokens", "config.template, 52"),
]
# fmt: on


@pytest.mark.parametrize("name, case, function, right, wrong", MUTATIONS, ids=[row[0] for row in MUTATIONS])
def test_the_image_case_notices(name, case, function, right, wrong, monkeypatch):
    replace_code(monkeypatch, function, right, wrong)
    try:
        error = measure_error(case, golden("i2i" if case == "i2i" else "t2i"))
    except RuntimeError:  # shapes that do not go together
        error = float("inf")
    assert error > image_cases.LIMITS[case]


@pytest.fixture(params=["t2i", "i2i"])
def pipe(request) -> Pipeline:
    return golden(request.param)


SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "progress": False}
SOURCE = torch.randint(0, 256, (70, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def given(pipe: Pipeline) -> dict:
    return {"image": SOURCE} if pipe.config.edits else {}


def test_a_batch_is_what_each_gives_alone(pipe):
    prompts, how = ["a fox", "a very long description of a red fox in deep snow"], SMALL | given(pipe)
    together = pipe(prompts, seed=5, num_videos_per_prompt=2, output_type="latents", **how)
    assert together.shape[:2] == (4, 1)
    for i in range(4):
        alone = pipe(prompts[i // 2], seed=5 + i, output_type="latents", **how)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_an_image_takes_the_released_size_most_like_its_own():
    sizes = PRESETS["i2i-lite-sft"].sampling.sizes
    for height, width, expected in [(500, 500, (1024, 1024)), (3000, 4000, (896, 1152)), (1000, 400, (1408, 640))]:
        image = torch.zeros(height // 10, width // 10, 3, dtype=torch.uint8)
        assert expected in sizes
        request = Request.resolve(PRESETS["i2i-lite-sft"], "a fox", image)
        assert (request.height, request.width) == expected and request.num_frames == 1
        assert request.images[0].shape == (*expected, 3)
        assert request.qwen_images[0].shape == (height // 20, width // 20, 3)
    assert Request.resolve(PRESETS["i2i-lite-sft"], "a fox", image, height=512, width=768).height == 512


def test_what_image_models_do_not_do_is_refused():
    with pytest.raises(ValueError, match="single images"):
        Request.resolve(PRESETS["t2i-lite-sft"], "a fox", num_frames=5)
    with pytest.raises(ValueError, match="leave the image out"):
        Request.resolve(PRESETS["t2i-lite-sft"], "a fox", SOURCE)
    with pytest.raises(ValueError, match="give an image"):
        Request.resolve(PRESETS["i2i-lite-sft"], "a fox")
    with pytest.raises(ValueError, match="--with-vision"):
        Request.resolve(replace(PRESETS["i2i-lite-sft"], qwen_vision=None), "a fox", SOURCE)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 16), (70, 40), (200, 100)])
def test_an_image_is_covered_and_its_middle_taken(size):
    """Without a scale it is the middle itself; the whole of one side always stays."""
    covered = video_io.cover_size(SOURCE, *size)
    assert covered.shape == (*size, 3)
    columns = torch.arange(40, dtype=torch.uint8).view(1, 40, 1).expand(70, 40, 3)
    widest = video_io.cover_size(columns, *size).float()
    assert abs(widest.mean() - 19.5) < 1
    assert video_io.cover_size(SOURCE, 70, 20).equal(SOURCE[:, 10:30])


def test_a_video_is_a_batch_of_images():
    model = golden("t2i").vae
    video = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    mean, one = model.encode(video).mean, model.encode(video[1:, :, 2:]).mean
    assert mean.shape == (2, 16, 3, 2, 3)
    torch.testing.assert_close(mean[1:, :, 2:], one)
    torch.testing.assert_close(model.decode(mean)[1:, :, 2:], model.decode(one))


def test_previews_of_images(pipe):
    seen = []
    callback = preview.build_callback(pipe.vae, lambda step, frame: seen.append(frame.shape))
    frames = pipe("a fox", callback=callback, **SMALL, **given(pipe))
    assert seen == [(1, 4, 6, 3)] and frames.shape == (1, 1, 32, 48, 3)


def test_loras_and_int8_work_for_images_too(pipe):
    how = SMALL | given(pipe) | {"output_type": "latents"}
    plain = pipe("a fox", **how)
    added = lora.add(pipe.dit, random_lora(pipe.dit))
    try:
        assert relative_error(pipe("a fox", **how), plain) > 1e-2
    finally:
        lora.remove(pipe.dit, added)
    assert pipe("a fox", **how).equal(plain)
    folder = Path(convert(pipe.config.tasks[0]).name) / "native"
    rounded = Pipeline.load(folder, device="cpu", dtype="float32", quantize="int8")("a fox", **how)
    assert 1e-4 < relative_error(rounded, plain) < 3e-2


@pytest.mark.parametrize("task", ["t2i", "i2i"])
def test_commands_write_an_image_and_replay_it(task, cli, tmp_path):
    folder = Path(convert(task).name) / "native"
    video_io.write_video(tmp_path / "source.png", SOURCE[None])
    image = ["--image", "source.png"] if task == "i2i" else []
    size = ["--height", "32", "--width", "48", "--steps", "2"]
    code, _, notes = cli("a fox", "--checkpoint", folder, *size, *image)
    assert code == 0 and video_io.read_image("out.png").shape == (32, 48, 3) and "1024x1024" in notes[0]
    assert cli("--replay", "out.png", "--checkpoint", folder, "--offload", "blocks", "-o", "again.png")[0] == 0
    assert video_io.read_image("again.png").equal(video_io.read_image("out.png"))


@pytest.mark.parametrize("base", ["of images", "of videos"])
def test_a_vae_of_the_other_kind_is_refused(base, tmp_path):
    """Their latents have the same shape, so that it would only be seen in the images."""
    images, videos = Path(convert("t2i").name), tmp_path / "videos"
    save_small_checkpoint(videos)
    to_diffusers(videos, tmp_path / "theirs", only="vae", progress=False)
    folder, vae = (images / "native", tmp_path / "theirs") if base == "of images" else (videos, images / "theirs")
    for change in (from_official, from_diffusers):
        what = {"vae": vae / "vae"} if change is from_official else {"src": vae / "vae"}
        with pytest.raises(ValueError, match="images need FLUX.1's VAE"):
            change(dst=tmp_path / "new", only="vae", base=folder, progress=False, **what)
    assert not (tmp_path / "new").exists()


def test_another_qwen_of_a_model_that_edits_sees_too(tmp_path):
    folder = Path(convert("i2i").name)
    parts = {"qwen": folder / "theirs" / "text_encoder", "qwen_tokenizer": folder / "theirs" / "tokenizer"}
    config = from_official(tmp_path / "new", only="qwen", base=folder / "native", progress=False, **parts)
    assert config == load_config(folder / "native" / "config.json") and config.qwen_vision
    assert (tmp_path / "new" / "qwen_vision.safetensors").is_file()


OTHERS = [("t2i-lite-sft", VAEConfig()), ("i2i-lite-sft", None), ("t2v-lite-sft-5s", FLUX)]


@pytest.mark.parametrize("name, vae", OTHERS)
def test_bare_files_of_released_sizes_are_for_what_the_dit_makes(name, vae):
    """Whatever VAE is next to it: a wrong one is then refused."""
    sizes = {"dit": PRESETS[name].dit} | ({"vae": vae} if vae else {})
    sources = {model: write_native.Source(None, one, None) for model, one in sizes.items()}
    assert write_native._guess_tasks(sources) == PRESETS[name].tasks


def test_the_vae_is_read_under_its_makers_names(tmp_path):
    tensors, base = (
        load_file(IMAGES / "vae" / "diffusion_pytorch_model.safetensors"),
        Path(convert("t2i").name, "native"),
    )
    shutil.copy(IMAGES / "vae" / "config.json", tmp_path)  # of other sizes than FLUX.1's
    save_file(bfl_names(tensors), tmp_path / "ae.safetensors")
    from_official(tmp_path / "new", vae=tmp_path / "ae.safetensors", only="vae", base=base, progress=False)
    found, expected = (load_file(folder / "vae.safetensors") for folder in (tmp_path / "new", base))
    assert found.keys() == expected.keys() and all(x.equal(found[name]) for name, x in expected.items())
    save_file(bfl_names(tensors) | {"quant_conv.weight": torch.ones(1)}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="quant_conv.weight is not known"):  # as in the VAEs before FLUX.1
        from_official(tmp_path / "other", vae=tmp_path / "ae.safetensors", only="vae", base=base, progress=False)
