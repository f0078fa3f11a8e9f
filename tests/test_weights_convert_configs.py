"""Other people's config.json: values of any kind, fields that change the computation, and two places for one field."""

import json
import shutil
from pathlib import Path

import pytest

from converted import diffusers, edit_json, names_in
from kandinsky5.checkpoint import MODELS
from weights_convert import from_diffusers
from weights_convert.__main__ import main
from weights_convert.diffusers_files import FOLDERS
from weights_convert.read import read_weights
from weights_convert.sizes import build_config

REFUSED = [  # model, keys that are changed, what the message names
    ("vae", {"spatial_compression_ratio": [8]}, "spatial_compression_ratio is [8]"),
    ("vae", {"temporal_compression_ratio": 16}, "temporal_compression_ratio 16"),
    ("vae", {"spatial_compression_ratio": 4}, "spatial_compression_ratio 4 and temporal_compression_ratio 4"),
    ("vae", {"block_out_channels": [[16]]}, "block_out_channels is [16]"),
    ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae", {"scaling_factor": 10**400}, "scaling_factor is 1000"),
    ("vae", {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
    ("vae", {"norm_num_groups": 7}, "norm_num_groups 7"),
    ("vae", {"out_channels": 4}, "out_channels = 4"),
    ("vae", {"shift_factor": 0.1159}, "shift_factor = 0.1159"),
    ("vae", {"up_block_types": ["UpBlock2D"] * 4}, "UpBlock2D"),
    ("vae", {"_class_name": "AutoencoderKL"}, "'AutoencoderKL'"),
    ("qwen", {"text_config": 5}, "text_config is 5"),
    ("qwen", {"text_config": {"rope_parameters": [1]}}, "rope_parameters is [1]"),
    ("qwen", {"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads 3"),
    ("qwen", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),  # at the top, where older configs have it
    ("qwen", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("qwen", {"num_hidden_layers": 10**9}, "num_hidden_layers twice"),
    ("qwen", {"vocab_size": 2**60}, "vocab_size twice"),
    ("qwen", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_type = 'yarn'"),
    ("qwen", {"rope_scaling": {"type": "linear"}}, "type = 'linear'"),
    ("qwen", {"rope_theta": 5e5}, "rope_theta twice"),
    ("qwen", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("qwen", {"head_dim": 64, "hidden_size": 16, "num_attention_heads": 2}, "head_dim 64"),
    ("qwen", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen", {"model_type": "llama"}, "model_type = 'llama'"),
    ("clip", {"num_attention_heads": -2}, "num_attention_heads is -2"),
    ("clip", {"num_attention_heads": 5}, "hidden_size 24, num_attention_heads 5"),
    ("clip", {"bos_token_id": [0]}, "bos_token_id is [0]"),
    ("clip", {"text_config_dict": {"hidden_size": 32}}, "hidden_size twice"),
    ("clip", {"text_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
    ("dit", {"attention_wT": "a"}, "attention_wT is 'a'"),
    ("dit", {"attention_P": [0.9]}, "attention_P is [0.9]"),
    ("dit", {"attention_P": 2}, "attention_P = 2.0"),
    ("dit", {"attention_wH": None}, "attention_wH"),
    ("dit", {"attention_type": ["nabla"]}, "attention_type is ['nabla']"),
    ("dit", {"attention_type": "sta"}, "attention_type = 'sta'"),
    ("dit", {"attention_add_sta": False}, "attention_add_sta = False"),
    ("dit", {"attention_causal": True}, "attention_causal = True"),
    ("dit", {"axes_dims": [16, 16]}, "axes_dims is [16, 16]"),
    ("dit", {"axes_dims": [7, 13, 12]}, "axes_dims (7, 13, 12)"),
    ("dit", {"axes_dims": [10**19, 2, 2]}, "axes_dims (1"),
    ("dit", {"visual_cond": 1}, "visual_cond is 1"),
    ("dit", {"num_visual_blocks": 60}, "num_visual_blocks = 60, its tensors have 2"),
    ("dit", {"_class_name": "CogVideoXTransformer3DModel"}, "CogVideoX"),
]


@pytest.mark.parametrize("model, changes, words", REFUSED, ids=[f"{m} {c}"[:50] for m, c, _ in REFUSED])
def test_what_we_do_not_compute_is_refused(model, changes, words, tmp_path, capsys):
    folder = Path(shutil.copytree(diffusers() / FOLDERS[model], tmp_path / "model"))
    edit_json(folder / "config.json", **changes)
    for command in (["from-diffusers", str(folder), str(tmp_path / "dst"), "--only", model], ["inspect", str(folder)]):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1 and words in printed, printed
        assert str(folder) in printed and len(printed) < 1000
    assert names_in(tmp_path) == ["model"]


AGREES = [
    ("qwen", {"hidden_size": 16, "num_hidden_layers": 2, "use_sliding_window": False, "sliding_window": 32768}),
    ("qwen", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_theta": 1e6}),
    ("qwen", {"layer_types": ["full_attention"] * 2, "head_dim": 8, "quantization_config": None}),
    ("clip", {"text_config": {"hidden_size": 24}, "text_config_dict": {"hidden_size": 24}, "projection_dim": 768}),
    ("vae", {"_class_name": "AutoencoderKLCausal3D", "time_compression_ratio": 4, "sample_size": 256}),
    ("dit", {"attention_causal": False, "attention_window": 3, "unknown": {"a": 1}}),
]


@pytest.mark.parametrize("model, changes", AGREES)
def test_a_field_that_stands_twice_may_agree(model, changes, tmp_path):
    folder = Path(shutil.copytree(diffusers() / FOLDERS[model], tmp_path / "model"))
    edit_json(folder / "config.json", **changes)
    before = from_diffusers(diffusers(), tmp_path / "a", only=model, progress=False)
    after = from_diffusers(folder, tmp_path / "b", only=model, progress=False)
    assert getattr(before, model) == getattr(after, model)


def test_no_value_of_any_key_raises_anything_but_valueerror():
    odd = [None, -1, 0, 5, 2**40, 10**400, 1.5, float("nan"), "a", True, [], [8], ["a"], [[8]], {}, {"a": 1}]
    refused = 0
    for model in MODELS:
        weights = read_weights(diffusers() / FOLDERS[model])
        shapes = {name: stored.shape for name, stored in weights.tensors.items()}
        config = json.loads((diffusers() / FOLDERS[model] / "config.json").read_text())
        for table in (config, config.get("text_config", {})):
            for key, right in list(table.items()):
                for table[key] in odd:
                    try:
                        build_config(model, config, shapes, "x")
                    except ValueError as error:
                        refused += 1
                        assert str(error).startswith("x: ")
                table[key] = right
    assert refused > 500


@pytest.mark.parametrize(
    "file, odd, words",
    [
        ("model_index.json", {"_class_name": []}, "model_index.json is for []"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "'FluxPipeline'"),
        ("scheduler/scheduler_config.json", {"shift": [5]}, "shift = [5]"),
        ("kandinsky5.json", {"tasks": []}, "tasks ()"),
    ],
)
def test_odd_values_in_the_other_files(file, odd, words, tmp_path, capsys):
    folder = Path(shutil.copytree(diffusers(), tmp_path / "diffusers"))
    edit_json(folder / file, **odd)
    assert main(["from-diffusers", str(folder), str(tmp_path / "dst")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and words in printed and file in printed
    assert names_in(tmp_path) == ["diffusers"]
