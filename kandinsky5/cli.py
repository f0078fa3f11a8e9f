"""Commands: the console command `kandinsky5`, and for all of them one place that prints errors and picks exit codes.

Nothing here imports PyTorch: `--help` and a wrong option answer at once.
"""

import argparse
import contextlib
import importlib
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from kandinsky5.screen import Forgiving, printable, say

AMOUNT = r"tried to allocate [\d.]+ \w+"
MEMORY = (  # PyTorch raises three kinds of error where a tensor is too large, and CUDA's libraries their own
    r"out of memory|Storage size calculation overflowed|Overflow when unpacking|CU\w+_STATUS_\w*ALLOC\w*_FAILED"
)
LOST = (  # what CUDA says of a device that no longer answers, or never did for this build or driver
    r"CUDA(?: driver)? error: ([^\n]*(?:lost|launch failure|timed out|uncorrectable|unknown error|hardware stack|"
    r"initialization error|busy or unavailable|no kernel image|driver version|system not yet initialized)[^\n]*)"
)
LESS = {  # options that save memory, and how to give them
    "--attention": "--attention auto",
    "--tile-space": "--tile-space",
    "--quantize": "--quantize int8",
    "--offload": "--offload model or blocks (on a GPU)",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")  # what --dtype may be

COMMANDS = {  # name: module whose main(arguments) it is, what it does
    "sample": ("kandinsky5.sample_command", "make a video from a prompt, or from an image and a prompt"),
    "convert": ("weights_convert.__main__", "convert checkpoints from and to other layouts, or inspect one"),
    "finetune": ("kandinsky5.training.finetune", "fine-tune a checkpoint on your clips"),
    "magcache": ("kandinsky5.extras.magcache.__main__", "measure a checkpoint's ratios for --step-skipping"),
    "memory": ("kandinsky5.runtime.__main__", "what a preset needs of a GPU's memory, and which options help"),
    "judge": ("kandinsky5.nano.evaluate", "evaluate nano, the bundled model"),
}
HELP = """\
Kandinsky 5.0 Video in plain PyTorch.

    kandinsky5 sample "a red circle moves left"        with nano, the bundled model, on any machine
    kandinsky5 convert from-diffusers DOWNLOADED weights/lite
    kandinsky5 sample "a red fox runs through snow" --checkpoint weights/lite -o fox.mp4

commands, each with its own --help:
"""


def main() -> NoReturn:
    """The console command: runs one of COMMANDS and ends the process with its exit code."""
    end(dispatch)


def dispatch(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names. Raises ValueError if there is none of that name."""
    arguments = sys.argv[1:] if arguments is None else arguments
    root = Path(__file__).parents[1]
    present = {n: text for n, (module, text) in COMMANDS.items() if (root / f"{module.replace('.', '/')}.py").is_file()}
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP + "\n".join(f"    {name:10} {text}" for name, text in present.items()))
        return 0
    if name == "--version":
        print(importlib.import_module("kandinsky5").__version__)
        return 0
    if name not in present:
        import difflib

        close = difflib.get_close_matches(name, present, n=1) or list(present)
        raise ValueError(f"there is no command {name!r}: try {' or '.join(close)}, or --help")
    sys.argv[0] = f"kandinsky5 {name}"  # what its --help calls it
    return importlib.import_module(COMMANDS[name][0]).main(arguments[1:]) or 0


def run(main: Callable[[], int | None], stopped: str = "nothing was written") -> int:
    """Call `main` and return the exit code of its process.

    2 after one line "error: …" for ValueError, OSError, argparse's errors and what PyTorch raises when memory runs out;
    130 after one line "interrupted: {stopped}", or what the KeyboardInterrupt says, for Ctrl-C and SIGTERM; of the
    processes of torchrun, the first says it. Other errors are bugs and keep their traceback. Inside, stdout and stderr
    forgive what cannot be written. `main` should import PyTorch itself: then this covers the import.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def ignored(error: "sys.UnraisableHookArgs") -> None:
        if error.exc_type is not KeyboardInterrupt:
            hook(error)
        elif len(interrupts) < 100:  # it came in a callback or destructor, where errors are lost: once more
            wake = signal.raise_signal if os.name == "nt" else partial(os.kill, os.getpid())  # which there would kill
            threading.Timer(0.05, wake, (signal.SIGINT,)).start()

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, interrupt) for number in handled}
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Before PyTorch is imported: videos of other sizes then fill the gaps that the first one left on a GPU.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    streams, hook = (sys.stdout, sys.stderr), sys.unraisablehook
    sys.unraisablehook = ignored
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    try:
        return main() or 0
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):  # which may surface as another error in an import
            if os.environ.get("RANK", "0") == "0":
                early = "not all ranks had started, and " * (os.environ.get("WORLD_SIZE", "1") != "1")
                say(f"interrupted: {early}{isinstance(error, KeyboardInterrupt) and str(error) or stopped}")
            return 130
        if (reason := explain(error)) is None:
            raise
        say(f"error: {printable(reason)}")
        return 2
    finally:
        (sys.stdout, sys.stderr), sys.unraisablehook = streams, hook
        for stream in streams:
            _let_go(stream)
        for number, handler in before.items():
            signal.signal(number, handler)


