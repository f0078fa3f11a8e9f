"""nano's first stage: the VAE's loss, its data, single frames through 2-D convolutions, and standard latents."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kandinsky5.config import VAEConfig
from kandinsky5.nano import train_vae
from kandinsky5.nano.clips import draw_videos
from kandinsky5.nano.single_frame import single_frame
from kandinsky5.nano.train_vae import draw_confetti, standardise
from kandinsky5.nano.world import sample_scene
from kandinsky5.runtime import fast
from kandinsky5.runtime.fast_vae import FastCausalConv3d
from kandinsky5.vae import VAE, CausalConv3d, Posterior


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(4, 4, 8, 8), blocks_per_stage=1, norm_groups=2, scaling_factor=1.0))


def test_the_vaes_loss_is_as_computed_by_hand():
    """Reconstruction, with more weight at edges and on colour, and KL; one pixel is white, all others are black."""
    mean, logvar = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    video = torch.full((2, 3, 1, 8, 8), -1.0)
    video[:, :, :, 3, 5] = 1.0
    error = 0.1 * torch.randn(video.shape)
    noise = torch.randn(mean.shape)

    def decode(z: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(z, mean + (logvar / 2).exp() * noise)
        return video + error

    stub = SimpleNamespace(encode=lambda video: Posterior(mean, logvar), decode=decode)
    value, figures = train_vae.vae_loss(stub, video, noise)

    e = error.numpy()[:, :, 0].astype(np.float64)
    weights = np.ones((2, 1, 8, 8))
    weights[:, :, 2:5, 4:7] = 3.0  # the white one and its neighbours, whose values span all of -1 to 1
    colour = e - e.mean(axis=1, keepdims=True)
    reconstruction = (weights * (abs(e) + 2 * e**2 + abs(colour) + colour**2)).mean()
    m, variance = mean.numpy(), np.exp(logvar.numpy())
    kl = np.mean((m**2 + variance - 1 - np.log(variance)) / 2)
    assert float(value) == pytest.approx(reconstruction + 5e-5 * kl, rel=1e-5)
    assert figures["kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["frame_psnr"] == pytest.approx(-10 * np.log10((e**2).mean() / 4), rel=1e-5)


def test_a_single_frame_through_2d_convs_is_the_same(vae):
    video = draw_videos([sample_scene([1, i]) for i in range(2)], num_frames=1)
    expected = vae.encode(video).mean, vae.decode(vae.encode(video).mean)
    with single_frame(vae):
        mean = vae.encode(video).mean
        torch.testing.assert_close((mean, vae.decode(mean)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(vae.encode(video).mean, expected[0])  # and nothing is left behind


def test_fast_forms_agree_on_a_single_frame_through_2d_convs(vae):
    quick, video = copy.deepcopy(vae), draw_videos([sample_scene([1, 0])], num_frames=1)
    fast.install(quick)
    with single_frame(vae), single_frame(quick), torch.no_grad():
        mean = vae.encode(video).mean
        assert quick.encode(video).mean.equal(mean) and quick.decode(mean).equal(vae.decode(mean))
    assert type(quick.decoder.conv_in) is FastCausalConv3d


def test_a_single_frame_teaches_nothing_about_frames_before(vae):
    """Kernels for the two frames before, upsampling's too, stay as they are until there are clips."""
    vae, video = copy.deepcopy(vae), draw_videos([sample_scene([1, 0])], num_frames=1)
    with single_frame(vae):
        vae.decode(vae.encode(video).mean).square().sum().backward()
    for name, conv in vae.named_modules():
        if isinstance(conv, CausalConv3d):
            assert conv.weight.grad[:, :, -1].any() and not conv.weight.grad[:, :, :-1].any(), name


def test_standardised_latents_decode_to_the_same_video(vae):
    vae = copy.deepcopy(vae)
    video = draw_videos([sample_scene([1, i]) for i in range(8)], num_frames=5)
    with torch.no_grad():
        before, posterior = vae.decode(vae.encode(video).mean), vae.encode(video)
        standardise(vae, count=8)
        after = vae.encode(video)
        torch.testing.assert_close(vae.decode(after.mean), before, rtol=1e-3, atol=1e-4)
    # The noise has become as much larger or smaller as the latents: one straight line maps the one to the other.
    scale = (posterior.logvar - after.logvar).div(2).exp()
    rise, rise_before = after.mean.diff(dim=-1), posterior.mean.diff(dim=-1)
    torch.testing.assert_close(rise * scale[..., 1:], rise_before, rtol=1e-3, atol=1e-4)
    assert after.mean.mean(dim=(0, 2, 3, 4)).abs().max() < 0.5


def test_confetti_shows_many_colours():
    colours = np.unique(draw_confetti(np.random.default_rng(0)).reshape(-1, 3), axis=0)
    assert len(colours) > 200 and (colours.max(0) - colours.min(0)).min() > 120
