"""Checkpoint folders from one layout to another: what is read, what is written, and whether it fits.

    from_diffusers, from_official → native folder (kandinsky5/checkpoint.py) → to_diffusers

`tables.py` has the names, `sizes.py` the configs, `write.py` writes the folder.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from kandinsky5.checkpoint import MODELS, OPTIONAL, find_part, find_shipped, models_of, without_weights
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
from kandinsky5.dit import Float32Linear
from kandinsky5.files import check_inside, read_json, write_json
from kandinsky5.runtime.loading import CLASSES
from kandinsky5.runtime.quantize import linears, quantise_stored
from kandinsky5.screen import listed, printable, say
from kandinsky5.tensor_files import FLOATS, Computed, Stored, Weights
from kandinsky5.tokenizer import find_files
from weights_convert import tables
from weights_convert.diffusers_files import (
    NATIVE_CONFIG,
    copy_tokenizer,
    read_pixel_limits,
    read_shift,
    read_tasks,
    write_model_index,
    write_preprocessor_config,
    write_scheduler,
    write_tokenizer_config,
)
from weights_convert.read import read_weights
from weights_convert.sizes import (
    ModelConfig,
    build_config,
    kind_of,
    read_value,
    read_values,
    to_their_config,
)
from weights_convert.write import Options, Part, write_folder

# Subfolder and file name of each model in the Diffusers layout.
FOLDERS = {"dit": "transformer", "vae": "vae", "qwen": "text_encoder", "clip": "text_encoder_2"}
STEMS = {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "qwen": "model", "clip": "model"}
TOKENIZERS = {"qwen": "tokenizer", "clip": "tokenizer_2"}
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
INT8 = ("dit", "qwen")  # the models that --dtype int8 quantises


class Source(NamedTuple):
    """One model as found: tensors by their Diffusers names, sizes, and the folder of its tokenizer if it has one."""

    weights: Weights
    sizes: ModelConfig
    tokenizer: Path | None


def from_diffusers(
    src: str | Path,
    dst: str | Path,
    preset: str | None = None,
    only: str | None = None,
    base: str | Path | None = None,
    with_vision: bool = False,
    **options,
) -> PipelineConfig:
    """Write the native checkpoint folder `dst` from `src`, a folder in the Diffusers layout (`save_pretrained`).

    preset: sample with its steps, guidance, shift, size and rope_scale by default; else with those of `SamplingConfig`.
    only: "dit", "vae", "qwen" or "clip"; then `src` may also be the folder or file of this model alone.
    base: native folder that all other models come from (their files are shared, not copied).
    with_vision: keep Qwen's vision tower and head, which prompt expansion needs; with a model that edits they stay.
    options: fields of `write.Options`. ValueError, in one line, for anything that is missing or does not fit.
    """
    src, models = Path(src), _chosen(only)
    whole = (src / "model_index.json").is_file()
    if not whole and not only:
        if not src.exists():
            raise ValueError(f"{src} does not exist: check the path")
        raise ValueError(f"{src} has no model_index.json, so it is no Diffusers folder; --only converts one model")
    sources = {}
    for model in models:
        tokenizer = check_inside(src / TOKENIZERS[model], src) if whole and model in TOKENIZERS else None
        sources[model] = read_source(model, src / FOLDERS[model] if whole else src, tokenizer)
    tasks = read_tasks(src) if whole else ("t2v",)
    sources |= read_vision(sources) if with_vision or _must_see(tasks, sources) else {}
    config = load_config(src / NATIVE_CONFIG) if (src / NATIVE_CONFIG).is_file() else _new_config(src, tasks)
    config = load_config(Path(base) / "config.json") if base else config
    if whole and "dit" in models:  # task and shift are the DiT's
        shift = config.sampling.shift if preset else read_shift(src / "scheduler" / "scheduler_config.json")
        config = replace(config, tasks=tasks, sampling=replace(config.sampling, shift=shift))
    config = _with_sizes(config, sources)
    config = use_preset(config, preset, whole, bool(base) or "vae" in sources) if preset else config
    write_native(Path(dst), sources, config, base, Options(**options))
    return config


def from_official(
    dst: str | Path,
    dit: str | Path | None = None,
    vae: str | Path | None = None,
    qwen: str | Path | None = None,
    clip: str | Path | None = None,
    preset: str | None = None,
    only: str | None = None,
    base: str | Path | None = None,
    qwen_tokenizer: str | Path | None = None,
    clip_tokenizer: str | Path | None = None,
    with_vision: bool = False,
    **options,
) -> PipelineConfig:
    """Write the native checkpoint folder `dst` from the files that the authors' code reads.

    dit: one safetensors file; vae: Tencent's pytorch_model.pt, FLUX.1's ae.safetensors or a Diffusers folder; qwen,
    clip: Hugging Face folders or single files. Tokenizers lie there too, or in `qwen_tokenizer`, `clip_tokenizer`.
    A bare DiT file does not record task, shift and NABLA: these come from `preset`. Otherwise as `from_diffusers`,
    ValueErrors included.
    """
    given = {"dit": dit, "vae": vae, "qwen": qwen, "clip": clip}
    paths = {model: Path(path) for model, path in given.items() if path}
    tokenizers = {"qwen": qwen_tokenizer, "clip": clip_tokenizer}
    models = [model for model in _chosen(only) if model in paths or not base]
    if missing := [f"--{model}" for model in models if model not in paths]:
        raise ValueError(
            f"{', '.join(missing)} is missing: give all four models, a native folder that has the others (--base), or "
            "the one model to convert (--only)"
        )
    sources = {model: read_source(model, paths[model], tokenizers.get(model)) for model in models}
    tasks = find_preset(preset).tasks if preset else _guess_tasks(sources)
    sources |= read_vision(sources) if with_vision or _must_see(tasks, sources) else {}
    config = load_config(Path(base) / "config.json") if base else _new_config(Path(dst), tasks)
    config = _with_sizes(config, sources)
    config = use_preset(config, preset, False, bool(base) or "vae" in sources) if preset else config
    write_native(Path(dst), sources, config, base, Options(**options))
    return config


def to_diffusers(
    src: str | Path, dst: str | Path, only: str | None = None, base: str | Path | None = None, **options
) -> PipelineConfig:
    """Write a folder in the Diffusers layout from the native folder `src`, or the bundled model of that name.

    only: this model alone, in its subfolder. base: folder in the Diffusers layout that provides all the rest.
    Where the native folder has neither Qwen's vision tower nor its lm_head (`with_vision`), the Qwen written here has a
    vision tower of no layers and its embedding for a head: enough for pipelines that give it text alone.
    ValueError, in one line, for anything that is missing or does not fit.
    """
    src, dst, settings = find_shipped(src), Path(dst), Options(**options)
    if settings.dtype == "int8":
        raise ValueError("--dtype int8 is for native folders: diffusers does not read such weights; choose bf16")
    if not (src / "config.json").is_file():
        there = (src / "model_index.json").is_file()
        what = "already in the Diffusers layout" if there else "not a native checkpoint folder"
        raise ValueError(f"{src} is {what}: give a folder that from-diffusers or from-official wrote")
    config = load_config(src / "config.json")
    names = (*models_of(config), *(f"{model}_tokenizer" for model in TOKENIZERS))
    folders = {name: find_part(src, name, config.base) for name in names}
    config = replace(config, base=None)  # what is written is complete
    parts = []
    for model in _chosen(only):
        stem, pieces = f"{FOLDERS[model]}/{STEMS[model]}", []
        for name in (model, *(OPTIONAL if model == "qwen" and config.qwen_vision else ())):
            weights, sizes = read_weights(folders[name], name), getattr(config, name)
            theirs = partial(tables.theirs, kind_of(name, sizes))
            pieces.append(build_part(name, sizes, weights, str, theirs, stem, settings))
        parts.append(join_parts(pieces))
        if any(isinstance(stored, Computed) for stored in parts[-1].tensors.values()):
            say(f"note: {model} is stored in int8; what is written is the same, rounded weights, in bf16 or --dtype")

    linked = {}
    if base:
        if not (Path(base) / "model_index.json").is_file():
            raise ValueError(f"{base} (--base) is not in the Diffusers layout: it has no model_index.json")
        replaced = {"scheduler", "model_index.json", NATIVE_CONFIG, *(FOLDERS[model] for model in _chosen(only))}
        linked = list_files(Path(base), lambda place: place.parts[0] not in replaced)

    def write_small_files(folder: Path) -> None:
        for model in _chosen(only):
            sizes = getattr(config, model)
            theirs = to_their_config(kind_of(model, sizes), sizes, config.qwen_vision)
            write_json(folder / FOLDERS[model] / "config.json", theirs)
            tokenizer = folders.get(f"{model}_tokenizer", src) / f"{model}_tokenizer"
            if model in TOKENIZERS and not base and tokenizer.is_dir():
                copy_tokenizer(tokenizer, folder / TOKENIZERS[model])
                write_tokenizer_config(model, folder / TOKENIZERS[model])
                if model == "qwen" and config.qwen_vision:
                    write_preprocessor_config(config.qwen_vision, folder / TOKENIZERS[model])
        if base or not only:
            write_scheduler(config.sampling.shift, folder / "scheduler" / "scheduler_config.json")
            write_model_index(config.tasks, folder / "model_index.json", base)
            save_config(config, folder / NATIVE_CONFIG)

    write_folder(dst, parts, write_small_files, linked, settings)
    return config


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
            copy_tokenizer(tokenizer, folder / f"{model}_tokenizer")

    for model, source in sources.items():
        if model in MODELS and not (model == "qwen" and config.qwen_vision):
            tell_dropped(model, source.weights)
    write_folder(dst, parts, write_small_files, linked, options)


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
    vision = vision | read_pixel_limits(tokenizer or weights.source.parent)
    if theirs.get("tie_word_embeddings") and "lm_head.weight" not in weights.tensors:
        head = {"lm_head.weight": weights.tensors["model.embed_tokens.weight"]}
        weights = weights._replace(tensors=weights.tensors | head)
    shapes = {name: stored.shape for name, stored in weights.tensors.items()}
    tower = Source(weights, build_config("qwen_vision", vision, shapes, where), None)
    return {"qwen_vision": tower, "qwen_head": Source(weights, sizes, None)}


def find_config(path: Path) -> Path | None:
    """The config.json in a folder of weights, or next to a file of them."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config if config.is_file() else None


