"""The text tower of CLIP ViT-L/14: token ids → one vector for the whole prompt."""

import torch
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.attention import Attend, attend
from kandinsky5.config import CLIPConfig


class CLIPText(nn.Module):
    """Embedding, causal blocks, norm, and the state at the end of the text; without CLIP's projection."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_positions, config.dim)
        self.blocks = nn.ModuleList(CLIPBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, S), S ≤ 77 → (B, dim): the state at the first end token; padding is end tokens too."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, S, dim)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        x = self.run_blocks(self.blocks, x, mask)
        end = (ids == self.config.end_token).int().argmax(dim=1)  # (B,) the first of them
        return self.norm(x)[torch.arange(len(ids), device=ids.device), end]  # (B, dim)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """Tokens x (B, S, dim) through the blocks → (B, S, dim). What streams weights wraps this method."""
        for block in blocks:
            x = block(x, *arguments)
        return x


class CLIPBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): x (B, S, dim), mask (S, S) bool → (B, S, dim)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_k = nn.Linear(config.dim, config.dim)
        self.to_v = nn.Linear(config.dim, config.dim)
        self.to_out = nn.Linear(config.dim, config.dim)
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.linear_in = nn.Linear(config.dim, config.ff_dim)
        self.linear_out = nn.Linear(config.ff_dim, config.dim)
        self.attend: Attend = attend

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            rearrange(projected, "B S (N D) -> B N S D", N=self.num_heads)
            for projected in (self.to_q(y), self.to_k(y), self.to_v(y))
        )
        x = x + self.to_out(rearrange(self.attend(q, k, v, mask), "B N S D -> B S (N D)"))
        y = self.linear_in(self.feed_forward_norm(x))
        return x + self.linear_out(y * torch.sigmoid(1.702 * y))  # "quick GELU"
