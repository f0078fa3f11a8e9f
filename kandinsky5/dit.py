"""The diffusion transformer of Kandinsky 5.0 Video: from noisy latents, text and time to a velocity.

    latents ─ patchify ─ Linear ───────────────┐
                                               ├─> visual blocks ─ final layer ─ unpatchify ─> velocity
    Qwen tokens ─ Linear, norm ─> text blocks ─┘        │                │
    t, CLIP vector ─────────────> vec ──────────────────┴────────────────┘

Each block's sub-layers are modulated by `vec` (adaLN): x + gate · f(norm(x) · (1 + scale) + shift).

Precision is written out: under bf16 weights the time embedder and all modulations, norms with their modulation,
the gated residual sums, the q/k norms and the rotations stay in float32, as in the official code.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5 import nabla
from kandinsky5.attention import attention
from kandinsky5.config import DiTConfig, NablaConfig
from kandinsky5.rope import apply_rope, build_angles, build_angles_3d, build_rotations


class DiT(nn.Module):
    """The whole network; see `DiTConfig` for its sizes. (T, H, W) are latents up to `patchify`, then tokens."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim, vec_dim, head_dim = config.dim, config.time_dim, config.head_dim
        patch = math.prod(config.patch_size)

        self.time_embedder = TimeEmbedder(dim, vec_dim)
        self.pooled_embedder = TextEmbedder(config.pooled_dim, vec_dim)
        self.text_embedder = TextEmbedder(config.text_dim, dim)
        self.patch_embedder = nn.Linear(patch * config.input_channels, dim)
        self.text_blocks = nn.ModuleList(
            TextBlock(dim, vec_dim, config.ff_dim, head_dim) for _ in range(config.num_text_blocks)
        )
        self.visual_blocks = nn.ModuleList(
            VisualBlock(dim, vec_dim, config.ff_dim, head_dim) for _ in range(config.num_visual_blocks)
        )
        self.final_layer = FinalLayer(dim, vec_dim, patch * config.out_channels)

    def forward(
        self,
        x: Tensor,  # (B, T, H, W, C_in) latents, and with visual_cond conditioning latents and mask
        text: Tensor,  # (B, S, text_dim) Qwen features
        pooled: Tensor,  # (B, pooled_dim) CLIP vector
        t: Tensor,  # (B,) flow time, 1 = noise, 0 = data
        text_mask: Tensor | None = None,  # (B, S) bool, True for real tokens
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),  # positions (T, H, W) are divided by it
    ) -> Tensor:
        """Velocity noise − data, (B, T, H, W, out_channels) in x's precision."""
        config = self.config
        vec = self.time_embedder(t) + self.pooled_embedder(pooled)  # (B, time_dim) float32

        text = self.text_embedder(text)  # (B, S, dim)
        text_rotations = keep_text_rotations(text.shape[1], config.head_dim, text.device)  # (S, D/2)
        for block in self.text_blocks:
            text = block(text, vec, text_rotations, text_mask)  # (B, S, dim)

        x = self.patch_embedder(patchify(x, config.patch_size))  # (B, T, H, W, dim)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        x = nabla.to_tiles(x) if config.nabla else x.flatten(1, 3)  # (B, L, dim)
        rotations = keep_rotations(grid, config.rope_axes, tuple(rope_scale), bool(config.nabla), x.device)  # (L, D/2)
        for block in self.visual_blocks:
            x = block(x, text, vec, rotations, text_mask, config.nabla, grid)  # (B, L, dim)
        x = nabla.from_tiles(x, grid) if config.nabla else x.unflatten(1, grid)  # (B, T, H, W, dim)

        return unpatchify(self.final_layer(x, vec), config.patch_size)  # (B, T, H, W, out_channels)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # what is kept may be met again in training
def keep_rotations(
    grid: tuple[int, int, int],
    axes: tuple[int, int, int],
    scale: tuple[float, float, float],
    in_tiles: bool,
    device: torch.device,
) -> Tensor:
    """RoPE of a grid (T, H, W) of tokens in the order of `DiT.forward`: complex64 (L, D/2).

    Made once for all steps and shared by all who ask, so not to be changed; 12 MB for Lite at 512×768×121.
    """
    angles = build_angles_3d(grid, axes, scale, device)  # (T, H, W, D/2)
    return build_rotations(nabla.to_tiles(angles[None])[0] if in_tiles else angles.flatten(0, 2))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def keep_text_rotations(length: int, head_dim: int, device: torch.device) -> Tensor:
    """RoPE of the places 0, 1, … of text: complex64 (S, D/2), made once for each length and shared like the video's."""
    return build_rotations(build_angles(torch.arange(length, device=device), head_dim))


