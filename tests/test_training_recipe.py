"""The learning rate of each step, and which optimizer trains what."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kandinsky5.dit import DiT
from kandinsky5.nano import presets
from kandinsky5.training.loop import generator
from kandinsky5.training.muon import Muon, orthogonalise
from kandinsky5.training.recipe import Recipe, build_optimizers, freeze, learning_rate
from tiny_training import TINY


def test_learning_rate_warms_up_stays_and_falls_along_a_cosine():
    recipe = Recipe(100, 1.0, warmup=10, constant=0.2, final_rate=0.1)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:21] == [1.0] * 11 and rates[60] == pytest.approx(0.55)  # half way of the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    twice = replace(recipe, cycles=2)
    assert [learning_rate(step, twice) for step in range(200)] == rates * 2


def test_muon_trains_the_blocks_matrices_and_adamw_the_rest():
    dit = DiT(TINY)
    adam, muon = build_optimizers(dit, Recipe(1, muon=presets.MUON))
    names = {id(p): name for name, p in dit.named_parameters()}
    trained = [
        [names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adam, muon)
    ]
    assert sorted(trained[0] + trained[1]) == sorted(names.values())
    assert len(trained[1]) == (4 + 2) + (8 + 2)  # q, k, v, out and the feed-forward; twice with cross-attention
    assert "visual_blocks.0.cross_attention.to_v.weight" in trained[1]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_in_bfloat16_is_pytorchs(shape):
    matrix = nn.Parameter(torch.randn(shape, generator=generator([0])))
    other = nn.Parameter(matrix.detach().clone())
    ours = Muon([matrix], weight_decay=0.1)
    theirs = torch.optim.Muon([other], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        matrix.grad = torch.randn(shape, generator=generator([step]))
        other.grad = matrix.grad.clone()
        ours.step()
        theirs.step()
        assert matrix.equal(other)


def test_orthogonalised_matrices_have_singular_values_near_1():
    x = torch.randn(8, 5, generator=generator([0])) @ torch.diag(torch.tensor([1.0, 2.0, 5.0, 10.0, 20.0]))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_that_matches_no_matrix_is_refused():
    with pytest.raises(ValueError, match="'no_such'"):
        build_optimizers(nn.Linear(2, 2), Recipe(1, muon="no_such"))


def test_frozen_names_are_not_trained():
    dit = DiT(TINY)
    freeze(dit, r"^text_blocks|\.bias$")
    frozen = {name for name, p in dit.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in dit.named_parameters() if n.startswith("text_blocks") or n.endswith(".bias")}
    trained = {id(p) for group in build_optimizers(dit, Recipe(1))[0].param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in dit.named_parameters() if name not in frozen}


@pytest.mark.parametrize("pattern", ["nothing", "(", ""])
def test_freezing_nothing_or_everything_is_refused(pattern):
    with pytest.raises(ValueError):
        freeze(DiT(TINY), pattern)
