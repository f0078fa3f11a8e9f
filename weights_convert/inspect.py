"""What a checkpoint file or folder is: layout, models, sizes, precision, and the presets that it may be."""

import os
from collections import Counter
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

from kandinsky5.checkpoint import MODELS, SHIPPED, find_part, find_shipped, models_of
from kandinsky5.config import NANO_NAMES, PRESETS, DiTConfig, QwenVisionConfig
from kandinsky5.config_file import load_config
from kandinsky5.files import read_json
from kandinsky5.screen import listed, printable
from kandinsky5.tensor_files import Computed, Weights
from weights_convert import lora, tables
from weights_convert.diffusers_files import FOLDERS, read_tasks
from weights_convert.match import describe_model
from weights_convert.read import find_config, read_weights
from weights_convert.sizes import ModelConfig, build_config, kind_of

# Our name of a tensor that only this model has.
MARKS = {
    "qwen_vision": "merger.linear_in.weight",
    "dit": "patch_embedder.weight",
    "vae": "encoder.mid.attention.norm.weight",
    "qwen": "blocks.0.feed_forward.gate.weight",
    "clip": "position_embedding.weight",
    "qwen_head": "weight",
}

MOST_LINES = 20  # of a LoRA's metadata; ours has ten
# Next to model/, where the authors' download script puts the other three.
OFFICIAL_FOLDERS = ("vae", "text_encoder", "text_encoder2")


def inspect(path: str | Path) -> dict:
    """What `path` is, in plain values: {"path", "layout", "tasks", "models": [one dict for each]}.

    path: a folder in the native, the Diffusers or the official layout, the folder of one model, one file of weights, or
        the name of a bundled model.
    ValueError if it is none of these, or damaged.
    """
    path, tasks = find_shipped(path), None
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if (path / "model_index.json").is_file():
        layout, tasks = "Diffusers", read_tasks(path)
        rows = [inspect_model(path / FOLDERS[m], tasks) for m in MODELS if (path / FOLDERS[m]).is_dir()]
    elif any(list(path.glob(f"{m}.safetensors*")) for m in MODELS):
        config = load_config(path / "config.json")
        layout, tasks = "native", config.tasks
        folders = {m: find_part(path, m, config.base) for m in models_of(config)}
        files = {m: sorted(folder.glob(f"{m}.safetensors*"), reverse=True) for m, folder in folders.items()}
        rows = [inspect_model(found[0], tasks, getattr(config, m)) for m, found in files.items() if found]
    elif official := sorted(path.glob("model/*.safetensors")):
        layout = "official"
        rows = [inspect_model(found) for found in (*official, *map(path.joinpath, OFFICIAL_FOLDERS)) if found.exists()]
    elif lora.is_lora(read_weights(path).tensors):
        return {"path": str(path), "layout": "LoRA", "tasks": None, "models": [], "lora": inspect_lora(path)}
    else:
        layout, rows = "one model", [inspect_model(path)]
    return {"path": str(path), "layout": layout, "tasks": tasks, "models": rows}


def inspect_model(path: Path, tasks: tuple[str, ...] | None = None, sizes: ModelConfig | None = None) -> dict:
    """One row. sizes: of a native config.json; else from the config.json next to the weights, and shapes."""
    stored_there = read_weights(path)
    model, names, weights = recognise(stored_there)
    config = find_config(path)
    if sizes is None and config and names == "native":
        sizes = getattr(load_config(config), model)
    attention_known = bool(sizes or config)
    if sizes is None:
        shapes = {name: stored.shape for name, stored in weights.tensors.items()}
        kind = tables.kind_of(model, weights.tensors)
        sizes = build_config(kind, read_json(config) if config else {}, shapes, str(path))
    ours = {tables.theirs(kind_of(model, sizes), name) for name in describe_model(model, sizes, str(path))[0]}
    used = [stored for name, stored in weights.tensors.items() if name in ours]
    nbytes: Counter[str] = Counter()
    for stored in weights.tensors.values():
        nbytes[stored.kind if isinstance(stored, Computed) else stored.dtype] += stored.nbytes
    return {
        "model": model,
        "file": str(weights.source),
        "names": names,
        "dtypes": dict(nbytes.most_common()),  # bytes of each
        "parameters": sum(prod(stored.shape) for stored in used),
        "other tensors": len(stored_there.tensors) - len(used),
        "missing tensors": len(ours - weights.tensors.keys()),
        "sizes": asdict(sizes),
        "attention known": attention_known,
        "presets": presets_of(model, sizes, tasks, attention_known),
    }


def inspect_lora(path: Path) -> dict:
    """Format, rank and alpha (several where modules differ), and the models whose Linears it fits."""
    file = lora.read(path)
    sizes = {f"{name}.weight": (len(pair.B), pair.A.shape[1]) for name, pair in file.pairs.items()}
    dits = {name: preset.dit for name, preset in PRESETS.items()}
    dits |= {name: load_config(SHIPPED / name / "config.json").dit for name in NANO_NAMES}
    fitting: dict[DiTConfig, bool] = {}
    for dit in {replace(dit, nabla=None) for dit in dits.values()}:
        shapes = describe_model("dit", dit, "preset")[0]
        fitting[dit] = all(shapes.get(name) == size for name, size in sizes.items())
    return {
        "names": file.layout,
        "rank": sorted({len(pair.A) for pair in file.pairs.values()}),
        "alpha": sorted({pair.alpha for pair in file.pairs.values()}),
        "modules": len(file.pairs),
        "parameters": sum(pair.A.numel() + pair.B.numel() for pair in file.pairs.values()),
        "dtypes": sorted({str(pair.A.dtype).removeprefix("torch.") for pair in file.pairs.values()}),
        "presets": [name for name, dit in dits.items() if fitting[replace(dit, nabla=None)]],
        "trigger": file.metadata.get("trigger", ""),
        "metadata": file.metadata,
    }