class TextBlock(nn.Module):
    """Text tokens (B, S, dim) attend to each other, then feed-forward."""

    def __init__(self, dim: int, vec_dim: int, ff_dim: int, head_dim: int):
        super().__init__()
        self.modulation = Modulation(vec_dim, dim, 6)
        self.self_attention = Attention(dim, head_dim)
        self.feed_forward = FeedForward(dim, ff_dim)

    def forward(
        self,
        text: Tensor,  # (B, S, dim)
        vec: Tensor,  # (B, vec_dim)
        rotations: Tensor,  # (S, D/2) complex64
        mask: Tensor | None,  # (B, S)
    ) -> Tensor:
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = self.modulation(vec)  # (B, 1, dim) each
        y = modulate(text, attn_shift, attn_scale)
        text = add_gated(text, attn_gate, self.self_attention(y, y, rotations, mask))
        y = modulate(text, ff_shift, ff_scale)
        return add_gated(text, ff_gate, self.feed_forward(y))


class VisualBlock(nn.Module):
    """Video tokens (B, L, dim) attend to each other (fully or by NABLA), then to the text, then feed-forward."""

    def __init__(self, dim: int, vec_dim: int, ff_dim: int, head_dim: int):
        super().__init__()
        self.modulation = Modulation(vec_dim, dim, 9)
        self.self_attention = Attention(dim, head_dim)
        self.cross_attention = Attention(dim, head_dim)
        self.feed_forward = FeedForward(dim, ff_dim)

    def forward(
        self,
        x: Tensor,  # (B, L, dim)
        text: Tensor,  # (B, S, dim)
        vec: Tensor,  # (B, vec_dim)
        rotations: Tensor,  # (L, D/2) complex64
        text_mask: Tensor | None,  # (B, S)
        nabla_config: NablaConfig | None,
        grid: tuple[int, int, int],  # (T, H, W) of tokens
    ) -> Tensor:
        (
            self_shift, self_scale, self_gate,
            cross_shift, cross_scale, cross_gate,
            ff_shift, ff_scale, ff_gate,
        ) = self.modulation(vec)  # (B, 1, dim) each  # fmt: skip
        y = modulate(x, self_shift, self_scale)
        x = add_gated(x, self_gate, self.self_attention(y, y, rotations, None, nabla_config, grid))
        y = modulate(x, cross_shift, cross_scale)
        x = add_gated(x, cross_gate, self.cross_attention(y, text, None, text_mask))
        y = modulate(x, ff_shift, ff_scale)
        return add_gated(x, ff_gate, self.feed_forward(y))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x (B, …, dim) without weights, then scale and shift; in float32, back in x's precision.

    On a CPU, with one shift and scale a sample, without gradients and outside torch.compile, which does as much itself:
    `modulate_in_one_pass`.
    """
    one_a_sample = scale.shape == shift.shape == (len(x), *(1,) * (x.dim() - 2), x.shape[-1])
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype == torch.float64
    if one_a_sample and x.device.type == "cpu" and not plain:
        return modulate_in_one_pass(x, shift, scale)
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-5) * (1 + scale) + shift).type_as(x)


def modulate_in_one_pass(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of each sample with 1 + scale and shift, (B, …, dim) float32, as the norm's own weights.

    PyTorch's CPU kernel takes them in float32 beside an x in bf16, computes in float32 and rounds once. So x is read
    and written once in bf16, where the definition goes five times through memory in float32: eight times as fast.
    """
    weights, biases = (1 + scale).flatten(1), shift.flatten(1)  # (B, dim)
    out = [
        F.layer_norm(sample, x.shape[-1:], weight, bias, eps=1e-5)
        for sample, weight, bias in zip(x, weights, biases, strict=True)
    ]
    return out[0][None] if len(out) == 1 else torch.stack(out)


def add_gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """The residual sum x + gate · out, any shapes that broadcast; in float32, back in x's precision."""
    return (x.float() + gate * out.float()).type_as(x)


