"""The causal 3D VAE of HunyuanVideo: video ↔ latents, 8× smaller in space and 4× in time, 16 channels.

Every convolution looks only at its own and earlier frames, and the first frame stands alone: 4k + 1 frames
become k + 1. The GroupNorms run over time, though, so that the whole is neither strictly causal nor exactly
tileable; `vae_tiling.py` cuts the work up all the same, as the references do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.config import VAEConfig

PIECE = 2**23  # numbers that a block takes at a time: 16 MB in bf16, a frame of 256 × 256 at 128 channels
PAIRS_FROM = 2**18  # numbers of a frame from which two frames at a time are faster; with fewer they are slower


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
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(moments, moments, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, kernel_size=1)
        self.decoder = Decoder(config)

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

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.norm_groups
        self.conv_in = CausalConv3d(config.image_channels, first)
        self.stages = nn.ModuleList()
        channels = first
        for stage, out_channels in enumerate(config.channels):
            blocks = nn.Sequential()
            for _ in range(config.blocks_per_stage):
                blocks.append(ResidualBlock(channels, out_channels, groups))
                channels = out_channels
            if stage < len(config.halves_time):
                blocks.append(Downsample(channels, halve_time=config.halves_time[stage]))
            self.stages.append(blocks)
        self.mid = Mid(last, groups)
        self.norm_out = GroupNorm(groups, last)
        self.conv_out = CausalConv3d(last, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(lay_out(x))  # (B, 128, F, H, W)
        for stage in self.stages:
            x = stage(x)  # (B, 128, F, H/2, W/2), (B, 256, F/2, H/4, W/4), (B, 512, T, h, w), the same
        x = self.mid(x)
        return conv_normalised(x, self.norm_out, self.conv_out)  # (B, 32, T, h, w)


class Decoder(nn.Module):
    """z (B, 16, T, h, w) → video (B, 3, F, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.norm_groups
        self.conv_in = CausalConv3d(config.latent_channels, last)
        self.mid = Mid(last, groups)
        self.stages = nn.ModuleList()
        channels = last
        for stage, out_channels in enumerate(reversed(config.channels)):
            blocks = nn.Sequential()
            for _ in range(config.blocks_per_stage + 1):
                blocks.append(ResidualBlock(channels, out_channels, groups))
                channels = out_channels
            if stage < len(config.halves_time):
                # The order of the encoder, not its mirror image: space alone comes first here too.
                blocks.append(Upsample(channels, double_time=config.halves_time[stage]))
            self.stages.append(blocks)
        self.norm_out = GroupNorm(groups, first)
        self.conv_out = CausalConv3d(first, config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(lay_out(z)))  # (B, 512, T, h, w)
        for stage in self.stages:
            for block in stage.children():  # one by one, so that no stage's input is held until its end
                x = block(x)
            # (B, 512, T, 2h, 2w), (B, 512, 2T − 1, 4h, 4w), (B, 256, F, H, W), (B, 128, F, H, W)
        return conv_normalised(x, self.norm_out, self.conv_out)  # (B, 3, F, H, W)


class Mid(nn.Module):
    """Residual block, attention, residual block: (B, C, T, H, W) → the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attention = CausalAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the input: (B, C, T, H, W) → (B, C', T, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm_1 = GroupNorm(groups, in_channels)
        self.conv_1 = CausalConv3d(in_channels, out_channels)
        self.norm_2 = GroupNorm(groups, out_channels)
        self.conv_2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_normalised(x, self.norm_1, self.conv_1)
        y = conv_normalised(y, self.norm_2, self.conv_2, into=y)
        return add_in_pieces(y, x, self.shortcut)


class CausalAttention(nn.Module):
    """One head; a token sees all tokens of its own and of earlier frames: (B, C, T, H, W) → the same.

    Written out as a mask this is (T·H·W)² numbers, 73 GB at 512×768×121. Frame by frame no mask is needed: the
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
        return conv_of_repeated(x, self.conv, self.double_time)  # the same as self.conv(repeat(x, self.double_time))


def repeat(x: Tensor, double_time: bool) -> Tensor:
    """Nearest neighbours: every pixel four times, and every frame but the first twice if `double_time`.

    (B, C, T, H, W) → (B, C, T or 2T − 1, 2H, 2W).
    """
    x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)  # (B, C, T, 2H, 2W)
    return torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2) if double_time else x


