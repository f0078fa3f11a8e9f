"""nano's last stages: what each of them teaches, computed by hand."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config import NablaConfig
from kandinsky5.nano import distill, presets, stages
from kandinsky5.nano.clips import ClipStore, draw_batch
from kandinsky5.nano.stages import load_dit, load_text_encoder, load_vae
from kandinsky5.nano.train_dit import TIMES
from kandinsky5.sampler import flow_schedule
from kandinsky5.training.curves import read_rows
from kandinsky5.training.flow import FlowBatch, flow_loss, predict
from kandinsky5.training.modes import training_precision
from tiny_training import TINY, UNSCALED, losses, tiny_features, train


@pytest.fixture(scope="module")
def nano() -> SimpleNamespace:
    folder = SHIPPED / "nano"
    return SimpleNamespace(dit=load_dit(folder), vae=load_vae(folder), text_encoder=load_text_encoder(folder))


@pytest.fixture(scope="module")
def long_clips(nano, tmp_path_factory) -> ClipStore:
    """Of nano-10s's size, with fewer frames: four tiles of tokens."""
    return few_clips(tmp_path_factory.mktemp("clips"), nano.vae, 13, presets.LONG.sampling.height)


def few_clips(*arguments) -> ClipStore:
    """Encoded two at a time, not eight."""
    store = ClipStore(*arguments)
    store.CHUNK = 2
    return store


def test_sixteen_steps_lead_where_three_of_the_teacher_lead():
    """Each sample from its own time of the schedule to the next; a given first frame stays where it is."""
    schedule = flow_schedule(16, 3.0)

    class Teacher:
        config = TINY

        def __call__(self, x, text, pooled, t, mask, rope_scale):
            return x[..., :4] * t.view(-1, 1, 1, 1, 1)

    starts = torch.tensor([0, 7, 15])
    x, loss_mask = torch.randn(3, 2, 2, 2, 9), torch.ones(3, 2, 1, 1, 1)
    loss_mask[1, 0] = 0
    batch = FlowBatch(x, schedule[starts], torch.zeros(()), loss_mask)
    taught = distill.several_steps_target(Teacher(), batch, tiny_features(3), schedule, UNSCALED)
    for i, start in enumerate(starts):
        there, times = x[i, ..., :4], torch.linspace(float(schedule[start]), float(schedule[start + 1]), 4)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            there = there + (t_next - t) * there * t * loss_mask[i]
        landed = x[i, ..., :4] + (schedule[start + 1] - schedule[start]) * taught[i]
        torch.testing.assert_close(landed, there)


@pytest.mark.stages
@pytest.mark.parametrize(("window", "learns"), [((17, 1, 1), False), ((1, 1, 1), True)])
def test_sparse_learns_what_full_attention_predicts(monkeypatch, tmp_path, nano, long_clips, window, learns):
    """Where NABLA keeps every tile there is nothing to learn; nor in the steps with full attention, at rate 0."""
    run_sparse(monkeypatch, tmp_path, nano, long_clips, 3, window, learning_rate=0.0)
    row = read_rows(tmp_path / "loss.csv")[0]
    assert float(row["loss_full"]) < 1e-9
    assert float(row["loss_nabla"]) > 1e-3 if learns else float(row["loss_nabla"]) < 1e-9


@pytest.mark.stages
def test_sparse_trains_full_attention_every_third_step(monkeypatch, tmp_path, nano, long_clips):
    """The same weights: they change in that step too."""
    ends = []
    for stop in (2, 3):
        run_sparse(monkeypatch, tmp_path, nano, long_clips, stop)
        ends.append(torch.load(tmp_path / "state.pt")["model"])
    name = "visual_blocks.0.self_attention.to_q.weight"
    assert ends[0].keys() == ends[1].keys() and not ends[0][name].equal(ends[1][name])


@pytest.mark.stages
def test_nocfg_learns_guidance_and_long_learns_scaled_positions(monkeypatch, tmp_path, nano, long_clips):
    """The first step's loss, of a student that is still its teacher, by hand."""
    monkeypatch.setattr(distill, "DISTILLATION_CLIPS", 2)
    monkeypatch.setattr(distill, "BATCH", 4)
    monkeypatch.setattr(distill, "LONG_CLIPS_AT_FIRST", 2)
    monkeypatch.setattr(distill, "LONG_BATCH", 2)
    monkeypatch.setattr(stages, "train", functools.partial(train, stop_after=1, progress=False))
    teacher, text_encoder = nano.dit, nano.text_encoder
    empty, clips = text_encoder.encode([""]), few_clips(tmp_path / "clips", nano.vae)

    recipe = replace(distill.RECIPES["nocfg"], dtype="float32")
    distill.distill(tmp_path / "nocfg", presets.NOCFG, teacher, clips, text_encoder, recipe)
    batch, features = draw_batch([0, 0, 0], teacher, clips, 2, text_encoder, empty, TIMES.sample, 4)
    unprompted = text_encoder.encode([""] * len(batch.t))
    with torch.no_grad():
        given, without = (predict(teacher, batch.x, batch.t, f, UNSCALED) for f in (features, unprompted))
    guided = without + 2.0 * (given - without)
    expected = float(flow_loss(given, guided, batch.loss_mask))
    assert losses(tmp_path / "nocfg") == pytest.approx([expected], rel=1e-5) and expected > 1e-3

    recipe = replace(distill.RECIPES["long"], dtype="float32")
    distill.train_long(tmp_path / "long", presets.LONG, teacher, long_clips, text_encoder, recipe)
    student = distill.start_from(teacher, presets.LONG)
    batch, features = draw_batch([0, 0, 0], student, long_clips, 2, text_encoder, empty, TIMES.sample, 2)
    with torch.no_grad(), training_precision(student):
        velocities = [predict(student, batch.x, batch.t, features, (scale,) * 3) for scale in (2.0, 1.0)]
    expected, unscaled = (float(flow_loss(v, batch.velocity, batch.loss_mask)) for v in velocities)
    assert losses(tmp_path / "long") == pytest.approx([expected], rel=1e-5)
    assert unscaled != pytest.approx(expected, rel=1e-3)


def run_sparse(monkeypatch, folder, nano, clips, stop, window=(1, 1, 1), **recipe):
    config = replace(presets.LONG, dit=replace(presets.LONG.dit, nabla=NablaConfig(P=0.6, window=window)))
    recipe = replace(distill.RECIPES["sparse"], dtype="float32", **recipe)
    monkeypatch.setattr(distill, "SPARSE_CLIPS", 2)
    monkeypatch.setattr(distill, "LONG_BATCH", 2)
    monkeypatch.setattr(stages, "train", functools.partial(train, stop_after=stop, progress=False))
    distill.train_sparse(folder, config, nano.dit, clips, nano.text_encoder, recipe)
