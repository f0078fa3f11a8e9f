"""The settings that a video file carries, and a video made again from them.

    python sample.py --replay fox.mp4 -o again.mp4           the same bytes
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  options take precedence over the recorded settings

A file may come from a stranger. What it says is checked as if typed, and shown; device, compile and offload come from
the command line alone, and what a recorded path leads to must have the recorded hash. Nor does a file tell strangers
where its maker's files are: it holds relative paths, or names. In dictionaries `given` are the options of the command
line, `recorded` what the file says.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kandinsky5 import __version__, video_io
from kandinsky5.checkpoint import find_checkpoint, fingerprint
from kandinsky5.config import NANO_NAMES
from kandinsky5.config_file import from_json, load_config
from kandinsky5.extras import lora
from kandinsky5.files import sha256
from kandinsky5.request import Request
from kandinsky5.runtime.compile import is_compiled
from kandinsky5.runtime.device import choose_device, is_native
from kandinsky5.screen import listed, printable, say

if TYPE_CHECKING:
    from kandinsky5.pipeline import Pipeline

MOST_STEPS = 1000  # that a file may request; more need --steps
OWN = ("device", "compile", "version", "model", "image_sha256", "fingerprint")  # recorded, but not settings of a replay
FROM_CHECKPOINT = (
    "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "shift", "fps",
    "rope_scale",
)  # fmt: skip
USUAL: dict[str, Any] = {"step_skipping": False, "attention": "auto", "tile_space": False, "quality": 8.0}
OF_REQUEST = ("height", "width", "num_frames", "guidance_scale", "shift", "schedule", "rope_scale")
HOW = (  # settings that are not the request's
    "step_skipping", "fps", "quality", "attention", "tile_space", "quantize", "enlarge", "trigger", "expanded_from",
    "instruction_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA that a video was made with."""

    file: str
    weight: float
    fingerprint: str


