"""Tensors in files: where each lies, checked before any is read; mapped into memory or read a piece at a time.

A safetensors file: eight bytes with the length of the header, the header in JSON, the tensors one after the other.
"""

import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kandinsky5.files import LARGEST, check_regular, parse_json, read_json
from kandinsky5.screen import listed

CHUNK = 16 * 2**20  # bytes that are read, cast and written at a time
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes start … stop, row-major. `dtype` is spelled as in safetensors."""

    path: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return self.stop - self.start

    def rows(self, part: int, parts: int) -> "Stored":
        """One of `parts` equal pieces along the first axis."""
        size = self.nbytes // parts
        start = self.start + part * size
        return replace(self, start=start, stop=start + size, shape=(self.shape[0] // parts, *self.shape[1:]))

    def chunks(self) -> Iterator[Tensor]:
        """The values in order, (n,) of at most `CHUNK` bytes at a time. ValueError if the file has become shorter."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for position in range(self.start, self.stop, CHUNK):
                buffer = bytearray(min(CHUNK, self.stop - position))
                if read_into(file, buffer) < len(buffer):
                    raise ValueError(f"{self.path} became shorter while it was read: copy or download it again")
                yield torch.frombuffer(buffer, dtype=DTYPES[self.dtype])

    def read(self) -> Tensor:
        """The whole tensor."""
        values = torch.empty(prod(self.shape), dtype=DTYPES[self.dtype], device="cpu")
        position = 0
        for piece in self.chunks():
            values[position : position + len(piece)] = piece
            position += len(piece)
        return values.view(self.shape)


@dataclass(frozen=True)
class Computed(Stored):
    """A tensor that is computed from others in files when it is read: `pieces` yields its values in order.

    `path` and the bytes are those of the tensor that it is made of; `shape` and `dtype` are its own. The pieces may
    have a wider precision than `dtype`.
    """

    pieces: Callable[[], Iterator[Tensor]]
    kind: str = ""  # what the file has, for people

    @classmethod
    def of(
        cls, stored: Stored, shape: tuple[int, ...], dtype: str, pieces: Callable[[], Iterator[Tensor]], kind: str = ""
    ) -> "Computed":
        """One that is made of `stored`."""
        return cls(stored.path, stored.start, stored.stop, shape, dtype, pieces, kind)

    def rows(self, part: int, parts: int) -> Stored:
        """ValueError: what is computed comes in one piece."""
        raise ValueError(f"{self.path} stores in one matrix, quantised, what are {parts}: take weights in bf16")

    def chunks(self) -> Iterator[Tensor]:
        """The values in order, (n,) at a time."""
        return self.pieces()


class Weights(NamedTuple):
    """All tensors of one model."""

    source: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> Weights:
    """Names, shapes and places from the header; ValueError unless all of it is sound and the file is complete."""
    check_regular(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(file.read(length), "its header")
        metadata = header.pop("__metadata__", None) or {} if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its header is no table of tensors")
        tensors = {name: _read_entry(path, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if stored.start != end:
                raise ValueError(f"{name!r} begins at byte {stored.start:,} instead of {end:,}")
            end = stored.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
    except ValueError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}): copy or download it again") from error
    return Weights(path, tensors, metadata)


def _read_entry(path: Path, name: str, entry: object, begin: int) -> Stored:
    """One entry of a header: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, counted from `begin`."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        sound = set(map(type, (*shape, start, stop))) == {int} and start >= 0 and min(shape, default=0) >= 0
        if sound and len(shape) <= 8 and stop - start == prod(shape) * DTYPES[dtype].itemsize:
            return Stored(path, begin + start, begin + stop, tuple(shape), dtype)
    except (KeyError, TypeError, ValueError):  # not there, of another type, not two offsets
        pass
    raise ValueError(f"its entry for {name!r:.200} is wrong: {entry!r:.200}")


def read_index(path: Path, read_file: Callable[[Path], Weights] = read_safetensors) -> Weights:
    """The shards that an index lists; they must lie next to it. ValueError if index and shards disagree."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensor names to file names: download it again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{path} names {file!r}: a shard lies in the same folder as its index")
    weights = join(path, (read_file(path.parent / file) for file in files))
    wrong = [n for n, file in weight_map.items() if n not in weights.tensors or weights.tensors[n].path.name != file]
    if wrong:
        raise ValueError(f"{path} lists tensors that its shards do not hold: {listed(wrong)}; download them again")
    if unlisted := weights.tensors.keys() - weight_map.keys():
        raise ValueError(f"{path} does not list tensors of its shards: {listed(sorted(unlisted))}; download it again")
    return weights


def join(source: Path, shards: Iterable[Weights]) -> Weights:
    """The tensors of all shards of a model; ValueError if two hold a tensor of the same name."""
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        if twice := tensors.keys() & shard.tensors.keys():
            raise ValueError(f"{shard.source} holds tensors of another shard: {listed(sorted(twice))}")
        tensors |= shard.tensors
        metadata |= shard.metadata
    return Weights(source, tensors, metadata)


def map_tensors(tensors: Mapping[str, Stored], writable: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, as views of their mapped files: nothing is read until it is used, but what is `Computed`.

    writable: changes stay in memory (copy on write); such mappings count against the system's commit limit and may be
    refused for files larger than RAM. Read-only ones do not count; writing to one ends the process.
    ValueError if a file cannot be mapped.
    """
    files: dict[Path, mmap.mmap] = {}
    for name, stored in tensors.items():
        if isinstance(stored, Computed):
            yield name, stored.read()
            continue
        if stored.path not in files:
            files[stored.path] = _map_file(stored.path, writable)
        yield name, _view(files[stored.path], stored)


def _view(file: mmap.mmap, stored: Stored) -> Tensor:
    dtype, count = DTYPES[stored.dtype], prod(stored.shape)
    if not count:
        return torch.empty(stored.shape, dtype=dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is the point
        return torch.frombuffer(file, dtype=dtype, count=count, offset=stored.start).view(stored.shape)


def _map_file(path: Path, writable: bool) -> mmap.mmap:
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if writable else mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be mapped ({error.strerror}): if it is larger than the memory of this machine, use "
                "--offload model or blocks, which map it to be read only"
            ) from error


def read_into(file, buffer: bytearray) -> int:
    """Fill `buffer` from an unbuffered file, which may give less than it is asked for; returns the bytes read."""
    view, done = memoryview(buffer), 0
    while done < len(buffer) and (n := file.readinto(view[done:])):
        done += n
    return done
