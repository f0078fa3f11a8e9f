"""Precision, attention and memory of a DiT in training: the same values, and nothing left behind."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kandinsky5 import nabla
from kandinsky5.attention import attend
from kandinsky5.dit import Attention, DiT
from kandinsky5.extras import lora
from kandinsky5.nano import presets
from kandinsky5.runtime.kernels import block_sparse_attention
from kandinsky5.training import modes
from kandinsky5.training.flow import predict
from kandinsky5.training.loop import generator
from kandinsky5.training.modes import attend_written_out, autocast, gradient_checkpointing, training_precision
from kandinsky5.training.recipe import Recipe
from live_memory import LiveBytes
from random_weights import SMALL_DIT
from tiny_training import TINY, UNSCALED, random_dit, same_weights, tiny_features, tiny_run, train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_no_gradient(dtype):
    """The backward pass is outside autocast: what is computed again must enter it again."""
    dit, features = random_dit(), tiny_features(2)
    again = copy.deepcopy(dit)
    x, t = torch.randn(2, 1, 2, 2, 9), torch.rand(2)

    def backward(model):
        with training_precision(model):
            with autocast(torch.device("cpu"), dtype):
                loss = predict(model, x, t, features, UNSCALED).square().mean()
            loss.backward()

    backward(dit)
    with gradient_checkpointing(again):
        backward(again)
    assert all(a.grad.equal(b.grad) for a, b in zip(dit.parameters(), again.parameters(), strict=True))
    assert "run_blocks" not in vars(again)


def peak(blocks: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that live at once in a step of a LoRA next to a frozen DiT, forward and backward; and one block's input."""
    config = replace(SMALL_DIT, num_visual_blocks=blocks)
    dit = DiT(config).requires_grad_(False)
    adapter = lora.add(dit, lora.create(dit, 2, 2.0))
    x, text = torch.randn(1, 4, 16, 16, config.input_channels), torch.randn(1, 3, config.text_dim)
    pooled, t = torch.randn(1, config.pooled_dim), torch.rand(1)
    tokens = 4 * 8 * 8 * config.dim * 4
    with gradient_checkpointing(dit) if checkpointing else contextlib.nullcontext(), LiveBytes() as counted:
        dit(x, text, pooled, t, rope_scale=UNSCALED).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    return counted.peak, tokens


def test_gradient_checkpointing_keeps_one_input_per_block():
    """Peaks of steps with 3 and 9 blocks: for each block more its input, instead of all that it computed."""
    (few, tokens), (many, _) = peak(3, True), peak(9, True)
    growth = (many - few) / 6
    assert tokens <= growth < 1.1 * tokens
    assert (peak(9, False)[0] - peak(3, False)[0]) / 6 > 15 * growth


def test_a_run_with_gradient_checkpointing_is_the_same_run(tmp_path, monkeypatch):
    blocks, forward = [], modes.checkpoint
    monkeypatch.setattr(modes, "checkpoint", lambda *args, **how: blocks.append(1) or forward(*args, **how))
    plain, _ = tiny_run(tmp_path / "plain", steps=3, dtype="bfloat16")
    assert not blocks
    forgetful, _ = tiny_run(tmp_path / "forgetful", steps=3, dtype="bfloat16", checkpointing=True)
    assert len(blocks) == 3 * (len(plain.visual_blocks) + len(plain.text_blocks))
    assert same_weights(plain, forgetful)


def test_gradient_checkpointing_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="for a DiT, not for a Linear"):
        train(nn.Linear(2, 2), lambda seed: (torch.zeros(()), {}), Recipe(1, checkpointing=True), tmp_path)


def test_attention_written_out_is_the_same_attention():
    dit, features = DiT(TINY), tiny_features(2)
    x, t = torch.randn(2, 1, 2, 2, 9), torch.rand(2)
    expected = dit(x, features.text, features.pooled, t, features.mask, rope_scale=UNSCALED)
    with training_precision(dit):
        torch.testing.assert_close(
            dit(x, features.text, features.pooled, t, features.mask, rope_scale=UNSCALED), expected
        )
    assert all(m.attend is attend for m in dit.modules() if isinstance(m, Attention))


def test_nabla_chooses_the_same_tiles_under_autocast():
    """Its sums stay in float32 under autocast: in bf16 the cut falls elsewhere."""
    grid, config = (4, 16, 16), presets.LONG.dit.nabla
    q, k = (torch.randn(2, 1, 6, 4 * 256, 32, generator=generator([1])) * 6).bfloat16()
    expected = nabla.block_map(q, k, grid, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert not nabla.block_map(q, k, grid, config).equal(expected)
        out = attend_written_out(q, k, k, nabla=config, grid=grid)
    assert out.equal(block_sparse_attention(q, k, k, expected))


def test_float32_islands_stay_under_autocast():
    dit, vec = random_dit(), torch.randn(2, TINY.time_dim)
    modulation = dit.visual_blocks[0].modulation
    expected = modulation(vec)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert modulation(vec)[0].dtype == torch.bfloat16
        with training_precision(dit):
            assert modulation(vec)[0].equal(expected)


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_off_in_training(before):
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with training_precision(random_dit()):
            assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(usual)
