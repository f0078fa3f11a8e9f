"""A folder of safetensors files, written tensor by tensor, that appears all at once when it is complete."""

import filecmp
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky5.files import check_free_space, check_inside, make_folder, new_folder, parse_json, replacing, write_json
from kandinsky5.screen import Forgiving, listed, printable, say
from kandinsky5.tensor_files import DTYPES, Stored, Weights, read_safetensors


@dataclass(frozen=True)
class Options:
    """The options of every conversion."""

    dtype: str | None = None  # "bf16", "fp16" or "fp32": cast to it; None: leave every tensor as it is stored; "int8":
    # so too, but quantise the Linears of the DiT's and Qwen's blocks (runtime/quantize.py)
    cast_all: bool = False  # cast the DiT's Float32Linears (dit.py) too; else they become or stay float32
    max_shard_size: int = 5 * 10**9  # bytes of a file, unless one tensor alone is larger
    resume: bool = False  # keep the files of an interrupted run that hold what would be written
    verify: bool = False  # read everything back and compare
    progress: bool = True  # a bar on stderr; warnings and what is left out are printed anyway


@dataclass(frozen=True)
class Part:
    """One model to write: `stem` is its file name up to `.safetensors`, in a folder below the destination."""

    stem: str
    tensors: Mapping[str, Stored]  # by the name that it is written under
    dtypes: Mapping[str, str]  # what each is cast to, spelled as in safetensors
    metadata: Mapping[str, str]

    def nbytes(self, name: str) -> int:
        """Size of this tensor in the output, in bytes."""
        return prod(self.tensors[name].shape) * DTYPES[self.dtypes[name]].itemsize


def write_folder(
    destination: Path, parts: list[Part], write_small_files: Callable[[Path], None], linked: Mapping[str, Path],
    options: Options,
) -> None:  # fmt: skip
    """Write `parts` and what `write_small_files` adds; `linked` files, by their place, are shared and not copied.

    With options.resume, a complete `destination` is compared with what would be written, and stays. ValueError if it
    differs.
    """
    shards = {
        file: (part, names) for part in parts for file, names in plan_shards(part, options.max_shard_size).items()
    }
    sizes = {file: sum(map(part.nbytes, names)) for file, (part, names) in shards.items()}

    def fill(folder: Path) -> None:
        for place, path in linked.items():
            link(path, folder / place)
        write_small_files(folder)
        for part in parts:
            write_index(folder, part, {file: names for file, (p, names) in shards.items() if p is part})

    if options.resume and destination.is_dir():
        with progress_bar(sum(sizes.values()), options) as bar:
            check_complete(destination, shards, fill, bar.update)
        say(f"{printable(destination)} is complete: every file is what would be written")
        return
    total = sum(sizes.values()) * (2 if options.verify else 1)
    with new_folder(destination, resume=options.resume) as folder, progress_bar(total, options) as bar:
        done = {file for file in shards if is_written(folder / file, *shards[file], bar.update)}
        clear(folder, keep=done)
        check_free_space(folder.parent, sum(size for file, size in sizes.items() if file not in done))
        fill(folder)
        for file, (part, names) in shards.items():
            if file not in done:
                (folder / file).parent.mkdir(exist_ok=True)
                write_shard(folder / file, part, names, bar.update)
            if options.verify:
                verify_shard(folder / file, bar.update)


def progress_bar(total: int, options: Options) -> tqdm:
    """Bytes written on stderr, if asked for."""
    shown = {"unit": "B", "unit_scale": True, "disable": not options.progress, "file": Forgiving(sys.stderr)}
    return tqdm(total=total, desc="converting", **shown)


