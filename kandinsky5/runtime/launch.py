"""The processes that torchrun starts: they join, agree on what they do, and end together.

    torchrun --nproc-per-node 4 sample.py "a red fox runs through snow" --checkpoint weights/lite

torchrun gives each process its RANK, the WORLD_SIZE and the address of a store, a small dictionary that outlives any of
them. What ends one rank ends all: whoever fails says so in the store and in one line, and the others, whose collectives
fail or whom torchrun stops, find it there and stay silent. Without torchrun, which would stop them, they end too.
"""

from __future__ import annotations  # some builds of PyTorch have no torch.distributed, nor the types in it

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist

from kandinsky5.screen import Forgiving, listed, printable, say

GRACE = 3.0  # seconds in which a rank that fails tells the others why
SECONDS = 600.0  # that a rank waits for the others by default, in a collective
joined: dict[str, dist.Store] = {}  # "store": torchrun's, once this process has become one of the ranks
meetings = itertools.count()


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
    streams = sys.stdout, sys.stderr
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(), sys.stderr), daemon=True).start()
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
        code = report(error, joined["store"], explain, stopped)
        for stream in streams:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)  # a thread that waits in a collective would keep the process
    finally:
        sys.stdout, sys.stderr = streams


def join() -> dist.Store | None:
    """Become one of the ranks, by torchrun's variables, each on the GPU of its number if there are GPUs.

    Returns the store, or None where this process is alone. Raises ValueError where there are fewer GPUs than processes.
    """
    if not is_one_of_many():
        return None
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=SECONDS)))
    joined["store"] = store
    store.set(f"process {rank}", f"{socket.gethostname()} {os.getpid()}")
    meet(seconds=SECONDS)  # who is here hears of the others' errors
    limit = timedelta(seconds=time_limit())
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(f"process {local} of this machine finds {gpus} GPUs: start one process per GPU")
    if gpus and not dist.is_nccl_available():
        raise ValueError("several GPUs need NCCL, which PyTorch for Windows lacks: use one, or Linux (WSL 2)")
    if gpus:
        torch.cuda.set_device(local)
    meet(seconds=SECONDS)
    dist.init_process_group(  # gloo also has GPU machines' tensors on CPUs, such as what is agreed on
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=dist.PrefixStore("collectives", store), rank=rank,
        world_size=world, timeout=limit,
    )  # fmt: skip
    return store


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
            raise SystemExit(2)  # which has been said there
        if time.monotonic() > end:
            raise RuntimeError(f"Timed out waiting {seconds:g} s for the others")
        time.sleep(0.05)
    return [json.loads(store.get(name)) for name in names]


def agree(**values: object) -> None:
    """Raise ValueError, which names the ranks, where a value is not the same on all of them."""
    found: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, values)
    for name in values:
        if others := [rank for rank, one in enumerate(found) if one[name] != found[0][name]]:
            first, other = (printable(one[name], 80) for one in (found[0], found[others[0]]))
            raise ValueError(
                f"the {name} of rank {others[0]} is {other}, of rank 0 {first}: give all the same files and options"
            )


# ---------------------------------------------------------------------------------------------- how they end


def report(
    error: BaseException, store: dist.Store, explain: Callable[[BaseException], str | None], stopped: str
) -> int:
    """Say why this rank ends, unless another one has; returns its exit code, 130 for an interruption."""
    code, line = 2, None
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 2
    elif isinstance(error, KeyboardInterrupt) or of_others(error):
        line = find_culprit(error, store)
        if line is None and isinstance(error, KeyboardInterrupt) and not store.check(["failed"]):
            code, absent = 130, [f"{r}" for r in range(world()) if not store.check([f"process {r}"])]
            early = f"rank {listed(absent)} had not started, and " if absent else ""
            line = f"interrupted: {early}{str(error) or stopped}"
    else:
        reason = explain(error)
        code = 1 if reason is None else 2
        line = f"error: rank {rank()}: {printable(reason)}" if reason else "".join(traceback.format_exception(error))
        with contextlib.suppress(RuntimeError):
            store.set("failed", "")
    if line and is_first(store):
        say(f"\n{line}")  # rank 0 may have left the cursor behind a bar
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
                return f"error: rank {ended[0]} has ended{doing}, killed or out of memory: start all again"
            time.sleep(0.1)
        missing = [r for r in others if not store.check([f"waiting {r}"])]
    except RuntimeError:  # the store is gone, and with it the machine that started first
        return f"error: rank {own} lost its connection to the others{doing}: start all again"
    if isinstance(error, KeyboardInterrupt):
        return None
    named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "the others"
    return f"error: rank {own} timed out waiting for {named}{doing} ({printable(error, 100)}): start all again"


def has_ended(store: dist.Store, rank: int) -> bool:
    """Whether the process of that rank is gone, as far as this machine knows; Windows has no way to ask."""
    if os.name == "nt" or not store.check([f"process {rank}"]):
        return False
    host, _, number = store.get(f"process {rank}").decode().rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def is_first(store: dist.Store | None) -> bool:
    """Whether no other rank has spoken; without the store rank 0 speaks."""
    try:
        return rank() == 0 if store is None else store.add("spoken", 1) == 1
    except RuntimeError:
        return rank() == 0


def end_with(parent: int, stream: TextIO) -> None:
    """End this process once its parent is gone, that is torchrun, killed: nobody else would, nor end a later hang.

    Where no other parent is given to orphans (Windows), it waits for ever.
    """
    while os.getppid() == parent:
        time.sleep(1)
    if is_first(joined.get("store")):
        print("\nerror: torchrun has ended, killed or out of memory: start all again", file=stream, flush=True)
    os._exit(2)
