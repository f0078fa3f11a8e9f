"""Reading and writing videos, with PyAV; pixels between uint8 and the VAE's [-1, 1]. Images: image_io.py.

On disk and for the user pixels are uint8 RGB, channels last: an image (H, W, 3), a video (F, H, W, 3).
For the VAE they are floats in [-1, 1], channels first: (B, 3, F, H, W).
"""

import contextlib
import io
import json
import math
import struct
import tempfile
import uuid
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from einops import rearrange

from kandinsky5.files import check_regular, check_writable, free_name, parse_json, read_bytes, replacing
from kandinsky5.image_io import LARGEST_DECODED, LARGEST_IMAGE, open_image, reading
from kandinsky5.image_io import read_image as read_image  # passed on: an image is a video's first frame

# Most files hold colour at half the resolution of brightness. PyAV's default repeats each colour pixel, which
# is up to 18 levels off in a smooth image; with these flags it interpolates (within 3 of libjpeg).
SMOOTH = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
LONGEST_COMMENT = 2**21  # characters of settings: six for each of a prompt of 100,000, and as many again


def read_video(path: str | Path) -> tuple[torch.Tensor, float]:
    """Read a whole video, of any format FFmpeg knows -> uint8 (F, H, W, 3), frames per second.

    Raises ValueError if it cannot be read or is damaged.
    """
    with reading(path, "give a whole video file, such as an .mp4"), _open_video(path) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        limit_decoding(stream)
        frames = [
            # a phone's upright video is stored lying down, with the angle (counterclockwise) next to it
            np.rot90(frame.to_ndarray(format="rgb24", interpolation=SMOOTH), k=round(frame.rotation / 90))
            for frame in container.decode(stream)
        ]
        if stream.average_rate is None:  # such as a GIF of one frame
            raise ValueError("it does not say its frame rate")
        return torch.from_numpy(np.stack(frames)), float(stream.average_rate)


def limit_decoding(stream: av.VideoStream) -> None:
    """Make damage an error instead of a grey patch. ValueError for frames of more than LARGEST_DECODED pixels."""
    if not stream.codec_context:
        raise ValueError("its codec is not known here")
    if stream.width * stream.height > LARGEST_DECODED:
        most = LARGEST_DECODED / 1e6
        raise ValueError(f"its frames have {stream.width}x{stream.height} pixels, and may have {most:.0f} million")
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(2 * LARGEST_DECODED)}


def keep_aspect_size(height: int, width: int, area: int, divisor: int) -> tuple[int, int]:
    """(height, width) scaled to about `area` pixels, each side rounded to a multiple of `divisor`.

    The official code's rule for image-to-video, at 512·768 or 1024² pixels, when no size is requested.
    """
    factor = math.sqrt(area / (height * width))
    height, width = (max(divisor, round(side * factor / divisor) * divisor) for side in (height, width))
    return height, width


