"""The language model of Qwen2.5-VL, as a text encoder: token ids → hidden states after the last norm.

For text alone the model's three-axis rotary embedding gives all three axes the same position, so it is plain
RoPE, in the half-split layout (rope.py). The model is causal: padding on the right changes nothing before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.attention import attention
from kandinsky5.config import QwenConfig
from kandinsky5.rope import apply_rope_half_split, build_angles


class Past(NamedTuple):
    """Keys and values of P earlier tokens in one block, (1, key heads, P, D) each."""

    k: Tensor
    v: Tensor


class Qwen(nn.Module):
    """Embedding, causal blocks, norm; without the head that predicts words and without the vision tower."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(QwenBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """ids (B, S), mask (B, S) bool, True for real tokens → (B, S, dim).

        With padding on the right no mask is needed; with a mask the padding may be anywhere, and positions count
        the real tokens. prefix (1, P): the tokens that stand before each row of ids, which are computed once for all
        rows; not with a mask.
        """
        S, P = ids.shape[1], prefix.shape[1] if prefix is not None else 0
        causal = torch.ones(P + S, P + S, dtype=torch.bool, device=ids.device).tril()  # rows are queries
        positions, seen = torch.arange(P + S, device=ids.device)[None], causal[P:]  # (1, P + S), (S, P + S)
        if mask is not None:
            assert prefix is None, "a mask and a prefix together are not used"
            # A padding token sees itself, as a row without any key has no softmax.
            seen = causal & mask[:, None, None] | torch.eye(S, dtype=torch.bool, device=ids.device)  # (B, 1, S, S)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
        angles = self.build_angles(positions)
        angles_before, angles = angles[:, :, :P], angles[:, :, P:]

        x, past = self.embedding(ids), None  # (B, S, dim)
        before = self.embedding(prefix) if prefix is not None else None  # (1, P, dim)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, QwenBlock)
            if before is not None:
                past = block.attention.keys_and_values(block.attention_norm(before), angles_before)
                if i + 1 < len(self.blocks):  # behind the last block nobody asks for them
                    before = block(before, angles_before, causal[:P, :P])
            x = block(x, angles, seen, past)
        return self.norm(x)

    def build_angles(self, positions: Tensor) -> Tensor:
        """Rotary angles in radians, float32, for all heads: positions (B, S) → (B, 1, S, D/2)."""
        angles = build_angles(positions.flatten(), self.config.head_dim, self.config.rope_theta)
        return rearrange(angles, "(B S) D -> B 1 S D", S=positions.shape[1])


class QwenBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): x (B, S, dim) → the same."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = GroupedAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.ff_dim)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, past)  # (B, S, dim)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GroupedAttention(nn.Module):
    """Attention in which several query heads share one key and value head: x (B, S, dim) → the same."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.to_q = nn.Linear(config.dim, config.num_heads * config.head_dim)
        self.to_k = nn.Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.to_v = nn.Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.to_out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, past: Past | None = None) -> Tensor:
        q = apply_rope_half_split(self.split_heads(self.to_q(x)), angles)  # (B, N, S, D)
        k, v = self.keys_and_values(x, angles)
        if past:
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), new], dim=2) for p, new in zip(past, (k, v), strict=True))
        k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)  # (B, N, P + S, D)
        return self.to_out(rearrange(attention(q, k, v, mask), "B N S D -> B S (N D)"))

    def keys_and_values(self, x: Tensor, angles: Tensor) -> Past:
        """x (B, S, dim), angles (B or 1, 1, S, D/2) → rotated keys, and values, (B, key heads, S, D) each."""
        k, v = self.split_heads(self.to_k(x)), self.split_heads(self.to_v(x))
        return Past(apply_rope_half_split(k, angles), v)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, N·D) → (B, N, S, D)."""
        return rearrange(x, "B S (N D) -> B N S D", D=self.head_dim)


class SwiGLU(nn.Module):
    """linear_out(SiLU(gate(x)) · linear_in(x)), without biases: (B, S, dim) → the same."""

    def __init__(self, dim: int, ff_dim: int):
        super().__init__()
        self.gate = nn.Linear(dim, ff_dim, bias=False)
        self.linear_in = nn.Linear(dim, ff_dim, bias=False)
        self.linear_out = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.silu(self.gate(x)) * self.linear_in(x))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) for x (…, dim) in float32, rounded to x's precision, then times weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x)
