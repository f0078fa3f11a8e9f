"""Every component, and both pipelines, against diffusers and transformers on the same weights."""

import gc

import pytest
import torch

import cases
from kandinsky5.config import VAEConfig
from kandinsky5.runtime import fast, fast_vae
from kandinsky5.runtime.device import is_native
from kandinsky5.runtime.fast import FORMS
from kandinsky5.vae import VAE
from random_weights import randomise, relative_error
from small_diffusers import build_vae
from weights_convert import tables

COMPONENTS = [name for name in cases.OURS if name not in cases.FRAME_CASES]


def test_the_references_are_gone_when_ours_are_there(ours):
    """So that released weights are in memory once and not twice."""
    modules = [type(o).__module__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)]
    assert [name for name in modules if name.startswith(("diffusers.models", "transformers.models"))] == []


@pytest.mark.parametrize("name", COMPONENTS)
def test_component(name, either, theirs, dtype, record):
    """Computed by the definitions and by the fast forms."""
    inputs, expected = cases.build_inputs(either.config)[name], theirs[name]
    error = relative_error(cases.compute(name, either, inputs), expected)
    record(
        f"{name}, {'fast' if type(either.dit) in FORMS.values() else 'plain'}",
        str(dtype).removeprefix("torch."),
        error,
        cases.TOLERANCE[dtype],
    )
    assert expected.std() > 1e-3, "the reference's result is constant: this comparison would prove nothing"
    assert error <= cases.TOLERANCE[dtype]


@pytest.mark.parametrize("name", cases.FRAME_CASES)
def test_pipeline(name, ours, theirs, dtype, record):
    """Frames within one level of 255; in bf16 the references also round the latents, so float32 is what counts."""
    if not cases.is_compared(name, dtype):
        pytest.skip("diffusers keeps the sampler's state and times in bf16, ours are float32")
    inputs, expected = cases.build_inputs(ours.config)[name], theirs[name]
    error = float((cases.compute(name, ours, inputs) - expected).abs().max())
    record(f"{name} frames, largest difference", "float32", error, 1 / 255)
    assert expected.std() > 1e-2
    assert error <= 1 / 255


@pytest.mark.skipif(not is_native(torch.bfloat16, torch.device("cpu")), reason="this processor emulates bfloat16")
def test_decoding_in_bf16_is_as_exact_as_theirs(monkeypatch):
    """Against the same weights in float32, in pieces and at once; the mean of models that differ by a tenth."""
    ratios = []
    for seed in range(6):
        theirs = randomise(build_vae((16, 32, 32, 32), 4), seed).eval().bfloat16()
        ours, exact = (VAE(VAEConfig(channels=(16, 32, 32, 32), norm_groups=4)).eval() for _ in range(2))
        state = theirs.state_dict()
        for vae in (ours.bfloat16(), exact):
            vae.load_state_dict({name: state[tables.theirs("vae", name)] for name in vae.state_dict()})
        z = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()
        monkeypatch.setattr(fast_vae, "PIECE", seed % 2 * 2**23)
        fast.install(ours)
        with torch.no_grad():
            expected = exact.decode(z.float())
            errors = [relative_error(x, expected) for x in (ours.decode(z), theirs.decode(z).sample)]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 1.02, ratios
