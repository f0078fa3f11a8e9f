"""Properties of the VAE and its tiles; tests/test_golden.py and tests/parity/ hold them to diffusers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from kandinsky5 import vae_tiling
from kandinsky5.config import Tiling, VAEConfig
from kandinsky5.vae import VAE, CausalAttention, CausalConv3d, Posterior, repeat
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


def test_conv_of_one_frame_sums_the_kernel_over_time():
    conv, x = CausalConv3d(2, 3), torch.randn(1, 2, 1, 5, 5)
    padded = F.pad(x[:, :, 0], (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded, conv.weight.sum(dim=2), conv.bias)
    torch.testing.assert_close(conv(x)[:, :, 0], expected)


def test_attention_by_frames_equals_a_causal_mask():
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
    video = torch.rand(1, 3, 21, 16, 24) * 2 - 1
    posterior = vae.encode(video)
    assert vae_tiling.encode(vae, video, tiling).mean.equal(posterior.mean)
    assert vae_tiling.decode(vae, posterior.mean, tiling).equal(vae.decode(posterior.mean))


@pytest.mark.parametrize(
    ("frames", "space"), [(1, False), (13, False), (17, False), (25, False), (33, False), (1, True), (17, True)]
)
def test_tiles_cover_every_frame_and_pixel_once(vae, frames, space):
    H, W = (40, 56) if space else (8, 16)
    tiling = Tiling(space=space, pixels=32, pixel_stride=24)
    posterior = vae_tiling.encode(vae, torch.rand(1, 3, frames, H, W) * 2 - 1, tiling)
    assert posterior.mean.shape == (1, 16, (frames - 1) // 4 + 1, H // 8, W // 8)
    assert vae_tiling.decode(vae, posterior.mean, tiling).shape == (1, 3, frames, H, W)


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


def test_other_factors_follow_from_the_config():
    config = replace(SMALL_VAE, halves_time=(False, True))
    assert (config.space_factor, config.time_factor) == (4, 2)
    assert VAE(config).encode(torch.zeros(1, 3, 3, 8, 8)).mean.shape == (1, 16, 2, 2, 2)
