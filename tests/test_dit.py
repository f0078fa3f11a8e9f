"""Properties of the DiT that need no reference; tests/test_golden.py and tests/parity/ hold it to diffusers."""

import copy
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from kandinsky5 import dit
from kandinsky5.config import LITE, PRO
from kandinsky5.dit import DiT, Float32Linear, RMSNorm, add_gated, modulate, modulate_in_one_pass, patchify, unpatchify
from kandinsky5.rope import apply_rope, build_angles_3d, build_rotations
from random_weights import SMALL_DIT, SMALL_NABLA, randomise, relative_error


def random_inputs(B=2, grid=(3, 8, 12), S=7, config=SMALL_DIT):
    return {
        "x": torch.randn(B, *grid, config.input_channels),
        "text": torch.randn(B, S, config.text_dim),
        "pooled": torch.randn(B, config.pooled_dim),
        "t": torch.rand(B),
    }


@pytest.mark.parametrize("config, count", [(LITE, 2_007_702_848), (PRO, 19_311_325_248)])
def test_parameter_count_is_that_of_the_released_model(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(config).parameters()) == count


def test_a_new_model_is_the_identity_between_its_ends():
    """Zero gates: whatever the text says, a new block adds nothing."""
    dit, inputs = DiT(SMALL_DIT), random_inputs()
    other = inputs | {"text": torch.randn_like(inputs["text"])}
    assert dit(**inputs).equal(dit(**other))


@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
def test_batch_is_what_each_sample_gets_alone(nabla):
    dit = randomise(DiT(replace(SMALL_DIT, nabla=nabla)))
    inputs = random_inputs(grid=(2, 32, 32))
    together = dit(**inputs)
    for b in range(2):
        alone = dit(**{name: x[b : b + 1] for name, x in inputs.items()})
        assert relative_error(together[b : b + 1], alone) < 1e-5


def test_padding_under_the_mask_changes_nothing():
    dit, inputs = randomise(DiT(SMALL_DIT)), random_inputs()
    expected = dit(**inputs)
    padding = 100 * torch.randn(2, 5, SMALL_DIT.text_dim)
    padded = inputs | {"text": torch.cat([inputs["text"], padding], dim=1)}
    mask = torch.arange(12).expand(2, 12) < 7
    assert relative_error(dit(**padded, text_mask=mask), expected) < 1e-5
    assert relative_error(dit(**padded), expected) > 1e-2  # without the mask it does


def test_nabla_that_keeps_everything_is_full_attention():
    inputs = random_inputs(grid=(2, 32, 32))
    full = randomise(DiT(SMALL_DIT))
    sparse = randomise(DiT(replace(SMALL_DIT, nabla=replace(SMALL_NABLA, P=1.0))))
    dropping = randomise(DiT(replace(SMALL_DIT, nabla=SMALL_NABLA)))
    assert relative_error(sparse(**inputs), full(**inputs)) < 1e-5
    assert relative_error(dropping(**inputs), full(**inputs)) > 1e-3


def test_rope_scale_divides_positions():
    dit, inputs = randomise(DiT(SMALL_DIT)), random_inputs()
    assert relative_error(dit(**inputs, rope_scale=(1.0, 2.0, 2.0)), dit(**inputs)) > 1e-3


