"""sampler.py against closed forms and numbers worked out here."""

import pytest
import torch

from kandinsky5.sampler import euler_sample, flow_schedule, guided_velocity, normalise_first_frames


@pytest.mark.parametrize("rule", ["official", "diffusers"])
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (16, 5.0), (50, 10.0), (50, 1.0)])
def test_schedule_falls_from_one_to_zero(rule, steps, shift):
    times = flow_schedule(steps, shift, rule)
    assert times.dtype == torch.float32 and times.shape == (steps + 1,)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize("steps, shift, official, diffusers", [(50, 5.0, 0.0926, 0.0244), (16, 5.0, 0.25, 0.0244)])
def test_last_time_before_zero_is_that_of_spec(steps, shift, official, diffusers):
    assert flow_schedule(steps, shift)[-2].item() == pytest.approx(official, abs=5e-5)
    assert flow_schedule(steps, shift, "diffusers")[-2].item() == pytest.approx(diffusers, abs=5e-5)


def test_fifty_times_are_all_different_at_the_networks_door():
    """diffusers rounds them to bf16, where some coincide; here they stay float32."""
    times = flow_schedule(50, 10.0)
    assert len(times.unique()) == 51
    assert len((1000 * times).bfloat16().unique()) < 51


def test_euler_is_exact_on_a_constant_velocity():
    noise, data = torch.randn(2, 2, 3, 4, 4, 16)
    for steps in (1, 7):
        found = euler_sample(lambda x, t: noise - data, noise, flow_schedule(steps, 5.0))
        torch.testing.assert_close(found, data, rtol=1e-5, atol=1e-5)


def test_euler_error_falls_with_the_step():
    """dx/dt = x has the solution x(0) = x(1)/e."""
    x = torch.ones(1, 1, 1, 1, 1)
    errors = [abs(euler_sample(lambda x, t: x, x, flow_schedule(n, 1.0)).item() - 1 / torch.e) for n in (10, 100, 1000)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_guidance():
    v, u = torch.randn(2, 3)
    torch.testing.assert_close(guided_velocity(v, u, 1.0), v)
    torch.testing.assert_close(guided_velocity(v, u, 0.0), u)
    torch.testing.assert_close(guided_velocity(v, u, 5.0), 5 * v - 4 * u)


def test_first_frame_stays_the_given_one_at_every_step():
    given, seen = torch.randn(1, 1, 2, 2, 3), []

    def velocity(x, t):
        seen.append(x[:, :1].clone())
        return torch.randn_like(x)

    found = euler_sample(velocity, torch.randn(1, 3, 2, 2, 3), flow_schedule(4, 5.0), given)
    assert all(frame.equal(given) for frame in [*seen, found[:, :1]])


def test_callback_sees_each_step_and_may_change_or_stop():
    x, calls = torch.zeros(1, 1, 1, 1, 1), []

    def callback(step, t, latents):
        calls.append((step, t, latents.item()))
        return {1: torch.full_like(latents, 10.0), 2: False}.get(step)

    found = euler_sample(lambda x, t: torch.ones_like(x), x, flow_schedule(4, 1.0), callback=callback)
    assert [c[0] for c in calls] == [0, 1, 2]
    assert [c[1] for c in calls] == pytest.approx([0.75, 0.5, 0.25])
    assert [c[2] for c in calls] == pytest.approx([-0.25, -0.5, 9.75])
    assert found.item() == pytest.approx(9.75)


def test_first_frames_move_to_later_statistics_within_limits():
    latents = torch.randn(2, 12, 4, 4, 16)
    latents[:, 0] = 2.0 * latents[:, 0] + 0.7  # far off: both limits bind
    latents[:, 1] = 1.05 * latents[:, 1] + 0.02  # near: arrives at the target
    found = normalise_first_frames(latents)
    assert found[:, 4:].equal(latents[:, 4:])
    for b in range(2):
        target = latents[b, 4:9]
        far, near = latents[b, 0], latents[b, 1]
        assert found[b, 0].mean().item() == pytest.approx(far.mean().item() - 0.05, abs=1e-4)
        assert found[b, 0].std().item() == pytest.approx(far.std().item() - 0.1, abs=1e-4)
        assert found[b, 1].mean().item() == pytest.approx(
            target.mean().clamp(near.mean() - 0.05, near.mean() + 0.1).item(), abs=1e-4
        )
        assert found[b, 1].std().item() == pytest.approx(
            target.std().clamp(near.std() - 0.1, near.std() + 0.25).item(), abs=1e-4
        )


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_clips_too_short_for_the_statistics_stay_as_they_are(frames):
    latents = torch.randn(1, frames, 4, 4, 16)
    assert normalise_first_frames(latents).equal(latents)


@pytest.mark.parametrize("arguments", [(0, 5.0), (-3, 5.0), (10, 0.0), (10, 5.0, "linear")])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError):
        flow_schedule(*arguments)
