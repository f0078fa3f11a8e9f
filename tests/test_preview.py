"""Previews: the frame that a step foresees, the map it is drawn with, and the two places where it is shown."""

import io
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5 import Pipeline, video_io
from kandinsky5.extras import preview
from kandinsky5.nano import evaluate
from kandinsky5.sampler import euler_sample, flow_schedule
from kandinsky5.vae import Posterior
from random_weights import SMALL_VAE, build_small_pipeline


class Blocks(nn.Module):
    """A VAE whose 16 channels are an invertible mix of a block's mean colour and 13 other numbers; linear by design."""

    def __init__(self):
        super().__init__()
        self.config = SMALL_VAE
        self.mix = nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def encode(self, video):
        colour = F.avg_pool3d(video, (1, 8, 8)) - 0.25
        other = torch.randn(len(video), 13, 1, *colour.shape[3:])
        mean = torch.einsum("ij,bjthw->bithw", self.mix, torch.cat([colour, other], dim=1))
        return Posterior(mean, mean)


def test_a_linear_vae_is_fitted_exactly():
    vae = Blocks()
    colours = preview.fit_colours(vae)
    frame = torch.rand(1, 3, 1, 64, 64) * 2 - 1
    latents = vae.encode(frame).mean[0, :, 0].movedim(0, -1) * SMALL_VAE.scaling_factor  # (8, 8, 16)
    expected = F.avg_pool2d((frame[0, :, 0] + 1) * 127.5, 8).movedim(0, -1)  # (8, 8, 3)
    assert (preview.draw(latents, colours).float() - expected).abs().max() <= 0.51  # rounding


def test_nanos_preview_has_the_colours_of_its_video():
    """The map is fitted to synthetic discs; it has to hold for what nano draws."""
    pipe = Pipeline.load("nano")
    texts = [evaluate.sample_prompt("seen, English", i)[1].text for i in range(4)]
    latents = pipe(texts, num_inference_steps=4, guidance_scale=1.0, output_type="latents", progress=False)
    frames = torch.cat([pipe.decode(z[None, :3]) for z in latents])[:, 5:9].float().mean(dim=1)  # of latent frame 2
    expected = F.avg_pool2d(frames.movedim(-1, 1), 8).movedim(1, -1)  # (B, 8, 8, 3)
    error = preview.draw(latents[:, 2], preview.fit_colours(pipe.vae)).float() - expected
    explained = 1 - error.square().sum() / (expected - expected.mean(dim=(0, 1, 2))).square().sum()
    assert explained > 0.8


def test_a_vae_that_rests_is_woken_and_sent_back():
    colours = preview.fit_colours(Pipeline.load("nano").vae)
    vae = Pipeline.load("nano", offload="model").vae
    assert preview.fit_colours(vae).allclose(colours, atol=1e-3) and next(vae.parameters()).is_meta


@pytest.fixture
def identity(monkeypatch):
    """Pictures are the first three channels of the latents, -1 … 1."""
    monkeypatch.setattr(preview, "fit_colours", lambda vae: torch.eye(17, 3))


def test_a_preview_is_of_the_data_that_the_step_foresees(identity):
    """On a straight path to known data, every step foresees the data, however noisy its latents are."""
    data, noise, shown = torch.rand(2, 5, 4, 6, 16) * 2 - 1, torch.randn(2, 5, 4, 6, 16), []
    callback = preview.build_callback(None, lambda *arguments: shown.append(arguments), every=2)
    euler_sample(lambda x, t: noise - data, noise, flow_schedule(7, 10.0), callback=callback)
    assert [step for step, _ in shown] == [1, 3, 5]
    expected = ((data[:, 2, ..., :3] + 1) * 127.5).round()  # frame 2 of 0 … 4
    for _, frame in shown:
        assert frame.dtype == torch.uint8 and (frame.float() - expected).abs().max() <= 1


def test_the_velocity_is_that_of_the_last_step(identity):
    """x₀ = x − t · v by hand, of a velocity that changes with x and t."""
    shown, steps = [], []

    def velocity(x, t):
        v = torch.sin(3 * x) + t
        steps.append((x, float(t), v))
        return v

    times = flow_schedule(5, 3.0)
    callback = preview.build_callback(None, lambda step, frame: shown.append(frame))
    euler_sample(velocity, torch.randn(1, 3, 2, 2, 16), times, callback=callback)
    for frame, (x, t, v) in zip(shown, steps[1:], strict=True):
        expected = ((x - t * v)[:, 1, ..., :3].clamp(-1, 1) + 1) * 127.5
        assert (frame.float() - expected).abs().max() <= 0.51