def test_unpatchify_undoes_patchify_up_to_the_order_inside_a_patch():
    x, size = torch.randn(2, 4, 6, 8, 5), (2, 2, 4)
    channel_last = patchify(x, size)
    channel_first = rearrange(channel_last, "... (p C) -> ... (C p)", C=5)
    assert unpatchify(channel_first, size).equal(x)
    assert not unpatchify(channel_last, size).equal(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_float32_islands(dtype):
    exact, inputs = randomise(DiT(SMALL_DIT)), random_inputs()
    expected = exact(**inputs)
    islands = {n: p.clone() for n, p in exact.named_parameters() if "modulation" in n or "time_embedder" in n}
    half = exact.to(dtype)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if name in islands else dtype), name
        assert name not in islands or parameter.equal(islands[name])
    assert len(islands) == 4 + 2 * 5
    t = inputs.pop("t")
    velocity = half(**{name: x.to(dtype) for name, x in inputs.items()}, t=t)
    assert velocity.dtype == dtype
    assert relative_error(velocity, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_linear_widens_half_weights_piece_by_piece(dtype, monkeypatch):
    exact = Float32Linear(24, 50)
    for parameter in exact.parameters():
        parameter.data = parameter.data.to(dtype).float()
    half, x = copy.deepcopy(exact), torch.randn(3, 24)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(dtype)
    for at_a_time in (24 * 16, 24, 1, 2**20):
        monkeypatch.setattr(Float32Linear, "WIDENED", at_a_time)
        out = half(x.to(dtype))
        assert out.dtype == torch.float32 and out.shape == (3, 50)
        torch.testing.assert_close(out, exact(x.to(dtype)), rtol=1e-6, atol=1e-6)


def test_float32_linear_can_be_moved_and_widened():
    linear = Float32Linear(3, 4)
    assert linear.double().weight.dtype == torch.float64
    assert Float32Linear(3, 4).to("meta", torch.bfloat16).weight.device.type == "meta"
    assert Float32Linear(3, 4, device="meta").to_empty(device="cpu").weight.device.type == "cpu"


@pytest.mark.parametrize(
    "island", [modulate, modulate_in_one_pass, add_gated, RMSNorm, apply_rope], ids=lambda island: island.__name__
)
def test_float32_islands_round_once_at_their_end(island):
    """In a bf16 model each computes exactly what it computes in float32, rounded."""
    x, out = (torch.randn(2, 3, 5, 16).bfloat16() for _ in range(2))
    shift, scale = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16)
    norm, rotations = randomise(RMSNorm(16)).bfloat16(), build_rotations(100 * torch.rand(5, 8))
    compute = {
        modulate: lambda x, out: modulate(x, shift, scale),
        modulate_in_one_pass: lambda x, out: modulate_in_one_pass(x, shift, scale),
        add_gated: lambda x, out: add_gated(x, scale, out),
        RMSNorm: lambda x, out: norm(x),
        apply_rope: lambda x, out: apply_rope(x, rotations),
    }[island]
    assert compute(x, out).dtype == torch.bfloat16
    assert compute(x, out).equal(compute(x.float(), out.float()).bfloat16())


@pytest.mark.parametrize("B", [1, 3])
def test_modulation_in_one_pass_equals_the_definition(B):
    x, (shift, scale) = 0.01 * torch.randn(B, 7, 16) + 0.03, torch.randn(2, B, 1, 16)  # small: the epsilon counts
    with torch.enable_grad():  # there the definition is what computes
        expected = modulate(x.requires_grad_(), shift, scale)
    assert expected.grad_fn is not None and not expected.equal(x)
    assert relative_error(modulate_in_one_pass(x.detach(), shift, scale), expected.detach()) < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 1, 16), (1, 1, 1, 16), (2, 3, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modulation_without_gradients_takes_what_it_takes_with_them(shape, dtype):
    """Other shapes than one shift and scale a sample, as a change to the model may bring."""
    x, (shift, scale) = torch.randn(2, 3, 5, 16, dtype=dtype), torch.randn(2, *shape)
    with torch.enable_grad():
        expected = modulate(x, shift, scale)
    with torch.no_grad():
        assert relative_error(modulate(x, shift, scale), expected) < 1e-6


def test_rotations_are_made_once_for_all_steps_and_anew_for_others(monkeypatch):
    dit.keep_rotations.cache_clear()
    made = []
    monkeypatch.setattr(dit, "build_angles_3d", lambda *given: made.append(given[0]) or build_angles_3d(*given))
    model, sparse = DiT(SMALL_DIT), DiT(replace(SMALL_DIT, nabla=SMALL_NABLA))
    twice = {"rope_scale": (2.0, 1.0, 1.0)}
    for network, grid, options in (
        (model, (2, 16, 32), {}),
        (model, (2, 16, 32), {}),
        (model, (2, 32, 16), {}),
        (model, (2, 32, 16), twice),
        (sparse, (2, 32, 16), twice),
    ):
        network(**random_inputs(grid=grid), **options)
    assert made == [(2, 8, 16), (2, 16, 8), (2, 16, 8), (2, 16, 8)]


def test_rotations_of_text_are_made_once_for_each_length():
    dit.keep_text_rotations.cache_clear()
    model, inputs = DiT(SMALL_DIT), random_inputs()
    for length in (3, 3, 2, 3):
        model(**inputs | {"text": inputs["text"][:, :length], "text_mask": None})
    assert (dit.keep_text_rotations.cache_info().misses, dit.keep_text_rotations.cache_info().hits) == (2, 2)
