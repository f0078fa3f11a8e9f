"""The processes that torchrun starts: they join, and agree on what they do. How they end is in `ending.py`.

    torchrun --nproc-per-node 4 sample.py "a red fox runs through snow" --checkpoint weights/lite

torchrun, one on each machine, gives each process its RANK, the WORLD_SIZE and the address of a store, a small
dictionary that outlives any of them.
"""

from __future__ import annotations  # some builds of PyTorch have no torch.distributed, nor the types in it

import contextlib
import hashlib
import ipaddress
import itertools
import json
import os
import socket
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kandinsky5 import __version__
from kandinsky5.screen import listed, printable, say

PATIENCE = 10.0  # seconds after which a rank says whom it waits for at the start
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
