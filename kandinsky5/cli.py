"""Commands: one place that prints errors and chooses exit codes."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from kandinsky5.screen import Forgiving, printable, say

MEMORY = (  # PyTorch raises three kinds of error where a tensor is too large
    r"tried to allocate [\d.]+ \w+|out of memory|Storage size calculation overflowed|Overflow when unpacking"
)
LESS = "--tile-space, --offload model or blocks (on a GPU), or less --height, --width or --num-frames"


def run(main: Callable[[], int | None], stopped: str = "nothing was written", less: str = LESS) -> int:
    """Call `main` and return the exit code of its process.

    2 after one line "error: …" for ValueError, OSError and what PyTorch raises when memory runs out; 130 after one
    line "interrupted: {stopped}" for Ctrl-C and SIGTERM. Other errors are bugs and keep their traceback. Inside, stdout
    and stderr forgive what cannot be written. `main` should import PyTorch itself: then this covers the import.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in handled}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    try:
        return main() or 0
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):  # which may surface as another error in an import
            say(f"interrupted: {stopped}")
            return 130
        if (reason := explain(error, less)) is None:
            raise
        say(f"error: {printable(reason)}")
        return 2
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            _let_go(stream)
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: BaseException, less: str = LESS) -> str | None:
    """The error in one line, where it is about what was asked for; None for a bug."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, (MemoryError, RuntimeError, TypeError)):
        found = re.search(MEMORY, str(error), re.IGNORECASE)
        if found or isinstance(error, MemoryError):
            return f"not enough memory ({found[0] if found else error}): try {less}"
    return None


def _let_go(stream: TextIO | None) -> None:
    """Flush a stream; what it cannot take is dropped, or Python would try once more at exit and end with code 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
