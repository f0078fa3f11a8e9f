"""Several GPUs under torchrun make what one makes: `pytest -m cuda tests/cuda/test_cuda_ranks.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kandinsky5.video_io import read_metadata

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle moves left"


def make(name: str, count: int, *options: str) -> None:
    """Write NAME.mp4 with that many processes, in the current folder."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "sample.py"), PROMPT, "--steps", "8", "--no-compile"]
    settings = {"PYTHONPATH": str(ROOT), "KANDINSKY5_TIME_LIMIT": "120"}
    subprocess.run([*command, *options, "-o", f"{name}.mp4"], check=True, env=os.environ | settings, timeout=300)


def frames(name: str) -> torch.Tensor:
    """The frames of NAME.mp4, uint8 (F, H, W, 3)."""
    import av

    with av.open(f"{name}.mp4") as file:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in file.decode(video=0)])


@pytest.mark.parametrize("options", [(), ("--ranks", "1x2"), ("--shard",)], ids=" ".join)
@pytest.mark.parametrize("dtype, most", [("float32", 0.5), ("bfloat16", 2.0)])
def test_two_gpus_make_the_video_of_one(options, dtype, most, tmp_path, monkeypatch, note):
    """In bf16 up to its own rounding, which is 0.9 of 255 on average next to float32 (measured on a CPU)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.chdir(tmp_path)
    make("one", 1, "--dtype", dtype)
    make("two", 2, "--dtype", dtype, *options)
    difference = (frames("one").int() - frames("two").int()).abs()
    note(f"largest difference {int(difference.max())} of 255, mean {float(difference.float().mean()):.4f}")
    assert float(difference.float().mean()) < most
    assert read_metadata("two.mp4")["prompt"] == PROMPT


def test_a_scaling_table_of_all_gpus(capfd, note):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    subprocess.run([*command, str(ROOT / "benchmarks" / "scaling.py"), "--blocks", "2"], check=True, timeout=600)
    for line in capfd.readouterr().out.splitlines():
        note(line)
