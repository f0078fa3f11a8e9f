"""What nano's stages refuse to start in or from."""

import os
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.nano import distill, presets, samples, stages, train_dit, train_text, train_vae
from kandinsky5.nano.stages import load_dit
from kandinsky5.pipeline import Pipeline
from kandinsky5.training.state import load_average
from kandinsky5.vae import VAE
from random_weights import relative_error
from ranks import on_ranks
from tiny_training import losses, tiny_run

CHECKPOINT = ("--vae", "nano", "--text", "nano")


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        (train_vae, ()),
        (train_text, ()),
        (train_dit, ("--start-from", "nano", *CHECKPOINT)),
        (distill, ("nocfg", "--teacher", "nano", "--clips", "clips", *CHECKPOINT)),
    ],
)
def test_a_stage_refuses_folders_that_belong_to_something_else(monkeypatch, tmp_path, stage, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "train", lambda *_, **__: pytest.fail("it trains"))
    several = stage in (train_vae, train_text)  # runs below the folder, and not one in it
    tiny_run(tmp_path / "a" if several else tmp_path / "a" / "frames", stop_after=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "origin.txt").touch()
    before = set(tmp_path.rglob("*"))
    for folder, words in (
        ("a", "is the run of another stage" if several else "holds other runs"),
        ("b", "holds clips"),
        ("nano", "would hide the checkpoint of that name"),
    ):
        monkeypatch.setattr("sys.argv", ["stage", *arguments, "--folder", folder])
        with pytest.raises(ValueError, match=f"--folder {folder} {words}.*: choose another"):
            stage.main()
    assert set(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_other_sizes_is_no_start(monkeypatch):
    monkeypatch.setattr(presets, "DIT", replace(presets.DIT, num_visual_blocks=4))
    with pytest.raises(ValueError, match="has other sizes than nano's"):
        load_dit(SHIPPED / "nano")


def test_a_teacher_with_nabla_is_loaded_without():
    teacher = load_dit(SHIPPED / "nano-10s")
    assert teacher.config == presets.DIT
    weights = Pipeline.load("nano-10s", dtype=torch.float32).dit.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in teacher.state_dict().items())


def test_a_contact_sheet_that_cannot_be_written_costs_a_line(monkeypatch, tmp_path, capsys):
    gone = tmp_path / "gone"  # as on a full disk
    monkeypatch.setattr(train_vae, "reconstruct", lambda vae, frames: frames)
    assert train_vae.test(VAE(presets.VAE), gone, 1, count=6)["judged_right"] == 1
    black = torch.zeros(8, 17, 64, 64, 3, dtype=torch.uint8)
    pipe = lambda texts, **_: black[:1] if isinstance(texts, str) else black  # noqa: E731
    monkeypatch.setattr(samples, "build_pipeline", lambda *_: pipe)
    rates = samples.judge_samples(presets.PRESETS["nano"], None, None, None, gone / "sample_000001.png", count=8)
    assert rates["one_all"] == 0
    assert len(re.findall(r"^note: .*sample_000001\.png.*$", capsys.readouterr().err, re.MULTILINE)) == 2


def train_a_little(folder, world, accumulate=2):
    """The first stage for three steps as one of `world` ranks: weights of its average, or the refusal."""
    recipe = replace(train_vae.FRAMES_RECIPE, steps=3, accumulate=accumulate, dtype="float32")
    with mock.patch.object(train_vae, "FRAMES", 4), mock.patch.dict(os.environ, {"WORLD_SIZE": str(world)}):
        try:
            return train_vae.train_frames(folder, recipe).state_dict()
        except ValueError as error:
            return str(error)


@pytest.mark.stages
def test_ranks_share_the_batches_of_a_stage(tmp_path):
    alone = train_a_little(tmp_path / "alone", 1)
    for weights in on_ranks(2, train_a_little, tmp_path / "together", 2):
        assert all(relative_error(weights[name], alone[name]) < 1e-5 for name in alone)
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert load_average(VAE(presets.VAE), tmp_path / "together").state_dict().keys() == alone.keys()


def test_ranks_that_have_no_batch_each_are_refused(tmp_path):
    for refusal in on_ranks(2, train_a_little, tmp_path, 2, 1):
        assert "--accumulate 2" in refusal and "\n" not in refusal
