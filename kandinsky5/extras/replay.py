"""What a video file of sample.py carries: the settings that it was made from, so that it can be made again.

    python sample.py --replay fox.mp4 -o again.mp4           the same bytes
    python sample.py --replay fox.mp4 --seed 4 -o other.mp4  what is given wins over what is recorded

In dictionaries here `given` are the options of the command line, `recorded` what the file says, and `settings` what
holds: the defaults, over them what is recorded, over that what is given.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import kandinsky5
from kandinsky5 import video_io
from kandinsky5.config_file import from_json
from kandinsky5.extras import magcache


@dataclass(frozen=True)
class Settings:
    """All that a file of sample.py depends on, and so all that it carries."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    schedule: str
    step_skipping: bool | magcache.StepSkipping
    rope_scale: tuple[float, float, float]
    seed: int
    image: str | None
    image_sha256: str | None
    fps: int
    quality: float
    checkpoint: str
    fingerprint: str  # of the checkpoint
    model: str
    dtype: Literal["bfloat16", "float16", "float32"]
    device: str
    attention: str
    compile: bool
    tile_space: bool
    version: str


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


def read_settings(path: str, given: dict) -> dict:
    """What sample.py wrote into the file at `path`; ValueError if that, or a file that it needs, is not there."""
    found = video_io.read_metadata(path)
    if missing := [name for name in SETTINGS if name not in found]:
        raise ValueError(f"{path} does not say its {', '.join(missing)}: give a file that sample.py wrote")
    try:
        recorded = dataclasses.asdict(from_json(Settings, {name: found[name] for name in SETTINGS}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds damaged settings ({error}): give a file that sample.py wrote") from error
    for name in ("image", "checkpoint"):
        place = recorded[name]
        if name not in given and place is not None and Path(place).is_absolute() and not Path(place).exists():
            raise ValueError(f"{path} was made with the {name} {place}, which is gone: say where it is, --{name}")
    if recorded["version"] != kandinsky5.__version__:
        versions = f"version {recorded['version']}, this is {kandinsky5.__version__}: they may draw it differently"
        print(f"note: {path} was made by {versions}", file=sys.stderr)
    return recorded


def check_output(path: str, output: str, given: dict) -> None:
    """ValueError if another video would take the place of the replayed file, the only one that knows its settings."""
    if given.keys() & set(SETTINGS) and Path(output).exists() and Path(output).samefile(path):
        raise ValueError(f"with other options {path} would be lost: say where the new video goes, -o FILE")


def check_image(path: str, settings: dict, recorded: dict) -> None:
    """ValueError if the image is not the one that the file at `path` was made from."""
    if settings["image_sha256"] != recorded["image_sha256"]:
        raise ValueError(
            f"{settings['image']} has changed since {path} was made from it: bring the old image back, "
            "or take this one with --image"
        )


def check_checkpoint(path: str, settings: dict, recorded: dict, given: dict) -> None:
    """ValueError if the weights have changed since the file at `path` was made; a note if others were asked for."""
    if settings["fingerprint"] != recorded["fingerprint"] and "checkpoint" not in given:
        raise ValueError(
            f"{settings['checkpoint']} has changed since {path} was made with it: bring the old weights back, "
            f"or take these for another video with --checkpoint {settings['checkpoint']}"
        )
    made_by = f"{recorded['model']} ({recorded['fingerprint'][:8]})"
    this = f"{settings['model']} ({settings['fingerprint'][:8]})"
    if made_by != this:
        own = "; its own steps, guidance, shift and size hold" * (recorded["model"] != settings["model"])
        print(f"note: {path} was made by {made_by}, this is {this}{own}", file=sys.stderr)


def to_metadata(settings: dict) -> dict:
    """What goes into the file: all of `Settings`, with whole paths, as the replay may start in another folder."""
    metadata = {name: settings[name] for name in SETTINGS}
    for name in ("image", "checkpoint"):
        if metadata[name] is not None and Path(metadata[name]).exists():
            metadata[name] = str(Path(metadata[name]).resolve())
    return metadata
