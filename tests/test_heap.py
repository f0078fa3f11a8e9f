"""Freed memory stays with the process inside `keep_freed_memory`, and only there."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kandinsky5 import Pipeline
from kandinsky5.runtime.heap import keep_freed_memory

resource = pytest.importorskip("resource", reason="counts pages, which Windows does not")
CPU = torch.device("cpu")
NUMBERS, PAGE = 12_000_000, resource.getpagesize()
BLOCK = 4 * NUMBERS  # bytes, above the 32 MB from which glibc asks the system for each block


def pages_of_five_blocks() -> int:
    """How many pages the system hands out for five large tensors, each freed before the next."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(NUMBERS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FOUR_KILOBYTES = not (HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text())
counted = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not FOUR_KILOBYTES, reason="mallopt is glibc's, and pages of 2 MB are few"
)


@counted
@pytest.mark.large
def test_freed_pages_are_reused_inside_and_returned_after():
    """In a process of its own: other tests may leave holes in this one's heap that hold five large tensors."""
    root = Path(__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = {[str(root), str(root / 'tests')]}; import test_heap; test_heap.check_pages()"
    subprocess.run([sys.executable, "-c", code], check=True)


def check_pages() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return PAGE * int(file.read().split()[1])

    assert pages_of_five_blocks() >= 5 * BLOCK // PAGE
    with keep_freed_memory(CPU):
        # not even one of the five anew, once the heap has grown to what they need
        assert min(pages_of_five_blocks() for _ in range(6)) < BLOCK // PAGE
        held = resident()
    assert resident() < held - BLOCK // 2


@counted
def test_the_pipeline_samples_inside_it(monkeypatch):
    inside = []

    def watch(self, *arguments):
        inside.append(pages_of_five_blocks() < 2 * BLOCK // PAGE)
        return predict(self, *arguments)

    predict = Pipeline.predict
    monkeypatch.setattr(Pipeline, "predict", watch)
    Pipeline.load("nano")("a red circle moves left", num_inference_steps=5, output_type="latents", progress=False)
    assert inside[-1]
