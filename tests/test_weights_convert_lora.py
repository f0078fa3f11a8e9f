"""LoRA files from one layout to another and into checkpoints, with values worked out here."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converted import native, tensors
from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config_file import load_config
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from random_weights import SMALL_DIT
from test_lora import random_lora, save_random
from weights_convert import inspect, merge, merge_lora
from weights_convert.__main__ import main
from weights_convert.lora import LAYOUTS, convert, read

A, B = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[4.0, 0.0], [1.0, 2.0], [0.0, 8.0]])
PRODUCT = torch.tensor([[4.0, 8.0], [2.0, 0.0], [4.0, -8.0]])  # B A, by hand
HALF = PRODUCT / 2  # alpha 1, rank 2
OURS = "visual_blocks.12.cross_attention.to_out"
THEIRS = "visual_transformer_blocks.12.cross_attention.out_layer"
KOHYA = "lora_unet_visual_transformer_blocks_12_cross_attention_out_layer"
PEFT_CONFIG = {"r": 2, "lora_alpha": 1, "target_modules": ["out_layer"]}

# What others write, name by name: tensors, metadata, a config next to them, and what is to be added to the weight.
WRITTEN = {
    "official": (
        {f"base_model.model.{THEIRS}.lora_A.default.weight": A, f"base_model.model.{THEIRS}.lora_B.default.weight": B},
        {}, ("config_lora.json", PEFT_CONFIG), HALF,
    ),
    "official without a config": (
        {f"base_model.model.{THEIRS}.lora_A.default.weight": A, f"base_model.model.{THEIRS}.lora_B.default.weight": B},
        {}, None, PRODUCT,
    ),
    "peft": (
        {f"base_model.model.{THEIRS}.lora_A.weight": A, f"base_model.model.{THEIRS}.lora_B.weight": B},
        {}, ("adapter_config.json", PEFT_CONFIG | {"alpha_pattern": {"cross_attention.out_layer": 4}}), PRODUCT * 2,
    ),
    "diffusers": (
        {f"transformer.{THEIRS}.lora_A.weight": A, f"transformer.{THEIRS}.lora_B.weight": B}, {}, None, PRODUCT,
    ),
    "diffusers with metadata": (
        {f"transformer.{THEIRS}.lora_A.weight": A, f"transformer.{THEIRS}.lora_B.weight": B},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})}, None, HALF,
    ),
    "rank-stabilised": (
        {f"diffusion_model.{THEIRS}.lora_A.weight": A, f"diffusion_model.{THEIRS}.lora_B.weight": B},
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 1, "use_rslora": True})}, None, PRODUCT / 2**0.5,
    ),
    "kohya": (
        {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.alpha": torch.tensor(1.0)},
        {}, None, HALF,
    ),
    "kohya without alpha": ({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}, {}, None, PRODUCT),
    "native": ({f"{OURS}.A": A, f"{OURS}.B": B}, {"alpha": "1"}, None, HALF),
    "native, its own alpha": ({f"{OURS}.A": A, f"{OURS}.B": B}, {"alpha": json.dumps({OURS: 4})}, None, PRODUCT * 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_means_what_its_layout_says(kind, tmp_path):
    state, metadata, config, expected = WRITTEN[kind]
    save_file(state, tmp_path / "lora.safetensors", {"trigger": "Foxy", **metadata})
    if config:
        (tmp_path / config[0]).write_text(json.dumps(config[1]))
    for place in (tmp_path, tmp_path / "lora.safetensors"):
        found = lora.load(place)
        ((name, update),) = found.updates()
        assert (name, found.trigger) == (OURS, "Foxy")
        torch.testing.assert_close(update.scale * update.B @ update.A, expected)


@pytest.fixture
def mixed(tmp_path):
    """Ranks and alphas that differ, in bf16 and float32."""
    made = random_lora(DiT(SMALL_DIT))
    for i, (_, update) in enumerate(made.updates()):
        update.alpha = 2.0 + i % 3 / 3
        if i % 4 == 0:
            update.A.data, update.B.data = update.A.data[:2].clone(), update.B.data[:, :2].clone()
        if i % 5 == 0:
            update.bfloat16()
    made.trigger = "Foxy"
    lora.save(made, tmp_path / "native.safetensors", {"base": "small", "steps": "7"})
    return tmp_path / "native.safetensors"


def test_every_layout_there_and_back_is_bit_exact(mixed, tmp_path):
    places = {layout: tmp_path / (layout if layout == "official" else f"{layout}.st.safetensors") for layout in LAYOUTS}
    for layout, place in places.items():
        convert(mixed, place, layout)
        assert read(place).layout == layout
    for source, layout in itertools.permutations(LAYOUTS, 2):
        again = tmp_path / f"{source}-{layout}{'' if layout == 'official' else '.safetensors'}"
        convert(places[source], again, layout)
        for file in again.iterdir() if layout == "official" else [again]:
            first = places[layout] / file.name if layout == "official" else places[layout]
            assert file.read_bytes() == first.read_bytes(), (source, layout)


def test_the_command_writes_what_others_read(mixed, tmp_path, capsys):
    assert main(["lora", str(mixed), str(tmp_path / "k.safetensors"), "--to", "kohya"]) == 0
    assert main(["lora", str(tmp_path / "k.safetensors"), str(tmp_path / "theirs"), "--to", "official"]) == 0
    config = json.loads((tmp_path / "theirs" / "config_lora.json").read_text())
    kohya, official = load_file(tmp_path / "k.safetensors"), load_file(tmp_path / "theirs" / "lora.safetensors")
    name = "visual_transformer_blocks.1.feed_forward.in_layer"
    assert f"base_model.model.{name}.lora_B.default.weight" in official and name in config["target_modules"]
    assert kohya[f"lora_unet_{name.replace('.', '_')}.alpha"].shape == ()
    assert config["r"] == 4 and len(official) == 2 * 32 and len(kohya) == 3 * 32
    with safe_open(tmp_path / "theirs" / "lora.safetensors", "pt") as file:
        assert file.metadata()["trigger"] == "Foxy" and file.metadata()["steps"] == "7"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["native.safetensors", "native.safetensors", "--to", "kohya"], "exists"),
        (["native.safetensors", "folder", "--to", "kohya"], "file, with .safetensors"),
        (["native.safetensors", "x.safetensors", "--to", "official"], "folder, without"),
        (["nothing", "x.safetensors", "--to", "kohya"], "nothing"),
    ],
)
def test_conversions_that_are_refused(mixed, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["lora", *arguments]) == 2
    assert words in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("half", [f"{OURS}.A", f"{OURS}.B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_values_that_are_no_numbers_are_refused(tmp_path, half, value, dtype):
    state = {name: x.clone() for name, x in WRITTEN["native"][0].items()}
    state[half][1, 1] = value
    save_file({name: x.to(dtype) for name, x in state.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"no finite numbers, in {OURS}"):
        lora.load(tmp_path)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"r": 3, "lora_alpha": 1}, "has rank 2, its config says 3"),
        ({"r": 2, "lora_alpha": "1"}, "not two numbers"),
        ({"r": 2, "lora_alpha": 10**400}, "no finite numbers"),
        ({"r": 2, "lora_alpha": 1, "use_dora": True}, "use_dora"),
        ({"r": 2, "lora_alpha": 1, "init_lora_weights": "pissa"}, "init_lora_weights"),  # it changes the model too
        ({"r": 2, "lora_alpha": 1, "layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": 2, "lora_alpha": 1, "peft_type": "LOHA"}, "peft_type"),
        ({"r": 2, "rank_pattern": [2]}, "pattern"),
        ({"r": 2, "alpha_pattern": {f"m{i}": 1 for i in range(100_000)}}, "pattern"),
    ],
)
def test_configs_that_contradict_their_tensors(tmp_path, config, words):
    save_file(WRITTEN["official"][0], tmp_path / "lora.safetensors")
    (tmp_path / "config_lora.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("alpha", [torch.zeros(0), torch.ones(2), torch.ones(1) * 1j])
def test_an_alpha_is_one_number(tmp_path, alpha):
    save_file({**WRITTEN["kohya"][0], f"{KOHYA}.alpha": alpha}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="alphas that are not one number"):
        read(tmp_path / "lora.safetensors")


# --- into a checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_holds_the_sum(tmp_path, monkeypatch, dtype):
    """Rows a few at a time, both LoRAs added before rounding once."""
    monkeypatch.setattr(merge, "CHUNK", 1000)
    source = native()
    if dtype != torch.float32:
        main(["to-diffusers", str(native()), str(tmp_path / "d"), "--dtype", "bf16", "--quiet"])
        main(["from-diffusers", str(tmp_path / "d"), str(tmp_path / "n"), "--quiet"])
        source = tmp_path / "n"
    files = [save_random(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    merge_lora(source, [(files[0], 0.5), (files[1], -1.0)], tmp_path / "merged", progress=False, verify=True)
    before, after, loras = tensors(source, "dit"), tensors(tmp_path / "merged", "dit"), [load_file(f) for f in files]
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.A" in loras[0] and name != module:
            a, b = (2 / 4 * one[f"{module}.B"].double() @ one[f"{module}.A"].double() for one in loras)
            expected = (weight.double() + 0.5 * a - b).to(weight.dtype)
            torch.testing.assert_close(
                after[name], expected, rtol=1e-6 if weight.dtype == torch.float32 else 8e-3, atol=1e-6
            )
            assert not after[name].equal(weight)
        else:
            assert after[name].equal(weight)
    assert (tmp_path / "merged" / "vae.safetensors").samefile(source / "vae.safetensors")


def test_a_lora_is_no_checkpoint_and_the_reverse(tmp_path, capsys):
    file = save_random(tmp_path / "a.safetensors")
    convert(file, tmp_path / "official", "official")
    for checkpoint in (file, tmp_path / "official"):
        assert main(["merge-lora", str(checkpoint), str(file), str(tmp_path / "m"), "--quiet"]) == 2
        assert "is a LoRA and no checkpoint" in capsys.readouterr().err
    assert main(["merge-lora", str(native()), str(native()), str(tmp_path / "m"), "--quiet"]) == 2
    assert main(["merge-lora", "nano", f"{file}:0.5", str(tmp_path / "m"), "--quiet"]) == 2
    assert "for another model" in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*"))


def test_inspect_says_what_a_lora_is(mixed, tmp_path, capsys):
    report = inspect(mixed)["lora"]
    assert (report["names"], report["rank"], report["modules"], report["presets"]) == ("native", [2, 4], 32, [])
    for_nano = save_random(tmp_path / "for_nano.safetensors", DiT(load_config(SHIPPED / "nano" / "config.json").dit))
    assert inspect(for_nano)["lora"]["presets"][0] == "nano"
    assert main(["inspect", str(mixed)]) == 0
    table = capsys.readouterr().out
    assert "native" in table and "Foxy" in table and "steps: 7" in table


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"alpha": "NaN"}, "no finite numbers"),
        ({"alpha": "1" + "0" * 400}, "no finite numbers"),
        ({"alpha": '"two"'}, "should be a number"),
        ({"alpha": "{"}, "cannot be read as JSON"),
        ({"trigger": "x" * 1001}, "more than 1,000 characters"),
    ],
)
def test_metadata_that_cannot_be(tmp_path, metadata, words):
    save_file({f"{OURS}.A": A, f"{OURS}.B": B}, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)
