"""Native checkpoint folders (kandinsky5/checkpoint.py) from Diffusers folders and from the authors' files."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kandinsky5.checkpoint import MODELS, OPTIONAL
from kandinsky5.config import (
    PRESETS,
    DiTConfig,
    PipelineConfig,
    QwenConfig,
    SamplingConfig,
    VAEConfig,
    find_preset,
)
from kandinsky5.config_file import check_config, check_models_fit, load_config, save_config
from kandinsky5.files import check_inside, read_json
from kandinsky5.screen import printable, say
from kandinsky5.tensor_files import Weights
from kandinsky5.tokenizer import find_files
from weights_convert import diffusers_files, tables
from weights_convert.diffusers_files import FOLDERS, NATIVE_CONFIG, TOKENIZERS
from weights_convert.match import INT8, build_part, chosen, tell_dropped
from weights_convert.presets import use_preset
from weights_convert.read import find_config, read_weights
from weights_convert.sizes import ModelConfig, build_config, kind_of, read_value, read_values
from weights_convert.write import Options, list_files, write_folder


class Source(NamedTuple):
    """One model as found: tensors by their Diffusers names, sizes, and the folder of its tokenizer if it has one."""

    weights: Weights
    sizes: ModelConfig
    tokenizer: Path | None


def from_diffusers(
    src: str | Path, dst: str | Path, preset: str | None = None, only: str | None = None,
    base: str | Path | None = None, with_vision: bool = False, **options,
) -> PipelineConfig:  # fmt: skip
    """Write the native checkpoint folder `dst` from `src`, a folder in the Diffusers layout (`save_pretrained`).

    preset: sample with its steps, guidance, shift, size and rope_scale by default; else with those of `SamplingConfig`.
    only: "dit", "vae", "qwen" or "clip"; then `src` may also be the folder or file of this model alone.
    base: native folder that all other models come from (their files are shared, not copied).
    with_vision: keep Qwen's vision tower and head, which prompt expansion needs; with a model that edits they stay.
    options: fields of `write.Options`. ValueError, in one line, for anything that is missing or does not fit.
    """
    src, models = Path(src), chosen(only)
    whole = (src / "model_index.json").is_file()
    if not whole and not only:
        if not src.exists():
            raise ValueError(f"{src} does not exist: check the path")
        raise ValueError(f"{src} has no model_index.json, so it is no Diffusers folder; --only converts one model")
    sources = {}
    for model in models:
        tokenizer = check_inside(src / TOKENIZERS[model], src) if whole and model in TOKENIZERS else None
        sources[model] = read_source(model, src / FOLDERS[model] if whole else src, tokenizer)
    tasks = diffusers_files.read_tasks(src) if whole else _guess_tasks(sources)
    config = load_config(src / NATIVE_CONFIG) if (src / NATIVE_CONFIG).is_file() else _new_config(src, tasks)
    config = load_config(Path(base) / "config.json") if base else config
    if whole and "dit" in models:  # task and shift are the DiT's
        shift = (
            config.sampling.shift if preset else diffusers_files.read_shift(src / "scheduler" / "scheduler_config.json")
        )
        config = replace(config, tasks=tasks, sampling=replace(config.sampling, shift=shift))
    sources |= read_vision(sources) if with_vision or _must_see({*tasks, *config.tasks}, sources) else {}
    config = _with_sizes(config, sources)
    config = use_preset(config, preset, whole, bool(base) or "vae" in sources) if preset else config
    write_native(Path(dst), sources, config, base, Options(**options))
    return config


def from_official(
    dst: str | Path, dit: str | Path | None = None, vae: str | Path | None = None, qwen: str | Path | None = None,
    clip: str | Path | None = None, preset: str | None = None, only: str | None = None,
    base: str | Path | None = None, qwen_tokenizer: str | Path | None = None,
    clip_tokenizer: str | Path | None = None, with_vision: bool = False, **options,
) -> PipelineConfig:  # fmt: skip
    """Write the native checkpoint folder `dst` from the files that the authors' code reads.

    dit: one safetensors file; vae: Tencent's pytorch_model.pt, FLUX.1's ae.safetensors or a Diffusers folder; qwen,
    clip: Hugging Face folders or single files. Tokenizers lie there too, or in `qwen_tokenizer`, `clip_tokenizer`.
    A bare DiT file does not record task, shift and NABLA: these come from `preset`. Otherwise as `from_diffusers`,
    ValueErrors included.
    """
    given = {"dit": dit, "vae": vae, "qwen": qwen, "clip": clip}
    paths = {model: Path(path) for model, path in given.items() if path}
    tokenizers = {"qwen": qwen_tokenizer, "clip": clip_tokenizer}
    models = [model for model in chosen(only) if model in paths or not base]
    if missing := [f"--{model}" for model in models if model not in paths]:
        raise ValueError(
            f"{', '.join(missing)} is missing: give all four models, a native folder that has the others (--base), or "
            "the one model to convert (--only)"
        )
    sources = {model: read_source(model, paths[model], tokenizers.get(model)) for model in models}
    tasks = find_preset(preset).tasks if preset else _guess_tasks(sources)
    config = load_config(Path(base) / "config.json") if base else _new_config(Path(dst), tasks)
    sources |= read_vision(sources) if with_vision or _must_see({*tasks, *config.tasks}, sources) else {}
    config = _with_sizes(config, sources)
    config = use_preset(config, preset, False, bool(base) or "vae" in sources) if preset else config
    write_native(Path(dst), sources, config, base, Options(**options))
    return config


def read_source(model: str, path: Path, tokenizer: str | Path | None = None) -> Source:
    """A model's folder or file in any layout but the native one. tokenizer: its folder, if that is another one."""
    weights = read_weights(path)
    kind = tables.kind_of(model, weights.tensors)
    try:
        tensors = tables.respell(kind, weights.tensors)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from error
    if others := len(weights.tensors) - len(tensors):
        say(f"dropped from {printable(weights.source)}: {others} tensors that are not below those of the {model}")
    weights = weights._replace(tensors=tensors)
    config = find_config(path)
    shapes = {name: stored.shape for name, stored in weights.tensors.items()}
    sizes = build_config(kind, read_json(config) if config else {}, shapes, str(path))
    folder = path if path.is_dir() else path.parent
    if model in TOKENIZERS and not tokenizer and find_files(folder):
        tokenizer = folder
    return Source(weights, sizes, Path(tokenizer) if tokenizer else None)


