"""LoRA files: the four layouts in which others and we store the same updates, recognised by their tensors' names.

    native      visual_blocks.0.self_attention.to_q.A, .B                          alphas in the metadata
    official    base_model.model.MODULE.lora_A.default.weight, lora_B              alpha in config_lora.json next to it
    diffusers   transformer.MODULE.lora_A.weight, lora_B                           alpha in the metadata, or scale 1
    kohya       lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight, lora_up        MODULE….alpha

MODULE is the Diffusers name of a Linear, as in `tables.py`. A is (rank, in), B (out, rank), and what is added to the
Linear's weight is alpha / rank · B A.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky5.checkpoint import save_weights
from kandinsky5.files import make_folder, parse_json, read_json, write_json
from kandinsky5.screen import listed
from kandinsky5.tensor_files import FLOATS, Stored, Weights
from weights_convert import tables
from weights_convert.read import read_weights

LAYOUTS = {  # what A and B of a module are called in each
    "native": ("{}.A", "{}.B"),
    "official": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}
FACTORS = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B"}
PEFT = re.compile(r"(?:base_model\.model\.|transformer\.|diffusion_model\.)?(.+)\.(lora_A|lora_B)(?:\.\w+)?\.weight")
KOHYA = re.compile(r"lora_unet_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
NATIVE = re.compile(r"(.+)\.([AB])")
CONFIGS = ("config_lora.json", "adapter_config.json")  # the authors', PEFT's
THEIR_METADATA = "lora_adapter_metadata"  # diffusers' key in the header
OURS = {theirs: ours for ours, theirs in tables.DIT.items()}
FLAT = {theirs.replace(".", "_"): ours for theirs, ours in OURS.items()}
MOST_MODULES = 2048  # Pro has some 800 Linears
# Fields of a LoraConfig that would change what is computed, and the values with which they do not.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",), "use_dora": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "use_bdlora": (False,), "kasa_config": (), "layer_replication": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the weights of the model too
}  # fmt: skip
LONGEST_TRIGGER = 1000  # characters: a phrase, not a text
FORMAT = ("format", "sha256", "alpha", THEIR_METADATA)  # of the metadata, what a layout says for itself


class Pair(NamedTuple):
    """The two factors of one update."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    alpha: float


class File(NamedTuple):
    """A LoRA as read: pairs by our names of the Linears, and what its metadata says besides (trigger, base, …)."""

    name: str
    layout: str
    pairs: dict[str, Pair]
    metadata: dict[str, str]


