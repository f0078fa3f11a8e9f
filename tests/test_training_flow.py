"""Flow matching: batches as the pipeline presents them, and exact losses."""

import pytest
import torch

from kandinsky5.dit import DiT
from kandinsky5.sampler import build_condition, euler_sample
from kandinsky5.training.flow import FlowTimes, drop_condition, flow_batch, flow_loss, predict
from kandinsky5.training.loop import generator
from tiny_training import TINY, UNSCALED, random_dit, tiny_features


def test_flow_batch_is_what_the_pipeline_presents():
    dit = DiT(TINY)
    latents, noise = torch.randn(2, 3, 2, 2, 4), torch.randn(2, 3, 2, 2, 4)
    first_frame, given = torch.randn(2, 1, 2, 2, 4), torch.tensor([False, True])
    t = torch.tensor([0.25, 0.5])
    batch = flow_batch(dit, latents, t, noise, first_frame, given)

    # What does the network see in the pipeline, when its latents are just as noisy?
    noisy = latents + t.view(2, 1, 1, 1, 1) * (noise - latents)
    for i, image in enumerate((None, first_frame[1:])):
        seen = []
        condition = build_condition(noisy[i : i + 1], image, TINY.in_channels + 1, False)
        euler_sample(
            lambda x, t, condition=condition, seen=seen: seen.append(torch.cat([x, condition], -1)) or x,
            noisy[i : i + 1],
            torch.tensor([1.0, 0.0]),
            image,
        )
        torch.testing.assert_close(batch.x[i : i + 1], seen[0])
    assert batch.loss_mask[:, :, 0, 0, 0].tolist() == [[1, 1, 1], [0, 1, 1]]
    torch.testing.assert_close(batch.velocity, noise - latents)


def test_flow_loss_has_its_closed_form():
    # A prediction of 0 for noise 3 and latents 1 is off by 2 everywhere; the given frame, off by 100, does not count.
    dit = DiT(TINY)
    latents, noise = torch.ones(1, 2, 2, 2, 4), 3 * torch.ones(1, 2, 2, 2, 4)
    batch = flow_batch(dit, latents, torch.tensor([0.5]), noise, latents[:, :1], torch.tensor([True]))
    predicted = torch.zeros(1, 2, 2, 2, 4)
    predicted[:, 0] = 102
    assert flow_loss(predicted, batch.velocity, batch.loss_mask).item() == pytest.approx(4)


@pytest.mark.parametrize(("times", "median"), [(FlowTimes("uniform"), 0.5), (FlowTimes(mean=1.0), 0.731)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_have_their_median(times, median, shift):
    times = FlowTimes(times.kind, times.mean, times.std, shift)
    t = times.sample(20_000, generator([0]))
    assert 0 < t.min() and t.max() < 1
    assert t.median().item() == pytest.approx(shift * median / (1 + (shift - 1) * median), abs=0.01)


def test_flow_times_ignore_the_callers_default_dtype():
    for times in (FlowTimes(), FlowTimes("uniform")):
        expected = times.sample(8, generator([0]))
        torch.set_default_dtype(torch.float64)
        try:
            assert times.sample(8, generator([0])).equal(expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_dropped_prompts_become_the_empty_one():
    features, empty = tiny_features(2, length=3), tiny_features(1, seed=1, length=1)
    result = drop_condition(features, torch.tensor([False, True]), empty)
    dit, x, t = random_dit(), torch.randn(2, 1, 2, 2, 9), torch.rand(2)
    velocity = predict(dit, x, t, result, UNSCALED)
    kept = predict(dit, x[:1], t[:1], features.select(0, 1), UNSCALED)
    torch.testing.assert_close(velocity[:1], kept)
    torch.testing.assert_close(velocity[1:], predict(dit, x[1:], t[1:], empty, UNSCALED))


def test_predictions_depend_on_the_scale_of_positions():
    dit, x, features = random_dit(), torch.randn(1, 2, 4, 4, 9), tiny_features(1)
    by_scale = [predict(dit, x, torch.ones(1), features, (s, s, s)) for s in (1.0, 2.0)]
    assert not torch.allclose(*by_scale)
    with pytest.raises(TypeError):
        predict(dit, x, torch.ones(1), features)