def starts_here(arguments: list[str], command: list[str]) -> bool:
    """Whether Python is about to run one of our modules: sys.argv and sys.orig_argv of `python -m kandinsky5.…`."""
    module = command[command.index("-m") + 1] if arguments[:1] == ["-m"] and "-m" in command else ""
    return module.partition(".")[0] in ("kandinsky5", "weights_convert")


def await_run() -> None:
    """Until `run` begins, let Ctrl-C and SIGTERM end this process with the same line and code."""

    def interrupt(number: int, frame: object) -> None:
        if os.environ.get("RANK", "0") == "0":
            say("interrupted: nothing was written")
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def end(main: Callable[[], int | None]) -> NoReturn:
    """`run`, and the end of the process: what comes after is shutdown, which no signal needs to interrupt."""
    code = run(main)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def explain(error: BaseException) -> str | None:
    """The error in one line, where it is about what was requested; None for a bug."""
    if isinstance(error, argparse.ArgumentError):
        return f"{error}; --help lists the options"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, (MemoryError, RuntimeError, TypeError)):
        found = re.search(AMOUNT, str(error), re.IGNORECASE) or re.search(MEMORY, str(error), re.IGNORECASE)
        if found or isinstance(error, MemoryError):
            phase = "".join(f" while {note}" for note in getattr(error, "__notes__", ()))
            amount = f" ({printable(found[0] if found else error)})" if found or str(error) else ""
            return f"not enough memory{phase}{amount}: try {what_to_try(sys.argv)}"
        if lost := re.search(LOST, str(error), re.IGNORECASE):
            return f"the GPU failed ({lost[1]}): look at it with nvidia-smi, start again, or use --device cpu"
    return None


def what_to_try(arguments: list[str]) -> str:
    """Options that need less memory than a command line with these arguments."""
    if "finetune" in "".join(arguments[:1]):
        return "smaller --sizes, fewer --num-frames, a smaller --batch-size, --checkpointing, or --offload blocks"
    given = {argument.partition("=")[0] for argument in arguments}
    tries = [how for option, how in LESS.items() if (option in given) == (option == "--attention")]
    return ", ".join([*tries, "or less --height, --width or --num-frames"])


def _let_go(stream: TextIO | None) -> None:
    """Flush a stream; what it cannot take is dropped, or Python would try once more at exit and end with code 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors, for `run` to print, and whose description keeps its lines."""

    def __init__(self, *names: Any, **options: Any):
        super().__init__(*names, **{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(f"{message}; --help lists the options")


class Once(argparse.Action):
    """Stores the value; a second one, which would take the place of the first, is an ArgumentError."""

    def __call__(self, parser, namespace, value, option_string=None):
        if getattr(namespace, self.dest, None) is not None:
            raise argparse.ArgumentError(self, "give one")
        setattr(namespace, self.dest, value)


def program(module: str) -> str:
    """What the usage of a command's help calls it: `kandinsky5 NAME` where it was started so."""
    return sys.argv[0] if sys.argv[0].startswith("kandinsky5 ") else f"python -m {module}"


def lora_file(text: str) -> dict[str, Any]:
    """ "camera.safetensors:0.8" → file and weight. Raises ArgumentTypeError for a weight that is no finite number."""
    path, _, weight = text.rpartition(":")
    if ":" not in os.path.splitdrive(text)[1] or os.path.exists(text):
        return {"file": text, "weight": 1.0}
    try:
        if math.isfinite(float(weight)):
            return {"file": path, "weight": float(weight)}
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: after the colon comes a weight, such as :0.8")


def positive(text: str) -> int:
    """A whole number from 1. Raises ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdigit()) or int(text[:9]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1")
    return int(text[:9])


def frame_rate(text: str) -> float:
    """ "24", "23.976" or "24000/1001" → frames per second. Raises ArgumentTypeError for anything else."""
    from fractions import Fraction

    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate: write 24, 23.976 or 24000/1001") from error
