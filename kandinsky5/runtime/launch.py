"""The processes that torchrun starts: they join, agree on what they do, and end together.

    torchrun --nproc-per-node 4 sample.py "a red fox runs through snow" --checkpoint weights/lite

torchrun, one on each machine, gives each process its RANK, the WORLD_SIZE and the address of a store, a small
dictionary that outlives any of them. What ends one rank ends all: whoever fails writes why into the store, in one line.
The others find it there, also in the middle of other work, and the first of each torchrun prints it. A rank that gives
no sign of life for a minute has failed as well: where a machine or its network is gone, nobody says so.
"""

from __future__ import annotations  # some builds of PyTorch have no torch.distributed, nor the types in it

import contextlib
import hashlib
import ipaddress
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from kandinsky5 import __version__
from kandinsky5.screen import Forgiving, listed, printable, say

GRACE = 3.0  # seconds in which ranks that end hear from each other why
PATIENCE = 10.0  # after which a rank says whom it waits for at the start
BEAT = 1.0  # between signs of life
SILENCE = 60.0  # after which a rank of which nothing is heard, or a store that does not answer, is given up
LINGER = 10.0  # in which a rank that has been told to end may do so in order
SECONDS = 600.0  # that a rank waits for the others by default, at the start and in a collective
joined: dict[str, dist.Store] = {}  # "store": torchrun's, once this process has become one of the ranks
machines: list[tuple[str, str]] = []  # of each rank: the number of its torchrun, and its machine's name
meetings = itertools.count()


class Ended(RuntimeError):
    """Another rank has failed, and all end."""


class Stopped(KeyboardInterrupt):
    """A signal that all ranks have agreed to end after, with what they saved."""


def is_one_of_many() -> bool:
    """Whether torchrun started this process, and others."""
    return world() > 1


def rank() -> int:
    """This process's number; 0 for one alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if is_one_of_many() else 0


def world() -> int:
    """How many processes torchrun started. Raises ValueError where the variable is not torchrun's."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise ValueError(
            f"WORLD_SIZE {text!r}: torchrun sets it to the number of processes; start with that, or unset it"
        )
    return int(text)


def time_limit() -> float:
    """Seconds that a collective may take: KANDINSKY5_TIME_LIMIT, or ten minutes. Raises ValueError for no number."""
    text = os.environ.get("KANDINSKY5_TIME_LIMIT", str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise ValueError(
            f"KANDINSKY5_TIME_LIMIT {text!r}: give the seconds that ranks wait for each other, such as 600"
        )
    return seconds


def together(
    main: Callable[[], int | None], explain: Callable[[BaseException], str | None],
    stopped: str = "nothing was written",
) -> int:  # fmt: skip
    """Run `main`, on all ranks if there are several, and return its exit code; where one fails, end all with one line.

    Only rank 0 is heard: what the others print goes nowhere, but for the line of an error.
    explain: an error in one line, or None for a bug, which keeps its traceback; stopped: what an interruption leaves.
    """
    if not is_one_of_many():
        return main() or 0
    streams, over = (sys.stdout, sys.stderr), threading.Event()
    watcher = threading.Thread(target=watch, args=(os.getppid(), sys.stderr, over), daemon=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watcher.start()
    try:
        try:
            join()
            if rank():
                sys.stdout = sys.stderr = Forgiving(None)
            code = main() or 0
        except Stopped:
            say(f"interrupted: {stopped}")
            code = 130
        meet(seconds=time_limit())  # one that fails now ends the others too
        dist.destroy_process_group()
        return code
    except BaseException as error:
        if not joined:
            raise
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        sys.stdout, sys.stderr = streams
        code = report(error, joined["store"], explain, stopped, sys.stderr)
        for stream in streams:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # a thread that waits in a collective would keep the process
    finally:
        over.set()
        if watcher.ident:
            watcher.join(GRACE)
        sys.stdout, sys.stderr = streams


def join() -> dist.Store | None:
    """Become one of the ranks, by torchrun's variables, each on the GPU of its number if there are GPUs.

    Returns the store, or None where this process is alone. Raises ValueError where ranks cannot work together: fewer
    GPUs than processes, other programs or devices, or a machine whose own name leads back to itself.
    """
    if not is_one_of_many():
        return None
    waiting = threading.Timer(PATIENCE, say_absent)
    waiting.start()
    try:
        store, rank, world = connect()
        joined["store"] = store
        store.set(f"process {rank}", f"{torchrun()} {os.getpid()}")
        machines[:] = map(tuple, meet([torchrun(), socket.gethostname()], SECONDS))  # who is here hears of errors
    finally:
        waiting.cancel()
    limit = timedelta(seconds=time_limit())
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(f"process {local} of this machine finds {gpus} GPUs: start one process per GPU")
    if gpus and not dist.is_nccl_available():
        raise ValueError("several GPUs need NCCL, which PyTorch for Windows lacks: use one, or Linux (WSL 2)")
    if len({name for _, name in machines}) > 1:
        check_address()
    if gpus:
        torch.cuda.set_device(local)
    meet(seconds=SECONDS)
    dist.init_process_group(  # gloo also has GPU machines' tensors on CPUs, such as what is agreed on
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=dist.PrefixStore("collectives", store), rank=rank,
        world_size=world, timeout=limit,
    )  # fmt: skip
    agree(program=program(), device="CUDA" if gpus else "a CPU")
    return store


def connect() -> tuple[dist.Store, int, int]:
    """A connection to the store, this process's rank, and how many there are. Raises OSError where nobody answers."""
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=SECONDS)))
    except dist.DistError as error:
        raise OSError(
            f"{store_address()} does not answer ({printable(error, 100)}): give torchrun an address that all machines "
            "reach, by --rdzv-endpoint and --local-addr, or by --master-addr"
        ) from error


