"""Files of footage: what a video or an image holds, and the frames that it shows at given times.

    probe(path)                       -> Footage: size as seen, the time of every frame, how it ends; nothing kept
    read_frames(footage, times, ...)  -> uint8 (F, H, W, 3): the frame on screen at each time, covering H x W, cropped

A file is read front to back, one frame in memory at a time, so its length does not matter. Times are the file's own
time stamps: a variable frame rate, a pause or frames per second that the header has wrong change nothing.
"""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorTrc
from torch import Tensor

from kandinsky5 import video_io
from kandinsky5.files import check_regular
from kandinsky5.image_io import check_sides, open_image
from kandinsky5.screen import printable

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")  # and GIFs of one frame
ANIMATED = (".webp", ".png", ".avif")  # of these, stills alone are read
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
TICK = 5e-4  # seconds by which a time stamp may be late: containers round to milliseconds
HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}


class Unusable(ValueError):
    """A whole file that has no clip in it: it is left out, and its line says why."""


@dataclass(frozen=True)
class Footage:
    """What one file holds, as a viewer shows it: upright, with square pixels."""

    path: Path
    height: int
    width: int
    times: tuple[float, ...]  # of its frames in seconds, ascending; () for an image
    end: float = 0.0  # when its last frame goes
    stamped: bool = True  # whether its frames have time stamps; else they follow each other at a constant rate

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def seconds(self) -> float:
        """How long it lasts; 0 for an image."""
        return self.end - self.times[0] if self.times else 0.0

    @property
    def rate(self) -> float:
        """Frames per second on average; 0 for an image."""
        return len(self.times) / self.seconds if self.times else 0.0


def probe(path: Path) -> Footage:
    """What `path` holds. Raises Unusable for a file without usable video, ValueError for a damaged one."""
    if path.suffix.lower() in IMAGES:
        return _still(path)
    packets = []
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(f"{path} is damaged: a part of it cannot be read")
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0))
    if path.suffix.lower() == ".gif" and len(packets) == 1:
        return _still(path)
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(f"{path} is damaged: no frame of it can be decoded")
        if frame.color_trc in HDR:
            raise Unusable(f"is HDR ({HDR[frame.color_trc]}): convert it to SDR first, such as by ffmpeg -vf tonemap")
        times, last = _times(packets, stream)
        declared = _declared_seconds(container, stream)
        if declared - (times[-1] + last - times[0]) > max(0.5, 0.1 * declared):
            raise ValueError(f"{path} is damaged: it ends after {times[-1] + last:.2f} of {declared:.2f} seconds")
        height, width = frame.height, round(frame.width * (stream.sample_aspect_ratio or 1))
        turned = round(frame.rotation / 90) % 2
    height, width = (width, height) if turned else (height, width)
    try:
        check_sides(height, width)  # pixels may be 60 times as long as wide
    except ValueError as error:
        raise Unusable(f"is too oblong: {error}") from error
    return Footage(path, height, width, tuple(times), times[-1] + last, all(pts is not None for pts, _ in packets))


def read_frames(footage: Footage, times: Sequence[float], height: int, width: int) -> Tensor:
    """What is on screen at `times`, ascending seconds: uint8 (F, height, width, 3), resized to cover, centre-cropped.

    An image stands still. Raises ValueError for a damaged file.
    """
    if not footage.times:
        image = video_io.cover_size(video_io.read_image(footage.path), height, width)
        return image.expand(len(times), -1, -1, -1)
    frames: list[Tensor] = []
    before = max(bisect.bisect_right(footage.times, times[0] + TICK) - 1, 0) if footage.stamped else 0
    for first in (before, 0):  # where a seek lands too late, from the beginning
        frames = _decode(footage, times, height, width, footage.times[first] if first else None)
        if frames:
            return torch.stack(frames)
    raise ValueError(f"{footage.path} is damaged: it shows nothing at {times[0]:.3f} s")


def nearest_size(footage: Footage, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of these (height, width) the one whose shape is nearest to the footage's, so that least is cropped."""
    shape = np.log(footage.height / footage.width)
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - shape))


