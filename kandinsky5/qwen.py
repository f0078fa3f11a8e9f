"""The language model of Qwen2.5-VL: token ids, among them images (qwen_vision.py) → hidden states after the last norm.

These states are what the DiT reads of a prompt. A linear map of them, the head, scores every word of the vocabulary as
the next one; `generate` writes with it.

Positions have three axes. For text all three are the same, which is plain RoPE, in the half-split layout (rope.py). The
model is causal: padding on the right changes nothing before it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kandinsky5.attention import Attend, attend
from kandinsky5.config import QwenConfig
from kandinsky5.rope import apply_rope_half_split, build_angles

Cache = dict[nn.Module, tuple[Tensor, Tensor]]  # by attention: keys and values of the P tokens so far, (B, heads, P, D)


class Qwen(nn.Module):
    """Embedding, causal blocks, norm; without the head and without the vision tower."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(QwenBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """ids (B, S) → (B, S, dim).

        mask (B, P + S) bool, True for real tokens: with padding on the right none is needed, with a mask padding may
        be anywhere. cache: {} before the first call; ids then continue the P tokens that were given with it before, in
        one row that all rows of ids continue or in as many rows. positions (B, 3, S): of each token on three axes; by
        default they count the real tokens. images (M, dim): take the places of the M image tokens, row after row.
        """
        S, P = ids.shape[1], next(iter(cache.values()))[0].shape[2] if cache else 0
        seen = torch.ones(S, P + S, dtype=torch.bool, device=ids.device).tril(P)  # rows are queries
        counted = torch.arange(P, P + S, device=ids.device)[None]  # (1, S)
        if mask is not None:
            # A padding token sees itself, as a row without any key has no softmax.
            seen = seen & mask[:, None, None] | seen.triu(P)  # (B, 1, S, P + S)
            counted = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, P:]  # (B, S)
        if positions is None:
            positions = repeat(counted, "B S -> B A S", A=3)
        x = self.embedding(ids)  # (B, S, dim)
        if images is not None:
            x = x.masked_scatter((ids == self.config.image_token)[..., None], images.to(x))
        x = self.run_blocks(self.blocks, x, self.build_angles(positions), seen, cache)
        return self.norm(x)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """Tokens x (B, S, dim) through the blocks → (B, S, dim). What streams weights wraps this method."""
        for block in blocks:
            x = block(x, *arguments)
        return x

    def build_angles(self, positions: Tensor) -> Tensor:
        """Rotary angles in radians, float32, for all heads: positions (B, 3, S) → (B, 1, S, D/2).

        The first pairs of a head turn with T, the next ones with H, the last with W.
        """
        angles = build_angles(positions.flatten(), self.config.head_dim, self.config.rope_theta)
        angles = rearrange(angles, "(B A S) D -> B A 1 S D", A=3, S=positions.shape[2])
        t, h, w = angles.split(self.config.rope_sections, dim=-1)
        return torch.cat([t[:, 0], h[:, 1], w[:, 2]], dim=-1)


class QwenHead(nn.Linear):
    """Scores of all words as the next one: hidden states (B, dim) → (B, vocab_size)."""

    def __init__(self, config: QwenConfig):
        super().__init__(config.dim, config.vocab_size, bias=False)


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
    """linear_out(SiLU(gate(x)) · linear_in(x)): (B, S, dim) → the same."""

    def __init__(self, dim: int, ff_dim: int, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(dim, ff_dim, bias)
        self.linear_in = nn.Linear(dim, ff_dim, bias)
        self.linear_out = nn.Linear(ff_dim, dim, bias)

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


def generate(
    qwen: Qwen,
    head: QwenHead,
    ids: Tensor,  # (B, S); padding on the left repeats a token of its row
    mask: Tensor,  # (B, S) bool, True for real tokens
    positions: Tensor,  # (B, 3, S)
    images: Tensor | None = None,  # (M, dim), as in Qwen.forward
    penalty: float = 1.05,
) -> Iterator[Tensor]:
    """Yield the likeliest next word of each row (B,), then the one after it, and so on without end.

    Words that stand in a row already, in the prompt too, are made less likely: a positive score is divided by
    `penalty`, a negative one multiplied. What was read is not read again: its keys and values are cached.
    """
    cache: Cache = {}
    used = torch.zeros(len(ids), head.out_features, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    while True:
        scores = head(qwen(ids, mask, cache, positions, images)[:, -1]).float()  # (B, vocab_size)
        scores = torch.where(used, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        word = scores.argmax(dim=-1)  # (B,)
        yield word
        ids, images = word[:, None], None  # (B, 1)
        used = used.scatter(1, ids, True)
        mask = F.pad(mask, (0, 1), value=True)  # (B, S + 1)
        positions = positions.amax(dim=(1, 2), keepdim=True).expand(-1, 3, -1) + 1  # (B, 3, 1)
