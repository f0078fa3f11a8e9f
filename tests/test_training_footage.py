"""Footage of any kind becomes the frames that a viewer would see at given times."""

import random
from fractions import Fraction

import numpy as np
import pytest
from av.video.reformatter import ColorTrc
from PIL import Image

from footage_files import flat, write, write_sound
from kandinsky5 import video_io
from kandinsky5.training.footage import Unusable, nearest_size, probe, read_frames

LEVELS = [20, 60, 100, 140, 180, 220]


def shown(path, times, height=32, width=48):
    """The grey level in the middle of each frame."""
    frames = read_frames(probe(path), times, height, width)
    assert frames.shape == (len(times), height, width, 3)
    return frames[:, height // 2, width // 2].float().mean(-1).round().int().tolist()


def near(a, b, most=4):
    return np.abs(np.array(a) - np.array(b)).max() <= most


def test_frame_on_screen_follows_time_stamps(tmp_path):
    times = [0.0, 0.1, 0.5, 0.6, 1.4, 1.5]  # a variable rate
    path = write(tmp_path / "a.mp4", flat(LEVELS), times)
    footage = probe(path)
    assert np.allclose(footage.times, times)
    moments = sorted(random.Random(3).uniform(0, 1.59) for _ in range(30))
    expected = [LEVELS[max(i for i, time in enumerate(times) if time <= t)] for t in moments]
    assert near(shown(path, moments), expected)


def test_seeking_gives_the_same_frames(tmp_path):
    levels = [(37 * i) % 200 + 20 for i in range(40)]
    path = write(tmp_path / "a.mp4", flat(levels), options={"g": "8", "bf": "2"})
    for first in (0, 7, 8, 25, 39):
        assert near(shown(path, [first / 10]), [levels[first]])


@pytest.mark.parametrize("suffix, codec, pix_fmt", [
    (".mkv", "libx264", "yuv420p10le"), (".webm", "libvpx-vp9", "yuv420p"), (".mov", "prores_ks", "yuv422p10le"),
    (".avi", "mpeg4", "yuv420p"),
])  # fmt: skip
def test_containers_and_bit_depths(tmp_path, suffix, codec, pix_fmt):
    path = write(tmp_path / f"a{suffix}", flat(LEVELS), codec=codec, pix_fmt=pix_fmt)
    assert near(shown(path, [i / 10 for i in range(6)]), LEVELS, 6)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_phone_videos_are_upright(tmp_path, rotation):
    frames = flat([100], 32, 64)
    frames[:, :, :16] = 240  # a bright left edge as stored
    path = write(tmp_path / "a.mp4", frames.repeat(3, axis=0), rotation=rotation)
    upright = np.rot90(frames[0], k=rotation // 90)
    footage = probe(path)
    assert (footage.height, footage.width) == upright.shape[:2]
    read = read_frames(footage, [0.0], *upright.shape[:2])[0].numpy()
    assert np.abs(read.astype(int) - upright).mean() < 4


def test_alpha_is_laid_on_white(tmp_path):
    frames = np.concatenate([flat([40, 40]), np.full((2, 32, 48, 1), 255, np.uint8)], axis=-1)
    frames[1, ..., 3] = 0
    path = write(tmp_path / "a.mov", frames, codec="png", pix_fmt="rgba")
    assert shown(path, [0.0, 0.1]) == [40, 255]


def test_wide_pixels_become_square(tmp_path):
    footage = probe(write(tmp_path / "a.mp4", flat([9, 9], 32, 48), square=Fraction(4, 3)))
    assert (footage.height, footage.width) == (32, 64)


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", flat([1, 2], 480, 640))
    monkeypatch.setattr("kandinsky5.video_io.LARGEST_DECODED", 480 * 640)
    assert probe(path).height == 480 and video_io.read_video(path)[0].shape == (2, 480, 640, 3)
    monkeypatch.setattr("kandinsky5.video_io.LARGEST_DECODED", 480 * 640 - 1)
    with pytest.raises(Unusable, match="640x480"):
        probe(path)
    with pytest.raises(ValueError, match="640x480"):
        video_io.read_video(path)


def test_a_codec_that_nobody_knows_is_left_out(tmp_path):
    path = write(tmp_path / "a.mp4", flat([1, 2]))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(Unusable, match="codec"):
        probe(path)
    with pytest.raises(ValueError, match="codec"):
        video_io.read_video(path)


def test_pixels_that_make_a_frame_too_oblong_are_refused(tmp_path):
    path = write(tmp_path / "tall.mp4", flat([10, 20], 64, 64), square=Fraction(1, 60))
    with pytest.raises(Unusable, match="oblong"):
        probe(path)


def test_covering_keeps_the_centre(tmp_path):
    frames = flat([200], 32, 96)
    frames[:, :, :24] = frames[:, :, -24:] = 0
    path = write(tmp_path / "a.mp4", frames.repeat(2, axis=0))
    read = read_frames(probe(path), [0.0], 16, 24)[0]
    assert read.float().mean() > 190  # the dark sides are cropped away


def test_size_of_the_nearest_shape():
    sizes = [(64, 96), (96, 64), (80, 80)]
    for shape, size in {(720, 1280): (64, 96), (1000, 1010): (80, 80), (1280, 720): (96, 64)}.items():
        assert nearest_size(type("", (), {"height": shape[0], "width": shape[1]}), sizes) == size


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp", "avif", "bmp", "tif", "tiff", "gif"])
def test_images_stand_still(tmp_path, ending):
    path = tmp_path / f"a.{ending.upper() if ending == 'bmp' else ending}"
    Image.fromarray(flat([77])[0]).save(path)
    assert probe(path).times == () and near(shown(path, [0.0]), [77], 1)


def test_a_gif_of_several_frames_moves(tmp_path):
    first, *others = (Image.fromarray(frame) for frame in flat(LEVELS))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=100)
    assert near(shown(tmp_path / "a.gif", [0.0, 0.3, 0.5]), [LEVELS[0], LEVELS[3], LEVELS[5]])


def test_files_without_usable_video(tmp_path):
    hdr = write(tmp_path / "hdr.mp4", flat(LEVELS), trc=ColorTrc.SMPTE2084)
    first, *others = (Image.fromarray(frame) for frame in flat(LEVELS))
    animated = [tmp_path / f"animated.{ending}" for ending in ("webp", "png", "avif")]
    for path in animated:
        first.save(path, save_all=True, append_images=others, duration=100)
    for path in (write_sound(tmp_path / "sound.mp4"), hdr, *animated):
        with pytest.raises(Unusable):
            probe(path)


def test_damaged_files_are_errors(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), np.uint8)
    whole = write(tmp_path / "a.mkv", noise).read_bytes()
    for name, data in {
        "cut": whole[: len(whole) // 2], "text": b"no video" * 99, "empty": b"",
        "spoilt": whole[:9000] + bytes(4000) + whole[13000:],
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.mkv"
        path.write_bytes(data)
        with pytest.raises(ValueError):
            read_frames(probe(path), [i / 10 for i in range(12)], 64, 96)
            pytest.fail(name)
