"""What nano's stages refuse to start in or from."""

from dataclasses import replace

import pytest
import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.nano import distill, presets, train_dit, train_text, train_vae
from kandinsky5.nano.stages import load_dit
from kandinsky5.pipeline import Pipeline
from tiny_training import tiny_run

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
    monkeypatch.setattr(stage, "train", lambda *_, **__: pytest.fail("it trains"))
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
