"""Images and videos on disk. The oracles are Pillow, plain PyAV and diffusers' rounding written in numpy."""

import json
import os
import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5 import files, video_io
from kandinsky5.video_io import (
    check_writable,
    from_uint8,
    keep_aspect_size,
    read_image,
    read_metadata,
    read_video,
    resize_image,
    to_uint8,
    write_video,
)

COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 100, 50]],
    np.uint8,
)


def smooth_image(height=64, width=96) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BILINEAR)


def difference(a, b) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def frames_of(num_frames=5, height=48, width=64) -> np.ndarray:
    return np.stack([np.roll(np.asarray(smooth_image(height, width)), 3 * i, axis=1) for i in range(num_frames)])


def is_one_line(error: BaseException, *words) -> bool:
    return "\n" not in str(error) and len(str(error)) < 400 and all(str(word) in str(error) for word in words)


# --- reading


@pytest.mark.parametrize("content", [None, b"", b"a prompt, not an image\n" * 99], ids=["missing", "empty", "text"])
@pytest.mark.parametrize("read", [read_image, read_video, read_metadata])
def test_what_is_no_image_or_video_is_a_one_line_error(tmp_path, read, content):
    path = tmp_path / "file.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read") as error:
        read(path)
    assert is_one_line(error.value, path, "give a")


@pytest.mark.parametrize("read", [read_image, read_video, read_metadata])
def test_devices_and_pipes_are_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("/dev/zero", tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="cannot read") as error:
            read(path)
        assert is_one_line(error.value, path)


# --- sizes and ranges


@pytest.mark.parametrize("height, width", [(32, 48), (100, 33), (128, 192)])
def test_resize_is_pillows_bilinear(height, width):
    expected = smooth_image().resize((width, height), Image.BILINEAR)
    resized = resize_image(np.array(smooth_image()), height, width)
    assert resized.dtype == torch.uint8 and difference(resized, expected) <= 1


def test_resize_is_antialiased_and_the_identity_at_the_same_size():
    checkers = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(32, 32)[..., None].repeat(1, 1, 3)
    assert difference(resize_image(checkers, 9, 9)[2:-2, 2:-2], 127) <= 8  # plain bilinear picks single pixels
    assert resize_image(checkers, 64, 64) is checkers


@pytest.mark.parametrize(
    "size, area, divisor, expected",
    [
        ((512, 768), 512 * 768, 16, (512, 768)),
        ((1080, 1920), 512 * 768, 16, (464, 832)),  # 470.3 / 16 = 29.4, 836.1 / 16 = 52.3
        ((1920, 1080), 512 * 768, 16, (832, 464)),
        ((333, 333), 1024**2, 128, (1024, 1024)),
        ((720, 1280), 1024**2, 128, (768, 1408)),  # 768 / 128 = 6, 1365.3 / 128 = 10.7
        ((10, 10000), 512 * 768, 16, (16, 19824)),  # 19.8 / 16 = 1.2, 19829.3 / 16 = 1239.3
        ((1, 10**6), 512 * 768, 16, (16, 627072)),  # 0.6 / 16 = 0.04: one divisor at least
    ],
)
def test_keep_aspect_size_follows_officials_rule(size, area, divisor, expected):
    assert keep_aspect_size(*size, area, divisor) == expected


def test_to_uint8_rounds_as_diffusers_does():
    video = torch.linspace(-1.2, 1.2, 3 * 5 * 16 * 100).reshape(1, 3, 5, 16, 100)
    unit = np.clip(video.numpy() / 2 + 0.5, 0, 1).transpose(0, 2, 3, 4, 1)
    assert np.array_equal(to_uint8(video).numpy(), (unit * 255).round().astype("uint8"))


def test_from_uint8_is_the_inverse_and_both_work_on_meta():
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 2, 8, 16, 3)
    video = from_uint8(frames)
    assert video.dtype == torch.float32 and video.shape == (1, 3, 2, 8, 16)
    assert video.min() == -1 and video.max() == 1 and torch.equal(to_uint8(video), frames)
    assert torch.equal(from_uint8(frames.numpy()), video)
    assert to_uint8(from_uint8(frames.to("meta"))).shape == frames.shape


# --- writing


def test_mp4_is_what_browsers_open(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, torch.from_numpy(frames_of()))
    with av.open(str(path)) as container:
        stream, codec = container.streams.video[0], container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate, stream.frames) == ("h264", "yuv420p", 24, 5)
        assert codec.color_range == 1 and codec.colorspace == codec.color_primaries == codec.color_trc == 1  # BT.709
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat"), "a browser starts playing before it has everything"


def test_colours_survive_mp4_in_our_reader_and_in_plain_pyav(tmp_path):
    path = tmp_path / "out.mp4"
    frames = np.repeat(np.repeat(COLOURS, 32, axis=0)[None, None], 32, axis=1).repeat(3, axis=0)  # (3, 32, 224, 3)
    write_video(path, frames, quality=10)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for video in (read_video(path)[0].numpy(), np.stack(plain)):
        assert video.shape == frames.shape and difference(video[:, 16, 16::32], frames[:, 16, 16::32]) <= 4


