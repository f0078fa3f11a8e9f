"""The VAE on single frames only: 2-D convolutions with the same result in a third of the time.

A causal conv on a single frame sees that frame three times, as its past is replicated: this equals a 2-D conv with the
kernel summed over time.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5.runtime.fast import swapped
from kandinsky5.runtime.fast_vae import FORMS, FastCausalConv3d
from kandinsky5.vae import VAE, CausalConv3d


class FrameConv(CausalConv3d):
    """A causal conv on a video of one frame: (B, C, 1, H, W) → (B, C', 1, H', W').

    Gradients reach the part of the kernel for the frame itself, not the parts for the frames before.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 1, x.shape
        borders = F.pad(x[:, :, 0], (1, 1, 1, 1), mode="replicate")  # (B, C, H + 2, W + 2)
        kernel = self.weight[:, :, -1] + self.weight[:, :, :-1].detach().sum(dim=2)
        return F.conv2d(borders, kernel, self.bias, self.stride[1:])[:, :, None]


def single_frame(vae: VAE) -> contextlib.AbstractContextManager:
    """Inside, the VAE takes videos of one frame only; its fast forms, which are for several, are not used."""
    plain = {fast: plain for plain, fast in FORMS.items()}
    return swapped(vae, plain | {CausalConv3d: FrameConv, FastCausalConv3d: FrameConv})


@torch.no_grad()
def forget_the_past(vae: VAE) -> None:
    """Let every causal conv see its own frame only: the parts of its kernel for the two frames before become 0."""
    for conv in vae.modules():
        if isinstance(conv, CausalConv3d):
            conv.weight[:, :, :-1] = 0
            conv.weight[:, :, -1] *= 3**0.5  # as large an output as the whole kernel would give
