"""Estimates of memory against what lives at once on the meta device, where nothing is allocated."""

from dataclasses import replace

import pytest
import torch

from kandinsky5.config import LITE, PRESETS, NablaConfig
from kandinsky5.dit import DiT
from kandinsky5.runtime import pieces
from kandinsky5.runtime.memory import dit_memory
from live_memory import LiveBytes

GRID = (13, 32, 48)  # latents; 4,992 tokens


def live(config, dtype, piece=None, batch=1):
    """Bytes that a forward makes beyond its inputs, with attention that makes its result alone."""
    with torch.device("meta"):
        dit = DiT(config).to(dtype)
        x, text = torch.empty(batch, *GRID, 33, dtype=dtype), torch.empty(batch, 16, config.text_dim, dtype=dtype)
        pooled, t = torch.empty(batch, config.pooled_dim, dtype=dtype), torch.empty(batch)
    for module in dit.modules():
        if hasattr(module, "attend"):
            module.attend = lambda q, k, v, **_: torch.empty_like(q)
    with torch.no_grad(), pieces.in_pieces(dit, piece), LiveBytes() as counted:
        dit(x, text, pooled, t, rope_scale=(1.0, 1.0, 1.0))
    return counted.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [None, 512])
@pytest.mark.parametrize("ff_dim", [256, 1024, 4096])
def test_activations_are_estimated(dtype, piece, ff_dim):
    config = replace(LITE, dim=256, ff_dim=ff_dim, time_dim=64, num_visual_blocks=2, num_text_blocks=1)
    for batch in (1, 2):
        estimate = dit_memory(config, (batch, *GRID), dtype, piece)
        assert 0.95 < estimate / live(config, dtype, piece, batch) < 1.05


def test_pieces_need_less_than_half():
    for preset in PRESETS.values():
        size = (1, 31, preset.sampling.height // 8, preset.sampling.width // 8)
        whole, pieces = (dit_memory(preset.dit, size, torch.bfloat16, piece) for piece in (None, 8192))
        assert pieces < 0.6 * whole


def test_the_map_of_nabla_counts():
    dense, sparse = replace(LITE, nabla=None), replace(LITE, nabla=NablaConfig())
    size, pairs = (2, 61, 64, 96), 2 * LITE.num_heads * (61 * 32 * 48 // 64) ** 2
    small, large = (dit_memory(config, size, torch.bfloat16, piece=64) for config in (dense, sparse))
    assert large - small == 5 * pairs
