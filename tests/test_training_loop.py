"""The training loop: a run resumes exactly, and a step does what its recipe says."""

import numpy as np
import pytest
import torch
from torch import nn

from kandinsky5.dit import DiT
from kandinsky5.files import locked
from kandinsky5.nano import presets
from kandinsky5.training import curves, loop
from kandinsky5.training.loop import MOST_SKIPPED, generator
from kandinsky5.training.recipe import Recipe
from tiny_training import TINY, losses, same_weights, tiny_run, train


def test_a_tiny_dit_learns_and_the_log_shows_it(tmp_path):
    tiny_run(tmp_path, steps=200)
    curve = losses(tmp_path)
    assert len(curve) == 100 and np.mean(curve[-10:]) < 0.5 * np.mean(curve[:5]), curve[::10]


@pytest.mark.parametrize(("dtype", "muon"), [("float32", presets.MUON), ("bfloat16", "")])
def test_an_interrupted_run_ends_exactly_like_an_unbroken_one(tmp_path, dtype, muon):
    whole = tiny_run(tmp_path / "whole", dtype=dtype, accumulate=2, muon=muon)
    for stop in (4, 8, None):
        parts = tiny_run(tmp_path / "parts", stop_after=stop, dtype=dtype, accumulate=2, muon=muon)
    assert all(same_weights(a, b) for a, b in zip(whole, parts, strict=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_second_cycle_ends_exactly_like_a_run_of_two(tmp_path, capsys):
    whole = tiny_run(tmp_path / "whole", steps=6, cycles=2, progress=False)
    for cycles, notes in ((1, []), (1, ["parts is finished at step 6"]), (2, ["parts resumes from step 6"])):
        parts = tiny_run(tmp_path / "parts", steps=6, cycles=cycles, progress=False)
        assert [line.split("/")[-1] for line in capsys.readouterr().err.splitlines()] == notes
    assert all(same_weights(a, b) for a, b in zip(whole, parts, strict=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "parts")) == 6


def test_training_shows_its_progress_at_once(tmp_path, capsys):
    def loss(seed):
        assert "0/5" in capsys.readouterr().err
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(nn.Linear(1, 1), loss, Recipe(steps=5, dtype="float32"), tmp_path)


def test_memory_that_runs_out_says_in_which_phase(tmp_path):
    def loss(seed):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError) as error:
        train(nn.Linear(1, 1), loss, Recipe(steps=5, dtype="float32"), tmp_path)
    assert error.value.__notes__ == ["training"]


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float64), ("meta", torch.float32)])
def test_the_callers_defaults_change_nothing(tmp_path, device, dtype):
    def run(folder):
        model = nn.Linear(2, 1, device="cpu", dtype=torch.float32)
        nn.init.constant_(model.weight, 1.0)
        nn.init.zeros_(model.bias)
        loss = lambda seed: (model(torch.rand(3, 2, generator=generator(seed))).square().mean(), {})  # noqa: E731
        return train(model, loss, Recipe(steps=4, dtype="float32"), tmp_path / folder, progress=False)

    plain = run("plain")
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            other = run("other")
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_weights(plain, other) and {p.dtype for p in other.parameters()} == {torch.float32}


def test_rows_logged_after_the_last_save_are_dropped(tmp_path):
    tiny_run(tmp_path, stop_after=4)
    curves.append_row(tmp_path / "loss.csv", {"step": 6, "loss": 123.0})
    tiny_run(tmp_path)
    steps = [int(row["step"]) for row in curves.read_rows(tmp_path / "loss.csv")]
    assert steps == [2, 4, 6, 8, 10, 12] and 123.0 not in losses(tmp_path)


def test_sampling_during_training_changes_nothing(tmp_path):
    def sample(model, step):
        torch.rand(3)  # global randomness may be used
        return {"step_again": step}

    plain, _ = tiny_run(tmp_path / "plain")
    with_samples, _ = tiny_run(tmp_path / "samples", sample=sample, sample_every=4)
    assert same_weights(plain, with_samples)
    assert [row["step"] for row in curves.read_rows(tmp_path / "samples" / "samples.csv")] == ["4", "8", "12"]