@dataclass(frozen=True)
class Settings:
    """All that a video file depends on, and so all that it carries."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    schedule: str
    step_skipping: bool | dict
    rope_scale: tuple[float, float, float]
    seed: int
    image: str | None
    image_sha256: str | None
    fps: float
    quality: float
    checkpoint: str
    fingerprint: str  # of the checkpoint
    model: str
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    device: str
    attention: str
    compile: bool
    tile_space: bool
    version: str
    enlarge: int = 1
    loras: tuple[Lora, ...] = ()
    quantize: Literal["int8"] | None = None
    trigger: bool = True  # whether their trigger phrases are put before the prompt
    expanded_from: str | None = None  # the prompt as given, where it was expanded (expand.py)
    instruction_sha256: str | None = None  # of the instruction that it was expanded by


def describe(
    request: Request, pipe: "Pipeline", checkpoint: str, image: str | None = None,
    paths: dict[str, str | None] | None = None, loras: Sequence[dict] = (), **how: Any,
) -> dict:  # fmt: skip
    """The metadata of a file: its request, checkpoint and image, and `how` it was run and written (see Settings).

    paths: of a replay, the recorded ones. They stay as they are, so that its file has the same bytes.
    loras: file and weight of those that the pipeline has loaded, and of a replay the recorded path.
    """
    shown: dict[str, Any] = {"checkpoint": checkpoint, "image": image} | (paths or {})
    how = USUAL | {name: value for name, value in how.items() if name in HOW}
    settings = Settings(
        **how,
        prompt=request.prompts[0],
        negative_prompt=request.negative_prompts[0],
        num_inference_steps=request.steps,
        seed=request.seeds[0],
        **{name: getattr(request, name) for name in OF_REQUEST},
        image=shown["image"] and _portable(shown["image"]),
        image_sha256=image and sha256(image),
        checkpoint=_portable(shown["checkpoint"]),
        fingerprint=fingerprint(find_checkpoint(checkpoint)),
        model=pipe.config.name,
        compile=is_compiled(pipe.dit),
        dtype=str(pipe.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        device=pipe.device.type,
        version=__version__,
        loras=tuple(
            Lora(_portable(given.get("recorded", given["file"])), given["weight"], one.fingerprint)
            for given, one in zip(loras, pipe.loras, strict=True)
        ),
    )
    return dataclasses.asdict(dataclasses.replace(settings, fps=float(settings.fps)))


def read_settings(path: str, given: dict) -> dict:
    """What the file at `path` records for a replay with the options `given`. Raises ValueError for invalid ones."""
    recorded = _read(path)
    if recorded["num_inference_steps"] > MOST_STEPS and "num_inference_steps" not in given:
        raise ValueError(f"{path} requests num_inference_steps {recorded['num_inference_steps']}: confirm with --steps")
    if given.get("expand") and "prompt" not in given and recorded["expanded_from"] is not None:
        raise ValueError(f"the prompt of {path} was expanded already: leave --expand out, or give another prompt")
    if "prompt" in given or given.get("expand"):
        recorded |= {"expanded_from": None, "instruction_sha256": None}
    paths = {name: recorded[name] for name in ("image", "checkpoint") if name not in given}
    for name in ("image", "checkpoint"):
        recorded[name] = given[name] if name in given else _find(path, name, recorded)
    if "image" not in given and recorded["image"] and sha256(recorded["image"]) != recorded["image_sha256"]:
        raise ValueError(
            f"{recorded['image']} is not the image that {path} was made from: bring that back, or take this one with "
            "--image"
        )
    if "loras" not in given:
        recorded["loras"] = [_find_lora(path, one) for one in recorded["loras"]]
    folder = find_checkpoint(recorded["checkpoint"])
    made_by = recorded["model"], recorded["fingerprint"]
    this = load_config(folder / "config.json").name, fingerprint(folder)
    if this != made_by and "checkpoint" not in given:
        raise ValueError(
            f"{recorded['checkpoint']} has changed since {path} was made with it: bring the old weights back, or take "
            f"these for another video with --checkpoint {recorded['checkpoint']}"
        )
    if this != made_by:
        then, now = (f"{name} ({digest[:8]})" for name, digest in (made_by, this))
        own = "; its own steps, guidance, shift and size hold" * (made_by[0] != this[0])
        say(printable(f"note: {path} was made by {then}, this is {now}{own}"))
    if this[0] != made_by[0]:
        recorded = {name: value for name, value in recorded.items() if name not in FROM_CHECKPOINT}
    if given.keys() & {"height", "width"}:
        recorded.pop("rope_scale", None)  # which the size decides
    _show(path, recorded, given)
    return {name: value for name, value in recorded.items() if name not in OWN} | {"paths": paths}


def _find(path: str, name: str, recorded: dict) -> str | None:
    """Where a recorded image or checkpoint is: the first place that has the recorded hash, or else the first at all."""
    place = recorded[name]
    if place is None or name == "checkpoint" and place in NANO_NAMES:
        return place
    there = [
        found for found in _places(path, place) if os.path.isfile(found if name == "image" else found / "config.json")
    ]
    if not there:
        lost = printable(place, 300)
        raise ValueError(
            f"{path} was made with the {name} {lost}, found neither here nor next to it: say where it is, --{name}"
        )
    return str(next((found for found in there if _is_recorded(found, name, recorded)), there[0]))


def _find_lora(path: str, recorded: dict) -> dict:
    """File and weight of a recorded LoRA: the first place that has the recorded fingerprint. Raises ValueError."""
    file, there = recorded["file"], False
    for found in _places(path, file):
        with contextlib.suppress(ValueError, OSError):  # not there, damaged, or of another kind
            there = found.exists() or there
            if lora.load(found).fingerprint == recorded["fingerprint"]:
                return {"file": str(found), "weight": recorded["weight"], "recorded": file}
    what = "which has changed since" if there else "found neither here nor next to it"
    lost = printable(file, 300)
    raise ValueError(f"{path} was made with the LoRA {lost}, {what}: say where it is, --lora FILE:WEIGHT")


def _places(path: str, recorded: str) -> list[Path]:
    """Where to look for what the file at `path` recorded: relative to here, to it and above, and by name alone."""
    where = Path(path).absolute().parent
    places = [folder / recorded for folder in (Path(), where, *where.parents)]  # the video may be in a subfolder
    return places + [folder / Path(recorded).name for folder in (Path(), where)]


def _is_recorded(found: Path, name: str, recorded: dict) -> bool:
    with contextlib.suppress(ValueError, OSError):  # damaged, or of another kind
        if name == "image":
            return sha256(found) == recorded["image_sha256"]
        return fingerprint(found) == recorded["fingerprint"]
    return False


def _read(path: str) -> dict:
    found = video_io.read_metadata(path)
    fields = dataclasses.fields(Settings)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{path} does not say its {', '.join(missing)}: give a file that sample.py wrote")
    known = {field.name: found[field.name] for field in fields if field.name in found}
    try:
        return dataclasses.asdict(from_json(Settings, known))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds damaged settings ({error}): give a file that sample.py wrote") from error


def _show(path: str, recorded: dict, given: dict) -> None:
    """Lines on stderr: what is going to be made, and what of the file a replay leaves out or is slow at."""
    now = recorded | given
    size = "{height}x{width}, frames: {num_frames}, steps: {num_inference_steps}, "
    size = size.format(**now) if now.keys() >= set(FROM_CHECKPOINT[1:5]) else ""
    files = [now["checkpoint"], now["image"], *(one["file"] for one in recorded["loras"] if "loras" not in given)]
    shown = f'"{printable(now["prompt"], 100)}", {size}seed {now["seed"]}, with {listed(list(filter(None, files)))}'
    say(printable(f"replaying {path}: {shown}"))
    if recorded["version"] != __version__:
        versions = f"version {recorded['version']}, this is {__version__}: they may draw it differently"
        say(printable(f"note: {path} was made by {versions}"))
    device = choose_device(given.get("device", "auto"))
    if recorded["compile"] and "compile" not in given:
        say(f"note: {path} was made with --compile: without it the video differs by rounding")
    if recorded["device"] != device.type:
        say(printable(f"note: {path} was made on {recorded['device']}: on {device.type} it differs by rounding"))
    dtype = given.get("dtype", recorded["dtype"])
    if dtype != "auto" and not is_native(getattr(torch, dtype), device):
        say(
            f"note: this {device.type} emulates {dtype}, which is slow; --dtype float32 is fast and differs by rounding"
        )


def _portable(path: str) -> str:
    """A path as a file may carry it: relative to the current folder; the name, where that would be the whole path.

    With / on Windows too, so that another system can read it.
    """
    whole, here = os.path.abspath(path), os.getcwd()
    try:
        common = os.path.commonpath([whole, here])
    except ValueError:  # two drives of Windows
        return os.path.basename(whole)
    if os.path.isabs(path) and common == os.path.dirname(common):
        return os.path.basename(whole)
    return os.path.relpath(whole, here).replace(os.sep, "/")