def conv_of_repeated(x: Tensor, conv: nn.Conv3d, double_time: bool) -> Tensor:
    """`conv(repeat(x, double_time))` without making the repeated video, in 8/27 of the multiplications.

    In 12/27 where time is not doubled.

    Of three neighbouring pixels of the repeated video two are always the same one, so a kernel of three acts like
    one of two with two of its weights added up. Which two depends on whether the output lies at an even or an odd
    place; in time the frames 2t − 1 and 2t come from frame t, as the first frame is not repeated.

        even place: w₀·x[i − 1] + (w₁ + w₂)·x[i]        odd place: (w₀ + w₁)·x[i] + w₂·x[i + 1]
        odd frame 2t − 1: (w₀ + w₁)·x[t − 1] + w₂·x[t]  even frame 2t: w₀·x[t − 1] + (w₁ + w₂)·x[t]

    Replicated borders carry over: the neighbour of the outermost pixel is that pixel, repeated or not.
    x (B, C, T, H, W) → (B, C', T or 2T − 1, 2H, 2W).
    """
    T, H, W = x.shape[2:]
    padded = _pad(x, past=1 if double_time else 2)
    weight = _widen(conv.weight)
    out = _empty_like(x, conv.out_channels, 2 * T - 1 if double_time else T, 2 * H, 2 * W)
    for odd_frame in (False, True) if double_time else (None,):
        in_time = weight if odd_frame is None else _merge(weight, 2, odd_frame)
        # an odd frame needs the frame t − 1 ≥ 0 that is there, an even one also that before the first
        frames = padded[:, :, 1:] if odd_frame else padded
        into = out if odd_frame is None else out[:, :, 1::2] if odd_frame else out[:, :, ::2]
        if into.shape[2] == 0:
            continue
        for odd_row in (False, True):
            for odd_column in (False, True):
                kernel = _merge(_merge(in_time, 3, odd_row), 4, odd_column).to(x.dtype)
                rows, columns = slice(odd_row, odd_row + H + 1), slice(odd_column, odd_column + W + 1)
                into[..., odd_row::2, odd_column::2] = F.conv3d(frames[..., rows, columns], kernel, conv.bias)
    return out


def _widen(weight: Tensor) -> Tensor:
    """At least float32, so that sums of bf16 weights, of any shape, are rounded once and not twice."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _merge(weight: Tensor, dim: int, odd: bool) -> Tensor:
    """Add up two of a kernel's three weights along `dim`: the first two for an odd place, else the last two."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if odd else [first, middle + last], dim)


