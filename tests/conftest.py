import gc
import hashlib
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that a second thread only waits

import torch

from command_line import checkpoint, cli, here, refused  # noqa: F401  (fixtures)
from kandinsky5.tokenizer import Tokenizer

if os.name == "nt":
    if not sys.flags.utf8_mode:
        pytest.exit("the tests' own files are in UTF-8: set PYTHONUTF8=1", returncode=2)
    for place, name in ((Path, "symlink_to"), (os, "mkfifo"), (os, "fork"), (os, "killpg")):
        setattr(place, name, lambda *_, name=name, **__: pytest.skip(f"calls {name}, which Windows lacks or limits"))

read = Tokenizer.load
seen: dict[tuple, Tokenizer] = {}


def pytest_collection_modifyitems(config, items):
    """What takes long runs only where its marker is asked for."""
    for item in items:
        for name in ("large", "stages", "fuzz", "compiled", "torchrun"):
            if item.get_closest_marker(name) and name not in config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=f"takes long: pytest -m {name}"))


def pytest_collection_finish():
    """What is imported stays: the collector need not look at it again and again."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)  # what that does on a CPU, without a look at every kind of device


@pytest.fixture(autouse=True, scope="session")
def equal_tokenizers_are_read_once():
    """Qwen's vocabulary takes half a second, and hundreds of tests load it from a checkpoint of their own."""

    def load(folder):
        files = sorted(path for path in Path(folder).glob("*") if path.is_file())
        key = tuple((path.name, hashlib.sha1(path.read_bytes()).digest()) for path in files)
        if key not in seen:
            seen[key] = read(folder)
        return seen[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "load", load)
        yield
