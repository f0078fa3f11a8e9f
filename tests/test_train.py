"""The training code: exact losses, exact resuming, and the conditioning that the pipeline presents."""

import contextlib
import copy
import functools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from torch import nn

from kandinsky5 import nabla
from kandinsky5.attention import attention
from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config import DiTConfig, NablaConfig, VAEConfig
from kandinsky5.dit import DiT
from kandinsky5.files import locked
from kandinsky5.nano import distill, presets, train_dit, train_text, train_vae
from kandinsky5.nano.train_dit import ClipStore, draw_batch, encode_text, load_dit
from kandinsky5.nano.train_text import conversation, load_text_encoder, same_said, tokens_about
from kandinsky5.nano.train_vae import draw_confetti, draw_videos, load_vae, single_frame, standardise
from kandinsky5.nano.world import Caption, caption, sample_scene
from kandinsky5.pipeline import Pipeline
from kandinsky5.sampler import euler_sample, flow_schedule
from kandinsky5.text_encoder import TextFeatures
from kandinsky5.training import loop as training
from kandinsky5.training.loop import (
    FlowBatch,
    FlowTimes,
    Recipe,
    drop_condition,
    flow_batch,
    flow_loss,
    generator,
    guided_target,
    step_target,
    train,
)
from kandinsky5.vae import VAE, CausalConv3d, Posterior
from random_weights import save_small_checkpoint

TINY = DiTConfig(
    dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=1, rope_axes=(4, 6, 6),
    in_channels=4, out_channels=4, text_dim=8, pooled_dim=8,
)  # fmt: skip


def tiny_features(batch: int, seed: int = 0, length: int = 3) -> TextFeatures:
    random = generator([seed])
    text, pooled = torch.randn(batch, length, 8, generator=random), torch.randn(batch, 8, generator=random)
    return TextFeatures(text, torch.ones(batch, length, dtype=torch.bool), pooled)


def tiny_run(
    folder, steps=12, stop_after=None, bf16=False, accumulate=1, muon="", checkpointing=False, cycles=1, **options
):
    """A DiT that learns two latents by their prompts; returns it and its average."""
    torch.manual_seed(0)
    dit = DiT(TINY)
    targets = torch.randn(2, 2, 4, 4, 4, generator=generator([9]))
    features = tiny_features(2)

    def loss(seed):
        random = generator(seed)
        t, noise = FlowTimes().sample(2, random), torch.randn(targets.shape, generator=random)
        batch = flow_batch(dit, targets, t, noise)
        with training.autocast_dit(dit):
            predicted = dit(batch.x, features.text, features.pooled, batch.t, features.mask)
        return flow_loss(predicted, batch.velocity, batch.asked), {"noise": float(noise.mean())}

    how = {"bf16": bf16, "accumulate": accumulate, "muon": muon, "checkpointing": checkpointing, "cycles": cycles}
    recipe = Recipe(steps, 1e-2, warmup=4, **how)
    options = {"log_every": 2, "save_seconds": 0} | options
    average = train(dit, loss, recipe, folder, stop_after=stop_after, **options)
    return dit, average


def losses(folder) -> list[float]:
    return [float(row["loss"]) for row in training.read_rows(folder / "loss.csv")]


def test_a_tiny_dit_learns_and_the_log_shows_it(tmp_path):
    tiny_run(tmp_path, steps=300, save_seconds=60)
    curve = losses(tmp_path)
    assert len(curve) == 150 and np.mean(curve[-10:]) < 0.5 * np.mean(curve[:5]), curve[::10]


def test_muon_takes_the_matrices_of_the_blocks_and_every_parameter_is_trained_once():
    dit = DiT(TINY)
    adam, muon = training.build_optimizers(dit, Recipe(1, muon=presets.MUON))
    names = {id(p): name for name, p in dit.named_parameters()}
    taken = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adam, muon)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert len(taken[1]) == (4 + 2) + (8 + 2)  # q, k, v, out and the feed-forward; twice with cross-attention
    assert "visual_blocks.0.cross_attention.to_v.weight" in taken[1]


@pytest.mark.parametrize(("bf16", "muon"), [(False, presets.MUON), (True, "")])
def test_an_interrupted_run_ends_exactly_like_an_unbroken_one(tmp_path, bf16, muon):
    whole = tiny_run(tmp_path / "whole", bf16=bf16, accumulate=2, muon=muon)
    for stop in (4, 8, None):
        parts = tiny_run(tmp_path / "parts", stop_after=stop, bf16=bf16, accumulate=2, muon=muon)
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_run_that_is_done_and_takes_a_second_cycle_ends_exactly_like_one_of_two(tmp_path, capsys):
    whole = tiny_run(tmp_path / "whole", steps=6, cycles=2, progress=False)
    for cycles, said in ((1, []), (1, ["parts is done to step 6"]), (2, ["parts goes on from step 6"])):
        parts = tiny_run(tmp_path / "parts", steps=6, cycles=cycles, progress=False)
        assert [line.split("/")[-1] for line in capsys.readouterr().err.splitlines()] == said
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "parts")) == 6


