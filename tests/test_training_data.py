"""Clips are encoded once, as the pipeline encodes them, and batches of them depend on nothing but the seed."""

import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from footage_files import flat, write
from kandinsky5 import Pipeline, video_io
from kandinsky5.config import SamplingConfig
from kandinsky5.training import data
from kandinsky5.training.data import Clips, encode_clip
from kandinsky5.training.folder import ClipSettings

CAPTIONS = ["a red circle moves left", "a big blue square", "синий круг", "a"]


def small_pipe() -> Pipeline:
    """nano in float32 for clips of 5 frames of 16 x 32, with latents that are scaled and a template for images."""
    pipe = Pipeline.load("nano", dtype="float32")
    text = replace(pipe.config.text, image_template="an image of {}", image_dropped_tokens=3)
    sampling = replace(pipe.config.sampling, height=16, width=32, num_frames=5)
    pipe.config = replace(pipe.config, vae=replace(pipe.config.vae, scaling_factor=0.5), sampling=sampling, text=text)
    pipe.text_encoder.config = text
    return pipe


def make_folder(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for i in range(count):
        write(folder / f"{i}.mp4", flat([(30 * i + 10 * f) % 200 for f in range(5)], 16, 32))
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 4] + " " * (i // 4), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pipe():
    return small_pipe()


@pytest.fixture(scope="module")
def clips(pipe, tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("data") / "clips")
    video_io.write_video(folder / "image.png", flat([90], 16, 32))
    (folder / "image.txt").write_text("a green circle")
    return encode(folder, pipe, folder.parent / "cache")


def encode(folder: Path, pipe: Pipeline, cache: Path) -> Clips:
    found = Clips.open(folder, pipe.config, ClipSettings.of(pipe.config))
    return found.encode(pipe.vae, pipe.text_encoder, cache, "these weights")


def content(cache: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.iterdir()}


def batches(clips: Clips, size: int = 2, count: int = 3):
    return [clips.batch([0, step, 0], size) for step in range(count)]


@torch.no_grad()
def check_latents(pipe: Pipeline, clips: Clips) -> None:
    """Latents and first frames are samples of the posteriors of what the clips show, scaled."""
    for batch in batches(clips):
        for clip, latents, first in zip(batch.clips, batch.latents, batch.first_frame, strict=True):
            posterior = pipe.vae.encode(video_io.from_uint8(clip.read()[None]))
            alone = pipe.vae.encode(video_io.from_uint8(clip.read()[None, :1]))
            for z, one in ((latents, posterior), (first, alone)):
                mean, std = one.mean[0], torch.exp(0.5 * one.logvar[0])
                drawn = (z.permute(3, 0, 1, 2) / 0.5 - mean) / std
                assert drawn.abs().max() < 6 and 0.8 < drawn.std() < 1.2


@torch.no_grad()
def check_features(pipe: Pipeline, clips: Clips) -> None:
    """Features are those of the clips' own captions with the template of videos, for an image too."""
    for batch in batches(clips):
        for i, clip in enumerate(batch.clips):
            own, got = pipe.text_encoder.encode([clip.caption]), batch.features.select(i, i + 1)
            assert own.text.shape == got.text.shape
            assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(got, own, strict=True))
    assert torch.allclose(clips.empty().text, pipe.text_encoder.encode([""]).text, atol=1e-5)


def test_latents_and_features_are_the_pipelines(pipe, clips):
    check_latents(pipe, clips)
    check_features(pipe, clips)


def shuffled(clips: Clips, name: str) -> Clips:
    first, second, *rest = getattr(clips, name)
    return replace(clips, **{name: (second, first, *rest)})


@pytest.mark.parametrize("mistake", [
    "captions shuffled", "clips shuffled", "not scaled", "first frame of the clip", "image template",
])  # fmt: skip
def test_mistakes_are_noticed(pipe, clips, tmp_path, monkeypatch, mistake):
    if mistake == "captions shuffled":
        clips = shuffled(clips, "texts")
    elif mistake == "clips shuffled":
        clips = shuffled(clips, "entries")
    elif mistake == "not scaled":
        clips = replace(clips, config=replace(clips.config, vae=replace(clips.config.vae, scaling_factor=1.0)))
    elif mistake == "first frame of the clip":
        monkeypatch.setattr(data, "encode_clip", lambda *arguments: repeat_first(encode_clip(*arguments)))
    else:
        monkeypatch.setattr(data, "encode_caption", lambda encoder, text: as_image(encoder, text))
    if mistake in ("first frame of the clip", "image template"):
        clips = clips.encode(pipe.vae, pipe.text_encoder, tmp_path / "wrong", "these weights")
    with pytest.raises(AssertionError):
        check_latents(pipe, clips)
        check_features(pipe, clips)


