"""Video files for tests, written with PyAV: given times, rotated, with alpha, in ten bits, HDR, sound only."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorTrc


def flat(levels: list[int], height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames of these levels, uint8 (F, H, W, 3)."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3)).copy()


def write(
    path: Path, frames: np.ndarray, times: list[float] | None = None, codec: str = "libx264", pix_fmt: str = "yuv420p",
    rotation: int = 0, trc: ColorTrc | None = None, square: Fraction | None = None, options: dict | None = None,
) -> Path:  # fmt: skip
    """Frames (F, H, W, 3 or 4) at `times` in seconds (default: 10 per second), the last shown as long as the first."""
    times = [i / 10 for i in range(len(frames))] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if square:
            stream.codec_context.sample_aspect_ratio = square
        if trc:
            stream.codec_context.color_trc = trc
        if rotation:
            stream.set_display_rotation(rotation)
        kind = "rgba" if frames.shape[-1] == 4 else "rgb24"
        for rgb, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format=kind)
            frame = frame.reformat(format=pix_fmt) if pix_fmt != kind else frame
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