class Attention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys, and RoPE where rotations are given: → (B, L, dim)."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # (B, L, dim) where queries come from
        context: Tensor,  # (B, S, dim) where keys and values come from
        rotations: Tensor | None = None,  # (L, D/2) complex64
        mask: Tensor | None = None,  # (B, S) bool, True for keys that may be seen
        nabla_config: NablaConfig | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        q, k, v = (
            rearrange(projected, "B L (N D) -> B N L D", D=self.head_dim)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotations is not None:
            q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        block_map = None
        if nabla_config:
            assert grid is not None, "tiles need the grid of the tokens"
            block_map = nabla.block_map(q, k, grid, nabla_config)  # (B, N, L/64, L/64)
        mask = mask[:, None, None] if mask is not None else None  # (B, 1, 1, S)
        out = attention(q, k, v, mask=mask, block_map=block_map)  # (B, N, L, D)
        return self.to_out(rearrange(out, "B N L D -> B L (N D)"))


class FeedForward(nn.Module):
    """Linear, GELU, Linear, without biases: (B, L, dim) → the same."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, ff_dim, bias=False)
        self.linear_out = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x)))


class RMSNorm(nn.Module):
    """x / √mean(x²) · weight for x (…, dim), in float32; epsilon is float32's machine epsilon."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=None).type_as(x)


class Modulation(nn.Module):
    """vec (B, vec_dim) → `count` shifts, scales and gates, (B, 1, dim) float32 each.

    Zero at first, so that a new block is the identity.
    """

    def __init__(self, vec_dim: int, dim: int, count: int):
        super().__init__()
        self.count = count
        self.linear = Float32Linear(vec_dim, count * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec))[:, None].chunk(self.count, dim=-1)


class TimeEmbedder(nn.Module):
    """Flow time (B,) → cosines and sines of 1000·t → two Linears → (B, vec_dim); all in float32."""

    def __init__(self, dim: int, vec_dim: int):
        super().__init__()
        self.dim = dim
        self.linear_in = Float32Linear(dim, vec_dim)
        self.linear_out = Float32Linear(vec_dim, vec_dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = build_angles(1000 * t.float(), self.dim)  # (B, dim/2); the same frequencies as RoPE's
        return self.linear_out(F.silu(self.linear_in(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class TextEmbedder(nn.Module):
    """Linear, then LayerNorm with weights: (B, …, text_dim) → (B, …, dim)."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(text_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm(self.linear(text))


class FinalLayer(nn.Module):
    """Modulated norm, then one Linear to the latents of a patch: (B, T, H, W, dim) → (B, T, H, W, out_dim)."""

    def __init__(self, dim: int, vec_dim: int, out_dim: int):
        super().__init__()
        self.modulation = Modulation(vec_dim, dim, 2)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = (m[:, None, None] for m in self.modulation(vec))  # (B, 1, 1, 1, dim)
        return self.linear(modulate(x, shift, scale))


class Float32Linear(nn.Linear):
    """A Linear that stays in float32 when the model around it is cast to half precision: (…, in) → (…, out).

    The official code computes the time embedder and the modulations so; diffusers lists them in
    `_keep_in_fp32_modules` (transformer_kandinsky.py). Weights that come from a file in half precision may stay so
    (checkpoint.py): they are widened here, which changes no number; on a CPU so many at a time as stay in the cache,
    which is twice as fast as if they had been widened before.
    """

    WIDENED = 2**20  # weights at a time

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        x = x.to(dtype)
        if self.weight.dtype == dtype:
            return super().forward(x)
        rows = max(1, self.WIDENED // self.in_features) if x.device.type == "cpu" else self.out_features
        pieces = zip(self.weight.split(rows), self.bias.split(rows), strict=True)
        return torch.cat([F.linear(x, weight.to(dtype), bias.to(dtype)) for weight, bias in pieces], dim=-1)

    def _apply(self, fn, recurse=True):
        # Module.to(), .half() and .bfloat16() come here. The device may change, the precision must not.
        def keep_precision(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_precision, recurse)


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(B, T·pt, H·ph, W·pw, C) → (B, T, H, W, pt·ph·pw·C): inside a patch, the channel runs fastest."""
    pt, ph, pw = patch_size
    return rearrange(x, "B (T pt) (H ph) (W pw) C -> B T H W (pt ph pw C)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(B, T, H, W, C·pt·ph·pw) → (B, T·pt, H·ph, W·pw, C).

    checkpoint: here the channel runs *slowest* inside a patch, so this does not undo `patchify`.
    """
    pt, ph, pw = patch_size
    return rearrange(x, "B T H W (C pt ph pw) -> B (T pt) (H ph) (W pw) C", pt=pt, ph=ph, pw=pw)
