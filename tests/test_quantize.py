"""Weights in int8: which, how well, in which memory, and that such a model is a model like any other."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kandinsky5 import Pipeline
from kandinsky5.checkpoint import without_weights
from kandinsky5.clip import CLIPText
from kandinsky5.config import LITE, QwenConfig
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.qwen import Qwen
from kandinsky5.runtime import quantize
from kandinsky5.runtime.compile import compile_models
from kandinsky5.runtime.offload import MODES
from kandinsky5.runtime.quantize import Int8Linear, dequantise, quantise, to_float, to_int8
from kandinsky5.runtime.shard import SPREADS_INT8
from kandinsky5.vae import VAE
from random_weights import SMALL_CLIP, SMALL_DIT, SMALL_VAE, randomise, relative_error

QWEN = QwenConfig(vocab_size=64, dim=64, num_layers=2, num_heads=2, num_kv_heads=1, ff_dim=96)


def by_hand(weight: np.ndarray) -> np.ndarray:
    """Each block of 32 rounded to 127 steps of its largest value, in a loop."""
    out = np.zeros_like(weight)
    for i, row in enumerate(weight):
        for j in range(0, len(row), 32):
            step = float(torch.tensor(abs(row[j : j + 32]).max() / 127).bfloat16())
            out[i, j : j + 32] = np.round(row[j : j + 32] / step) * step if step else 0
    return out


def velocity(dit, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, 4, 6, 33), (1, 5, dit.config.text_dim), (1, dit.config.pooled_dim))
    x, text, pooled = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    with torch.no_grad():
        return dit(x, text, pooled, torch.tensor([0.7]), rope_scale=(1.0, 1.0, 1.0))


def rounded_by_hand(model):
    """A copy with plain Linears whose weights are what int8 keeps of them."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "blocks" in name:
            module.weight = nn.Parameter(torch.from_numpy(by_hand(module.weight.numpy())), requires_grad=False)
    return model


def test_values_are_those_worked_out_in_a_loop():
    weight = torch.randn(6, 96) * torch.logspace(-30, 3, 6)[:, None]
    weight[2, 32:64] = 0
    weight[3, 5] = 40 * weight[3].abs().max()  # its neighbours lose, other blocks do not
    int8, scale = quantise(weight)
    assert (int8.dtype, int8.shape, scale.dtype, scale.shape) == (torch.int8, (6, 96), torch.bfloat16, (6, 3))
    assert dequantise(int8, scale, torch.float32).equal(torch.from_numpy(by_hand(weight.numpy())))
    assert int8.abs().max() == 127 and set(int8.unflatten(-1, (3, 32)).abs().amax(-1).unique().tolist()) == {0, 127}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible(bad):
    weight = torch.randn(2, 64)
    weight[1, 40] = bad
    found = dequantise(*quantise(weight), torch.float32)
    assert found[1, 32:].isnan().any() and found[0].isfinite().all() and found[1, :32].isfinite().all()


def test_whole_models_equal_their_rounded_weights_and_are_near():
    for model, run in (
        (randomise(DiT(SMALL_DIT)), velocity),
        (randomise(Qwen(QWEN)), lambda qwen: qwen(torch.arange(12)[None])),
    ):
        plain, rounded = run(model), run(rounded_by_hand(model))
        assert to_int8(model) is model
        assert relative_error(run(model), rounded) < 1e-6
        assert 1e-4 < relative_error(run(model), plain) < 0.02


def test_which_layers_are_int8():
    dit, qwen, clip = to_int8(DiT(SMALL_DIT)), to_int8(Qwen(QWEN)), to_int8(CLIPText(SMALL_CLIP))
    for model, per_block in ((dit.text_blocks, 6), (dit.visual_blocks, 10), (qwen.blocks, 7)):
        assert sum(isinstance(m, Int8Linear) for m in model.modules()) == per_block * len(model)
    found = [name for model in (dit, qwen, clip) for name, m in model.named_modules() if isinstance(m, Int8Linear)]
    assert len(found) == 2 * 6 + 2 * 10 + 2 * 7
    assert not [name for name in found if any(word in name for word in ("modulation", "embedder", "norm", "final"))]
    islands = [m.weight.dtype for m in dit.modules() if isinstance(m, Float32Linear)]
    assert islands and set(islands) == {torch.float32}


@pytest.mark.parametrize("build, total", [(lambda: DiT(LITE), 1.25), (lambda: Qwen(QwenConfig()), 1.14)])
def test_bytes_per_parameter_at_full_size(build, total):
    """total: with what stays in bf16, such as modulations and Qwen's vocabulary."""
    with without_weights():
        model = build().to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    layers = [m for m in to_int8(model).modules() if isinstance(m, Int8Linear)]
    stored = sum(x.nbytes for m in layers for x in m.state_dict().values())
    assert stored / sum(p.numel() for m in layers for p in m.parameters()) < 1.13
    whole = sum(x.numel() * 2 if x.dtype.is_floating_point else x.numel() for x in model.state_dict().values())
    assert whole / count < total


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_a_cast_changes_no_weight(cast):
    dit = to_int8(randomise(DiT(SMALL_DIT)))
    before = {n: x.clone() for n, x in dit.state_dict().items() if n.endswith(".scale") or x.dtype == torch.int8}
    after = cast(dit).state_dict()
    assert len(before) == 2 * 32 and all(after[n].equal(x) and after[n].dtype == x.dtype for n, x in before.items())
    assert dit.patch_embedder.weight.dtype != torch.float32