def test_a_run_cut_off_after_its_last_save_forgets_what_it_logged_since(tmp_path):
    tiny_run(tmp_path, stop_after=4)
    training.append_row(tmp_path / "loss.csv", {"step": 6, "loss": 123.0})
    tiny_run(tmp_path)
    steps = [int(row["step"]) for row in training.read_rows(tmp_path / "loss.csv")]
    assert steps == [2, 4, 6, 8, 10, 12] and 123.0 not in losses(tmp_path)


def test_sampling_during_training_changes_nothing(tmp_path):
    def sample(model, step):
        torch.rand(3)  # global randomness is free to use
        return {"step_again": step}

    plain, _ = tiny_run(tmp_path / "plain")
    with_samples, _ = tiny_run(tmp_path / "samples", sample=sample, sample_every=4)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), with_samples.parameters(), strict=True))
    assert [row["step"] for row in training.read_rows(tmp_path / "samples" / "samples.csv")] == ["4", "8", "12"]


def test_learning_rate_warms_up_stays_and_falls_along_a_cosine():
    recipe = Recipe(100, 1.0, warmup=10, constant=0.2, final_rate=0.1)
    rates = [training.learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:21] == [1.0] * 11 and rates[60] == pytest.approx(0.55)  # half way of the cosine
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    twice = replace(recipe, cycles=2)
    assert [training.learning_rate(step, twice) for step in range(200)] == rates * 2


def test_average_is_the_exponential_one():
    model, average = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer, value in ((model, 1.0), (average, 0.0)):
        nn.init.constant_(layer.weight, value)
    for _ in range(3):
        training.update_average(average, model, 0.9)
    assert average.weight.item() == pytest.approx(1 - 0.9**3)


def test_flow_batch_is_presented_as_the_pipeline_does_it():
    dit = DiT(TINY)
    latents, noise = torch.randn(2, 3, 2, 2, 4), torch.randn(2, 3, 2, 2, 4)
    first_frame, given = torch.randn(2, 1, 2, 2, 4), torch.tensor([False, True])
    t = torch.tensor([0.25, 0.5])
    batch = flow_batch(dit, latents, t, noise, first_frame, given)

    # What does the network see in the pipeline, when its latents are just as noisy?
    pipe = Pipeline(presets.replace(presets.NANO, dit=TINY), dit, None, None)
    noisy = latents + t.view(2, 1, 1, 1, 1) * (noise - latents)
    for i, image in enumerate((None, first_frame[1:])):
        seen = []
        condition = pipe.build_condition(noisy[i : i + 1], image)
        euler_sample(
            lambda x, t, condition=condition, seen=seen: seen.append(torch.cat([x, condition], -1)) or x,
            noisy[i : i + 1],
            torch.tensor([1.0, 0.0]),
            image,
        )
        torch.testing.assert_close(batch.x[i : i + 1], seen[0])
    assert batch.asked[:, :, 0, 0, 0].tolist() == [[1, 1, 1], [0, 1, 1]]
    torch.testing.assert_close(batch.velocity, noise - latents)


def test_flow_loss_has_its_closed_form():
    # An answer of 0 to noise 3 and latents 1 is wrong by 2 everywhere; the given frame, wrong by 100, does not count.
    dit = DiT(TINY)
    latents, noise = torch.ones(1, 2, 2, 2, 4), 3 * torch.ones(1, 2, 2, 2, 4)
    batch = flow_batch(dit, latents, torch.tensor([0.5]), noise, latents[:, :1], torch.tensor([True]))
    predicted = torch.zeros(1, 2, 2, 2, 4)
    predicted[:, 0] = 102
    assert flow_loss(predicted, batch.velocity, batch.asked).item() == pytest.approx(4)


