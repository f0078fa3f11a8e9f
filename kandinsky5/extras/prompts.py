"""Many prompts: a file of them, a video of each, made one after the other or by groups of ranks at once.

    python sample.py --prompts foxes.txt --checkpoint weights/lite -o foxes
    torchrun --nproc-per-node 8 sample.py --prompts foxes.jsonl --checkpoint weights/lite --ranks 2x2 -o foxes

In a .txt file each line that is not empty is a prompt. In a .jsonl file each is an object with a "prompt" and what it
has of the other SETTINGS; an image's path is relative to the file. A line makes the video that `sample.py` makes with
these options. Its name holds a hash of all that it depends on, so a second run skips what is there.
"""

import contextlib
import csv
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kandinsky5.files import make_folder, parse_json, read_utf8, replacing, sha256
from kandinsky5.request import MOST_VIDEOS
from kandinsky5.runtime import launch
from kandinsky5.screen import printable, say, shown

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

LARGEST = 2**24  # bytes of such a file
SAME = "prompt negative_prompt image height width num_frames shift schedule seed fps".split()
SETTINGS = {name: name for name in SAME} | {"steps": "num_inference_steps", "guidance": "guidance_scale"}  # of a line
HOW_ONLY = ("device", "compile", "offload", "metadata", "ranks", "shard")  # options that do not change a video


class Video(NamedTuple):
    """A row of the table."""

    file: str
    prompt: str
    seed: int
    seconds: float | None  # None where it was there already


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """The settings of each line, by "FILE, line NUMBER". Raises ValueError, which says so, for no prompt or setting."""
    path, lines = Path(path), dict[str, dict[str, Any]]()
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: name it .txt for one prompt per line, or .jsonl for one object per line")
    text = read_utf8(path, LARGEST)
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):  # splitlines knows more ends than JSON
        if line.strip():
            if len(lines) == MOST_VIDEOS:
                raise ValueError(f"{path} holds more than {MOST_VIDEOS:,} prompts: give them in several files")
            where, one = f"{path}, line {number}", {"prompt": line.strip()}
            lines[where] = _read_object(line, where, path.parent) if path.suffix.lower() == ".jsonl" else one
    if not lines:
        raise ValueError(f"{path} holds no prompt: write one per line")
    return lines


def _read_object(line: str, where: str, folder: Path) -> dict[str, Any]:
    found = parse_json(line.encode(), where)
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{where}: write an object with a prompt, such as {{"prompt": "a fox", "seed": 3}}')
    if unknown := [name for name in found if name not in SETTINGS]:
        raise ValueError(f"{where}: there is no setting {shown(unknown[0])}; choose from {', '.join(SETTINGS)}")
    if (image := found.get("image")) is not None:
        if not isinstance(image, str):
            raise ValueError(f"{where}: image {shown(image)}: give the path of a file")
        found["image"] = str(folder / image)
    if (fps := found.get("fps")) is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float))):
        raise ValueError(f"{where}: fps {shown(fps)}: give a number")
    return {SETTINGS[name]: value for name, value in found.items() if value is not None}


def name_video(settings: dict[str, Any], origin: str, one_frame: bool) -> str:
    """The name of a file: the prompt's first words, and a hash of its settings, its image and its `origin`.

    origin: the fingerprints of checkpoint and LoRAs.
    """
    encoding = sys.getfilesystemencoding()  # not every locale has all letters
    words = settings["prompt"].lower().encode(encoding, "ignore").decode(encoding)
    words = re.sub(r"\W+", "-", words).strip("-")[:40].strip("-") or "video"
    known = {name: value for name, value in settings.items() if name not in HOW_ONLY}
    if known.get("image"):
        known["image"] = sha256(known["image"])  # wherever it lies
    digest = hashlib.sha256(json.dumps([known, origin], sort_keys=True, default=str).encode()).hexdigest()
    return f"{words}-{digest[:10]}.{'png' if one_frame else 'mp4'}"


def make_all(jobs: Sequence[Any], make: Callable[[Any], object], ranks: "Ranks | None") -> list[Video]:
    """Let `make(job)` write each job's `output` that is not there; returns the table, and writes it as videos.csv.

    Groups of ranks take every so many of the jobs, each of which has a request too.
    """
    jobs = list({job.output: job for job in jobs}.values())  # a line may be there twice
    folder = jobs[0].output.parent
    make_folder(folder)
    groups, group, leads = (ranks.data, ranks.place("data"), not ranks.place("team")) if ranks else (1, 0, True)
    found = launch.meet([job.output.name for job in jobs if job.output.exists()])  # on each machine, if folders differ
    there = {name for names in found for name in names}
    made: list[Video] = []
    for number, job in enumerate(jobs, start=1):
        start, seconds = time.monotonic(), None
        if (number - 1) % groups != group:
            continue
        if job.output.name not in there:
            say(f"[{number}/{len(jobs)}] {printable(job.request.prompts[0], 100)}")
            try:
                make(job)
            except KeyboardInterrupt as error:
                error.args = ("finished files stay; the same command makes the others",)
                raise
            seconds = round(time.monotonic() - start, 1)
        made.append(Video(job.output.name, job.request.prompts[0], job.request.seeds[0], seconds))
    videos = [Video(*row) for rows in launch.meet(made if leads else []) for row in rows]
    order = {job.output.name: number for number, job in enumerate(jobs)}
    videos.sort(key=lambda video: order[video.file])
    if launch.rank() == 0:
        write_table(videos, folder / "videos.csv")
    return videos


def write_table(videos: list[Video], path: Path) -> None:
    """Write the table as CSV; seconds of what was there already are those of the table that was there."""
    before = {}
    with contextlib.suppress(ValueError, OSError, csv.Error):  # not there, or another program's
        table = io.StringIO(read_utf8(path, LARGEST), newline="")
        before = {row.get("file"): row.get("seconds") for row in csv.DictReader(table)}
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Video._fields)
        for video in videos:
            writer.writerow([*video[:-1], before.get(video.file) if video.seconds is None else video.seconds])


def show(videos: list[Video]) -> str:
    """The table as text, a line for each file."""
    rows = [(v.file, "was there" if v.seconds is None else f"{v.seconds:.1f} s", str(v.seed)) for v in videos]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    prompts = (printable(video.prompt, 60) for video in videos)
    return "\n".join(f"{line}  {prompt}" for line, prompt in zip(lines, prompts, strict=True))
