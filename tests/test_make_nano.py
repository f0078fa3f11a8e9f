"""`make nano` from scratch: the commands of the Makefile, in their order, each run for one step."""

import functools
import importlib
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kandinsky5 import video_io
from kandinsky5.checkpoint import SHIPPED, fingerprint
from kandinsky5.dit import DiT
from kandinsky5.nano import distill, evaluate, export, presets, samples, stages, train_dit, train_text, train_vae
from kandinsky5.nano.clips import ClipStore
from kandinsky5.training import curves
from kandinsky5.training.curves import read_rows
from kandinsky5.training.flow import FlowTimes
from kandinsky5.training.loop import train
from kandinsky5.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("runs", ["my runs", "my (runs)", "*", "Kate's runs"])
def test_a_folder_of_runs_may_have_any_name(runs):
    make = ["make", "--dry-run", "nano", "PYTHON=python", f"RUNS={runs}"]
    commands = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = [words[words.index("--folder") + 1] for words in map(shlex.split, commands) if "--folder" in words]
    assert len(folders) > 5 and all(folder.startswith(f"{runs}/") for folder in folders)


@pytest.mark.stages
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.skipif(not find_spec("matplotlib"), reason="curves need the extra `train`")
def test_the_stages_fit_together(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "train", train_one_step)
    monkeypatch.setattr(train_vae, "standardise", functools.partial(train_vae.standardise, count=8))
    monkeypatch.setattr(train_vae, "test", try_vae_on_few)
    monkeypatch.setattr(samples, "judge_samples", try_dit_in_one_step)
    monkeypatch.setattr(train_text, "TOKENIZER_CAPTIONS", 2000)
    monkeypatch.setattr(train_dit, "CLIPS_AT_FIRST", 8)
    monkeypatch.setattr(distill, "DISTILLATION_CLIPS", 8)
    monkeypatch.setattr(distill, "LONG_CLIPS_AT_FIRST", 8)
    monkeypatch.setattr(distill, "SPARSE_CLIPS", 8)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_in_one_step)
    monkeypatch.setattr(evaluate, "DEFAULT_SETS", ["seen, English", "ground truth"])

    say = f"{sys.executable} -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))'"
    make = ["make", "--silent", "nano", f"PYTHON={say}", f"RUNS={tmp_path}", "PROMPTS=1"]
    for command in subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        _, module, *arguments = shlex.split(command)  # -m kandinsky5.nano.train_vae --folder …
        run(monkeypatch, importlib.import_module(module.replace(".judge", ".evaluate")), *arguments)

    runs = [
        *(f"vae/{stage}" for stage in ("frames", "clips", "decoder")),
        "start",
        "dit",
        "nocfg",
        "distilled",
        "long",
        "sparse",
    ]
    for run_folder in (tmp_path / name for name in runs):
        assert len(read_rows(run_folder / "samples.csv")) == 1, run_folder
        assert video_io.read_image(run_folder / "sample_000001.png").float().std() > 1
        assert video_io.read_image(run_folder / "loss.png").float().std() > 1
    for name in ("qwen", "clip"):
        assert video_io.read_image(tmp_path / "text" / name / "loss.png").float().std() > 1
    for name in ("nano", "nano-nocfg", "nano-distilled16steps", "nano-10s"):
        card = (tmp_path / "checkpoints" / name / "README.md").read_text()
        assert "**Trained**: 1 steps" in card and "| seen, English | 1 |" in card
        assert ("--full-attention" in card) == (name == "nano-10s")
        assert ("NABLA with P 0.6 and a window of 3 × 1 × 1 tiles" in card) == (name == "nano-10s")
        assert ("that stage: 1 steps" in card) == (name == "nano-10s")
        before = ("VAE, decoder: 1 steps", "CLIP: 1 steps", "a first run of the DiT: 1 steps")
        assert [said in card for said in before] == [name == "nano"] * 3
        assert ("| ground truth | 1 | 100.0 |" in card) == (name != "nano-10s")
    full = json.loads((tmp_path / "judge" / "judge_nano-10s-full-attention.json").read_text())
    assert full["settings"]["full_attention"] and full["sets"]["seen, English"]["clips"] == 1