def build_part(
    model: str,
    sizes: ModelConfig,
    weights: Weights,
    name_there: Callable[[str], str],
    name_here: Callable[[str], str],
    stem: str,
    options: Options,
) -> Part:
    """Match every tensor of our model with one of the source. The two functions turn our name of a tensor into its name
    in the source and in the output. ValueError that lists tensors that are missing, unknown or of another shape.
    """
    shapes, islands = describe_model(model, sizes, str(weights.source))
    empty = build_empty(model, sizes, "") if options.dtype == "int8" else None
    int8 = {f"{name}.weight" for name, _ in linears(empty)} if empty else set()
    names = {ours: name_there(ours) for ours in shapes}
    known = {*names.values(), *dropped(model, weights)}
    problems = [f"{n} is missing" for n in names.values() if n not in weights.tensors]
    problems += [f"{n} is not known" for n in weights.tensors if n not in known]
    tensors: dict[str, Stored] = {}
    dtypes: dict[str, str] = {}
    for ours, theirs in names.items():
        if stored := weights.tensors.get(theirs):
            if stored.shape != shapes[ours]:
                problems.append(f"{theirs} is {stored.shape} in the file, {shapes[ours]} by the config.json")
            if stored.dtype not in FLOATS:
                problems.append(f"{theirs} is stored as {stored.dtype} (quantised?), not as one of {', '.join(FLOATS)}")
            if ours in int8 and not problems:
                scale = f"{ours.removesuffix('weight')}scale"
                tensors[ours], tensors[scale] = quantise_stored(stored)
                dtypes |= {ours: "I8", scale: "BF16"}
                continue
            tensors[name_here(ours)] = stored
            dtype = stored.dtype
            if options.dtype in DTYPES:
                dtype = "F32" if ours in islands and not options.cast_all else DTYPES[options.dtype]
            dtypes[name_here(ours)] = dtype
    if problems:
        raise ValueError(f"{weights.source} holds no {model} of these sizes: {listed(problems)}")
    return Part(stem, tensors, dtypes, weights.metadata)


