"""Files of `torch.save`, today's (a zip) and those before PyTorch 1.6: where each tensor lies. No code in them is run.

A pickle is a program for a small machine. Ours knows only the instructions that `torch.save` emits, and of the names
that they refer to only those in KNOWN, which stand for functions of this file.
"""

import io
import pickle
import reprlib
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from kandinsky5.screen import listed, printable, say
from kandinsky5.tensor_files import DTYPES, Stored, Weights

LARGEST = 2_000_000  # bytes of the pickle itself, without the tensors; that of a 7B model has 0.2 MB
MOST_AXES = 8  # of a tensor
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")  # where trainers put them, best first
NAMES = {str(dtype).removeprefix("torch."): ours for ours, dtype in DTYPES.items()}  # "bfloat16": "BF16"
STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip


class Storage(NamedTuple):
    """A block of values as a pickle describes it: dtype (as in safetensors), name of its place, number of values."""

    dtype: str
    key: str
    numel: int


class Place(NamedTuple):
    """A tensor in a storage: its first value, its shape, and whether it lies there row by row."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    in_rows: bool


def read_pt(path: Path) -> Weights:
    """Where the tensors of a `torch.save` file are, at its top level or in its one state dict.

    Raises ValueError for a file that holds code or objects, no tensors by name, or ends before they do.
    """
    try:
        with open(path, "rb") as file:
            document, starts = read_zip(file) if file.read(2) == b"PK" else read_legacy(file)
        state = find_state_dict(document, path)
        tensors = {str(name): store(path, place, starts) for name, place in state.items()}
    except Exception as error:  # a damaged pickle can raise anything
        reason = printable(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__} {error}", 300)
        raise ValueError(f"{path} cannot be read as tensors saved by torch.save: {reason}") from error
    length = path.stat().st_size
    if short := [name for name, stored in tensors.items() if stored.stop > length]:
        raise ValueError(f"{path} ends before {listed(short)}: copy or download it again")
    return Weights(path, tensors, {})


def read_zip(file) -> tuple[Any, dict[str, int]]:
    """The unpickled document, and where each storage begins in the file. ValueError for another kind of zip."""
    check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "constants.pkl" in entries:
            raise ValueError("it is a TorchScript program: save its state_dict() alone")
        if "data.pkl" not in entries:
            raise ValueError("the zip file holds no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("it is compressed: unpack it and save it again")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("it was saved on a big-endian machine")
        if (size := entries["data.pkl"].file_size) > LARGEST:
            raise ValueError(f"its pickle has {size:,} bytes, and should have at most {LARGEST:,}")
        document = Machine(io.BytesIO(archive.read(entries["data.pkl"]))).load()
    starts = {}
    for name, entry in entries.items():
        if name.startswith("data/"):
            file.seek(entry.header_offset + 26)  # the local header: 30 bytes, the name, more
            lengths = file.read(4)
            starts[name.removeprefix("data/")] = (
                entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            )
    return document, starts


def check_directory(file) -> None:
    """ValueError if the zip's directory, which `zipfile` reads whole, is larger than that of any model."""
    file.seek(0, io.SEEK_END)
    file.seek(max(file.tell() - 98, 0))
    tail = file.read()  # 56 bytes of a zip64 end record, 20 of its locator, 22 of the end record
    size = int.from_bytes(tail[-10:-6], "little")
    if size == 0xFFFFFFFF and tail[:4] == b"PK\x06\x06":
        size = int.from_bytes(tail[40:48], "little")
    if tail[-22:-18] != b"PK\x05\x06" or size > LARGEST:
        raise ValueError("it is no zip file of torch.save, or not complete")


def read_legacy(file) -> tuple[Any, dict[str, int]]:
    """The same for torch.save before PyTorch 1.6: five pickles, then the storages in turn. ValueError for others."""
    file.seek(0)
    pickles = io.BytesIO(file.read(LARGEST))
    machines = [Machine(pickles) for _ in range(5)]
    magic, _, system, document, keys = (machine.load() for machine in machines)
    if magic != 0x1950A86A20F9469CFC6C or not isinstance(keys, list) or not system.get("little_endian"):
        raise ValueError("it is no file of torch.save")
    starts, at = {}, pickles.tell()
    for key in keys:
        storage = machines[3].storages.get(key) if isinstance(key, str) else None
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        if storage is None or count != storage.numel:
            raise ValueError(f"its storage {reprlib.repr(key)} has {count:,} values, which no tensor has")
        starts[key] = at + 8
        at += 8 + count * DTYPES[storage.dtype].itemsize
    return document, starts


