"""nabla.py against loops over tiles, written from the definition (arXiv 2507.13546)."""

import itertools

import pytest
import torch

from kandinsky5 import nabla
from kandinsky5.config import NablaConfig


def test_tile_order_is_t_major_and_row_major_inside_a_tile():
    T, H, W = 2, 16, 24
    tokens = torch.arange(T * H * W).view(1, T, H, W, 1)
    expected = [
        (t * H + tile_h * 8 + h) * W + tile_w * 8 + w
        for t in range(T)
        for tile_h in range(H // 8)
        for tile_w in range(W // 8)
        for h in range(8)
        for w in range(8)
    ]
    assert nabla.to_tiles(tokens).flatten().tolist() == expected


def test_tile_order_round_trip():
    x = torch.randn(2, 3, 16, 32, 5)
    assert torch.equal(nabla.from_tiles(nabla.to_tiles(x), (3, 16, 32)), x)


def test_selected_tiles_are_the_fewest_that_hold_the_mass():
    probability = torch.softmax(3 * torch.randn(40, 17), dim=-1)
    for P in (0.3, 0.7, 0.9, 0.99):
        for row, kept in zip(probability, nabla.select_mass(probability, P), strict=True):
            assert row[kept].sum() >= P - 1e-6
            assert row[kept].sum() - row[kept].min() < P + 1e-6  # one tile less would not do
            assert kept.all() or row[kept].min() >= row[~kept].max()


def test_selection_by_hand():
    probability = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    assert nabla.select_mass(probability, 0.75).tolist() == [[False, True, False, True]]
    assert nabla.select_mass(probability, 0.85).tolist() == [[False, True, True, True]]
    assert nabla.select_mass(probability, 1.0).all()


@pytest.mark.parametrize("window", [(11, 3, 3), (1, 1, 1), (3, 5, 1)])
def test_window_is_near_in_all_three_axes(window):
    T, H, W = 7, 3, 4
    tiles = list(itertools.product(range(T), range(H), range(W)))
    expected = [
        [all(abs(a - b) <= width // 2 for a, b, width in zip(q, k, window, strict=True)) for k in tiles] for q in tiles
    ]
    built = nabla.build_window((T, H * 8, W * 8), window, torch.device("cpu"))
    assert torch.equal(built, torch.tensor(expected))


def test_window_alone_keeps_the_known_share_of_lite_10s():
    window = nabla.build_window((61, 32, 48), (11, 3, 3), torch.device("cpu"))
    assert window.float().mean().item() == pytest.approx(0.048, abs=0.0005)


def test_block_map_is_per_head_and_sample_with_the_window():
    grid, config = (3, 16, 16), NablaConfig(P=0.5, window=(1, 1, 1))
    q, k = torch.randn(2, 2, 3, 3 * 256, 8) * 6
    chosen = nabla.block_map(q, k, grid, config)
    assert chosen.shape == (2, 3, 12, 12)
    assert (chosen | nabla.build_window(grid, config.window, q.device)).equal(chosen)
    assert not chosen[0].equal(chosen[1]) and not chosen[:, 0].equal(chosen[:, 1])
    for b, n in itertools.product(range(2), range(3)):
        alone = nabla.block_map(q[b : b + 1, n : n + 1], k[b : b + 1, n : n + 1], grid, config)
        assert alone[0, 0].equal(chosen[b, n])
