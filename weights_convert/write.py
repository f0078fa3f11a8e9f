"""A folder of safetensors files, written tensor by tensor, that appears all at once when it is complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weights_convert.read import FLOATS, Stored, count

SAFETENSORS_NAME = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Part:
    """One model on its way: `stem` is its file name up to `.safetensors`, in a folder below the destination."""

    stem: str
    tensors: Mapping[str, Stored]  # by the name that it is written under
    dtypes: Mapping[str, str]  # what each is cast to, spelled as in safetensors
    metadata: Mapping[str, str]

    def nbytes(self, name: str) -> int:
        return count(self.tensors[name].shape) * FLOATS[self.dtypes[name]].itemsize


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` to write into; it takes that name when all has gone well, else it goes."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists already: choose another name, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def plan_shards(part: Part, max_shard_size: int) -> dict[str, list[str]]:
    """File name → names of the tensors in it: shards are filled in order, each up to max_shard_size bytes."""
    shards, size = [[]], 0
    for name in part.tensors:
        if shards[-1] and size + part.nbytes(name) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += part.nbytes(name)
    if len(shards) == 1:
        return {f"{part.stem}.safetensors": shards[0]}
    return {f"{part.stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_part(folder: Path, part: Part, max_shard_size: int, written: Callable[[int], None], warn: Callable[[str], None]) -> None:
    """Write one model: a single file, or shards with an index. `written` is told the bytes as they go."""
    shards = plan_shards(part, max_shard_size)
    for file, names in shards.items():
        (folder / file).parent.mkdir(exist_ok=True)
        write_shard(folder / file, part, names, written, warn)
    if len(shards) > 1:
        weight_map = {name: Path(file).name for file, names in shards.items() for name in names}
        total = sum(part.nbytes(name) for name in part.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{part.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_shard(
    path: Path, part: Part, names: list[str], written: Callable[[int], None], warn: Callable[[str], None]
) -> None:
    """One safetensors file: 8 bytes of header length, the header in JSON, the tensors one behind the other.

    Written by hand because the library wants all tensors in memory at once. The header holds a SHA-256 of every
    tensor, known only at the end: it is written once to take its place, and again when they are known.
    """
    names = sorted(names, key=lambda name: -FLOATS[part.dtypes[name]].itemsize)  # so that all are aligned
    digests = dict.fromkeys(names, "0" * 64)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(build_header(part, names, digests))
        for name in names:
            sha256, finite = hashlib.sha256(), True
            for chunk in part.tensors[name].chunks():
                finite = finite and is_finite(chunk)
                values = chunk.to(FLOATS[part.dtypes[name]])
                data = memoryview(values.view(torch.uint8).numpy())
                sha256.update(data)
                file.write(data)
                written(len(data))
            digests[name] = sha256.hexdigest()
            if not finite:
                warn(f"{name} of {part.tensors[name].path} holds NaN or infinity")
        file.seek(0)
        file.write(build_header(part, names, digests))
    os.replace(partial, path)


def build_header(part: Part, names: list[str], digests: dict[str, str]) -> bytes:
    """The length and the JSON; its size depends on the names and not on the digests."""
    header = {"__metadata__": {"format": "pt", **part.metadata, "sha256": json.dumps(digests)}}
    offset = 0
    for name in names:
        stop = offset + part.nbytes(name)
        shape = list(part.tensors[name].shape)
        header[name] = {"dtype": part.dtypes[name], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_finite(values: Tensor) -> bool:
    """False for NaN or infinity: the extremes show both, and cost a tenth of looking at each value."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())