def clear(folder: Path, keep: set[str]) -> None:
    """Remove all files in `folder` but those in `keep`, and folders that are empty then."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in keep:
            path.unlink()


def check_complete(
    destination: Path,
    shards: Mapping[str, tuple[Part, list[str]]],
    fill: Callable[[Path], None],
    advance: Callable[[int], None],
) -> None:
    """ValueError unless `destination` holds what would be written: the shards and all that `fill` adds."""
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".") as small:
        fill(Path(small))
        other = []
        for path in filter(Path.is_file, Path(small).rglob("*")):
            there = destination / path.relative_to(small)
            if not there.is_file() or not (path.samefile(there) or filecmp.cmp(path, there, shallow=False)):
                other.append(path.relative_to(small).as_posix())
    other += [file for file in shards if not is_written(destination / file, *shards[file], advance)]
    if other:
        raise ValueError(
            f"{destination} exists already, and {listed(other)} is not what would be written: choose another name, or "
            "remove it first"
        )


def plan_shards(part: Part, max_shard_size: int) -> dict[str, list[str]]:
    """File name → names of the tensors in it: shards are filled in order, each up to max_shard_size bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in part.tensors:
        if shards[-1] and size + part.nbytes(name) > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += part.nbytes(name)
    if len(shards) == 1:
        return {f"{part.stem}.safetensors": shards[0]}
    return {f"{part.stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_index(folder: Path, part: Part, shards: Mapping[str, list[str]]) -> None:
    """Which file holds which tensor, if a model has several files."""
    if len(shards) > 1:
        weight_map = {name: Path(file).name for file, names in shards.items() for name in names}
        total = sum(map(part.nbytes, part.tensors))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{part.stem}.safetensors.index.json", index)


def write_shard(path: Path, part: Part, names: list[str], advance: Callable[[int], None]) -> None:
    """One safetensors file: 8 bytes of header length, the header in JSON, the tensors one after the other.

    Written by hand because the library wants all tensors in memory at once. The header holds a SHA-256 of every
    tensor, known only at the end: it is written once to take its place, and again when they are known.
    """
    names = in_file_order(part, names)
    digests = dict.fromkeys(names, "0" * 64)
    with replacing(path) as partial, open(partial, "wb", buffering=0) as file, ThreadPoolExecutor(1) as thread:
        write_all(file, build_header(part, names, digests))
        for name in names:
            sha256, finite = hashlib.sha256(), True
            for values in cast_chunks(part, name):
                finite = finite and is_finite(values)  # after the cast: what is 1e6 in bf16 is infinite in fp16
                data = values.view(torch.uint8).numpy().data
                hashed = thread.submit(sha256.update, data)  # while this thread writes
                write_all(file, data)
                hashed.result()
                advance(len(data))
            digests[name] = sha256.hexdigest()
            if not finite:
                dtype, source = part.dtypes[name], part.tensors[name].path
                say(f"warning: {printable(name)} of {printable(source)} holds NaN or infinity as {dtype}")
        file.seek(0)
        write_all(file, build_header(part, names, digests))
        os.fsync(file.fileno())


def is_written(path: Path, part: Part, names: list[str], advance: Callable[[int], None]) -> bool:
    """Whether the file holds, byte for byte, what `write_shard` would write: the source is read and compared."""
    if not path.is_file():
        return False
    names, digests = in_file_order(part, names), {}
    with open(path, "rb") as file:
        begin = len(build_header(part, names, dict.fromkeys(names, "0" * 64)))
        file.seek(begin)
        for name in names:
            sha256 = hashlib.sha256()
            for values in cast_chunks(part, name):
                data = values.view(torch.uint8).numpy().data
                if file.read(len(data)) != data:
                    return False
                sha256.update(data)
                advance(len(data))
            digests[name] = sha256.hexdigest()
        if file.read(1):
            return False
        file.seek(0)
        return file.read(begin) == build_header(part, names, digests)


def in_file_order(part: Part, names: list[str]) -> list[str]:
    """The widest first, so that all are aligned."""
    return sorted(names, key=lambda name: -DTYPES[part.dtypes[name]].itemsize)


def cast_chunks(part: Part, name: str) -> Iterator[Tensor]:
    """The values of a tensor as they are written, (n,) at a time."""
    return (chunk.to(DTYPES[part.dtypes[name]]) for chunk in part.tensors[name].chunks())


def build_header(part: Part, names: list[str], digests: dict[str, str]) -> bytes:
    """The length and the JSON; its size depends on the names and not on the digests."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **part.metadata, "sha256": json.dumps(digests)}}
    offset = 0
    for name in names:
        stop = offset + part.nbytes(name)
        shape = list(part.tensors[name].shape)
        header[name] = {"dtype": part.dtypes[name], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def verify_shard(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Read a file back; ValueError names the tensors whose bytes are not those that were written."""
    weights = read_safetensors(path)
    wrong = []
    for name, digest in digests_of(weights).items():
        sha256 = hashlib.sha256()
        for chunk in weights.tensors[name].chunks():
            sha256.update(chunk.view(torch.uint8).numpy().data)
            advance(chunk.nbytes)
        if sha256.hexdigest() != digest:
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} is not what was written, the disk may be failing: {listed(wrong)}")


def digests_of(weights: Weights) -> dict[str, str]:
    """SHA-256 of every tensor, as the header says."""
    return parse_json(weights.metadata["sha256"].encode(), weights.source)


def is_finite(values: Tensor) -> bool:
    """False for NaN or infinity in values (n,): the extremes show both, and cost a tenth of looking at each value."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def write_all(file, data: bytes | memoryview) -> None:
    """`file.write` of an unbuffered file may write less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def link(path: Path, place: Path) -> None:
    """The same file in a second place; a copy if the file system cannot do that."""
    make_folder(place.parent)
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)


def list_files(folder: Path, keep: Callable[[Path], bool]) -> dict[str, Path]:
    """The files below `folder` for which `keep(path)` holds, by relative path. ValueError if a link leaves it."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.as_posix(): check_inside(folder / path, folder) for path in paths if keep(path)}
