"""Tests on a GPU: `pytest -m cuda tests/cuda`. Elsewhere each is skipped with its reason.

A run ends with a table of what was measured, in Markdown, to be pasted into a report.
"""

import gc

import pytest
import torch

MEASURED: list[tuple[str, str]] = []


def pytest_collection_modifyitems(items):
    """All of this folder bears the marker, and runs only where there is a GPU."""
    for item in items:
        if "tests/cuda" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.cuda)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none here"))


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """The first GPU, with nothing of an earlier test in its memory, and float32 convolutions that are not TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gc.collect()  # models that are compiled or stream refer to themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.device("cuda:0")


@pytest.fixture
def note(request):
    """note(value): a line of the table at the end of the run."""
    return lambda value: MEASURED.append((request.node.name, str(value)))


def pytest_terminal_summary(terminalreporter):
    """The table, and the machine that it holds for."""
    if not MEASURED:
        return
    gpu = torch.cuda.get_device_properties(0)
    terminalreporter.write_line(f"\n{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, torch {torch.__version__}\n")
    terminalreporter.write_line("| test | measured |\n|---|---|")
    for name, value in MEASURED:
        terminalreporter.write_line(f"| {name} | {value} |")


@pytest.fixture
def room(request):
    """room(gigabytes): skips the test on a GPU with less free memory."""

    def check(gigabytes: float) -> None:
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.1f} are free")

    return check