def test_the_average_is_exponential():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer, value in ((model, 1.0), (average, 0.0)):
        nn.init.constant_(layer.weight, value)
    for _ in range(3):
        loop.update_average(average, model, 0.9)
    assert average.weight.item() == pytest.approx(1 - 0.9**3)


def test_averaged_weights_come_with_the_models_buffers(tmp_path):
    model = nn.BatchNorm1d(2)
    average = train(model, lambda seed: (model(torch.randn(8, 2) + 5).sum(), {}), Recipe(3), tmp_path, progress=False)
    assert average.running_mean.equal(model.running_mean) and model.running_mean.min() > 1


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    pytest.importorskip("fcntl", reason="folders have no locks here")
    with locked(tmp_path, "taken"), pytest.raises(ValueError, match="another process is training in"):
        tiny_run(tmp_path, stop_after=2)
    tiny_run(tmp_path, stop_after=2)


def test_a_batch_that_is_not_a_number_leaves_the_weights_alone(tmp_path):
    weights = []

    def loss(seed):
        weights.append(model.weight.detach().clone())
        return model(torch.ones(1, 2)).sum() * (torch.nan if seed[1] == 1 else 1), {}

    model = nn.Linear(2, 2)
    train(model, loss, Recipe(4, warmup=0), tmp_path, progress=False)
    assert not weights[0].equal(weights[1]) and weights[1].equal(weights[2]) and not weights[2].equal(weights[3])


def test_a_run_without_finite_gradients_ends(tmp_path, capsys):
    """Single bad steps are named and passed over, a run of nothing else stops; the weights stay what they were."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)

    def loss(seed):
        bad = seed[1] in (1, 4, 5) or seed[1] >= 7
        return model(torch.ones(1, 2)).sum() * (torch.inf if bad else 1), {}

    with pytest.raises(ValueError, match=f"of {MOST_SKIPPED} steps in a row, up to step {7 + MOST_SKIPPED}"):
        train(model, loss, Recipe(100), tmp_path, progress=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split()[1] for line in said] == ["2", "5", "8"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_takes_the_mean_gradient_of_its_batches_clipped(monkeypatch, tmp_path):
    """By hand, with plain gradient descent instead of AdamW, which hardly depends on the length of a gradient."""
    model = nn.Linear(2, 1, bias=False)
    monkeypatch.setattr(loop, "build_optimizers", lambda model, recipe: [torch.optim.SGD(model.parameters())])
    gradients = torch.randn(3, 1, 2, generator=generator([3]))

    def loss(seed):
        return (model.weight * gradients[seed[2]]).sum(), {}

    mean = gradients.mean(dim=0)
    for clip in (0.5 * float(mean.norm()), 2 * float(mean.norm())):
        nn.init.zeros_(model.weight)
        folder = tmp_path / f"{clip}"
        recipe = Recipe(1, learning_rate=0.1, warmup=0, accumulate=3, clip_norm=clip, dtype="float32", ema=0.999)
        average = train(model, loss, recipe, folder, progress=False)
        expected = -0.1 * mean * min(1, clip / float(mean.norm()))
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(average.weight, expected * (1 - 2 / 11), rtol=1e-4, atol=0)  # decay (1 + 1)/(10 + 1)


def test_gradients_of_each_block_are_logged(tmp_path):
    dit, _ = tiny_run(tmp_path / "a", steps=2)
    for name in ("text_blocks.0", "visual_blocks.0"):
        assert all(float(row[f"gradient {name}"]) > 0 for row in curves.read_rows(tmp_path / "a" / "loss.csv"))
    for p in dit.visual_blocks[0].parameters():
        p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in dit.visual_blocks[0].parameters())
    assert loop.gradient_norms(dit) == pytest.approx({"gradient visual_blocks.0": 2 * count**0.5})


def test_frozen_weights_stay_while_the_rest_is_trained(tmp_path):
    torch.manual_seed(0)
    start = DiT(TINY).state_dict()
    dit, average = tiny_run(tmp_path / "a", freeze="attention")
    for name, p in dit.named_parameters():
        assert torch.equal(p, start[name]) == ("attention" in name or name.endswith("query")), name
        assert "attention" not in name or torch.equal(average.state_dict()[name], start[name])