def resize_image(image: torch.Tensor | np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (height, width, 3), bilinear and antialiased on uint8, as the official code does it.

    Unchanged if it has that size.
    """
    image = torch.from_numpy(image) if isinstance(image, np.ndarray) else image
    if image.shape[:2] == (height, width):
        return image
    pixels = rearrange(image, "H W C -> 1 C H W")
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)  # (1, 3, height, width)
    return rearrange(pixels, "1 C H W -> H W C")


def cover_size(
    image: torch.Tensor | np.ndarray, height: int, width: int, shape: tuple[int, int] | None = None
) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (height, width, 3): resized until it covers that, and the middle of it.

    shape: height and width as seen, where pixels are not square.
    """
    tall, wide = shape or image.shape[:2]
    factor = max(height / tall, width / wide)
    covering = resize_image(image, max(round(tall * factor), height), max(round(wide * factor), width))
    top, left = (covering.shape[0] - height) // 2, (covering.shape[1] - width) // 2
    return covering[top : top + height, left : left + width]


def halve_image(image: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (H/2, W/2, 3), at least one pixel."""
    return resize_image(image, max(image.shape[0] // 2, 1), max(image.shape[1] // 2, 1))


def from_uint8(frames: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) -> the VAE's float32 (B, 3, F, H, W) in [-1, 1]."""
    frames = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
    video = frames.to(torch.float32) / 255 * 2 - 1
    return rearrange(video, "B F H W C -> B C F H W")


def to_float(video: torch.Tensor) -> torch.Tensor:
    """The VAE's (B, 3, F, H, W) in [-1, 1] -> float32 (B, F, H, W, 3) in [0, 1], clamped.

    Half precision becomes float32 first (diffusers: later), since x/2 + 0.5 in bfloat16 merges levels.
    """
    return rearrange((video.float() / 2 + 0.5).clamp(0, 1), "B C F H W -> B F H W C")


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """The VAE's (B, 3, F, H, W) in [-1, 1] -> uint8 (B, F, H, W, 3), clamped, rounded as diffusers does."""
    return (to_float(video) * 255).round().to(torch.uint8)


def write_video(
    path: str | Path, frames: torch.Tensor | np.ndarray, fps: float = 24, quality: float = 8,
    metadata: dict[str, object] | None = None, compress: bool = True, keep: bool = False,
) -> None:  # fmt: skip
    """Write RGB frames (F, H, W, 3) as an H.264 mp4, or one frame as a PNG if the path ends in .png.

    frames: uint8, or floats in [0, 1]; also a batch of one, as a pipeline returns it.
    quality: 10 is lossless to the eye (x264's CRF 18), 8 is good (22), 5 is small (28), 1 is rough (36).
    metadata: kept in the file for `read_metadata`, as JSON in the comment tag.
    compress: False writes a PNG faster and larger: of smooth images twenty times and three times.
    keep: save frames that cannot be written, as on a full disk, as an .npz; the OSError says where (`keep_frames`).
    The same frames give the same bytes. A failure leaves an older file at `path` as it was, and nothing else.
    Raises what `check_writable` raises, OSError if the disk is full, ValueError for other frames and for odd sides in
    an mp4.
    """
    frames = _as_frames(frames)
    check_writable(path, len(frames), fps, quality)
    # ASCII JSON (\u043a for к), so that no tag or tool on the way can spoil it
    comment = None if metadata is None else json.dumps(metadata)
    try:
        with replacing(path) as temporary:
            if temporary.suffix.lower() == ".png":
                temporary.write_bytes(_encode_png(frames[0], comment, compress))
            else:
                _encode_mp4(temporary, frames, fps, quality, comment)
    except (OSError, av.FFmpegError) as error:  # a full disk among them
        reason = getattr(error, "strerror", None) or error
        kept = f"; the frames are in {keep_frames(path, frames)}" if keep else ""
        raise OSError(f"cannot write {path} ({reason}): free space or name another file{kept}") from error


def _as_frames(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    """uint8 (F, H, W, 3) of what `write_video` takes."""
    if isinstance(frames, torch.Tensor):
        if frames.is_meta:
            raise ValueError("frames on the device meta have shapes and no pixels: choose cpu or cuda")
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()  # NumPy has no bfloat16
    array = np.asarray(frames)
    array = array[0] if array.ndim == 5 and len(array) == 1 else array
    if array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape or array.dtype.kind not in "uf":
        raise ValueError(f"frames are {array.dtype} {array.shape}: give one video, uint8 or floats (F, H, W, 3)")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN neither
            raise ValueError(f"frames are floats from {array.min()} to {array.max()}: give 0 to 1, or uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"frames are {array.dtype}: give uint8, or floats in [0, 1]")
    return array


def keep_frames(path: str | Path, frames: np.ndarray) -> str:
    """Where frames (F, H, W, 3) were kept, as np.load reads them: next to `path`, which could not be written, or in the
    temporary folder; in parts where the size of a file is limited. Raises OSError where nothing can be written."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, frames=frames)
    data, name = buffer.getbuffer(), free_name(Path(path).with_suffix(".npz"))
    for place in (name, Path(tempfile.gettempdir()) / f"{uuid.uuid4().hex}.npz"):
        with contextlib.suppress(OSError), replacing(place) as temporary:
            temporary.write_bytes(data)
            return str(place)
    size = _file_size_limit() or len(data)
    for number in range(0, len(data), size):
        name.with_suffix(f".npz.{number // size:04d}").write_bytes(data[number : number + size])
    return f"{name}.*, to be joined: cat {name}.* > {name}"


def _file_size_limit() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def read_metadata(path: str | Path) -> dict[str, object]:
    """The `metadata` that `write_video` stored in the mp4 or PNG at `path`; ValueError if there is none."""
    with reading(path, "give an .mp4 or .png that sample.py wrote"):
        if Path(path).suffix.lower() == ".png":
            tags = {str(name): tag for name, tag in open_image(read_bytes(path, LARGEST_IMAGE)).info.items()}
        else:
            with _open_video(path) as container:
                tags = dict(container.metadata)
    comment = {name.lower(): text for name, text in tags.items()}.get("comment", "")  # re-muxed as mkv: COMMENT
    try:
        metadata = parse_json(comment.encode(), path) if len(comment) <= LONGEST_COMMENT else None
    except (ValueError, AttributeError):  # a GIF's is bytes
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} carries no settings: was it written by sample.py? Give the original file")
    return metadata


def _open_video(path: str | Path) -> av.container.InputContainer:
    # "file:", or a name such as a:b.mp4 would be taken for a network address
    return av.open(f"file:{check_regular(path)}", metadata_errors="replace")


def _encode_mp4(path: Path, frames: np.ndarray, fps: float, quality: float, comment: str | None) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"cannot write {height}x{width} pixels as H.264: the sides must be even")
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        rate = Fraction(float(fps)).limit_denominator(1001)  # 23.976023976 -> 24000/1001
        # chromaloc=1: swscale puts colour in the middle of 2x2 pixels; H.264's default is their left side.
        # mbtree=0: x264's macroblock tree reads memory that it never wrote (bytes differ from run to run).
        options = {"crf": str(38 - 2 * quality), "x264-params": "chromaloc=1:mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        encoder = stream.codec_context
        # x264's bytes depend on the number of threads; the default is the machine's number of cores
        encoder.thread_count, encoder.thread_type = 4, "FRAME"
        # without these tags players guess BT.601 or BT.709 by the frame's size
        encoder.color_range, encoder.colorspace = ColorRange.MPEG, Colorspace.ITU709
        encoder.color_primaries, encoder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            yuv = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=SMOOTH,
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def _encode_png(rgb: np.ndarray, comment: str | None, compress: bool) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt = rgb.shape[0], rgb.shape[1], "rgb24"
    encoder.time_base = Fraction(1, 24)  # FFmpeg asks for one
    if not compress:
        encoder.options = {"compression_level": "0"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    png = b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None))
    if comment is None:
        return png
    # FFmpeg writes no text: add a tEXt chunk (body length, type, body, CRC; PNG 3rd ed. §5.3, §11.3.3)
    body = b"Comment\0" + comment.encode("ascii")
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    header = 8 + 25  # bytes of the signature and of the IHDR chunk, which must come first
    return png[:header] + chunk + png[header:]