@pytest.mark.stages
def test_training_and_export_start_from_a_checkpoint(monkeypatch, tmp_path):
    """The bundled `nano` instead of runs: one step of rate 0, and the export equals nano."""
    monkeypatch.setattr(stages, "train", functools.partial(train, stop_after=1))
    monkeypatch.setattr(train_dit, "LAST_RECIPE", replace(train_dit.LAST_RECIPE, learning_rate=0.0, weight_decay=0.0))
    monkeypatch.setattr(train_dit, "TIMES", FlowTimes("of the run before"))  # raises where they are sampled
    monkeypatch.setattr(train_dit, "CLIPS_AT_FIRST", 2)
    monkeypatch.setattr(train_dit, "BATCH", 2)
    monkeypatch.setattr(ClipStore, "CHUNK", 2)
    checkpoint = ["--vae", "nano", "--text", "nano"]
    run(monkeypatch, train_dit, "--folder", tmp_path / "dit", "--start-from", "nano", *checkpoint)
    run(monkeypatch, export, "--runs", tmp_path, "--to", tmp_path, *checkpoint)
    assert fingerprint(tmp_path / "nano") == fingerprint(SHIPPED / "nano")
    card = (tmp_path / "nano" / "README.md").read_text(encoding="utf-8")
    assert "(VAE as in nano; text encoders as in nano; the DiT started from nano)" in card


def test_a_model_without_its_base_is_not_exported(monkeypatch, tmp_path):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "state.pt").touch()
    with pytest.raises(ValueError, match="has nano,"):
        run(monkeypatch, export, "--runs", tmp_path, "--to", tmp_path / "to", "--vae", "nano", "--text", "nano")
    assert not (tmp_path / "to").exists()


def test_missing_results_are_not_left_out_silently(monkeypatch, tmp_path):
    exporting = ["--runs", tmp_path, "--to", tmp_path / "to", "--vae", "nano", "--text", "nano"]
    for judged in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"--judged {judged} .*no results"):
            run(monkeypatch, export, *exporting, "--judged", judged)


def test_a_card_carries_no_results_about_other_weights(monkeypatch, tmp_path, random_dit_run):
    shutil.copytree(random_dit_run, tmp_path / "dit")
    exporting = ["--runs", tmp_path, "--to", tmp_path / "to", "--vae", "nano", "--text", "nano"]
    run(monkeypatch, export, *exporting)
    before = fingerprint(tmp_path / "to" / "nano")
    assert before != fingerprint(SHIPPED / "nano")
    with pytest.raises(ValueError, match="judge_nano.json.*another nano"):
        run(monkeypatch, export, *exporting, "--judged", ROOT / "docs" / "judge")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["nano"]
    assert fingerprint(tmp_path / "to" / "nano") == before


@pytest.mark.stages
def test_an_interrupted_export_loses_no_model(monkeypatch, tmp_path, random_dit_run):
    """Between its two renames: the old nano, which VAE and encoders come from, is next to it."""
    shutil.copytree(random_dit_run, tmp_path / "dit")
    shutil.copytree(SHIPPED / "nano", tmp_path / ".nano.old")
    nano = tmp_path / "nano"
    run(monkeypatch, export, "--runs", tmp_path, "--to", tmp_path, "--vae", nano, "--text", nano)
    assert {path.name for path in tmp_path.iterdir()} == {"dit", "nano"}
    assert nano.joinpath("vae.safetensors").read_bytes() == (SHIPPED / "nano" / "vae.safetensors").read_bytes()
    shutil.copytree(nano, tmp_path / ".nano.old")  # interrupted before the old one was removed
    run(monkeypatch, export, "--runs", tmp_path, "--to", tmp_path, "--vae", nano, "--text", nano)
    assert {path.name for path in tmp_path.iterdir()} == {"dit", "nano"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document["settings"].update(full_attention=True), "judge nano without --full-attention"),
        (lambda document: document["settings"].update(canvas=[96, 96]), "and without --canvas"),
        (lambda document: document["sets"].pop("two objects"), "ends after seen, English"),
        (lambda document: document.pop("sets"), "holds no results of the judge"),
        (lambda document: document.clear(), "holds no results of the judge"),
    ],
)
def test_a_card_carries_only_complete_results_about_its_model(tmp_path, change, words):
    document = json.loads((ROOT / "docs" / "judge" / "judge_nano.json").read_text(encoding="utf-8"))
    judged = tmp_path / "judge_nano.json"
    judged.write_text(json.dumps(document))
    table = (ROOT / "docs" / "judge" / "judge_nano.md").read_text(encoding="utf-8")
    assert export.describe_evaluation("nano", judged, SHIPPED / "nano").endswith(table)
    change(document)
    judged.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=words):
        export.describe_evaluation("nano", judged, SHIPPED / "nano")


