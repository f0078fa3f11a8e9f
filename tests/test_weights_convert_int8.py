"""Weights in 8 bits through the converter: ours written and read, those of other tools read or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from converted import copy_transformer, diffusers, names_in, native, tensors
from kandinsky5.checkpoint import find_weights, load_weights, without_weights
from kandinsky5.config import QwenConfig
from kandinsky5.config_file import load_config
from kandinsky5.dit import DiT
from kandinsky5.files import write_json
from kandinsky5.qwen import Qwen
from kandinsky5.runtime.quantize import dequantise, prepare, quantise, to_int8
from kandinsky5.tensor_files import CHUNK, Stored
from random_weights import randomise
from weights_convert import from_diffusers, from_official, inspect, tables, to_diffusers
from weights_convert.__main__ import main
from weights_convert.inspect import as_table
from weights_convert.read import read_weights
from weights_convert.scales import multiply
from weights_convert.sizes import to_their_config

LAYER = "visual_transformer_blocks.1.feed_forward.in_layer"  # (96, 64)
WEIGHT = f"{LAYER}.weight"
OURS = "visual_blocks.1.feed_forward.linear_in.weight"


def load_int8(folder, name="dit", model=None):
    """A model as `Pipeline.load` loads it."""
    if model is None:
        with without_weights():
            model = DiT(load_config(folder / "config.json").dit)
    weights = prepare(model, find_weights(folder, name), None)
    return load_weights(model, weights, "cpu", torch.float32)


# --- ours


def test_a_native_folder_in_int8(tmp_path, capsys):
    dst = tmp_path / "int8"
    command = ["from-diffusers", str(diffusers() / "transformer"), str(dst), "--only", "dit", "--dtype", "int8"]
    assert main([*command, "--verify", "--quiet"]) == 0
    found, expected = load_int8(dst).state_dict(), to_int8(load_int8(native())).state_dict()
    assert found.keys() == expected.keys() and all(found[n].equal(x) for n, x in expected.items())
    with safe_open(dst / "dit.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sha256"]).keys() == set(file.keys()) == found.keys()
    before, after = tensors(native(), "dit"), tensors(dst)
    rest = before.keys() - {n for n, x in after.items() if x.dtype == torch.int8}
    assert all(after[n].equal(before[n]) and after[n].dtype == before[n].dtype for n in rest)
    assert main([*command, "--resume", "--quiet"]) == 0
    row = inspect(dst)["models"][0]
    assert row["missing tensors"] == row["other tensors"] == 0 and "I8 × scale in blocks of 32" in as_table(
        inspect(dst)
    )
    assert row["parameters"] == inspect(native())["models"][0]["parameters"]


def test_back_to_diffusers_it_is_the_rounded_weights(tmp_path, capsys):
    from_diffusers(diffusers() / "transformer", tmp_path / "int8", only="dit", dtype="int8", progress=False)
    to_diffusers(tmp_path / "int8", tmp_path / "back", only="dit", dtype="fp32", progress=False)
    assert "rounded weights" in capsys.readouterr().err
    found, before = tensors(tmp_path / "back" / "transformer"), tensors(native(), "dit")
    assert found.keys() == tensors(diffusers() / "transformer").keys()
    expected = dequantise(*quantise(before[OURS]), torch.float32)
    assert found[WEIGHT].equal(expected) and not found[WEIGHT].equal(before[OURS])
    from_diffusers(tmp_path / "back" / "transformer", tmp_path / "again", only="dit", dtype="int8", progress=False)
    again, first = tensors(tmp_path / "again"), tensors(tmp_path / "int8")
    assert all(again[n].equal(x) for n, x in first.items())  # rounding what is rounded changes nothing


def test_only_qwen(tmp_path):
    sizes = QwenConfig(vocab_size=70, dim=64, num_layers=2, num_heads=2, num_kv_heads=1, ff_dim=96)
    qwen = randomise(Qwen(sizes))
    save_file({tables.theirs("qwen", n): x for n, x in qwen.state_dict().items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", to_their_config("qwen", sizes))
    from_diffusers(tmp_path, tmp_path / "native", only="qwen", dtype="int8", progress=False)
    with without_weights():
        loaded = load_int8(tmp_path / "native", "qwen", Qwen(sizes))
    ids = torch.arange(9)[None]
    assert loaded(ids).equal(to_int8(qwen)(ids))


@pytest.mark.parametrize("arguments", [["to-diffusers"], ["from-diffusers", "--only", "vae"]])
def test_int8_where_it_is_not_for(arguments, tmp_path, capsys):
    src = native() if arguments[0] == "to-diffusers" else diffusers()
    assert main([*arguments, str(src), str(tmp_path / "dst"), "--dtype", "int8", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--dtype int8" in error and names_in(tmp_path) == []


def test_a_scale_that_is_missing_or_of_another_shape_is_noticed(tmp_path):
    from_diffusers(diffusers(), tmp_path / "int8", only="dit", dtype="int8", progress=False)
    file = tmp_path / "int8" / "dit.safetensors"
    state, scale = load_file(file), OURS.replace("weight", "scale")
    damages = {
        "missing": {n: x for n, x in state.items() if n != scale},
        "transposed": state | {scale: state[scale].T.contiguous()},
        "float next to it": state | {OURS: state[OURS].float()},
        "scales as int8": state | {scale: state[scale].char()},
    }
    for name, damaged in damages.items():
        save_file(damaged, file)
        with pytest.raises(ValueError, match="feed_forward.linear_in") as caught:
            load_int8(tmp_path / "int8")
        assert "\n" not in str(caught.value), name


# --- of other tools


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Stored so that times `scale` (which spreads over the weight) it is about the weight."""
    return (weight / scale).to(torch.float8_e4m3fn)


