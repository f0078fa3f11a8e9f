"""The loss by flow time is that of known velocities, and does not depend on anything but the seed."""

import pytest
import torch

from kandinsky5.training.clip_loss import loss_by_flow_time
from kandinsky5.training.curves import append_row, plot_by_flow_time
from kandinsky5.training.flow import FlowBatch
from tiny_training import random_dit


def test_loss_by_flow_time_of_known_velocities():
    dit, latents = random_dit(), torch.randn(3, 2, 2, 2, 4)
    seen = []

    def predict(batch: FlowBatch) -> torch.Tensor:  # wrong by t, in any conditioning
        seen.append(batch.x[..., :4] - torch.lerp(latents, batch.velocity + latents, batch.t.view(-1, 1, 1, 1, 1)))
        return batch.velocity + batch.t.view(-1, 1, 1, 1, 1)

    losses = loss_by_flow_time(dit, predict, latents, [1, 2])
    assert [*losses] == [f"t {0.05 + i / 10:.2f}" for i in range(10)]
    assert [*losses.values()] == pytest.approx([(0.05 + i / 10) ** 2 for i in range(10)], rel=1e-4)
    assert all(error.abs().max() < 1e-5 for error in seen)


def test_given_first_frames_have_no_loss():
    dit, latents = random_dit(), torch.randn(2, 3, 2, 2, 4)

    def predict(batch: FlowBatch) -> torch.Tensor:  # wrong in frame 0 only
        return torch.cat([batch.velocity[:, :1] + 1, batch.velocity[:, 1:]], dim=1)

    losses = loss_by_flow_time(dit, predict, latents, [0], latents[:, :1], torch.tensor([True, True]))
    assert max(losses.values()) == 0


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for step in range(0, 90, 10):
        append_row(
            tmp_path / "a.csv", {"step": step, **{f"t {0.05 + i / 10:.2f}": 1 / (step + i + 1) for i in range(10)}}
        )
    plot_by_flow_time(tmp_path / "a.csv", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
