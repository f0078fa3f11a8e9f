"""The VAE's faster forms, where no gradients are needed: a few frames at a time, in less memory and fewer operations.

    FastUpsample       convolves the small video with merged kernels instead of its enlarged copy
    FastCausalConv3d   on a CPU two large frames at a time, in two thirds of the multiplications (Winograd); small
                       ones through oneDNN
    FastResidualBlock  norm, SiLU and conv for a few frames at a time, writing over its own activations
    FastGroupNorm      for that: statistics frame by frame, norm and SiLU rounded once
    Fast{En,De}coder   the same at the end; in half precision with the channels of a pixel side by side

In bf16 pairs of frames and merged kernels round more often, norm, SiLU and the sum of a block less often. The error
against float32 is, as a share of the plain definition's, 0.995 decoding and 0.961 encoding (released sizes, random
weights, mean of five models), and 0.92 and 0.92 with the weights that PyTorch begins with (of three).
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky5.vae import CausalConv3d, Decoder, Encoder, GroupNorm, ResidualBlock, Upsample

PIECE = 2**23  # elements that a block computes at a time: 16 MB in bf16, a frame of 256 × 256 at 128 channels
PAIRS_FROM = 2**18  # elements per frame above which the two-frame convolution wins
PAIRED = range(64, 257)  # output channels for which it is used in half precision: those of the largest frames
BAND = 2**19  # elements of a frame that it computes at a time: their sums in float32 stay in the cache


class FastEncoder(Encoder):
    """video (B, 3, F, H, W) → (B, 32, T, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        x = self.conv_in(lay_out(x))
        for stage in self.stages:
            x = stage(x)
        return conv_normalised(self.mid(x), self.norm_out, self.conv_out)


class FastDecoder(Decoder):
    """z (B, 16, T, h, w) → video (B, 3, F, H, W)."""

    def forward(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(z)
        x = self.mid(self.conv_in(lay_out(z)))
        for stage in self.stages:
            for block in stage.children():  # one by one, so that no stage's input is held until its end
                x = block(x)
        return conv_normalised(x, self.norm_out, self.conv_out)


class FastResidualBlock(ResidualBlock):
    """(B, C, T, H, W) → (B, C', T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        y = conv_normalised(x, self.norm_1, self.conv_1)
        return conv_normalised(y, self.norm_2, self.conv_2, y, lambda some, frames: self.shortcut(x[some, :, frames]))


class FastUpsample(Upsample):
    """(B, C, T, H, W) → (B, C, T or 2T − 1, 2H, 2W)."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_of_repeated(x, self.conv, self.double_time)


class FastCausalConv3d(CausalConv3d):
    """(B, C, T, H, W) → (B, C', T', H', W')."""

    def forward(self, x: Tensor, padded: bool = False, plus: Tensor | None = None) -> Tensor:
        """padded: x (B, C, T + 2, H + 2, W + 2) has its borders and the two frames before it already.

        plus: what to add, of the result's shape, where there are no gradients.
        """
        x = x if padded else _pad(x, past=2)
        if self.pays_in_pairs(x):
            return conv_in_pairs(x, self, plus)
        y = conv3d(x, self.weight, self.bias, self.stride)
        return y if plus is None else y.add_(plus)

    def pays_in_pairs(self, x: Tensor) -> bool:
        """Whether `conv_in_pairs` is for x (B, C, T + 2, H + 2, W + 2)."""
        if x.device.type != "cpu" or self.stride != (1, 1, 1) or torch.is_grad_enabled():
            return False
        large = x[0, :, 0, 1:-1, 1:-1].numel() >= PAIRS_FROM
        # In half precision it rounds more often: so only where that saves most.
        return large and (x.dtype.itemsize > 2 or self.out_channels in PAIRED)


class FastGroupNorm(GroupNorm):
    """GroupNorm in two steps: statistics of a whole video, and normalising any of its frames by them."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the video x (1, C, T, H, W) in `forward`, for each channel, (C,), at least float32.

        Frame by frame, so that nothing as large as x is made: the mean of a group is that of its channels' and frames'
        means, its variance the mean of their variances plus the variance of their means.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        means, variances = [], []
        for frame in x[0].unbind(1):  # (C, H, W)
            if x.device.type != "cpu":  # one pass; on a CPU it is slower than two
                variance, mean = torch.var_mean(frame.to(dtype), dim=(1, 2), correction=0)
                means.append(mean)
                variances.append(variance)
                continue
            values = frame.to(dtype, copy=True)
            means.append(values.mean(dim=(1, 2)))
            values -= means[-1][:, None, None]
            variances.append(values.square_().mean(dim=(1, 2)))
        inner, outer = (torch.stack(v, dim=1).view(self.num_groups, -1) for v in (variances, means))  # (G, C/G·T)
        mean, variance = outer.mean(dim=1), inner.mean(dim=1) + outer.var(dim=1, correction=0)
        size = self.num_channels // self.num_groups
        return mean.repeat_interleave(size), variance.repeat_interleave(size)

    def activate(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """silu of x (1, C, T, H, W), normalised by (C,) that are known: then GroupNorm is BatchNorm in evaluation.

        In at least float32, rounded once: that makes up for the rounding of merged kernels (`conv_of_repeated`).
        """
        weight, bias = _widen(self.weight), _widen(self.bias)
        return silu(F.batch_norm(_widen(x), mean, variance, weight, bias, eps=self.eps)).to(x.dtype)

    def activate_all(self, x: Tensor) -> Tensor:
        """`silu(norm(x))` of a whole batch of videos x (B, C, T, H, W), rounded once like `activate`."""
        weight, bias = _widen(self.weight), _widen(self.bias)
        return silu(F.group_norm(_widen(x), self.num_groups, weight, bias, self.eps)).to(x.dtype)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """`F.conv3d` without padding, in float32 on a CPU always through oneDNN: (B, C, T, H, W) → (B, C', T', H', W').

    By itself PyTorch takes loops of its own for one video of few channels, frames and rows, as nano's: those
    convolutions take three to ten times as long.
    """
    mkldnn = torch.backends.mkldnn
    if x.device.type == "cpu" and x.dtype == torch.float32 and mkldnn.is_available() and mkldnn.enabled:
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride)


def conv_of_repeated(x: Tensor, conv: nn.Conv3d, double_time: bool) -> Tensor:
    """`conv(repeat(x, double_time))` without making the repeated video, in 8/27 of the multiplications.

    In 12/27 where time is not doubled.

    Of three neighbouring pixels of the repeated video two are always the same one, so a kernel of three acts like
    one of two with two of its weights added up. Which two depends on whether the output position is even or odd; in
    time the frames 2t − 1 and 2t come from frame t, as the first frame is not repeated.

        even: w₀·x[i − 1] + (w₁ + w₂)·x[i]              odd: (w₀ + w₁)·x[i] + w₂·x[i + 1]
        odd frame 2t − 1: (w₀ + w₁)·x[t − 1] + w₂·x[t]  even frame 2t: w₀·x[t − 1] + (w₁ + w₂)·x[t]

    Replicated borders carry over: the neighbour of the outermost pixel is that pixel, repeated or not.
    x (B, C, T, H, W) → (B, C', T or 2T − 1, 2H, 2W).
    """
    T, H, W = x.shape[2:]
    padded = _pad(x, past=1 if double_time else 2)
    if x.device.type == "cpu" and not double_time:  # the decoder's first, 1 % of its work, exactly
        padded = _widen(padded)
    weight, bias = _widen(conv.weight), None if conv.bias is None else conv.bias.to(padded.dtype)
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
                kernel = _merge(_merge(in_time, 3, odd_row), 4, odd_column).to(padded.dtype)
                rows, columns = slice(odd_row, odd_row + H + 1), slice(odd_column, odd_column + W + 1)
                into[..., odd_row::2, odd_column::2] = conv3d(frames[..., rows, columns], kernel, bias)
    return out


def _widen(x: Tensor) -> Tensor:
    """x, of any shape, in at least float32, so that what is made of it is rounded once and not twice."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _merge(weight: Tensor, dim: int, odd: bool) -> Tensor:
    """Add up two of a kernel's three weights along `dim`: the first two for an odd position, else the last two."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if odd else [first, middle + last], dim)


def conv_normalised(
    x: Tensor, norm: nn.Module, conv: nn.Module, into: Tensor | None = None,
    plus: Callable[[slice, slice], Tensor | None] = lambda some, frames: None,
) -> Tensor:  # fmt: skip
    """`conv(silu(norm(x)))`, a few frames at a time: (B, C, T, H, W) → (B, C', T, H, W).

    Normalised, padded and in the kernel's own layout, copies of a whole clip would be most of the memory that
    decoding needs. Where frames go in pieces the result is written to `into`, which may be x itself.
    plus: of samples and of frames of them, what to add to the result.
    """
    assert isinstance(norm, FastGroupNorm) and isinstance(conv, FastCausalConv3d), "forms are installed together"
    T, step = x.shape[2], frames_at_a_time(x)
    if step >= T:
        return conv(norm.activate_all(x), plus=plus(slice(None), slice(None)))
    out = _empty_like(x, conv.out_channels, *x.shape[2:]) if into is None else into
    for b in range(x.shape[0]):
        some, window = slice(b, b + 1), None
        mean, variance = norm.statistics(x[some])
        for i in range(0, T, step):
            frames = slice(i, i + step)
            window = _pad(norm.activate(x[some, :, frames], mean, variance), past=2, before=window)
            out[some, :, frames] = conv(window, padded=True, plus=plus(some, frames))
    return out


def frames_at_a_time(x: Tensor) -> int:
    """How many frames of a clip of x (B, C, T, H, W) to compute at once, an even number."""
    return max(2, PIECE // x[0, :, 0].numel() // 2 * 2)


def conv_in_pairs(x: Tensor, conv: nn.Conv3d, plus: Tensor | None = None) -> Tensor:
    """A 3×3×3 conv of x that is padded, and `plus` added, two frames at a time in two thirds of the multiplications.

    Winograd's F(2, 3) along time (arXiv 1509.09308 §4.1): with · for a 2-D conv and wᵢ for the kernel's three frames,

        first = w₀·(x₀ − x₂)    total = ½(w₀ + w₁ + w₂)·(x₁ + x₂)    difference = ½(w₀ − w₁ + w₂)·(x₂ − x₁)
        last  = w₂·(x₃ − x₁)    y₀ = first + total + difference     y₁ = last + total − difference

    In float32 it is as close to float64 as the plain conv, in bf16 it has 2.2 times its error,
    1.4 times with a residual block's input as `plus`, which is added before anything is rounded.
    x (B, C, T + 2, H + 2, W + 2), plus (B, C', T, H, W) → (B, C', T, H, W).
    """
    B, _, T, H, W = (size - 2 * (dim > 1) for dim, size in enumerate(x.shape))
    w_0, w_1, w_2 = _widen(conv.weight).unbind(2)
    w_total, w_difference = ((w_0 + w_1 + w_2) / 2).to(x.dtype), ((w_0 - w_1 + w_2) / 2).to(x.dtype)
    w_first, w_last = w_0.to(x.dtype), w_2.to(x.dtype)
    out = _empty_like(x, conv.out_channels, T, H, W)
    height = max(1, BAND // (W * max(conv.in_channels, conv.out_channels)))
    for t, top in itertools.product(range(0, T - 1, 2), range(0, H, height)):
        x_0, x_1, x_2, x_3 = x[:, :, t : t + 4, top : top + height + 2].unbind(2)
        total, difference = _widen(F.conv2d(x_1 + x_2, w_total)), _widen(F.conv2d(x_2 - x_1, w_difference))
        first, last = F.conv2d(x_0 - x_2, w_first, conv.bias), F.conv2d(x_3 - x_1, w_last, conv.bias)
        pair = _widen(first).add_(total).add_(difference), _widen(last).add_(total).sub_(difference)
        for i, frame in zip((t, t + 1), pair, strict=True):
            rows = (slice(None), slice(None), i, slice(top, top + height))
            out[rows] = frame if plus is None else frame.add_(plus[rows])
    if T % 2:
        y = conv3d(x[:, :, -3:], conv.weight, conv.bias)
        out[:, :, -1:] = y if plus is None else y.add_(plus[:, :, -1:])
    return out


def lay_out(x: Tensor) -> Tensor:
    """(B, C, T, H, W) → the same values, in half precision with the channels of a pixel side by side.

    All layers keep that layout. On a CPU convolutions in bf16 take 10 to 25 % less time in it; in float32 they do not.
    On CUDA some versions of cuDNN refuse bf16 in the other one, and PyTorch then makes 17 times the memory of it.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.contiguous(memory_format=torch.channels_last_3d) if half and x.device.type in ("cpu", "cuda") else x


def _empty_like(x: Tensor, channels: int, T: int, H: int, W: int) -> Tensor:
    """Memory for (B, channels, T, H, W), laid out as x is."""
    channels_last = x.stride(1) == 1
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(x.shape[0], channels, T, H, W, dtype=x.dtype, device=x.device, memory_format=layout)


def _pad(x: Tensor, past: int, before: Tensor | None = None) -> Tensor:
    """One pixel on each side and `past` frames in front, copies of the outermost ones, laid out as x is.

    before: padded frames to take those in front from instead. Copies into memory of the padded size: on CUDA F.pad
    returns another layout, of which the next convolution would make one more copy.
    """
    B, C, T, H, W = x.shape
    out = _empty_like(x, C, T + past, H + 2, W + 2)
    inside = out[:, :, past:]
    inside[..., 1:-1, 1:-1] = x
    inside[..., 1:-1, 0], inside[..., 1:-1, -1] = x[..., 0], x[..., -1]
    inside[..., 0, :], inside[..., -1, :] = inside[..., 1, :], inside[..., -2, :]  # with the corners
    out[:, :, :past] = inside[:, :, :1] if before is None else before[:, :, -past:]
    return out


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), any shape, in the memory of x."""
    return F.silu(x, inplace=True)


FORMS: dict[type, type] = {
    Encoder: FastEncoder,
    Decoder: FastDecoder,
    ResidualBlock: FastResidualBlock,
    Upsample: FastUpsample,
    CausalConv3d: FastCausalConv3d,
    GroupNorm: FastGroupNorm,
}