def one(shape):
    return torch.tensor(0.0123).view(shape)


ROWS, FEW, SQUARES = torch.rand(96, 1) + 0.1, torch.rand(96, 2) + 0.1, torch.rand(2, 1) + 0.1
LAYOUTS = {  # suffix and tensor of each scale; what the fp8 values are to be multiplied by
    "ComfyUI, per tensor": ({"scale_weight": one(())}, one(())),
    "per tensor, in a list": ({"scale_weight": one((1,)), "scale_input": one(())}, one(())),
    "ComfyUI, newer": ({"weight_scale": one(()), "input_scale": one(())}, one(())),
    "musubi-tuner, per row": ({"scale_weight": ROWS}, ROWS),
    "per row, flat, in bf16": ({"weight_scale": ROWS.flatten().bfloat16()}, ROWS.bfloat16().float()),
    "musubi-tuner, in blocks": ({"scale_weight": FEW[..., None]}, FEW.repeat_interleave(32, 1)),
    "musubi-tuner, two factors": (
        {"scale_weight": FEW[..., None], "scale_weight_tensor": one(())},
        FEW.repeat_interleave(32, 1) * one(()),
    ),
    "in blocks of a row": ({"weight_scale": FEW}, FEW.repeat_interleave(32, 1)),
}


def write_fp8(folder: Path, scales: dict, spread: torch.Tensor, prefix: str = "", **more) -> torch.Tensor:
    """A DiT with one layer in fp8; returns what that layer's weights are."""
    file = folder / "diffusion_pytorch_model.safetensors"
    state = tensors(diffusers() / "transformer")
    stored = fp8(state[WEIGHT], spread)
    state |= {WEIGHT: stored, **{f"{LAYER}.{kind}": scale.clone() for kind, scale in scales.items()}}
    file.unlink(missing_ok=True)
    save_file({prefix + n: x for n, x in state.items()} | more, file)
    return stored.float() * spread


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_and_its_scales_are_the_right_numbers(layout, tmp_path):
    folder, _ = copy_transformer(tmp_path)
    expected = write_fp8(folder, *LAYOUTS[layout])
    from_diffusers(folder, tmp_path / "native", only="dit", dtype="fp32", progress=False)
    found, before = tensors(tmp_path / "native"), tensors(native(), "dit")
    assert found[OURS].equal(expected) and all(found[n].equal(x) for n, x in before.items() if n != OURS)
    assert read_weights(folder).tensors[WEIGHT].read().equal(expected.bfloat16())  # what it is without --dtype
    assert "F8_E4M3 × " in as_table(inspect(folder)) and inspect(folder)["models"][0]["other tensors"] == 0


def test_squares_of_128_of_which_the_last_are_smaller(tmp_path):
    weight, scale = torch.randn(300, 200), torch.rand(3, 2) + 0.1
    spread = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    save_file({"a.weight": fp8(weight, spread), "a.weight_scale_inv": scale}, tmp_path / "x.safetensors")
    found = read_weights(tmp_path / "x.safetensors").tensors
    assert found.keys() == {"a.weight"} and found["a.weight"].read().dtype == torch.bfloat16
    assert torch.cat(list(found["a.weight"].chunks())).view(300, 200).equal(fp8(weight, spread).float() * spread)


def test_scales_stay_with_their_rows_in_every_piece(tmp_path, monkeypatch):
    weight, scale = torch.randn(30, 64), torch.rand(30, 4) + 0.1
    spread = scale.repeat_interleave(16, 1)
    save_file({"a": fp8(weight, spread), "b": scale}, tmp_path / "x.safetensors")
    header = read_weights(tmp_path / "x.safetensors").tensors
    place = header["a"]
    stored = Stored(place.path, place.start, place.stop, (30, 64), "F8_E4M3")
    monkeypatch.setattr("weights_convert.scales.CHUNK", 7 * 64 * 4)
    pieces = list(multiply(stored, header["b"], None, (1, 16)))
    assert len(pieces) == 5 and torch.cat(pieces).view(30, 64).equal(fp8(weight, spread).float() * spread)
    assert CHUNK % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales(dtype, tmp_path):
    folder, file = copy_transformer(tmp_path)
    state = {n: x.to(dtype) for n, x in tensors(diffusers() / "transformer").items()}
    save_file(state | {"scaled_fp8": torch.zeros(2).to(dtype)}, file)
    from_diffusers(folder, tmp_path / "native", only="dit", progress=False)
    found = tensors(tmp_path / "native")
    assert found[OURS].dtype == torch.bfloat16 and found[OURS].equal(state[WEIGHT].bfloat16())


