"""A folder of footage and captions -> the clips that a model trains on, before anything is encoded.

    fox.mp4, fox.txt      a caption next to each file, or for all of them one captions.jsonl ({"file": …, "text": …} per
    river/boat.mov, …     line) or captions.csv (columns file, text); subfolders count, hidden ones do not

A caption that is missing, empty or not UTF-8 stops everything: training on wrong words is not seen for days. Footage
without a usable clip is left out, with a line that names it; damaged files stop everything unless they may be skipped.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kandinsky5 import screen
from kandinsky5.config import PipelineConfig
from kandinsky5.files import parse_json, read_utf8, sha256
from kandinsky5.request import check_size
from kandinsky5.screen import listed, printable
from kandinsky5.training.footage import IMAGES, VIDEOS, Footage, Unusable, nearest_size, probe, read_frames

TABLES = ("captions.jsonl", "captions.csv")
CUTS = ("start", "middle", "random")
REMEDY = "repair or remove it, or leave such files out with --skip-damaged"
LONGEST_CAPTION = 100_000  # characters, as of a prompt
LONGEST_TABLE = 2**28  # bytes of a captions file: a million long captions


@dataclass(frozen=True)
class ClipSettings:
    """How footage becomes clips. Raises ValueError for what the model has no grid for."""

    sizes: tuple[tuple[int, int], ...]  # (height, width): footage takes the one nearest in shape
    num_frames: int  # of each clip, 4k + 1
    fps: float  # the model's
    cut: str = "start"  # where the clips of longer footage come from: "start", "middle" or "random"
    per_file: int = 1  # clips of one long file, at most
    trigger: str = ""  # phrase put before every caption
    seed: int = 0  # of random cuts
    skip_damaged: bool = False

    @classmethod
    def of(
        cls, config: PipelineConfig, sizes: list[tuple[int, int]] | None = None, num_frames: int | None = None,
        fps: float | None = None, **options: Any,
    ) -> "ClipSettings":  # fmt: skip
        """Those of a model, where None means its own: size and its transpose, number of frames, rate.

        Raises ValueError for an invalid size, length or cut.
        """
        own = config.sampling
        both = dict.fromkeys(sizes or [(own.height, own.width), (own.width, own.height)])
        frames, rate = own.num_frames if num_frames is None else num_frames, own.fps if fps is None else fps
        settings = cls(tuple(both), frames, float(rate), **options)
        for height, width in settings.sizes:
            check_size(config, height, width, settings.num_frames)
        if settings.cut not in CUTS:
            raise ValueError(f"cut {settings.cut!r}: choose {', '.join(CUTS)}")
        if settings.per_file < 1 or not 0.1 <= settings.fps <= 1000:
            raise ValueError(f"{settings.per_file} clips per file, {settings.fps} fps: give at least 1; 0.1 to 1000")
        return settings


@dataclass(frozen=True)
class Clip:
    """One training sample: a stretch of a file in one size, and its caption."""

    file: str  # relative to the folder
    content: str  # SHA-256 of the file
    footage: Footage = field(repr=False)
    start: float  # seconds
    size: tuple[int, int]  # height, width
    num_frames: int  # 1 for an image
    fps: float
    caption: str

    def read(self) -> Tensor:
        """Its frames, uint8 (F, H, W, 3). Raises ValueError if the file is damaged."""
        return read_frames(self.footage, [self.start + i / self.fps for i in range(self.num_frames)], *self.size)


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    clips: tuple[Clip, ...]  # in order of file and time
    left_out: dict[str, str]  # file: why


def find_clips(folder: Path, settings: ClipSettings, decode: bool = False, progress: bool = True) -> Found:
    """All clips in `folder`. decode: read each once, so that damage is found now and not hours later.

    Where damaged files are to be skipped, each is read anyway. Raises ValueError without a usable clip, for captions
    that are missing, empty, unreadable or of no file, and for damaged files unless settings.skip_damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one with clips and their captions")
    files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file() and is_read(p, folder)]
    names = [name for name in files if Path(name).suffix.lower() in (*IMAGES, *VIDEOS)]
    captions = read_captions(folder, names, files)
    clips, left_out, damaged = [], {}, []
    decode = decode or settings.skip_damaged
    doing = "reading clips" if decode else "looking through clips"
    with screen.bar(len(names), doing, "file", show=progress) as bar:
        for name in names:
            try:
                found = list(cut(folder / name, name, captions[name], settings))
                for clip in found if decode else ():
                    clip.read()
                clips += found
            except Unusable as error:
                left_out[name] = printable(error)
            except ValueError as error:
                damaged.append(printable(error))
                left_out[name] = "is damaged"
            bar.update()
    if damaged and not settings.skip_damaged:
        more = f" (and {len(damaged) - 1:,} more)" if len(damaged) > 1 else ""
        raise ValueError(f"{damaged[0]}{more}: {REMEDY}")
    if not clips:
        reasons = f": {listed([f'{name} {why}' for name, why in left_out.items()], 3)}" if left_out else ""
        raise ValueError(f"{folder} has no usable clip{reasons}. It takes {', '.join((*VIDEOS, *IMAGES))}")
    return Found(tuple(clips), left_out)


