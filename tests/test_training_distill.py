"""Targets of distillation, against what they stand for computed by hand."""

from functools import partial

import torch

from kandinsky5.sampler import euler_sample
from kandinsky5.training.distill import guided_target, step_target
from kandinsky5.training.flow import FlowBatch, drop_condition, predict
from tiny_training import UNSCALED, random_dit, tiny_features


def test_step_target_leads_where_the_teachers_steps_lead():
    x, times = torch.randn(2, 1, 2, 2, 4), torch.tensor([[1.0, 0.8], [0.7, 0.5], [0.4, 0.1]])
    target = step_target(lambda x, t: -x * t.view(-1, 1, 1, 1, 1), x, times)
    for i in range(2):
        walked = euler_sample(lambda x, t: -x * t, x[i : i + 1], times[:, i])
        torch.testing.assert_close(x[i : i + 1] + (times[-1, i] - times[0, i]) * target[i], walked)


def test_guided_target_is_guidance_by_hand():
    dit, features, empty = random_dit(), tiny_features(2), tiny_features(1, seed=5, length=2)
    batch = FlowBatch(torch.randn(2, 1, 2, 2, 9), torch.rand(2), torch.zeros(()), torch.ones(()))
    expected = []
    for i in range(2):  # one at a time, without padding
        x, t = batch.x[i : i + 1], batch.t[i : i + 1]
        conditional = predict(dit, x, t, features.select(i, i + 1), UNSCALED)
        unconditional = predict(dit, x, t, empty, UNSCALED)
        expected.append(unconditional + 1.5 * (conditional - unconditional))
    negative = drop_condition(features, torch.tensor([True, True]), empty)
    passes = [partial(predict, dit, features=words, rope_scale=UNSCALED) for words in (features, negative)]
    torch.testing.assert_close(guided_target(*passes, batch, 1.5), torch.cat(expected))
