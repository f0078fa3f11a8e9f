"""Weights as others store them: which files in a folder are a model's, and in which wrapping."""

import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

from kandinsky5.files import check_regular
from kandinsky5.screen import listed
from kandinsky5.tensor_files import Weights, join, read_index, read_safetensors
from weights_convert.pickles import read_pt
from weights_convert.scales import widen

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# model.fp16-00001-of-00002.safetensors: name, variant, number, count, and of other tools the variant here, ending
VARIANT = r"(\.(?:fp16|bf16|fp32|fp8|ema|non_ema))?"
ENDING = "|".join(map(re.escape, (".safetensors", *PICKLES)))
FILE = re.compile(rf"(.+?){VARIANT}(?:-(\d{{5}})-of-(\d{{5}}))?{VARIANT}({ENDING})")
INDEX = re.compile(r"(.+)\.index(\.\w+)?\.json")  # model.safetensors.index.json, model.safetensors.index.fp16.json
NO_WEIGHTS = re.compile(r"\.|rng_state|random_states|optimizer|scheduler|scaler|training_args|trainer")  # by its start


def read_weights(path: Path, stem: str = "*") -> Weights:
    """What a file, a set of shards, their index, or the one set of weights in a folder holds; none is loaded yet.

    8-bit weights are there as what they stand for (`scales.py`). stem: in a folder, the file name up to `.safetensors`.
    ValueError, one line, for anything wrong with it.
    """
    files = find_files(path, stem) if path.is_dir() else [path]
    if (match := FILE.fullmatch(files[0].name)) and match[4]:  # a shard: all of them
        alike = [p for p in path.parent.iterdir() if set_of(p) == set_of(path)] if files == [path] else files
        return widen(join(files[0], map(read_file, list_shards(alike))))
    return widen(read_index(files[0], read_file) if INDEX.fullmatch(files[0].name) else read_file(files[0]))


def read_file(path: Path) -> Weights:
    """One file of weights, of the kind that its first bytes show whatever its name; ValueError if it is none."""
    with open(check_regular(path), "rb") as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        raise ValueError(
            f"{path} is a GGUF file, which is not read here: take the safetensors files, in bf16 or fp8; --dtype int8 "
            "makes of them about what a Q8_0 file is"
        )
    is_pickle = head[8:] != b"{" and (path.suffix in PICKLES or head[:2] == b"PK" or head[:1] == b"\x80")
    return read_pt(path) if is_pickle else read_safetensors(path)


def find_files(folder: Path, stem: str = "*") -> list[Path]:
    """The file in `folder` that leads to all of a model's weights, or its shards if they have no index.

    safetensors are preferred to pickles, plain files to variants such as fp16, and among pickles the usual names.
    ValueError if there is none, or more than one that it could be.
    """
    sets: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        key = set_of(path)
        if key and fnmatch(key[0], stem) and path.is_file() and not NO_WEIGHTS.match(path.name):
            sets[key].append(path)

    def rank(key: tuple[str, str, str]) -> tuple[bool, bool, bool]:
        name, variant, ending = key
        unusual = name not in ("diffusion_pytorch_model", "pytorch_model", "model")
        return ending in PICKLES, bool(variant), ending in PICKLES and unusual

    best = [key for key in sets if rank(key) == min(map(rank, sets))]
    if len(best) > 1:
        names = listed(["".join(key) for key in best])
        raise ValueError(f"{folder} holds several sets of weights ({names}): give one of the files, or move the others")
    if not best:
        endings = f"{stem}.safetensors, shards with {stem}.safetensors.index.json, and {', '.join(PICKLES)}"
        raise ValueError(f"no weights in {folder}: looked for {endings}")
    files = sets[best[0]]
    return next(([p] for p in files if INDEX.fullmatch(p.name)), None) or list_shards(files)


def set_of(path: Path) -> tuple[str, str, str] | None:
    """What all files of one set of weights have in common: ("model", ".fp16", ".safetensors"); None for other files."""
    index = INDEX.fullmatch(path.name)
    match = FILE.fullmatch(index[1] if index else path.name)
    return (match[1], match[2] or match[5] or index and index[2] or "", match[6]) if match else None


def list_shards(files: list[Path]) -> list[Path]:
    """All shards of a set by number, or the one file that is no shard; ValueError if some are missing."""
    matches = [(path, match) for path in files if (match := FILE.fullmatch(path.name))]
    if whole := [path for path, match in matches if not match[4]]:
        return whole[:1]
    shards = {int(match[3]): path for path, match in matches}
    count = max(int(match[4]) for _, match in matches)
    if missing := [str(i) for i in range(1, count + 1) if i not in shards]:
        raise ValueError(f"{files[0]} is one of {count} shards; number {listed(missing)} is missing: download it too")
    return [shards[i] for i in range(1, count + 1)]


def find_config(path: Path) -> Path | None:
    """The config.json in a folder of weights, or next to a file of them."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config if config.is_file() else None
