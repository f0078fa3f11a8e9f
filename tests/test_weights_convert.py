"""Checkpoints there and back: bits, shards, precision, bases, presets. That names and sizes are right is shown against
the real libraries, in tests/parity/test_convert_*.py.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import CONFIG, STEM, diffusers, is_same, names_in, native, tensors
from image_golden import convert
from kandinsky5.checkpoint import MODELS, OPTIONAL, SHIPPED, fingerprint, save_checkpoint
from kandinsky5.config import PRESETS, SamplingConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.dit import DiT
from kandinsky5.tensor_files import read_safetensors
from random_weights import SMALL_VISION, build_small_models, randomise
from weights_convert import from_diffusers, from_official, inspect, presets, tables, to_diffusers, write
from weights_convert.__main__ import main
from weights_convert.read import read_weights


def test_round_trip_is_bit_exact_whatever_the_shards(tmp_path):
    from_diffusers(diffusers(), tmp_path / "again", progress=False)
    assert is_same(native(), tmp_path / "again")
    to_diffusers(native(), tmp_path / "shards", max_shard_size=50_000, verify=True, progress=False)
    assert len(list((tmp_path / "shards" / "transformer").glob("*-of-*.safetensors"))) > 3
    from_diffusers(tmp_path / "shards", tmp_path / "sharded", max_shard_size=60_000, verify=True, progress=False)
    assert (tmp_path / "sharded" / "dit.safetensors.index.json").is_file()
    assert is_same(native(), tmp_path / "sharded")


def test_a_folder_with_a_base_is_written_whole(tmp_path):
    variant = tmp_path / "variant"
    variant.mkdir()
    shutil.copy(native() / "dit.safetensors", variant)
    save_config(replace(CONFIG, base=os.path.relpath(native(), variant)), variant / "config.json")
    assert [row["model"] for row in inspect(variant)["models"]] == list(MODELS)
    to_diffusers(variant, tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    assert is_same(native(), tmp_path / "n")
    with pytest.raises(ValueError, match=str(variant)):
        from_diffusers(tmp_path / "d", tmp_path / "m", only="dit", base=variant, progress=False)


def test_metadata_is_kept_both_ways_and_hashes_are_equal(tmp_path):
    shutil.copytree(native(), tmp_path / "source")
    save_file(load_file(native() / "dit.safetensors"), tmp_path / "source" / "dit.safetensors", {"run": "fox"})
    to_diffusers(tmp_path / "source", tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    there, back = read_weights(tmp_path / "d" / "transformer"), read_weights(tmp_path / "n", "dit")
    assert there.metadata["run"] == back.metadata["run"] == "fox"
    hashes = write.digests_of(there), write.digests_of(back)
    assert sorted(hashes[0].values()) == sorted(hashes[1].values())


def test_a_cast_leaves_the_float32_islands(tmp_path):
    from_diffusers(diffusers(), tmp_path / "bf16", dtype="bf16", only="dit", progress=False)
    from_diffusers(diffusers(), tmp_path / "all", dtype="fp16", only="dit", cast_all=True, progress=False)
    from_diffusers(diffusers(), tmp_path / "back", dtype="fp32", only="dit", progress=False)
    cast, halved, widened = (tensors(tmp_path / name) for name in ("bf16", "all", "back"))
    for name, tensor in tensors(native(), "dit").items():
        island = "time_embedder" in name or "modulation" in name
        assert cast[name].dtype == (torch.float32 if island else torch.bfloat16)
        assert torch.equal(cast[name], tensor.to(cast[name].dtype))
        assert halved[name].dtype == torch.float16 and widened[name].dtype == torch.float32
    to_diffusers(tmp_path / "all", tmp_path / "untouched", only="dit", progress=False)
    assert {tensor.dtype for tensor in tensors(tmp_path / "untouched" / "transformer").values()} == {torch.float16}


def test_tensors_are_aligned_whatever_their_order(tmp_path):
    save_file({"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2)}, tmp_path / "source.safetensors")
    stored = read_weights(tmp_path).tensors
    part = write.Part("x", {"odd": stored["odd"], "wide": stored["wide"]}, {"odd": "BF16", "wide": "F32"}, {})
    write.write_shard(tmp_path / "x.safetensors", part, ["odd", "wide"], lambda nbytes: None)
    written = read_safetensors(tmp_path / "x.safetensors").tensors
    assert all(tensor.start % (tensor.nbytes // tensor.shape[0]) == 0 for tensor in written.values())


def test_one_model_is_swapped_and_the_others_are_shared(tmp_path):
    bare = tmp_path / "bare.safetensors"
    state = load_file(diffusers() / "vae" / f"{STEM}.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, bare)
    with pytest.raises(ValueError, match="norm_num_groups 32"):  # a bare file does not say that it has 8
        from_official(tmp_path / "swapped", vae=bare, base=native(), progress=False)
    shutil.copy(diffusers() / "vae" / "config.json", tmp_path)
    from_official(tmp_path / "swapped", vae=bare, base=native(), progress=False)
    assert load_config(tmp_path / "swapped" / "config.json") == CONFIG
    before, after = tensors(native(), "vae"), tensors(tmp_path / "swapped", "vae")
    assert all(torch.equal(after[n], before[n] + 1) for n in before)
    for file in ("dit.safetensors", "qwen_tokenizer/tokenizer.json"):
        assert os.path.samefile(native() / file, tmp_path / "swapped" / file)


def test_models_can_be_added_to_a_folder_one_by_one(tmp_path):
    from_diffusers(diffusers() / "transformer", tmp_path / "one", only="dit", progress=False)
    assert names_in(tmp_path / "one") == ["config.json", "dit.safetensors"]
    for number, model in enumerate(("vae", "qwen", "clip")):
        from_diffusers(diffusers(), tmp_path / str(number), only=model, base=tmp_path / "one", progress=False)
        shutil.rmtree(tmp_path / "one")
        (tmp_path / str(number)).rename(tmp_path / "one")
    found = load_config(tmp_path / "one" / "config.json")
    assert [getattr(found, model) for model in MODELS] == [getattr(CONFIG, model) for model in MODELS]
    assert torch.equal(tensors(tmp_path / "one", "clip")["norm.bias"], tensors(native(), "clip")["norm.bias"])


def test_to_diffusers_swaps_one_model_of_another_folder(tmp_path):
    to_diffusers(native(), tmp_path / "bf16", only="dit", base=diffusers(), dtype="bf16", progress=False)
    assert tensors(tmp_path / "bf16" / "transformer")["visual_embeddings.in_layer.bias"].dtype == torch.bfloat16
    assert os.path.samefile(diffusers() / "vae" / "config.json", tmp_path / "bf16" / "vae" / "config.json")
    assert json.loads((tmp_path / "bf16" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 7
    from_diffusers(tmp_path / "bf16", tmp_path / "n", progress=False)


def test_a_preset_gives_the_sampling_defaults_and_must_fit():
    lite = replace(PRESETS["i2v-lite-5s"], name="x", sampling=SamplingConfig(rope_scale=None))
    found = presets.use_preset(lite, "i2v-lite-5s")
    assert found.name == "i2v-lite-5s" and found.sampling == PRESETS["i2v-lite-5s"].sampling
    assert presets.presets_like(lite) == ["i2v-lite-5s"]
    pro = replace(PRESETS["t2v-pro-distilled-5s-sd"], name="Kandinsky-5.0-T2V-Pro-distilled-5s-Diffusers")
    like = presets.presets_like(pro)
    assert like[:2] == ["t2v-pro-distilled-5s-sd", "t2v-pro-distilled-5s-hd"]
    assert {*like} == {name for name in PRESETS if name.startswith("t2v-pro") and "10s" not in name}
    assert {*presets.presets_like(pro, task_known=False)} == {name for name in PRESETS if "pro" in name}
    with pytest.raises(ValueError, match="dim 4096, not 1792"):
        presets.use_preset(lite, "i2v-pro-sft-5s-sd")
    with pytest.raises(ValueError, match="t2v, .* i2v"):
        presets.use_preset(lite, "t2v-lite-sft-5s")


@pytest.mark.parametrize("name", ["i2v-pro-sft-5s-sd", "i2v-pro-sft-5s-hd"])
def test_one_download_serves_two_presets(name):
    released = replace(PRESETS["i2v-pro-sft-5s-hd"], name="x", sampling=SamplingConfig(shift=10.0))
    found = presets.use_preset(released, name)
    assert found.dit == PRESETS[name].dit and found.sampling == PRESETS[name].sampling


def test_nano_goes_to_diffusers_and_back_unchanged(tmp_path):
    to_diffusers("nano", tmp_path / "d", progress=False)
    from_diffusers(tmp_path / "d", tmp_path / "n", progress=False)
    assert load_config(tmp_path / "n" / "config.json") == load_config(SHIPPED / "nano" / "config.json")
    assert inspect("nano")["models"] == inspect(SHIPPED / "nano")["models"]
    assert inspect(tmp_path / "d")["tasks"] == inspect(tmp_path / "n")["tasks"] == ("t2v", "i2v")
    (tmp_path / "d" / "kandinsky5.json").unlink()
    assert inspect(tmp_path / "d")["tasks"] == ("t2v",)
    with pytest.raises(ValueError, match="nowhere"):
        from_diffusers(tmp_path / "nowhere", tmp_path / "e", progress=False)
    with pytest.raises(ValueError, match="Diffusers layout"):
        to_diffusers(tmp_path / "d", tmp_path / "e", progress=False)


def test_what_diffusers_cannot_hold_is_printed(tmp_path, capsys):
    images = Path(convert("t2i").name) / "native"
    for name, src, printed in (("nano", "nano", True), ("small", native(), False), ("images", images, False)):
        assert main(["to-diffusers", str(src), str(tmp_path / name), "--only", "clip", "--quiet"]) == 0
        assert ("prompt template" in capsys.readouterr().out) == printed


def test_a_bare_file_is_what_the_preset_says(tmp_path, monkeypatch):
    preset = replace(PRESETS["i2v-lite-5s"], dit=CONFIG.dit)
    monkeypatch.setitem(PRESETS, "i2v-lite-5s", preset)
    bare = shutil.copy(diffusers() / "transformer" / f"{STEM}.safetensors", tmp_path)
    options = {"preset": "i2v-lite-5s", "only": "dit", "progress": False}
    for found in (
        from_diffusers(bare, tmp_path / "one", **options),
        from_official(tmp_path / "other", dit=bare, **options),
    ):
        assert (found.tasks, found.dit, found.sampling) == (("i2v",), CONFIG.dit, preset.sampling)


def test_what_is_left_out_is_printed_even_without_a_bar(tmp_path, capsys):
    shutil.copytree(diffusers() / "text_encoder", tmp_path / "qwen")
    file = tmp_path / "qwen" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(1000, 1000), "visual.a": torch.ones(2)}, file)
    assert main(["from-diffusers", str(tmp_path / "qwen"), str(tmp_path / "dst"), "--only", "qwen", "--quiet"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "lm_head.* (1 tensors, 4.0 MB)" in lines[0] and "visual.*" in lines[1]


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    other = randomise(DiT(replace(CONFIG.dit, text_dim=48))).state_dict()
    names = {tables.theirs("dit", name): tensor for name, tensor in other.items()}
    save_file(names, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"dit.text_dim 48, qwen.dim \d+"):
        from_official(tmp_path / "dst", dit=tmp_path / "x.safetensors", base=native(), progress=False)


@pytest.mark.parametrize(
    "value, dtype, names",
    [(float("nan"), [], ["patch_embedder.weight"]), (1e6, ["--dtype", "fp16"], ["patch_embedder.weight", "F16"])],
)
def test_nan_and_overflow_are_warned_of_by_name(tmp_path, capsys, value, dtype, names):
    shutil.copytree(diffusers() / "transformer", tmp_path / "src")
    state = load_file(tmp_path / "src" / f"{STEM}.safetensors")
    state["visual_embeddings.in_layer.weight"][3, 5] = value
    save_file(state, tmp_path / "src" / f"{STEM}.safetensors")
    arguments = ["from-diffusers", str(tmp_path / "src"), str(tmp_path / "dst"), "--only", "dit", "--quiet", *dtype]
    assert main(arguments) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and all(name in warning for name in names)


# --- Qwen's vision tower and head


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A native folder with both."""
    folder, config = tmp_path_factory.mktemp("whole"), replace(CONFIG, qwen_vision=SMALL_VISION)
    words = {"qwen": native() / "qwen_tokenizer", "clip": native() / "clip_tokenizer"}
    save_checkpoint(folder / "native", config, build_small_models(config), words)
    to_diffusers(folder / "native", folder / "diffusers", progress=False)
    return folder