@pytest.mark.parametrize(("times", "median"), [(FlowTimes("uniform"), 0.5), (FlowTimes(mean=1.0), 0.731)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_have_the_median_that_they_should(times, median, shift):
    times = FlowTimes(times.kind, times.mean, times.std, shift)
    t = times.sample(20_000, generator([0]))
    assert 0 < t.min() and t.max() < 1
    assert t.median().item() == pytest.approx(shift * median / (1 + (shift - 1) * median), abs=0.01)


def test_dropped_prompts_become_the_empty_one():
    features, nothing = tiny_features(2, length=3), tiny_features(1, seed=1, length=1)
    result = drop_condition(features, torch.tensor([False, True]), nothing)
    dit = DiT(TINY)
    x, t = torch.randn(2, 1, 2, 2, 9), torch.rand(2)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    answer = dit(x, result.text, result.pooled, t, result.mask)
    torch.testing.assert_close(answer[:1], dit(x[:1], features.text[:1], features.pooled[:1], t[:1]))
    torch.testing.assert_close(answer[1:], dit(x[1:], nothing.text, nothing.pooled, t[1:]))


def test_step_target_leads_where_the_teachers_steps_lead():
    x, times = torch.randn(2, 1, 2, 2, 4), torch.tensor([[1.0, 0.8], [0.7, 0.5], [0.4, 0.1]])
    there = step_target(lambda x, t: -x * t.view(-1, 1, 1, 1, 1), x, times)
    for i in range(2):
        walked = euler_sample(lambda x, t: -x * t, x[i : i + 1], times[:, i])
        torch.testing.assert_close(x[i : i + 1] + (times[-1, i] - times[0, i]) * there[i], walked)


def test_a_run_does_not_go_on_with_another_recipe(tmp_path):
    recipe = Recipe(steps=4, seed=3)

    def run(recipe: Recipe) -> None:
        train(
            model := nn.Linear(2, 1), lambda seed: (model(torch.ones(1, 2)).sum(), {}), recipe, tmp_path, stop_after=2
        )

    run(recipe)
    run(recipe)
    assert training.load_recipe(tmp_path) == recipe
    with pytest.raises(ValueError, match=r"begun with steps 4 and not 5, seed 3 and not 0: go on with the same"):
        run(Recipe(steps=5))


def test_a_run_does_not_go_on_from_other_weights(tmp_path):
    def run(start: float, origin: str) -> None:
        nn.init.constant_((model := nn.Linear(2, 1)).weight, start)
        nn.init.zeros_(model.bias)
        loss = lambda seed: (model(torch.ones(1, 2)).sum(), {})  # noqa: E731
        folder = tmp_path / origin.split("/")[-1]
        train(model, loss, Recipe(4, origin=origin), folder, stop_after=2, progress=False)

    for _ in range(2):
        run(1.0, "one")
        run(1.0, "./one")  # the same, said otherwise
        run(1.0, "")
        run(2.0, "")  # as if at random: any will do
    assert training.load_recipe(tmp_path / "one").origin == "one"
    with pytest.raises(
        ValueError, match="began with what one was then, and not with these weights: take those, or another folder"
    ):
        run(2.0, "one")
    state = torch.load(tmp_path / "one" / "state.pt")
    del state["recipe"]["origin"], state["began_with"]  # as before they were kept
    torch.save(state, tmp_path / "one" / "state.pt")
    with pytest.raises(ValueError, match="began at random, and not with these weights"):
        run(1.0, "one")


@pytest.mark.parametrize("content", [b"", b"no state", b"half", b"a bit", b"foreign"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, content):
    tiny_run(tmp_path, stop_after=2)
    path = tmp_path / "state.pt"
    if content == b"foreign":
        torch.save(nn.Linear(1, 1), path)
    elif content == b"a bit":
        weight = torch.load(path)["average"]["visual_blocks.0.feed_forward.linear_in.weight"]
        whole = bytearray(path.read_bytes())
        whole[whole.index(weight.numpy().tobytes())] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(path.read_bytes()[:5000] if content == b"half" else content)
    for use in (tiny_run, training.load_recipe, functools.partial(training.load_average, DiT(TINY))):
        with pytest.raises(ValueError, match=r"state.pt is damaged, or no run's state: remove it to begin anew"):
            use(tmp_path)


def test_a_state_that_memory_has_no_room_for_is_not_called_damaged(tmp_path, monkeypatch):
    tiny_run(tmp_path, stop_after=2)

    def full(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        tiny_run(tmp_path)


def test_finished_weights_are_not_gone_on_with_as_a_run(tmp_path):
    training.save_average(DiT(TINY), tmp_path)
    with pytest.raises(ValueError, match="finished weights and no run that could go on"):
        tiny_run(tmp_path)


def test_a_file_in_the_folders_place_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="is a file, or lies below one: name a folder"):
            tiny_run(folder)


CHECKPOINT = ("--vae", "nano", "--text", "nano")


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        (train_vae, ()),
        (train_text, ()),
        (train_dit, ("--start-from", "nano", *CHECKPOINT)),
        (distill, ("nocfg", "--teacher", "nano", "--clips", "clips", *CHECKPOINT)),
    ],
)
def test_a_stage_does_not_begin_in_another_ones_folder_nor_take_a_checkpoints_name(
    monkeypatch, tmp_path, stage, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "train", lambda *_, **__: pytest.fail("it trains"))
    several = stage in (train_vae, train_text)  # runs below the folder, and not one in it
    tiny_run(tmp_path / "a" if several else tmp_path / "a" / "frames", stop_after=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "origin.txt").touch()
    before = set(tmp_path.rglob("*"))
    for folder, words in (
        ("a", "is the run of another stage" if several else "holds other runs"),
        ("b", "holds clips"),
        ("nano", "would hide the checkpoint of that name"),
    ):
        monkeypatch.setattr("sys.argv", ["stage", *arguments, "--folder", folder])
        with pytest.raises(ValueError, match=f"--folder {folder} {words}.*: take another"):
            stage.main()
    assert set(tmp_path.rglob("*")) == before


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with locked(tmp_path, "taken"), pytest.raises(ValueError, match="another process trains in"):
        tiny_run(tmp_path)
    tiny_run(tmp_path)


def test_a_state_that_the_disk_has_no_room_for_is_said_in_one_line(tmp_path, monkeypatch):
    tiny_run(tmp_path, stop_after=2)
    before = (tmp_path / "state.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*state.pt .*make room"):
        tiny_run(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"state.pt", "loss.csv", "loss.png"}


def test_gradient_checkpointing_changes_no_gradient():
    dit, features = DiT(TINY), tiny_features(2)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator([0]))
    again = copy.deepcopy(dit)
    x, t = torch.randn(2, 1, 2, 2, 9), torch.rand(2)
    dit(x, features.text, features.pooled, t).square().mean().backward()
    with training.gradient_checkpointing(again):
        again(x, features.text, features.pooled, t).square().mean().backward()
    for a, b in zip(dit.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradient_checkpointing_keeps_less_for_the_gradient():
    """Bytes that a forward of nano-10s's DiT leaves behind for the gradient: of each block what goes into it."""
    config = presets.LONG.dit
    dit, x, t = DiT(config), torch.randn(1, 3, 16, 16, config.input_channels), torch.rand(1)
    text, pooled = torch.randn(1, 3, config.text_dim), torch.randn(1, config.pooled_dim)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_kept(context) -> int:
        kept.clear()
        with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = dit(x, text, pooled, t)
        weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
        assert out.requires_grad
        return sum(size for place, size in kept.items() if place not in weights)

    assert bytes_kept(training.gradient_checkpointing(dit)) < bytes_kept(contextlib.nullcontext()) / 10


def test_a_run_with_gradient_checkpointing_is_the_same_run(tmp_path, monkeypatch):
    blocks, forward = [], training.checkpoint
    monkeypatch.setattr(training, "checkpoint", lambda *args, **how: blocks.append(1) or forward(*args, **how))
    plain, _ = tiny_run(tmp_path / "plain", steps=3, bf16=True)
    assert not blocks
    forgetful, _ = tiny_run(tmp_path / "forgetful", steps=3, bf16=True, checkpointing=True)
    assert len(blocks) == 3 * len(plain.visual_blocks)
    for a, b in zip(plain.parameters(), forgetful.parameters(), strict=True):
        assert a.equal(b)


def test_gradient_checkpointing_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="for a DiT and not for a Linear: leave it out"):
        training.train(nn.Linear(2, 2), lambda seed: (torch.zeros(()), {}), Recipe(1, checkpointing=True), tmp_path)


