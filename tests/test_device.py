"""What "auto" means: the device that is there, and the precision that it multiplies natively."""

import re

import pytest
import torch

from kandinsky5.extras import notes
from kandinsky5.runtime.device import choose_device, choose_dtype, multiplies

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "dtype, device, capability, features, native",
    [
        (BF16, "cpu", (0, 0), {"avx2", "avx512_f"}, False),
        (BF16, "cpu", (0, 0), {"avx2", "avx512_bf16"}, True),
        (BF16, "cpu", (0, 0), {"amx_bf16"}, True),
        (BF16, "cpu", (0, 0), {"neon", "bf16"}, True),
        (BF16, "cuda", (7, 5), (), False),
        (BF16, "cuda", (8, 0), (), True),
        (BF16, "cuda", (12, 0), (), True),
        (BF16, "meta", (0, 0), (), True),
        (FP16, "cpu", (0, 0), {"avx512_bf16"}, False),
        (FP16, "cpu", (0, 0), {"avx512_fp16"}, True),
        (FP16, "cuda", (7, 0), (), True),
        (torch.float32, "cpu", (0, 0), (), True),
    ],
)
def test_native_precisions(dtype, device, capability, features, native):
    assert multiplies(dtype, device, capability, features) == native


@pytest.mark.parametrize("native, chosen", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bf16_only_where_native(native, chosen, monkeypatch):
    monkeypatch.setattr("kandinsky5.runtime.device.is_native", lambda dtype, device: native)
    assert choose_dtype("auto", torch.device("cpu")) == chosen
    assert choose_dtype("float16", torch.device("cpu")) == choose_dtype(torch.float16, torch.device("cpu")) == FP16


@pytest.mark.parametrize("available, chosen", [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_that_is_there(available, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "empty", lambda size, device: type("Tensor", (), {"device": torch.device(device)}))
    assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "bf16", None])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        choose_dtype(dtype, torch.device("cpu"))


def test_missing_devices_are_refused():
    with pytest.raises(ValueError, match="cuda:99"):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    "device, native, dtype, compiled, nabla, missing, words",
    [
        ("cpu", False, torch.float32, False, True, "g++", []),
        ("cuda", True, BF16, True, True, None, ["--no-compile"]),
        ("cuda", True, BF16, False, False, None, []),
        ("cuda", True, BF16, False, True, "Triton here", ["NABLA.*Triton"]),
        ("cuda", True, BF16, False, False, "gcc here", ["gcc"]),
        ("cuda", False, torch.float32, True, False, None, ["--dtype float16", "--no-compile"]),
        ("cuda", False, FP16, False, False, None, []),
        ("mps", True, BF16, False, False, None, ["--device cpu"]),
    ],
)
def test_notes_on_speed(device, native, dtype, compiled, nabla, missing, words):
    lines = list(notes.advise(device, native, dtype, compiled, nabla, missing))
    assert len(lines) == len(words)
    for line, pattern in zip(lines, words, strict=True):
        assert re.search(pattern, line) and "\n" not in line
