"""The native folder: what is saved is what is loaded, strictly, and damage is named."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5 import Pipeline, checkpoint
from kandinsky5.checkpoint import fingerprint, save_checkpoint
from kandinsky5.config import PRO, DiTConfig, find_preset
from kandinsky5.config_file import load_config, save_config
from random_weights import (
    SMALL,
    build_small_models,
    build_small_pipeline,
    relative_error,
    save_small_checkpoint,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "small"
    save_small_checkpoint(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of links, whose files can be replaced."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_round_trip(saved):
    expected, loaded = build_small_pipeline(), Pipeline.load(saved, dtype=torch.float32)
    assert loaded.config == expected.config
    for a, b in ((loaded.dit, expected.dit), (loaded.vae, expected.vae), (loaded.text_encoder, expected.text_encoder)):
        assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    # Mapped weights lie at other addresses, and matrix products round differently there.
    frames = [pipe("a fox", progress=False).int() for pipe in (loaded, expected)]
    assert (frames[0] - frames[1]).abs().max() <= 1


def test_missing_models_come_from_the_base(saved, tmp_path):
    config, models = replace(SMALL, base=os.path.relpath(saved, tmp_path / "variant")), build_small_models()
    torch.nn.init.ones_(models["dit"].final_layer.linear.weight)
    save_checkpoint(tmp_path / "variant", config, {"dit": models["dit"]}, {})
    variant, base = (Pipeline.load(folder, dtype="bfloat16") for folder in (tmp_path / "variant", saved))
    assert variant.dit.final_layer.linear.weight.eq(1).all() and not base.dit.final_layer.linear.weight.eq(1).any()
    assert relative_error(*(p.vae.decoder.conv_in.weight for p in (variant, base))) == 0
    assert variant.text_encoder.encode(["a fox"]).text.equal(base.text_encoder.encode(["a fox"]).text)


def test_half_precision_leaves_the_float32_islands(saved):
    pipe = Pipeline.load(saved, dtype="bfloat16")
    kinds = {name: p.dtype for name, p in pipe.dit.named_parameters()}
    assert kinds["visual_blocks.0.modulation.linear.weight"] == kinds["time_embedder.linear_in.bias"] == torch.float32
    assert kinds["visual_blocks.0.self_attention.to_q.weight"] == torch.bfloat16
    assert pipe.dtype == torch.bfloat16 and not pipe.dit.training


@pytest.mark.parametrize("offload", [None, "model", "blocks"])
def test_islands_stored_in_half_precision_are_not_copied(copy, offload):
    """They stay views of the file, and the numbers are those of copies in float32."""
    stored = {name: weight.bfloat16() for name, weight in load_file(copy / "dit.safetensors").items()}
    save_file(stored, copy / "dit.safetensors")
    pipe, wide = (Pipeline.load(copy, dtype="bfloat16", offload=mode) for mode in (offload, None))
    for name, parameter in wide.dit.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if "modulation" in name or "time_embedder" in name:
            parameter.data = parameter.data.float()
    results = [p("a fox", num_inference_steps=2, output_type="latents", progress=False) for p in (pipe, wide)]
    assert results[0].equal(results[1])
    islands = [p for name, p in pipe.dit.named_parameters() if "modulation" in name or "time_embedder" in name]
    assert {p.dtype for p in islands} == {torch.bfloat16}
    exact = Pipeline.load(copy, dtype=torch.float32, offload=offload)
    assert {p.dtype for p in exact.dit.parameters()} == {torch.float32}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_weights_are_views_of_the_mapped_file(saved):
    """No copy: the process's own (anonymous) memory stays as it is, however large the file."""

    def anonymous_kb():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    with torch.device("meta"):
        model = torch.nn.ModuleDict({"big": torch.nn.Linear(8192, 8192, bias=False)})
    folder = saved.parent
    save_file({"big.weight": torch.ones(8192, 8192)}, folder / "big.safetensors")  # 256 MB
    before = anonymous_kb()
    checkpoint.load_weights(model, checkpoint.find_weights(folder, "big"), "cpu", torch.float32)
    assert model["big"].weight.sum() == 8192**2
    assert anonymous_kb() - before < 30_000


