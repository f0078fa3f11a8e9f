"""The language model of Qwen2.5-VL, as a text encoder: token ids → hidden states after the last norm.

For text alone the model's three-axis rotary embedding gives all three axes the same position, so it is plain
RoPE, in the half-split layout (rope.py). The model is causal: padding on the right changes nothing before it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.attention import Attend, attend
from kandinsky5.config import QwenConfig
from kandinsky5.rope import apply_rope_half_split, build_angles

Cache = dict[nn.Module, tuple[Tensor, Tensor]]  # by attention: keys and values of the P tokens so far, (B, heads, P, D)


class Qwen(nn.Module):
    """Embedding, causal blocks, norm; without the head that predicts words and without the vision tower."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(QwenBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids (B, S), mask (B, S) bool, True for real tokens → (B, S, dim).

        With padding on the right no mask is needed; with a mask the padding may be anywhere, and positions count
        the real tokens. cache: {} before the first call; ids then continue the tokens that were given with it before,
        in one row that all rows of ids continue or in as many rows. Not together with a mask.
        """
        S, P = ids.shape[1], next(iter(cache.values()))[0].shape[2] if cache else 0
        seen = torch.ones(S, P + S, dtype=torch.bool, device=ids.device).tril(P)  # rows are queries
        positions = torch.arange(P, P + S, device=ids.device)[None]  # (1, S)
        if mask is not None:
            assert cache is None, "a mask and a cache together are not used"
            # A padding token sees itself, as a row without any key has no softmax.
            seen = seen & mask[:, None, None] | torch.eye(S, dtype=torch.bool, device=ids.device)  # (B, 1, S, S)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
        x = self.embedding(ids)  # (B, S, dim)
        x = self.run_blocks(self.blocks, x, self.build_angles(positions), seen, cache)
        return self.norm(x)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """Tokens x (B, S, dim) through the blocks → (B, S, dim). What streams weights wraps this method."""
        for block in blocks:
            x = block(x, *arguments)
        return x

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

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, mask, cache)  # (B, S, dim)
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
        self.attend: Attend = attend

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))  # (B, heads, S, D)
        q, k = apply_rope_half_split(q, angles), apply_rope_half_split(k, angles)
        if cache is not None:
            if self in cache:
                before = (past.expand(len(x), -1, -1, -1) for past in cache[self])
                k, v = (torch.cat(both, dim=2) for both in zip(before, (k, v), strict=True))  # (B, heads, P + S, D)
            cache[self] = k, v
        k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)  # (B, N, P + S, D)
        return self.to_out(rearrange(self.attend(q, k, v, mask), "B N S D -> B S (N D)"))

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
