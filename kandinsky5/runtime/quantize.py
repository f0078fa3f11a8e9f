"""Weights in 8 bits: int8, with one scale for every 32 inputs of a row, widened while their layer runs.

    weight (out, in) ≈ int8 (out, in) · scale (out, in / 32)

These are the Linears in the blocks of the DiT and of Qwen, most of both models' weights, which then take 1.06 bytes
each. Modulations, embedders, norms and the final layer keep their precision. Activations do too: what is saved is
memory and traffic, not arithmetic. docs/quantisation.md has the errors.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky5.dit import DiT
from kandinsky5.qwen import Qwen
from kandinsky5.tensor_files import FLOATS, Computed, Stored, Weights

BLOCK = 32  # inputs that share a scale
LARGEST = 127  # ± of an int8 that is used: symmetric, so that there is no zero point
SCALE = torch.bfloat16  # rounding a scale costs nothing: the int8 values are chosen for the rounded one


class Int8Linear(nn.Linear):
    """A Linear with its weight in int8 and scales next to it: x (…, in) → (…, out) in x's precision."""

    scale: Tensor  # (out, in / 32), a buffer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.weight, self.scale, x.dtype), self.bias)

    def _apply(self, fn, recurse=True):
        # Module.to(), .half() and .float() come here. The scales move, but a cast would change the weights.
        def keep_precision(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if x.dtype == SCALE != moved.dtype and x is self.scale else moved

        return super()._apply(keep_precision, recurse)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (…, in) of any precision → int8 (…, in) and scales (…, in / 32).

    The largest of 32 becomes ±127. NaN and infinity are in the scale, so that what is computed with it is NaN.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))  # (…, in / 32, 32)
    scale = (blocks.abs().amax(dim=-1) / LARGEST).to(SCALE)
    steps = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return steps.round_().flatten(-2).to(torch.int8), scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (…, in) and scales (…, in / 32) → weights (…, in); in float32 exact, in bfloat16 rounded once."""
    blocks = weight.to(dtype).unflatten(-1, (-1, BLOCK))
    return blocks.mul_(scale.to(dtype)[..., None]).flatten(-2)


def linears(model: nn.Module, kind: type = nn.Linear) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears of a DiT's or Qwen's blocks that are of this very kind; other models are small and have none.

    Rows of a length that 32 does not divide stay as they are; no released model has any.
    """
    if isinstance(model, (DiT, Qwen)):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and type(module) is kind and "blocks" in name:
                if module.in_features % BLOCK == 0:
                    yield name, module


def to_int8(model: nn.Module) -> nn.Module:
    """Quantise the Linears of a DiT's or Qwen's blocks in place, one by one; on the meta device only their shapes."""
    for _, linear in list(linears(model)):
        weight, scale = _shapes(linear) if linear.weight.is_meta else quantise(linear.weight.detach())
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_buffer("scale", scale)
        linear.__class__ = Int8Linear
    return model


def _shapes(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """`quantise` on the meta device, where to compute would import PyTorch's compiler, which takes seconds."""
    rows, width = linear.weight.shape
    int8 = torch.empty(rows, width, dtype=torch.int8, device="meta")
    return int8, torch.empty(rows, width // BLOCK, dtype=SCALE, device="meta")


def to_float(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Undo `to_int8` but for what rounding has lost: plain Linears again, with weights in this precision."""
    for _, linear in list(linears(model, Int8Linear)):
        weight = dequantise(linear.weight, linear.get_buffer("scale"), dtype)
        del linear.scale
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.__class__ = nn.Linear
    return model


def weight_errors(model: nn.Module) -> dict[str, float]:
    """What `to_int8` would lose, by layer: the relative error ‖rounded − weight‖ / ‖weight‖."""
    errors = {}
    for name, linear in linears(model):
        weight = linear.weight.detach().float()
        rounded = dequantise(*quantise(weight), torch.float32)
        errors[name] = float((rounded - weight).norm() / weight.norm())
    return errors


def prepare(model: nn.Module, weights: Weights, quantize: str | None) -> Weights:
    """`weights` for a model on the meta device, whose Linears become Int8Linears if asked for or if the file has int8.

    What the file stores in floating point is quantised when it is read, a piece at a time. quantize: None or "int8";
    ValueError for another.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize {quantize!r}: choose int8, or leave it out to keep the checkpoint's precision")
    if quantize is None and not any(stored.dtype == "I8" for stored in weights.tensors.values()):
        return weights
    names = [name for name, _ in linears(model)]
    to_int8(model)
    tensors = dict(weights.tensors)
    for name in names:
        stored = tensors.get(f"{name}.weight")
        if stored and stored.dtype in FLOATS and f"{name}.scale" not in tensors:
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = quantise_stored(stored)
    return weights._replace(tensors=tensors)


def quantise_stored(stored: Stored) -> tuple[Computed, Computed]:
    """`quantise` for a weight (out, in) in a file: both results, computed from it when they are read."""

    def pieces(part: int) -> Iterator[Tensor]:
        for values in stored.chunks():  # (n,): whole blocks, as rows are
            yield quantise(values)[part]

    out, width = stored.shape
    return (
        Computed.of(stored, (out, width), "I8", lambda: pieces(0)),
        Computed.of(stored, (out, width // BLOCK), "BF16", lambda: pieces(1)),
    )
