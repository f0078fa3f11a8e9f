"""probe.py: what is recorded is what was computed, and recording changes nothing."""

from dataclasses import replace

import pytest
import torch

from kandinsky5 import dit as dit_module
from kandinsky5 import nabla
from kandinsky5.attention import attend, dense_attention, expand_block_map
from kandinsky5.dit import Attention, DiT
from kandinsky5.extras import probe as module
from kandinsky5.extras.probe import block_map, find_modules, queries_and_keys, record, record_attention, weights
from random_weights import SMALL_DIT, SMALL_NABLA, randomise, relative_error

SELF, CROSS = "visual_blocks.1.self_attention", "visual_blocks.1.cross_attention"


def small_dit(nabla=None):
    return randomise(DiT(replace(SMALL_DIT, nabla=nabla)))


def inputs(B=2, grid=(2, 16, 32), S=7):
    torch.manual_seed(1)
    return {
        "x": torch.randn(B, *grid, SMALL_DIT.input_channels),
        "text": torch.randn(B, S, SMALL_DIT.text_dim),
        "pooled": torch.randn(B, SMALL_DIT.pooled_dim),
        "t": torch.rand(B),
        "text_mask": torch.arange(S) < torch.tensor([[S], [3]])[:B],
        "rope_scale": (1.0, 2.0, 2.0),
    }


def keep_all(q, k, v, mask, block_map):
    nothing = torch.empty(0)
    return q, k, v, nothing if mask is None else mask, nothing if block_map is None else block_map


def test_a_star_is_one_part_of_a_name_and_two_are_any():
    dit = small_dit()
    assert list(find_modules(dit, "visual_blocks.*")) == ["visual_blocks.0", "visual_blocks.1"]
    assert len(find_modules(dit, "*.*.self_attention")) == 4  # two text blocks, two visual ones
    assert len(find_modules(dit, "**.q_norm")) == 6
    with pytest.raises(ValueError, match="visual_block.0.*try visual_blocks.0"):
        find_modules(dit, "visual_block.0")


@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
def test_recording_changes_nothing_and_leaves_nothing_behind(nabla):
    dit, given = small_dit(nabla), inputs()
    expected = dit(**given)
    with record(dit, "**"), record_attention(dit, "*.*.*_attention", keep=weights()):
        assert dit(**given).equal(expected)
    assert all(m.attend is attend for m in dit.modules() if isinstance(m, Attention))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dit.modules())


def test_hooks_go_away_after_an_error_too():
    dit = small_dit()
    with pytest.raises(RuntimeError, match="stop"), record(dit, "**"), record_attention(dit, SELF, keep=weights()):
        raise RuntimeError("stop")
    assert all(m.attend is attend for m in dit.modules() if isinstance(m, Attention))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dit.modules())


def test_outputs_are_those_of_the_modules_call_by_call():
    dit, first, second = small_dit(), inputs(), inputs(B=1)
    with record(dit, "patch_embedder", "visual_blocks.*", "visual_blocks.1.modulation") as seen:
        dit(**first)
        dit(**second)
    assert [x.shape[0] for x in seen["visual_blocks.0"]] == [2, 1]
    patches = dit_module.patchify(first["x"], SMALL_DIT.patch_size)
    assert seen["patch_embedder"][0].equal(dit.patch_embedder(patches))
    vec = dit.time_embedder(first["t"]) + dit.pooled_embedder(first["pooled"])
    last = dit.final_layer(seen["visual_blocks.1"][0].unflatten(1, (2, 8, 16)), vec)
    assert dit_module.unpatchify(last, SMALL_DIT.patch_size).equal(dit(**first))
    assert len(seen["visual_blocks.1.modulation"][0]) == 9  # shift, scale and gate of three sub-layers


def test_keep_and_calls_choose_what_is_kept():
    dit = small_dit()
    with record(dit, "visual_blocks.0", keep=lambda x: x.norm(dim=-1), calls=range(1, 4, 2)) as seen:
        for _ in range(5):
            dit(**inputs())
    assert [x.shape for x in seen["visual_blocks.0"]] == [(2, 256)] * 2


def test_a_recording_is_a_copy():
    dit = small_dit()
    with record(dit, "patch_embedder", keep=lambda x: x[:, :1, :1, :1]) as seen:
        dit(**inputs())
    assert seen["patch_embedder"][0].untyped_storage().nbytes() == 2 * SMALL_DIT.dim * 4


@pytest.mark.parametrize("name, config", [(SELF, None), (CROSS, None), (SELF, SMALL_NABLA)])
def test_weights_times_values_is_the_attention(name, config):
    """The oracle is the definition with the mask written out over tokens, on the same q, k, v."""
    dit = small_dit(config)
    with record_attention(dit, name, keep=keep_all) as seen, record_attention(dit, name, keep=weights()) as maps:
        dit(**inputs())
    (q, k, v, mask, tiles), (found,) = seen[name][0], maps[name]
    mask = expand_block_map(tiles) if config else mask if mask.numel() else None
    assert config is None or 0 < tiles.float().mean() < 1
    assert relative_error(found @ v, dense_attention(q, k, v, mask)) < 1e-6
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    if mask is not None:
        assert found[~mask.expand_as(found)].eq(0).all()


def test_chosen_heads_and_queries_equal_part_of_the_whole(monkeypatch):
    dit = small_dit(SMALL_NABLA)
    with record_attention(dit, SELF, keep=weights()) as whole:
        dit(**inputs())
    monkeypatch.setattr(module, "SCORES", 1000)
    chosen = [200, 5, 64, 63]
    with record_attention(dit, SELF, keep=weights(heads=[1], queries=chosen)) as part:
        dit(**inputs())
    torch.testing.assert_close(part[SELF][0], whole[SELF][0][:, [1]][:, :, chosen])


def test_nabla_map_is_that_of_the_recorded_queries_and_keys():
    dit = small_dit(SMALL_NABLA)
    names = "visual_blocks.*.self_attention"
    with (
        record_attention(dit, names, keep=block_map) as maps,
        record_attention(dit, names, keep=queries_and_keys) as qk,
    ):
        dit(**inputs())
    for name in maps:
        assert maps[name][0].equal(nabla.block_map(*qk[name][0], (2, 8, 16), SMALL_NABLA))


def test_memory_is_bounded_with_a_plain_message(monkeypatch):
    dit = small_dit()
    with pytest.raises(ValueError, match="passed 10 bytes"), record(dit, "visual_blocks.*", max_bytes=10):
        dit(**inputs())
    monkeypatch.setattr(module, "MOST", 1000)
    with pytest.raises(ValueError, match="choose some"), record_attention(dit, SELF, keep=weights()):
        dit(**inputs())


def test_wrong_choices_are_named():
    dit = small_dit()
    with pytest.raises(ValueError, match="no block map"), record_attention(dit, SELF, keep=block_map):
        dit(**inputs())
    with pytest.raises(ValueError, match="head 9: there are 2"), record_attention(dit, SELF, keep=weights(heads=[9])):
        dit(**inputs())
    with (
        pytest.raises(ValueError, match="visual_blocks.1 is a VisualBlock"),
        record_attention(dit, "visual_blocks.1", keep=weights()),
    ):
        pass
