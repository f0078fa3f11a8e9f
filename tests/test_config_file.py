"""config.json: every preset there and back, and every value checked before anything of its size is built."""

import functools
import json
from dataclasses import replace

import pytest

from kandinsky5.config import PRESETS
from kandinsky5.config_file import load_config, save_config
from random_weights import SMALL, SMALL_DIT, SMALL_NABLA


@pytest.mark.parametrize("config", [*PRESETS.values(), replace(SMALL, dit=replace(SMALL_DIT, nabla=SMALL_NABLA))])
def test_config_round_trip(config, tmp_path):
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("dit.depth", 3, "depth"),
        ("sampling.shift", "five", "sampling.shift is 'five'"),
        ("sampling.seed", 1, "seed"),
        ("name", "\x1b]0;title\x07", r"name '\x1b]0;title\x07'"),
        ("vae.blocks_per_stage", 1000, "vae.blocks_per_stage 1000"),
        ("vae.halves_time", [False] * 16, "vae.halves_time"),
        ("vae.channels", [8] * 100_000, "vae.channels"),
        ("dit.num_visual_blocks", 100_000, "dit.num_visual_blocks 100000"),
        ("qwen.num_layers", 1000, "qwen.num_layers 1000"),
        ("qwen.vocab_size", 2**60, "qwen.vocab_size"),
        ("clip.num_layers", 10**400, "clip.num_layers"),
        ("sampling.num_frames", 8388609, "sampling.num_frames 8388609"),
        ("sampling.height", 2**20, "sampling.height 1048576"),
        ("sampling.num_inference_steps", 10**6, "sampling.num_inference_steps 1000000"),
        ("sampling.negative_prompt", "x" * 10**6, "sampling.negative_prompt"),
        ("text.template", "x" * 10**6 + "{}", "text.template"),
        ("text.template", "{} {}", "text.template"),
        ("tasks", ["t2v"] * 10**5, "tasks"),
        ("vae", {"dimensions": 2, "halves_time": [False]}, "vae.dimensions 2"),
        ("base", "x" * 10**5, "base"),
        ("tiling.pixel_stride", 8, "tiling.pixel_stride 8"),  # a thousand tiles of each place
        ("tiling.frames", 4000, "tiling.frames 4000"),
    ],
)
def test_values_that_no_model_has_are_refused(field, value, words, tmp_path):
    save_config(SMALL, tmp_path / "config.json")
    document = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    *parents, last = field.split(".")
    functools.reduce(dict.__getitem__, parents, document)[last] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError) as caught:
        load_config(tmp_path / "config.json")
    message = str(caught.value)
    assert words in message and "config.json" in message and message.isprintable() and len(message) < 1000, message
