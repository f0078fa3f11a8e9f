"""Checkpoints that are damaged, incomplete or of another kind end in one line, never in a traceback."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from command_line import FOX
from kandinsky5 import video_io
from kandinsky5.dit import DiT
from random_weights import SMALL_DIT


def test_a_place_that_is_no_checkpoint(refused, here):
    for folder in ("empty", "diffusers", "official/model"):
        Path(folder).mkdir(parents=True)
    Path("diffusers/model_index.json").write_text("{}")
    Path("official/model/lite.safetensors").touch()
    Path("diffusers/text_encoder").mkdir()
    Path("diffusers/text_encoder/config.json").write_text("{}")
    Path("diffusers/text_encoder/model.safetensors").touch()
    for place, words in {
        "t2v-light-sft-5s": "'t2v-light-sft-5s' is neither a folder nor a preset: did you mean t2v-lite-sft-5s",
        "t2v-lite-sft-5s": "the weights of preset 't2v-lite-sft-5s' are not part of this package: download them",
        "no/such": "there is no checkpoint folder no/such",
        "empty": "empty holds no config.json",
        "image.png": "image.png is not a folder",
        "diffusers": "Diffusers layout; convert it once: python -m weights_convert from-diffusers diffusers NEW_FOLDER",
        "diffusers/text_encoder": "Diffusers layout; convert it once: python -m weights_convert from-diffusers",
        "diffusers/text_encoder/model.safetensors": "python -m weights_convert from-diffusers diffusers NEW_FOLDER",
        "small/vae.safetensors": "small/vae.safetensors is one file of a checkpoint: give its folder, small",
        "official/model": "python -m weights_convert from-official --dit official/model/lite.safetensors",
        "official": "official layout; convert it once: python -m weights_convert from-official --dit official/model/",
        "official/model/lite.safetensors": "python -m weights_convert from-official --dit official/model/lite.",
    }.items():
        refused(["a fox", "--checkpoint", place], words)


def truncate(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


DAMAGES = {
    "missing": ("vae.safetensors", None, "small/vae.safetensors is missing"),
    "truncated": ("qwen.safetensors", truncate, "small/qwen.safetensors is no complete safetensors file"),
    "web page": ("dit.safetensors", b"<html>404</html>", "small/dit.safetensors is no complete safetensors file"),
    "empty": ("clip.safetensors", b"", "small/clip.safetensors is no complete safetensors file"),
    "half a config": ("config.json", b'{"name": ', "small/config.json"),
    "unknown field": ("config.json", b'{"flavour": 3}', "PipelineConfig has no field flavour; its fields are name"),
    "wrong type": (
        "config.json",
        b'{"name": 3}',
        "name is 3",
    ),
    "no tokenizer": ("qwen_tokenizer", None, "small/qwen_tokenizer"),
}


@pytest.mark.parametrize("name, new, words", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_answered_in_one_line(refused, name, new, words):
    path = Path("small", name)
    content = new(path) if callable(new) else new
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(FOX, words)


def test_weights_of_another_size_are_named_with_both_shapes(refused):
    Path("small/dit.safetensors").unlink()
    larger = DiT(replace(SMALL_DIT, dim=96, rope_axes=(8, 20, 20), ff_dim=192))
    save_file(larger.state_dict(), "small/dit.safetensors")
    words = "time_embedder.linear_in.weight: the configuration says (32, 64), the file has (32, 96)"
    refused(FOX, "small/dit.safetensors does not fit", words)


WRONG = [None, True, -1, 0, 7, 2**25, -(2**63), 10**30, 0.5, -1e300, 5e-324, float("nan"), float("inf"), "five", "",
         "{}", "a\0b", "9" * 5000, [], [0], [None], ["a"], [1, 2, 3], [[]], {}, {"a": 1}]  # fmt: skip


def damaged(values: dict, seed: int) -> dict:
    """`values` with one entry, anywhere inside, replaced, doubled, renamed or gone."""
    chance, values = random.Random(seed), json.loads(json.dumps(values))
    places = []

    def visit(inside):
        for key, value in inside.items() if isinstance(inside, dict) else enumerate(inside):
            places.append((inside, key))
            if isinstance(value, (dict, list)):
                visit(value)

    visit(values)
    inside, key = chance.choice(places)
    if chance.random() < 0.7 or isinstance(inside[key], dict):
        inside[key] = chance.choice(WRONG)
    elif type(inside[key]) is int:
        inside[key] *= 2
    elif isinstance(inside, dict) and chance.random() < 0.5:
        inside["flavour"] = inside.pop(key)
    else:
        del inside[key]
    return values


@pytest.mark.fuzz
def test_150_damaged_configs_give_one_line_or_a_video(here, cli):
    """Each is a config.json that people who edit files by hand could write; none may end in a traceback."""
    good, codes = json.loads(Path("small/config.json").read_text()), Counter()
    Path("small/config.json").unlink()
    for seed in range(150):
        Path("small/config.json").write_text(json.dumps(damaged(good, seed)))
        codes[expect_one_line_or_a_video(cli, FOX)] += 1
    assert codes[2] > 90 and codes[0] > 6


@pytest.mark.fuzz
def test_150_damaged_settings_give_one_line_or_a_video(here, cli, monkeypatch):
    monkeypatch.setattr("kandinsky5.pipeline.compile_models", lambda *models: None)
    assert cli(*FOX, "-o", "good.mp4")[0] == 0
    good, codes = video_io.read_metadata("good.mp4"), Counter()
    for seed in range(150):
        video_io.write_video("bad.png", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata=damaged(good, seed))
        codes[expect_one_line_or_a_video(cli, ["--replay", "bad.png"], "bad.png")] += 1
    assert codes[2] > 90 and codes[0] > 6


def expect_one_line_or_a_video(cli, arguments, *words) -> int:
    code, out, lines = cli(*arguments)
    lines = [line for line in lines if not line.startswith("note: ")]
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines
        assert not Path("out.mp4").exists()
    else:
        assert (code, lines) == (0, [])
        Path("out.mp4").unlink()
    return code


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dit": {"dim": -64}}, "dit.dim"),
        ({"dit": {"num_visual_blocks": 2.0}}, "dit.num_visual_blocks is 2.0 and should be a whole number"),
        ({"dit": {"num_visual_blocks": 10**7}}, "num_visual_blocks 10000000"),
        ({"dit": {"rope_axes": [8, 12, "12"]}}, "dit.rope_axes is '12' and should be a whole number"),
        ({"dit": {"rope_axes": [8, 24]}}, "dit.rope_axes is [8, 24] and should be a list of 3 times a whole number"),
        ({"dit": {"nabla": []}}, "dit.nabla is [] and should be a table of NablaConfig's fields or null"),
        ({"dit": {"nabla": {"P": 1.5}}}, "dit.nabla.P 1.5: a share is at most 1"),
        ({"vae": None}, "vae is None and should be a table of VAEConfig's fields"),
        ({"vae": {"channels": [16, 32, 32, 30]}}, "vae.norm_groups 4: groups divide channels"),
        ({"clip": {"num_heads": 5}}, "clip.dim 24, clip.num_heads 5: the number of heads divides dim"),
        ({"clip": {"dim": 48}}, "dit.pooled_dim 24, clip.dim 48: these models do not belong together"),
        ({"text": {"template": "<|im_start|>"}}, "text.template '<|im_start|>': the prompt stands in it once, at {}"),
        ({"tiling": {"frame_stride": 6}}, "windows hold whole latent frames"),
        ({"sampling": {"guidance_scale": float("inf")}}, "sampling.guidance_scale is inf and should be a finite"),
        ({"tasks": ["t2x"]}, "tasks ('t2x',): tasks are t2v, i2v or both"),
        ({"tasks": ["t2i"]}, "tasks ('t2i',), sampling.num_frames 5: an image is one frame"),
    ],
    ids=str,
)
def test_a_wrong_value_in_config_json_is_named_with_its_rule(refused, change, words):
    values = json.loads(Path("small/config.json").read_text())
    for name, new in change.items():
        values[name] = values[name] | new if isinstance(new, dict) else new
    Path("small/config.json").unlink()
    Path("small/config.json").write_text(json.dumps(values))
    refused(FOX, "config.json", words)


@pytest.mark.parametrize(
    "model, words",
    [("dit", "after step 1 of 2 the latents contain NaN"), ("vae", "the decoded frames contain NaN")],
)
def test_nan_is_named_with_the_step_and_not_drawn(refused, model, words):
    path = Path(f"small/{model}.safetensors")
    state = load(path.read_bytes())
    path.unlink()
    name = next(n for n in sorted(state) if n.endswith("weight") and not n.startswith("encoder"))  # `load` has no order
    state[name].view(-1)[0] = torch.nan
    save_file(state, path)
    refused(FOX, words)
