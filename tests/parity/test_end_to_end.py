"""From a folder that the real `DiffusionPipeline.save_pretrained` wrote to a film, by the README's two commands."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
from PIL import Image

import cases
import theirs as reference
from kandinsky5 import Pipeline
from kandinsky5.video_io import read_metadata, read_video
from small_diffusers import save_small_checkpoint
from weights_convert import from_diffusers

ROOT = Path(__file__).parents[2]
PROMPT = "A paper boat on a puddle."


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    """A checkpoint of either kind with NABLA, in the Diffusers layout."""
    folder = tmp_path_factory.mktemp("end_to_end") / "diffusers"
    return request.param, save_small_checkpoint(folder, request.param, nabla=True)


def test_save_pretrained_then_convert_then_sample_gives_a_film(folder, tmp_path):
    kind, source = folder
    run(tmp_path, "-m", "weights_convert", "from-diffusers", source, "native", "--quiet")
    extra = []
    if kind == "i2v":
        Image.new("RGB", (300, 200), (200, 80, 20)).save(tmp_path / "picture.jpg")
        extra = ["--image", "picture.jpg"]
    command = [ROOT / "sample.py", PROMPT, "--checkpoint", "native", "--steps", "2", *extra]
    size = ["--height", "128", "--width", "256", "--num-frames", "9"]
    run(tmp_path, *command, *size, "-o", "film.mp4")
    film, fps = read_video(tmp_path / "film.mp4")
    assert fps == 24
    assert film.shape == (9, 128, 256, 3) and film.float().std() > 1
    assert read_metadata(tmp_path / "film.mp4")["prompt"] == PROMPT
    run(tmp_path, ROOT / "sample.py", "--replay", "film.mp4", "-o", "again.mp4")
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "film.mp4").read_bytes()


@torch.inference_mode()
def test_pipeline_with_nabla(folder, tmp_path, monkeypatch, record):
    kind, source = folder
    reference.make_comparable(monkeypatch)
    from_diffusers(source, tmp_path / "native", progress=False)
    ours = Pipeline.load(tmp_path / "native", dtype=torch.float32)
    assert ours.config.dit.nabla and ours.config.tasks == (kind,)
    options = dict(height=128, width=256, num_frames=9 if kind == "t2v" else 25, num_inference_steps=2)
    options |= dict(guidance_scale=3.0, negative_prompt="blurry")
    noise = torch.Generator().manual_seed(5)
    theirs = reference.build_pipeline(
        {"t2v": Kandinsky5T2VPipeline, "i2v": Kandinsky5I2VPipeline}[kind],
        reference.load_components(source, torch.float32),
        nabla=True,
    )
    # of another size than the video's: diffusers resizes it, by the authors' rule instead of Lanczos
    image = torch.randint(0, 256, (90, 300, 3), generator=noise, dtype=torch.uint8) if kind == "i2v" else None
    theirs.video_processor.register_to_config(resample="bilinear")
    given = {} if image is None else {"image": Image.fromarray(image.numpy())}
    random = torch.Generator().manual_seed(cases.SEED)
    expected = theirs(
        prompt=PROMPT, generator=random, output_type="np", max_sequence_length=256, **given, **options
    ).frames  # fmt: skip
    frames = ours(
        PROMPT, image=image, seed=cases.SEED, schedule="diffusers", output_type="float", progress=False, **options
    )
    error = float((frames - torch.as_tensor(expected)).abs().max())
    record(f"{kind} with NABLA, largest difference", "float32", error, 1 / 255)
    assert frames.std() > 1e-2 and error <= 1 / 255
    ours.dit.config = replace(ours.dit.config, nabla=None)
    full = ours(PROMPT, image=image, seed=cases.SEED, schedule="diffusers", output_type="float", **options)
    assert (full - frames).abs().max() > 1 / 255, "NABLA kept every tile: this comparison would prove nothing"


def run(where: Path, *command) -> None:
    """A Python command in the folder `where`, with the checkout's packages; its errors are the test's."""
    ended = subprocess.run(
        [sys.executable, *map(str, command)], cwd=where, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