def test_vision_and_head_are_kept_both_ways(whole, tmp_path):
    from_diffusers(whole / "diffusers", tmp_path / "again", with_vision=True, progress=False)
    assert is_same(whole / "native", tmp_path / "again")
    for model in OPTIONAL:
        ours, theirs = tensors(whole / "native", model), tensors(tmp_path / "again", model)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert [row["model"] for row in inspect(whole / "native")["models"]] == [*MODELS, *OPTIONAL]
    assert [row["other tensors"] for row in inspect(whole / "native")["models"]] == [0] * 6


def test_without_the_option_they_are_left_out_and_counted(whole, tmp_path, capsys):
    config = from_diffusers(whole / "diffusers", tmp_path / "again", progress=False)
    shown = capsys.readouterr().err
    sizes = [sum(x.nbytes for x in tensors(whole / "native", model).values()) / 1e6 for model in OPTIONAL]
    assert config.qwen_vision is None and not list((tmp_path / "again").glob("qwen_*.safetensors"))
    assert all(f"{size:.1f} MB" in shown for size in sizes) and shown.count("--with-vision") == 2
    assert fingerprint(tmp_path / "again") == fingerprint(native()) != fingerprint(whole / "native")


def test_pixel_limits_survive_where_no_file_of_the_tokenizer_says_them(whole, tmp_path):
    shutil.copytree(whole / "native", tmp_path / "native")
    config = load_config(tmp_path / "native" / "config.json")
    vision = replace(config.qwen_vision, min_pixels=4096, max_pixels=65536)
    save_config(replace(config, qwen_vision=vision), tmp_path / "native" / "config.json")
    to_diffusers(tmp_path / "native", tmp_path / "theirs", progress=False)
    again = from_diffusers(tmp_path / "theirs", tmp_path / "again", with_vision=True, progress=False)
    assert again.qwen_vision == vision


