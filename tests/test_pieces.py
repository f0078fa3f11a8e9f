"""Blocks in pieces of tokens against whole ones."""

from dataclasses import replace

import pytest
import torch

from kandinsky5.dit import DiT
from kandinsky5.runtime import fast, kernels
from kandinsky5.runtime.pieces import in_pieces
from random_weights import SMALL_DIT, SMALL_NABLA, randomise, relative_error


def inputs(dtype=torch.float32, grid=(3, 16, 32)):
    shapes = {"x": (2, *grid, 33), "text": (2, 7, SMALL_DIT.text_dim), "pooled": (2, 24)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    return {**tensors, "t": torch.rand(2), "text_mask": mask, "rope_scale": (1.0, 2.0, 2.0)}


@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
@pytest.mark.parametrize("piece", [1000, 100, 7])  # of 384 tokens, 128 of them in a frame
def test_pieces_are_the_whole(nabla, piece):
    dit = randomise(DiT(replace(SMALL_DIT, nabla=nabla)))
    fast.install(dit)
    kernels.install(dit, "auto")
    given, classes = inputs(), [type(module) for module in dit.modules()]
    with torch.no_grad():
        expected = dit(**given)
        with in_pieces(dit, piece):
            assert relative_error(dit(**given), expected) < 1e-6
        assert [type(module) for module in dit.modules()] == classes
        assert dit(**given).equal(expected)


def test_pieces_are_the_whole_in_half_precision():
    dit, given = randomise(DiT(SMALL_DIT)).bfloat16(), inputs(torch.bfloat16)
    with torch.no_grad():
        expected = dit(**given)
        with in_pieces(dit, 100):
            assert relative_error(dit(**given), expected) < 5e-3


def test_no_piece_changes_nothing():
    dit = DiT(SMALL_DIT)
    with in_pieces(dit, None):
        assert type(dit.visual_blocks[0]).__name__ == "VisualBlock"