def test_shards_are_read_through_their_index(saved, copy):
    tensors = load_file(saved / "dit.safetensors")
    names = sorted(tensors)
    (copy / "dit.safetensors").unlink()
    shards = {"dit-1.safetensors": names[::2], "dit-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({n: tensors[n] for n in members}, copy / shard)
    index = {"weight_map": {n: shard for shard, members in shards.items() for n in members}}
    (copy / "dit.safetensors.index.json").write_text(json.dumps(index))
    loaded = Pipeline.load(copy, dtype=torch.float32).dit.state_dict()
    assert all(loaded[n].equal(tensors[n]) for n in names)
    (copy / "dit-2.safetensors").unlink()
    with pytest.raises(ValueError, match="dit-2.safetensors is missing"):
        Pipeline.load(copy)


def test_weights_that_do_not_fit_show_both_shapes(copy):
    config = replace(load_config(copy / "config.json"), dit=replace(PRO, text_dim=16, pooled_dim=24))
    (copy / "config.json").unlink()
    save_config(config, copy / "config.json")
    with pytest.raises(ValueError) as caught:
        Pipeline.load(copy, device="meta")
    message = str(caught.value)
    assert "dit.safetensors does not fit" in message and "more" in message and "\n" not in message
    assert "(1024, 4096), the file has (32, 64)" in message


def test_missing_and_unknown_tensors_are_named(tmp_path):
    model = {"a": torch.zeros(1), "b": torch.zeros(2)}
    save_file({"b": torch.zeros(2), "c": torch.zeros(3)}, tmp_path / "x.safetensors")
    weights = checkpoint.find_weights(tmp_path, "x")
    with pytest.raises(ValueError, match=r"a \(1,\).* missing.*, c \(3,\)"):
        checkpoint.check_fit(weights, model)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_damaged_weight_files(saved, copy, damage):
    path = copy / "vae.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"<html>404</html>"}[damage])
    with pytest.raises(ValueError, match="vae.safetensors is (missing|no complete)") as caught:
        Pipeline.load(copy)
    assert "\n" not in str(caught.value)


def test_other_layouts_name_the_command_to_run(tmp_path, saved):
    with pytest.raises(ValueError, match="'nothing'"):
        Pipeline.load("nothing")
    with pytest.raises(ValueError, match=f"{tmp_path / 'nothing'}"):
        Pipeline.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="weights_convert from-diffusers"):
        Pipeline.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=f"weights_convert from-diffusers {tmp_path}"):
        Pipeline.load(tmp_path)
    with pytest.raises(ValueError, match=f"{saved}$"):
        Pipeline.load(saved / "config.json")
    (tmp_path / "release" / "model").mkdir(parents=True)
    file = tmp_path / "release" / "model" / "lite.safetensors"
    file.touch()
    for official in (tmp_path / "release", file):
        with pytest.raises(ValueError, match=f"weights_convert from-official --dit {file}"):
            Pipeline.load(official)


def test_presets_without_weights_are_refused_and_spelling_helped():
    with pytest.raises(ValueError, match="t2v-lite-sft-5s"):
        Pipeline.load("t2v-lite-sft-5s")
    with pytest.raises(ValueError, match="t2v-lite-sft-5s"):
        find_preset("t2v-light-sft-5s")
    with pytest.raises(ValueError, match="t2v-lite"):
        find_preset("zzz")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.uint16, torch.int64])
@pytest.mark.parametrize("offload", [None, "model"])
def test_weights_that_are_not_floats_are_refused(dtype, offload, copy):
    weights = load_file(copy / "vae.safetensors")
    (copy / "vae.safetensors").unlink()
    save_file({n: x.to(dtype) for n, x in weights.items()}, copy / "vae.safetensors")
    with pytest.raises(ValueError, match="vae.safetensors"):
        Pipeline.load(copy, offload=offload)