def say_absent() -> None:
    """Print once whom the start waits for."""
    if "store" not in joined:
        say(f"waiting for {store_address()}, for {SECONDS:g} s at most")
        return
    with contextlib.suppress(RuntimeError):  # of a store that is gone
        absent = [r for r in range(world()) if not joined["store"].check([f"process {r}"])]
        if absent and rank() == min(set(range(world())) - set(absent)):
            say(f"waiting for rank {listed(list(map(str, absent)))} to start, for {SECONDS:g} s at most")


def check_address() -> None:
    """Raise ValueError where gloo would tell other machines an address at which each of them finds itself."""
    name, given = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    usable = [interface for _, interface in socket.if_nameindex() if interface != "lo"]
    if given:
        if unknown := set(given.split(",")) - {"lo", *usable}:
            raise ValueError(f"GLOO_SOCKET_IFNAME {unknown.pop()}: {name} has {' and '.join(usable)}: choose of these")
        return
    try:
        found = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        found = "nowhere"
    if found == "nowhere" or ipaddress.ip_address(found).is_loopback:
        raise ValueError(
            f"{name} leads to {found}, where other machines do not find it: set GLOO_SOCKET_IFNAME there to its "
            f"interface for them, {' or '.join(usable)}, or correct its /etc/hosts"
        )


def program() -> str:
    """What must be the same everywhere, as ranks exchange what it computes: versions, and the package's sources."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    return f"kandinsky5 {__version__} with sources {sources.hexdigest()[:8]} on PyTorch {torch.__version__}"


def torchrun() -> str:
    """Which of the torchruns started this process; a machine has one."""
    return os.environ.get("GROUP_RANK", "0")


def store_address() -> str:
    """Where the store is, for messages."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def named(rank: int) -> str:
    """That rank, for messages, with its machine if there are several."""
    return f"rank {rank} on {machines[rank][1]}" if len(set(machines)) > 1 else f"rank {rank}"


def check_shared(folder: Path) -> None:
    """Raise ValueError unless all ranks see the same folder, in which rank 0 must be able to write."""
    mark = folder / f".{uuid.uuid4().hex}"
    if rank() == 0:
        mark.touch()
    mark = folder / meet(mark.name)[0]
    seen = meet(mark.exists())
    mark.unlink(missing_ok=True)
    if joined and False in seen:
        raise ValueError(
            f"{folder} of {named(seen.index(False))} is not that of {named(0)}: name a folder that all machines share"
        )


def meet(value: Any = None, seconds: float = float("inf")) -> list[Any]:
    """Wait until all ranks are here; returns the value of each, of JSON's types, by rank. One alone gets its own.

    However long that takes, unless there is a limit: collectives have one, which an hour of other work would pass.
    """
    if not joined:
        return [value]
    store, number, end = joined["store"], next(meetings), time.monotonic() + seconds
    names = [f"meeting {number} {each}" for each in range(world())]
    store.set(names[rank()], json.dumps(value))
    while not store.check(names):
        if store.check(["failed"]):
            raise Ended
        if time.monotonic() > end:
            raise RuntimeError(f"Timed out waiting {seconds:g} s for the others")
        time.sleep(0.05)
    return [json.loads(store.get(name)) for name in names]


def agree(**values: object) -> None:
    """Raise ValueError, which names the ranks, where a value is not the same on all of them."""
    found: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, values)
    for name in dict.fromkeys(name for one in found for name in one):
        if others := [rank for rank, one in enumerate(found) if one.get(name) != found[0].get(name)]:
            first, other = (printable(one.get(name), 80) for one in (found[0], found[others[0]]))
            raise ValueError(
                f"the {name} of {named(others[0])} is {other}, of {named(0)} {first}: all need the same program, files "
                "and options"
            )


# ---------------------------------------------------------------------------------------------- how they end


