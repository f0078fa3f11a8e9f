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