def test_one_integer_tensor_is_enough_to_be_refused(copy):
    weights = load_file(copy / "clip.safetensors")
    (copy / "clip.safetensors").unlink()
    save_file(weights | {"norm.bias": weights["norm.bias"].to(torch.int16)}, copy / "clip.safetensors")
    with pytest.raises(ValueError, match="norm.bias.*I16"):
        Pipeline.load(copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_and_device_change_nothing(saved, dtype):
    usual = Pipeline.load(saved, "cpu", torch.float32)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            loaded = Pipeline.load(saved, "cpu", torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in ((loaded.dit, usual.dit), (loaded.vae, usual.vae), (loaded.text_encoder, usual.text_encoder)):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert x.dtype == y.dtype and x.device == y.device and x.equal(y)


def test_fingerprint_ignores_place_name_and_defaults(saved, copy):
    config = load_config(copy / "config.json")
    (copy / "config.json").unlink()
    defaults = replace(config.sampling, shift=2.0, num_inference_steps=7, negative_prompt="rain")
    save_config(replace(config, name="other", sampling=defaults), copy / "config.json")
    assert fingerprint(copy) == fingerprint(saved)


@pytest.mark.parametrize("what", ["value", "last value", "name", "precision", "tokenizer", "scale"])
def test_fingerprint_sees(saved, copy, what):
    path, config = copy / "vae.safetensors", load_config(saved / "config.json")
    state = load_file(path)
    name = min(state, key=lambda name: state[name].numel())
    assert state[name].nbytes <= 2**14
    if what == "value":
        state[name].view(-1)[0] += 1
    elif what == "last value":
        state[name].view(-1)[-1] += 1
    elif what == "name":
        state["other"] = state.pop(name)
    elif what == "precision":
        state[name] = state[name].bfloat16()
    elif what == "tokenizer":
        (copy / "clip_tokenizer").unlink()
        shutil.copytree(saved / "clip_tokenizer", copy / "clip_tokenizer")
        with open(copy / "clip_tokenizer" / "merges.txt", "a") as file:
            file.write("\n")
    else:
        config = replace(config, vae=replace(config.vae, scaling_factor=0.5))
    path.unlink()
    save_file(state, path)
    (copy / "config.json").unlink()
    save_config(config, copy / "config.json")
    assert fingerprint(copy) != fingerprint(saved)


def test_fingerprint_is_the_same_with_the_converters_hashes(saved, copy):
    path = copy / "vae.safetensors"
    state = load_file(path)
    path.unlink()
    save_file(state, path, {"sha256": "{}"})
    assert fingerprint(copy) == fingerprint(saved)


def test_fingerprint_ignores_litter_in_tokenizer_folders(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    for name in (".DS_Store", "Thumbs.db", "._tokenizer.json", "desktop.ini", "notes.txt", "vocab.json.bak"):
        (folder / "qwen_tokenizer" / name).write_text("litter")
    (folder / "clip_tokenizer" / ".ipynb_checkpoints").mkdir()
    (folder / "clip_tokenizer" / "a.folder").mkdir()
    os.mkfifo(folder / "clip_tokenizer" / "a.pipe")
    assert fingerprint(folder) == fingerprint(saved)


def test_fingerprint_ignores_new_fields_with_defaults(saved, monkeypatch):
    before = fingerprint(saved)
    plain = checkpoint.asdict

    def with_one_more_field(part):
        return plain(part) | ({"text_norm": False} if isinstance(part, DiTConfig) else {})

    monkeypatch.setattr(checkpoint, "asdict", with_one_more_field)
    assert fingerprint(saved) == before


def test_fingerprint_reads_the_models_of_the_base(saved, tmp_path):
    config, models = replace(SMALL, base=os.path.relpath(saved, tmp_path / "variant")), build_small_models()
    save_checkpoint(tmp_path / "variant", config, {"dit": models["dit"]}, {})
    assert fingerprint(tmp_path / "variant") == fingerprint(saved)


def test_fingerprint_reads_little(tmp_path, saved, copy):
    """Its docstring says what it cannot see: the rest of a large tensor."""
    large = load_file(saved / "vae.safetensors")
    name = max(large, key=lambda name: large[name].numel())
    assert large[name].nbytes > 2**14
    large[name].view(-1)[-1] += 1
    (copy / "vae.safetensors").unlink()
    save_file(large, copy / "vae.safetensors")
    assert fingerprint(copy) == fingerprint(saved)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_weights({"a": torch.zeros(3)}, target)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        save_small_checkpoint(tmp_path / "folder")
    assert len(list(tmp_path.iterdir())) == 1


def test_an_existing_folder_is_left_alone(saved):
    with pytest.raises(FileExistsError, match="small"):
        checkpoint.save_checkpoint(saved, SMALL, build_small_models(), {"qwen": saved, "clip": saved})


@pytest.mark.parametrize("inside", [None, "notes.txt", "sub/config.json", "model.bin"])
def test_a_folder_of_that_name_does_not_hide_nano(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    Path("nano").mkdir()
    if inside:
        Path("nano", inside).parent.mkdir(exist_ok=True)
        Path("nano", inside).write_text("{}")
    assert checkpoint.find_checkpoint("nano") == checkpoint.SHIPPED / "nano"


def test_a_checkpoint_of_that_name_comes_first(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nano").symlink_to(saved)
    assert checkpoint.find_checkpoint("nano") == Path("nano")
