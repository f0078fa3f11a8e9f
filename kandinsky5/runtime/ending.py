"""How the processes that torchrun started end: together, and with one line.

What ends one rank ends all: whoever fails writes why into the store, in one line. The others find it there, also in the
middle of other work, and the first of each torchrun prints it. A rank that gives no sign of life for a minute has
failed as well: where a machine or its network is gone, nobody says so.
"""

from __future__ import annotations  # some builds of PyTorch have no torch.distributed, nor the types in it

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TextIO

import torch.distributed as dist

from kandinsky5.runtime import launch
from kandinsky5.screen import Forgiving, listed, printable, say

GRACE = 3.0  # seconds in which ranks that end hear from each other why
BEAT = 1.0  # between signs of life
SILENCE = 60.0  # after which a rank of which nothing is heard, or a store that does not answer, is given up
LINGER = 10.0  # in which a rank that has been told to end may do so in order


def together(
    main: Callable[[], int | None], explain: Callable[[BaseException], str | None],
    stopped: str = "nothing was written",
) -> int:  # fmt: skip
    """Run `main`, on all ranks if there are several, and return its exit code; where one fails, end all with one line.

    Only rank 0 is heard: what the others print goes nowhere, but for the line of an error.
    explain: an error in one line, or None for a bug, which keeps its traceback; stopped: what an interruption leaves.
    """
    if not launch.is_one_of_many():
        return main() or 0
    streams, over = (sys.stdout, sys.stderr), threading.Event()
    watcher = threading.Thread(target=watch, args=(os.getppid(), sys.stderr, over), daemon=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watcher.start()
    try:
        try:
            launch.join()
            if launch.rank():
                sys.stdout = sys.stderr = Forgiving(None)
            code = main() or 0
        except launch.Stopped:
            say(f"interrupted: {stopped}")
            code = 130
        launch.meet(seconds=launch.time_limit())  # one that fails now ends the others too
        dist.destroy_process_group()
        return code
    except BaseException as error:
        if not launch.joined:
            raise
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        sys.stdout, sys.stderr = streams
        code = report(error, launch.joined["store"], explain, stopped, sys.stderr)
        for stream in streams:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # a thread that waits in a collective would keep the process
    finally:
        over.set()
        if watcher.ident:
            watcher.join(GRACE)
        sys.stdout, sys.stderr = streams


def report(
    error: BaseException, store: dist.Store, explain: Callable[[BaseException], str | None], stopped: str,
    stream: TextIO,
) -> int:  # fmt: skip
    """Let all know why this rank ends, unless another one has; returns the exit code, 130 for an interruption."""
    code, line = 2, None
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 2
    if isinstance(error, KeyboardInterrupt | launch.Ended) or of_others(error):
        line = find_culprit(error, store)
        if line is None and isinstance(error, KeyboardInterrupt):
            with contextlib.suppress(RuntimeError):
                absent = [f"{r}" for r in range(launch.world()) if not store.check([f"process {r}"])]
                early = f"rank {listed(absent)} had not started, and " if absent else ""
                code, line = 130, f"interrupted: {early}{str(error) or stopped}"
    else:
        reason = explain(error)
        code = 1 if reason is None else 2
        bug = "".join(traceback.format_exception(error))
        line = f"error: {launch.named(launch.rank())}: {printable(reason)}" if reason else bug
    code, end = tell(store, stream, code, line), time.monotonic() + GRACE
    heard = [f"heard {r}" for r in range(launch.world())]
    with contextlib.suppress(RuntimeError):
        while len(set(launch.machines)) > 1 and time.monotonic() < end and not store.check(heard):
            time.sleep(0.05)  # the store may end with this process, and another machine's torchrun does not hear of it
    return code


def tell(store: dist.Store, stream: TextIO, code: int = 2, line: str | None = None) -> int:
    """Let all ranks end with this code and line, unless there are such; print those there are. Returns that code.

    Of the ranks of each torchrun the first one prints; without the store, its rank 0.
    """
    try:
        code, line = json.loads(store.compare_set("failed", "", json.dumps([code, line])))
        first = store.add(f"spoken {launch.torchrun()}", 1) == 1
    except RuntimeError:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
    if line and first:
        print(f"\n{line}", file=stream, flush=True)  # rank 0 may have left the cursor behind a bar
    with contextlib.suppress(RuntimeError):
        store.set(f"heard {launch.rank()}", "")
    return code


def of_others(error: BaseException) -> bool:
    """Whether it comes from a collective, where another rank is missing."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def find_culprit(error: BaseException, store: dist.Store) -> str | None:
    """Why a collective failed, in a line; None where a rank has failed and says so itself, or nobody is missing."""
    own, phase = launch.rank(), "".join(getattr(error, "__notes__", ())[:1])
    others = [r for r in range(launch.world()) if r != own]
    doing = f" while {phase}" if phase else ""
    try:
        store.set(f"waiting {own}", "")
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if store.check(["failed"]):
                return None
            if ended := [r for r in others if has_ended(store, r)]:
                return f"error: {launch.named(ended[0])} has ended{doing}, killed or out of memory: start all again"
            time.sleep(0.1)
        missing = [r for r in others if not store.check([f"waiting {r}"])]
    except RuntimeError:  # the store is gone, and with it the machine that started first
        return lost_store(doing)
    if isinstance(error, KeyboardInterrupt):
        return None
    missed = listed([launch.named(r) for r in missing]) or "the others"
    if "timed out" not in str(error).lower():
        return f"error: {launch.named(own)} lost {missed}{doing}, killed or out of memory: look there, start all again"
    return (
        f"error: {launch.named(own)} timed out waiting for {missed}{doing} ({printable(error, 100)}): start all again"
    )


def lost_store(doing: str = "") -> str:
    """The line of a rank that no longer reaches the store."""
    lost = f"{launch.named(launch.rank())} lost its connection to {launch.store_address()}"
    return f"error: {lost}{doing}: look there, start all again"


def has_ended(store: dist.Store, rank: int) -> bool:
    """Whether the process of that rank, of the same torchrun, is gone; Windows has no way to ask."""
    if os.name == "nt" or not store.check([f"process {rank}"]):
        return False
    place, _, number = store.get(f"process {rank}").decode().rpartition(" ")
    if place != launch.torchrun():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def watch(parent: int, stream: TextIO, over: threading.Event) -> None:
    """End this process, until its work is over, where it would not hear that torchrun, the store or a rank is gone.

    An error in the main thread, and a signal, let it end in order; a collective may hold it. Where no other parent is
    given to orphans (Windows), it does not hear of torchrun.
    """
    beats = Beats(stream, over)
    beats.start()
    while not over.wait(0.5):
        if os.getppid() != parent:
            threading.Timer(GRACE, os._exit, (2,)).start()
            there = f" on {socket.gethostname()}" if len(set(launch.machines)) > 1 else ""
            line = f"error: torchrun{there} has ended, killed or out of memory: start all again"
            if launch.joined:
                tell(launch.joined["store"], stream, 2, line)
            os._exit(2)
        if beats.failed or time.monotonic() - beats.answered > SILENCE:
            signal.raise_signal(signal.SIGTERM) if os.name == "nt" else os.kill(os.getpid(), signal.SIGTERM)
            if over.wait(LINGER):
                return
            if not beats.failed and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"\n{lost_store()}", file=stream, flush=True)
            os._exit(2)
    beats.join(GRACE)  # in a call of PyTorch it would abort Python's end


class Beats(threading.Thread):
    """Signs of life of this rank, which the one before it waits for, over a connection of its own to the store."""

    def __init__(self, stream: TextIO, over: threading.Event):
        super().__init__(daemon=True)
        self.stream, self.over = stream, over
        self.answered = math.inf  # when the store did, last
        self.failed = False  # whether a rank has, which all have been told

    def run(self) -> None:
        """Beat until the work is over, or a rank fails or falls silent, or the store is gone."""
        while not launch.joined:
            if self.over.wait(0.1):
                return
        try:
            store, own, world = launch.connect()
            following = (own + 1) % world
            heard, count = time.monotonic(), 0
            while not store.check(["failed"]):
                if self.over.is_set():
                    return
                store.add(f"beats {own}", 1)
                now, before, count = time.monotonic(), count, store.add(f"beats {following}", 0)
                heard = now if count == 0 or count > before else heard
                if now - heard > SILENCE:
                    silent = f"error: nothing was heard of {launch.named(following)} for {SILENCE:g} s"
                    tell(store, self.stream, 2, f"{silent}, its machine or the network has failed: start all again")
                self.answered = now
                self.over.wait(BEAT)
            tell(store, self.stream)
            self.failed = True
        except (OSError, RuntimeError):
            self.answered = -math.inf
