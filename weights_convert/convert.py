"""Checkpoint folders from one layout to another. `tables.py` has the names, `sizes.py` the configs."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from kandinsky5.checkpoint import MODELS
from kandinsky5.clip import CLIPText
from kandinsky5.config import PRESETS, PipelineConfig, SamplingConfig, find_preset, save_config
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.qwen import Qwen
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.vae import VAE
from weights_convert import tables
from weights_convert.read import FLOATS, Stored, Weights, count, read_json, read_weights
from weights_convert.sizes import build_config
from weights_convert.write import Part, new_folder, write_part

CLASSES = {"dit": DiT, "vae": VAE, "qwen": Qwen, "clip": CLIPText}
# Where the Diffusers layout keeps what the native one keeps at the top.
DIFFUSERS_FOLDERS = {"dit": "transformer", "vae": "vae", "qwen": "text_encoder", "clip": "text_encoder_2"}
TOKENIZERS = {"qwen_tokenizer": "tokenizer", "clip_tokenizer": "tokenizer_2"}
TASKS = {"Kandinsky5T2VPipeline": ("t2v",), "Kandinsky5I2VPipeline": ("i2v",)}
MAX_SHARD_SIZE = 5 * 10**9


def from_diffusers(
    src: str | Path,
    dst: str | Path,
    preset: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: bool = True,
) -> PipelineConfig:
    """Write the native checkpoint folder `dst` from `src`, a folder in the Diffusers layout (SPEC §9).

    preset: whose steps, guidance, size and rope_scale to sample with by default; else those of `SamplingConfig`.
    ValueError, in one line, for anything that is missing, too much, or does not fit.
    """
    src, dst = Path(src), Path(dst)
    model_index = src / "model_index.json"
    if not model_index.is_file():
        raise ValueError(f"{src} is not in the Diffusers layout: it has no model_index.json")
    class_name = read_json(model_index).get("_class_name")
    if class_name not in TASKS:
        raise ValueError(f"{model_index} names the pipeline {class_name!r}; this code knows {' and '.join(TASKS)}")

    sources, sizes = {}, {}
    for model in MODELS:
        folder = src / DIFFUSERS_FOLDERS[model]
        sources[model] = read_theirs(model, folder)
        sizes[model] = build_config(model, read_json(folder / "config.json"), shapes(sources[model]), str(folder))
    shift = read_json(src / "scheduler" / "scheduler_config.json").get("shift", 1.0)
    config = build_pipeline_config(src.resolve().name, TASKS[class_name], sizes, shift, preset)

    parts, dropped = {}, {}
    for model in MODELS:
        parts[model], dropped[model] = to_native(model, sizes[model], sources[model])

    with new_folder(dst) as partial:
        save_config(config, partial / "config.json")
        for ours, theirs in TOKENIZERS.items():
            copy_tokenizer(src / theirs, partial / ours)
        total = sum(part.nbytes(name) for part in parts.values() for name in part.tensors)
        with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=not progress) as bar:
            for part in parts.values():
                write_part(partial, part, max_shard_size, bar.update, lambda text: bar.write(f"warning: {text}"))
    return config


def read_theirs(model: str, path: Path) -> Weights:
    """The weights of one model, their names spelled as in the table."""
    weights = read_weights(path)
    tensors = {}
    for name, stored in weights.tensors.items():
        standard = tables.respell(model, name)
        if standard in tensors:
            raise ValueError(f"{weights.source} holds {standard} twice, once as {name}")
        tensors[standard] = stored
    return weights._replace(tensors=tensors)


def to_native(model: str, sizes, source: Weights) -> tuple[Part, dict[str, Stored]]:
    """Our names for their tensors; and what is dropped. ValueError with the full list of what does not fit."""
    wanted = native_shapes(model, sizes)
    names = {ours: tables.theirs(model, ours) for ours in wanted}
    dropped = {n: t for n, t in source.tensors.items() if n.startswith(tables.DROPPED[model])}
    problems = [f"{n} is missing" for n in names.values() if n not in source.tensors]
    problems += [f"{n} is not known" for n in source.tensors if n not in {*names.values(), *dropped}]
    for ours, theirs in names.items():
        stored = source.tensors.get(theirs)
        if stored and stored.shape != wanted[ours]:
            problems.append(f"{theirs}: the configuration wants {wanted[ours]}, the file has {stored.shape}")
        if stored and stored.dtype not in FLOATS:
            problems.append(f"{theirs} is stored as {stored.dtype}, not as one of {', '.join(FLOATS)}")
    if problems:
        raise ValueError(f"{source.source} does not fit a {model} of its config.json: {'; '.join(problems)}")
    tensors = {ours: source.tensors[theirs] for ours, theirs in names.items()}
    dtypes = {name: stored.dtype for name, stored in tensors.items()}
    return Part(model, tensors, dtypes, source.metadata), dropped


def native_shapes(model: str, sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our model's tensors, in its order."""
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in CLASSES[model](sizes).state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"no {model} can have the sizes {sizes}: {error}") from error


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in weights.tensors.items()}


def build_pipeline_config(
    name: str, tasks: tuple[str, ...], sizes: Mapping, shift: float, preset: str | None
) -> PipelineConfig:
    """What the native config.json says; ValueError where the models, or models and preset, do not fit together."""
    dit, vae, qwen, clip = (sizes[model] for model in MODELS)
    for what, one, other in (
        ("the DiT's in_text_dim and Qwen's hidden_size", dit.text_dim, qwen.dim),
        ("the DiT's in_text_dim2 and CLIP's hidden_size", dit.pooled_dim, clip.dim),
        ("the DiT's in_visual_dim and the VAE's latent_channels", dit.in_channels, vae.latent_channels),
    ):
        if one != other:
            raise ValueError(f"{what} differ, {one} and {other}: these models do not belong together")
    if preset is None:
        sampling = SamplingConfig(shift=float(shift), rope_scale=None)
    else:
        chosen = find_preset(preset)
        if replace(chosen.dit, nabla=None) != replace(dit, nabla=None):
            raise ValueError(f"preset {preset} has a DiT of other sizes: {chosen.dit}, the checkpoint {dit}")
        if chosen.tasks != tasks:
            raise ValueError(f"preset {preset} is for {chosen.tasks[0]}, model_index.json says {tasks[0]}")
        name, sampling = preset, replace(chosen.sampling, shift=float(shift))
    return PipelineConfig(name=name, tasks=tasks, dit=dit, vae=vae, qwen=qwen, clip=clip, sampling=sampling)


def presets_like(config: PipelineConfig) -> list[str]:
    """The presets that `config` may be: same DiT, same attention, same task."""
    return [name for name, preset in PRESETS.items() if (preset.dit, preset.tasks) == (config.dit, config.tasks)]


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy the files that `Tokenizer.load` reads, and see that it can."""
    if (src / "tokenizer.json").is_file():
        files = ["tokenizer.json"]
    else:
        files = ["vocab.json", "merges.txt", "added_tokens.json"]
    dst.mkdir()
    for file in files:
        if (src / file).is_file():
            shutil.copyfile(src / file, dst / file)
    Tokenizer.load(dst)
