"""Commands: the console command `kandinsky5`, and for all of them one place that prints errors and picks exit codes.

`kandinsky5 sample` is what `python sample.py` is, with the options that the minimal script leaves out. Nothing here
imports PyTorch before the command line is known to be sound.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from kandinsky5.files import check_apart, check_writable, free_name
from kandinsky5.screen import Forgiving, printable, say

AMOUNT = r"tried to allocate [\d.]+ \w+"
MEMORY = (  # PyTorch raises three kinds of error where a tensor is too large
    r"out of memory|Storage size calculation overflowed|Overflow when unpacking"
)
LOST = (  # what CUDA says of a device that no longer answers, or never did for this build or driver
    r"CUDA(?: driver)? error: ([^\n]*(?:lost|launch failure|uncorrectable|unknown error|hardware stack|initialization "
    r"error|busy or unavailable|no kernel image|driver version|system not yet initialized)[^\n]*)"
)
LESS = {  # options that save memory, and how to give them
    "--attention": "--attention auto",
    "--tile-space": "--tile-space",
    "--quantize": "--quantize int8",
    "--offload": "--offload model or blocks (on a GPU)",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")  # what --dtype may be

COMMANDS = {  # name: module whose main(arguments) it is, what it does
    "sample": ("kandinsky5.cli", "make a video from a prompt, or from an image and a prompt"),
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
    if name == "sample":
        return sample(arguments[1:])
    return importlib.import_module(COMMANDS[name][0]).main(arguments[1:]) or 0


def run(main: Callable[[], int | None], stopped: str = "nothing was written") -> int:
    """Call `main` and return the exit code of its process.

    2 after one line "error: …" for ValueError, OSError, argparse's errors and what PyTorch raises when memory runs out;
    130 after one line "interrupted: {stopped}" for Ctrl-C and SIGTERM. Other errors are bugs and keep their traceback.
    Inside, stdout and stderr forgive what cannot be written. `main` should import PyTorch itself: then this covers the
    import.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def ignored(error: "sys.UnraisableHookArgs") -> None:
        if error.exc_type is not KeyboardInterrupt:
            hook(error)
        elif len(interrupts) < 100:  # it came in a callback or destructor, where errors are lost: once more
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

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
            say(f"interrupted: {stopped}")
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
            return f"not enough memory{phase} ({found[0] if found else error}): try {what_to_try(sys.argv)}"
        if lost := re.search(LOST, str(error), re.IGNORECASE):
            return f"the GPU failed ({lost[1]}): look at it with nvidia-smi, start again, or use --device cpu"
    return None


def what_to_try(arguments: list[str]) -> str:
    """Options that need less memory than a command line with these arguments."""
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


SAMPLE_HELP = """\
Make a video from a prompt, or from an image and a prompt.

    python sample.py "a red circle moves left" --enlarge 4   # nano, the small bundled model
    python sample.py "a red fox runs through snow" --checkpoint weights/t2v-lite-sft-5s -o fox.mp4
    python sample.py "the fox looks up" --checkpoint weights/i2v-lite-5s --image fox.jpg --seed 3
    python sample.py "make it night" --checkpoint weights/i2i-lite-sft --image fox.jpg -o night.png
    python sample.py "a red fox in snow" --checkpoint weights/t2v-lite-sft-5s --num-frames 1 -o fox.png
    python sample.py --replay fox.mp4 -o again.mp4           # the same file again, from the settings in it
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  # all as it was, but for the seed

nano knows one or two objects: red, green, blue, yellow, purple or cyan; circle, square, triangle or diamond; big or
small; moves left, right, up or down, grows, shrinks or stays still; in English and Russian. What is not given is the
checkpoint's own default."""
DEFAULTS = {
    "checkpoint": "nano", "image": None, "step_skipping": False, "quality": 8.0, "enlarge": 1, "device": "auto",
    "dtype": "auto", "attention": "auto", "compile": "auto", "offload": None, "tile_space": False, "loras": (),
    "trigger": True, "quantize": None, "expand": False,
}  # fmt: skip
REQUEST = (  # arguments of Request.resolve
    "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift", "schedule",
    "step_skipping", "rope_scale", "seed",
)  # fmt: skip
LOAD = ("device", "dtype", "attention", "offload", "compile", "tile_space", "quantize")  # arguments of Pipeline.load