def report(
    error: BaseException, store: dist.Store, explain: Callable[[BaseException], str | None], stopped: str,
    stream: TextIO,
) -> int:  # fmt: skip
    """Let all know why this rank ends, unless another one has; returns the exit code, 130 for an interruption."""
    code, line = 2, None
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 2
    if isinstance(error, KeyboardInterrupt | Ended) or of_others(error):
        line = find_culprit(error, store)
        if line is None and isinstance(error, KeyboardInterrupt):
            with contextlib.suppress(RuntimeError):
                absent = [f"{r}" for r in range(world()) if not store.check([f"process {r}"])]
                early = f"rank {listed(absent)} had not started, and " if absent else ""
                code, line = 130, f"interrupted: {early}{str(error) or stopped}"
    else:
        reason = explain(error)
        code = 1 if reason is None else 2
        line = f"error: {named(rank())}: {printable(reason)}" if reason else "".join(traceback.format_exception(error))
    code, end = tell(store, stream, code, line), time.monotonic() + GRACE
    heard = [f"heard {r}" for r in range(world())]
    with contextlib.suppress(RuntimeError):
        while len(set(machines)) > 1 and time.monotonic() < end and not store.check(heard):
            time.sleep(0.05)  # the store may end with this process, and another machine's torchrun does not hear of it
    return code


def tell(store: dist.Store, stream: TextIO, code: int = 2, line: str | None = None) -> int:
    """Let all ranks end with this code and line, unless there are such; print those there are. Returns that code.

    Of the ranks of each torchrun the first one prints; without the store, its rank 0.
    """
    try:
        code, line = json.loads(store.compare_set("failed", "", json.dumps([code, line])))
        first = store.add(f"spoken {torchrun()}", 1) == 1
    except RuntimeError:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
    if line and first:
        print(f"\n{line}", file=stream, flush=True)  # rank 0 may have left the cursor behind a bar
    with contextlib.suppress(RuntimeError):
        store.set(f"heard {rank()}", "")
    return code


def of_others(error: BaseException) -> bool:
    """Whether it comes from a collective, where another rank is missing."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe")
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def find_culprit(error: BaseException, store: dist.Store) -> str | None:
    """Why a collective failed, in a line; None where a rank has failed and says so itself, or nobody is missing."""
    own, phase = rank(), "".join(getattr(error, "__notes__", ())[:1])
    others = [r for r in range(world()) if r != own]
    doing = f" while {phase}" if phase else ""
    try:
        store.set(f"waiting {own}", "")
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if store.check(["failed"]):
                return None
            if ended := [r for r in others if has_ended(store, r)]:
                return f"error: {named(ended[0])} has ended{doing}, killed or out of memory: start all again"
            time.sleep(0.1)
        missing = [r for r in others if not store.check([f"waiting {r}"])]
    except RuntimeError:  # the store is gone, and with it the machine that started first
        return lost_store(doing)
    if isinstance(error, KeyboardInterrupt):
        return None
    missed = listed([named(r) for r in missing]) or "the others"
    if "timed out" not in str(error).lower():
        return f"error: {named(own)} lost {missed}{doing}, killed or out of memory: look there, start all again"
    return f"error: {named(own)} timed out waiting for {missed}{doing} ({printable(error, 100)}): start all again"


def lost_store(doing: str = "") -> str:
    """The line of a rank that no longer reaches the store."""
    return f"error: {named(rank())} lost its connection to {store_address()}{doing}: look there, start all again"


def has_ended(store: dist.Store, rank: int) -> bool:
    """Whether the process of that rank, of the same torchrun, is gone; Windows has no way to ask."""
    if os.name == "nt" or not store.check([f"process {rank}"]):
        return False
    place, _, number = store.get(f"process {rank}").decode().rpartition(" ")
    if place != torchrun():
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
            there = f" on {socket.gethostname()}" if len(set(machines)) > 1 else ""
            line = f"error: torchrun{there} has ended, killed or out of memory: start all again"
            if joined:
                tell(joined["store"], stream, 2, line)
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
        while not joined:
            if self.over.wait(0.1):
                return
        try:
            store, own, world = connect()
            following = (own + 1) % world
            heard, count = time.monotonic(), 0
            while not store.check(["failed"]):
                if self.over.is_set():
                    return
                store.add(f"beats {own}", 1)
                now, before, count = time.monotonic(), count, store.add(f"beats {following}", 0)
                heard = now if count == 0 or count > before else heard
                if now - heard > SILENCE:
                    silent = f"error: nothing was heard of {named(following)} for {SILENCE:g} s"
                    tell(store, self.stream, 2, f"{silent}, its machine or the network has failed: start all again")
                self.answered = now
                self.over.wait(BEAT)
            tell(store, self.stream)
            self.failed = True
        except (OSError, RuntimeError):
            self.answered = -math.inf