def test_a_command_answers_in_one_line_and_leaves_no_traceback(capsys):
    for error, code, message in (
        (ValueError("no such run"), 2, "error: no such run\n"),
        (KeyboardInterrupt(), 130, "\nstopped"),
    ):
        with pytest.raises(SystemExit) as ended, training.refusals_in_one_line():
            raise error
        assert ended.value.code == code and capsys.readouterr().err.startswith(message)


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    training.save_average(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} was written for another model: .*Begin another run") as caught:
        training.load_average(nn.Linear(2, 3), tmp_path)
    assert "\n" not in str(caught.value)


def test_training_does_not_begin_with_a_checkpoint_of_other_sizes(tmp_path):
    save_small_checkpoint(tmp_path / "small")
    with pytest.raises(ValueError, match="has other sizes than nano's"):
        load_dit(tmp_path / "small")


def test_a_teacher_with_nabla_is_taken_without():
    teacher = load_dit(SHIPPED / "nano-10s")
    assert teacher.config == presets.DIT
    weights = Pipeline.load("nano-10s").dit.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in teacher.state_dict().items())


def test_a_recipe_that_nobody_wrote_down_is_not_made_up(tmp_path):
    training.save_average(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="does not say its recipe"):
        training.load_recipe(tmp_path)


def test_a_batch_that_is_not_a_number_leaves_the_weights_alone(tmp_path):
    weights = []

    def loss(seed):
        weights.append(model.weight.detach().clone())
        return model(torch.ones(1, 2)).sum() * (torch.nan if seed[1] == 1 else 1), {}

    model = nn.Linear(2, 2)
    train(model, loss, Recipe(4, warmup=0), tmp_path, progress=False)
    assert not weights[0].equal(weights[1]) and weights[1].equal(weights[2]) and not weights[2].equal(weights[3])


def test_guided_target_is_guidance_by_hand():
    dit, features, nothing = DiT(TINY), tiny_features(2), tiny_features(1, seed=5, length=2)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator([0]))
    batch = FlowBatch(torch.randn(2, 1, 2, 2, 9), torch.rand(2), torch.zeros(()), torch.ones(()))
    expected = []
    for i in range(2):  # one at a time, without padding
        x, t = batch.x[i : i + 1], batch.t[i : i + 1]
        asked = dit(x, features.text[i : i + 1], features.pooled[i : i + 1], t)
        not_asked = dit(x, nothing.text, nothing.pooled, t)
        expected.append(not_asked + 1.5 * (asked - not_asked))
    torch.testing.assert_close(guided_target(dit, batch, features, nothing, 1.5), torch.cat(expected))


def test_sixteen_steps_are_taught_where_three_of_the_teacher_lead():
    """Each sample from its own time of the schedule to the next; a given first frame stays where it is."""
    schedule = flow_schedule(16, 3.0)

    class Teacher:
        config = TINY

        def __call__(self, x, text, pooled, t, mask, rope_scale):
            return x[..., :4] * t.view(-1, 1, 1, 1, 1)

    starts = torch.tensor([0, 7, 15])
    x, asked = torch.randn(3, 2, 2, 2, 9), torch.ones(3, 2, 1, 1, 1)
    asked[1, 0] = 0
    batch = FlowBatch(x, schedule[starts], torch.zeros(()), asked)
    taught = distill._several_steps(Teacher(), batch, tiny_features(3), schedule)
    for i, start in enumerate(starts):
        there, times = x[i, ..., :4], torch.linspace(float(schedule[start]), float(schedule[start + 1]), 4)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            there = there + (t_next - t) * there * t * asked[i]
        landed = x[i, ..., :4] + (schedule[start + 1] - schedule[start]) * taught[i]
        torch.testing.assert_close(landed, there)


