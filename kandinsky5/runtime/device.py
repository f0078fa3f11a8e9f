"""Where a model runs and in which precision: what "auto" means, decided once, before anything is loaded."""

import contextlib
import importlib.util
import inspect
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch

# The CPU instructions that multiply in these precisions: x86's, and by their shorter names Arm's.
NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith"},
}
CXX = {  # what torch.compile calls for a CPU where that is not g++, and how to get it
    "darwin": ("clang++", "xcode-select --install"), "win32": ("cl", "Visual Studio's Build Tools, in their prompt"),
}  # fmt: skip
# Compute capability that Triton is made for. On older GPUs PyTorch compiles nothing in bfloat16, in which int8 has its
# scales, and flex_attention, without tensor cores, spills 1.6 KB per thread or 8.6 (benchmarks/results/without_gpu.md).
OLDEST = 8, 0
GRAPHS = 32  # most of one compiled function: for one sample or several, masks, pieces, single frames
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA where there is a GPU, else the CPU. Raises ValueError if unusable."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # PyTorch has no single way to refuse
        usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        usable += ["mps"] * torch.backends.mps.is_available()
        reason = re.split(r"\n|\. ", str(error))[0]
        raise ValueError(f"device {device}: cannot be used here ({reason}); choose {' or '.join(usable)}") from error


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of that name; "auto" is bfloat16 where the device multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16, some 25 times slower than float32. Raises ValueError for a
    precision that the models cannot have.
    """
    if dtype == "auto":
        return torch.bfloat16 if is_native(torch.bfloat16, device) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}: choose auto or one of {', '.join(DTYPES)}")
    if chosen == torch.float64 and device.type == "mps":
        raise ValueError(f"dtype {dtype!r}: an Apple GPU has no such numbers: choose float32")
    return chosen


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device at hand multiplies matrices of this precision without emulating it."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return multiplies(dtype, device.type, capability, cpu_features() if device.type == "cpu" else ())


def multiplies(dtype: torch.dtype, device: str, capability: tuple[int, int], features: Collection[str]) -> bool:
    """`is_native` as a pure function.

    device: "cpu", "cuda" or another type, which is taken to multiply all; capability: of a GPU;
    features: of a CPU, such as "avx512_bf16".
    """
    if dtype == torch.bfloat16 and device == "cuda":
        return capability >= (8, 0)
    if dtype in NATIVE and device == "cpu":
        return not NATIVE[dtype].isdisjoint(features)
    return True


def cpu_features() -> set[str]:
    """The instructions of this CPU by PyTorch's names, without those that oneDNN, whose kernels multiply, may not use.

    ONEDNN_MAX_CPU_ISA=AVX2 takes them away, which makes any machine one that emulates bfloat16.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        features = {name for name, present in torch.cpu.get_capabilities().items() if present is True}
    else:  # PyTorch 2.11
        features = {"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else set()
    onednn = torch.backends.mkldnn.is_available()  # not in PyTorch for macOS
    if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        features -= NATIVE[torch.bfloat16]
    if not (onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        features -= NATIVE[torch.float16]
    return features


def compiler_missing(device: str) -> str | None:
    """What torch.compile needs for a device of this type ("cpu", "cuda", …) and does not find, and how to get it."""
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(switch) == "1":
            return f"compiler here, as {switch} is 1: unset it"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton here: pip install triton (on Windows triton-windows)"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        return "GPU here that Triton compiles well for: it needs compute capability 8.0, that of A100"
    cxx, how = CXX.get(sys.platform, ("g++", "apt install g++"))
    variable, names = ("CC", ["gcc", "clang", "cc"]) if device == "cuda" else ("CXX", [cxx])
    how = "apt install gcc" if device == "cuda" else how
    names = [os.environ[variable]] if variable in os.environ else names
    bundled = device == "cuda" and sys.platform == "win32" and variable not in os.environ  # triton-windows has TinyCC
    if bundled or any(shutil.which(name) for name in names):
        return None
    return f"{names[0]} here: install a compiler ({how}), or name yours in the variable {variable}"


def allow_recompiling() -> dict[str, Any]:
    """The argument of torch.compile that allows so many GRAPHS; in PyTorch 2.11 a setting of the whole process."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": GRAPHS}
    settings: Any = importlib.import_module("torch._dynamo.config")
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    return {}


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, tensors made without dtype= and device= are float32 on the CPU, whatever the calling program has set."""
    dtype, device = torch.get_default_dtype(), torch.empty(0).device
    if dtype == torch.float32 and device.type == "cpu":
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