def sample(arguments: list[str] | None = None) -> int:
    """What sample.py does, with replays, previews and the rarer options. Raises ValueError or OSError."""
    options, unknown = build_sample_parser().parse_known_args(arguments)
    if unknown:
        raise ValueError(f"cannot use {' '.join(unknown)}: a prompt goes in quotes, and --help lists the options")
    given = vars(options)
    replayed, place = given.pop("replay", None), given.pop("preview", None)
    output = check_places(given, replayed, place)
    with _replaying(replayed):
        from kandinsky5 import Pipeline, video_io  # takes seconds
        from kandinsky5.checkpoint import find_checkpoint
        from kandinsky5.config_file import load_config
        from kandinsky5.extras import expand, lora, notes, preview, replay
        from kandinsky5.request import LONGEST_SIDE, Request

        settings = DEFAULTS | (replay.read_settings(replayed, given) if replayed else {}) | given
        folder = find_checkpoint(settings["checkpoint"])
        config = load_config(folder / "config.json")
        _read_ratios(settings)
        requested = {name: settings[name] for name in REQUEST if name in settings}
        request = Request.resolve(config, settings["prompt"], settings["image"], **requested)
        settings.setdefault("fps", config.sampling.fps)
        instruction = None
        if how := settings["expand"]:
            one_frame, file = request.num_frames == 1, how if isinstance(how, str) else None
            instruction = expand.choose_instruction(config, settings["image"] is not None, one_frame, file)
        output = check_output(output, request.num_frames, settings["fps"], settings["quality"])
        enlarge = settings["enlarge"]
        if not 1 <= enlarge <= 16 or max(request.height, request.width) * enlarge > LONGEST_SIDE:
            raise ValueError(f"enlarge {enlarge}: give 1 to 16, with which no side passes {LONGEST_SIDE} pixels")
        loras = lora.open_all(settings["loras"], config.dit)
        show = None if place is None else preview.open_place(place)

        pipe = Pipeline.load(folder, **{name: settings[name] for name in LOAD})
        for one, requested_lora in zip(loras, settings["loras"], strict=True):
            pipe.load_lora(one, requested_lora["weight"], settings["trigger"])
        if instruction:
            settings |= {"expanded_from": settings["prompt"], "instruction_sha256": instruction.sha256}
            request = expand.expand_request(pipe.text_encoder, request, instruction, settings["image"])
        notes.show(request, pipe, folder)
        callback = show and preview.build_callback(pipe.vae, show, every=-(-request.steps // 10))  # 10 at most
        frames = pipe.generate(request, callback)[0]  # (F, H, W, 3)
        frames = frames.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
        known = replay.describe(request, pipe, **settings) if settings.get("metadata", True) else None
        video_io.write_video(output, frames, settings["fps"], settings["quality"], known, keep=True)
    count, height, width, _ = frames.shape
    print(printable(f"{output}: {count} frame{'s' * (count > 1)} of {height}x{width}, seed {request.seeds[0]}"))
    return 0


def check_places(given: dict[str, Any], replayed: str | None, place: str | bool | None) -> Path | None:
    """The file to write if one is named, once what is wrong without any model was refused: ValueError or OSError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        raise ValueError("several processes would all make the same video: run sample.py without torchrun")
    if given.get("prompt") is None and replayed is None:
        raise ValueError('no prompt: give one, python sample.py "a red fox runs through snow", or --replay FILE')
    named = given.pop("output", None)
    output = Path(named) if named else None
    files = ("image", "step_skipping", "expand", "checkpoint")
    inputs = {f"--{name.replace('_', '-')}": given.get(name) for name in files}
    inputs |= {f"--lora {i}": one["file"] for i, one in enumerate(given.get("loras", ()), start=1)}
    check_apart({"-o": output, "--preview": place}, inputs | {"--replay": replayed})
    usual = {"num_frames": 1, "fps": 24, "quality": 8}
    check_output(output, **usual | {name: given[name] for name in usual if given.get(name) is not None})
    return output


def check_output(output: Path | None, num_frames: int, fps: float, quality: float = 8) -> Path:
    """`output`, or the next free out.mp4; for one frame out.png. Raises ValueError or OSError, as `check_writable`."""
    output = output or free_name("out.png" if num_frames == 1 else "out.mp4")
    check_writable(output, num_frames, fps, quality)
    return output


@contextlib.contextmanager
def _replaying(path: str | None) -> Iterator[None]:
    """Errors say which file was replayed: what is wrong may stand there."""
    try:
        yield
    except (ValueError, OSError) as error:
        if path is None or path in str(error):
            raise
        raise type(error)(f"replaying {path}: {error}") from error


def _read_ratios(settings: dict[str, Any]) -> None:
    """Replace a file of ratios by what it holds, as the file may change before a replay."""
    if isinstance(settings["step_skipping"], str):
        import dataclasses

        from kandinsky5.extras import magcache

        settings["step_skipping"] = dataclasses.asdict(magcache.load(settings["step_skipping"]))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors, for `run` to print."""

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(f"{message}; --help lists the options")


def program(module: str) -> str:
    """What the usage of a command's help calls it: `kandinsky5 NAME` where it was started so."""
    return sys.argv[0] if sys.argv[0].startswith("kandinsky5 ") else f"python -m {module}"


def build_sample_parser() -> Parser:
    """All options of sample.py. Only those that are given are in what it returns."""
    from kandinsky5.config import NANO_NAMES

    parser = Parser(
        usage=argparse.SUPPRESS,
        description=SAMPLE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="?",
        help='what to show; long descriptions work best, up to 256 tokens (images: 512); "": anything',
    )
    add("--checkpoint", metavar="DIR", help=f"converted checkpoint, or {', '.join(NANO_NAMES)} (default: nano)")
    add(
        "--image",
        metavar="FILE",
        help="first frame, or what to edit (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF); for i2v and i2i",
    )
    add("--expand", nargs="?", const=True, type=file(".txt"), metavar="FILE.txt",
        help="let Qwen write the prompt out in detail; by our instruction, or by yours with {} in it")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", help="what to avoid; no effect at --guidance 1")
    add("--height", type=int, metavar="PX", help="a multiple of 16, with NABLA of 128")
    add("--width", type=int, metavar="PX", help="likewise; with --image both default to its shape")
    add("--num-frames", type=int, metavar="N", help="4k + 1; 121 are 5 seconds at 24 per second; 1: an image")
    add("--steps", type=int, dest="num_inference_steps", metavar="N", help="more are slower and finer")
    add("--guidance", type=float, dest="guidance_scale", metavar="W",
        help="classifier-free guidance scale; 1 disables it and halves the time; below 1 it is applied as it "
        "stands, away from the prompt (diffusers switches it off)")  # fmt: skip
    add("--shift", type=float, metavar="S", help="above 1, more of the steps go to the noisy end")
    add("--schedule", choices=("official", "diffusers"), help="spacing of the steps (default: official)")
    add("--step-skipping", nargs="?", const=True, type=file(".json"), metavar="RATIOS.json",
        help="about half the time, not quite the same video; by known ratios, or `kandinsky5 magcache`'s")  # fmt: skip
    add("--seed", type=int, metavar="N", help="another seed, another video (default: 0)")
    add("--fps", type=frame_rate, metavar="N", help="frames per second, such as 24 or 30000/1001; changes the speed")
    add("--quality", type=float, metavar="Q", help="of the file, 1 to 10 (default: 8)")
    add("--enlarge", type=factor, metavar="N", help="repeat each pixel N × N times, for the small videos of nano")
    add("--device", metavar="NAME", help="such as cuda:1 (default: auto, a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="of the models (default: auto, bfloat16 where the device computes in it)")
    add("--attention", choices=("auto", "sdpa", "chunked", "flex", "dense"), help="its kernel (default: auto)")
    add("--preview", nargs="?", const=True, type=file(".png"), metavar="FILE.png",
        help="show the middle frame while sampling, in the terminal or in a file")  # fmt: skip
    add("--offload", choices=("model", "blocks"), help="keep on the device only the running model, or its block")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile, whose first video takes longer (default: on CUDA)",
    )
    add("--tile-space", action=argparse.BooleanOptionalAction, help="VAE in tiles of 256 pixels: less memory")
    add("--quantize", choices=("int8",), help="weights of the DiT and Qwen in 8 bits: half the memory of bfloat16")
    add("--lora", action="append", dest="loras", type=lora_file, metavar="FILE[:WEIGHT]",
        help="adapt the model: a LoRA in any layout, with a weight if not 1; repeatable")  # fmt: skip
    add("--no-trigger", action="store_false", dest="trigger", help="leave out the trigger phrases of LoRAs")
    add("--replay", metavar="FILE", help="take the settings from a file of sample.py; other options win")
    add("--no-metadata", action="store_false", dest="metadata", help="write no settings (the prompt!) into the file")
    add("-o", "--output", metavar="FILE", help=".mp4, or .png for one frame (default: out.mp4, or the next free name)")
    return parser


def file(suffix: str) -> Callable[[str], str]:
    """For options whose value may be left out: a prompt after them is not taken for it but an ArgumentTypeError."""

    def check(path: str) -> str:
        if not path.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"{path!r} does not end in {suffix}; a prompt goes before the options")
        return path

    return check


def lora_file(text: str) -> dict[str, Any]:
    """ "camera.safetensors:0.8" → file and weight. Raises ArgumentTypeError for a weight that is no finite number."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return {"file": text, "weight": 1.0}
    try:
        if math.isfinite(float(weight)):
            return {"file": path, "weight": float(weight)}
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: after the colon comes a weight, such as :0.8")


def frame_rate(text: str) -> float:
    """ "24", "23.976" or "24000/1001" → frames per second. Raises ArgumentTypeError for anything else."""
    from fractions import Fraction

    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate: write 24, 23.976 or 24000/1001") from error


def factor(text: str) -> int:
    """A whole number from 1 to 16. Raises ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 to 16")
    return int(text)
