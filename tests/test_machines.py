"""Several machines, as far as one can stand for them: what must be the same on all, and how one that is gone is found.

Two torchruns on one host are two machines of the same name that share a file system.
"""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from kandinsky5.runtime import ending, launch
from ranks import on_ranks
from test_launch import FAST, PROMPT, ROOT, SHARED, end

# ---------------------------------------------------------------------------------------------- signs of life


@pytest.fixture
def store(monkeypatch):
    """A store that rank 0 of two has joined; it beats fifty times a second, and is patient for 0.2 s."""
    store = dist.HashStore()
    monkeypatch.setattr(launch, "joined", {"store": store})
    monkeypatch.setattr(launch, "machines", [("0", "node-a"), ("1", "node-b")])
    monkeypatch.setattr(launch, "connect", lambda: (store, 0, 2))
    monkeypatch.setattr(ending, "BEAT", 0.02)
    monkeypatch.setattr(ending, "SILENCE", 0.2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return store


def listen(seconds):
    """What rank 0 prints in that time, and whether it has heard of a failure."""
    stream, over = io.StringIO(), threading.Event()
    beats = ending.Beats(stream, over)
    beats.start()
    beats.join(seconds)
    over.set()
    beats.join()
    return stream.getvalue(), beats.failed


def test_a_rank_that_falls_silent_ends_all(store):
    store.add("beats 1", 1)
    printed, failed = listen(5)
    assert failed and printed.count("\n") == 2 and "rank 1 on node-b" in printed
    assert json.loads(store.get("failed"))[0] == 2 and store.check(["heard 0"])


def test_a_slow_start_is_no_silence(store):
    assert listen(0.4) == ("", False) and not store.check(["failed"])


def test_what_beats_is_no_silence(store):
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            store.add("beats 1", 1)

    other = threading.Thread(target=beat)
    other.start()
    assert listen(0.5) == ("", False)
    over.set()
    other.join()


def test_a_failure_elsewhere_is_heard_in_the_middle_of_work(store):
    store.set("failed", json.dumps([2, "error: rank 1 on node-b: its fan has stopped"]))
    assert listen(5) == ("\nerror: rank 1 on node-b: its fan has stopped\n", True)
    assert listen(5) == ("", True)  # the first of a torchrun's ranks prints


def test_the_first_failure_is_that_of_all(store, monkeypatch):
    here, there = io.StringIO(), io.StringIO()
    assert ending.tell(store, here, 2, "error: one") == 2
    monkeypatch.setenv("GROUP_RANK", "1")
    assert ending.tell(store, there, 130, "interrupted: two") == 2
    assert here.getvalue() == there.getvalue() == "\nerror: one\n"


# ---------------------------------------------------------------------------------------------- what must be the same


def own_folder(place):
    os.environ |= {"WORLD_SIZE": "2"}
    launch.joined["store"] = dist.distributed_c10d._get_default_store()
    try:
        for folder in (place, place / str(dist.get_rank())):
            folder.mkdir(exist_ok=True)
            launch.check_shared(folder)
    except ValueError as error:
        return folder.name, str(error)
    finally:
        launch.joined.clear()
        del os.environ["WORLD_SIZE"]


def test_folders_that_differ_are_refused(tmp_path):
    (first, said), (second, _) = on_ranks(2, own_folder, tmp_path)
    assert (first, second) == ("0", "1") and "rank 1" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def differing():
    try:
        launch.agree(steps=5, **({"seed": 3} if dist.get_rank() else {}))
    except ValueError as error:
        return str(error)


def test_an_option_of_one_rank_alone_is_named():
    for said in on_ranks(2, differing):
        assert "seed" in said and "steps" not in said and "rank 1" in said


def test_the_program_changes_with_any_source(tmp_path, monkeypatch):
    (tmp_path / "runtime").mkdir()
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "runtime" / "launch.py"))
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "dit.py").write_text(text)
        found.append(launch.program())
    assert found[0] != found[1] and found[0] == found[2]


@pytest.mark.parametrize(
    ("address", "interface", "good"),
    [
        ("127.0.1.1", None, False),
        ("10.0.0.7", None, True),
        (None, None, False),
        ("127.0.1.1", "eth1", True),
        ("10.0.0.7", "eth7", False),
    ],  # fmt: skip
)
def test_a_name_that_leads_back_to_its_machine_is_refused(monkeypatch, address, interface, good):
    def look_up(name, port):
        if address is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth1")])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    if good:
        launch.check_address()
    else:
        with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME"):
            launch.check_address()


# ---------------------------------------------------------------------------------------------- two torchruns


def machines(script, *arguments):
    """Two torchruns as of two machines, one rank each, in the current folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"PYTHONPATH": str(ROOT), "KANDINSKY5_TIME_LIMIT": "60", "OMP_NUM_THREADS": "1"}
    how = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *how, "--node-rank", str(number), script, *arguments],
            env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip


@pytest.mark.torchrun
def test_each_of_two_torchruns_prints_why_they_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    ended = [end(one) for one in machines(ROOT / "tests" / "faulty_sample.py", "raises", PROMPT, *FAST, *SHARED)]
    lines = [line for _, _, said, _ in ended for line in said]
    assert lines == [f"error: rank 1 on {socket.gethostname()}: its fan has stopped"] * 2, ended
    assert all(code != 0 and "exitcode  : 2" in err for code, _, _, err in ended)
    assert time.monotonic() - begun < 60 and {path.suffix for path in Path().iterdir()} == {""}