def recognise(weights: Weights) -> tuple[str, str, Weights]:
    """The model, whose names its tensors have ("native" or "Diffusers"), and the weights by their Diffusers names.

    ValueError for tensors of any other model.
    """
    for model, mark in MARKS.items():
        kind = tables.kind_of(model, weights.tensors)
        if mark in weights.tensors:
            try:
                tensors = {tables.theirs(kind, name): stored for name, stored in weights.tensors.items()}
            except KeyError as error:
                raise ValueError(f"{weights.source} has tensors that a native {model} does not: {error}") from error
            return model, "native", weights._replace(tensors=tensors)
    for model in MODELS:
        kind = tables.kind_of(model, weights.tensors)
        tensors = tables.respell(kind, weights.tensors)
        if tables.theirs(kind, MARKS[model]) in tensors:
            return model, "Diffusers", weights._replace(tensors=tensors)
    raise ValueError(f"{weights.source} holds none of {', '.join(MODELS)}: its tensors are {listed(weights.tensors)}")


def presets_of(model: str, sizes: ModelConfig, tasks: tuple[str, ...] | None, attention_known: bool) -> list[str]:
    """The presets that have this model; a DiT also tells task and attention apart, where these are known."""
    fitting = []
    for name, preset in PRESETS.items():
        expected = getattr(preset, model) or QwenVisionConfig()  # which presets leave out
        if isinstance(sizes, DiTConfig) and not attention_known:
            expected = replace(expected, nabla=sizes.nabla)
        if expected == sizes and (model != "dit" or tasks in (None, preset.tasks)):
            fitting.append(name)
    return fitting


def as_table(report: dict) -> str:
    """The report as a table; of a LoRA in four lines."""
    if "lora" in report:
        return describe_lora(printable(report["path"]), report["lora"])
    rows = [("model", "file", "names", "stored as", "parameters", "sizes", "presets")]
    folder = report["path"] if Path(report["path"]).is_dir() else Path(report["path"]).parent
    for row in report["models"]:
        dtypes = " + ".join(f"{dtype} {nbytes / 1e6:,.1f} MB" for dtype, nbytes in row["dtypes"].items())
        fitting = "all" if len(row["presets"]) == len(PRESETS) else ", ".join(row["presets"]) or "none"
        file, parameters = os.path.relpath(row["file"], folder), f"{row['parameters']:,}"
        rows.append((row["model"], printable(file, 200), row["names"], dtypes, parameters, summary(row), fitting))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    tasks = f", {' and '.join(report['tasks'])}" if report["tasks"] else ""
    notes = []
    for row in report["models"]:
        if row["other tensors"]:
            use = "only --with-vision keeps" if row["model"] == "qwen" else "are not used here"
            notes.append(f"{row['model']}: {row['other tensors']} tensors that {use}")
        if row["missing tensors"]:
            notes.append(f"{row['model']}: {row['missing tensors']} tensors are MISSING")
    return "\n".join([f"{printable(report['path'])}: {report['layout']}{tasks}", *lines, *notes])


def describe_lora(path: str, found: dict) -> str:
    """What a LoRA is, for people."""
    rank, alpha = (listed([f"{value:g}" for value in found[name]]) for name in ("rank", "alpha"))
    lines = [
        f"{path}: LoRA, {found['names']} layout",
        f"rank {rank}, alpha {alpha}; {found['modules']} modules, {found['parameters'] / 1e6:,.1f} M parameters "
        f"stored as {', '.join(found['dtypes'])}",
        f"fits {', '.join(found['presets']) or 'none of the known models'}",
        f"trigger: {printable(found['trigger'], 200) or 'none'}",
    ]
    others = {key: text for key, text in found["metadata"].items() if key != "trigger"}
    some = list(others.items())[:MOST_LINES]
    lines += [f"{printable(key, 50)}: {printable(text, 200)}" for key, text in some]
    more = len(others) - len(some)
    return "\n".join([*lines, *([f"and {more:,} more of its metadata: --json shows all"] if more else [])])


def summary(row: dict) -> str:
    """The sizes that tell models apart."""
    sizes = row["sizes"]
    if row["model"] == "dit":
        attention = f"NABLA {sizes['nabla']['P']:g}" if sizes["nabla"] else "full attention"
        attention = attention if row["attention known"] else "attention unknown"
        return f"dim {sizes['dim']}, {sizes['num_text_blocks']} + {sizes['num_visual_blocks']} blocks, {attention}"
    if row["model"] == "vae":
        return f"{sizes['dimensions']}-D, channels {', '.join(map(str, sizes['channels']))}"
    if row["model"] == "qwen_head":
        return f"dim {sizes['dim']}, {sizes['vocab_size']:,} words"
    return f"dim {sizes['dim']}, {sizes['num_layers']} layers"
