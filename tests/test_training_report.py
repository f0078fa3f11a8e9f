"""What a dry run says of the work ahead."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky5.config import LITE
from kandinsky5.dit import DiT
from kandinsky5.training import report
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.report import device_rate, forward_work, memory
from random_weights import SMALL, SMALL_DIT, randomise


def count(blocks: int) -> int:
    config = replace(SMALL_DIT, num_visual_blocks=blocks)
    x, text = torch.randn(1, 4, 16, 16, config.input_channels), torch.randn(1, 1, config.text_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        randomise(DiT(config))(x, text, torch.randn(1, config.pooled_dim), torch.rand(1), rope_scale=(1.0, 1.0, 1.0))
    return counter.get_total_flops()


def test_work_of_a_visual_block_is_as_pytorch_counts_it():
    tokens = 4 * 8 * 8
    expected = forward_work(replace(SMALL_DIT, num_visual_blocks=1), tokens)
    assert expected == pytest.approx(count(3) - count(2), rel=0.05)


def test_device_rate_is_positive():
    assert 1e6 < device_rate(SMALL_DIT, "cpu", "float32") < 1e16


@pytest.mark.parametrize("full", [False, True])
def test_memory_is_that_of_a_process(full):
    """Weights are shared with --shard, all but two blocks; tokens by the ranks along `sequence`."""
    options = Namespace(
        full=full, modules="to_q" if not full else "", rank=1, checkpointing=True, offload=None, quantize=None
    )
    config, recipe = replace(LITE, num_visual_blocks=40), Recipe(1, ema=0.9, dtype="bfloat16")

    def needed(tokens, **ranks):
        return memory(config, tokens, recipe, options, Namespace(**ranks) if ranks else None)

    weights, activations = needed(0), needed(10_000) - needed(0)
    shared = needed(0, data=4, sequence=2, shard=True)
    assert weights / 8 < shared < weights / 8 * (1 + 8 * 3 / 40)
    assert needed(10_000, data=1, sequence=2, shard=False) == weights + activations / 2


def test_a_process_needs_memory_for_its_rows_alone(monkeypatch):
    monkeypatch.setattr(report, "memory", lambda config, tokens, *others: tokens)
    ranks = Namespace(data=4, sequence=1, shard=False, place=lambda dim: 0)
    for accumulate, rows in ((1, 2), (2, 3), (4, 6)):
        recipe = Recipe(1, accumulate=accumulate, dtype="float32")
        job = Namespace(config=SMALL, recipe=recipe, options=Namespace(batch_size=6), ranks=ranks)
        assert report.memory_of((5, 32, 48), job)[1] == rows * report.tokens_of(SMALL, 5, 32, 48)