def _still(path: Path) -> Footage:
    height, width, _ = video_io.read_image(path).shape
    if path.suffix.lower() in ANIMATED and getattr(open_image(path.read_bytes()), "is_animated", False):
        raise Unusable("is an animation, which is read from a GIF or a video: convert it to mp4")
    return Footage(path, height, width, ())


def _decode(footage: Footage, times: Sequence[float], height: int, width: int, seek: float | None) -> list[Tensor]:
    """The frames at `times`; [] where decoding began only after the first of them."""
    frames: list[Tensor] = []
    shown: tuple[av.VideoFrame, float] | None = None  # the latest frame, and when it came
    pixels: Tensor | None = None  # of it, once they are needed
    with _opened(footage.path) as (container, stream):
        stream.thread_type = "AUTO"
        if seek is not None:
            container.seek(round(seek / _tick(stream)), stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"{footage.path} is damaged: a frame cannot be decoded")
            now = frame.time if footage.stamped else footage.times[number]
            if shown is None and now > times[0] + TICK:
                return []
            while shown and len(frames) < len(times) and times[len(frames)] < now - TICK:
                if pixels is None:
                    pixels = video_io.cover_size(_pixels(shown[0]), height, width, footage.shape)
                frames.append(pixels)
            if len(frames) == len(times):
                return frames
            shown, pixels = (frame, now), None
    if shown and footage.times[-1] > shown[1] + TICK:
        raise ValueError(f"{footage.path} is damaged: it stops at {shown[1]:.2f} of {footage.end:.2f} seconds")
    if shown:
        last = video_io.cover_size(_pixels(shown[0]), height, width, footage.shape)
        frames += [last] * (len(times) - len(frames))
    return frames


def _pixels(frame: av.VideoFrame) -> Tensor:
    """uint8 (H, W, 3) of a frame, upright; alpha is laid on white, ten bits become eight."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", interpolation=video_io.SMOOTH).astype(np.float32)
        alpha = rgba[..., 3:]
        rgb = np.rint((rgba[..., :3] * alpha + 255 * (255 - alpha)) / 255)
    else:
        rgb = frame.to_ndarray(format="rgb24", interpolation=video_io.SMOOTH)
    # a phone's upright video is stored lying down, with the angle (counterclockwise) next to it
    upright = np.rot90(rgb.astype(np.uint8), k=round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(upright))


def _times(packets: list[tuple[int | None, int]], stream: av.VideoStream) -> tuple[list[float], float]:
    """When each frame comes, in seconds, and how long the last one stays, of packets: (time stamp, duration)."""
    rate = stream.average_rate or Fraction(10)
    shown = sorted((pts, duration) for pts, duration in packets if pts is not None)
    if len(shown) < len(packets):  # such as a raw stream, which has no time stamps
        return [float(i / rate) for i in range(len(packets))], float(1 / rate)
    times = [float(pts * _tick(stream)) for pts, _ in shown]
    gaps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
    typical = gaps[len(gaps) // 2] if gaps else float(1 / rate)
    return times, float(shown[-1][1] * _tick(stream)) or typical


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the video should be by its header; 0 where that does not say."""
    if stream.duration:
        return float(stream.duration * _tick(stream))
    return 0.0 if container.streams.audio else (container.duration or 0) / av.time_base


def _tick(stream: av.VideoStream) -> Fraction:
    """The unit of the stream's time stamps, in seconds."""
    return stream.time_base or Fraction(1, 1000)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video. Raises Unusable without one, ValueError for what FFmpeg cannot read."""
    try:
        # "file:", or a name such as a:b.mp4 would be taken for a network address
        with av.open(f"file:{check_regular(path)}", metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise Unusable("has sound but no video" if container.streams.audio else "has no video in it")
            try:
                video_io.limit_decoding(streams[0])
            except ValueError as error:
                raise Unusable(f"cannot be decoded: {error}") from error
            yield container, streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged ({printable(error.strerror or error, 100)})") from error
