"""finetune under torchrun: one result, one line when a rank ends, and the same bytes after that."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from command_line import ROOT
from kandinsky5 import video_io
from kandinsky5.training.curves import read_rows
from kandinsky5.training.loop import generator
from kandinsky5.training.state import load_progress
from test_launch import end, here, torchrun  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.skipif(os.name == "nt", reason="ends groups of processes by signals, which Windows does not have"),
]


@pytest.fixture
def command(here, checkpoint):  # noqa: F811
    """Arguments of finetune on four clips, all but --to, which comes next; the cache is shared by runs."""
    Path("clips").mkdir()
    for i in range(4):
        frames = torch.randint(0, 256, (6, 32, 48, 3), generator=generator([i]), dtype=torch.uint8)
        video_io.write_video(f"clips/{i}.mp4", frames, 24)
        Path(f"clips/{i}.txt").write_text(f"fox {i}")
    how = "--steps 6 --batch-size 2 --sample-every 6 --sample-steps 1 --dtype float32 --device cpu".split()
    return [checkpoint, "--clips", "clips", "--cache", "cache", *how, "--to"]


def finetune(*arguments, fault="none"):
    return torchrun(2, ROOT / "tests" / "faulty_finetune.py", fault, *arguments)


def result(folder):
    return Path(folder, "lora.safetensors").read_bytes()


def test_a_killed_rank_ends_all_and_the_run_resumes_to_the_same_bytes(command):
    assert end(finetune(*command, "whole"))[0] == 0
    assert {path.suffix for path in Path("whole", "samples").iterdir()} == {".mp4", ".png"}
    for fault, saved in (("killed saving", 1), ("killed", 3)):
        begun = time.monotonic()
        code, _, lines, err = end(finetune(*command, "parts", fault=fault))
        assert code != 0 and len(lines) == 1 and "rank 1 has ended" in lines[0] and time.monotonic() - begun < 60, err
        assert load_progress("parts")[0] == saved
    code, _, lines, err = end(finetune(*command, "parts"))
    assert (code, lines) == (0, []), err
    assert result("parts") == result("whole")
    losses = [[row["loss"] for row in read_rows(Path(to, "loss.csv"))] for to in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_rank_that_raises_is_one_line(command):
    code, out, lines, err = end(finetune(*command, "run", fault="raises"))
    assert code != 0 and lines == ["error: rank 1: its fan has stopped"] and load_progress("run")[0] == 3, err


def test_an_interruption_is_saved_by_all(command):
    process = finetune(*command, "run", fault="slow")
    while not Path("at-step-3-1").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    code, _, lines, err = end(process)
    assert code != 0 and len(lines) == 1 and lines[0].startswith("interrupted: run the same command"), err
    assert load_progress("run")[0] >= 4
    assert end(finetune(*command, "run"))[0] == 0 and result("run")


def test_full_sharded_training_writes_a_checkpoint(command):
    code, out, lines, err = end(finetune(*command, "run", "--full", "--shard", "--sequence", "2", "--ema", "0.9"))
    assert (code, lines) == (0, []) and Path("run/checkpoint/dit.safetensors").is_file() and "sample.py" in out, err
