"""Diffusers folders from native ones."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from kandinsky5.checkpoint import OPTIONAL, find_part, find_shipped, models_of
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.files import write_json
from kandinsky5.screen import say
from kandinsky5.tensor_files import Computed
from weights_convert import diffusers_files, tables
from weights_convert.diffusers_files import FOLDERS, NATIVE_CONFIG, STEMS, TOKENIZERS
from weights_convert.match import build_part, chosen, join_parts
from weights_convert.read import read_weights
from weights_convert.sizes import kind_of, to_their_config
from weights_convert.write import Options, list_files, write_folder


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
    for model in chosen(only):
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
        replaced = {"scheduler", "model_index.json", NATIVE_CONFIG, *(FOLDERS[model] for model in chosen(only))}
        linked = list_files(Path(base), lambda place: place.parts[0] not in replaced)

    def write_small_files(folder: Path) -> None:
        for model in chosen(only):
            sizes = getattr(config, model)
            theirs = to_their_config(kind_of(model, sizes), sizes, config.qwen_vision)
            write_json(folder / FOLDERS[model] / "config.json", theirs)
            tokenizer = folders.get(f"{model}_tokenizer", src) / f"{model}_tokenizer"
            if model in TOKENIZERS and not base and tokenizer.is_dir():
                diffusers_files.copy_tokenizer(tokenizer, folder / TOKENIZERS[model])
                diffusers_files.write_tokenizer_config(model, folder / TOKENIZERS[model])
                if model == "qwen" and config.qwen_vision:
                    diffusers_files.write_preprocessor_config(config.qwen_vision, folder / TOKENIZERS[model])
        if base or not only:
            diffusers_files.write_scheduler(config.sampling.shift, folder / "scheduler" / "scheduler_config.json")
            diffusers_files.write_model_index(config.tasks, folder / "model_index.json", base)
            save_config(config, folder / NATIVE_CONFIG)

    write_folder(dst, parts, write_small_files, linked, settings)
    return config
