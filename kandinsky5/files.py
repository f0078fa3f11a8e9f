"""Files: what others wrote is read within limits, and what we write is never half there."""

import contextlib
import hashlib
import json
import numbers
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kandinsky5.screen import printable, shown

LARGEST = 10_000_000  # bytes of a file that is read whole; the released models' configs and indices have 0.2 MB at most
DEEPEST = 64  # levels of a JSON document; those that we read have five
LFS = b"version https://git-lfs.github.com/spec/v1"


def check_regular(path: str | Path) -> Path:
    """`path`, if it leads to a regular file; ValueError for a folder, pipe, device, git-lfs stub, or nothing."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in its folder")
    return path


def check_inside(path: Path, folder: Path) -> Path:
    """`path`, if it lies in `folder` with all links followed; ValueError if not, as a copy would give away other files.

    In a Hugging Face cache, where snapshots/REVISION links to blobs/ next to it, the folder is the model's.
    """
    place, root = path.resolve(), folder.resolve()
    cache = next((p.parent for p in (root, *root.parents) if p.name == "snapshots"), None)
    if not place.is_relative_to(cache if cache and cache.name.startswith("models--") else root):
        raise ValueError(f"{path} links to {place}, outside of {folder}: put the file itself there")
    return path


def read_bytes(path: str | Path, most: int = LARGEST) -> bytes:
    """The content of a regular file; ValueError for another kind of file, or one of more than `most` bytes."""
    size = check_regular(path).stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, and should have at most {most:,}")
    return Path(path).read_bytes()


def sha256(path: str | Path) -> str:
    """SHA-256 of a regular file, in hex. Raises ValueError for another kind of file."""
    with open(check_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path, most: int = LARGEST) -> str:
    """The same as text: UTF-8, with or without a byte order mark; bytes that are not UTF-8 become U+FFFD."""
    return read_bytes(path, most).decode("utf-8-sig", "replace")


def read_utf8(path: str | Path, most: int = LARGEST) -> str:
    """The same, of a file that people write: ValueError for another encoding."""
    try:
        text = read_bytes(path, most).decode("utf-8-sig")
        if "\0" in text:  # as in UTF-16 that does not begin with its mark
            raise UnicodeDecodeError("utf-8", b"", text.index("\0"), 0, "NUL")
        return text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start + 1}): save it as UTF-8, such as by iconv -t utf-8"
        ) from error


def read_json(path: str | Path, most: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file; ValueError, with the path, for anything else or what `parse_json` refuses."""
    value = parse_json(read_bytes(path, most), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy, download or convert it again")
    return value


def parse_json(data: bytes, where: object) -> Any:
    """The value of a JSON text in UTF-8.

    ValueError that begins with `where` for invalid JSON, a key that occurs twice in an object, more than DEEPEST
    levels, and half of a surrogate pair, which could not be written or printed again.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
        level = [value]
        for _ in range(DEEPEST):
            level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if level:
            raise ValueError(f"it has more than {DEEPEST} levels")
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON ({printable(error, 300)})") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name!r} occurs twice in one object")
    return values


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name next to `path` to write to: it becomes `path` if all goes well, and is removed if not."""
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except PermissionError as error:  # as on Windows, where no file can be replaced that is open or mapped
            raise OSError(
                f"cannot replace {path} ({error.strerror}): close what has it open, or choose another name"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8, the same bytes on every system; a failed run leaves the old one as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, values: dict) -> None:
    """Write a JSON file that people can read too; its folder is made if need be."""
    make_folder(Path(path).parent)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def make_folder(path: str | Path) -> None:
    """`mkdir -p`; OSError if a file is in the way, or it may not be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"{path} is a file, or lies below one: name a folder") from error
    except OSError as error:
        raise OSError(f"cannot make the folder {path} ({error.strerror}): choose one that you can write to") from error


@contextlib.contextmanager
def new_folder(place: str | Path, replace: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder next to `place` to write to: it takes that name when all has gone well, and an error removes it.

    An interrupted or killed run leaves it, as `.NAME.partial`: with `resume` it is used as it is, else emptied first.
    replace: a folder may be there already, and stays until then. Raises FileExistsError if it may not, ValueError if
    another process is writing it.
    """
    place = Path(place)
    partial, old = (place.with_name(f".{place.name}.{end}") for end in ("partial", "old"))
    if replace and old.is_dir() and not place.is_dir():
        old.rename(place)  # interrupted between the two renames below
    if os.path.lexists(place) and not replace:
        raise FileExistsError(f"{place} exists already: choose another name, or remove it first")
    make_folder(place.parent)
    partial.mkdir(exist_ok=True)
    with locked(partial, f"another process is writing {place}: wait for it, or stop it"):
        try:
            if not resume:
                for path in partial.iterdir():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield partial
            sync(*partial.rglob("*"), partial)
            if place.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                place.rename(old)
            partial.rename(place)
            sync(place.parent)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk: else a power cut may leave empty files.

    Some file systems, such as those of other machines, cannot do that for a folder; it is left out there.
    """
    if os.name == "nt":  # there, what is only opened to be read cannot be synchronised, and folders not be opened
        return
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            os.close(handle)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of `folder` has no room for `needed` bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise OSError(f"{folder} has {free / 1e9:.3g} GB free and needs {needed / 1e9:.3g} GB: free some disk space")


def check_replaceable(path: str | Path) -> None:
    """Raise before hours of work what `replacing` would raise after them: OSError if `path` cannot be written."""
    path = Path(path)
    try:
        if path.is_dir():
            raise OSError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path} ({reason}): choose a folder you can write to") from error


def check_writable(path: str | Path, num_frames: int = 1, fps: float = 24, quality: float = 8) -> None:
    """Raise before hours of sampling what `video_io.write_video` would raise after them; leave nothing behind.

    ValueError for a wrong suffix, fps or quality; OSError for a folder that is missing or not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".png"):
        raise ValueError(f"cannot write {path}: the name must end in .mp4, or in .png for one frame")
    if path.suffix.lower() == ".png" and num_frames > 1:
        raise ValueError(f"cannot write {num_frames} frames to {path}: a .png holds one (--num-frames 1), an .mp4 all")
    for name, value in (("fps", fps), ("quality", quality)):
        if not isinstance(value, numbers.Real):
            raise ValueError(f"{name} {shown(value)}: give a number")
    if not 1 <= fps <= 1000:
        raise ValueError(f"fps {fps} is not between 1 and 1000: choose one such as 24")
    if not 1 <= quality <= 10:
        raise ValueError(f"quality {quality} is not between 1 (small) and 10 (lossless to the eye): try 8")
    check_replaceable(path)


