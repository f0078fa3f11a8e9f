"""A folder of safetensors files, written tensor by tensor, that appears all at once when it is complete."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky5.files import locked
from weights_convert.read import FLOATS, Stored, Weights, read_json, read_safetensors

PLAN = "unfinished.json"  # stands in a folder as long as it is not complete


@dataclass(frozen=True)
class Options:
    """What all conversions can be told."""

    dtype: str | None = None  # "bf16", "fp16" or "fp32": cast to it; None: leave every tensor as it is stored
    cast_all: bool = False  # cast the DiT's Float32Linears (dit.py) too; else they become or stay float32
    max_shard_size: int = 5 * 10**9  # bytes of a file, unless one tensor alone is larger
    resume: bool = False  # go on with the finished files of an interrupted run
    verify: bool = False  # read everything back and compare
    progress: bool = True  # a bar on stderr; warnings, and what was left out, are said there anyway


@dataclass(frozen=True)
class Part:
    """One model on its way: `stem` is its file name up to `.safetensors`, in a folder below the destination."""

    stem: str
    tensors: Mapping[str, Stored]  # by the name that it is written under
    dtypes: Mapping[str, str]  # what each is cast to, spelled as in safetensors
    metadata: Mapping[str, str]

    def nbytes(self, name: str) -> int:
        """What this tensor takes in the output, in bytes."""
        return prod(self.tensors[name].shape) * FLOATS[self.dtypes[name]].itemsize


def write_folder(
    destination: Path,
    parts: list[Part],
    write_small_files: Callable[[Path], None],
    linked: Mapping[str, Path],
    options: Options,
) -> None:
    """Write `parts` and what `write_small_files` adds; `linked` files, by their place, are shared and not copied."""
    shards = [
        (part, file, names) for part in parts for file, names in plan_shards(part, options.max_shard_size).items()
    ]
    with new_folder(destination, describe(shards, linked), options.resume) as folder:
        for place, path in linked.items():
            link(path, folder / place)
        write_small_files(folder)
        finished = {file for _, file, _ in shards if (folder / file).exists()}
        check_free_space(folder, sum(shard_size(part, names) for part, file, names in shards if file not in finished))
        total = sum(shard_size(part, names) for part, _, names in shards) * (2 if options.verify else 1)
        with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=not options.progress) as bar:
            for part, file, names in shards:
                if file in finished:
                    bar.update(shard_size(part, names))
                else:
                    (folder / file).parent.mkdir(exist_ok=True)
                    write_shard(folder / file, part, names, bar.update)
            if options.verify:
                for _, file, _ in shards:
                    verify_shard(folder / file, bar.update)
        for part in parts:
            write_index(folder, part, {file: names for p, file, names in shards if p is part})


@contextmanager
def new_folder(destination: Path, plan: dict, resume: bool) -> Iterator[Path]:
    """A folder beside `destination` to write into. When all has gone well it takes that name; an error removes it.

    An interrupted or killed run leaves it behind, under its own name, for `resume`: the plan that stands in it says
    which conversion it belongs to, and files that have their final name are complete. ValueError if `destination`
    exists, or another run is writing it.
    """
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists already: choose another name, or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    taken = f"another conversion is writing {destination}: wait for it, or stop it"
    if partial.exists() and not (resume and (partial / PLAN).exists() and read_json(partial / PLAN) == plan):
        with locked(partial, taken):
            shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    with locked(partial, taken):
        replace_text(partial / PLAN, json.dumps(plan))
        try:
            yield partial
            sync(*partial.rglob("*"))
            os.unlink(partial / PLAN)
            sync(partial)
            os.rename(partial, destination)
            sync(destination.parent)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def describe(shards: list[tuple[Part, str, list[str]]], linked: Mapping[str, Path]) -> dict:
    """What makes two runs the same: sources that have not changed since, and where each tensor and file goes."""
    paths = {stored.path for part, _, _ in shards for stored in part.tensors.values()} | set(linked.values())
    files = [(file, [(name, part.tensors[name], part.dtypes[name]) for name in names]) for part, file, names in shards]
    text = repr((files, sorted(linked.items())))
    sources = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}
    return {"sources": sources, "files": hashlib.sha256(text.encode()).hexdigest()}


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


def shard_size(part: Part, names: list[str]) -> int:
    """Bytes of the tensors `names`, header not counted."""
    return sum(part.nbytes(name) for name in names)


def write_index(folder: Path, part: Part, shards: Mapping[str, list[str]]) -> None:
    """What holds which tensor, where a model has several files."""
    if len(shards) > 1:
        weight_map = {name: Path(file).name for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": shard_size(part, list(part.tensors))}, "weight_map": weight_map}
        (folder / f"{part.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_shard(path: Path, part: Part, names: list[str], advance: Callable[[int], None]) -> None:
    """One safetensors file: 8 bytes of header length, the header in JSON, the tensors one behind the other.

    Written by hand because the library wants all tensors in memory at once. The header holds a SHA-256 of every
    tensor, known only at the end: it is written once to take its place, and again when they are known.
    """
    names = sorted(names, key=lambda name: -FLOATS[part.dtypes[name]].itemsize)  # so that all are aligned
    digests = dict.fromkeys(names, "0" * 64)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        write_all(file, build_header(part, names, digests))
        for name in names:
            sha256, finite = hashlib.sha256(), True
            for chunk in part.tensors[name].chunks():
                cast = chunk.to(FLOATS[part.dtypes[name]])
                finite = finite and is_finite(cast)  # behind the cast: what is 1e6 in bf16 is infinite in fp16
                data = cast.view(torch.uint8).numpy().data
                hashed = beside.submit(sha256.update, data)  # while this thread writes
                write_all(file, data)
                hashed.result()
                advance(len(data))
            digests[name] = sha256.hexdigest()
            if not finite:
                say(f"warning: {name} of {part.tensors[name].path} holds NaN or infinity as {part.dtypes[name]}")
        file.seek(0)
        write_all(file, build_header(part, names, digests))
    sync(partial)
    os.replace(partial, path)


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
        raise ValueError(f"{path} is not what was written, the disk may be failing: {', '.join(wrong)}")


def digests_of(weights: Weights) -> dict[str, str]:
    """SHA-256 of every tensor, as the header says."""
    return json.loads(weights.metadata["sha256"])


def is_finite(values: Tensor) -> bool:
    """False for NaN or infinity in values (n,): the extremes show both, and cost a tenth of looking at each value."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def write_all(file, data: bytes | memoryview) -> None:
    """`file.write` of an unbuffered file may write less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def check_free_space(folder: Path, needed: int) -> None:
    """ValueError where the disk has no room for `needed` bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if needed + 2**20 > free:
        raise ValueError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the result takes {needed / 1e9:.1f} GB: make room"
        )


def link(path: Path, place: Path) -> None:
    """The same file in a second place; a copy where the file system cannot do that."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)


def sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk: else a power cut may leave empty files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def say(text: str) -> None:
    """A line on stderr that does not tear the progress bar."""
    tqdm.write(text, file=sys.stderr)