def repeat_first(entry: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return entry | {f"first_{name}": entry[name][:, :1].clone() for name in ("mean", "logvar")}


def as_image(encoder, text: str) -> dict[str, torch.Tensor]:
    features = encoder.encode([text], one_frame=True)
    return {"text": features.text[0].contiguous(), "pooled": features.pooled[0].contiguous()}


def test_latents_are_drawn_anew_in_every_step(clips):
    one = replace(clips, clips=clips.clips[:1], entries=clips.entries[:1], texts=clips.texts[:1])
    a, b, c = (one.batch([0, step, 0], 1).latents for step in (0, 1, 0))
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_means_are_the_same_in_every_step(pipe, clips):
    one = replace(clips, clips=clips.clips[:1], entries=clips.entries[:1], texts=clips.texts[:1], means=True)
    a, b = (one.batch([0, step, 0], 1) for step in (0, 1))
    entry, scale = load_file(one.entries[0]), pipe.config.vae.scaling_factor
    for mean, batches in (("mean", (a.latents, b.latents)), ("first_mean", (a.first_frame, b.first_frame))):
        for latents in batches:
            torch.testing.assert_close(latents[0].permute(3, 0, 1, 2), entry[mean] * scale)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_processes_shares_one_batch(clips, ranks):
    whole = clips.batch([5, 2, 0], 6)
    parts = [clips.batch([5, 2, 0], 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for name in ("latents", "first_frame"):
        rows = [torch.empty(0)] * 6
        for rank, part in enumerate(parts):
            for i, row in enumerate(getattr(part, name)):
                rows[rank + i * ranks] = row
        assert torch.equal(torch.stack(rows), getattr(whole, name))


def test_an_epoch_takes_each_clip_once(clips):
    for epoch in range(3):
        seen = [i for index in range(5) for i in clips.order(7, 1, 5 * epoch + index)]
        assert sorted(seen) == [0, 1, 2, 3, 4]
    assert [clips.order(7, 1, i) for i in range(5)] != [clips.order(7, 1, i) for i in range(5, 10)]


def test_accumulated_batches_follow_each_other(clips):
    names = [[c.file for c in clips.batch([0, 0, part], 2, accumulate=3).clips] for part in range(3)]
    assert names == [[c.file for c in clips.batch([0, step, 0], 2).clips] for step in range(3)]


def test_batches_have_one_size(clips):
    for step in range(9):
        assert len({(clip.size, clip.num_frames) for clip in clips.batch([1, step, 0], 3).clips}) == 1


def test_held_out_files_are_the_same_whatever_they_are_called(clips):
    train, held = clips.hold_out(0.4)
    assert len(held.clips) == 2 and {*train.clips} | {*held.clips} == {*clips.clips}
    renamed = replace(clips, clips=tuple(replace(c, file=c.file[::-1]) for c in clips.clips))
    assert [c.content for c in renamed.hold_out(0.4)[1].clips] == [c.content for c in held.clips]
    assert clips.hold_out(0)[0].clips == clips.clips
    alone = replace(clips, clips=clips.clips[:1], entries=clips.entries[:1], texts=clips.texts[:1])
    assert len(clips.hold_out(0.99)[0].clips) == 1 and not alone.hold_out(0.1)[1].clips
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError):
            clips.hold_out(share)


def test_entries_are_keyed_by_content_and_settings(pipe, clips, tmp_path):
    folder = make_folder(tmp_path / "clips", 1)
    found = Clips.open(folder, pipe.config, ClipSettings.of(pipe.config))
    moved = found.encode(pipe.vae, pipe.text_encoder, clips.cache, "these weights")
    assert moved.entries[0] in clips.entries  # the same content under another path is not encoded again
    for change in ({"start": 0.1}, {"fps": 5.0}):
        other = replace(found, clips=(replace(found.clips[0], **change),))
        assert other.encode(pipe.vae, pipe.text_encoder, tmp_path / "a", "these weights").entries != moved.entries
    assert found.encode(pipe.vae, pipe.text_encoder, tmp_path / "a", "others").entries != moved.entries


@pytest.mark.parametrize(
    ("function", "bar"), [("encode_clip", "encoding clips"), ("encode_caption", "encoding captions")]
)
def test_encoding_shows_its_progress_at_once(pipe, tmp_path, monkeypatch, capsys, function, bar):
    def stop(*_):
        assert f"{bar}:   0%" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(data, function, stop)
    with pytest.raises(KeyboardInterrupt):
        encode(make_folder(tmp_path / "clips", 2), pipe, tmp_path / "cache")


def test_damaged_and_half_written_entries_are_encoded_again(pipe, clips, tmp_path):
    folder = make_folder(tmp_path / "clips", 2)
    whole = encode(folder, pipe, tmp_path / "a")
    before = content(tmp_path / "a")
    another = save({"a": torch.tensor(1.0)}, {"sha256": "0"})
    for spoil in (lambda d: d[:-8], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: b"", lambda d: another):
        for path in whole.entries + whole.texts:
            path.write_bytes(spoil(path.read_bytes()))
        (tmp_path / "a" / ".left.safetensors").write_bytes(b"half")
        encode(folder, pipe, tmp_path / "a")
        assert content(tmp_path / "a") == before


def test_damage_that_encoding_finds_is_said_with_a_remedy(pipe, tmp_path):
    folder = make_folder(tmp_path / "clips", 1)
    found = Clips.open(folder, pipe.config, ClipSettings.of(pipe.config))
    (folder / "0.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="0.mp4 is damaged.*--skip-damaged"):
        found.encode(pipe.vae, pipe.text_encoder, tmp_path / "cache", "these weights")
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk_is_said(pipe, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "clips", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 100})())
    with pytest.raises(OSError, match="free some disk space"):
        encode(folder, pipe, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_released_models_have_sizes_of_their_own():
    config = SamplingConfig()
    settings = ClipSettings.of(replace(small_pipe().config, sampling=config))
    assert settings.sizes == ((512, 768), (768, 512)) and (settings.num_frames, settings.fps) == (121, 24)


@pytest.mark.fuzz
def test_killed_runs_end_with_the_same_bytes(tmp_path):
    """SIGKILL at 20 random moments of encoding 30 clips; then the same command to its end."""
    folder = make_folder(tmp_path / "clips", 30)
    encode(folder, small_pipe(), tmp_path / "unbroken")
    line = "import test_training_data as t, pathlib, sys; p = t.small_pipe(); print('begin', flush=True); "
    line += f"t.encode(pathlib.Path({str(folder)!r}), p, pathlib.Path({str(tmp_path / 'killed')!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    moments = random.Random(1)
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert process.stdout and process.stdout.readline() == b"begin\n"
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.wait()
    encode(folder, small_pipe(), tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")
