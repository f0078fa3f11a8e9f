"""LoRAs against PEFT and diffusers: what one writes the other reads, the same outputs, frames and gradients."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

import cases
import theirs as reference
from kandinsky5 import Pipeline
from kandinsky5.extras import lora
from random_weights import relative_error
from test_lora import random_lora
from weights_convert import tables
from weights_convert.lora import convert

LINEARS = ["to_query", "to_key", "to_value", "out_layer", "in_layer"]
BLOCKS = (
    r"(text|visual)_transformer_blocks\.\d+\.(self_attention|cross_attention|feed_forward)\.(" + "|".join(LINEARS) + ")"
)
COMPARED = ("dit", "t2v", "i2v")


@pytest.fixture
def parts(source, monkeypatch) -> dict:
    reference.make_comparable(monkeypatch)
    return reference.load_components(source, torch.float32)


@pytest.fixture
def pipe(converted) -> Pipeline:
    return Pipeline.load(converted, device="cpu", dtype=torch.float32)


def check_both(parts: dict, pipe: Pipeline, plain: torch.Tensor, record, what: str) -> None:
    """DiT outputs within 2e-5, frames within 1/255, and neither as without the LoRA."""
    inputs = cases.build_inputs(pipe.config)
    for name in COMPARED:
        expected, ours = reference.compute(name, parts, inputs[name]), cases.compute(name, pipe, inputs[name])
        if name == "dit":
            error, limit = relative_error(ours, expected), 2e-5
            assert relative_error(plain, expected) > 0.05, "the LoRA changes nothing: this would prove nothing"
        else:
            error, limit = float((ours - expected).abs().max()), 1 / 255
        record(f"{name} with a LoRA {what}", "float32", error, limit)
        assert error <= limit, name


def add_random_adapter(transformer, seed: int = 0, alpha: float = 6) -> LoraConfig:
    """PEFT's, with no zero in it."""
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=BLOCKS)
    inject_adapter_in_model(config, transformer, "default")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    transformer.peft_config = {"default": config}
    return config


def test_ours_is_read_by_diffusers(parts, pipe, tmp_path, record):
    """With an alpha that is not the rank."""
    plain = cases.compute("dit", pipe, cases.build_inputs(pipe.config)["dit"])
    lora.save(random_lora(pipe.dit, alpha=6.0), tmp_path / "ours.safetensors", {})
    convert(tmp_path / "ours.safetensors", tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    theirs = reference.build_pipeline(reference.Kandinsky5T2VPipeline, parts)
    theirs.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    pipe.load_lora(tmp_path / "ours.safetensors")
    check_both(parts, pipe, plain, record, "written here")


def test_theirs_is_read_here(parts, pipe, tmp_path, record):
    plain = cases.compute("dit", pipe, cases.build_inputs(pipe.config)["dit"])
    config = add_random_adapter(parts["transformer"])
    reference.Kandinsky5T2VPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(parts["transformer"]),
        transformer_lora_adapter_metadata={k: v for k, v in config.to_dict().items() if k in ("r", "lora_alpha")},
    )
    (file,) = tmp_path.glob("*.safetensors")
    assert "lora_adapter_metadata" in str(file.read_bytes()[:100_000])
    pipe.load_lora(file)
    check_both(parts, pipe, plain, record, "written by diffusers")


def test_the_authors_folder_is_read_by_peft_as_by_us(parts, pipe, tmp_path):
    """As the authors load it: config_lora.json makes the modules, names without their prefix and ".default"."""
    lora.save(random_lora(pipe.dit, alpha=6.0), tmp_path / "ours.safetensors", {})
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs", "official")
    config = LoraConfig(**json.loads((tmp_path / "theirs" / "config_lora.json").read_text()))
    transformer = parts["transformer"]
    inject_adapter_in_model(config, transformer, "default")
    state = load_file(tmp_path / "theirs" / "lora.safetensors")
    state = {name.removeprefix("base_model.model.").replace(".default", ""): x for name, x in state.items()}
    result = set_peft_model_state_dict(transformer, state, "default")
    assert not result.unexpected_keys
    pipe.load_lora(tmp_path / "theirs")
    inputs = cases.build_inputs(pipe.config)["dit"]
    assert relative_error(cases.compute("dit", pipe, inputs), reference.compute("dit", parts, inputs)) < 2e-5


def test_gradients_are_those_of_peft(parts, pipe):
    transformer = parts["transformer"].requires_grad_(False)
    add_random_adapter(transformer)
    inputs = cases.build_inputs(pipe.config)["dit"]
    target = torch.randn(2, 3, 8, 12, 16, generator=torch.Generator().manual_seed(3))
    (reference._dit(parts, **inputs) - target).square().mean().backward()
    gradients = {n: p.grad for n, p in transformer.named_parameters() if "lora_" in n}
    made = lora.create(pipe.dit.requires_grad_(False), 4, 6.0)
    for name, update in made.updates():
        theirs = tables.theirs("dit", f"{name}.weight").removesuffix(".weight")
        for half in "AB":
            peft = dict(transformer.named_parameters())[f"{theirs}.lora_{half}.default.weight"]
            getattr(update, half).data = peft.detach().clone()
    lora.add(pipe.dit, made, dtype=torch.float32)
    x, text, pooled, t = (inputs[name] for name in ("x", "text", "pooled", "t"))
    ours = pipe.dit(x, text, pooled, t, rope_scale=cases.ROPE_SCALE)
    (ours - target).square().mean().backward()
    assert len(gradients) == 2 * len(list(made.updates())) and all(g is not None for g in gradients.values())
    for half in "AB":
        pairs = [
            (getattr(update, half).grad.flatten(), gradients[f"{name}.lora_{half}.default.weight"].flatten())
            for name, update in (
                (tables.theirs("dit", f"{n}.weight").removesuffix(".weight"), u) for n, u in made.updates()
            )
        ]
        assert relative_error(*(torch.cat(side) for side in zip(*pairs, strict=True))) < 1e-5