def join_parts(pieces: list[Part]) -> Part:
    """Parts with the same stem as one: a model of theirs that is several of ours."""
    tensors = {name: stored for piece in pieces for name, stored in piece.tensors.items()}
    dtypes = {name: dtype for piece in pieces for name, dtype in piece.dtypes.items()}
    return Part(pieces[0].stem, tensors, dtypes, pieces[0].metadata)


def describe_model(model: str, sizes: ModelConfig, where: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of our model's tensors, in its order; and which stay in float32 when it is cast.

    ValueError for sizes that no model can have.
    """
    built = build_empty(model, sizes, where)
    islands = {
        f"{n}.{kind}" for n, m in built.named_modules() if isinstance(m, Float32Linear) for kind in ("weight", "bias")
    }
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}, islands


def build_empty(model: str, sizes: ModelConfig, where: str) -> nn.Module:
    """Our model of these sizes, without weights; ValueError for sizes that no model can have."""
    try:
        with without_weights():
            return CLASSES[model](sizes)
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"{where}: no {model} can have the sizes {sizes}: {error}") from error


def dropped(model: str, weights: Weights) -> list[str]:
    """The tensors that are dropped on purpose (`tables.DROPPED`), such as Qwen's vision tower."""
    return [name for name in weights.tensors if name.startswith(tables.DROPPED[model])]


def tell_dropped(model: str, weights: Weights) -> None:
    """Print what is dropped, how large it is, and how to keep what may be needed."""
    keep = "; --with-vision keeps it, for editing and --expand" if model == "qwen" else ""
    for start in tables.DROPPED[model]:
        sizes = [stored.nbytes for name, stored in weights.tensors.items() if name.startswith(start)]
        if sizes:
            size = f"{sum(sizes) / 1e9:.2f} GB" if sum(sizes) >= 1e9 else f"{sum(sizes) / 1e6:,.1f} MB"
            say(f"dropped from {printable(weights.source)}: {start}* ({len(sizes)} tensors, {size}){keep}")


def use_preset(config: PipelineConfig, preset: str, task_known: bool = True, vae_known: bool = True) -> PipelineConfig:
    """`config` with name, task, attention, template and sampling of a preset, and its VAE's sizes if none are known.

    ValueError for other sizes, or if the task is known to be another one.

    The preset wins over the checkpoint's own NABLA and shift: one download serves an -sd and an -hd preset.
    """
    chosen = find_preset(preset)
    theirs, ours = asdict(replace(chosen.dit, nabla=None)), asdict(replace(config.dit, nabla=None))
    if theirs != ours:
        differences = [f"{field} {value}, not {ours[field]}" for field, value in theirs.items() if value != ours[field]]
        raise ValueError(f"preset {preset} has another DiT than the checkpoint: {'; '.join(differences)}")
    if task_known and chosen.tasks != config.tasks:
        raise ValueError(f"preset {preset} is for {chosen.tasks[0]}, the checkpoint for {' and '.join(config.tasks)}")
    if vae_known and chosen.vae.dimensions != config.vae.dimensions:
        raise ValueError(
            f"preset {preset} has a {chosen.vae.dimensions}-D VAE, the checkpoint a {config.vae.dimensions}-D one: "
            "images need FLUX.1's, videos HunyuanVideo's"
        )
    own = {name: getattr(config, name) for name in ("qwen", "qwen_vision", "clip", "tiling", "base")}
    return replace(chosen, vae=config.vae if vae_known else chosen.vae, **own)


def presets_like(config: PipelineConfig, task_known: bool = True) -> list[str]:
    """The presets that a checkpoint may be, those most like its name first: same DiT, and if known task and attention.

    An -sd and an -hd preset share a download, so that either fits where the other one does.
    """

    def shared(name: str) -> str:
        return name.removesuffix("-sd").removesuffix("-hd")

    fits = {
        shared(name)
        for name, preset in PRESETS.items()
        if replace(preset.dit, nabla=None) == replace(config.dit, nabla=None)
        and (not task_known or (preset.dit.nabla, preset.tasks) == (config.dit.nabla, config.tasks))
    }
    own = config.name.lower()
    likeness = {name: difflib.SequenceMatcher(None, own, shared(name)).ratio() for name in PRESETS}
    return sorted((name for name in PRESETS if shared(name) in fits), key=lambda name: -likeness[name])


def list_files(folder: Path, keep: Callable[[Path], bool]) -> dict[str, Path]:
    """The files below `folder` for which `keep(path)` holds, by relative path. ValueError if a link leaves it."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): check_inside(folder / path, folder) for path in paths if keep(path)}


def _chosen(only: str | None) -> tuple[str, ...]:
    if only not in (None, *MODELS):
        raise ValueError(f"{only!r} (--only) is no part of a checkpoint: choose {', '.join(MODELS)}")
    return (only,) if only else MODELS


def _must_see(tasks: tuple[str, ...], sources: Mapping[str, Source]) -> bool:
    """Whether Qwen is converted for a model that edits images, which it has to see."""
    return "i2i" in tasks and "qwen" in sources


def _guess_tasks(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """What bare files are for, as far as their sizes show it: a 2-D VAE is of images, a DiT without conditioning
    channels makes them from text alone."""
    dit, vae = (sources[model].sizes if model in sources else None for model in ("dit", "vae"))
    if not isinstance(vae, VAEConfig) or vae.dimensions == 3:
        return ("t2v",)
    return ("i2i",) if isinstance(dit, DiTConfig) and dit.visual_cond else ("t2i",)


def _with_sizes(config: PipelineConfig, sources: Mapping[str, Source]) -> PipelineConfig:
    sizes: dict[str, Any] = {model: source.sizes for model, source in sources.items()}  # each goes by its model's name
    sizes.pop("qwen_head", None)  # which has Qwen's
    if "qwen" in sources:
        sizes.setdefault("qwen_vision", None)
    return replace(config, **sizes)


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
