"""Properties of the VAE and its tiles; tests/test_golden.py and tests/parity/ hold them to diffusers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky5 import vae as module
from kandinsky5 import vae_tiling
from kandinsky5.config import Tiling, VAEConfig
from kandinsky5.vae import VAE, CausalAttention, CausalConv3d, GroupNorm, Posterior, Upsample, conv_normalised, repeat
from random_weights import SMALL_VAE, randomise, relative_error


@pytest.fixture(scope="module")
def vae():
    return randomise(VAE(SMALL_VAE))


def test_parameter_count_is_that_of_the_released_model():
    with torch.device("meta"):
        assert sum(p.numel() for p in VAE(VAEConfig()).parameters()) == 246_478_803


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_shapes(vae, frames):
    T = (frames - 1) // 4 + 1
    posterior = vae.encode(torch.rand(2, 3, frames, 16, 24) * 2 - 1)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 16, T, 2, 3)
    assert vae.decode(posterior.mean).shape == (2, 3, frames, 16, 24)


def test_conv_sees_the_past_only():
    conv, x = CausalConv3d(2, 3), torch.randn(1, 2, 6, 5, 5)
    changed = x.clone()
    changed[:, :, 3] += 1
    difference = (conv(changed) - conv(x)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:3] == 0).all() and (difference[3:] > 0).all()


@pytest.mark.parametrize("pairs_from", [0, 10**9])
@pytest.mark.parametrize("piece", [1, 5 * 8 * 5 * 4, 10**9])
def test_a_few_frames_at_a_time_are_the_norm_and_the_conv_of_all(pairs_from, piece, monkeypatch):
    """Also where the result is written over the input."""
    norm, conv, x = randomise(GroupNorm(4, 8)), randomise(CausalConv3d(8, 8)), 3 + torch.randn(2, 8, 7, 5, 4)
    with torch.enable_grad():
        expected = conv(F.silu(F.group_norm(x, 4, norm.weight, norm.bias, 1e-6)))
    monkeypatch.setattr(module, "PAIRS_FROM", pairs_from)
    monkeypatch.setattr(module, "PIECE", piece)  # two frames at a time, four, all
    before = x.clone()
    with torch.no_grad():
        assert relative_error(conv_normalised(x, norm, conv), expected) < 1e-6
        assert x.equal(before)
        assert relative_error(conv_normalised(x, norm, conv, into=x), expected) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_statistics_frame_by_frame_are_those_of_the_video(dtype, tolerance):
    norm = randomise(GroupNorm(4, 12)).to(dtype)
    x = (torch.randn(1, 12, 5, 6, 7) + 10 * torch.randn(1, 12, 5, 1, 1)).to(dtype)  # channels and frames far apart
    exact = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    ours = norm.activate(x[:, :, 2:4], *norm.statistics(x))
    assert ours.dtype == dtype
    assert relative_error(ours, exact[:, :, 2:4]) < tolerance


def test_conv_of_one_frame_is_a_2d_conv_with_the_kernel_summed_over_time():
    conv, x = CausalConv3d(2, 3), torch.randn(1, 2, 1, 5, 5)
    padded = F.pad(x[:, :, 0], (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded, conv.weight.sum(dim=2), conv.bias)
    torch.testing.assert_close(conv(x)[:, :, 0], expected)


def test_attention_frame_by_frame_is_attention_under_the_causal_mask():
    attention, x = randomise(CausalAttention(16, 4)), torch.randn(2, 16, 3, 4, 5)
    frame = torch.arange(3).repeat_interleave(20)
    mask = frame[:, None] >= frame  # a token sees its own and earlier frames
    y = rearrange(attention.norm(x), "B C T H W -> B 1 (T H W) C")
    out = F.scaled_dot_product_attention(attention.to_q(y), attention.to_k(y), attention.to_v(y), attn_mask=mask)
    out = rearrange(attention.to_out(out), "B 1 (T H W) C -> B C T H W", T=3, H=4)
    assert relative_error(attention(x), x + out) < 1e-6


def test_upsampling_repeats_the_first_frame_in_space_only():
    x = torch.arange(3.0).view(1, 1, 3, 1, 1)
    assert repeat(x, double_time=True)[0, 0, :, 0, 0].tolist() == [0, 1, 1, 2, 2]
    assert repeat(x, double_time=True).shape == (1, 1, 5, 2, 2)
    assert repeat(x, double_time=False).shape == (1, 1, 3, 2, 2)


def test_posterior_clamps_and_samples():
    moments = torch.cat([torch.full((1, 16, 1, 1, 1), 3.0), torch.linspace(-99, 99, 16).view(1, 16, 1, 1, 1)], dim=1)
    posterior = Posterior.from_moments(moments)
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20
    noise = torch.randn(1, 16, 1, 1, 1)
    torch.testing.assert_close(posterior.sample(noise), 3 + noise * (posterior.logvar / 2).exp())


@pytest.mark.parametrize("tiling", [Tiling(frames=100, frame_stride=96), Tiling(space=True, time=False, pixels=512)])
def test_one_tile_over_everything_is_the_plain_vae(vae, tiling):
    video = torch.rand(1, 3, 21, 32, 40) * 2 - 1
    posterior = vae.encode(video)
    assert vae_tiling.encode(vae, video, tiling).mean.equal(posterior.mean)
    assert vae_tiling.decode(vae, posterior.mean, tiling).equal(vae.decode(posterior.mean))


@pytest.mark.parametrize("frames", [1, 13, 17, 25, 33])
@pytest.mark.parametrize("space", [False, True])
def test_tiles_cover_every_frame_and_pixel_once(vae, frames, space):
    tiling = Tiling(space=space, pixels=32, pixel_stride=24)
    posterior = vae_tiling.encode(vae, torch.rand(1, 3, frames, 40, 72) * 2 - 1, tiling)
    assert posterior.mean.shape == (1, 16, (frames - 1) // 4 + 1, 5, 9)
    assert vae_tiling.decode(vae, posterior.mean, tiling).shape == (1, 3, frames, 40, 72)


def test_tiles_of_a_pointwise_model_leave_no_trace():
    """Where a tile does not depend on its neighbours, cutting up and blending must change nothing."""

    class Repeat:
        config = SMALL_VAE

        def decode(self, z):
            video = z.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
            return torch.cat([video[:, :, :1], video[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)

    z = torch.randn(1, 3, 11, 9, 13)
    tiled = vae_tiling.decode(Repeat(), z, Tiling(space=True, pixels=32, pixel_stride=24))
    torch.testing.assert_close(tiled, Repeat().decode(z))


def test_temporal_tiles_fade_linearly_over_four_frames():
    """Windows that decode to a constant each show the ramp: 0, 1/4, 2/4, 3/4, then the later window."""
    values = iter([0.0, 1.0])

    class Constant:
        config = SMALL_VAE

        def decode(self, z):
            return torch.full((1, 3, 4 * z.shape[2] - 3, 8, 8), next(values))

    video = vae_tiling.decode(Constant(), torch.zeros(1, 16, 6, 1, 1), Tiling())
    assert video[0, 0, :, 0, 0].tolist() == [0] * 13 + [0, 0.25, 0.5, 0.75] + [1] * 4


def test_half_precision(vae):
    video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    half = randomise(VAE(SMALL_VAE)).bfloat16()
    expected = vae.encode(video).mean
    assert relative_error(half.encode(video.bfloat16()).mean, expected) < 5e-2
    decoded = half.decode(expected.bfloat16())
    assert relative_error(decoded, vae.decode(expected)) < 5e-2  # 0.020 and 0.042 are bf16 itself


@pytest.mark.parametrize("pairs_from", [0, 10**9])
def test_in_half_precision_every_convolution_gets_and_gives_channels_last(pairs_from, vae, monkeypatch):
    """One that did not would make all later ones copy. And the error of bf16 is what it is in the plain layout."""
    exact, half = VAE(SMALL_VAE), VAE(SMALL_VAE).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    exact.load_state_dict(half.state_dict())  # the rounded weights
    layouts = []
    for layer in half.modules():
        if isinstance(layer, CausalConv3d):
            layer.register_forward_hook(lambda _, x, y: layouts.append((x[0].stride(1), y.stride(1))))
    z = torch.randn(1, 16, 3, 4, 4).to(torch.bfloat16)
    video = (torch.rand(1, 3, 9, 32, 32) * 2 - 1).to(torch.bfloat16)
    monkeypatch.setattr(module, "PIECE", 8 * 32 * 32)  # in pieces too
    monkeypatch.setattr(module, "PAIRS_FROM", pairs_from)
    with torch.no_grad():
        expected = exact.encode(video.float()).mean, exact.decode(z.float())
        laid_out = half.encode(video).mean, half.decode(z)
        assert len(layouts) > 30 and set(layouts) == {(1, 1)}
        monkeypatch.setattr(module, "lay_out", lambda x: x)
        plain = half.encode(video).mean, half.decode(z)
    for ours, theirs, right in zip(laid_out, plain, expected, strict=True):
        assert relative_error(ours, right) < 1.2 * relative_error(theirs, right)


def test_without_gradients_activations_take_no_memory_of_their_own():
    vae, seen = VAE(SMALL_VAE), []

    class Activations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "silu" in function.__name__:
                seen.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    for grad in (False, True):
        seen.clear()
        with torch.set_grad_enabled(grad), Activations():
            vae.decode(vae.encode(torch.zeros(1, 3, 5, 32, 32)).mean)
        assert set(seen) == {"silu" if grad else "silu_"} and len(seen) > 20


def test_other_factors_follow_from_the_config():
    config = replace(SMALL_VAE, halves_time=(False, True))
    assert (config.space_factor, config.time_factor) == (4, 2)
    assert VAE(config).encode(torch.zeros(1, 3, 3, 8, 8)).mean.shape == (1, 16, 2, 2, 2)


@pytest.mark.parametrize("double_time", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_conv_of_repeated_is_the_conv_of_the_repeated_video(double_time, T):
    """At all borders and in the first frame too."""
    upsample = randomise(Upsample(6, double_time))
    x = torch.randn(2, 6, T, 3, 4)
    expected = upsample.conv(repeat(x, double_time))
    assert expected.shape == (2, 6, 2 * T - 1 if double_time else T, 6, 8)
    assert (upsample(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.2), (torch.bfloat16, 3)])
def test_two_frames_at_a_time_are_about_as_close_to_float64_as_the_plain_convolution(T, dtype, most):
    """0.84 and 2.6 times its error at most, measured over 40 seeds with T 6."""
    conv = randomise(CausalConv3d(24, 7)).to(dtype)
    x = torch.randn(2, 24, T + 2, 5, 6).to(dtype)
    exact = F.conv3d(x.double(), conv.weight.double(), conv.bias.double())
    plain, in_pairs = F.conv3d(x, conv.weight, conv.bias), module.conv_in_pairs(x, conv)
    assert in_pairs.shape == exact.shape
    assert relative_error(in_pairs, exact) < most * relative_error(plain, exact)


def test_large_frames_go_two_by_two_and_nothing_else_does(vae, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "conv_in_pairs", lambda x, conv: calls.append(x) or F.conv3d(x, conv.weight, conv.bias))
    z = torch.randn(1, 16, 2, 2, 2)
    with torch.no_grad():
        vae.decode(z)
    assert not calls
    monkeypatch.setattr(module, "PAIRS_FROM", 16 * 16 * 16)  # of the last stages
    vae.decode(z)
    assert not calls  # a gradient may be asked for
    with torch.no_grad():
        vae.decode(z)
    assert len(calls) > 3
    assert all(x[0, :, 0].numel() >= 16 * 16 * 16 for x in calls)
