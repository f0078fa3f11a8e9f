"""The causal 3D VAE of HunyuanVideo: video ↔ latents, 8× smaller in space and 4× in time, 16 channels.

Every convolution looks only at its own and earlier frames, and the first frame stands alone: 4k + 1 frames
become k + 1. The GroupNorms run over time, though, so that the whole is neither strictly causal nor exactly
tileable; `vae_tiling.py` cuts the work up all the same, as the references do. With other `Layers` the same encoder
and decoder are those of images (vae2d.py); shapes are written for videos.

Sampling runs equal, faster forms of some classes (`runtime/fast_vae.py`): an edit here needs the same there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.config import VAEConfig


class Posterior(NamedTuple):
    """The diagonal Gaussian that the encoder predicts; both (B, 16, T, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """moments (B, 32, T, h, w): mean, then log-variance, which is clamped to [−30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, with noise of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class VAE(nn.Module):
    """Encoder and decoder in one piece; see `VAEConfig` for the sizes."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config, VIDEO)
        self.quant_conv = nn.Conv3d(moments, moments, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, kernel_size=1)
        self.decoder = Decoder(config, VIDEO)

    def encode(self, video: Tensor) -> Posterior:
        """video (B, 3, F, H, W) in [−1, 1], F = 4k + 1 → Posterior of (B, 16, k + 1, H/8, W/8), unscaled."""
        return Posterior.from_moments(self.encode_moments(video))

    def encode_moments(self, video: Tensor) -> Tensor:
        """video (B, 3, F, H, W) → mean and log-variance (B, 32, T, h, w), not yet clamped."""
        return self.quant_conv(self.encoder(video))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 16, T, h, w), unscaled → video (B, 3, 4(T − 1) + 1, 8h, 8w), about [−1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    """video (B, 3, F, H, W) → (B, 32, T, h, w)."""

    def __init__(self, config: VAEConfig, layers: "Layers"):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.norm_groups
        self.conv_in = layers.conv(config.image_channels, first)
        self.stages = nn.ModuleList()
        channels = first
        for stage, out_channels in enumerate(config.channels):
            blocks = nn.Sequential()
            for _ in range(config.blocks_per_stage):
                blocks.append(ResidualBlock(channels, out_channels, groups, layers))
                channels = out_channels
            if stage < len(config.halves_time):
                blocks.append(layers.downsample(channels, config.halves_time[stage]))
            self.stages.append(blocks)
        self.mid = Mid(last, groups, layers)
        self.norm_out = GroupNorm(groups, last)
        self.conv_out = layers.conv(last, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, 128, F, H, W)
        for stage in self.stages:
            x = stage(x)  # (B, 128, F, H/2, W/2), (B, 256, F/2, H/4, W/4), (B, 512, T, h, w), the same
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 32, T, h, w)


class Decoder(nn.Module):
    """z (B, 16, T, h, w) → video (B, 3, F, H, W)."""

    def __init__(self, config: VAEConfig, layers: "Layers"):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.norm_groups
        self.conv_in = layers.conv(config.latent_channels, last)
        self.mid = Mid(last, groups, layers)
        self.stages = nn.ModuleList()
        channels = last
        for stage, out_channels in enumerate(reversed(config.channels)):
            blocks = nn.Sequential()
            for _ in range(config.blocks_per_stage + 1):
                blocks.append(ResidualBlock(channels, out_channels, groups, layers))
                channels = out_channels
            if stage < len(config.halves_time):
                # The order of the encoder, not its mirror image: space alone comes first here too.
                blocks.append(layers.upsample(channels, config.halves_time[stage]))
            self.stages.append(blocks)
        self.norm_out = GroupNorm(groups, first)
        self.conv_out = layers.conv(first, config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))  # (B, 512, T, h, w)
        for stage in self.stages:
            x = stage(x)  # (B, 512, T, 2h, 2w), (B, 512, 2T − 1, 4h, 4w), (B, 256, F, H, W), (B, 128, F, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, F, H, W)


class Mid(nn.Module):
    """Residual block, attention, residual block: (B, C, T, H, W) → the same."""

    def __init__(self, channels: int, groups: int, layers: "Layers"):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups, layers)
        self.attention = layers.attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups, layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the input: (B, C, T, H, W) → (B, C', T, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, layers: "Layers"):
        super().__init__()
        self.norm_1 = GroupNorm(groups, in_channels)
        self.conv_1 = layers.conv(in_channels, out_channels)
        self.norm_2 = GroupNorm(groups, out_channels)
        self.conv_2 = layers.conv(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else layers.pointwise(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_1(F.silu(self.norm_1(x)))
        y = self.conv_2(F.silu(self.norm_2(y)))
        return self.shortcut(x) + y


class CausalAttention(nn.Module):
    """One head; a token sees all tokens of its own and of earlier frames: (B, C, T, H, W) → the same.

    Written out as a mask this has (T·H·W)² elements, 73 GB at 512×768×121. Frame by frame no mask is needed: the
    queries of frame i attend to the keys of frames 0 … i.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        T, H, W = x.shape[2:]
        y = rearrange(self.norm(x), "B C T H W -> B 1 (T H W) C")
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)  # (B, 1, T·H·W, C)
        frame = H * W
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    q[:, :, i * frame : (i + 1) * frame], k[:, :, : (i + 1) * frame], v[:, :, : (i + 1) * frame]
                )
                for i in range(T)
            ],
            dim=2,
        )  # (B, 1, T·H·W, C)
        return x + rearrange(self.to_out(out), "B 1 (T H W) C -> B C T H W", T=T, H=H)


class Downsample(nn.Module):
    """A strided causal conv: (B, C, T, H, W) → (B, C, T or ⌈T/2⌉, H/2, W/2)."""

    def __init__(self, channels: int, halve_time: bool):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=(2 if halve_time else 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a causal conv: (B, C, T, H, W) → (B, C, T or 2T − 1, 2H, 2W).

    The first frame stands for one frame of the video and not for two, so it is not repeated in time.
    """

    def __init__(self, channels: int, double_time: bool):
        super().__init__()
        self.double_time = double_time
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(repeat(x, self.double_time))


def repeat(x: Tensor, double_time: bool) -> Tensor:
    """Nearest neighbours: every pixel four times, and every frame but the first twice if `double_time`.

    (B, C, T, H, W) → (B, C, T or 2T − 1, 2H, 2W).
    """
    x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)  # (B, C, T, 2H, 2W)
    return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2) if double_time else x


class CausalConv3d(nn.Conv3d):
    """A 3×3×3 conv whose output frame sees itself and the two frames before; borders are replicated.

    (B, C, T, H, W) → (B, C', T', H', W'), each size divided by its stride and rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int | tuple[int, int, int] = 1):
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))  # W, H, T: before and after


class GroupNorm(nn.GroupNorm):
    """GroupNorm over space *and* time, eps 1e-6."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=1e-6)


class Layers(NamedTuple):
    """The layers in which a VAE of videos and one of images (vae2d.py) differ; all else they share."""

    conv: Callable[[int, int], nn.Module]  # 3 pixels along each axis: channels in, channels out
    pointwise: Callable[..., nn.Module]  # PyTorch's conv, for single pixels
    attention: Callable[[int, int], nn.Module]  # channels, groups
    downsample: Callable[[int, bool], nn.Module]  # channels, whether time is halved
    upsample: Callable[[int, bool], nn.Module]  # channels, whether time is doubled


VIDEO = Layers(CausalConv3d, nn.Conv3d, CausalAttention, Downsample, Upsample)
