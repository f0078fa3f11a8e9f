"""The bundled models end to end: their clips show what the prompts say, as the judge measures them.

A few clips per model, so that a broken pipeline or broken weights are noticed at once; the tables in the model cards
have hundreds.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky5 import Pipeline
from kandinsky5.checkpoint import SHIPPED, fingerprint
from kandinsky5.config_file import load_config
from kandinsky5.extras.probe import block_map, record_attention
from kandinsky5.nano import evaluate, export, judge, presets
from kandinsky5.nano.captions import write_caption
from kandinsky5.nano.world import sample_scene

ROOT = Path(__file__).resolve().parents[1]
JUDGED = ROOT / "docs" / "judge"
TRAINED = ("nano", "nano-nocfg", "nano-distilled16steps")  # nano-10s, ten times as slow, has its own test


@pytest.fixture(scope="module", params=TRAINED)
def pipe(request) -> Pipeline:
    return Pipeline.load(request.param, dtype=torch.float32)


def test_clips_show_what_the_prompts_say(pipe):
    steps = min(25, pipe.config.sampling.num_inference_steps)
    results = [
        result["answers"]["all"]
        for name in ("seen, English", "held out, Russian", "two objects")
        for result in evaluate.evaluate(pipe, name, 4, 4, num_inference_steps=steps)
    ]
    assert sum(results) >= 0.75 * len(results), results


def test_a_given_image_moves_as_the_prompt_says(pipe):
    results = list(evaluate.evaluate(pipe, "image to video", 4, 4, num_inference_steps=16))
    right = [result["answers"]["motion and first frame"] for result in results]
    assert sum(right) >= 3, results


def test_the_vae_reconstructs_clips_at_30_db():
    results = list(evaluate.evaluate(Pipeline.load("nano", dtype=torch.float32), "VAE", 4, 4))
    assert np.mean([result["psnr"] for result in results]) >= 30, results
    assert sum(result["answers"]["all"] for result in results) >= 3, results


def test_the_command_makes_a_video(tmp_path):
    command = [sys.executable, ROOT / "sample.py", "a red circle moves left", "-o", tmp_path / "out.mp4"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_nano_10s_generates_long_clips_with_dropped_tiles():
    """Colour and motion, which need few steps; two clips from prompts and two from an image."""
    pipe = Pipeline.load("nano-10s", dtype=torch.float32)
    with record_attention(pipe.dit, "visual_blocks.*.self_attention", keep=block_map) as seen:
        results = list(evaluate.evaluate(pipe, "seen, English", 2, 2, num_inference_steps=12))
        results += evaluate.evaluate(pipe, "image to video", 2, 2, num_inference_steps=12)
        clip = pipe("a red circle moves left on a white background", num_inference_steps=1, progress=False)[0]
    assert clip.shape == (33, 128, 128, 3)
    claims = ("background", "colour", "motion")  # not every caption states the background
    right = [result["answers"][name] for result in results for name in claims if name in result["answers"]]
    assert sum(right) >= len(right) - 1, results
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
    full = json.loads((JUDGED / "judge_nano-10s-full-attention.json").read_text(encoding="utf-8"))
    sparse = json.loads((JUDGED / "judge_nano-10s.json").read_text(encoding="utf-8"))
    assert full["fingerprint"] == sparse["fingerprint"] and full["settings"]["full_attention"]
    alike = ("prompts", "batch_size", "dtype", "seed", "num_inference_steps", "guidance_scale", "canvas")
    assert all(full["settings"][name] == sparse["settings"][name] for name in alike)


def test_the_bundled_weights_take_at_most_30_mb():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 30e6


def test_clips_are_wrong_for_other_prompts():
    """The tests above can fail: nano's clips, scored against the captions of other scenes."""
    pipe = Pipeline.load("nano", dtype=torch.float32)
    captions = [
        write_caption(sample_scene([5, i], num_objects=1), "english", np.random.default_rng(i)) for i in range(6)
    ]
    clips = pipe([caption.text for caption in captions], num_inference_steps=10, progress=False).numpy()
    reports = [judge.judge_clip(clip) for clip in clips]
    assert not any(judge.score(report, caption)["all"] for report, caption in zip(reports, captions[1:], strict=False))