def read_vision(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Qwen's vision tower and head, from the files that Qwen was found in. ValueError if they are not there."""
    if "qwen" not in sources:
        raise ValueError("--with-vision keeps parts of Qwen, and this conversion has no Qwen: leave it out")
    weights, sizes, tokenizer = sources["qwen"]
    assert isinstance(sizes, QwenConfig)
    where = str(weights.source)
    config = find_config(weights.source)
    theirs = read_json(config) if config else {}
    section = read_values("qwen", theirs, where).get("mrope_section", sizes.rope_sections)
    if section != sizes.rope_sections:
        raise ValueError(f"{where}: config.json says mrope_section {section}; this code has {sizes.rope_sections}")
    vision = read_value(dict, theirs.get("vision_config") or {}, "vision_config", where)
    if vision.get("depth") == 0:  # as `to_diffusers` writes it where the native folder had none
        raise ValueError(f"{where} has no vision tower: take a released Qwen, or leave --with-vision out")
    vision = vision | diffusers_files.read_pixel_limits(tokenizer or weights.source.parent)
    if theirs.get("tie_word_embeddings") and "lm_head.weight" not in weights.tensors:
        head = {"lm_head.weight": weights.tensors["model.embed_tokens.weight"]}
        weights = weights._replace(tensors=weights.tensors | head)
    shapes = {name: stored.shape for name, stored in weights.tensors.items()}
    tower = Source(weights, build_config("qwen_vision", vision, shapes, where), None)
    return {"qwen_vision": tower, "qwen_head": Source(weights, sizes, None)}


def _must_see(tasks: set[str], sources: Mapping[str, Source]) -> bool:
    """Whether Qwen is converted for a model that edits images, which it has to see."""
    return "i2i" in tasks and "qwen" in sources


def _new_config(folder: Path, tasks: tuple[str, ...]) -> PipelineConfig:
    """A config for some tasks called after a folder as given, or after the model if that is a commit in a Hugging Face
    cache. Images start from the defaults of a preset of their task, videos from `SamplingConfig`."""
    place = Path(os.path.abspath(folder))  # links are not followed
    cached = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    name = place.parent.parent.name.split("--")[-1] if cached else place.name
    name = printable(name, 100)
    for preset in PRESETS.values():
        if preset.makes_images and preset.tasks == tasks:
            return replace(preset, name=name)
    return PipelineConfig(name=name, tasks=tasks, sampling=SamplingConfig(rope_scale=None))


def _guess_tasks(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """What bare files are for, as far as their sizes show it: a DiT of a preset's sizes is for what that makes; a 2-D
    VAE is of images, and another DiT without conditioning channels makes them from text alone."""
    dit, vae = (sources[model].sizes if model in sources else None for model in ("dit", "vae"))
    for preset in PRESETS.values():
        if isinstance(dit, DiTConfig) and replace(dit, nabla=None) == replace(preset.dit, nabla=None):
            return preset.tasks
    if not isinstance(vae, VAEConfig) or vae.dimensions == 3:
        return ("t2v",)
    return ("i2i",) if isinstance(dit, DiTConfig) and dit.visual_cond else ("t2i",)


def _with_sizes(config: PipelineConfig, sources: Mapping[str, Source]) -> PipelineConfig:
    sizes: dict[str, Any] = {model: source.sizes for model, source in sources.items()}  # each goes by its model's name
    sizes.pop("qwen_head", None)  # which has Qwen's
    if "qwen" in sources:
        sizes.setdefault("qwen_vision", None)
    return replace(config, **sizes)


def write_native(
    dst: Path, sources: Mapping[str, Source], config: PipelineConfig, base: str | Path | None, options: Options
) -> None:
    """Write `sources` and `config`; the other models' files are those of the native folder `base`.

    ValueError if a tokenizer is missing, or the models do not belong together.
    """
    parts, linked = [], {}
    if options.dtype == "int8" and not sources.keys() & {*INT8}:
        raise ValueError(f"--dtype int8 is for {' and '.join(INT8)}: {', '.join(sources)} stays as it is without it")
    for model, source in sources.items():
        theirs = partial(tables.theirs, kind_of(model, source.sizes))
        parts.append(build_part(model, source.sizes, source.weights, theirs, str, model, options))
    tokenizers = {model: source.tokenizer for model, source in sources.items() if source.tokenizer}
    for model in TOKENIZERS.keys() - tokenizers if sources.keys() >= {*MODELS} else ():
        raise ValueError(
            f"no tokenizer next to {sources[model].weights.source}: give its folder with --{model}-tokenizer"
        )
    if base:
        if config.base:
            raise ValueError(f"{base} (--base) itself needs models of {config.base!r}: give a complete folder")
        replaced = [*sources, *(OPTIONAL if "qwen" in sources else ())]
        ours = tuple(f"{model}{end}" for model in replaced for end in (".safetensors", "-")) + ("config.json",)
        ours += tuple(f"{model}_tokenizer" for model in tokenizers)
        linked = list_files(Path(base), lambda place: not place.parts[0].startswith(ours))
    check_config(config)  # what could not be loaded again is not written
    check_models_fit(config, {*sources, *(place.split(".")[0].split("-")[0] for place in linked)})

    def write_small_files(folder: Path) -> None:
        save_config(config, folder / "config.json")
        for model, tokenizer in tokenizers.items():
            diffusers_files.copy_tokenizer(tokenizer, folder / f"{model}_tokenizer")

    for model, source in sources.items():
        if model in MODELS and not (model == "qwen" and config.qwen_vision):
            tell_dropped(model, source.weights)
    write_folder(dst, parts, write_small_files, linked, options)
