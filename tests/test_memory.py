"""Estimates of memory against what lives at once on the meta device, where nothing is allocated."""

from dataclasses import replace

import pytest
import torch

from kandinsky5.checkpoint import without_weights
from kandinsky5.config import LITE, PRESETS, NablaConfig, PipelineConfig, QwenConfig, QwenVisionConfig
from kandinsky5.dit import DiT
from kandinsky5.qwen import Qwen
from kandinsky5.qwen_vision import QwenVision
from kandinsky5.runtime import memory, offload, pieces
from kandinsky5.runtime.memory import dit_memory, plan_steps, text_memory
from live_memory import LiveBytes
from random_weights import SMALL_DIT

GRID = (13, 32, 48)  # latents; 4,992 tokens


def live(config, dtype, piece=None, batch=1):
    """Bytes that a forward makes beyond its inputs, with attention that makes its result alone."""
    with without_weights():
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
@pytest.mark.parametrize("piece", [None, 1300])
@pytest.mark.parametrize("ff_dim", [256, 1024, 4096])
def test_activations_are_estimated(dtype, piece, ff_dim):
    config = replace(LITE, dim=256, ff_dim=ff_dim, time_dim=64, num_visual_blocks=2, num_text_blocks=1)
    for batch in (1, 2) if ff_dim == 1024 else (1,):
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


def test_steps_go_in_pieces_where_memory_is_short(monkeypatch):
    dit, shape = DiT(replace(SMALL_DIT, dim=64)), (1, 40, 64, 64, 16)  # 40,960 tokens
    whole, some = (dit_memory(dit.config, shape[:4], torch.float32, piece) for piece in (None, pieces.PIECE))
    latents = 32 * 40 * 64 * 64 * 16
    for free, piece in ((2 * whole + latents, None), (whole + latents, pieces.PIECE), (some + latents, pieces.PIECE)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        plan = plan_steps(dit.config, dit, shape, guided=True)
        assert (plan.piece, plan.together) == (piece, False)
        assert plan.needed == (whole if piece is None else some) + latents
    monkeypatch.setattr(memory, "free_memory", lambda device: some + latents - 1)
    with pytest.raises(ValueError, match=r"40, 64, 64, 16.* GB are free: .*--num-frames"):
        plan_steps(dit.config, dit, shape, guided=True)


@pytest.mark.parametrize("mode, blocks", [("model", 4), ("blocks", 2)])
def test_weights_to_come_are_those_of_the_model_or_two_blocks(mode, blocks):
    config = replace(SMALL_DIT, num_text_blocks=1, num_visual_blocks=3)
    with torch.device("meta"):
        dit = DiT(config)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in [*dit.text_blocks, *dit.visual_blocks]]
    rest = sum(p.nbytes for p in dit.parameters()) - sum(sizes)
    offload.rest(dit, dict(dit.state_dict()), torch.device("cpu"), mode)
    assert memory.bytes_to_come(dit) == rest + sum(sorted(sizes)[-blocks:])


QWEN = QwenConfig(vocab_size=100, dim=256, num_layers=4, num_heads=4, num_kv_heads=2, ff_dim=1024)
VISION = QwenVisionConfig(dim=128, num_layers=2, num_heads=2, ff_dim=384, full_blocks=(1,), out_dim=256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ff_dim", [1024, 2048])
def test_what_qwen_computes_is_estimated(dtype, ff_dim):
    config = replace(QWEN, ff_dim=ff_dim)
    with torch.device("meta"):
        qwen, ids = Qwen(config).to(dtype), torch.empty(3, 200, dtype=torch.long)
    for module in qwen.modules():
        if hasattr(module, "attend"):
            module.attend = lambda q, k, v, mask: torch.empty_like(q)
    with torch.no_grad(), LiveBytes() as counted:
        qwen(ids, cache={})
    estimate = text_memory(PipelineConfig(qwen=config), 3, 200, [], dtype)
    assert 0.95 < estimate / counted.peak < 1.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ff_dim", [384, 1024])
def test_what_the_vision_tower_computes_is_estimated(dtype, ff_dim):
    config = replace(VISION, ff_dim=ff_dim)
    with torch.device("meta"):
        tower, image = QwenVision(config).to(dtype), torch.empty(3, 448, 672, dtype=dtype)
    for module in tower.modules():
        if hasattr(module, "attend"):
            module.attend = lambda q, k, v, mask: torch.empty_like(q)
    with torch.no_grad(), LiveBytes() as counted:
        tower(image)
    small = replace(QWEN, dim=8, ff_dim=8, num_layers=1)  # which computes less than the tower
    estimate = text_memory(PipelineConfig(qwen=small, qwen_vision=config), 1, 1, [(448, 672)], dtype)
    assert 0.95 < estimate / counted.peak < 1.05


def test_texts_and_images_that_do_not_fit_are_refused(monkeypatch):
    config = PipelineConfig(qwen=QWEN, qwen_vision=VISION)
    qwen, images = Qwen(QWEN), [torch.empty(900, 600, 3, device="meta")] * 2
    for seen, one in (((), "a"), (images, "a"), ((), "a" * 500)):
        sizes = [(896, 588) for _ in seen]
        needed = text_memory(config, 2, min(len(one) + 16, 64), sizes, torch.float32)
        monkeypatch.setattr(memory, "free_memory", lambda device, free=needed: free)
        memory.check_encoding(config, [qwen], [one, ""], 64, seen)
        monkeypatch.setattr(memory, "free_memory", lambda device, free=needed - 1: free)
        with pytest.raises(ValueError, match="encoding 2 texts") as caught:
            memory.check_encoding(config, [qwen], [one, ""], 64, seen)
        assert ("smaller image" in str(caught.value)) == bool(seen) and "\n" not in str(caught.value)
