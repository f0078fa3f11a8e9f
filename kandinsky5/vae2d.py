"""FLUX.1's VAE, of the image models: image ↔ latents, 8× smaller in space, 16 channels.

`vae.py` in two dimensions: the same stages, blocks and norms, with zeros around the image where that one replicates
its border. A video is a batch of frames that know nothing of each other, so that shapes are those of the video VAE, and
what cuts work into tiles, samples or decodes need not know which one it has.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.config import VAEConfig
from kandinsky5.vae import VAE, CausalAttention, Decoder, Encoder, Layers, Posterior


def build_vae(config: VAEConfig) -> "VAE | VAE2D":
    """The VAE that a config describes."""
    return VAE2D(config) if config.dimensions == 2 else VAE(config)


class VAE2D(nn.Module):
    """Encoder and decoder in one piece; see `VAEConfig` for the sizes. Inside, a frame is an image (B, C, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, IMAGE)
        self.decoder = Decoder(config, IMAGE)

    def encode(self, video: Tensor) -> Posterior:
        """video (B, 3, F, H, W) in [−1, 1] → Posterior of (B, 16, F, H/8, W/8), unscaled."""
        return Posterior.from_moments(self.encode_moments(video))

    def encode_moments(self, video: Tensor) -> Tensor:
        """video (B, 3, F, H, W) → mean and log-variance (B, 32, F, h, w), not yet clamped."""
        return frame_by_frame(self.encoder, video)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 16, F, h, w), unscaled → video (B, 3, F, 8h, 8w), about [−1, 1]."""
        return frame_by_frame(self.decoder, z)


def frame_by_frame(run: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """`run`, which maps images (B, C, H, W), on every frame of a video (B, C, F, H, W)."""
    images = run(rearrange(video, "B C F H W -> (B F) C H W"))
    return rearrange(images, "(B F) C H W -> B C F H W", B=len(video))


class ImageAttention(CausalAttention):
    """The attention of a video of one frame, without masks: one head over all pixels, (B, C, H, W) → the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.norm(x), "B C H W -> B 1 (H W) C")
        out = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))  # (B, 1, H·W, C)
        return x + rearrange(self.to_out(out), "B 1 (H W) C -> B C H W", H=x.shape[2])


class Downsample(nn.Module):
    """A strided conv, padded with zeros on the right and below only: (B, C, H, W) → (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a conv: (B, C, H, W) → (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Conv(nn.Conv2d):
    """A 3×3 conv with zeros around the image: (B, C, H, W) → (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)


IMAGE = Layers(
    Conv, nn.Conv2d, ImageAttention, lambda channels, _: Downsample(channels), lambda channels, _: Upsample(channels)
)
