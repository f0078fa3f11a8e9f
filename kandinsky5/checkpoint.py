"""The native checkpoint folder: `config.json`, one safetensors file per model, two tokenizer folders.

    config.json  dit.safetensors  vae.safetensors  qwen.safetensors  clip.safetensors
    qwen_tokenizer/  clip_tokenizer/
    qwen_vision.safetensors  qwen_head.safetensors      to see images and to write: with qwen_vision in config.json

A large file may be cut into shards; then `dit.safetensors.index.json` says which tensor is where. What the folder
does not hold may come from another one, which config.json names as `base`. Weights load strictly or not at all, and
stay where they are: the files are mapped into memory, not copied through it.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from kandinsky5.config import NANO_NAMES, PipelineConfig, find_preset
from kandinsky5.config_file import load_config, save_config
from kandinsky5.files import new_folder, read_bytes, replacing
from kandinsky5.screen import Forgiving, listed, shown
from kandinsky5.tensor_files import DTYPES, FLOATS, Weights, map_tensors, read_index, read_safetensors
from kandinsky5.tokenizer import LARGEST_FILE, find_files

MODELS = ("dit", "vae", "qwen", "clip")
OPTIONAL = ("qwen_vision", "qwen_head")  # both are there, or neither
SHIPPED = Path(__file__).parent / "nano" / "weights"  # the bundled models
MARKS = ("config.json", "model_index.json", "*.safetensors*")  # at least one is in any folder that is a checkpoint


def find_checkpoint(folder_or_preset: str | Path) -> Path:
    """The native checkpoint folder of that path or of that bundled model; ValueError if there is none."""
    folder = find_shipped(folder_or_preset)
    if not folder.exists():
        if not {"/", os.sep}.isdisjoint(str(folder_or_preset)):
            raise ValueError(f"there is no checkpoint folder {folder}: check the spelling, or name a preset")
        preset = find_preset(str(folder_or_preset))
        raise ValueError(
            f"the weights of preset {preset.name!r} are not part of this package: download them, convert them, "
            "and give the converted folder (README, section Released models)"
        )
    check_layout(folder)
    return folder


def find_shipped(folder_or_name: str | Path) -> Path:
    """The path itself, or the folder of the bundled model of that name.

    A folder called nano in the current directory comes first only if it is a checkpoint.
    """
    if not isinstance(folder_or_name, (str, Path)):
        raise ValueError(f"checkpoint {shown(folder_or_name)}: give the path of a folder, or a name such as nano")
    name, folder = str(folder_or_name), Path(folder_or_name)
    if name in NANO_NAMES and not any(place for mark in MARKS for place in folder.glob(mark)):
        return SHIPPED / name
    return folder


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Inside, models are built on the meta device, and no initial weights are drawn, which would be thrown away.

    Even there drawing them costs seconds: the first `normal_` on the meta device imports PyTorch's compiler.
    """
    with torch.device("meta"), _NoFill():
        yield