def test_saved_copied_and_loaded_strictly():
    dit = to_int8(randomise(DiT(SMALL_DIT)))
    expected, file = velocity(dit), io.BytesIO()
    torch.save(dit.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        empty = to_int8(DiT(SMALL_DIT))
    empty.load_state_dict(torch.load(file), strict=True, assign=True)
    other = to_int8(randomise(DiT(SMALL_DIT), seed=5))
    other.load_state_dict(dit.state_dict(), strict=True)
    for model in (empty, other, copy.deepcopy(dit)):
        assert velocity(model).equal(expected)
    state = dit.state_dict()
    del state["visual_blocks.1.feed_forward.linear_in.scale"]
    with pytest.raises(RuntimeError, match="visual_blocks.1.feed_forward.linear_in.scale"):
        other.load_state_dict(state, strict=True)


def test_it_can_be_undone():
    dit = randomise(DiT(SMALL_DIT))
    expected = velocity(rounded_by_hand(dit))
    back = to_float(to_int8(dit), torch.float32)
    assert not any(isinstance(m, Int8Linear) for m in back.modules())
    assert back.state_dict().keys() == DiT(SMALL_DIT).state_dict().keys()
    assert velocity(back).equal(expected)


def test_errors_per_layer():
    dit = randomise(DiT(SMALL_DIT))
    with torch.no_grad():
        dit.visual_blocks[1].feed_forward.linear_in.weight[:, ::32] *= 100
    errors = quantize.weight_errors(dit)
    assert len(errors) == 2 * 6 + 2 * 10 and 0.003 < errors["text_blocks.0.self_attention.to_q"] < 0.008
    weight = dit.visual_blocks[0].cross_attention.to_k.weight
    by_numpy = relative_error(torch.from_numpy(by_hand(weight.numpy())), weight)
    assert errors["visual_blocks.0.cross_attention.to_k"] == pytest.approx(by_numpy, rel=1e-4)


def test_gradients_pass_to_what_stands_beside():
    """As an adapter needs them: those of the inputs are the rounded Linear's, the weights have none."""
    dit = randomise(DiT(SMALL_DIT))
    weight = torch.from_numpy(by_hand(dit.visual_blocks[0].self_attention.to_q.weight.numpy()))
    layer = to_int8(dit).visual_blocks[0].self_attention.to_q
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * (x.detach() @ weight.T + layer.bias) @ weight
    assert relative_error(x.grad, expected) < 1e-5 and all(p.grad is None for p in layer.parameters())


def sample(pipe):
    return pipe("a red circle moves left", num_frames=1, num_inference_steps=1, progress=False, output_type="float")


def test_quantised_while_loading_and_offloaded():
    plain = Pipeline.load("nano", dtype="float32")
    pipe, *others = (Pipeline.load("nano", dtype="float32", quantize="int8", offload=m) for m in (None, *MODES))
    assert "int8" in repr(pipe) and "int8" not in repr(plain) and pipe.dtype == torch.float32
    frames = sample(pipe)
    assert 0 < (frames - sample(plain)).abs().mean() < 0.01
    to_int8(plain.dit)
    to_int8(plain.text_encoder.qwen)
    assert sample(plain).equal(frames)
    for other in others:
        assert all(p.is_meta for p in other.dit.parameters()) and sample(other).equal(frames)
    resting = vars(others[1].dit.visual_blocks[0])["resting"].values()  # half the bytes travel
    assert sum(x.nbytes for x in resting if x.ndim == 2) < 0.6 * sum(2 * x.numel() for x in resting if x.ndim == 2)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="quantize 'int4': choose int8"):
        Pipeline.load("nano", quantize="int4")


@pytest.mark.compiled
def test_compiled_in_one_graph():
    dit, vae = to_int8(randomise(DiT(SMALL_DIT))), VAE(SMALL_VAE)
    expected = velocity(dit)
    torch._dynamo.reset()
    compile_models(dit, vae, backend="aot_eager")  # fullgraph
    assert relative_error(velocity(dit), expected) < 1e-6
    torch._dynamo.reset()


@pytest.mark.skipif(not SPREADS_INT8, reason="this PyTorch spreads floating-point weights alone")
def test_sharded_over_ranks(tmp_path):
    """fully_shard of one rank: int8 weights are sharded like any, scales are whole on each."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dit = to_int8(randomise(DiT(SMALL_DIT)))
        expected = velocity(dit)
        for block in dit.visual_blocks:
            fully_shard(block)
        fully_shard(dit)
        weight = dit.visual_blocks[0].self_attention.to_q.weight
        assert isinstance(weight, DTensor) and weight.dtype == torch.int8
        assert velocity(dit).equal(expected)
    finally:
        torch.distributed.destroy_process_group()
