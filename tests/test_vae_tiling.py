"""What decoding in windows and tiles takes; tests/test_vae.py has what comes out."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from kandinsky5 import vae_tiling
from kandinsky5.config import Tiling, VAEConfig
from kandinsky5.runtime import memory
from kandinsky5.runtime.device import is_native
from kandinsky5.vae import VAE
from random_weights import SMALL_VAE, randomise

CASES = [
    ((5, 16, 16), "float32", False, 3),
    ((2, 24, 40), "bfloat16", True, 3),  # in two tiles
    ((7, 8, 16), "bfloat16", False, 3),  # in two windows
    ((5, 24, 32), "bfloat16", False, 3),  # mostly what a block holds, little of it copies of a few frames
    ((1, 32, 48), "float32", False, 2),
]


def config_of(dimensions: int) -> VAEConfig:
    halves_time = (False, dimensions == 3, dimensions == 3)
    return VAEConfig((16, 32, 64, 64), norm_groups=8, halves_time=halves_time, dimensions=dimensions)


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from kandinsky5 import vae_tiling, video_io
from kandinsky5.config import Tiling, VAEConfig
from kandinsky5.runtime import fast
from kandinsky5.vae2d import build_vae

def memory(key):
    return next(1024 * int(s.split()[1]) for s in Path("/proc/self/status").open() if s.startswith(key))

torch.set_num_threads(1)
for config, size, dtype, space in json.loads(sys.argv[1]):
    with torch.no_grad():
        dtype = getattr(torch, dtype)
        vae, z = build_vae(VAEConfig(**config)).to(dtype), torch.randn(1, 16, *size, dtype=dtype)
        fast.install(vae)
        vae.decode(z[:, :, :1, :2, :2])  # what PyTorch loads when it first computes
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest resident set, starts again from here
        resting = memory("VmRSS:")
        pieces = [video_io.to_uint8(piece) for piece in vae_tiling.decode_pieces(vae, z, Tiling(space=space))]
        video = torch.cat(pieces, 1)
        print(memory("VmHWM:") - resting)
        del vae, z, pieces, video
"""


@pytest.fixture(scope="module")
def peaks():
    """By case, for precisions that this processor computes in: emulated, they take minutes and other memory."""
    cases = [case for case in CASES if is_native(getattr(torch, case[1]), torch.device("cpu"))]
    sizes = [(size, dimensions, dtype, space) for size, dtype, space, dimensions in cases]
    return dict(zip(cases, measure(MEASURE, sizes), strict=True))


def measure(program: str, cases: list[tuple]) -> list[int]:
    """The peak of each case (size, dimensions, dtype, whether in tiles) in a process of their own."""
    arguments = json.dumps([(asdict(config_of(dimensions)), size, *how) for size, dimensions, *how in cases])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.large
@pytest.mark.parametrize("case", CASES)
def test_memory_is_as_estimated(peaks, case):
    """Peaks over the resting process are at most the estimate and at least six tenths of it.

    glibc is told to give back what is freed: else it may keep up to 0.3 GB, more than these small clips need.
    """
    if case not in peaks:
        pytest.skip("this processor emulates bfloat16")
    size, dtype, space, dimensions = case
    estimate = memory.vae_memory(config_of(dimensions), size, getattr(torch, dtype), Tiling(space=space))
    peak = peaks[case]
    assert 0.6 * estimate < peak < estimate, f"{peak / 1e6:.0f} MB measured, {estimate / 1e6:.0f} MB estimated"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.large
def test_memory_without_kernels_is_as_estimated():
    """As in bf16 on a processor that emulates it, for which PyTorch unfolds convolutions; here in float32."""
    cases = [((2, 8, 12), 3), ((1, 16, 24), 2)]
    program = MEASURE.replace("import torch\n", "import torch\ntorch.backends.mkldnn.enabled = False\n", 1)
    peaks = measure(program, [(*case, "float32", False) for case in cases])
    for (size, dimensions), peak in zip(cases, peaks, strict=True):
        estimate = memory.vae_memory(config_of(dimensions), size, torch.float32, Tiling(), unfolds=True)
        assert 0.6 * estimate < peak < estimate, f"{peak / 1e6:.0f} MB measured, {estimate / 1e6:.0f} MB estimated"


def test_memory_with_tiles_does_not_grow_with_the_clip():
    """But for the frames themselves: 12 more latent frames are 48 frames, twice in bytes."""
    sizes = [(16, 64, 96), (28, 64, 96)]
    few, many = (memory.vae_memory(VAEConfig(), size, torch.bfloat16, Tiling(space=True)) for size in sizes)
    assert many - few == 2 * 48 * 512 * 768 * 3
    in_one = memory.vae_memory(VAEConfig(), sizes[1], torch.bfloat16, Tiling(time=False))
    assert in_one > 15 * many


@pytest.mark.parametrize("T", [5, 6, 7, 8, 10])
def test_no_window_is_computed_for_nothing(T, monkeypatch):
    """With 3k + 1 latent frames the window at 3k holds one frame, which the one before it has already."""
    vae, z = randomise(VAE(SMALL_VAE)), torch.randn(1, 16, T, 2, 3)
    windows = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda window: windows.append(window.shape[2]) or decode(window))
    video = vae_tiling.decode(vae, z, Tiling())
    assert video.shape[2] == 4 * (T - 1) + 1
    assert min(windows) > 1 and len(windows) == -(-(T - 1) // 3)
