"""The image models against diffusers: components and whole pipelines, and their folders through the converter."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

import image_cases
import image_theirs
from image_golden import bfl_names
from kandinsky5 import Pipeline
from kandinsky5.config_file import load_config
from small_diffusers import PIPELINES, save_small_checkpoint
from weights_convert import from_diffusers, from_official, inspect, to_diffusers


@pytest.fixture(scope="module", params=["t2i", "i2i"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("images") / "diffusers", kind)


@pytest.fixture(scope="module")
def native(source) -> Path:
    from_diffusers(source, source.with_name("native"), progress=False)
    return source.with_name("native")


@pytest.fixture(scope="module")
def ours(native) -> Pipeline:
    return Pipeline.load(native, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(source, ours) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        return image_theirs.compute_all(source, ours.config, patch)


@pytest.mark.parametrize("name", image_cases.OURS)
def test_image_case(name, ours, theirs, record):
    if name not in theirs:
        pytest.skip("of the other task")
    computed = image_cases.compute(name, ours, image_cases.build_inputs(ours.config)[name])
    error, limit = image_cases.measure_error(name, computed, theirs[name]), image_cases.LIMITS[name]
    record(f"images: {ours.config.tasks[0]}, {name}", "float32", error, limit)
    assert theirs[name].std() > 1e-2 and error <= limit


def test_what_is_read_without_a_preset(kind, ours):
    config = ours.config
    assert config.tasks == (kind,) and config.vae.dimensions == 2 and config.vae.scaling_factor == 0.3611
    assert config.sampling.shift == 5 and config.sampling.num_frames == 1 and config.sampling.rope_scale == (1, 1, 1)
    assert config.dit.visual_cond == (kind == "i2i") and config.text.max_tokens == 512


def same(one: Path, other: Path) -> bool:
    """Whether two native folders hold the same weights."""
    files = [{path.name: load_file(path) for path in folder.glob("*.safetensors")} for folder in (one, other)]
    return files[0].keys() == files[1].keys() and all(
        state.keys() == files[1][name].keys() and all(torch.equal(x, files[1][name][key]) for key, x in state.items())
        for name, state in files[0].items()
    )


def test_there_and_back(kind, source, native, tmp_path):
    to_diffusers(native, tmp_path / "back", progress=False)
    from_diffusers(tmp_path / "back", tmp_path / "again", progress=False)
    assert same(native, tmp_path / "again")
    assert load_config(native / "config.json") == load_config(tmp_path / "again" / "config.json")
    vaes = [AutoencoderKL.from_pretrained(folder / "vae").eval() for folder in (source, tmp_path / "back")]
    z = torch.randn(1, 16, 3, 2)
    assert vaes[0].decode(z).sample.equal(vaes[1].decode(z).sample)
    if kind == "t2i":
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "back")
        assert type(pipe) is PIPELINES["t2i"] and pipe.scheduler.config.shift == 5


def test_the_official_files_give_the_same(kind, source, native, tmp_path):
    """The VAE as one file, or its folder; which task it is shows in the DiT."""
    stem = "diffusion_pytorch_model.safetensors"
    for number, vae in enumerate((source / "vae", source / "vae" / stem)):
        found = from_official(
            tmp_path / str(number), dit=source / "transformer" / stem, vae=vae, qwen=source / "text_encoder",
            clip=source / "text_encoder_2", qwen_tokenizer=source / "tokenizer",
            clip_tokenizer=source / "tokenizer_2", progress=False,
        )  # fmt: skip
        assert found.tasks == (kind,) and found.sampling.shift == 3
        assert same(native, tmp_path / str(number))


def test_inspect_names_the_image_vae(source, native):
    for folder in (source, native):
        (vae,) = (row for row in inspect(folder)["models"] if row["model"] == "vae")
        assert vae["sizes"]["dimensions"] == 2 and vae["missing tensors"] == vae["other tensors"] == 0


def test_the_vae_under_its_makers_names(kind, source, native, tmp_path):
    """Diffusers reads the file that is written here as the same model, and so do we."""
    stem = "diffusion_pytorch_model.safetensors"
    file = tmp_path / "ae.safetensors"
    save_file(bfl_names(load_file(source / "vae" / stem)), file)
    shutil.copy(source / "vae" / "config.json", tmp_path)  # of other sizes than FLUX.1's
    theirs = AutoencoderKL.from_single_file(str(file), config=str(source / "vae"))
    from_official(tmp_path / "new", vae=file, only="vae", base=native, progress=False)
    assert same(native, tmp_path / "new")
    assert load_config(native / "config.json").vae == load_config(tmp_path / "new" / "config.json").vae
    expected = load_file(source / "vae" / stem)
    assert all(tensor.equal(expected[name]) for name, tensor in theirs.state_dict().items())
