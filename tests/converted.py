"""A small native checkpoint, and what the converter makes of it, for all tests of the converter. Read only.

Each folder is built once per process.
"""

import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file

from kandinsky5.checkpoint import MODELS, save_checkpoint
from kandinsky5.config import PipelineConfig, SamplingConfig
from kandinsky5.config_file import load_config
from random_weights import SMALL_CLIP, SMALL_DIT, SMALL_NABLA, SMALL_QWEN, SMALL_VAE, build_small_models
from weights_convert import to_diffusers

CONFIG = PipelineConfig(
    name="small",
    tasks=("i2v",),
    dit=replace(SMALL_DIT, nabla=SMALL_NABLA),
    vae=SMALL_VAE,
    qwen=replace(SMALL_QWEN, vocab_size=1000),
    clip=replace(SMALL_CLIP, vocab_size=1000, start_token=998, end_token=999),
    sampling=SamplingConfig(shift=7.0, num_inference_steps=12),
)
STEM = "diffusion_pytorch_model"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="kandinsky5-converted-")


@functools.cache
def native() -> Path:
    """The native folder."""
    folder = Path(_folder().name)
    words = folder / "words"
    words.mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(words / "tokenizer.json"))
    save_checkpoint(folder / "native", CONFIG, build_small_models(CONFIG), {"qwen": words, "clip": words})
    return folder / "native"


@functools.cache
def diffusers() -> Path:
    """The same in the Diffusers layout."""
    to_diffusers(native(), native().with_name("diffusers"), progress=False)
    return native().with_name("diffusers")


def copy_transformer(to: Path) -> tuple[Path, Path]:
    """A copy to damage, below `to`: a folder with config.json and one safetensors file of a DiT, and that file."""
    folder = Path(shutil.copytree(diffusers() / "transformer", to / "transformer"))
    return folder, folder / f"{STEM}.safetensors"


def tensors(folder: Path, stem: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a model's files."""
    state = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        state |= load_file(file)
    return state


def is_same(folder: Path, other: Path) -> bool:
    """Whether two native folders have the same config and the same bits."""
    if load_config(folder / "config.json") != load_config(other / "config.json"):
        return False
    for model in MODELS:
        ours, theirs = tensors(folder, model), tensors(other, model)
        if ours.keys() != theirs.keys():
            return False
        if not all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours):
            return False
    return True


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_header(file: Path, edit) -> None:
    """Apply `edit` to the header of a safetensors file, or put what it returns in its place."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