def test_one_callback_serves_one_video_after_the_other(identity):
    shown = []
    callback = preview.build_callback(None, lambda *arguments: shown.append(arguments))
    for size in ((1, 3, 4, 4, 16), (1, 3, 2, 6, 16), (1, 3, 2, 6, 16)):
        data, noise = torch.rand(size) * 2 - 1, torch.randn(size)
        euler_sample(lambda x, t, v=noise - data: v, noise, flow_schedule(3, 3.0), callback=callback)
        assert [step for step, _ in shown] == [1, 2]
        expected = ((data[:, 1, ..., :3] + 1) * 127.5).round()
        assert all((frame.float() - expected).abs().max() <= 1 for _, frame in shown)
        shown.clear()


def test_the_sampler_is_not_disturbed():
    pipe, shown = build_small_pipeline(), []
    options = {"num_inference_steps": 4, "output_type": "latents", "progress": False}
    callback = preview.build_callback(pipe.vae, lambda step, frame: shown.append((step, frame.shape)))
    assert pipe(["a fox", "a dog"], callback=callback, **options).equal(pipe(["a fox", "a dog"], **options))
    assert shown == [(step, (2, 4, 6, 3)) for step in (1, 2, 3)]


def test_a_file_is_replaced_whole_and_has_the_size_of_the_video(tmp_path):
    path = tmp_path / "preview.png"
    show = preview.open_place(path)
    assert list(tmp_path.iterdir()) == []
    for colour in (0, 200):
        show(0, torch.full((2, 4, 6, 3), colour, dtype=torch.uint8))
        image = video_io.read_image(path)
        assert image.shape == (32, 48, 3) and (image == colour).all()
    assert list(tmp_path.iterdir()) == [path]


def test_a_large_frame_is_enlarged_to_a_side_of_384(tmp_path):
    frame = torch.zeros(1, 64, 96, 3, dtype=torch.uint8)
    preview.open_place(tmp_path / "preview.png")(0, frame)
    assert video_io.read_image(tmp_path / "preview.png").shape == (256, 384, 3)


def test_a_full_disk_loses_the_preview_not_the_video(tmp_path, monkeypatch):
    show = preview.open_place(tmp_path / "preview.png")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    show(0, torch.zeros(1, 4, 6, 3, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


class Screen(io.StringIO):
    """A terminal: what is written to it, as a grid of (upper colour, lower colour); None where nothing is."""

    def isatty(self):
        return True

    def cells(self):
        grid, row, column, colours = {}, 0, 0, None
        for escape, ground, text in re.findall(r"\x1b\[([\d;]*)([mA])|([^\x1b])", self.getvalue()):
            if ground == "A":
                row -= int(escape)
            elif ground == "m":
                numbers = [int(n) for n in escape.split(";")]
                colours = None if numbers == [0] else (tuple(numbers[2:5]), tuple(numbers[7:10]))
                assert numbers == [0] or (numbers[:2], numbers[5:7]) == ([38, 2], [48, 2])
            elif text == "\n":
                row, column = row + 1, 0
            else:
                assert text == "▀"
                grid[row, column], column = colours, column + 1
        return grid


def test_terminal_previews_replace_each_other(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((7, 5)))
    show = preview.open_place(True)
    for step in range(2):
        frame = torch.randint(0, 256, (1, 4, 6, 3), dtype=torch.uint8)
        show(step, frame)
    pixels = [[tuple(pixel) for pixel in row] for row in frame[0].tolist()]
    expected = {(y, x): (pixels[2 * y][x], pixels[2 * y + 1][x]) for y in range(2) for x in range(6)}
    assert screen.cells() == expected


@pytest.mark.parametrize(
    "columns, rows, height, width, lines, characters",
    [
        (80, 24, 8, 8, 21, 42),
        (200, 60, 8, 8, 32, 64),
        (80, 24, 64, 96, 21, 63),
        (40, 50, 64, 96, 13, 39),
        (5, 1, 8, 8, 1, 1),
    ],
)
def test_a_frame_fits_the_terminal(monkeypatch, columns, rows, height, width, lines, characters):
    """As large as there is room with its shape kept, and no larger than the video."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, rows)))
    preview.open_place(True)(0, torch.zeros(1, height, width, 3, dtype=torch.uint8))
    assert max(screen.cells()) == (lines - 1, characters - 1)


def test_no_terminal_is_said(capsys):
    with pytest.raises(ValueError, match="terminal.*--preview FILE.png"):
        preview.open_place(True)


def test_a_preview_every_0_steps_is_refused():
    with pytest.raises(ValueError, match="every 0 steps.*at least 1"):
        preview.build_callback(None, print, every=0)
