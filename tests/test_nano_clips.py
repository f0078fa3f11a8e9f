"""The training clips of nano's DiT: latents on disk, and batches of them."""

import contextlib
import copy
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config import VAEConfig
from kandinsky5.nano.clips import ClipStore, draw_batch, draw_videos
from kandinsky5.nano.stages import load_dit, load_text_encoder, load_vae
from kandinsky5.nano.train_dit import TIMES
from kandinsky5.vae import VAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(4, 4, 8, 8), blocks_per_stage=1, norm_groups=2, scaling_factor=1.0))


def test_clips_do_not_depend_on_when_they_were_written(vae, tmp_path):
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


def test_drawing_shows_its_progress_at_once(vae, tmp_path, monkeypatch, capsys):
    store = ClipStore(tmp_path, vae, num_frames=5)

    def encode(scenes):
        assert "drawing and encoding" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        store.fill(16)


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


def test_clips_that_were_removed_are_drawn_again(vae, tmp_path):
    store = ClipStore(tmp_path, vae, num_frames=5)
    before = store.read(np.arange(8), 8)
    (tmp_path / "latents.f16").unlink()
    after = ClipStore(tmp_path, vae, num_frames=5).read(np.arange(8), 8)
    assert all(torch.equal(x, y) and x.any() for x, y in zip(before, after, strict=True))


def test_clips_are_not_drawn_into_a_folder_of_something_else(vae, tmp_path):
    (tmp_path / "count.json").write_text("foreign")
    with pytest.raises(ValueError, match="something else than clips"):
        ClipStore(tmp_path, vae, num_frames=5)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["foreign"]


def test_clips_that_were_cut_short_are_refused(vae, tmp_path):
    ClipStore(tmp_path, vae, num_frames=5).fill(8)
    with (tmp_path / "latents.f16").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="latents.f16 has 1,000 bytes instead of"):
        ClipStore(tmp_path, vae, num_frames=5)


def test_a_full_disk_ends_in_an_error_not_a_signal(vae, tmp_path, monkeypatch):
    store = ClipStore(tmp_path, vae, num_frames=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="GB free"):
        store.fill(8)
    assert store.count == 0


def test_clips_on_disk_of_another_world_are_refused(vae, tmp_path):
    fits = []
    ClipStore(tmp_path, vae, num_frames=5)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_in.bias += 1  # latents do not depend on it
    ClipStore(tmp_path, other, num_frames=5)
    with torch.no_grad():
        other.quant_conv.bias += 1
    for options in ({"seed": 5}, {"num_frames": 9}, {"vae": other}):
        with pytest.raises(ValueError, match="another world, VAE"):
            ClipStore(tmp_path, **{"vae": vae, "num_frames": 5} | options)
    for dtype in (torch.float32, torch.bfloat16):  # one of them is not this machine's
        with mock.patch("kandinsky5.nano.clips.choose_dtype", return_value=dtype), contextlib.suppress(ValueError):
            ClipStore(tmp_path, vae, num_frames=5)
            fits.append(dtype)
    assert len(fits) == 1
    (tmp_path / "origin.txt").unlink()  # as folders were that only knew their world
    with pytest.raises(ValueError, match="another world, VAE"):
        ClipStore(tmp_path, vae, num_frames=5)


def test_a_batch_has_its_shares_without_prompt_and_with_image(tmp_path):
    nano, text_encoder = load_dit(SHIPPED / "nano"), load_text_encoder(SHIPPED / "nano")
    empty, clips = text_encoder.encode([""]), ClipStore(tmp_path / "clips", load_vae(SHIPPED / "nano"))
    for prompt_dropped in (0.1, 0.3):
        batch, features = draw_batch([5, 0, 0], nano, clips, 8, text_encoder, empty, TIMES.sample, 150, prompt_dropped)
        given = batch.loss_mask[:, 0].flatten() == 0
        assert abs(given.float().mean() - 0.3) < 0.15  # four standard deviations
        assert batch.x[given, 0, ..., -1].eq(1).all() and batch.x[~given, ..., -1].eq(0).all()
        without = (features.pooled == empty.pooled).all(dim=1)
        assert abs(without.float().mean() - prompt_dropped) < 4 * (prompt_dropped * (1 - prompt_dropped) / 150) ** 0.5
        assert features.mask[without].sum(dim=1).eq(empty.mask.sum()).all()
