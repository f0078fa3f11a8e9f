"""What is only shown: progress bars and single lines. None of it may cost the work that it reports on.

A terminal may be closed, full, or gone (`| head`), a service has none, and some code pages lack letters.
"""

import contextlib
import itertools
import reprlib
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


UNWRITABLE = (OSError, ValueError, AttributeError)  # what a stream raises that is full or gone, closed, or None


class Forgiving:
    """A text stream that drops what it cannot write, and replaces letters that its encoding lacks; `None` drops all."""

    def __init__(self, stream: TextIO | None):
        self.stream: Any = stream

    def write(self, text: str) -> int:
        """Write `text` if possible; returns its length."""
        with contextlib.suppress(*UNWRITABLE):
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with contextlib.suppress(*UNWRITABLE):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        with contextlib.suppress(*UNWRITABLE):
            return self.stream.isatty()
        return False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def bar(total: int, desc: str, unit: str, postfix: str | None = None, show: bool = True) -> "tqdm":
    """A progress bar on stderr, or as a widget in a notebook."""
    with warnings.catch_warnings():  # a notebook without ipywidgets gets a bar of text: no reason for a warning
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm(total=total, desc=desc, unit=unit, postfix=postfix, disable=not show, file=Forgiving(sys.stderr))


def say(line: str) -> None:
    """Print one line on stderr."""
    print(line, file=Forgiving(sys.stderr), flush=True)


@contextlib.contextmanager
def showing(what: str) -> Iterator[None]:
    """Inside, what cannot be read or written to show `what` costs a line and not the work that it shows."""
    try:
        yield
    except (OSError, ValueError) as error:
        say(f"note: there is no {what} ({printable(error, 200)})")


def printable(text: object, most: int = 1500) -> str:
    """`text` as one line without control characters, cut in the middle if it is longer than `most`."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


def shown(value: object, most: int = 60) -> str:
    """Any value as a part of an error's line; its own repr may be long, of many lines, or fail."""
    try:
        return printable(reprlib.repr(value), most)
    except Exception:
        return f"of type {type(value).__name__}"


def listed(names: Collection[str], most: int = 6) -> str:
    """The first few of many names, printable, and how many more there are."""
    some = ", ".join(printable(name, 200) for name in itertools.islice(names, most))
    return f"{some} and {len(names) - most:,} more" if len(names) > most else some
