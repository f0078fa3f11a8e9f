"""Memory that is free on a device, and in the container that the process runs in."""

import contextlib
import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")  # of Linux


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, without swapping; None where the system does not tell.

    Of a CPU's the share of this process, if torchrun started several on this machine.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, unused
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    least, processes = min([*free, *left_in_container()], default=None), os.environ.get("LOCAL_WORLD_SIZE", "1")
    return least // max(int(processes), 1) if least and processes.isdecimal() else least


def left_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes until a container's limit is reached, if there is one: of control groups, version 2 or 1.

    Pages of files, such as mapped weights, count as used there, but are dropped when memory is needed.
    """
    left = []
    for limit, used, stat, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            most, now = (int((cgroup / name).read_text()) for name in (limit, used))
            counts = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            left.append(most - now + sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
    return left
