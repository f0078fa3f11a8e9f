"""The diffusion transformer of Kandinsky 5.0 Video: from noisy latents, text and time to a velocity.

    latents ─ patchify ─ Linear ───────────────┐
                                               ├─> visual blocks ─ final layer ─ unpatchify ─> velocity
    Qwen tokens ─ Linear, norm ─> text blocks ─┘        │                │
    t, CLIP vector ─────────────> vec ──────────────────┴────────────────┘

Each block's sub-layers are modulated by `vec` (adaLN): x + gate · f(norm(x) · (1 + scale) + shift).

Precision is written out: under bf16 weights the time embedder and all modulations, norms with their modulation,
the gated residual sums, the q/k norms and the rotations stay in float32, as in the official code.

Sampling on a CPU runs equal, faster forms of some classes (`runtime/fast.py`): an edit here needs the same there.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5 import nabla
from kandinsky5.attention import Attend, attend
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
        *,
        rope_scale: tuple[float, float, float],  # positions (T, H, W) are divided by it; no model runs without its own
    ) -> Tensor:
        """Velocity noise − data, (B, T, H, W, out_channels) in x's precision."""
        config = self.config
        vec = self.time_embedder(t) + self.pooled_embedder(pooled)  # (B, time_dim) float32

        text = self.text_embedder(text)  # (B, S, dim)
        rotations = self.rotate_text(config, text.shape[1], text.device)  # (S, D/2)
        text = self.run_blocks(self.text_blocks, text, vec, rotations, text_mask)  # (B, S, dim)

        x = self.patch_embedder(patchify(x, config.patch_size))  # (B, T, H, W, dim)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        x = nabla.to_tiles(x) if config.nabla else x.flatten(1, 3)  # (B, L, dim)
        rotations = self.rotate_video(config, grid, rope_scale, x.device)  # (L, D/2)
        x = self.run_blocks(self.visual_blocks, x, text, vec, rotations, text_mask, config.nabla, grid)  # (B, L, dim)
        x = nabla.from_tiles(x, grid) if config.nabla else x.unflatten(1, grid)  # (B, T, H, W, dim)

        return unpatchify(self.final_layer(x, vec), config.patch_size)  # (B, T, H, W, out_channels)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """Tokens x (B, L, dim) through blocks that are all given the same `arguments` → (B, L, dim).

        The one place where blocks run: what skips steps, streams weights or checkpoints gradients wraps this method.
        """
        for block in blocks:
            x = block(x, *arguments)
        return x

    @staticmethod
    def rotate_text(config: DiTConfig, length: int, device: torch.device) -> Tensor:
        """RoPE of the text positions 0, 1, … length − 1: complex64 (S, D/2)."""
        return build_rotations(build_angles(torch.arange(length, device=device), config.head_dim))

    @staticmethod
    def rotate_video(
        config: DiTConfig, grid: tuple[int, int, int], rope_scale: tuple[float, float, float], device: torch.device
    ) -> Tensor:
        """RoPE of a grid (T, H, W) of tokens in the order in which the blocks see them: complex64 (L, D/2)."""
        angles = build_angles_3d(grid, config.rope_axes, rope_scale, device)  # (T, H, W, D/2)
        return build_rotations(nabla.to_tiles(angles[None])[0] if config.nabla else angles.flatten(0, 2))


class TextBlock(nn.Module):
    """Text tokens (B, S, dim) attend to each other, then feed-forward."""

    def __init__(self, dim: int, vec_dim: int, ff_dim: int, head_dim: int):
        super().__init__()
        self.modulation = Modulation(vec_dim, dim, 6)
        self.norm = Norm(dim)
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
        y = modulate(self.norm(text), attn_shift, attn_scale).type_as(text)  # (B, S, dim)
        text = add_gated(text, attn_gate, self.self_attention(y, y, rotations, mask))
        y = modulate(self.norm(text), ff_shift, ff_scale).type_as(text)
        return add_gated(text, ff_gate, self.feed_forward(y))


class VisualBlock(nn.Module):
    """Video tokens (B, L, dim) attend to each other (fully or by NABLA), then to the text, then feed-forward."""

    def __init__(self, dim: int, vec_dim: int, ff_dim: int, head_dim: int):
        super().__init__()
        self.modulation = Modulation(vec_dim, dim, 9)
        self.norm = Norm(dim)
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
        nabla: NablaConfig | None,
        grid: tuple[int, int, int],  # (T, H, W) of tokens
    ) -> Tensor:
        (
            self_shift, self_scale, self_gate,
            cross_shift, cross_scale, cross_gate,
            ff_shift, ff_scale, ff_gate,
        ) = self.modulation(vec)  # (B, 1, dim) each  # fmt: skip
        y = modulate(self.norm(x), self_shift, self_scale).type_as(x)
        x = add_gated(x, self_gate, self.self_attention(y, y, rotations, None, nabla, grid))
        y = modulate(self.norm(x), cross_shift, cross_scale).type_as(x)
        x = add_gated(x, cross_gate, self.cross_attention(y, text, None, text_mask))
        y = modulate(self.norm(x), ff_shift, ff_scale).type_as(x)
        return add_gated(x, ff_gate, self.feed_forward(y))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, any shapes that broadcast."""
    return x * (1 + scale) + shift


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
        self.attend: Attend = attend  # other kernels, recording and ranks take its place on the model at hand

    def forward(
        self,
        x: Tensor,  # (B, L, dim) where queries come from
        context: Tensor,  # (B, S, dim) where keys and values come from
        rotations: Tensor | None = None,  # (L, D/2) complex64
        mask: Tensor | None = None,  # (B, S) bool, True for keys that may be seen
        nabla: NablaConfig | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        q, k, v = self.project(x, context, rotations)  # (B, N, L, D), and (B, N, S, D) twice
        mask = mask[:, None, None] if mask is not None else None  # (B, 1, 1, S)
        out = self.attend(q, k, v, mask=mask, nabla=nabla, grid=grid)  # (B, N, L, D)
        return self.to_out(rearrange(out, "B N L D -> B L (N D)"))

    def project(self, x: Tensor, context: Tensor, rotations: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of `context`, head by head: (B, N, L, D), and (B, N, S, D) twice."""
        q, k, v = (
            rearrange(projected, "B L (N D) -> B N L D", D=self.head_dim)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotations is not None:
            q, k = self.rotate(q, rotations), self.rotate(k, rotations)
        return q, k, v

    @staticmethod
    def rotate(x: Tensor, rotations: Tensor) -> Tensor:
        """RoPE of queries or keys x (B, N, L, D), rotations (L, D/2) complex64 → the same."""
        return apply_rope(x, rotations)


class FeedForward(nn.Module):
    """Linear, GELU, Linear, without biases: (B, L, dim) → the same."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, ff_dim, bias=False)
        self.linear_out = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x)))


class Norm(nn.LayerNorm):
    """LayerNorm without weights, in float32: x (…, dim) of any precision → (…, dim) float32."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-5, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


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
        self.norm = Norm(dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = (m[:, None, None] for m in self.modulation(vec))  # (B, 1, 1, 1, dim)
        return self.linear(modulate(self.norm(x), shift, scale).type_as(x))


class Float32Linear(nn.Linear):
    """A Linear that computes in float32 whatever precision the model around it has: (…, in) → (…, out) float32.

    The official code computes the time embedder and the modulations so; diffusers lists them in
    `_keep_in_fp32_modules` (transformer_kandinsky.py). Weights stored in half precision may stay so (checkpoint.py):
    widening them here changes no value.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

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
