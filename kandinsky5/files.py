"""Files that are never half there, and folders that one process at a time writes."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name of its own beside `path`, to write to: it becomes `path` if all goes well, and is removed if not."""
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8; a broken run leaves the old one as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: str | Path) -> None:
    """`mkdir -p`; OSError, in words, where a file is in the way."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"{path} is a file, or lies below one: name a folder") from error


def check_replaceable(path: str | Path) -> None:
    """Raise before hours of work what `replacing` would raise after them: OSError where `path` cannot be written."""
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
    if not 1 <= fps <= 1000:
        raise ValueError(f"fps {fps} is not between 1 and 1000: choose one such as 24")
    if not 1 <= quality <= 10:
        raise ValueError(f"quality {quality} is not between 1 (small) and 10 (lossless to the eye): try 8")
    check_replaceable(path)


def check_apart(outputs: dict[str, object], inputs: dict[str, object]) -> None:
    """Raises ValueError where an output is also an input or another output; options by name, values that are no paths
    (None, True) are left out."""
    taken: dict[Path, str] = {}
    for options in (inputs, outputs):
        for option, place in options.items():
            if not isinstance(place, (str, Path)):
                continue
            path = Path(place).resolve()
            if options is outputs and path in taken:
                raise ValueError(f"{option} {place} would replace the file of {taken[path]}: give it another name")
            taken[path] = option


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
    """Hold `folder` alone, or ValueError with `refusal`; the lock ends with the process, however that ends."""
    import fcntl  # not on Windows, where only trainings and conversions miss it

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        yield
    finally:
        os.close(handle)