@pytest.mark.parametrize(("window", "learns"), [((17, 1, 1), False), ((1, 1, 1), True)])
def test_the_sparse_stage_teaches_what_full_attention_answers(monkeypatch, tmp_path, long_clips, window, learns):
    """Where NABLA keeps every tile there is nothing to learn; nor in the steps with full attention, at rate 0."""
    run_sparse(monkeypatch, tmp_path, long_clips, 3, window, learning_rate=0.0)
    row = training.read_rows(tmp_path / "loss.csv")[0]
    assert float(row["loss_full"]) < 1e-9
    assert float(row["loss_nabla"]) > 1e-3 if learns else float(row["loss_nabla"]) < 1e-9


def test_the_sparse_stage_trains_full_attention_in_every_third_step(monkeypatch, tmp_path, long_clips):
    """The same weights: they change in that step too."""
    ends = []
    for stop in (2, 3):
        run_sparse(monkeypatch, tmp_path, long_clips, stop)
        ends.append(torch.load(tmp_path / "state.pt")["model"])
    name = "visual_blocks.0.self_attention.to_q.weight"
    assert ends[0].keys() == ends[1].keys() and not ends[0][name].equal(ends[1][name])


def test_nocfg_is_taught_its_teachers_guidance_and_long_positions_of_twice_the_size(monkeypatch, tmp_path, long_clips):
    """The first step's loss, of a student that is still its teacher, by hand."""
    monkeypatch.setattr(distill, "DISTILLATION_CLIPS", 8)
    monkeypatch.setattr(distill, "LONG_CLIPS_AT_FIRST", 8)
    monkeypatch.setattr(distill, "LONG_BATCH", 2)
    monkeypatch.setattr(distill, "train", functools.partial(train, stop_after=1, progress=False))
    nano, text_encoder = load_dit(SHIPPED / "nano"), load_text_encoder(SHIPPED / "nano")
    nothing, clips = encode_text(text_encoder, [""]), ClipStore(tmp_path / "clips", load_vae(SHIPPED / "nano"))

    recipe = replace(distill.RECIPES["nocfg"], bf16=False)
    distill.distill(tmp_path / "nocfg", presets.NOCFG, nano, clips, text_encoder, recipe)
    batch, features = draw_batch([0, 0, 0], nano, clips, 8, text_encoder, nothing)
    empty = encode_text(text_encoder, [""] * len(batch.t))
    with torch.no_grad():
        asked, not_asked = (nano(batch.x, f.text, f.pooled, batch.t, f.mask) for f in (features, empty))
    guided = not_asked + 2.0 * (asked - not_asked)
    wanted = float(((guided - asked).square() * batch.asked).sum() / batch.asked.expand_as(asked).sum())
    assert losses(tmp_path / "nocfg") == pytest.approx([wanted], rel=1e-5) and wanted > 1e-3

    recipe = replace(distill.RECIPES["long"], bf16=False)
    distill.train_long(tmp_path / "long", presets.LONG, nano, long_clips, text_encoder, recipe)
    student = distill.start_from(nano, presets.LONG)
    batch, features = draw_batch([0, 0, 0], student, long_clips, 8, text_encoder, nothing, batch_size=2)
    with torch.no_grad(), training.autocast_dit(student):
        answers = [
            student(batch.x, features.text, features.pooled, batch.t, features.mask, (scale,) * 3)
            for scale in (2.0, 1.0)
        ]
    wanted, unscaled = (float(flow_loss(answer, batch.velocity, batch.asked)) for answer in answers)
    assert losses(tmp_path / "long") == pytest.approx([wanted], rel=1e-5)
    assert unscaled != pytest.approx(wanted, rel=1e-3)


def test_a_batch_has_as_many_without_prompt_and_with_first_frame_as_it_should(tmp_path):
    nano, text_encoder = load_dit(SHIPPED / "nano"), load_text_encoder(SHIPPED / "nano")
    nothing, clips = encode_text(text_encoder, [""]), ClipStore(tmp_path / "clips", load_vae(SHIPPED / "nano"))
    for prompt_dropped in (0.1, 0.3):
        batch, features = draw_batch(
            [5, 0, 0], nano, clips, 8, text_encoder, nothing, batch_size=400, prompt_dropped=prompt_dropped
        )
        given = batch.asked[:, 0].flatten() == 0
        assert abs(given.float().mean() - 0.3) < 0.09  # four standard deviations
        assert batch.x[given, 0, ..., -1].eq(1).all() and batch.x[~given, ..., -1].eq(0).all()
        without = (features.pooled == nothing.pooled).all(dim=1)
        assert abs(without.float().mean() - prompt_dropped) < 4 * (prompt_dropped * (1 - prompt_dropped) / 400) ** 0.5
        assert features.mask[without].sum(dim=1).eq(nothing.mask.sum()).all()


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory) -> ClipStore:
    sampling = presets.LONG.sampling
    return ClipStore(tmp_path_factory.mktemp("clips"), load_vae(SHIPPED / "nano"), sampling.num_frames, sampling.height)


