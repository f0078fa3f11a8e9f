"""Faster forms of a finished model: the same weights, the same results but for rounding, other code.

`install` swaps the classes of modules for subclasses of the same name with Fast in front, so that print(model) shows
what runs; `remove` swaps them back. A form that writes over activations, or would gain nothing, computes as its plain
class does where gradients are enabled; FastUpsample and FastFloat32Linear write over none and always run, with the
right gradients. The forms of the VAE are in `fast_vae.py`.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky5.config import DiTConfig, NablaConfig
from kandinsky5.dit import DiT, FinalLayer, Float32Linear, TextBlock, VisualBlock, add_gated
from kandinsky5.runtime import fast_vae
from kandinsky5.vae2d import VAE2D

WIDENED = 2**20  # weights that a Float32Linear widens at a time on a CPU: they stay in the cache


def install(*models: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give the modules of DiTs and of VAEs of videos the forms that are faster on this device, in place.

    On an Apple GPU none: its kernels crash on views of videos, or misread them (pytorch#190645, #180984).
    """
    forms = {"cpu": FORMS, "mps": {}}.get(torch.device(device).type, ANYWHERE)
    for model in models:
        if not isinstance(model, VAE2D):
            swap(model, forms)


def remove(*models: nn.Module) -> None:
    """Undo `install`: every module computes as its definition says."""
    for model in models:
        swap(model, {fast: plain for plain, fast in FORMS.items()})


def swap(model: nn.Module, classes: Mapping[type, type]) -> dict[nn.Module, type]:
    """Let each module of `model` whose class is a key become the class that it maps to; returns those that did.

    The two must hold the same parameters: one is a subclass of the other that changes methods alone.
    """
    before = {module: type(module) for module in model.modules() if type(module) in classes}
    for module, plain in before.items():
        module.__class__ = classes[plain]
    return before


@contextlib.contextmanager
def swapped(model: nn.Module, classes: Mapping[type, type]) -> Iterator[None]:
    """Inside, each module of a class on the left has the class on the right."""
    before = swap(model, classes)
    try:
        yield
    finally:
        for module, plain in before.items():
            module.__class__ = plain


class FastDiT(DiT):
    """Computes rotations once for all steps; for Lite at 512×768×121 they are 12 MB."""

    @staticmethod
    def rotate_text(config: DiTConfig, length: int, device: torch.device) -> Tensor:
        """As in `DiT`: complex64 (S, D/2), shared: do not modify in place."""
        return _keep_text(config, length, device)

    @staticmethod
    def rotate_video(
        config: DiTConfig, grid: tuple[int, int, int], rope_scale: tuple[float, float, float], device: torch.device
    ) -> Tensor:
        """As in `DiT`: complex64 (L, D/2), shared: do not modify in place."""
        return _keep_video(config, grid, tuple(rope_scale), device)


# Cached tensors may be used in training, so they must not be inference tensors.
_keep_text = functools.lru_cache(maxsize=8)(torch.inference_mode(False)(DiT.rotate_text))
_keep_video = functools.lru_cache(maxsize=2)(torch.inference_mode(False)(DiT.rotate_video))


class FastTextBlock(TextBlock):
    """Norm and modulation in one pass, on a CPU."""

    def forward(self, text: Tensor, vec: Tensor, rotations: Tensor, mask: Tensor | None) -> Tensor:
        if not pays_in_one_pass(text):
            return super().forward(text, vec, rotations, mask)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.modulation(vec)  # (B, 1, dim) each
        y = modulate_in_one_pass(text, attn_shift, attn_scale)  # (B, S, dim)
        text = add_gated(text, attn_gate, self.self_attention(y, y, rotations, mask))
        y = modulate_in_one_pass(text, ff_shift, ff_scale)
        return add_gated(text, ff_gate, self.feed_forward(y))


class FastVisualBlock(VisualBlock):
    """Norm and modulation in one pass, on a CPU."""

    def forward(
        self, x: Tensor, text: Tensor, vec: Tensor, rotations: Tensor, text_mask: Tensor | None,
        nabla: NablaConfig | None, grid: tuple[int, int, int],
    ) -> Tensor:  # fmt: skip
        if not pays_in_one_pass(x):
            return super().forward(x, text, vec, rotations, text_mask, nabla, grid)
        (
            self_shift, self_scale, self_gate,
            cross_shift, cross_scale, cross_gate,
            ff_shift, ff_scale, ff_gate,
        ) = self.modulation(vec)  # (B, 1, dim) each  # fmt: skip
        y = modulate_in_one_pass(x, self_shift, self_scale)  # (B, L, dim)
        x = add_gated(x, self_gate, self.self_attention(y, y, rotations, None, nabla, grid))
        y = modulate_in_one_pass(x, cross_shift, cross_scale)
        x = add_gated(x, cross_gate, self.cross_attention(y, text, None, text_mask))
        y = modulate_in_one_pass(x, ff_shift, ff_scale)
        return add_gated(x, ff_gate, self.feed_forward(y))


class FastFinalLayer(FinalLayer):
    """Norm and modulation in one pass, on a CPU."""

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        if not pays_in_one_pass(x):
            return super().forward(x, vec)
        shift, scale = self.modulation(vec)  # (B, 1, dim)
        return self.linear(modulate_in_one_pass(x, shift, scale))


def pays_in_one_pass(x: Tensor) -> bool:
    """Whether `modulate_in_one_pass` is for x, of any shape: not with gradients, nor for a model moved to a GPU."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and not torch.is_grad_enabled()


def modulate_in_one_pass(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate(norm(x), shift, scale)` with 1 + scale and shift, (B, 1, dim) float32, as the norm's own weights.

    PyTorch's CPU kernel takes them in float32 next to an x in bf16, computes in float32 and rounds once. So x
    (B, …, dim) is read and written once in bf16, where the definition makes five passes through memory in float32:
    eight times as fast.
    """
    weights, biases = (1 + scale).flatten(1), shift.flatten(1)  # (B, dim)
    out = [
        F.layer_norm(sample, x.shape[-1:], weight, bias, eps=1e-5)
        for sample, weight, bias in zip(x, weights, biases, strict=True)
    ]
    return out[0][None] if len(out) == 1 else torch.stack(out)


class FastFloat32Linear(Float32Linear):
    """Widens as many weights at a time as stay in the cache, on a CPU: twice as fast as widening all of them first."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if self.weight.dtype == dtype or x.device.type != "cpu":
            return super().forward(x)
        rows = max(1, WIDENED // self.in_features)
        pieces = zip(self.weight.split(rows), self.bias.split(rows), strict=True)
        x = x.to(dtype)
        return torch.cat([F.linear(x, weight.to(dtype), bias.to(dtype)) for weight, bias in pieces], dim=-1)


ANYWHERE: dict[type, type] = {DiT: FastDiT, **fast_vae.FORMS}
ON_CPU: dict[type, type] = {
    TextBlock: FastTextBlock,
    VisualBlock: FastVisualBlock,
    FinalLayer: FastFinalLayer,
    Float32Linear: FastFloat32Linear,
}
FORMS = ANYWHERE | ON_CPU
