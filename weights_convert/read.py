"""Tensors on disk: where each lies, and its bytes a piece at a time, so that no file is ever in memory whole."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK = 16 * 2**20  # bytes that are read, cast and written at a time
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # what weights may be stored as
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes start … stop, row-major. `dtype` is spelled as safetensors spells it."""

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
        """The values in order, (n,) of at most `CHUNK` bytes at once. ValueError if the file has been cut since."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for position in range(self.start, self.stop, CHUNK):
                buffer = bytearray(min(CHUNK, self.stop - position))
                if _read_into(file, buffer) < len(buffer):
                    raise ValueError(f"{self.path} became shorter while it was read: copy or download it again")
                yield torch.frombuffer(buffer, dtype=FLOATS[self.dtype])


class Weights(NamedTuple):
    """All tensors of one model."""

    source: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_weights(path: Path, stem: str = "*") -> Weights:
    """What a safetensors file, its index, a .pt file, or the one set of weights in a folder holds; none is loaded yet.

    stem: in a folder, the file name up to `.safetensors`. ValueError, one line, for anything wrong with it.
    """
    if path.is_dir():
        path = find_weights(path, stem)
    if path.name.endswith(".index.json"):
        return read_index(path)
    return read_pt(path) if path.suffix in PICKLES else read_safetensors(path)


def find_weights(folder: Path, stem: str = "*") -> Path:
    """The file in `folder` that leads to all of a model's weights: an index, a safetensors file, or else a pickle.

    ValueError where there is none, or more than one that it could be.
    """
    for ending in (".safetensors.index.json", ".safetensors", *PICKLES):
        found = sorted(p for p in folder.glob(stem + ending) if not p.name.startswith("."))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found)
            raise ValueError(
                f"{folder} holds several sets of weights ({names}): give one of the files, or move the others away"
            )
    raise ValueError(
        f"no weights in {folder}: looked for {stem}.safetensors, shards with {stem}.safetensors.index.json, and "
        f"{', '.join(PICKLES)}"
    )


def read_index(path: Path) -> Weights:
    """The shards that an index lists; they must lie beside it. ValueError where index and shards disagree."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path} has no weight_map of tensor names and file names: download it again")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {file!r}: shards are safetensors files beside their index, in the same folder"
            )
        shard = read_safetensors(path.parent / file)
        tensors |= {name: stored for name, stored in shard.tensors.items() if weight_map.get(name) == file}
        metadata |= shard.metadata
        unlisted = sorted(shard.tensors.keys() - weight_map.keys())
        if unlisted:
            raise ValueError(f"{path} does not list what {file} holds: {', '.join(unlisted)}; download both again")
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{path} lists what its shards do not hold: {', '.join(missing)}; download them again")
    return Weights(path, tensors, metadata)


def read_safetensors(path: Path) -> Weights:
    """Names, shapes and places from a safetensors header; ValueError if the file is not whole."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):  # the library checks that offsets and sizes are sound
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({one_line(error)}): copy or download it again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = Stored(path, start, stop, tuple(entry["shape"]), entry["dtype"])
    return Weights(path, tensors, metadata)


def read_pt(path: Path) -> Weights:
    """The places of the tensors in a file of `torch.save`, under an optional "state_dict". No code in it is run.

    ValueError for a file that holds anything but plain tensors by name, or ends before they do.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            stored_plainly = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript program")
        # On the meta device nothing is read, and each storage knows where it would have been read from.
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; code in it raises UnpicklingError
        reason = one_line(error)
        if "eights only" in reason:
            reason = "it holds code or objects, which are never run, and not tensors alone"
        raise ValueError(
            f"{path} cannot be read ({reason}): give a file of tensors saved by torch.save, or safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no tensors by name")
    tensors, length = {}, path.stat().st_size
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
        place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if dense else None
        if place is None or not stored_plainly:
            raise ValueError(f"{path} does not hold {name} as plain numbers: save it again with safetensors")
        start = place + tensor.storage_offset() * tensor.element_size()
        stop = start + tensor.numel() * tensor.element_size()
        if stop > length:
            raise ValueError(f"{path} ends before {name} does: copy or download it again")
        dtype = next((ours for ours, theirs in FLOATS.items() if theirs == tensor.dtype), str(tensor.dtype))
        tensors[str(name)] = Stored(path, start, stop, tuple(tensor.shape), dtype)
    return Weights(path, tensors, {})


def read_json(path: Path) -> dict:
    """A JSON object, or ValueError."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: download it again")
    return values


def write_json(values: dict, path: Path) -> None:
    """A JSON file for people to read too; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, cut to 300 characters."""
    return " ".join(str(error).split())[:300]


def _read_into(file, buffer: bytearray) -> int:
    view, done = memoryview(buffer), 0
    while done < len(buffer) and (n := file.readinto(view[done:])):
        done += n
    return done