def test_colour_is_not_shifted_against_brightness(tmp_path):
    ramp = np.zeros((1, 32, 64, 3), np.uint8)
    ramp[..., 2] = np.arange(0, 256, 4)
    write_video(tmp_path / "out.mp4", ramp, quality=10)
    error = read_video(tmp_path / "out.mp4")[0].numpy().astype(float) - ramp
    assert abs(error[0, :, 8:-8, 2].mean()) < 0.8, "half a pixel off makes 2 levels of blue"


@pytest.mark.parametrize("fps", [24, 16, 23.976, 24000 / 1001])
@pytest.mark.parametrize("num_frames", [1, 4])
def test_read_video_gives_the_frames_and_the_rate_back(tmp_path, monkeypatch, fps, num_frames):
    monkeypatch.chdir(tmp_path)
    frames = frames_of(num_frames)
    (tmp_path / "c:d").mkdir()
    path = "c:d/a:b %03d.mp4"  # not a network protocol, not a series of files
    write_video(path, frames, fps=fps, quality=10)
    video, rate = read_video(path)
    assert video.shape == frames.shape and video.dtype == torch.uint8 and rate == pytest.approx(fps, rel=1e-6)
    assert np.abs(video.numpy() - frames.astype(float)).mean(axis=(1, 2, 3)).max() < 6


def test_a_phones_rotated_video_is_turned_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    write_video(path, frames_of(2), quality=10)
    lying = read_video(path)[0]
    one, end, data = 0x10000, 0x40000000, path.read_bytes()
    upright, clockwise = [
        struct.pack(">9i", *matrix)
        for matrix in ((one, 0, 0, 0, one, 0, 0, 0, end), (0, one, 0, -one, 0, 0, 0, 0, end))
    ]
    place = data.rfind(upright)  # the track's matrix; the one before is the film's
    path.write_bytes(data[:place] + clockwise + data[place + len(upright) :])
    assert torch.equal(read_video(path)[0], lying.rot90(-1, dims=(1, 2)))


def test_a_truncated_or_damaged_video_is_an_error(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, frames_of(9, 128, 128), quality=10)
    data = path.read_bytes()
    middle = data.find(b"mdat") + len(data) // 4
    for wrong in (data[:-100], data[:middle] + bytes(200) + data[middle + 200 :]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="cannot read"):
            read_video(path)


def test_a_file_without_a_frame_rate_is_an_error(tmp_path):
    path = tmp_path / "one.gif"
    Image.new("RGB", (64, 64)).save(path)  # GIF writes how long an image stays only where there are several
    with pytest.raises(ValueError, match="cannot read .*frame rate") as error:
        read_video(path)
    assert is_one_line(error.value, path, "give a")


def test_a_png_that_is_not_compressed_shows_the_same(tmp_path):
    frame = torch.arange(37 * 53 * 3).reshape(1, 37, 53, 3).div(50, rounding_mode="floor").to(torch.uint8)
    for compress in (True, False):
        video_io.write_video(tmp_path / f"{compress}.png", frame, compress=compress)
        assert video_io.read_image(tmp_path / f"{compress}.png").equal(frame[0])
    assert (tmp_path / "False.png").stat().st_size > 2 * (tmp_path / "True.png").stat().st_size


def test_one_frame_becomes_a_lossless_png_of_any_size(tmp_path):
    frame = frames_of(1, height=33, width=47)
    write_video(tmp_path / "out.PNG", frame, metadata={"seed": 1})
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.PNG")), frame[0])
    assert np.array_equal(read_image(tmp_path / "out.PNG"), frame[0])


def test_the_same_frames_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    for suffix, frames in ((".mp4", frames_of(17, 128, 192)), (".png", frames_of(1))):
        path, contents = tmp_path / f"out{suffix}", set()
        for _ in range(8):
            for _ in range(200):  # other things in the memory that the encoder gets next
                np.full(rng.integers(1, 90_000), rng.integers(0, 255), np.uint8)
            write_video(path, torch.from_numpy(frames), metadata={"seed": 1})
            contents.add(path.read_bytes())
        assert len(contents) == 1, f"{len(contents)} different files"
    options = (tmp_path / "out.mp4").read_bytes()  # x264 notes its options in the film
    assert b" threads=4 " in options, "the bytes must not depend on the number of cores"
    assert b" mbtree=0 " in options, "with it the bytes differ now and then, too rarely for this loop"


