"""Weights that a file stores in 8 bits next to their scales, by content: fp8 of other tools, and our own int8.

    layer.weight (out, in) fp8, layer.scale_weight (…) → the weights that these stand for, computed when they are read

Each tool calls the scales something else; all multiply. Their shape says what shares one: a tensor, a row, a block of
a row, or a square. What is not known here is refused, as a wrong scale gives wrong numbers without any other sign.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

from torch import Tensor

from kandinsky5.files import parse_json
from kandinsky5.runtime.quantize import BLOCK
from kandinsky5.tensor_files import CHUNK, DTYPES, FLOATS, Computed, Stored, Weights

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")  # ComfyUI and musubi-tuner; ComfyUI, vLLM; DeepSeek
WHOLE = "scale_weight_tensor"  # musubi-tuner's second factor of a block-wise weight: one number
ACTIVATIONS = ("scale_input", "input_scale")  # for kernels that round activations too; the weights do not need them
SQUARE = 128  # rows and columns of DeepSeek's blocks, of which the last may be smaller
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of ComfyUI's own descriptions, those that are read here
DESCRIBED = {"format", "full_precision_matrix_mult"}  # keys of such a description that change no weight
REMEDY = "take the weights in bf16, or in fp8 with scales per tensor, row or block"


def widen(weights: Weights) -> Weights:
    """The same with every 8-bit weight and its scales as one tensor, in bfloat16 unless it is cast.

    ValueError, one line, for scales that are not known. What remains unexplained stays, for `build_part` to refuse.
    """
    tensors, metadata = dict(weights.tensors), dict(weights.metadata)
    try:
        if described := metadata.pop("_quantization_metadata", None):
            document = parse_json(described.encode(), "_quantization_metadata")
            layers = document.get("layers") if isinstance(document, dict) else None
            for layer, description in layers.items() if isinstance(layers, dict) else [("all", document)]:
                check_description(layer, description)
        for name, stored in weights.tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind == "comfy_quant" and stored.dtype == "U8" and stored.nbytes < 10_000:
                check_description(layer, parse_json(bytes(stored.read().tolist()), name))
                del tensors[name]
            elif kind == "scaled_fp8" and stored.dtype in FP8 and prod(stored.shape) <= 2:
                del tensors[name]  # ComfyUI's mark on a file, whose values mean nothing
            elif name in tensors and (stored.dtype in FP8 or stored.dtype == "I8"):
                tensors[name] = widen_one(layer, name, tensors)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from error
    return weights._replace(tensors=tensors, metadata=metadata)


def check_description(layer: str, description: object) -> None:
    """ValueError unless ComfyUI's description of a quantised layer is one of FORMATS and asks for nothing else."""
    known = isinstance(description, dict) and description.keys() <= DESCRIBED and description.get("format") in FORMATS
    if not known:
        raise ValueError(
            f"{layer} is described (comfy_quant) as {description!r:.200}, which is not read here: {REMEDY}"
        )


def widen_one(layer: str, name: str, tensors: dict[str, Stored]) -> Stored:
    """The tensor of that name with its scales, which are taken out of `tensors`; ValueError for two, or odd ones."""
    stored = tensors[name]
    companions = ("scale",) if stored.dtype == "I8" else SCALES
    found = [kind for kind in companions if name == f"{layer}.weight" and f"{layer}.{kind}" in tensors]
    if stored.dtype == "I8" and not found:
        return stored  # of a kind that is not ours
    if not found:
        return _computed(stored, stored.chunks, f"{stored.dtype} without scales")
    if len(found) > 1:
        raise ValueError(f"{name} has several scales, {' and '.join(found)}: {REMEDY}")
    scale = tensors.pop(f"{layer}.{found[0]}")
    block, what = find_block(name, stored, scale)
    if stored.dtype == "I8" and block != (1, BLOCK):
        raise ValueError(f"{name} has a scale {scale.shape}; int8 of ours has one for {BLOCK} inputs: {REMEDY}")
    whole = tensors.pop(f"{layer}.{WHOLE}", None)
    if whole and (prod(whole.shape) != 1 or whole.dtype not in FLOATS):
        raise ValueError(f"{layer}.{WHOLE} {whole.shape} is not one number: {REMEDY}")
    for kind in ACTIVATIONS:
        tensors.pop(f"{layer}.{kind}", None)
    kind = f"{stored.dtype} × {found[0]} {what}"
    return _computed(stored, lambda: multiply(stored, scale, whole, block), kind)


def find_block(name: str, stored: Stored, scale: Stored) -> tuple[tuple[int, int], str]:
    """How many rows and columns of a weight share a scale, and that in words; ValueError if the shape fits nothing."""
    shape = scale.shape[:-1] if len(scale.shape) == 3 and scale.shape[-1] == 1 else scale.shape
    if 0 in stored.shape + shape:
        raise ValueError(f"{name} {stored.shape} or its scale {scale.shape} has no values: download it again")
    if scale.dtype in FLOATS and prod(shape) == 1:
        return (1, prod(stored.shape[1:])), "per tensor"
    if scale.dtype in FLOATS and len(stored.shape) == 2:
        out, width = stored.shape
        if shape in ((out,), (out, 1)):
            return (1, width), "per row"
        if len(shape) == 2 and shape[0] == out and width % shape[1] == 0:
            return (1, width // shape[1]), f"in blocks of {width // shape[1]}"
        if shape == (-(-out // SQUARE), -(-width // SQUARE)):
            return (SQUARE, SQUARE), f"in blocks of {SQUARE} × {SQUARE}"
    raise ValueError(
        f"{name} {stored.shape} has a scale {scale.shape} of {scale.dtype}, which fits no layout: {REMEDY}"
    )


def multiply(stored: Stored, scale: Stored, whole: Stored | None, block: tuple[int, int]) -> Iterator[Tensor]:
    """The weights in float32, a few rows at a time: (n,) each."""
    rows, width = stored.shape[0] if stored.shape else 1, prod(stored.shape[1:])
    high, wide = block
    scales = scale.read().float()
    if whole:
        scales = scales * whole.read().float()
    scales = scales.view(-1, 1).expand(rows, 1) if scales.numel() == 1 else scales.view(-(-rows // high), -1)
    step = high * max(1, CHUNK // 4 // (high * width))  # as many rows as are a chunk in float32
    for first in range(0, rows, step):
        count, start = min(step, rows - first), stored.start + first * width
        some = replace(stored, start=start, stop=start + count * width, shape=(count, width))
        spread = scales[first // high : -(-(first + count) // high)]
        spread = spread.repeat_interleave(high, 0)[:count].repeat_interleave(wide, 1)[:, :width]  # (count, width)
        yield (some.read().float() * spread).flatten()


def _computed(stored: Stored, pieces: Callable[[], Iterator[Tensor]], kind: str) -> Computed:
    assert DTYPES[stored.dtype].itemsize == 1, stored
    return Computed.of(stored, stored.shape, "BF16", pieces, kind)
