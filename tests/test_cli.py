"""Commands end with the right exit code and one line, whatever happens to them or to the terminal."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
from kandinsky5 import cli
from kandinsky5.runtime import memory
from kandinsky5.screen import Forgiving, bar, printable, say
from kandinsky5.training import finetune, job

ROOT = Path(__file__).resolve().parents[1]


def fail(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("no such\n run"), 2, "error: no such run\n"),
        (FileNotFoundError("gone"), 2, "error: gone\n"),
        (ValueError("a \x1b]0;title\x07 in a name"), 2, "error: a \\x1b]0;title\\x07 in a name\n"),
        (ValueError("\udcff"), 2, "error: \\udcff\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written\n"),
    ],
)
def test_errors_end_in_one_line(capsys, error, code, line):
    assert cli.run(fail(error)) == code and capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_a_remedy(capsys, error):
    assert cli.run(fail(error)) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory")


def test_the_phase_in_which_memory_runs_out_is_named(capsys):
    def main():
        with memory.during("decoding"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    assert cli.run(main) == 2
    assert re.match("error: not enough memory while decoding .*2.00 GiB.*try .*--offload", capsys.readouterr().err)


@pytest.mark.parametrize(
    "reason", ["device is lost", "unspecified launch failure", "no kernel image is available", "the launch timed out"]
)
def test_a_failing_gpu_is_one_line(capsys, reason):
    assert cli.run(fail(RuntimeError(f"CUDA error: {reason}\nCompile with"))) == 2
    assert re.fullmatch(f"error: .*{reason}.*--device cpu\n", capsys.readouterr().err)


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_CUDA_ALLOC_CONF": "b"}])
def test_the_allocators_settings_are_a_default(given, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.run(lambda: 0)
    usual = {} if "PYTORCH_CUDA_ALLOC_CONF" in given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: v for name, v in os.environ.items() if "ALLOC_CONF" in name} == usual | given
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # which monkeypatch removes at the end


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), TypeError("unexpected"), KeyError(1)])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(fail(error))


def test_long_lines_are_cut():
    assert len(printable("x" * 10**6)) < 2000


@pytest.mark.parametrize("command", [
    "weights_convert", "kandinsky5 sample", "kandinsky5.extras.magcache", "kandinsky5.training.finetune",
    "kandinsky5.nano.judge", "kandinsky5.runtime",
])  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_pytorch_is_imported_cost_one_line(tmp_path, command, number):
    text = f"import signal, time\nsignal.raise_signal({number.value})\ntime.sleep(5)\nraise ImportError"
    (tmp_path / "torch.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = [sys.executable, "-m", *command.split(), *(["a fox"] if command.endswith("sample") else [])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted: nothing was written\n")


@pytest.mark.parametrize("value", ["x", "-1", "", "2.0"])
def test_a_number_of_processes_that_is_none_costs_one_line(monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    tuning = lambda: finetune.main(["nano", "--clips", "x", "--to", "y"])  # noqa: E731
    for main in (tuning, lambda: cli.run(lambda: sample.main(["a"]))):
        assert main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "WORLD_SIZE" in line


def test_no_other_program_gets_our_handlers():
    assert cli.starts_here(["-m", "nano"], ["python", "-u", "-m", "weights_convert", "inspect", "nano"])
    for command in (["python", "-m", "theirs", "kandinsky5"], ["python", "-m", "pytest"], ["python", "kandinsky5"]):
        assert not cli.starts_here(["-m"] if "-m" in command else command[1:], command)
    assert not cli.starts_here(["theirs.py"], ["python", "-m", "kandinsky5"])  # it runs already


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_restored_after_a_signal(capsys, number):
    before = signal.getsignal(number)

    def main():
        signal.raise_signal(number)
        time.sleep(5)

    assert cli.run(main, stopped="run it again") == 130
    assert capsys.readouterr().err == "interrupted: run it again\n" and signal.getsignal(number) is before


@pytest.mark.parametrize("error", [None, ValueError("wrong"), AssertionError("a bug"), SystemExit(3)])
def test_handlers_are_restored_however_it_ends(error):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def main():
        assert signal.getsignal(signal.SIGTERM) not in before
        if error:
            raise error

    with contextlib.suppress(AssertionError, SystemExit):
        cli.run(main)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_mistakes_in_a_command_line_are_found_before_pytorch_is_loaded(tmp_path):
    """One process for all of them: what the first imports, the next would find."""
    code = """