def test_what_a_pipeline_returns_can_be_written(tmp_path):
    frames = frames_of(3)
    write_video(tmp_path / "expected.mp4", frames)
    floats = torch.from_numpy(frames / 255).float()
    readonly = frames.copy()
    readonly.flags.writeable = False
    backwards = np.ascontiguousarray(frames[::-1])[::-1]
    for same in (frames[None], torch.from_numpy(frames)[None], floats, floats[None].numpy(), readonly, backwards):
        write_video(tmp_path / "out.mp4", same)
        assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 3, 16, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((1, 16, 16, 4), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((1, 16, 16, 3), np.int64),
        np.full((1, 16, 16, 3), 255.0),
        np.full((1, 16, 16, 3), np.nan),
        torch.zeros(1, 16, 16, 3, device="meta"),
    ],
    ids=lambda frames: f"{frames.dtype}{tuple(frames.shape)}",
)
def test_other_frames_are_refused_in_one_line(tmp_path, frames):
    with pytest.raises(ValueError, match="frames") as error:
        write_video(tmp_path / "out.mp4", frames)
    assert is_one_line(error.value)


@pytest.mark.parametrize("name", ["fps", "quality"])
@pytest.mark.parametrize("value", ["24", None, [24], np.nan])
def test_a_rate_and_a_quality_are_numbers(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        write_video(tmp_path / "out.mp4", frames_of(1), **{name: value})
    write_video(tmp_path / "out.mp4", frames_of(2), fps=np.float32(12), quality=np.int64(3))
    assert read_video(tmp_path / "out.mp4")[1] == 12


def test_settings_survive_tags_in_capitals(tmp_path):
    """As in Matroska, which writes COMMENT."""
    write_video(tmp_path / "out.mp4", frames_of(2), metadata=SETTINGS)
    with av.open(str(tmp_path / "out.mp4")) as source, av.open(str(tmp_path / "out.mkv"), "w") as target:
        target.metadata.update(source.metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert read_metadata(tmp_path / "out.mkv") == SETTINGS


def test_quality_sets_the_size(tmp_path):
    sizes = []
    for quality in (1, 5, 8, 10):
        write_video(tmp_path / "out.mp4", frames_of(5, 128, 128), quality=quality)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes == sorted(set(sizes))


# --- metadata

SETTINGS = {
    "prompt": "Кот в шляпе; 一只猫 😀 \"quoted\" 'single' \\ \nnew line\ttab = # % \x00 \u2028 end",
    "negative prompt": "猫" * 5000,
    "seed": 2**63 + 1,
    "guidance": 5.000000000000001,
    "size": "512x768",
}


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_metadata_survives_exactly(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    write_video(path, frames_of(1), metadata=SETTINGS)
    assert read_metadata(path) == SETTINGS
    if suffix == ".png":
        assert json.loads(Image.open(path).text["Comment"]) == SETTINGS
    else:
        with av.open(str(path)) as container:
            assert json.loads(container.metadata["comment"]) == SETTINGS


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_a_file_without_our_metadata_says_so(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    for metadata in (None, "a comment by somebody else"):
        write_video(path, frames_of(1), metadata=metadata)
        with pytest.raises(ValueError, match="written by sample.py") as error:
            read_metadata(path)
        assert is_one_line(error.value, path)


# --- failures leave the old file


@pytest.mark.parametrize("suffix, num_frames", [(".mp4", 24), (".png", 1)])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, suffix, num_frames, part):
    path = tmp_path / f"out{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, 64, 64, 3), dtype=np.uint8)
    write_video(path, noise)
    size = path.stat().st_size
    path.write_bytes(b"the old film")
    resource = pytest.importorskip("resource", reason="Windows limits no sizes of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * size), hard))  # the system refuses to write more
    try:
        with pytest.raises(OSError, match="cannot write") as error:
            write_video(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_one_line(error.value, path, "free space")
    assert path.read_bytes() == b"the old film" and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_io, "_encode_mp4", interrupted)
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the old film")
    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames_of())
    assert path.read_bytes() == b"the old film" and list(tmp_path.iterdir()) == [path]


def test_an_unwritable_path_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing/out.mp4", "folder.mp4", "file/out.mp4", "long" * 99 + ".mp4"):
        for refuse in (check_writable, lambda path: write_video(path, frames_of())):
            with pytest.raises(OSError, match="cannot write") as error:
                refuse(tmp_path / name)
            assert "\n" not in str(error.value) and "choose a folder" in str(error.value)
    for name in ("out.gif", "out"):
        with pytest.raises(ValueError, match=r"must end in \.mp4, or in \.png"):
            check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="a .png holds one"):
        check_writable(tmp_path / "out.png", num_frames=5)
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"quality": 0}, {"quality": 11}):
        with pytest.raises(ValueError, match="is not between"):
            check_writable(tmp_path / "out.mp4", **wrong)
    check_writable(tmp_path / "out.mp4")
    (tmp_path / "old.mp4").touch()
    check_writable(tmp_path / "old.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4", "old.mp4"]


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    def denied(**_):  # root may write anywhere, so the system call is replaced
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", denied)
    with pytest.raises(OSError, match="Permission denied.*choose a folder"):
        check_writable(tmp_path / "out.mp4")


def test_odd_sides_are_refused_in_mp4(tmp_path):
    with pytest.raises(ValueError, match="33x64.*even"):
        write_video(tmp_path / "out.mp4", frames_of(1, height=33))
    assert not list(tmp_path.iterdir())