class _NoFill(TorchFunctionMode):
    NAMES = ("normal_", "uniform_", "trunc_normal_", "zero_", "fill_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_weights(model: nn.Module, weights: Weights, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Fill `model`, built on the meta device, with what `find_weights` found; returns it in eval mode.

    The model says which tensors there must be, of which shape, and which of them stay in float32 when it is cast
    to dtype; these stay in half precision if they are stored so. On the CPU, tensors that have the right precision
    are views of the mapped file. Raises ValueError, with the tensors' names and both shapes, if file and model differ.
    """
    expected, device = model.to(dtype).state_dict(), torch.device(device)
    check_fit(weights, expected)
    if device.type != "meta":
        name = weights.source.name.partition(".")[0]
        shown = {"desc": f"loading {name}", "unit": "tensor", "delay": 1, "leave": False, "total": len(expected)}
        views = tqdm(map_tensors(weights.tensors, writable=device.type == "cpu"), file=Forgiving(sys.stderr), **shown)
        state = {n: cast(view, expected[n].dtype, dtype).to(device) for n, view in views}
        model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def map_weights(model: nn.Module, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Prepare `model` for these weights as `load_weights` does, but return them: views of the mapped files as they are.

    The views can only be read, so files may be larger than the memory of the machine. Writing to one ends the process.
    """
    model.to(dtype).eval().requires_grad_(False)
    check_fit(weights, model.state_dict())
    views = dict(map_tensors({n: weights.tensors[n] for n in model.state_dict()}, writable=False))
    state = {n: cast(views[n].to("meta"), t.dtype, dtype) for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # which says in what precision each will be used
    return views


def cast(stored: Tensor, own: torch.dtype, dtype: torch.dtype) -> Tensor:
    """A stored weight in the precision that it has in a model cast to `dtype`, where it is of dtype `own`.

    What stays in float32 there is multiplied by a layer that widens its weights itself (`dit.Float32Linear`): if
    they are stored in half precision, a copy in float32 would hold the same values in twice the memory. So are the
    scales of int8 weights.
    """
    return stored if own != dtype and stored.itemsize == 2 else stored.to(own)


def find_weights(folder: Path, name: str, base: str | None = None) -> Weights:
    """Where the tensors of `name.safetensors`, or of its shards, lie, in a checkpoint's folder or its `base`.

    Raises ValueError if they are not complete.
    """
    folder = find_part(folder, name, base)
    index = folder / f"{name}.safetensors.index.json"
    return read_index(index) if index.is_file() else read_safetensors(folder / f"{name}.safetensors")


def models_of(config: PipelineConfig) -> tuple[str, ...]:
    """The models of a checkpoint, by the names of their files."""
    return MODELS + (OPTIONAL if config.qwen_vision else ())


def find_part(folder: Path, part: str, base: str | None) -> Path:
    """The folder that holds `part` ("vae", "clip_tokenizer", …): `folder` itself, or its `base`, relative to it."""
    here = any((folder / f"{part}{end}").exists() for end in ("", ".safetensors", ".safetensors.index.json"))
    return folder if here or base is None else folder / base


def fingerprint(folder: Path, names: Collection[str] | None = None) -> str:
    """Cheap content hash of a native checkpoint, or of those of its models that are named; changes with their output.

    SHA-256 of the values in config.json that differ from the defaults, the tokenizers' files, and of each tensor its
    name, precision, shape and first 16 kB. So other weights, more training or a merged adapter are seen. Not seen is a
    change that spares all these beginnings: a few rows of an embedding edited in place, or a damaged disk
    (`weights_convert --verify` sees it). Defaults of sampling do not count, as a video carries its own.
    """
    config = load_config(folder / "config.json")
    names = models_of(config) if names is None else names
    parts = [getattr(config, name) for name in (*names, "text", "tiling")]
    sizes = [  # a field that later versions add has its default
        {field: value for field, value in asdict(part).items() if value != asdict(type(part)()).get(field)}
        for part in parts
    ]
    digest = hashlib.sha256(repr((sizes, config.sampling.normalise_first_frames)).encode())
    with contextlib.ExitStack() as stack:
        open_once = functools.cache(lambda path: stack.enter_context(open(path, "rb")))
        for name in names:
            for tensor_name, stored in sorted(find_weights(folder, name, config.base).tensors.items()):
                file = open_once(stored.path)
                file.seek(stored.start)
                start = file.read(min(stored.nbytes, 2**14))
                digest.update(repr((tensor_name, DTYPES[stored.dtype], stored.shape)).encode() + start)
    for name in ("qwen_tokenizer", "clip_tokenizer"):
        for path in sorted(find_files(find_part(folder, name, config.base) / name)):
            digest.update(path.name.encode() + read_bytes(path, LARGEST_FILE))
    return digest.hexdigest()


def check_fit(weights: Weights, expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the missing and the surplus tensors of a file, and different shapes and dtypes."""
    shapes = {name: tuple(x.shape) for name, x in expected.items()}
    found = weights.tensors
    problems = [
        f"{n}: the configuration says {s}, the file has {found[n].shape}"
        for n, s in shapes.items()
        if n in found and found[n].shape != s
    ]
    problems += [f"{n} {s} is missing from the file" for n, s in shapes.items() if n not in found]
    problems += [f"{n} {stored.shape} is not part of the model" for n, stored in found.items() if n not in shapes]
    if problems:
        raise ValueError(
            f"{weights.source} does not fit the model that config.json describes: {listed(problems)}. "
            "Use the config.json that was written with these weights, or convert the checkpoint again"
        )
    kinds = {name: FLOATS if x.is_floating_point() else ("I8",) for name, x in expected.items()}
    if odd := [f"{name} ({stored.dtype})" for name, stored in found.items() if stored.dtype not in kinds[name]]:
        raise ValueError(
            f"{weights.source} holds tensors that are not stored as {', '.join(FLOATS)}, or as int8 with scales: "
            f"{listed(odd)}; convert the checkpoint again (python -m weights_convert)"
        )


def check_layout(folder: Path) -> None:
    """ValueError, with the command to run, if `folder` is no native checkpoint folder."""
    place = folder if folder.is_dir() else folder.parent
    has_config = (place / "config.json").is_file()
    is_part = has_config and not any(place.glob("dit.safetensors*"))  # such as transformer/
    diffusers = place.parent if is_part and (place.parent / "model_index.json").is_file() else place
    if (diffusers / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is in the Diffusers layout; convert it once: "
            f"python -m weights_convert from-diffusers {diffusers} NEW_FOLDER"
        )
    if has_config and not folder.is_dir():
        raise ValueError(f"{folder} is one file of a checkpoint: give its folder, {place}")
    if has_config:
        return
    if _holds_lora(folder if folder.suffix == ".safetensors" else next(folder.glob("*.safetensors"), folder)):
        raise ValueError(f"{folder} is a LoRA and no checkpoint: give it with --lora, and its model with --checkpoint")
    inside = "*.safetensors" if folder.name == "model" else "model/*.safetensors"
    official = folder if folder.suffix == ".safetensors" else next(folder.glob(inside), None)
    if official:
        raise ValueError(
            f"{folder} is in the official layout; convert it once: python -m weights_convert from-official "
            f"--dit {official} --vae PATH --qwen PATH --clip PATH NEW_FOLDER --preset NAME"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that python -m weights_convert wrote")
    raise ValueError(
        f"{folder} holds no config.json, so it is no converted checkpoint; make one from the Diffusers layout: "
        "python -m weights_convert from-diffusers DIFFUSERS_FOLDER NEW_FOLDER"
    )


def _holds_lora(file: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return any("lora_" in name or name.endswith((".A", ".B")) for name in read_safetensors(file).tensors)
    return False


def save_checkpoint(
    folder: str | Path, config: PipelineConfig, models: Mapping[str, nn.Module], tokenizers: Mapping[str, str | Path]
) -> None:
    """Write a native checkpoint folder that `Pipeline.load` reads.

    models: those of `models_of(config)`; tokenizers: the folders of "qwen" and "clip", whose files are copied.
    If config.base is set, that folder may hold some of them, or all but the DiT.
    It appears when it is complete (`files.new_folder`). Raises FileExistsError if `folder` exists.
    """
    whole = set(models_of(config)) <= set(models) and set(tokenizers) == {"qwen", "clip"}
    assert config.base or whole, (models, tokenizers)
    with new_folder(folder) as partial:
        fill_checkpoint(partial, config, models, tokenizers)


def fill_checkpoint(
    folder: Path, config: PipelineConfig, models: Mapping[str, nn.Module], tokenizers: Mapping[str, str | Path]
) -> None:
    """Write what `save_checkpoint` writes into a folder that is there."""
    for name, model in models.items():
        save_weights(model.state_dict(), folder / f"{name}.safetensors")
    for name, source in tokenizers.items():
        (folder / f"{name}_tokenizer").mkdir()
        for path in find_files(Path(source)):
            shutil.copyfile(path, folder / f"{name}_tokenizer" / path.name)
    save_config(config, folder / "config.json")


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, atomically: `path` is never half there."""
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"cannot write {path} ({error}): free some disk space") from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """The library writes the entries of the metadata in random order: with this, equal weights are equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.get("__metadata__"):
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= length, (len(text), length)
            file.seek(8)
            file.write(text.ljust(length))
