"""Visual blocks that compute a few thousand tokens at a time, in half of the memory: for long videos.

Only attention needs all tokens at once. What surrounds it (norms, modulation, projections, rotation, gated sums, text
attention, feed-forward) acts on each token alone, but makes float32 copies and hidden layers several times as wide
as the tokens. So a block runs as

    for each piece of the tokens:   norm, modulation, queries, keys, values        into buffers for all tokens
    for all tokens:                 attention
    for each piece of the tokens:   everything after it                            over the block's own input

which is what remains of a block: its tokens, queries, keys, values and the result of attention.
"""

import contextlib
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.config import NablaConfig
from kandinsky5.dit import FinalLayer, VisualBlock, add_gated, modulate

PIECE = 8192  # tokens at a time: a matmul of Lite's width over them keeps any GPU busy


class PiecewiseVisualBlock(VisualBlock):
    """A visual block, a piece of the tokens at a time; without gradients, as it writes over its buffers."""

    piece: int

    def forward(
        self, x: Tensor, text: Tensor, vec: Tensor, rotations: Tensor, text_mask: Tensor | None,
        nabla: NablaConfig | None, grid: tuple[int, int, int],
    ) -> Tensor:  # fmt: skip
        modulation = self.modulation(vec)  # nine (B, 1, dim)
        head_dim = self.self_attention.head_dim
        q, k, v = (rearrange(torch.empty_like(x), "B L (N D) -> B N L D", D=head_dim) for _ in range(3))
        places = [slice(start, start + self.piece) for start in range(0, x.shape[1], self.piece)]
        for here in places:
            q[:, :, here], k[:, :, here], v[:, :, here] = self.project(x[:, here], rotations[here], *modulation[:2])
        out = self.self_attention.attend(q, k, v, mask=None, nabla=nabla, grid=grid)  # (B, N, L, D)
        del q, k, v
        result = torch.empty_like(x)
        for here in places:
            result[:, here] = self.finish(x[:, here], out[:, :, here], text, text_mask, *modulation[2:])
        return result

    def project(self, x: Tensor, rotations: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, L, D) of some tokens x (B, L, dim)."""
        y = modulate(self.norm(x), shift, scale).type_as(x)
        return self.self_attention.project(y, y, rotations)

    def finish(
        self, x: Tensor, out: Tensor, text: Tensor, text_mask: Tensor | None,
        self_gate: Tensor, cross_shift: Tensor, cross_scale: Tensor, cross_gate: Tensor,
        ff_shift: Tensor, ff_scale: Tensor, ff_gate: Tensor,
    ) -> Tensor:  # fmt: skip
        """What a block does after attention gave `out` (B, N, L, D) for some tokens x (B, L, dim) → the same."""
        x = add_gated(x, self_gate, self.self_attention.to_out(rearrange(out, "B N L D -> B L (N D)")))
        y = modulate(self.norm(x), cross_shift, cross_scale).type_as(x)
        x = add_gated(x, cross_gate, self.cross_attention(y, text, None, text_mask))
        y = modulate(self.norm(x), ff_shift, ff_scale).type_as(x)
        return add_gated(x, ff_gate, self.feed_forward(y))


class PiecewiseFinalLayer(FinalLayer):
    """The final layer, a few frames at a time."""

    piece: int

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        frames = max(1, self.piece // (x.shape[2] * x.shape[3]))
        forward = super().forward
        return torch.cat([forward(some, vec) for some in x.split(frames, dim=1)], dim=1)


@contextlib.contextmanager
def in_pieces(dit: nn.Module, piece: int | None = PIECE) -> Iterator[None]:
    """Inside, visual blocks and final layer compute that many tokens at a time; with None nothing changes."""
    before = []
    for module in dit.modules() if piece is not None else ():
        if not isinstance(module, (VisualBlock, FinalLayer)):
            continue
        before.append((module, type(module), dict(vars(module))))
        module.__class__ = PiecewiseVisualBlock if isinstance(module, VisualBlock) else PiecewiseFinalLayer
        vars(module)["piece"] = piece
        if how := vars(module).get("compiled_with"):  # the whole would be compiled anew for each number of pieces
            parts = {name: torch.compile(getattr(module, name), **how) for name in ("project", "finish")}
            vars(module).update(parts, _compiled_call_impl=None)
    try:
        yield
    finally:
        for module, whole, attributes in before:
            module.__class__ = whole
            for name in ("piece", "project", "finish", "_compiled_call_impl"):
                vars(module).pop(name, None)
                if name in attributes:
                    vars(module)[name] = attributes[name]