def check_apart(outputs: Mapping[str, object], inputs: Mapping[str, object]) -> None:
    """Raises ValueError where an output is also an input, lies as a file in a folder that is one, or is another output;
    options by name, values that are no paths (None, True) are left out."""
    taken: dict[object, str] = {}
    folders: dict[Path, str] = {}
    for options in (inputs, outputs):
        for option, place in options.items():
            if not isinstance(place, (str, Path)):
                continue
            path = Path(place).resolve()
            identity = (path.stat().st_dev, path.stat().st_ino) if path.exists() else path  # a.png may also be A.png
            if options is outputs:
                around = (folders[p] for p in path.parents if p in folders and path.is_file())
                if found := taken.get(identity) or next(around, None):
                    raise ValueError(f"{option} {place} would replace the file of {found}: give it another name")
            elif path.is_dir():
                folders[path] = option
            taken[identity] = option


def free_name(path: str | Path) -> Path:
    """`path` if there is nothing, else the first free one of out-2.mp4, out-3.mp4, …"""
    path = free = Path(path)
    number = 1
    while os.path.lexists(free):
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


@contextlib.contextmanager
def locked(folder: str | Path, refusal: str) -> Iterator[None]:
    """Hold `folder` alone, or raise ValueError with `refusal`; the lock ends with the process, however that ends.

    On Windows, where folders have no locks, and on file systems without any, it is not held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
