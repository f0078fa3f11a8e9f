"""Ranks without torchrun: processes that are forked once for all tests and run a function together, joined by gloo."""

import atexit
import io
import itertools
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # that a rank waits for the others
workers: list[tuple[Any, Any]] = []  # processes and the ends of their pipes
runs = itertools.count()


def on_ranks(world: int, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, of a test module, returns on each of `world` ranks; AssertionError where one fails.

    An instance for each: what the function changes is gone with it, if it keeps to its own models.
    """
    while len(workers) < world:
        workers.append(start())
    folder = Path(tempfile.gettempdir()) / f"ranks-{multiprocessing.current_process().pid}-{next(runs)}"
    for rank, (_, pipe) in enumerate(workers[:world]):
        pipe.send_bytes(pack((str(folder), rank, world, function, arguments)))
    answers = [unpack(pipe.recv_bytes()) for _, pipe in workers[:world]]
    folder.unlink(missing_ok=True)
    for error, _ in answers:
        assert error is None, error
    return [answer for _, answer in answers]


def start():
    """A new worker. Its server has imported what all need, so a worker costs little, and it never ran a backward."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        import pytest

        pytest.skip("ranks are forked here, which Windows does not do")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "kandinsky5.pipeline", "random_weights"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    atexit.register(process.terminate)
    return process, ours


def serve(pipe) -> None:
    """Run what comes through the pipe, until it is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            path, rank, world, function, arguments = unpack(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        answer: tuple[str | None, Any] = (None, None)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
            )
            answer = None, function(*arguments)
            dist.barrier()
        except BaseException:
            answer = f"rank {rank}: {traceback.format_exc()}", None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send_bytes(pack(answer))


def pack(value: Any) -> bytes:
    """`value` as bytes; tensors too."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpack(data: bytes) -> Any:
    """The reverse."""
    return torch.load(io.BytesIO(data), weights_only=False)