def run_sparse(monkeypatch, folder, clips, stop, window=(1, 1, 1), **recipe):
    config = replace(presets.LONG, dit=replace(presets.LONG.dit, nabla=NablaConfig(P=0.6, window=window)))
    recipe = replace(distill.RECIPES["sparse"], bf16=False, **recipe)
    monkeypatch.setattr(distill, "SPARSE_CLIPS", 8)
    monkeypatch.setattr(distill, "LONG_BATCH", 2)
    monkeypatch.setattr(distill, "train", functools.partial(train, stop_after=stop, progress=False))
    nano = SHIPPED / "nano"
    distill.train_sparse(folder, config, load_dit(nano), clips, load_text_encoder(nano), recipe)


def test_a_step_takes_the_mean_gradient_of_its_batches_clipped(monkeypatch, tmp_path):
    """By hand, with plain gradient descent in AdamW's place, which hardly notices how long a gradient is."""
    model = nn.Linear(2, 1, bias=False)
    monkeypatch.setattr(training, "build_optimizers", lambda model, recipe: [torch.optim.SGD(model.parameters())])
    gradients = torch.randn(3, 1, 2, generator=generator([3]))

    def loss(seed):
        return (model.weight * gradients[seed[2]]).sum(), {}

    mean = gradients.mean(dim=0)
    for clip in (0.5 * float(mean.norm()), 2 * float(mean.norm())):
        nn.init.zeros_(model.weight)
        folder = tmp_path / f"{clip}"
        recipe = Recipe(1, learning_rate=0.1, warmup=0, accumulate=3, clip_norm=clip, bf16=False, ema=0.999)
        average = train(model, loss, recipe, folder, progress=False)
        wanted = -0.1 * mean * min(1, clip / float(mean.norm()))
        torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-4, atol=0)
        torch.testing.assert_close(average.weight, wanted * (1 - 2 / 11), rtol=1e-4, atol=0)  # decay (1 + 1)/(10 + 1)


def test_what_a_run_leaves_are_its_averaged_weights(tmp_path):
    model, average = tiny_run(tmp_path)
    left = training.load_average(DiT(TINY), tmp_path).state_dict()
    assert all(weight.equal(left[name]) for name, weight in average.state_dict().items())
    assert not all(weight.equal(left[name]) for name, weight in model.state_dict().items())


def test_averaged_weights_come_with_the_models_buffers(tmp_path):
    model = nn.BatchNorm1d(2)
    average = train(model, lambda seed: (model(torch.randn(8, 2) + 5).sum(), {}), Recipe(3), tmp_path, progress=False)
    assert average.running_mean.equal(model.running_mean) and model.running_mean.min() > 1


def test_muon_that_finds_no_matrix_is_a_mistake():
    with pytest.raises(ValueError, match="'no_such' is in no matrix's name"):
        training.build_optimizers(nn.Linear(2, 2), Recipe(1, muon="no_such"))


def test_captions_that_say_the_same_are_right_for_each_others_clips():
    red, blue = {"colour": "red", "shape": "circle", "motion": "left"}, {"colour": "blue", "shape": "square"}
    crossed = {**red, "shape": "square"}, {**blue, "shape": "circle"}
    said = [
        Caption("red is above blue", None, (red, blue), "above"),
        Caption("blue is below red", None, (blue, red), "below"),
        Caption("red is below blue", None, (red, blue), "below"),
        Caption("on black", "black", (red, blue), "above"),
        Caption("the other way round", None, crossed, "above"),
    ]
    same = torch.eye(5)
    same[:2, :2] = 0.5
    assert same_said(said).equal(same)


def test_tokenizers_of_the_same_captions_are_the_same_files(monkeypatch, tmp_path):
    """The library's trainer takes words in an order that is another each time."""
    monkeypatch.setattr(train_text, "TOKENIZER_CAPTIONS", 400)
    for folder in (tmp_path / "a", tmp_path / "b"):
        train_text.train_tokenizers(folder)
    for name, special in (("qwen", train_text.QWEN_SPECIAL), ("clip", train_text.CLIP_SPECIAL)):
        a, b = (tmp_path / folder / f"{name}_tokenizer" / "tokenizer.json" for folder in "ab")
        assert a.read_bytes() == b.read_bytes()
        tokenizer = Backend.from_file(str(a))
        assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(special)


def test_attention_written_out_is_the_same_attention():
    dit, features = DiT(TINY), tiny_features(2)
    x, t = torch.randn(2, 1, 2, 2, 9), torch.rand(2)
    expected = dit(x, features.text, features.pooled, t, features.mask)
    with training.autocast_dit(dit):
        torch.testing.assert_close(dit(x, features.text, features.pooled, t, features.mask), expected)
    assert training.dit.attention is attention


def test_nabla_chooses_the_tiles_in_training_that_it_chooses_in_sampling():
    """Its sums stay in float32 under autocast: in bf16 the cut falls elsewhere."""
    grid, config = (16, 16, 16), presets.LONG.dit.nabla
    q, k = (torch.randn(2, 1, 6, 16 * 256, 32, generator=generator([1])) * 6).bfloat16()
    expected, chosen = nabla.block_map(q, k, grid, config), nabla.block_map
    with torch.autocast("cpu", torch.bfloat16):
        assert not nabla.block_map(q, k, grid, config).equal(expected)
        with training.autocast_dit(DiT(TINY)):
            assert nabla.block_map(q, k, grid, config).equal(expected)
    assert nabla.block_map is chosen


