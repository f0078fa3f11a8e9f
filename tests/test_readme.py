"""README.md and docs/*.md: what they print exists. Commands, options, files, links, tables; not their sentences.

Commands are not run here (`.ci/run` runs the README's first two): each program prints its own `--help`, and the options
of a command must be in it. Python blocks are short and run.
"""

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest

from kandinsky5 import PRESETS, sampler
from kandinsky5.sampler import flow_schedule

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SUBCOMMANDS = {"weights_convert", "kandinsky5", "kandinsky5.nano.distill"}  # their first argument chooses a parser
OTHERS = {"--depth", "--extra-index-url", "--shm-size"}  # git's, pip's, docker's
OTHERS |= {"--nnodes", "--node-rank", "--master-addr", "--master-port", "--rdzv-backend", "--rdzv-conf"}  # torchrun's


def blocks(language: str) -> list:
    """Code blocks of one language, each with its page as its id."""
    found = [(page, block[2]) for page in PAGES for block in FENCED.finditer(page.read_text()) if block[1] == language]
    return [pytest.param(text, id=f"{page.stem}-{i}") for i, (page, text) in enumerate(found)]


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in re.split(r"\n| && ", block.values[0].strip())]
    return list(dict.fromkeys(lines))


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


@functools.cache
def help_of(*program: str) -> str:
    """What `--help` of a program prints: ("sample.py",), ("-m", "weights_convert", "inspect"), …

    Skips the test where the program needs an extra that is not installed.
    """
    try:
        return run_help(*program)
    except ModuleNotFoundError as error:
        if error.name in ("jupytext", "nbclient", "nbformat", "matplotlib", "diffusers", "transformers"):
            pytest.skip(f"{' '.join(program)} needs {error.name}")
        raise


def run_help(*program: str) -> str:
    """`help_of`, for programs that can run here."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        arguments = program[2:] if program[0] == "-m" else program[1:]
        patch.setattr(sys, "argv", [program[0], *arguments, "--help"])
        with pytest.raises(SystemExit) as end:
            if program[0] == "-m":
                package = hasattr(sys.modules.get(program[1]), "__path__")
                name = f"{program[1]}.__main__" if package else program[1]
                patch.delitem(sys.modules, name, raising=False)  # imported already, it would run with a warning
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    assert end.value.code in (0, None)
    return out.getvalue()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def options_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize("command", commands())
def test_command_exists_and_takes_its_options(command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[start:]]
    match words:
        case ["python", "-m", module, *rest]:
            program = ("-m", module, rest[0]) if module in SUBCOMMANDS else ("-m", module)
            assert options_in(rest) <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(*program)))
        case ["python", script, *rest] if script.endswith(".py"):
            assert (ROOT / script).is_file()
            if options_in(rest) - {"--help"}:
                assert options_in(rest) <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(script)))
        case ["kandinsky5", *rest]:
            assert options_in(rest) <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of("-m", *words[:2])))
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= {*rules}
        case ["pytest", *rest]:
            known = (ROOT / "tests/parity/conftest.py").read_text() + (ROOT / "pytest.ini").read_text()
            for option in options_in(rest) - {"-m"}:
                assert f'"{option}"' in known
            assert all(f"{marker}:" in known for before, marker in zip(rest, rest[1:], strict=False) if before == "-m")
        case ["pip", "install", *rest]:
            extras = re.findall(r"\.\[(\w+)\]", " ".join(rest))
            assert all(f'"{extra}": ' in (ROOT / "setup.py").read_text() for extra in extras)
        case ["hf", "download", name, "--local-dir", _]:
            assert name == "kandinskylab/DOWNLOAD" or name.removeprefix("kandinskylab/") in downloads()
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass
        case _:
            pytest.fail(f"nothing here knows {command!r}")


@pytest.mark.parametrize("command", commands())
def test_files_of_the_repository_in_a_command_exist(command):
    made = ("downloads/", "weights/", ".venv", "tries/", "runs")
    for word in shlex.split(command):
        if re.fullmatch(r"[\w.-]+/[\w./-]+|[\w-]+\.txt", word) and not word.startswith((*made, "kandinskylab/")):
            assert (ROOT / word).exists() or word == "prompts.txt"


def test_options_in_the_text_exist():
    programs = [("sample.py",), ("-m", "kandinsky5.extras.magcache"), ("-m", "kandinsky5.nano.judge")]
    programs += [("-m", "kandinsky5.nano.train_dit"), ("-m", "kandinsky5.nano.export"), ("docs/tables.py",)]
    programs += [("-m", "kandinsky5.nano.distill", "nocfg"), ("-m", "kandinsky5.training.finetune")]
    programs += [("-m", "weights_convert", name) for name in ("lora", "merge-lora")]
    programs += [("-m", "weights_convert", name) for name in ("from-diffusers", "from-official", "to-diffusers")]
    known = " ".join(help_of(*program) for program in programs)
    known += (ROOT / "tests/parity/conftest.py").read_text() + (ROOT / "notebooks/build.py").read_text()
    known += (ROOT / "benchmarks/compare.py").read_text() + (ROOT / "benchmarks/scaling.py").read_text()
    options = {option for page in PAGES for option in re.findall(r"`(--[a-z][\w-]*)", prose(page))}
    assert len(options) > 15
    assert [option for option in options - OTHERS if not re.search(rf"{option}\b", known)] == []


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block, tmp_path, monkeypatch):
    """In two of nano's fifty steps: it is not the video that is looked at."""

    def few(steps, *arguments):
        return flow_schedule(min(steps, 2), *arguments)

    monkeypatch.setattr(sampler, "flow_schedule", few)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert {page.name for page in PAGES[1:]} == linked


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_presets_page_has_the_presets():
    page = (ROOT / "docs/converting.md").read_text()
    rows = re.findall(r"^\| `([ti]2[vi]-[\w-]+)` \| `([\w.-]+)` \| (\d+) \|", page, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(PRESETS)
    assert [int(steps) for _, _, steps in rows] == [p.sampling.num_inference_steps for p in PRESETS.values()]
    assert {download for _, download, _ in rows} == downloads()


def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        return importlib.import_module("tables")


def downloads() -> set[str]:
    return {tables().download(name) for name in PRESETS}