def cut(path: Path, name: str, caption: str, settings: ClipSettings) -> Iterator[Clip]:
    """The clips of one file. Raises Unusable for one that has none, ValueError for a damaged one."""
    footage, content = probe(path), sha256(path)
    size = nearest_size(footage, settings.sizes)
    text = f"{settings.trigger} {caption}".strip()
    if not footage.times:
        yield Clip(name, content, footage, 0.0, size, 1, settings.fps, text)
        return
    frames, each = int(footage.seconds * settings.fps + 0.01), settings.num_frames  # 0.01: of rounded time stamps
    if frames < each:
        has = f"{footage.seconds:.2f} s, or {frames} frames at {settings.fps:g} fps"
        raise Unusable(f"is too short: it has {has}, and a clip has {each}")
    count = min(settings.per_file, frames // each)
    if settings.cut == "random":
        rng = np.random.default_rng([settings.seed, int(content[:15], 16)])
        starts = sorted(rng.choice(frames - each + 1, size=count, replace=False).tolist())
    else:
        first = (frames - count * each) // 2 if settings.cut == "middle" else 0
        starts = [first + i * each for i in range(count)]
    for start in starts:
        yield Clip(name, content, footage, footage.times[0] + start / settings.fps, size, each, settings.fps, text)


def describe_files(clips: Sequence[Clip], left_out: Mapping[str, str]) -> str:
    """A table with a line per file: what it is, which clips it gives, its caption; then what is left out, and why."""
    files: dict[str, list[Clip]] = {}
    for clip in clips:
        files.setdefault(clip.file, []).append(clip)
    lines = [f"{'seconds':>8} {'fps':>6} {'height':>6} {'width':>6}   clips  of frames, height, width   file: caption"]
    for name, own in files.items():
        footage, first = own[0].footage, own[0]
        measured = f"{footage.seconds:8.2f} {footage.rate:6.2f} {footage.height:6} {footage.width:6}"
        shape = f"{first.num_frames} x {first.size[0]} x {first.size[1]}"
        lines.append(f"{measured} {len(own):7}  {shape:>27}   {printable(name, 60)}: {printable(first.caption, 60)}")
    return "\n".join([*lines, *(f"left out: {printable(name, 60)} {why}" for name, why in left_out.items())])


# ---------------------------------------------------------------------------------------------- captions


def read_captions(folder: Path, names: list[str], files: list[str]) -> dict[str, str]:
    """The caption of each of `names`, which are among `files` of the folder. Raises ValueError for a wrong one."""
    tables = [name for name in TABLES if name in files]
    texts = {name for name in files if name.lower().endswith(".txt")}
    if len(tables) > 1 or (tables and texts):
        raise ValueError(f"{folder} has {listed([*tables, *sorted(texts)], 3)}: keep the captions in one of these ways")
    if tables:
        captions = _read_table(folder / tables[0])
        strangers = [name for name in captions if name not in names]
    else:
        caption_files = {name: str(Path(name).with_suffix(".txt").as_posix()) for name in names}
        most = 4 * LONGEST_CAPTION  # bytes in UTF-8
        captions = {name: read_utf8(folder / text, most) for name, text in caption_files.items() if text in texts}
        strangers = sorted(texts - set(caption_files.values()))
    if strangers:
        raise ValueError(
            f"{folder} has captions without clips ({listed(strangers, 3)}): remove them, or add clips of "
            f"{', '.join((*VIDEOS, *IMAGES))}"
        )
    missing = [name for name in names if name not in captions]
    if missing:
        rule = f"add them to {tables[0]}" if tables else "write NAME.txt next to each, or captions.jsonl for all"
        raise ValueError(f"{folder} has clips without captions ({listed(missing, 3)}): {rule}")
    empty = [name for name in names if not captions[name].strip()]
    if empty:
        raise ValueError(f"{folder} has empty captions ({listed(empty, 3)}): say what each clip shows")
    long = [name for name in names if len(captions[name]) > LONGEST_CAPTION]
    if long:
        raise ValueError(
            f"{folder} has captions of more than {LONGEST_CAPTION:,} characters ({listed(long, 3)}): shorten them"
        )
    return {name: captions[name].strip() for name in names}


def _read_table(path: Path) -> dict[str, str]:
    """File: caption, of a captions.jsonl or .csv. Raises ValueError for another form."""
    text = read_utf8(path, LONGEST_TABLE)
    if path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # JSON may hold U+2028
        rows = [(i, parse_json(line.encode(), f"{path}, line {i},")) for i, line in lines]
    else:
        rows = _read_csv(path, text)
    captions: dict[str, str] = {}
    for number, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "text")):
            raise ValueError(f"{path}, entry {number}: it needs a file and a text, such as a.mp4 and a fox runs")
        name = Path(row["file"]).as_posix()
        if name in captions:
            raise ValueError(f"{path} has two captions of {printable(name, 200)}: keep one")
        captions[name] = row["text"]
    return captions


def _read_csv(path: Path, text: str) -> list[tuple[int, dict]]:
    """Number and columns of each entry. Raises ValueError where a caption would be cut, or run into the next one."""
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        rows = list(enumerate(table, 2))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}): save it again, with long cells in quotes") from error
    if twice := [name for name in ("file", "text") if list(table.fieldnames or ()).count(name) > 1]:
        raise ValueError(f"{path} has two columns {listed(twice)}: keep one")
    if long := [str(number) for number, row in rows if any(row.get(None) or ())]:
        raise ValueError(f"{path}, entry {listed(long, 3)}: more cells than columns; quote captions that have commas")
    return rows


def is_read(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder of clips, and not hidden there, by its own name or that of a folder between."""
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