def test_qwen_is_asked_for_the_next_token_and_not_for_the_one_it_is_given(monkeypatch, tmp_path):
    class Repeats(nn.Module):
        """Sure that the next token is the one that it sees."""

        def __init__(self):
            super().__init__()
            self.sure = nn.Parameter(torch.tensor(30.0))

        def forward(self, ids):
            logits = self.sure * nn.functional.one_hot(ids, presets.QWEN.vocab_size)
            return logits, torch.zeros(*ids.shape, len(train_text.ATTRIBUTES))

    folder = SHIPPED / "nano" / "qwen_tokenizer"
    shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(train_text, "LanguageModel", Repeats)
    monkeypatch.setattr(train_text, "train", functools.partial(train, stop_after=1, progress=False))
    train_text.train_qwen(tmp_path)
    (row,) = training.read_rows(tmp_path / "qwen" / "loss.csv")
    assert float(row["next_token"]) > 20 and float(row["answer_accuracy"]) < 0.1


# ---------------------------------------------------------------------------------------------- VAE


def test_the_vaes_loss_is_what_it_is_by_hand():
    """Reconstruction, with more weight at edges and on colour, and KL; one pixel is white, all others are black."""
    mean, logvar = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    video = torch.full((2, 3, 1, 8, 8), -1.0)
    video[:, :, :, 3, 5] = 1.0
    error = 0.1 * torch.randn(video.shape)
    noise = torch.randn(mean.shape)

    def decode(z: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(z, mean + (logvar / 2).exp() * noise)
        return video + error

    stub = SimpleNamespace(encode=lambda video: Posterior(mean, logvar), decode=decode)
    value, figures = train_vae.vae_loss(stub, video, noise)

    e = error.numpy()[:, :, 0].astype(np.float64)
    weights = np.ones((2, 1, 8, 8))
    weights[:, :, 2:5, 4:7] = 3.0  # the white one and its neighbours, whose values span all of -1 to 1
    colour = e - e.mean(axis=1, keepdims=True)
    reconstruction = (weights * (abs(e) + 2 * e**2 + abs(colour) + colour**2)).mean()
    m, variance = mean.numpy(), np.exp(logvar.numpy())
    kl = np.mean((m**2 + variance - 1 - np.log(variance)) / 2)
    assert float(value) == pytest.approx(reconstruction + 5e-5 * kl, rel=1e-5)
    assert figures["kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["frame_psnr"] == pytest.approx(-10 * np.log10((e**2).mean() / 4), rel=1e-5)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(4, 4, 8, 8), blocks_per_stage=1, norm_groups=2, scaling_factor=1.0))


def test_a_single_frame_through_2d_convs_is_the_same(vae):
    video = draw_videos([sample_scene([1, i]) for i in range(2)], num_frames=1)
    expected = vae.encode(video).mean, vae.decode(vae.encode(video).mean)
    with single_frame(vae):
        mean = vae.encode(video).mean
        torch.testing.assert_close((mean, vae.decode(mean)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(vae.encode(video).mean, expected[0])  # and nothing is left behind


def test_a_single_frame_teaches_nothing_about_frames_before(vae):
    """Kernels for the two frames before, upsampling's too, stay as they are until there are clips."""
    vae, video = copy.deepcopy(vae), draw_videos([sample_scene([1, 0])], num_frames=1)
    with single_frame(vae):
        vae.decode(vae.encode(video).mean).square().sum().backward()
    for name, conv in vae.named_modules():
        if isinstance(conv, CausalConv3d):
            assert conv.weight.grad[:, :, -1].any() and not conv.weight.grad[:, :, :-1].any(), name


def test_standardised_latents_decode_to_the_same_video(vae):
    vae = copy.deepcopy(vae)
    video = draw_videos([sample_scene([1, i]) for i in range(8)], num_frames=5)
    with torch.no_grad():
        before, posterior = vae.decode(vae.encode(video).mean), vae.encode(video)
        standardise(vae, count=8)
        after = vae.encode(video)
        torch.testing.assert_close(vae.decode(after.mean), before, rtol=1e-3, atol=1e-4)
    # The noise has become as much larger or smaller as the latents: one straight line maps the one to the other.
    scale = (posterior.logvar - after.logvar).div(2).exp()
    rise, rise_before = after.mean.diff(dim=-1), posterior.mean.diff(dim=-1)
    torch.testing.assert_close(rise * scale[..., 1:], rise_before, rtol=1e-3, atol=1e-4)
    assert after.mean.mean(dim=(0, 2, 3, 4)).abs().max() < 0.5


@pytest.mark.parametrize("language", ["english", "russian"])
def test_tokens_are_about_the_object_that_their_words_describe(language):
    """Each object's tokens put together are its noun and its motion, and nothing of the other's."""
    tokenizer = Backend.from_file(str(SHIPPED / "nano" / "qwen_tokenizer" / "tokenizer.json"))
    for i in range(50):
        said = caption(sample_scene([i], num_objects=2), language, np.random.default_rng(i))
        text = conversation(said)
        encoded = tokenizer.encode(text)
        where = tokens_about(said, encoded.offsets)
        begin = text.index(said.text)
        for thing in (0, 1):
            words = [text[slice(*encoded.offsets[s])].strip() for s in where if where[s] == thing]
            expected = [c for c, about in zip(said.text, said.about, strict=True) if about == thing]
            assert "".join(words).replace(" ", "") == "".join(expected).replace(" ", "")
        assert all(begin <= encoded.offsets[s][0] for s in where)


def test_confetti_shows_many_colours():
    colours = np.unique(draw_confetti(np.random.default_rng(0)).reshape(-1, 3), axis=0)
    assert len(colours) > 200 and (colours.max(0) - colours.min(0)).min() > 120


def test_clips_on_disk_do_not_depend_on_when_they_were_written(vae, tmp_path):
    at_once = ClipStore(tmp_path / "at_once", vae, num_frames=5)
    at_once.fill(20)
    ClipStore(tmp_path / "in_parts", vae, num_frames=5).fill(3)
    in_parts = ClipStore(tmp_path / "in_parts", vae, num_frames=5)  # a new process
    in_parts.fill(20)
    indices = np.array([0, 7, 8, 19])
    a, b = at_once.read(indices, 20), in_parts.read(indices, 20)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0].shape == (4, 2, 8, 8, 16) and a[1].shape == (4, 1, 8, 8, 16)

    video = draw_videos([at_once.scene(i) for i in range(8)], num_frames=5)
    with torch.no_grad():
        first = vae.encode(video[:, :, :1]).mean.permute(0, 2, 3, 4, 1)[7:]
    torch.testing.assert_close(a[1][1:2], first, rtol=0.05, atol=0.05)  # bf16 and float16


def test_clips_that_another_process_has_drawn_are_taken(vae, tmp_path, monkeypatch):
    ours = ClipStore(tmp_path, vae, num_frames=5)
    ours.fill(8)
    theirs = ClipStore(tmp_path, vae, num_frames=5)
    theirs.fill(16)
    monkeypatch.setattr(ours, "_encode", None)
    indices = np.arange(16)
    assert all(torch.equal(x, y) for x, y in zip(ours.read(indices, 16), theirs.read(indices, 16), strict=True))


def test_clips_drawn_before_ctrl_c_are_not_drawn_again(vae, tmp_path, monkeypatch):
    store, drawn = ClipStore(tmp_path, vae, num_frames=5), []
    encode = ClipStore._encode

    def stop_at_the_third(self, scenes):
        drawn.append(len(scenes))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return encode(self, scenes)

    monkeypatch.setattr(ClipStore, "_encode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        store.fill(32)
    again = ClipStore(tmp_path, vae, num_frames=5)
    assert again.count == 16
    again.fill(32)
    assert len(drawn) == 5  # two, the one that was stopped, and the other two
    assert again.read(np.arange(32), 32)[0].flatten(1).any(dim=1).all()


def test_clips_are_drawn_again_where_somebody_removed_them(vae, tmp_path):
    store = ClipStore(tmp_path, vae, num_frames=5)
    before = store.read(np.arange(8), 8)
    (tmp_path / "latents.f16").unlink()
    after = ClipStore(tmp_path, vae, num_frames=5).read(np.arange(8), 8)
    assert all(torch.equal(x, y) and x.any() for x, y in zip(before, after, strict=True))


def test_clips_are_not_drawn_into_a_folder_of_something_else(vae, tmp_path):
    (tmp_path / "count.json").write_text("somebody's")
    with pytest.raises(ValueError, match="holds other things than clips: name a new folder"):
        ClipStore(tmp_path, vae, num_frames=5)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody's"]


def test_clips_that_were_cut_short_are_refused(vae, tmp_path):
    ClipStore(tmp_path, vae, num_frames=5).fill(8)
    with (tmp_path / "latents.f16").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="latents.f16 has 1,000 bytes in place of .*: remove it"):
        ClipStore(tmp_path, vae, num_frames=5)


def test_a_full_disk_is_said_and_does_not_kill_the_process(vae, tmp_path, monkeypatch):
    store = ClipStore(tmp_path, vae, num_frames=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="has 1 MB free, too few for more clips: make room"):
        store.fill(8)
    assert store.count == 0


def test_clips_on_disk_of_another_world_are_refused(vae, tmp_path):
    ClipStore(tmp_path, vae, num_frames=5)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_in.bias += 1  # latents do not depend on it
    ClipStore(tmp_path, other, num_frames=5)
    with torch.no_grad():
        other.quant_conv.bias += 1
    for options in ({"seed": 5}, {"num_frames": 9}, {"vae": other}):
        with pytest.raises(ValueError, match="another world, VAE or number of frames: name another folder"):
            ClipStore(tmp_path, **{"vae": vae, "num_frames": 5} | options)
    (tmp_path / "origin.txt").unlink()  # as folders were that only knew their world
    with pytest.raises(ValueError, match="another world, VAE or number of frames: name another folder"):
        ClipStore(tmp_path, vae, num_frames=5)
