"""Ranks under torchrun: the same file as from one process, and one line when one of them ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle moves left"
FAST = ("--device", "cpu", "--dtype", "float32", "--steps", "8")
SHARED = ("--ranks", "1x2", "-o", "x.mp4")  # by default nano's two passes are one batch, which both ranks compute
pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.skipif(os.name == "nt", reason="ends groups of processes by signals, which Windows does not have"),
]


def torchrun(count, script, *arguments, limit="30"):
    """Starts it in the current folder, in a process group of its own; `end` waits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), script, *arguments]
    settings = {"PYTHONPATH": str(ROOT), "KANDINSKY5_TIME_LIMIT": limit, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=os.environ | settings, start_new_session=True, **pipes)


def end(process):
    """Exit code, stdout, and our own lines of stderr; torchrun has a report of its own."""
    out, err = process.communicate(timeout=100)
    lines = err.replace("\r", "\n").splitlines()
    return process.returncode, out, [line for line in lines if line.startswith(("error:", "interrupted:"))], err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_same_file_on_one_two_and_four(here):
    subprocess.run([sys.executable, ROOT / "sample.py", PROMPT, *FAST, "-o", "1.mp4"], check=True, timeout=100)
    for count in (2, 4):
        code, out, lines, _ = end(torchrun(count, ROOT / "sample.py", PROMPT, *FAST, "-o", f"{count}.mp4"))
        assert (code, lines) == (0, []) and out.count(f"{count}.mp4") == 1
        assert Path(f"{count}.mp4").read_bytes() == Path("1.mp4").read_bytes()


FAULTS = {
    "few GPUs": "start one process per GPU",
    "killed early": "rank 1 had not started",
    "killed": "rank 1 has ended while sampling",
    "raises": "rank 1: its fan has stopped",
    "hangs": "timed out waiting for rank 1 while sampling",
    "other checkpoint": "checkpoint of rank 1",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank_ends_all_with_one_line(here, fault):
    start = time.monotonic()
    process = torchrun(2, ROOT / "tests" / "faulty_sample.py", fault, PROMPT, *FAST, *SHARED, limit="5")
    code, out, lines, err = end(process)
    assert code != 0 and out == "" and len(lines) == 1 and FAULTS[fault] in lines[0], err
    assert err.count("exitcode  : 2") == 2 - fault.startswith("killed") - (fault == "killed early"), err
    assert time.monotonic() - start < 60
    assert {path.name for path in here.iterdir()} <= {"at-step-3-0", "at-step-3-1"}


def test_a_bug_keeps_its_traceback(here):
    code, out, lines, err = end(torchrun(2, ROOT / "tests" / "faulty_sample.py", "bug", PROMPT, *FAST))
    assert code != 0 and out == "" and lines == [] and err.count("AssertionError: a mistake") == 1


def test_without_guidance_no_rank_computes_a_second_pass(here):
    subprocess.run([sys.executable, ROOT / "sample.py", PROMPT, *FAST, "--guidance", "1", "-o", "1.mp4"], check=True)
    alone = [PROMPT, *FAST, "--guidance", "1", "--ranks", "2x1"]
    code, _, lines, _ = end(torchrun(2, ROOT / "sample.py", *alone))
    assert code != 0 and len(lines) == 1 and "1x2" in lines[0]  # what there is instead
    assert end(torchrun(2, ROOT / "sample.py", *alone[:-2], "-o", "2.mp4"))[0] == 0
    assert Path("2.mp4").read_bytes() == Path("1.mp4").read_bytes()


def test_an_invalid_option_is_one_line(here):
    code, out, lines, _ = end(torchrun(2, ROOT / "sample.py", PROMPT, "--height", "50", *FAST))
    assert code != 0 and out == "" and len(lines) == 1 and "50" in lines[0] and not list(here.iterdir())


def test_ctrl_c_is_one_line(here):
    process = torchrun(2, ROOT / "tests" / "faulty_sample.py", "hangs", PROMPT, *FAST, *SHARED, limit="100")
    while not Path("at-step-3-1").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    code, out, lines, err = end(process)
    assert code != 0 and out == "" and lines == ["interrupted: nothing was written"], err


def test_ranks_end_with_torchrun(here):
    """Killed, it cannot end them: one rank sleeps, the other waits for it."""
    process = torchrun(2, ROOT / "tests" / "faulty_sample.py", "hangs", PROMPT, *FAST, *SHARED, limit="100")
    while not Path("at-step-3-1").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    start = time.monotonic()
    _, out, lines, err = end(process)  # when all have closed their pipes
    assert out == "" and len(lines) == 1 and time.monotonic() - start < 10, err
    assert not list(here.glob("*.mp4"))


def test_prompts_are_shared_by_groups(here):
    Path("two.txt").write_text("a red circle moves left\na green square stays still\na blue diamond grows\n" * 2)
    subprocess.run([sys.executable, ROOT / "sample.py", "--prompts", "two.txt", *FAST, "-o", "one"], check=True)
    code, out, lines, _ = end(torchrun(2, ROOT / "sample.py", "--prompts", "two.txt", *FAST, "-o", "two"))
    assert (code, lines) == (0, [])
    names = sorted(path.name for path in Path("one").iterdir())
    assert names == sorted(path.name for path in Path("two").iterdir()) and len(names) == 4
    assert all(Path("one", n).read_bytes() == Path("two", n).read_bytes() for n in names if n.endswith(".mp4"))
    assert all(out.count(name) == 1 for name in names if name.endswith(".mp4"))
