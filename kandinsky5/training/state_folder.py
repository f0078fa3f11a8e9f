"""The state of a run of several ranks: a folder that all of them write and that any number of them reads, also one.

    state-000120/          named by its step; next to a state.pt, the later step counts
        values.pt          all that is no tensor, and the digests of the other files
        __0_0.distcp, …    tensors in parts, of `torch.distributed.checkpoint`; .metadata says which is where

It is written under another name and renamed when it is whole; then what came before is removed.
"""

import contextlib
import io
import pickle
import re
import shutil
import warnings
import zipfile
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kandinsky5.files import sha256, sync
from kandinsky5.runtime import ending

NAME = "state-{:06d}"
METADATA = "torch.distributed.checkpoint.metadata"


def find(folder: Path) -> Path | None:
    """The newest state in the folder of a run: state.pt, or a folder of ranks."""
    steps = {int(path.name[6:]): path for path in folder.glob("state-*") if re.fullmatch(r"state-\d{6,}", path.name)}
    newest = steps[max(steps)] if steps else None
    alone = folder / "state.pt"
    if not alone.is_file() or newest is None:
        return alone if alone.is_file() else newest
    try:  # both are there only if a run was killed between writing one and removing the other
        step = torch.load(alone, map_location="meta", weights_only=True, mmap=True)["step"]
    except Exception:
        step = -1
    return alone if step > max(steps) else newest


def remove_others(folder: Path, newest: Path) -> None:
    """Remove states that came before."""
    for path in (*folder.glob("state-*"), *folder.glob(".state-*"), folder / "state.pt"):
        if path != newest:
            with contextlib.suppress(PermissionError):  # Windows keeps what is mapped; `find` knows the newer one
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write(folder: Path, step: int, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a state, completely or not at all; called alike by all ranks. Raises OSError where the disk is full."""
    import torch.distributed.checkpoint as dcp

    place = folder / NAME.format(step)
    partial, rank = place.with_name(f".{place.name}"), dist.get_rank()
    if rank == 0:
        for path in (partial, place):
            shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial))
        digests: list[dict[str, str]] = [{}] * dist.get_world_size()
        own = [*partial.glob(f"__{rank}_*"), *([partial / ".metadata"] if rank == 0 else [])]
        dist.all_gather_object(digests, {path.name: sha256(path) for path in own})
        if rank == 0:
            torch.save(values | {"digests": dict(ChainMap(*digests))}, partial / "values.pt")
            sync(partial / "values.pt", partial)
            partial.rename(place)
            remove_others(folder, place)
    except (dcp.api.CheckpointException, RuntimeError) as error:
        if ending.of_others(error):
            raise
        reason = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        raise OSError(f"cannot write {place} ({reason}): free some disk space") from error
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # is there no more if all went well


def read(place: Path, like: Mapping[str, Tensor], parts: tuple[str, ...], device: torch.device | str) -> dict[str, Any]:
    """The values of a state, and the tensors whose names begin with one of `parts`, by name.

    like: tensors that are sharded here: of those of the same name only this rank's share is read. The rest comes whole.
    Where there are several ranks, all of them read, and each verifies some of the files. Raises ValueError for a folder
    that is damaged.
    """
    import torch.distributed.checkpoint as dcp

    damaged = f"{place} is damaged: remove it to start again, or choose another folder"
    try:
        with zipfile.ZipFile(place / "values.pt") as archive:
            if archive.testzip():
                raise ValueError(damaged)
        values = torch.load(place / "values.pt", weights_only=True)
        digests: dict[str, str] = values.pop("digests")
        if sha256(place / ".metadata") != digests.pop(".metadata"):
            raise ValueError(damaged)
        metadata = Unpickler(io.BytesIO((place / ".metadata").read_bytes())).load()
        if not {stored.relative_path for stored in metadata.storage_data.values()} <= digests.keys():
            raise ValueError(damaged)
        tensors: dict[str, Any] = {}
        for name, stored in metadata.state_dict_metadata.items():
            if name.startswith(parts) and name in like:
                tensors[name] = torch.empty_like(like[name])
            elif name.startswith(parts):
                tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
        if tensors:
            own = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
            if any(sha256(place / name) != digests[name] for name in sorted(digests)[own]):
                raise ValueError(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = dcp.FileSystemReader(place)
                reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
                dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, OSError) as error:
        raise ValueError(damaged) from error
    return values | {"tensors": tensors}


class Unpickler(pickle._Unpickler):
    """Reads .metadata, in which `torch.distributed.checkpoint` itself would run any code: only what describes tensors.

    It is the unpickler in Python, as the one in C reserves gigabytes for a memo of five bytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for all that is not needed."""
        paths = ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath")
        tensors = ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        if (module, name) in (*paths, *tensors, ("torch", "Size")):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module in ("torch", METADATA) else None
        if isinstance(found, torch.dtype) or isinstance(found, type) and found.__module__ == METADATA:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} describes no tensor")
