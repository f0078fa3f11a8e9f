"""Lines on stderr about requests that can be met, but slowly, or are unlikely to give a good video."""

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config import PipelineConfig
from kandinsky5.nano.captions import split_words, vocabulary
from kandinsky5.request import Request
from kandinsky5.runtime.compile import is_compiled
from kandinsky5.runtime.device import compiler_missing, is_native
from kandinsky5.screen import printable, say
from kandinsky5.text_encoder import TextEncoder

if TYPE_CHECKING:
    from kandinsky5.pipeline import Pipeline

# What the bundled models know that is nearest in meaning to words that people try, by how these begin.
NEAREST = {
    "jump": "moves up", "rise": "moves up", "fly": "moves up", "flies": "moves up", "fall": "moves down",
    "drop": "moves down", "run": "moves left", "walk": "moves left", "roll": "moves right", "rest": "stays still",
    "explo": "grows", "ball": "circle", "sphere": "circle", "disc": "circle", "disk": "circle", "star": "diamond",
    "rhomb": "diamond", "cube": "square", "box": "square", "rect": "square", "pyramid": "triangle",
    "orange": "yellow", "gold": "yellow", "pink": "purple", "violet": "purple", "turquoise": "cyan", "tiny": "small",
    "huge": "big", "прыг": "движется вверх", "лети": "движется вверх", "пада": "движется вниз",
    "беж": "движется влево", "кати": "движется вправо", "мяч": "круг", "шар": "круг", "диск": "круг",
    "звезд": "ромб", "куб": "квадрат", "прямоуг": "квадрат", "пирамид": "треугольник", "оранж": "жёлтый",
    "розов": "фиолетовый", "бирюз": "голубой",
}  # fmt: skip


def show(request: Request, pipe: "Pipeline", folder: Path) -> None:
    """All notes on a request to a pipeline loaded from `folder`."""
    note_other_size(request, folder, pipe.config)
    note_other_shape(request, pipe.config)
    if folder.parent == SHIPPED and not pipe.loras:  # which teach words
        note_unknown_words(request.prompts[0], pipe.config.name)
    note_file_as_prompt(request.prompts[0])
    note_long_prompt(request.prompts[0], pipe.text_encoder)
    device, nabla = pipe.device, pipe.config.dit.nabla is not None
    native, missing = is_native(torch.bfloat16, device), compiler_missing(device.type)
    for line in advise(device.type, native, pipe.dtype, is_compiled(pipe.dit), nabla, missing):
        say(f"note: {line}")
    for one in pipe.loras:
        if one.before_prompt:
            say(printable(f"note: the LoRA {one.name} puts {one.trigger!r} before the prompt; --no-trigger does not"))


def advise(
    device: str, native: bool, dtype: torch.dtype, compiled: bool, nabla: bool, missing: str | None
) -> Iterator[str]:
    """What to know about speed on a device of this type, of which `missing` says what its compiler lacks.

    native: whether it multiplies bfloat16 without emulating it. Nothing on a CPU, whose defaults are measured.
    """
    if device == "cuda" and not native and dtype != torch.float16:
        yield f"this GPU has no fast {str(dtype).removeprefix('torch.')}: --dtype float16 is several times faster"
    if device == "cuda" and missing:
        tiles = ", and NABLA gathers its tiles, several times slower than compiled" * nabla
        yield f"nothing is compiled{tiles}, as there is no {missing}"
    if device == "cuda" and compiled:
        yield "the first step compiles the DiT's blocks, which takes a minute or more (--no-compile does without)"
    if device not in ("cpu", "cuda", "meta"):
        yield f"this code was never run on {device}: compare a video with one of --device cpu"


def note_other_size(request: Request, folder: Path, config: PipelineConfig) -> None:
    """Where a request to a bundled model differs in size or length from what it was trained on."""
    trained = (config.sampling.num_frames, config.sampling.height, config.sampling.width)
    if (request.num_frames, request.height, request.width) != trained and folder.parent == SHIPPED:
        say(
            f"note: {config.name} was trained on {trained[0]} frames of {trained[1]}x{trained[2]} alone, and draws "
            "other sizes and lengths worse: leave out --height, --width and --num-frames, or give an image that fits"
        )


def note_other_shape(request: Request, config: PipelineConfig) -> None:
    """Where an image is requested in a size that its model was not trained on."""
    sizes = config.sampling.sizes
    if sizes and (request.height, request.width) not in sizes:
        trained = ", ".join(f"{height}x{width}" for height, width in sizes)
        say(f"note: {config.name} was trained on {trained}; other sizes may come out worse")


def note_unknown_words(prompt: str, model: str, most: int = 6) -> None:
    """Where a prompt has words that no caption of the nano world has: which, and the nearest that there are."""
    known = vocabulary()
    unknown = list(dict.fromkeys(word for word in split_words(prompt) if word not in known))
    shown = []
    for word in unknown[:most]:
        meant = [NEAREST[stem] for stem in NEAREST if word.startswith(stem)]
        nearest = meant or difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        shown.append(printable(word, 40) + (f" (nearest: {nearest[0]})" if nearest else ""))
    if unknown:
        more = f" and {len(unknown) - most} more" if len(unknown) > most else ""
        say(
            f"note: {model} does not know {', '.join(shown)}{more}, and draws something else instead; --help lists the "
            "colours, shapes, sizes and motions that it knows"
        )


def note_file_as_prompt(prompt: str) -> None:
    """Where a prompt is the name of a file."""
    if os.path.isfile(prompt):
        say("note: the prompt is the name of a file: an image goes behind --image, a file of prompts behind --prompts")


def note_long_prompt(prompt: str, text_encoder: TextEncoder) -> None:
    """Where Qwen, or CLIP, does not read the whole prompt."""
    empty, whole = (len(text_encoder.qwen_ids(text, sys.maxsize)) for text in ("", prompt))
    most = text_encoder.config.max_tokens
    if (cut := whole - empty - most) > 0:
        say(f"note: of a prompt {most} tokens are read, and this one has {cut} more: shorten it")
    room = text_encoder.clip.config.max_positions - 2  # start and end
    if cut <= 0 and (more := len(text_encoder.clip_tokenizer.encode(prompt)) - room) > 0:
        say(
            f"note: CLIP reads {room} tokens of a prompt, and this one has {more} more: begin with what matters most; "
            "Qwen reads all of it"
        )
