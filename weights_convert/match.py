"""Each tensor of our models matched with one of theirs: none is missing, none left over, all of the right shape."""

from collections.abc import Callable

from torch import nn

from kandinsky5.checkpoint import MODELS, without_weights
from kandinsky5.dit import Float32Linear
from kandinsky5.runtime.loading import CLASSES
from kandinsky5.runtime.quantize import linears, quantise_stored
from kandinsky5.screen import listed, printable, say
from kandinsky5.tensor_files import FLOATS, Stored, Weights
from weights_convert import tables
from weights_convert.sizes import ModelConfig
from weights_convert.write import Options, Part

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
INT8 = ("dit", "qwen")  # the models that --dtype int8 quantises  # the models that --dtype int8 quantises


def build_part(
    model: str, sizes: ModelConfig, weights: Weights, name_there: Callable[[str], str],
    name_here: Callable[[str], str], stem: str, options: Options,
) -> Part:  # fmt: skip
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


def chosen(only: str | None) -> tuple[str, ...]:
    """The models to convert: all four, or only this one. Raises ValueError for another name."""
    if only not in (None, *MODELS):
        raise ValueError(f"{only!r} (--only) is no part of a checkpoint: choose {', '.join(MODELS)}")
    return (only,) if only else MODELS
