"""Fine-tuning from a folder of clips: what is trained, exactly resumed, held out, written, and refused."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import ROOT
from kandinsky5 import PRESETS, Pipeline, video_io
from kandinsky5.config_file import save_config
from kandinsky5.extras import lora
from kandinsky5.training import curves, loop, report, state
from kandinsky5.training.clip_loss import Conditioning, clip_loss, held_out_loss
from kandinsky5.training.curves import read_rows
from kandinsky5.training.data import Clips
from kandinsky5.training.finetune import finetune, main
from kandinsky5.training.flow import FlowTimes
from kandinsky5.training.folder import ClipSettings
from kandinsky5.training.loop import generator, train
from kandinsky5.training.modes import training_precision
from kandinsky5.training.previews import Previews
from kandinsky5.training.recipe import Recipe

WORDS = ["a fox", "a red fox in snow", "a dog", "a cat sleeps", "a bird", "two birds"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six clips of 5 frames in two shapes."""
    folder = tmp_path_factory.mktemp("clips")
    for i, words in enumerate(WORDS):
        size = (32, 48) if i % 3 else (48, 32)
        frames = torch.randint(0, 256, (6, *size, 3), generator=generator([i]), dtype=torch.uint8)
        video_io.write_video(folder / f"{i}.mp4", frames, 24)
        (folder / f"{i}.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(checkpoint, clips, cache, tmp_path, monkeypatch):
    """Runs the command on the small checkpoint; returns the folder of the run."""
    monkeypatch.setattr(curves, "plot_losses", lambda *paths: None)

    def finetune_small(*arguments, to="run"):
        usual = ["--steps", "4", "--batch-size", "2", "--sample-every", "100", "--sample-steps", "1"]
        usual += [] if "--full" in arguments else ["--rank", "4"]
        places = [checkpoint, "--clips", clips, "--to", tmp_path / to, "--cache", cache, "--dtype", "float32"]
        finetune([str(argument) for argument in (*places, *usual, *arguments)])
        return tmp_path / to

    return finetune_small


def test_a_lora_is_trained_and_samples(run, checkpoint, capsys):
    folder = run("--trigger", "Foxy,", "--export", "--sample-every", "2")
    made = lora.load(folder / "lora.safetensors")
    assert made.trigger == "Foxy," and len(list(made.updates())) == 32
    assert all(update.B.any() for _, update in made.updates())
    assert {lora.load(folder / place).fingerprint for place in ("official", "diffusers.safetensors")} == {
        made.fingerprint
    }
    printed = capsys.readouterr().out
    assert "--lora" in printed and str(folder / "lora.safetensors") in printed
    video, _ = video_io.read_video(folder / "samples" / "step_000004.mp4")
    assert video.shape[0] == 5 and (folder / "samples" / "step_000002.png").is_file()
    rows = read_rows(folder / "samples.csv")
    assert [row["step"] for row in rows] == ["2", "4"] and rows[0]["loss"] != rows[1]["loss"]
    pipe = Pipeline.load(checkpoint, dtype="float32")
    plain = pipe("a fox", num_inference_steps=1, progress=False)
    pipe.load_lora(folder / "lora.safetensors", 100)
    assert not pipe("a fox", num_inference_steps=1, progress=False).equal(plain)


def test_what_is_only_shown_costs_no_run(run, tmp_path, monkeypatch, capsys):
    """Neither samples nor plots can be written, where folders and files of these names are in the way."""
    (tmp_path / "run" / "held_out.png").mkdir(parents=True)
    (tmp_path / "run" / "samples").touch()
    monkeypatch.setattr(curves, "plot_losses", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    assert (run("--sample-every", "2") / "lora.safetensors").is_file()
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("step_000002", "step_000004", "disk full"))


@pytest.mark.parametrize("how", [["--ema", "0.9"], ["--full", "--modules", r"visual_blocks\.0"]])
def test_a_resumed_run_equals_an_unbroken_one(run, how):
    """With a cache, buckets, accumulation and gradient checkpointing."""
    how += ["--accumulate", "2", "--checkpointing"]
    whole = run(*how, to="whole")
    for stop in (["--stop-after", "1"], ["--stop-after", "3"], []):
        parts = run(*how, *stop, to="parts")
    out = "checkpoint/dit.safetensors" if "--full" in how else "lora.safetensors"
    assert (whole / out).read_bytes() == (parts / out).read_bytes()
    whole, parts = (torch.load(folder / "state.pt") for folder in (whole, parts))
    assert all(x.equal(parts["model"][name]) for name, x in whole["model"].items())


def test_full_training_changes_what_was_asked_for_alone(run, checkpoint):
    folder = run("--full", "--modules", r"visual_blocks\.0.*to_q")
    before, after = load_file(checkpoint / "dit.safetensors"), load_file(folder / "checkpoint" / "dit.safetensors")
    changed = {name for name, x in before.items() if not x.equal(after[name])}
    assert changed and all("visual_blocks.0" in name and "to_q" in name for name in changed)
    assert Pipeline.load(folder / "checkpoint")("a fox", num_inference_steps=1, progress=False).shape == (
        1,
        5,
        32,
        48,
        3,
    )


def test_frozen_weights_have_neither_gradients_nor_state(run, monkeypatch):
    seen = {}

    def look(model, loss, recipe, folder, *arguments, **options):
        average = train(model, loss, recipe, folder, *arguments, **options)
        seen["dit"] = next(
            cell.cell_contents for cell in loss.__closure__ if hasattr(cell.cell_contents, "visual_blocks")
        )
        seen["model"] = model
        return average

    monkeypatch.setattr("kandinsky5.training.finetune.train", look)
    folder = run()
    assert not any(p.requires_grad or p.grad is not None for p in seen["dit"].parameters())
    stored = torch.load(folder / "state.pt")
    trained = sum(p.numel() for p in seen["model"].parameters())
    held = sum(x.numel() for one in stored["optimizers"][0]["state"].values() for x in one.values() if x.ndim)
    assert sum(x.numel() for x in stored["model"].values()) == trained and held == 2 * trained


def test_offloaded_blocks_train_the_same(run):
    plain = run("--checkpointing", to="plain")
    blocks = run("--offload", "blocks", to="blocks")
    assert (plain / "lora.safetensors").read_bytes() == (blocks / "lora.safetensors").read_bytes()


def test_checking_writes_nothing(run, capsys):
    assert not run("--check").exists()
    table = capsys.readouterr().out
    assert "6 clips of 6 files" in table and "fits into the memory" in table


@pytest.mark.parametrize("free, encoding, words", [(10**6, 10**7, "encoding"), (10**6, 0, "training"), (10**12, 0, "")])
def test_clips_that_do_not_fit_are_said(run, capsys, monkeypatch, free, encoding, words):
    monkeypatch.setattr(report, "free_memory", lambda device: free)
    monkeypatch.setattr(report, "vae_memory", lambda *sizes: encoding)
    run("--check")
    found = [line for line in capsys.readouterr().out.splitlines() if "does not fit" in line]
    assert len(found) == bool(words) and words in "".join(found)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rank", "0"], "rank 0: give 1 to 64"),
        (["--rank", "65"], "rank 65: give 1 to 64"),
        (["--alpha", "0"], "--alpha 0"),
        (["--modules", "("], "no regular expression"),
        (["--modules", "nothing"], "matches no"),
        (["--full", "--modules", "nothing"], "matches no"),
        (["--full", "--quantize", "int8"], "leave out --quantize"),
        (["--offload", "blocks", "--no-checkpointing"], "--no-checkpointing"),
        (["--full", "--alpha", "2", "--offload", "blocks"], "leave out --alpha, --offload"),
        (["--learning-rate", "0"], "--learning-rate is above 0"),
        (["--steps", "0"], "--steps: .0."),
        (["--shift", "-1"], "--shift and --logit-std are above 0"),
        (["--shift", "0"], "--shift and --logit-std are above 0"),
        (["--logit-std", "nan"], "--shift and --logit-std are above 0"),
        (["--logit-mean", "inf"], "--logit-mean between"),
        (["--hold-out", "100%"], "--hold-out 100%"),
        (["--first-frames", "2"], "--first-frames: .2."),
        (["--sizes", "32"], "no size"),
        (["--prompts", "nothing.txt"], "nothing.txt is missing"),
        (["--alpha", "inf"], "--alpha inf"),
        (["--weight-decay", "nan"], "--weight-decay"),
        (["--warmup", "-1"], "--warmup"),
        (["--seed", str(2**63)], "--seed"),
        (["--sample-steps", "0"], "--sample-steps: .0."),
        (["--stop-after", "0"], "--stop-after: .0."),
        (["--full", "--export"], "--export is for LoRAs"),
        (["--shard"], "with torchrun"),
        (["--sequence", "2"], "with torchrun"),
        (["--sequence", "0"], "--sequence 0: 1 processes"),
        (["--trigger", "x" * 1001], "--trigger has 1,001"),
    ],
)
def test_wrong_options_cost_one_line_and_no_file(run, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        run(*arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_does_not_write_into_what_it_reads_or_others_wrote(run, clips, tmp_path):
    before = sorted(clips.rglob("*"))
    for place in (clips, clips / "run", clips / ".." / clips.name / "run"):
        with pytest.raises(ValueError, match="is in --clips"):
            run(to=place)
    with pytest.raises(ValueError, match="--cache"):
        run("--cache", clips / "cache")
    assert sorted(clips.rglob("*")) == before
    run("--cache", clips / ".cache", "--check")  # hidden folders are not read
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="README.md of something else"):
        run(to="mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_tensorboard_is_given_what_the_logs_say(run, monkeypatch):
    """Through a stand-in for the library, which the tests do not need."""
    told: dict[str, dict[tuple[str, int], float]] = {}

    class Writer:
        def __init__(self, folder):
            self.told = told[os.path.basename(folder)] = {}

        def add_scalar(self, name, value, step):
            self.told[name, step] = value

        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setitem(sys.modules, "tensorboard", Namespace(__spec__="found"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Namespace(SummaryWriter=Writer))
    folder = run("--tensorboard", "--sample-every", "2")
    for log in ("loss", "samples"):
        rows = read_rows(folder / f"{log}.csv")
        assert rows and told[log] == {
            (name, int(row["step"])): float(value) for row in rows for name, value in row.items() if name != "step"
        }


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_is_missed_before_the_run(run):
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run("--tensorboard")


def test_tensorboard_writes_events_that_it_reads(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 4)]
    for row in rows:
        curves.append_row(tmp_path / "loss.csv", row)
    for _ in range(2):  # the second time instead of the first
        curves.write_events(tmp_path / "loss.csv", tmp_path / "events")
    found = reader.EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    assert [(event.step, round(event.value, 6)) for event in found] == [(r["step"], round(r["loss"], 6)) for r in rows]


def test_prompts_are_utf_8(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("лиса".encode("cp1251"))
    with pytest.raises(ValueError, match="prompts.txt is not UTF-8"):
        run("--prompts", tmp_path / "prompts.txt")


@torch.no_grad()
def test_samples_next_to_each_other_have_one_shape(encoded, clips, tmp_path):
    pipe, found = encoded
    options = Namespace(prompts=None, trigger="", sample_steps=1, to=tmp_path)
    shapes = {(r.height, r.width) for r in Previews.prepare(pipe, options, found).requests}
    assert len({clip.size for clip in found.clips}) == 2 and shapes == {(32, 48)}


def test_a_run_resumes_with_its_own_settings_only(run):
    run("--stop-after", "1", "--first-frames", "0.5")
    with pytest.raises(ValueError, match="began with --rank 4, not 5, .*--first-frames 0.5: .*another --to"):
        run("--rank", "5")
    with pytest.raises(ValueError, match="began with no --trigger, other clips or captions: "):
        run("--trigger", "Foxy", "--first-frames", "0.5")
    run("--export", "--first-frames", "0.5")


def test_renamed_clips_would_come_in_another_order(run, clips, tmp_path):
    same = shutil.copytree(clips, tmp_path / "same")
    run("--stop-after", "1")
    for suffix in ("mp4", "txt"):
        (same / f"0.{suffix}").rename(same / f"9.{suffix}")
    with pytest.raises(ValueError, match="began with clips of other names"):
        run("--clips", same)


@pytest.mark.parametrize("name", ["t2i-lite-sft", "i2i-lite-sft"])
def test_image_models_are_refused(clips, tmp_path, name):
    save_config(PRESETS[name], tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"{name} makes images"):
        finetune([str(tmp_path), "--clips", str(clips), "--to", str(tmp_path / "run"), "--check"])


def test_a_lora_is_no_checkpoint_to_start_from(run, clips, tmp_path, capsys):
    made = run() / "lora.safetensors"
    assert main([str(made), "--clips", str(clips), "--to", str(tmp_path / "other")]) == 2
    assert "is a LoRA and no checkpoint" in capsys.readouterr().err and not (tmp_path / "other").exists()


SLOWLY = """
import functools, sys, time
from kandinsky5.training import curves, data, finetune, loop
curves.plot_losses = lambda *paths: None
checksum, take_step = data._checksum, loop._take_step
data._checksum = lambda tensors: time.sleep(0.1) or checksum(tensors)  # of each entry of the cache
loop._take_step = lambda *run: time.sleep(0.03) or take_step(*run)  # so that no run reaches step 500
finetune.train = functools.partial(finetune.train, save_seconds=0)  # with each row of the log
sys.exit(finetune.main())
"""


@pytest.mark.stages
@pytest.mark.skipif(os.name == "nt", reason="sends signals, which on Windows end a process at once")
def test_killed_at_random_moments_it_ends_at_the_same_bytes(checkpoint, clips, tmp_path):
    """SIGKILL in 20 runs, SIGTERM in five, each a moment after a new entry of the cache, or after a new state."""
    options = ["--steps", "500", "--rank", "4", "--accumulate", "2", "--dtype", "float32"]

    def begin(to):
        command = [sys.executable, "-c", SLOWLY, checkpoint, "--clips", clips, "--to", tmp_path / to, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([str(c) for c in command], env=environment, stderr=subprocess.DEVNULL)

    def seen(pattern):
        return {(path, path.stat().st_mtime_ns) for path in (tmp_path / "parts").glob(pattern)}

    random, unfinished = np.random.default_rng(0), 0
    for i in range(25):
        pattern = "cache/[!.]*" if len(seen("cache/[!.]*")) < 2 * len(WORDS) + 1 else "state.pt"
        how, before, process = signal.SIGTERM if i % 5 == 4 else signal.SIGKILL, seen(pattern), begin("parts")
        while process.poll() is None and seen(pattern) <= before:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(how)
        assert process.wait() == (130 if how == signal.SIGTERM else -how)
        unfinished += len(seen("cache/[!.]*")) < 2 * len(WORDS) + 1
    assert 3 <= unfinished <= 12 and 0 < state.load_progress(tmp_path / "parts")[0] < 500
    assert [begin(to).wait() for to in ("parts", "whole")] == [0, 0]
    files = [tmp_path / to / "lora.safetensors" for to in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_interrupted_run_saves_its_last_step(run, monkeypatch):
    """SIGTERM in the middle of a step: that step is finished, and the next run begins behind it."""
    taken = loop._take_step

    def interrupt(current, loss):
        if current.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return taken(current, loss)

    monkeypatch.setattr(loop, "_take_step", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(to="parts")
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(loop, "_take_step", taken)
    assert state.load_progress(run(to="parts"))[0] == 4
    assert (run(to="whole") / "lora.safetensors").read_bytes() == (run(to="parts") / "lora.safetensors").read_bytes()


# --- the loss


@pytest.fixture
def encoded(checkpoint, clips, cache):
    """The model, and the clips in the cache."""
    pipe = Pipeline.load(checkpoint, dtype="float32")
    opened = Clips.open(clips, pipe.config, ClipSettings.of(pipe.config))
    return pipe, opened.encode(pipe.vae, pipe.text_encoder, cache, "small")


def test_the_loss_is_the_formula(encoded, monkeypatch):
    """Worked out once more: mean square of noise − latents − velocity at x_t, with the shift in t."""
    pipe, clips = encoded
    asked = []
    forward = type(pipe.dit).forward
    monkeypatch.setattr(
        type(pipe.dit), "forward", lambda *a, **k: asked.append((a, k, forward(*a, **k))) or asked[-1][2]
    )
    loss = clip_loss(pipe.dit, clips, 2, FlowTimes(shift=5.0), Conditioning(0.0, 0.0))
    value, _ = loss([7, 0, 0])
    (_, x, text, pooled, t, mask), how, velocity = asked[0]
    drawn = clips.batch([7, 0, 0], 2)
    random = generator([7, 0, 0, 2])
    u = torch.sigmoid(torch.randn(2, generator=random))
    torch.testing.assert_close(t, 5 * u / (1 + 4 * u))
    noise = torch.randn(drawn.latents.shape, generator=random)
    torch.testing.assert_close(x[..., :16], drawn.latents + t.view(2, 1, 1, 1, 1) * (noise - drawn.latents))
    assert not x[..., 16:].any() and text.equal(drawn.features.text) and mask.equal(drawn.features.mask)
    assert how["rope_scale"] == (1.0, 3.16, 3.16)
    torch.testing.assert_close(value, (velocity - (noise - drawn.latents)).square().mean())


def test_captions_and_first_frames_are_dropped_and_given(encoded, monkeypatch):
    pipe, clips = encoded
    asked = []
    forward = type(pipe.dit).forward
    monkeypatch.setattr(type(pipe.dit), "forward", lambda *a, **k: asked.append(a) or forward(*a, **k))
    clip_loss(pipe.dit, clips, 2, FlowTimes(), Conditioning(1.0, 1.0))([7, 0, 0])
    _, x, text, _, _, mask = asked[0]
    first, empty = clips.batch([7, 0, 0], 2).first_frame, clips.empty()
    assert x[:, :1, ..., :16].equal(first) and x[:, 0, ..., -1].all() and not x[:, 1:, ..., -1].any()
    assert mask.sum(dim=1).tolist() == [int(empty.lengths)] * 2
    assert text[:, : empty.text.shape[1]].equal(empty.text.expand(2, -1, -1))


def test_held_out_loss_is_the_same_every_time(encoded):
    pipe, clips = encoded
    first, again = (held_out_loss(pipe.dit, clips, Conditioning(), 3) for _ in range(2))
    assert first == again and len(first) == 11
    assert first["loss"] == pytest.approx(sum(v for name, v in first.items() if name != "loss") / 10, rel=1e-4)


# --- the step


@pytest.mark.parametrize("full", [False, True])
def test_a_step_is_adamw_by_hand(encoded, tmp_path, full):
    pipe, clips = encoded
    model = dit = pipe.dit.requires_grad_(full)
    if not full:
        model = lora.add(dit, lora.create(dit, 2, 4.0, "to_q"), dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=generator([1]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = clip_loss(dit, clips, 2, FlowTimes(), Conditioning())
    with training_precision(dit):
        loss([5, 0, 0])[0].backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    recipe = Recipe(
        1, 1e-2, warmup=0, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1e-2, seed=5, dtype="float32", ema=0
    )
    assert train(model, loss, recipe, tmp_path, progress=False) is model
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        gradient = gradients[name] * min(1, 1e-2 / (float(norm) + 1e-6))
        moved = before[name] * (1 - 1e-2 * 0.1 * (parameter.ndim > 1))  # vectors do not decay
        moved -= 1e-2 * gradient / (gradient.abs() + 1e-8)  # both averages, corrected, are those of one gradient
        torch.testing.assert_close(parameter.detach(), moved, rtol=1e-4, atol=1e-6)