def test_fp8_becomes_int8_on_the_way(tmp_path):
    folder, _ = copy_transformer(tmp_path)
    expected = write_fp8(folder, *LAYOUTS["musubi-tuner, per row"])
    from_diffusers(folder, tmp_path / "native", only="dit", dtype="int8", progress=False)
    found = tensors(tmp_path / "native")
    int8, scale = quantise(expected)
    assert found[OURS].equal(int8) and found[OURS.replace("weight", "scale")].equal(scale)


def as_bytes(description) -> torch.Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "_orig_mod."]
)
def test_single_files_with_the_prefixes_that_people_meet(prefix, tmp_path):
    """With ComfyUI's description of the layer, its mark, and other models next to the DiT."""
    folder, file = copy_transformer(tmp_path)
    others = {"vae.decoder.x": torch.ones(2), f"{prefix}scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    described = {f"{prefix}{LAYER}.comfy_quant": as_bytes({"format": "float8_e4m3fn"})}
    expected = write_fp8(
        folder, *LAYOUTS["ComfyUI, newer"], prefix, **described, **(others if "diffusion" in prefix else {})
    )
    single = file.rename(tmp_path / "comfy.safetensors")
    from_official(tmp_path / "native", dit=single, only="dit", dtype="fp32", progress=False)
    assert tensors(tmp_path / "native")[OURS].equal(expected)
    assert inspect(single)["models"][0]["missing tensors"] == 0


def test_of_two_copies_the_averaged_one(tmp_path):
    folder, file = copy_transformer(tmp_path)
    state = tensors(folder)
    save_file(state | {f"ema.{n}": x + 1 for n, x in state.items()}, file)
    from_diffusers(folder, tmp_path / "native", only="dit", progress=False)
    assert tensors(tmp_path / "native")[OURS].equal(state[WEIGHT] + 1)


STRANGE = {  # what stands next to the layer, and what the error names
    "two scales": ({"scale_weight": one(()), "weight_scale": one(())}, "scale_weight and weight_scale"),
    "per input": ({"scale_weight": torch.rand(1, 64)}, "(1, 64)"),
    "transposed": ({"scale_weight": torch.rand(2, 96)}, "(2, 96)"),
    "of some rows": ({"scale_weight": torch.rand(48)}, "(48,)"),
    "uneven blocks": ({"scale_weight": torch.rand(96, 5)}, "(96, 5)"),
    "exponents": ({"weight_scale": torch.ones(96, 2).to(torch.float8_e8m0fnu)}, "F8_E8M0"),
    "zero points": ({"weight_scale": one(()), "weight_zero_point": one(())}, "weight_zero_point"),
    "smoothed": ({"weight_scale": one(()), "pre_quant_scale": torch.rand(64)}, "pre_quant_scale"),
    "rotated": (
        {"weight_scale": one(()), "comfy_quant": as_bytes({"format": "float8_e4m3fn", "convrot": True})}, "convrot"),
    "int8 of ComfyUI": ({"weight_scale": one(()), "comfy_quant": as_bytes({"format": "int8_tensorwise"})}, "int8_t"),
    "described by no table": ({"comfy_quant": as_bytes([1])}, "comfy_quant"),
    "factor of many": ({"scale_weight": FEW, "scale_weight_tensor": torch.rand(96)}, "scale_weight_tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_scales_are_an_error(name, tmp_path, capsys):
    folder, file = copy_transformer(tmp_path)
    scales, word = STRANGE[name]
    write_fp8(folder, scales, one(()))
    assert main(["from-diffusers", str(folder), str(tmp_path / "native"), "--only", "dit", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and str(file) in error and names_in(tmp_path) == ["transformer"]


@pytest.mark.parametrize("kind", ["weight_scale", "SCB", "scale"])
def test_int8_of_other_tools_is_an_error(kind, tmp_path):
    folder, file = copy_transformer(tmp_path)
    state = tensors(folder)
    save_file(state | {WEIGHT: state[WEIGHT].char(), f"{LAYER}.{kind}": torch.rand(96)}, file)
    with pytest.raises(ValueError, match=f"(?s){LAYER}"):
        from_diffusers(folder, tmp_path / "native", only="dit", progress=False)


def test_a_description_in_the_header_is_read(tmp_path):
    for kind, accepted in (("float8_e4m3fn", True), ("int8_tensorwise", False)):
        described = json.dumps({"format_version": "1.0", "layers": {"a": {"format": kind}}})
        save_file({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors", {"_quantization_metadata": described})
        if accepted:
            assert read_weights(tmp_path / "x.safetensors").metadata == {}
        else:
            with pytest.raises(ValueError, match="int8_tensorwise"):
                read_weights(tmp_path / "x.safetensors")