def find_state_dict(document: Any, path: Path) -> dict[Any, Place]:
    """The tensors by name, at the top or in one table inside; ValueError if there are none, or no telling which."""
    for _ in range(3):
        if not isinstance(document, dict):
            break
        if tensors := {name: value for name, value in document.items() if isinstance(value, Place)}:
            return tensors
        tables = {name: value for name, value in document.items() if isinstance(value, dict)}
        full = {name: t for name, t in tables.items() if any(isinstance(v, Place) for v in t.values())} or tables
        name = next((name for name in STATE_DICTS if name in full), None)
        if name is None and len(full) > 1:
            raise ValueError(f"it holds several tables ({listed([str(n) for n in full])}): save one of them alone")
        if len(full) > 1:
            say(f"note: of {printable(path)} {name!r} is read, and not {listed([str(n) for n in full if n != name])}")
        document = full[name] if name else next(iter(full.values()), None)
    raise ValueError("it holds no tensors by name")


def store(path: Path, place: Place, starts: dict[str, int]) -> Stored:
    """Where a tensor lies in the file; ValueError for one that is not row by row, or leaves its storage."""
    storage, first, shape, in_rows = place
    if not in_rows or first < 0 or first + prod(shape) > storage.numel:
        raise ValueError("it holds tensors that are views of others: save them with safetensors")
    size = DTYPES[storage.dtype].itemsize
    start = starts[storage.key] + first * size
    return Stored(path, start, start + prod(shape) * size, shape, storage.dtype)


def rebuild_tensor(storage: Storage, first: int, shape: tuple, stride: tuple, *_) -> Place:
    """What stands in a pickle for a tensor. Raises ValueError for sizes that are not whole numbers."""
    if max(len(shape), len(stride)) > MOST_AXES:  # before they are read: thousands may share one list of a million
        raise ValueError(f"a tensor of it has more than {MOST_AXES} axes")
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in (first, *shape, *stride)):
        raise ValueError("a tensor of it has an impossible size")
    rows, step = [], 1
    for n in reversed(shape):
        rows.append(step)
        step *= n
    in_rows = len(stride) == len(shape) and all(
        n <= 1 or a == b for n, a, b in zip(shape, stride, rows[::-1], strict=True)
    )
    return Place(storage, first, tuple(shape), in_rows or not prod(shape))


def rebuild_tensor_v3(storage: Storage, first: int, shape: tuple, stride: tuple, grad, hooks, dtype: str, *_) -> Place:
    """The same for a dtype that has no storage class: the storage counts bytes."""
    if not isinstance(dtype, str) or dtype not in NAMES:
        raise ValueError(f"a tensor of it has the unknown dtype {reprlib.repr(dtype)}")
    count = storage.numel // DTYPES[NAMES[dtype]].itemsize
    return rebuild_tensor(Storage(NAMES[dtype], storage.key, count), first, shape, stride)


class Table(dict):
    """An OrderedDict of a pickle; its attributes are dropped. ValueError for one that begins with pairs, which
    thousands may share."""

    def __init__(self, pairs: Any = ()):
        if pairs:
            raise ValueError("it holds a table as Python 2 writes it: save it again with Python 3")
        super().__init__()


def make_size(lengths: Any = ()) -> tuple:
    """A torch.Size; ValueError for more axes than a tensor has, as each takes memory of its own."""
    if len(lengths) > MOST_AXES:
        raise ValueError(f"a size in it has more than {MOST_AXES} axes")
    return tuple(lengths)


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Table,
    ("torch", "Size"): make_size,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch.storage", "UntypedStorage"): "U8",
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", name): name for name in NAMES},
}


INSTRUCTIONS = b"\x80cR}])(tuqrhjXQKMJG.Nsae\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95Ub"  # of protocol 2, and frames


class Machine(pickle._Unpickler):
    """The unpickler in Python, without the instructions that `torch.save` has no use for.

    The one in C reserves gigabytes for a memo of five bytes, and BUILD would change what KNOWN holds.
    """

    dispatch = {op: run for op, run in pickle._Unpickler.dispatch.items() if op in INSTRUCTIONS}
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()  # type: ignore[attr-defined]

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What `module.name` stands for; ValueError for all that is not in KNOWN."""
        if (module, name) not in KNOWN:
            raise ValueError(f"it holds {module}.{name}, code or an object that is never run; save the tensors alone")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage. ValueError for anything else."""
        match pid:
            case ("storage", str(dtype), str(key), _, int(count), *more) if dtype in DTYPES and more in ([], [None]):
                self.storages[key] = Storage(dtype, key, count)
                return self.storages[key]
        raise ValueError(f"it holds an unknown storage {reprlib.repr(pid)}")

    def set_item(self) -> None:
        """The instruction SETITEM."""
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        self.load_setitem()  # type: ignore[attr-defined]

    def set_items(self) -> None:
        """The instruction SETITEMS."""
        _check_keys(self.stack[::2])  # type: ignore[attr-defined]
        self.load_setitems()  # type: ignore[attr-defined]

    dispatch |= {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items}  # type: ignore[dict-item]


def _check_keys(keys: list) -> None:
    """ValueError for keys such as nested tuples, whose hashes can take for ever or end the process."""
    if odd := {type(key).__name__ for key in keys if not isinstance(key, str | int | float | None)}:
        raise ValueError(f"it holds a table by {listed(sorted(odd))} instead of names: save the tensors alone")
