"""The bundled models end to end: their clips show what the prompts say, as the judge measures them.

A few clips per model, so that a broken pipeline or broken weights are noticed at once; the tables in the model cards
have hundreds.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from kandinsky5 import Pipeline
from kandinsky5.checkpoint import SHIPPED, fingerprint
from kandinsky5.config_file import load_config
from kandinsky5.extras.probe import block_map, record_attention
from kandinsky5.nano import evaluate, export, judge, presets

ROOT = Path(__file__).resolve().parents[1]
JUDGED = ROOT / "docs" / "judge"
TRAINED = {"nano": 6, "nano-nocfg": 6, "nano-distilled16steps": 16}  # steps; nano-10s, far slower, has its own test


EACH = ["nano", *(pytest.param(name, marks=pytest.mark.stages) for name in TRAINED if name != "nano")]


@functools.cache
def load(name: str) -> Pipeline:
    return Pipeline.load(name, dtype=torch.float32)


@pytest.mark.parametrize("name", EACH)
def test_clips_show_what_their_own_prompts_say(name):
    """And not what the other prompts say, so the test can fail."""
    captions = [evaluate.sample_prompt(one, 0)[1] for one in ("seen, English", "held out, Russian", "two objects")]
    texts = [caption.text for caption in captions]
    clips = load(name)(texts, num_inference_steps=TRAINED[name], progress=False).numpy()
    right = [[judge.score(judge.judge_clip(clip), caption)["all"] for caption in captions] for clip in clips]
    assert sum(right[i][i] for i in range(3)) >= 2 and not any(right[i][i - 1] or right[i][i - 2] for i in range(3))


@pytest.mark.parametrize("name", EACH)
def test_a_given_image_moves_as_the_prompt_says(name):
    results = list(evaluate.evaluate(load(name), "image to video", 1, num_inference_steps=6))
    assert all(result["answers"]["motion and first frame"] for result in results), results


@pytest.mark.stages
def test_the_vae_reconstructs_clips_at_30_db():
    results = list(evaluate.evaluate(load("nano"), "VAE", 3))
    assert np.mean([result["psnr"] for result in results]) >= 30, results
    assert all(result["answers"]["all"] for result in results), results


def test_the_command_makes_a_video(tmp_path):
    sample.main(["a red circle", "--steps", "2", "--dtype", "float32", "-o", str(tmp_path / "out.mp4")])
    assert (tmp_path / "out.mp4").stat().st_size > 1000


@pytest.mark.stages
@pytest.mark.parametrize("task", ["image to video", "seen, English"])
def test_nano_10s_generates_long_clips_with_dropped_tiles(task):
    """Colour and motion, which need few steps."""
    pipe = load("nano-10s")
    with record_attention(pipe.dit, "visual_blocks.*.self_attention", keep=block_map) as seen:
        results = list(evaluate.evaluate(pipe, task, 1, num_inference_steps=3))
    claims = ("background", "colour", "motion")  # not every caption states the background
    right = [result["answers"][name] for result in results for name in claims if name in result["answers"]]
    assert all(right), results
    kept = torch.stack([kept.float().mean() for calls in seen.values() for kept in calls]).mean()
    assert kept <= 0.6, f"NABLA kept {kept:.0%} of the tiles"


def test_cards_carry_the_results_of_the_bundled_weights():
    for name, preset in presets.PRESETS.items():
        judged = json.loads((JUDGED / f"judge_{name}.json").read_text(encoding="utf-8"))
        assert judged["fingerprint"] == fingerprint(SHIPPED / name), f"{name} was judged with other weights"
        assert not judged["settings"]["full_attention"] and judged["settings"]["seed"] == evaluate.JUDGE_SEED
        config = load_config(SHIPPED / name / "config.json")
        assert replace(config, base=None) == preset, f"{name} is shipped with other settings than its preset's"
        sampling = ("num_inference_steps", "guidance_scale", "shift")
        assert judged["sampling"] == {key: getattr(preset.sampling, key) for key in sampling}
        card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
        assert card.endswith(export.describe_evaluation(name, JUDGED / f"judge_{name}.json", SHIPPED / name)), name


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [("nano-10s-full-attention", "full_attention", (False, True)), ("nano-float32", "dtype", ("bfloat16", "float32"))],
)
def test_variants_differ_from_the_evaluation_in_one_setting(name, setting, values):
    plain = name.removesuffix("-full-attention").removesuffix("-float32")
    results = [json.loads((JUDGED / f"judge_{n}.json").read_text(encoding="utf-8")) for n in (plain, name)]
    assert results[0]["fingerprint"] == results[1]["fingerprint"] and results[0]["sampling"] == results[1]["sampling"]
    assert tuple(result["settings"][setting] for result in results) == values
    alike = {"prompts", "batch_size", "dtype", "seed", "num_inference_steps", "guidance_scale", "canvas"} - {setting}
    assert all(results[0]["settings"][key] == results[1]["settings"][key] for key in alike)


def test_the_bundled_weights_take_at_most_30_mb():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 30e6
