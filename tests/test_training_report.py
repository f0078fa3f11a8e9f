"""What a dry run says of the work ahead."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky5.dit import DiT
from kandinsky5.training.report import device_rate, forward_work
from random_weights import SMALL_DIT, randomise


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