def is_lora(names: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are a LoRA's, in any layout."""
    return any(recognise(name) for name in names)


def recognise(name: str) -> tuple[str, str, str] | None:
    """Layout, module in the layout's spelling, and "A", "B" or "alpha" of a tensor; None if it is no LoRA's."""
    if match := KOHYA.fullmatch(name):
        return "kohya", match[1], FACTORS.get(match[2].removesuffix(".weight"), "alpha")
    if match := PEFT.fullmatch(name):
        return "official" if ".default." in name else "diffusers", match[1], FACTORS[match[2]]
    if match := NATIVE.fullmatch(name):
        return "native", match[1], match[2]
    return None


def our_name(layout: str, module: str) -> str | None:
    """Our name of a DiT's module; None if it has no such one."""
    if layout == "native":
        template, indices = tables.as_template(module)
        return module if template in tables.DIT else None
    if layout == "kohya":
        indices = re.findall(r"(?<=_blocks_)\d+(?=_)", module)
        ours = FLAT.get(re.sub(r"(?<=_blocks_)\d+(?=_)", "{}", module))
    else:
        template, indices = tables.as_template(module)
        ours = OURS.get(template)
    return ours.format(*indices) if ours else None


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> File:
    """The LoRA in a file or folder. ValueError, in one line, for anything else, and for halves that do not fit."""
    weights = read_weights(path)
    found, odd, layouts = {}, [], Counter[str]()
    for name, stored in weights.tensors.items():
        kind = recognise(name)
        ours = kind and our_name(kind[0], kind[1])
        if not kind or not ours:
            odd.append(name)
            continue
        layouts[kind[0]] += 1
        found[ours, kind[2]] = stored
    if not layouts:
        what = "updates modules that no Kandinsky 5 DiT has" if is_lora(weights.tensors) else "is no LoRA"
        raise ValueError(f"{weights.source} {what}: its tensors are {listed(odd, 3)}")
    if odd:
        raise ValueError(f"{weights.source} updates what no Kandinsky 5 DiT has, or in another way: {listed(odd, 3)}")
    if layouts.total() > 3 * MOST_MODULES:
        raise ValueError(f"{weights.source} has {layouts.total():,} tensors: no DiT has so many Linears")
    if len(layouts) > 1:
        raise ValueError(f"{weights.source} mixes the layouts {', '.join(layouts)}: convert it again from its source")
    layout = next(iter(layouts))
    modules = sorted({module for module, _ in found})
    check_halves(weights, modules, found)
    alphas = read_alphas(layout, weights, modules, found)
    if odd := [f"{module} {alpha:g}" for module, alpha in alphas.items() if not math.isfinite(alpha)]:
        raise ValueError(f"{weights.source} has alphas that are no finite numbers: {listed(odd, 3)}")
    if len(weights.metadata.get("trigger", "")) > LONGEST_TRIGGER:
        raise ValueError(f"{weights.source} has a trigger of more than {LONGEST_TRIGGER:,} characters: shorten it")
    pairs = {m: Pair(values(found[m, "A"]), values(found[m, "B"]), alphas[m]) for m in modules}
    if odd := [m for m, pair in pairs.items() if not all(x.float().isfinite().all() for x in (pair.A, pair.B))]:
        raise ValueError(
            f"{weights.source} holds values that are no finite numbers, in {listed(odd, 3)}: train or download it again"
        )
    metadata = {key: text for key, text in weights.metadata.items() if key not in FORMAT}
    folder_says = weights.source.stem in ("lora", "pytorch_lora_weights", "adapter_model")
    return File(weights.source.parent.name if folder_says else weights.source.stem, layout, pairs, metadata)


def check_halves(weights: Weights, modules: list[str], found: Mapping[tuple[str, str], Stored]) -> None:
    """ValueError if an A or a B is missing, is no matrix of floats, or the two have different ranks."""
    problems = []
    for module in modules:
        pair = [found.get((module, half)) for half in "AB"]
        if None in pair:
            problems.append(f"{module} has no {'AB'[pair.index(None)]}")
            continue
        a, b = pair
        assert a and b
        if len(a.shape) != 2 or len(b.shape) != 2 or a.dtype not in FLOATS or b.dtype not in FLOATS:
            problems.append(f"{module} has A {a.dtype} {a.shape} and B {b.dtype} {b.shape}, not two matrices of floats")
        elif a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            problems.append(f"{module} has rank {a.shape[0]} in A {a.shape} and {b.shape[1]} in B {b.shape}")
    if problems:
        raise ValueError(f"{weights.source} holds halves that do not belong together: {listed(problems, 3)}")


def read_alphas(
    layout: str, weights: Weights, modules: list[str], found: Mapping[tuple[str, str], Stored]
) -> dict[str, float]:
    """Alpha of each module; its rank, for a scale of 1, where the file says nothing. ValueError for contradictions."""
    ranks = {module: found[module, "A"].shape[0] for module in modules}
    if layout == "kohya":
        given = {m: found[m, "alpha"] for m in modules if (m, "alpha") in found}
        if odd := [f"{m} {x.dtype} {x.shape}" for m, x in given.items() if math.prod(x.shape) != 1 or x.dtype == "C64"]:
            raise ValueError(f"{weights.source} has alphas that are not one number: {listed(odd, 3)}")
        return ranks | {module: float(values(stored)) for module, stored in given.items()}
    if layout == "native":
        alpha = parse_json(weights.metadata.get("alpha", "{}").encode(), f"{weights.source}: alpha")
        alphas = alpha if isinstance(alpha, dict) else dict.fromkeys(modules, alpha)
        if not all(type(value) in (int, float) for value in alphas.values()):
            raise ValueError(f"{weights.source}: its alpha should be a number, or one for each module")
        return ranks | {module: as_float(alphas[module]) for module in modules if module in alphas}
    config = find_peft_config(weights)
    if config is None:
        return {module: float(rank) for module, rank in ranks.items()}
    return alphas_by_config(config, ranks, weights.source)


def find_peft_config(weights: Weights) -> dict[str, Any] | None:
    """PEFT's LoraConfig: in the metadata as diffusers writes it, or in a file next to the weights."""
    if THEIR_METADATA in weights.metadata:
        config = parse_json(weights.metadata[THEIR_METADATA].encode(), f"{weights.source}: {THEIR_METADATA}")
        if not isinstance(config, dict):
            raise ValueError(f"{weights.source}: its {THEIR_METADATA} is no table")
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    files = [weights.source.with_name(name) for name in CONFIGS if weights.source.with_name(name).is_file()]
    return read_json(files[0]) if files else None


def alphas_by_config(config: dict[str, Any], ranks: Mapping[str, int], source: Path) -> dict[str, float]:
    """Alpha by a LoraConfig, whose patterns name modules. ValueError if its ranks are not those of the tensors."""
    for option, harmless in PLAIN.items():
        if config.get(option) not in (None, *harmless):
            said = f"{option} = {config[option]!r:.100}"
            raise ValueError(f"{source} uses {said}, which is not supported: train it without, or merge it elsewhere")
    for patterns in (config.get("rank_pattern"), config.get("alpha_pattern")):
        if not isinstance(patterns, dict | None) or len(patterns or ()) > MOST_MODULES:
            raise ValueError(f"{source}: its config has a pattern that is no table of at most {MOST_MODULES:,} modules")
    alphas, wrong = {}, []
    for ours, rank in ranks.items():
        theirs = tables.theirs("dit", f"{ours}.weight").removesuffix(".weight")
        stated = by_pattern(config.get("rank_pattern"), theirs, config.get("r", rank))
        alpha = by_pattern(config.get("alpha_pattern"), theirs, config.get("lora_alpha", rank))
        if type(alpha) not in (int, float) or type(stated) is not int:
            raise ValueError(f"{source}: its config says rank {stated!r:.50} and alpha {alpha!r:.50}, not two numbers")
        if stated != rank:
            wrong.append(f"{theirs} has rank {rank}, its config says {stated}")
        alphas[ours] = as_float(alpha) * (rank**0.5 if config.get("use_rslora") else 1)  # there: alpha / √rank
    if wrong:
        raise ValueError(f"{source} and its config contradict each other: {listed(wrong, 3)}")
    return alphas


def as_float(number: float) -> float:
    """A number of a JSON file, where whole ones have any length; infinity beyond what a float holds."""
    return float(number) if abs(number) < 1e300 else math.inf


def by_pattern(patterns: Any, module: str, usual: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the value of the first key that is the module's name or ends it."""
    for key, value in (patterns or {}).items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or not key.startswith("^") and module.endswith(f".{name}"):
            return value
    return usual


def values(stored: Stored) -> Tensor:
    """A small tensor of a file, in memory."""
    return torch.cat(list(stored.chunks())).view(stored.shape)


# ---------------------------------------------------------------------------------------------- writing


def convert(src: str | Path, dst: str | Path, to: str) -> File:
    """Write the LoRA `src` in another layout: a new folder for "official", else a .safetensors file.

    Values, alphas and metadata stay as they are. ValueError if `dst` exists or has another suffix.
    """
    src, dst = Path(src), Path(dst)
    file = read(src)
    if dst.exists():
        raise ValueError(f"{dst} exists: choose another name, or remove it first")
    if (dst.suffix == ".safetensors") == (to == "official"):
        kind = "folder, without .safetensors" if to == "official" else "file, with .safetensors at the end"
        raise ValueError(f"{dst}: the layout {to} is a {kind}")
    make_folder(dst.parent)
    write(file, dst, to)
    return file


def write(file: File, dst: Path, layout: str) -> None:
    """One of LAYOUTS; "official" is a folder of two files."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose {', '.join(LAYOUTS)}")
    theirs = {ours: tables.theirs("dit", f"{ours}.weight").removesuffix(".weight") for ours in file.pairs}
    metadata, state = {"format": "pt", **file.metadata}, dict[str, Tensor]()
    for ours, (A, B, alpha) in file.pairs.items():
        module = ours if layout == "native" else theirs[ours]
        if layout == "kohya":
            module = module.replace(".", "_")
            single = torch.tensor(alpha, dtype=torch.float32)
            state[f"lora_unet_{module}.alpha"] = single if float(single) == alpha else single.double().fill_(alpha)
        state |= {name.format(module): factor for name, factor in zip(LAYOUTS[layout], (A, B), strict=True)}
    config = build_peft_config({theirs[ours]: pair for ours, pair in file.pairs.items()})
    if layout == "native":
        metadata |= describe_alphas({ours: pair.alpha for ours, pair in file.pairs.items()})
    if layout == "diffusers":
        metadata[THEIR_METADATA] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    if layout == "official":
        make_folder(dst)
        write_json(dst / CONFIGS[0], config)
    save_weights(state, dst / "lora.safetensors" if layout == "official" else dst, metadata)


def describe_alphas(alphas: Mapping[str, float]) -> dict[str, str]:
    """The native layout's metadata: one number if all modules share it, else a table."""
    same = set(alphas.values())
    return {"alpha": json.dumps(same.pop() if len(same) == 1 else dict(alphas), sort_keys=True)}


def build_peft_config(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """A LoraConfig for these modules: the commonest rank and alpha, and patterns for the others."""
    ranks, alphas = {m: len(pair.A) for m, pair in pairs.items()}, {m: plain(pair.alpha) for m, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(pairs),
        "rank_pattern": {f"^{m}": value for m, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{m}": value for m, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
    }


def plain(alpha: float) -> float | int:
    """32.0 → 32, as PEFT's alphas are mostly whole."""
    return int(alpha) if alpha == int(alpha) else alpha