import sys
from kandinsky5 import cli, sample_command
for line in sys.argv[1:]:
    assert cli.run(lambda: sample_command.main(line.split())) == 2, line
    assert "torch" not in sys.modules, line
"""
    lines = [
        "fox --steps many", "fox --fps x", "fox -o fox.txt", "fox -o nowhere/fox.mp4", "fox --quality 11",
        "fox --sed 3", "fox --num-frames 17 -o fox.png", "fox --image a.png -o a.png", "--prompts a.txt", "--seed 3",
        "fox --enlarge 0", "fox --lora a.safetensors:x", "fox --step-skipping ratios.txt",
    ]  # fmt: skip
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *lines], cwd=tmp_path, check=True, env=settings)


def test_an_interrupt_raised_as_another_error_is_interrupted(capsys):
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    assert cli.run(main) == 130


def test_an_interrupt_that_a_destructor_swallows_is_repeated(capsys):
    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)

    def main():
        Swallows()
        time.sleep(30)

    assert cli.run(main) == 130 and capsys.readouterr().err == "interrupted: nothing was written\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_console_command_teaches(capsys, arguments):
    assert cli.dispatch(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name}" in out for name in ("sample", "convert", "judge", "magcache"))


def test_the_console_command_offers_the_closest_name():
    with pytest.raises(ValueError, match="try sample"):
        cli.dispatch(["sampel"])


@pytest.mark.parametrize("command", ["sample", "convert", "judge", "magcache"])
def test_every_command_has_help_under_its_own_name(capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["kandinsky5"])
    with pytest.raises(SystemExit) as ended:
        cli.dispatch([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Make a video") if command == "sample" else out.startswith(f"usage: kandinsky5 {command} ")


@pytest.mark.parametrize("command", ["sample", "convert inspect", "convert", "judge", "magcache"])
def test_a_wrong_option_of_any_command_is_one_line(capsys, command):
    assert cli.run(lambda: cli.dispatch([*command.split(), "--stpes", "3"])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("error: ")


@pytest.mark.parametrize(
    "given, left",
    [
        ("", ["--tile-space", "--offload"]),
        ("--tile-space", ["--offload"]),
        ("--offload=blocks --tile-space --attention dense", ["--attention"]),
    ],
)
def test_memory_advice_names_only_what_was_not_given(given, left):
    advice = cli.what_to_try(given.split())
    assert [name for name in ("--attention", "--tile-space", "--offload") if name in advice] == left


@pytest.mark.parametrize("program", ["kandinsky5 finetune", "/kandinsky5/training/finetune.py"])
def test_memory_advice_for_training_names_its_options(program):
    options = {word.strip(",") for word in cli.what_to_try([program, "nano"]).split() if word.startswith("--")}
    assert "--sizes" in options and options <= {*job.build_parser("")._option_string_actions}


def test_as_a_module_it_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "kandinsky5", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: ")


PROGRAM = """
import sys
from kandinsky5 import cli
from kandinsky5.screen import bar, say
def main():
    with bar(3, "sampling", "step") as shown:
        shown.update(3)
    say("note")
    for _ in range(20000):
        print("frames \\u2580")
    open("done", "w").close()
sys.exit(cli.run(main))
"""


@pytest.mark.skipif(os.name == "nt", reason="redirects in bash, to what Windows does not have")
@pytest.mark.parametrize(
    "streams", ["2>&-", ">&-", "2>/dev/full", ">/dev/full", "2>&1 | head -c 10", ">/dev/null 2>&1", ">&- 2>&-"]
)
def test_what_cannot_be_shown_costs_nothing(tmp_path, streams):
    command = f"set -o pipefail; {sys.executable} -c '{PROGRAM}' {streams}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1251"}
    code = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True).returncode
    assert code == 0 and (tmp_path / "done").exists()


def test_a_library_call_without_stderr_works(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with bar(2, "sampling", "step") as shown:
        shown.update()
    say("note")
    assert not Forgiving(None).isatty()


def test_one_process_of_torchrun_says_it_was_interrupted(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.run(lambda: signal.raise_signal(signal.SIGINT)) == 130 and capsys.readouterr().err == ""