def test_a_qwen_written_without_a_tower_has_none_to_keep(tmp_path):
    to_diffusers(native(), tmp_path / "theirs", progress=False)
    with pytest.raises(ValueError, match="no vision tower"):
        from_diffusers(tmp_path / "theirs", tmp_path / "again", with_vision=True, progress=False)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("file, limits", [
    ("preprocessor_config.json", {"min_pixels": 4096, "max_pixels": 65536, "patch_size": 14}),
    ("preprocessor_config.json", {"size": {"shortest_edge": 4096, "longest_edge": 65536}}),
    ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 4096, "longest_edge": 65536}}}),
])  # fmt: skip
def test_pixel_limits_are_those_of_the_processor(whole, tmp_path, file, limits):
    shutil.copytree(whole / "diffusers", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer" / "preprocessor_config.json").unlink()
    (tmp_path / "theirs" / "tokenizer" / file).write_text(json.dumps(limits))
    config = from_diffusers(tmp_path / "theirs", tmp_path / "again", with_vision=True, progress=False)
    assert (config.qwen_vision.min_pixels, config.qwen_vision.max_pixels) == (4096, 65536)


@pytest.mark.parametrize("file, change", [
    ("text_encoder/config.json", lambda c: c["vision_config"].update(window_size=224)),
    ("text_encoder/config.json", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 1, 2])),
    ("text_encoder/config.json", lambda c: c["vision_config"].update(intermediate_size=25)),
])  # fmt: skip
def test_other_vision_towers_are_refused(whole, tmp_path, file, change):
    shutil.copytree(whole / "diffusers", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / file).read_text())
    change(config)
    (tmp_path / "theirs" / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says"):
        from_diffusers(tmp_path / "theirs", tmp_path / "again", with_vision=True, progress=False)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("file, said", [
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
    ("preprocessor_config.json", {"patch_size": 16}),
    ("preprocessor_config.json", {"do_normalize": False}),
    ("processor_config.json", {"image_processor": {"rescale_factor": 1 / 127.5}}),
    ("processor_config.json", {"image_processor": {"resample": 2}}),
])  # fmt: skip
def test_images_prepared_otherwise_are_refused(whole, tmp_path, file, said):
    shutil.copytree(whole / "diffusers", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer" / "preprocessor_config.json").unlink()
    (tmp_path / "theirs" / "tokenizer" / file).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"{file} says"):
        from_diffusers(tmp_path / "theirs", tmp_path / "again", with_vision=True, progress=False)


def test_a_new_qwen_without_them_does_not_keep_those_of_the_base(whole, tmp_path):
    theirs = whole / "diffusers"
    config = from_diffusers(theirs, tmp_path / "other", only="qwen", base=whole / "native", progress=False)
    assert config.qwen_vision is None and not list((tmp_path / "other").glob("qwen_*.safetensors"))
    config = from_diffusers(theirs, tmp_path / "dit", only="dit", base=whole / "native", progress=False)
    assert config.qwen_vision == SMALL_VISION and len(list((tmp_path / "dit").glob("qwen_*.safetensors"))) == 2
