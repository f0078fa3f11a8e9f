"""Faster forms against the definitions: whole models first, then each form alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky5.dit import DiT, Float32Linear, Norm, modulate
from kandinsky5.runtime import fast
from kandinsky5.runtime import fast_vae as module
from kandinsky5.runtime.device import is_native
from kandinsky5.runtime.fast_vae import FastCausalConv3d as CausalConv3d
from kandinsky5.runtime.fast_vae import FastGroupNorm as GroupNorm
from kandinsky5.runtime.fast_vae import FastUpsample as Upsample
from kandinsky5.runtime.fast_vae import conv_normalised
from kandinsky5.vae import VAE, repeat
from random_weights import SMALL_DIT, SMALL_NABLA, SMALL_VAE, randomise, relative_error

native_bf16 = pytest.mark.skipif(
    not is_native(torch.bfloat16, torch.device("cpu")), reason="this processor emulates bfloat16, with other layouts"
)


@pytest.fixture(scope="module")
def vae():
    vae = randomise(VAE(SMALL_VAE))
    fast.install(vae)
    return vae


def random_inputs(dtype=torch.float32, grid=(2, 16, 32)):
    shapes = {"x": (2, *grid, SMALL_DIT.input_channels), "text": (2, 7, SMALL_DIT.text_dim), "pooled": (2, 24)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    return {**tensors, "t": torch.rand(2), "text_mask": mask, "rope_scale": (1.0, 2.0, 2.0)}


@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_whole_fast_dit_is_the_whole_plain_one(nabla, dtype, tolerance):
    plain = randomise(DiT(replace(SMALL_DIT, nabla=nabla))).to(dtype)
    for name, parameter in plain.named_parameters():
        if "modulation" in name:  # stored in half precision, as files may have it: widened piece by piece
            parameter.data = parameter.data.to(dtype)
    quick, inputs = copy.deepcopy(plain), random_inputs(dtype)
    fast.install(quick)
    assert {type(m).__name__ for m in quick.modules()} >= {"FastDiT", "FastTextBlock", "FastVisualBlock"}
    with torch.no_grad():
        assert relative_error(quick(**inputs), plain(**inputs)) < tolerance
    with torch.enable_grad():  # there the definition runs
        assert quick(**inputs).equal(plain(**inputs))
    fast.remove(quick)
    assert [type(m) for m in quick.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    "thresholds", [(2**60, 2**60, 1), (0, 2**60, 1), (0, 0, 1000)], ids=["at once", "in pieces", "in pairs"]
)
def test_the_whole_fast_vae_is_the_whole_plain_one(vae, thresholds, monkeypatch):
    plain = VAE(SMALL_VAE)
    plain.load_state_dict(vae.state_dict())
    for name, value in zip(("PIECE", "PAIRS_FROM", "BAND"), thresholds, strict=True):
        monkeypatch.setattr(module, name, value)
    video, z = torch.rand(2, 3, 9, 24, 16) * 2 - 1, torch.randn(2, 16, 3, 3, 2)
    with torch.no_grad():
        assert relative_error(vae.encode_moments(video), plain.encode_moments(video)) < 1e-5
        assert relative_error(vae.decode(z), plain.decode(z)) < 1e-5
    with torch.enable_grad():
        z.requires_grad_()
        (ours,) = torch.autograd.grad(vae.decode(z).square().sum(), z)
        (theirs,) = torch.autograd.grad(plain.decode(z).square().sum(), z)
        assert relative_error(ours, theirs) < 1e-5


@native_bf16
def test_fast_decoding_in_bf16_is_as_exact_as_plain_decoding(monkeypatch):
    """Merged kernels and pairs of frames round more, norm, SiLU and sums of blocks less; the mean of several models."""
    ratios = []
    for seed in range(6):
        vae, exact = randomise(VAE(SMALL_VAE), seed).bfloat16(), VAE(SMALL_VAE)
        exact.load_state_dict(vae.state_dict())
        z = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        monkeypatch.setattr(module, "PIECE", seed % 2 * 2**23)  # in pieces, and at once
        monkeypatch.setattr(module, "PAIRS_FROM", 0)
        monkeypatch.setattr(module, "PAIRED", [16])  # the last stage's channels
        with torch.no_grad():
            expected = exact.decode(z.float())
            plain = relative_error(vae.decode(z), expected)
            fast.install(vae)
            ratios.append(relative_error(vae.decode(z), expected) / plain)
    assert sum(ratios) / len(ratios) < 1.02, ratios


def test_rotations_are_computed_once_for_all_steps(monkeypatch):
    fast._keep_text.cache_clear()
    fast._keep_video.cache_clear()
    model, sparse = DiT(SMALL_DIT), DiT(replace(SMALL_DIT, nabla=SMALL_NABLA))
    fast.install(model, sparse)
    for network, grid, words, scale in (
        (model, (2, 16, 32), 7, 1.0),
        (model, (2, 16, 32), 7, 1.0),
        (model, (2, 32, 16), 5, 1.0),
        (model, (2, 32, 16), 7, 2.0),
        (sparse, (2, 32, 16), 7, 2.0),
    ):
        inputs = random_inputs(grid=grid) | {"rope_scale": (scale, 1.0, 1.0), "text_mask": None}
        network(**inputs | {"text": inputs["text"][:, :words]})
    assert (fast._keep_video.cache_info().misses, fast._keep_video.cache_info().hits) == (4, 1)
    assert (fast._keep_text.cache_info().misses, fast._keep_text.cache_info().hits) == (3, 2)


def test_cached_rotations_may_be_trained_with():
    fast._keep_video.cache_clear()
    with torch.inference_mode():
        rotations = fast.FastDiT.rotate_video(SMALL_DIT, (1, 2, 2), [1.0, 1.0, 1.0], torch.device("cpu"))
    assert not rotations.is_inference()
    assert rotations.equal(DiT.rotate_video(SMALL_DIT, (1, 2, 2), (1.0, 1.0, 1.0), torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_linear_widens_half_weights_piece_by_piece(dtype, monkeypatch):
    exact = Float32Linear(24, 50)
    for parameter in exact.parameters():
        parameter.data = parameter.data.to(dtype).float()
    half, x = copy.deepcopy(exact), torch.randn(3, 24)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(dtype)
    fast.install(half)
    for at_a_time in (24 * 16, 24, 1, 2**20):
        monkeypatch.setattr(fast, "WIDENED", at_a_time)
        out = half(x.to(dtype))
        assert out.dtype == torch.float32 and out.shape == (3, 50)
        torch.testing.assert_close(out, exact(x.to(dtype)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_in_one_pass_equals_the_definition(B, dtype):
    x = (0.01 * torch.randn(B, 7, 16) + 0.03).to(dtype)  # small: the epsilon counts
    shift, scale = torch.randn(2, B, 1, 16)
    exact = modulate(Norm(16)(x.float()), shift, scale)
    assert fast.modulate_in_one_pass(x, shift, scale).dtype == dtype
    assert (
        fast.modulate_in_one_pass(x.float(), shift, scale).to(dtype).equal(fast.modulate_in_one_pass(x, shift, scale))
    )
    assert relative_error(fast.modulate_in_one_pass(x.float(), shift, scale), exact) < 1e-6


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


@native_bf16
@pytest.mark.parametrize("pairs_from", [0, 10**9])
def test_half_precision_convolutions_keep_channels_last(pairs_from, vae, monkeypatch):
    """One that did not would make all later ones copy. And the error of bf16 is what it is in the plain layout."""
    exact, half = VAE(SMALL_VAE), VAE(SMALL_VAE).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    exact.load_state_dict(half.state_dict())  # the rounded weights
    fast.install(half)
    layouts = []
    for layer in half.modules():
        if isinstance(layer, CausalConv3d):
            layer.register_forward_hook(lambda _, x, y: layouts.append((x[0].stride(1), y.stride(1))))
    z = torch.randn(1, 16, 3, 4, 4).to(torch.bfloat16)
    video = (torch.rand(1, 3, 9, 32, 32) * 2 - 1).to(torch.bfloat16)
    monkeypatch.setattr(module, "PIECE", 8 * 32 * 32)  # in pieces too
    monkeypatch.setattr(module, "PAIRS_FROM", pairs_from)
    monkeypatch.setattr(module, "PAIRED", range(9, 257))
    with torch.no_grad():
        expected = exact.encode(video.float()).mean, exact.decode(z.float())
        laid_out = half.encode(video).mean, half.decode(z)
        assert len(layouts) > 30 and set(layouts) == {(1, 1)}
        monkeypatch.setattr(module, "lay_out", lambda x: x)
        plain = half.encode(video).mean, half.decode(z)
    for ours, theirs, right in zip(laid_out, plain, expected, strict=True):
        assert relative_error(ours, right) < 1.2 * relative_error(theirs, right)


def test_without_gradients_activations_are_in_place():
    vae, seen = VAE(SMALL_VAE), []
    fast.install(vae)

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
@pytest.mark.parametrize("band", [1, 2 * 24 * 6, 2**20])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2), (torch.bfloat16, 3)])
def test_two_frames_at_a_time_are_as_exact_as_the_plain_conv(T, band, dtype, most, monkeypatch):
    """0.87 and 2.6 times its error at most, measured over 40 seeds with T 6; half as much with a sum on top."""
    monkeypatch.setattr(module, "BAND", band)  # a row at a time, two, all
    conv = randomise(CausalConv3d(24, 7)).to(dtype)
    x, plus = torch.randn(2, 24, T + 2, 5, 6).to(dtype), torch.randn(2, 7, T, 3, 4).to(dtype)
    exact = F.conv3d(x.double(), conv.weight.double(), conv.bias.double())
    plain = F.conv3d(x, conv.weight, conv.bias)
    assert relative_error(module.conv_in_pairs(x, conv), exact) < most * relative_error(plain, exact)
    exact, plain = exact + plus, plain + plus
    assert relative_error(module.conv_in_pairs(x, conv, plus), exact) < 0.6 * most * relative_error(plain, exact)


def test_large_frames_go_two_by_two_and_nothing_else_does(vae, monkeypatch):
    calls, in_pairs = [], module.conv_in_pairs
    monkeypatch.setattr(module, "conv_in_pairs", lambda x, *rest: calls.append(x) or in_pairs(x, *rest))
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


def test_forms_of_the_cpu_are_not_installed_for_a_gpu():
    dit = DiT(SMALL_DIT)
    fast.install(dit, device="cuda")
    assert type(dit) is fast.FastDiT and not {type(m) for m in dit.modules()} & set(fast.ON_CPU.values())
    fast.install(dit, device="cpu")
    assert set(fast.ON_CPU.values()) <= {type(m) for m in dit.modules()}
    fast.remove(dit)
    assert not {type(m) for m in dit.modules()} & set(fast.FORMS.values())


@pytest.mark.parametrize("kernel, stride", [(3, (1, 1, 1)), (3, (2, 2, 2)), (2, (1, 1, 1))])
def test_small_convolutions_go_through_onednn_and_have_the_right_gradients(kernel, stride):
    x, weight, bias = torch.randn(1, 8, 5, 9, 9), torch.randn(6, 8, *[kernel] * 3), torch.randn(6)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    with Record():
        y = module.conv3d(*inputs, stride)
    assert called == ["mkldnn_convolution" if torch.backends.mkldnn.is_available() else "convolution"]
    expected = F.conv3d(*exact, stride)
    direction = torch.randn(y.shape)
    ours = torch.autograd.grad(y, inputs, direction)
    theirs = torch.autograd.grad(expected, exact, direction.double())
    for one, other in zip((y, *ours), (expected, *theirs), strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-6  # measured 3.2e-7