class CausalConv3d(nn.Conv3d):
    """A 3×3×3 conv whose output frame sees itself and the two frames before; borders are replicated.

    (B, C, T, H, W) → (B, C', T', H', W'), each size divided by its stride and rounded up. Large frames on a CPU are
    computed two at a time.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int | tuple[int, int, int] = 1):
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        """padded: x (B, C, T + 2, H + 2, W + 2) has its borders and the two frames before it already."""
        x = x if padded else _pad(x, past=2)
        large = x.device.type == "cpu" and x[0, :, 0, 1:-1, 1:-1].numel() >= PAIRS_FROM
        if large and self.stride == (1, 1, 1) and not torch.is_grad_enabled():
            return conv_in_pairs(x, self)
        return super().forward(x)


def conv_normalised(x: Tensor, norm: "GroupNorm", conv: CausalConv3d, into: Tensor | None = None) -> Tensor:
    """`conv(silu(norm(x)))`, without gradients a few frames at a time: (B, C, T, H, W) → (B, C', T, H, W).

    Normalised, padded and in the kernel's own layout, copies of a whole clip would be most of the memory that
    decoding takes. Where frames go in pieces the result is written to `into`, which may be x itself.
    """
    T, step = x.shape[2], frames_at_a_time(x)
    if step >= T:
        return conv(silu(norm(x)))
    out = _empty_like(x, conv.out_channels, *x.shape[2:]) if into is None else into
    for video, result in zip(x.split(1), out.split(1), strict=True):
        (mean, variance), window = norm.statistics(video), None
        for i in range(0, T, step):
            frames = _pad(norm.activate(video[:, :, i : i + step], mean, variance), past=0)
            past = [frames[:, :, :1]] * 2 if window is None else [window[:, :, -2:]]
            window = torch.cat([*past, frames], dim=2)
            del past, frames  # the conv needs room
            result[:, :, i : i + step] = conv(window, padded=True)
    return out


def add_in_pieces(y: Tensor, x: Tensor, shortcut: nn.Module) -> Tensor:
    """`y + shortcut(x)`, x (B, C, T, H, W), y (B, C', T, H, W); without gradients a few frames at a time, into y."""
    if torch.is_grad_enabled():
        return y + shortcut(x)
    step = frames_at_a_time(x)
    for result, video in zip(y.split(1), x.split(1), strict=True):
        for i in range(0, x.shape[2], step):
            result[:, :, i : i + step].add_(shortcut(video[:, :, i : i + step]))
    return y


def frames_at_a_time(x: Tensor) -> int:
    """How many frames of a clip of x (B, C, T, H, W) to compute at once: all with gradients, else an even number."""
    return x.shape[2] if torch.is_grad_enabled() else max(2, PIECE // x[0, :, 0].numel() // 2 * 2)


def conv_in_pairs(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A 3×3×3 conv of x that is padded, two frames at a time in two thirds of the multiplications.

    Winograd's F(2, 3) along time (arXiv 1509.09308 §4.1): with · for a 2-D conv and wᵢ for the kernel's three frames,

        first = w₀·(x₀ − x₂)    total = ½(w₀ + w₁ + w₂)·(x₁ + x₂)    difference = ½(w₀ − w₁ + w₂)·(x₂ − x₁)
        last  = w₂·(x₃ − x₁)    y₀ = first + total + difference     y₁ = last + total − difference

    In float32 it is as close to float64 as the plain conv. In bf16 the sums of frames are rounded: that is 2.6 times
    the error of one conv, but in the released VAE's sizes with random weights, where more than convs round, decoding
    has 0.0171 (plain 0.0161) and encoding 0.0069 (0.0065).
    x (B, C, T + 2, H + 2, W + 2) → (B, C', T, H, W).
    """
    B, _, T, H, W = (size - 2 * (dim > 1) for dim, size in enumerate(x.shape))
    w_0, w_1, w_2 = _widen(conv.weight).unbind(2)
    w_total, w_difference = ((w_0 + w_1 + w_2) / 2).to(x.dtype), ((w_0 - w_1 + w_2) / 2).to(x.dtype)
    w_first, w_last = w_0.to(x.dtype), w_2.to(x.dtype)
    out = _empty_like(x, conv.out_channels, T, H, W)
    for t in range(0, T - 1, 2):
        x_0, x_1, x_2, x_3 = x[:, :, t : t + 4].unbind(2)
        total, difference = F.conv2d(x_1 + x_2, w_total), F.conv2d(x_2 - x_1, w_difference)
        first, last = F.conv2d(x_0 - x_2, w_first, conv.bias), F.conv2d(x_3 - x_1, w_last, conv.bias)
        torch.add(first.add_(total), difference, out=out[:, :, t])
        torch.sub(last.add_(total), difference, out=out[:, :, t + 1])
    if T % 2:
        out[:, :, -1:] = F.conv3d(x[:, :, -3:], conv.weight, conv.bias)
    return out


def lay_out(x: Tensor) -> Tensor:
    """(B, C, T, H, W) → the same numbers, on a CPU in half precision with the channels of a pixel side by side.

    All layers keep that layout. Convolutions in bf16 take 10 to 25 % less time in it; in float32 they do not.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.contiguous(memory_format=torch.channels_last_3d) if half and x.device.type == "cpu" else x


def _empty_like(x: Tensor, channels: int, T: int, H: int, W: int) -> Tensor:
    """Memory for (B, channels, T, H, W), laid out as x is."""
    channels_last = x.stride(1) == 1
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(x.shape[0], channels, T, H, W, dtype=x.dtype, device=x.device, memory_format=layout)


def _pad(x: Tensor, past: int) -> Tensor:
    """One pixel on each side and `past` frames in front, copies of the outermost ones."""
    return F.pad(x, (1, 1, 1, 1, past, 0), mode="replicate")  # W, H, T: before and after


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), any shape, in the memory of x where no gradient needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class GroupNorm(nn.GroupNorm):
    """GroupNorm over space *and* time, eps 1e-6."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=1e-6)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the video x (1, C, T, H, W) in `forward`, for each channel, (C,), at least float32.

        Frame by frame, so that nothing as large as x is made: the mean of a group is that of its channels' and frames'
        means, its variance the mean of their variances plus the variance of their means.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        means, variances = [], []
        for frame in x[0].unbind(1):  # (C, H, W)
            values = frame.to(dtype, copy=True)
            means.append(values.mean(dim=(1, 2)))
            values -= means[-1][:, None, None]
            variances.append(values.square_().mean(dim=(1, 2)))
        inner, outer = (torch.stack(v, dim=1).view(self.num_groups, -1) for v in (variances, means))  # (G, C/G·T)
        mean, variance = outer.mean(dim=1), inner.mean(dim=1) + outer.var(dim=1, correction=0)
        size = self.num_channels // self.num_groups
        return mean.repeat_interleave(size), variance.repeat_interleave(size)

    def activate(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """silu of x (1, C, T, H, W), normalised by (C,) that are known: then GroupNorm is BatchNorm in evaluation."""
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return silu(F.batch_norm(x, mean, variance, weight, bias, eps=self.eps))