@pytest.mark.stages
def test_an_interrupted_stage_ends_as_in_one_go(monkeypatch, tmp_path):
    monkeypatch.setattr(train_dit, "CLIPS_AT_FIRST", 8)
    monkeypatch.setattr(distill, "DISTILLATION_CLIPS", 8)
    monkeypatch.setattr(distill, "LONG_CLIPS_AT_FIRST", 8)
    monkeypatch.setattr(distill, "SPARSE_CLIPS", 8)
    monkeypatch.setattr(curves, "plot_losses", lambda *_: None)
    monkeypatch.setattr(distill, "LONG_BATCH", 2)
    for stage in (train_dit, distill):
        monkeypatch.setattr(stage, "BATCH", 4)
    checkpoint = ["--vae", "nano", "--text", "nano"]
    nano = ["--teacher", "nano", *checkpoint]
    for stage, arguments in (
        (train_dit, ["--start-from", "nano", *checkpoint]),
        (distill, ["nocfg", "--clips", tmp_path / "clips", *nano]),
        (distill, ["long", "--clips", tmp_path / "long_clips", *nano]),
        (distill, ["sparse", "--clips", tmp_path / "long_clips", *nano]),
        (distill, ["distilled", "--clips", tmp_path / "clips", "--teacher", "nano-nocfg", *checkpoint]),
    ):
        ends = []
        for stops in ((2,), (1, 2)):
            folder = tmp_path / f"{stage.__name__}_{arguments[0]}_{len(stops)}"
            for stop in stops:
                monkeypatch.setattr(stages, "train", functools.partial(train, stop_after=stop))
                run(monkeypatch, stage, "--folder", folder, *arguments)
            ends.append(torch.load(folder / "state.pt"))
        assert ends[0]["step"] == ends[1]["step"] == 2
        for kind, name in itertools.product(("model", "average"), ends[0]["model"]):
            assert ends[0][kind][name].equal(ends[1][kind][name]), (stage.__name__, arguments[0], kind, name)


@pytest.mark.stages
@pytest.mark.parametrize(
    ("stage", "runs"), [(train_vae, ("frames", "clips", "standardised", "decoder")), (train_text, ("qwen", "clip"))]
)
def test_vae_and_text_stages_interrupted_in_each_run_end_alike(monkeypatch, tmp_path, stage, runs):
    monkeypatch.setattr(train_vae, "standardise", functools.partial(train_vae.standardise, count=8))
    monkeypatch.setattr(train_vae, "test", lambda *_, **__: {})
    monkeypatch.setattr(train_vae, "FRAMES", 8)
    monkeypatch.setattr(train_vae, "CLIPS", 1)
    monkeypatch.setattr(train_text, "TOKENIZER_CAPTIONS", 2000)

    def train_two_steps(model, loss, recipe, folder, *arguments, **options):
        cut = folder.is_relative_to(tmp_path / "cut") and not (folder / "state.pt").exists()
        options |= {"stop_after": 1} if cut else {}
        average = train(model, loss, replace(recipe, steps=2), folder, *arguments, **options)
        if cut:
            raise KeyboardInterrupt
        return average

    monkeypatch.setattr(stages, "train", train_two_steps)
    run(monkeypatch, stage, "--folder", tmp_path / "whole")
    for _ in set(runs) - {"standardised"}:
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, stage, "--folder", tmp_path / "cut")
    run(monkeypatch, stage, "--folder", tmp_path / "cut")
    for name in runs:
        whole, cut = (torch.load(tmp_path / place / name / "state.pt") for place in ("whole", "cut"))
        for kind in whole.keys() & {"model", "average"}:
            assert all(whole[kind][n].equal(cut[kind][n]) for n in whole[kind]), (name, kind)


def test_steps_are_not_distilled_from_a_guided_teacher(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--teacher nano needs guidance"):
        arguments = ("--teacher", "nano", "--clips", tmp_path, "--vae", "nano", "--text", "nano")
        run(monkeypatch, distill, "distilled", "--folder", tmp_path / "run", *arguments)


def run(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def random_dit_run(tmp_path_factory) -> Path:
    model, folder = DiT(presets.DIT), tmp_path_factory.mktemp("runs") / "dit"
    train(model, lambda seed: (sum(p.sum() for p in model.parameters()), {}), Recipe(1), folder, progress=False)
    return folder


def train_one_step(*arguments, **options):
    return train(*arguments, **options | {"stop_after": 1, "sample_every": 1})


def try_vae_on_few(vae, folder, step, count=8, test=train_vae.test):
    return test(vae, folder, step, min(count, 8))


def try_dit_in_one_step(config, dit, vae, text_encoder, image, count=8, test=samples.judge_samples):
    config = replace(config, sampling=replace(config.sampling, num_inference_steps=1))
    return test(config, dit, vae, text_encoder, image, min(count, 8))


def evaluate_in_one_step(*arguments, evaluate=evaluate.evaluate, **options):
    return evaluate(*arguments, **options | {"num_inference_steps": 1})
