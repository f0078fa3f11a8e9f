"""Properties of the DiT that need no reference; tests/test_golden.py and tests/parity/ hold it to diffusers."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from kandinsky5.config import LITE, PRO
from kandinsky5.dit import DiT, Float32Linear, Norm, RMSNorm, add_gated, modulate, patchify, unpatchify
from kandinsky5.rope import apply_rope, build_rotations
from random_weights import SMALL_DIT, SMALL_NABLA, randomise, relative_error


def random_inputs(B=2, grid=(3, 8, 12), S=7, config=SMALL_DIT):
    return {
        "x": torch.randn(B, *grid, config.input_channels),
        "text": torch.randn(B, S, config.text_dim),
        "pooled": torch.randn(B, config.pooled_dim),
        "t": torch.rand(B),
        "rope_scale": (1.0, 1.0, 1.0),
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
        alone = dit(**{name: x if name == "rope_scale" else x[b : b + 1] for name, x in inputs.items()})
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
    assert relative_error(dit(**inputs | {"rope_scale": (1.0, 2.0, 2.0)}), dit(**inputs)) > 1e-3
    del inputs["rope_scale"]
    with pytest.raises(TypeError, match="rope_scale"):
        dit(**inputs)


def test_unpatchify_undoes_patchify_but_for_patch_order():
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
    velocity = half(**inputs | {name: inputs[name].to(dtype) for name in ("x", "text", "pooled")})
    assert velocity.dtype == dtype
    assert relative_error(velocity, expected) < 2e-2


def test_float32_linear_can_be_moved_and_widened():
    linear = Float32Linear(3, 4)
    assert linear.double().weight.dtype == torch.float64
    assert Float32Linear(3, 4).to("meta", torch.bfloat16).weight.device.type == "meta"
    assert Float32Linear(3, 4, device="meta").to_empty(device="cpu").weight.device.type == "cpu"


@pytest.mark.parametrize("island", ["modulated norm", "gated sum", "RMSNorm", "RoPE"])
def test_float32_islands_round_once_at_their_end(island):
    """In a bf16 model each computes exactly what it computes in float32, rounded."""
    x, out = (torch.randn(2, 3, 5, 16).bfloat16() for _ in range(2))
    shift, scale = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16)
    norm, rotations = randomise(RMSNorm(16)).bfloat16(), build_rotations(100 * torch.rand(5, 8))
    compute = {
        "modulated norm": lambda x, out: modulate(Norm(16)(x), shift, scale).type_as(x),
        "gated sum": lambda x, out: add_gated(x, scale, out),
        "RMSNorm": lambda x, out: norm(x),
        "RoPE": lambda x, out: apply_rope(x, rotations),
    }[island]
    assert compute(x, out).dtype == torch.bfloat16
    assert compute(x, out).equal(compute(x.float(), out.float()).bfloat16())


def test_modulation_scales_by_one_more_and_shifts():
    x, shift, scale = torch.randn(3, 2, 5, 16)
    torch.testing.assert_close(modulate(x, shift, scale), x + x * scale + shift)
