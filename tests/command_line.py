"""A working folder with a small checkpoint, and sample.py run in it: fixtures of the tests of its commands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

import sample
from kandinsky5 import video_io
from kandinsky5.cli import run as run_cli
from kandinsky5.config import TextConfig
from random_weights import SMALL, save_small_checkpoint

ROOT = Path(__file__).resolve().parents[1]


CONFIG = replace(SMALL, text=TextConfig(template="<|im_start|>{}<|im_end|>", dropped_tokens=1))


BARS = ("encoding:", "sampling:", "decoding:", "replaying ")  # and the line that begins each replay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A native folder, with one token for each byte: the real vocabularies take a second to read, run after run."""
    folder = tmp_path_factory.mktemp("native") / "small"
    save_small_checkpoint(folder, CONFIG)
    for name, ends in (("qwen", [""]), ("clip", ["", "</w>"])):
        tokens = [character + end for end in ends for character in sorted(ByteLevel.alphabet())]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / f"{name}_tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / f"{name}_tokenizer" / "merges.txt").write_text("")
    (folder / "qwen_tokenizer" / "added_tokens.json").unlink()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoint):
    """The working folder: a checkpoint `small` of links, so that its files can be replaced, and an image."""
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    for path in checkpoint.iterdir():
        Path("small", path.name).symlink_to(path)
    pixels = torch.randint(0, 256, (1, 40, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video_io.write_video("image.png", pixels)
    return tmp_path


@pytest.fixture
def cli(here, capsys):
    """Runs a command line; returns the exit code, stdout, and the lines of stderr that are no progress bars."""

    def run(*arguments):
        try:
            code = run_cli(lambda: sample.main([str(argument) for argument in arguments]))
        except SystemExit as end:  # argparse, after --help
            code = end.code
        out, err = capsys.readouterr()
        return code, out, without_bars(err)

    return run


@pytest.fixture
def refused(cli):
    """Asserts that a command line ends with code 2 and one line with these words, and changes no file."""

    def check(arguments, *words):
        before = snapshot()
        code, out, lines = cli(*arguments)
        assert (code, out, len(lines)) == (2, "", 1), lines
        assert all(str(word) in lines[0] for word in words) and "error: " in lines[0] and len(lines[0]) < 700, lines[0]
        assert snapshot() == before

    return check


def without_bars(err: str) -> list[str]:
    bars = (*BARS, "loading ")  # which only shows where weights take more than a second to load
    return [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith(bars)]


def snapshot() -> dict:
    return {str(path): path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}


def in_process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


FOX = ("a fox", "--checkpoint", "small")
