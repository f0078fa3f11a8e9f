"""Reading images, with Pillow: as they are meant to be seen, and within limits, as a file may come from a stranger.

Pillow knows where each format keeps its orientation, palette and colour planes. It is told here what it may read: the
size, proportions and number of chunks are checked before a pixel is decoded, and large photos are decoded smaller.
"""

import contextlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import torch
from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.PngImagePlugin import PngImageFile

from kandinsky5.files import read_bytes
from kandinsky5.screen import printable, shown

Source = str | os.PathLike | bytes | IO[bytes] | Image.Image | torch.Tensor | np.ndarray

LARGEST_IMAGE = 2**28  # bytes of a file, and pixels of a JPEG: a photo of 200 megapixels has about 100 MB
LARGEST_DECODED = 52_000_000  # pixels of what is decoded whole, at 4 bytes each, and as WebP 16
LARGEST_EXACT = 25_000_000  # pixels; larger images are halved until they have less, which a video does not show
MOST_OBLONG = 50  # times as long as wide: then a video of 512x768 pixels has its shortest side, 88
MOST_SCANS = 32  # of a progressive JPEG, each of which passes over all of its pixels; cameras write 10
MOST_READS = 10_000, 300_000  # pieces of a file before its pixels, and with them: chunks of a PNG take four each
# What a file begins with, what reads it, and how many bytes may come before its pixels: of a photo 8 MB, depth maps and
# thumbnails among them; of a TIFF 2 MB, as they may all be offsets, which take a hundred times as much memory.
FORMATS: tuple[tuple[bytes, Callable[..., Image.Image], int], ...] = (
    (rb"\xff\xd8\xff", jpeg_factory, 2**23),
    (rb"\x89PNG\r\n\x1a\n", PngImageFile, 2**23),
    (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile, LARGEST_IMAGE),
    (rb"....ftyp(?:avi[fs]|m[is]f1.{4,48}avi[fs])", AvifImagePlugin.AvifImageFile, LARGEST_IMAGE),
    (rb"GIF8[79]a", GifImagePlugin.GifImageFile, 2**21),
    (rb"BM", BmpImagePlugin.BmpImageFile, 2**21),
    (rb"(?:II|MM)[*+\0]{2}", TiffImagePlugin.TiffImageFile, 2**21),
)
# The axes to flip (0: rows, 1: columns) for EXIF orientations 1 to 4; 5 to 8 are the same after a transpose.
ORIENTATION_FLIPS = ((), (1,), (0, 1), (0,))


def read_image(source: Source) -> torch.Tensor:
    """An image as it is meant to be seen -> uint8 (H, W, 3).

    source: a path, the bytes of a file, a file opened in binary mode, Pillow's image, or uint8 (H, W, 3), (H, W, 4) or
        (H, W). The EXIF orientation is applied, transparency is laid on white, other modes become 8-bit RGB, and of an
        animation it is the first frame. A file or Pillow's image of more than LARGEST_EXACT pixels is halved until it
        has less.
    Raises ValueError for anything else, for a file that is damaged or stops early, and for one that is too large.
    """
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return _of_array(source)
    with reading(source, "give a whole JPEG, PNG, WebP, GIF, AVIF, BMP or TIFF file"):
        return _decode(source if isinstance(source, Image.Image) else open_image(_bytes_of(source)))


@contextlib.contextmanager
def reading(source: object, remedy: str) -> Iterator[None]:
    """Inside, whatever is raised, of which libraries have a dozen kinds for damaged files, becomes one ValueError."""
    try:
        with warnings.catch_warnings():  # of odd tags, which change nothing
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        name = printable(source, 300) if isinstance(source, (str, os.PathLike)) else "the image"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read {name} ({printable(reason, 300)}): {remedy}") from error


def open_image(data: bytes) -> Image.Image:
    """Pillow's image of a file's bytes: its size, mode and tags, but no pixels yet; a large JPEG's are decoded smaller.

    Raises ValueError where more would have to be read or decoded than is allowed, and what Pillow raises for damaged
    files. Not through Image.open, which takes its limit from a global of the calling program.
    """
    for signature, reader, most in FORMATS:
        if re.match(signature, data, re.DOTALL):
            image = _open(data, reader, most)
            if isinstance(image, PngImageFile):
                image.verify()  # the checksums, which decoding passes over
                image = _open(data, reader, most)
            tile = [getattr(image, "tag_v2", {}).get(side, 1) for side in (322, 323)]  # of a TIFF
            if tile[0] * tile[1] > LARGEST_DECODED:
                raise ValueError(f"its tiles have {tile[0]}x{tile[1]} pixels")
            if "progressive" in image.info and data.count(b"\xff\xda") > MOST_SCANS:
                raise ValueError(f"it is a progressive JPEG of more than {MOST_SCANS} scans")
            if (factor := _choose_factor(image)) > 1 and isinstance(image, JpegImageFile):
                image.draft(None, (image.width // factor, image.height // factor))
            return image
    if re.match(rb"....ftyp(?:he[iv]|m[is]f1)", data, re.DOTALL):
        if "HEIF" in Image.OPEN:  # by register_heif_opener() of pillow-heif
            return Image.OPEN["HEIF"][0](io.BytesIO(data), "")
        raise ValueError("it is HEIC, which Pillow reads with pillow-heif alone: save it as JPEG")
    raise ValueError("it is none of these" if data else "it is empty")


def _open(data: bytes, reader: Callable[..., Image.Image], most: int) -> Image.Image:
    file = _Limited(data, MOST_READS[0], most)
    image = reader(file, "")
    file.reads, file.bytes = MOST_READS[1], 4 * LARGEST_IMAGE
    return image


class _Limited(io.BytesIO):
    """A file in memory of which only so many pieces, and bytes, may be read; what is read at once is one piece."""

    def __init__(self, data: bytes, reads: int, most: int):
        super().__init__(data)
        self.reads, self.bytes = reads, most

    def read(self, size: int | None = -1) -> bytes:
        """Raises ValueError where it is too much."""
        piece = super().read(size)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(piece)
        if min(self.reads, self.bytes) < 0:
            raise ValueError("it holds too much besides its pixels")
        return piece


def _bytes_of(source: str | os.PathLike | bytes | IO[bytes]) -> bytes:
    """The content of a path, bytes or an open file, which is left where it was."""
    if isinstance(source, (str, os.PathLike)):
        return read_bytes(os.fspath(source), LARGEST_IMAGE)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        place = source.tell() if hasattr(source, "seekable") and source.seekable() else None
        if place is not None:
            source.seek(0)
        data = source.read(LARGEST_IMAGE + 1)
        if place is not None:
            source.seek(place)
    else:
        raise ValueError(f"{shown(source)} is no image")
    if not isinstance(data, bytes):
        raise ValueError("it is open as text; open it in binary mode")
    if len(data) > LARGEST_IMAGE:
        raise ValueError(f"it has more than {LARGEST_IMAGE:,} bytes")
    return data


def _decode(image: Image.Image) -> torch.Tensor:
    """uint8 (H, W, 3), upright: a few rows at a time, so that little more than the decoded image is in memory."""
    factor = _choose_factor(image)
    image.load()
    width, height = (-(-side // factor) for side in image.size)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 64):
        bottom = min((top + 64) * factor, image.height)
        band = _to_rgb(image.crop((0, top * factor, image.width, bottom)))
        pixels[top : top + 64] = np.asarray(band.reduce(factor) if factor > 1 else band)
    transposed, flips = divmod(_orientation(image) - 1, 4)
    upright = torch.from_numpy(pixels).transpose(0, 1) if transposed else torch.from_numpy(pixels)
    return upright.flip(ORIENTATION_FLIPS[flips]) if flips else upright


def _choose_factor(image: Image.Image) -> int:
    """By how much an image is made smaller: 1, 2, 4, … Raises ValueError where it is too large to be decoded."""
    width, height = image.size
    check_sides(height, width)
    by_rows = image.format is None or isinstance(image, JpegImageFile) and "progressive" not in image.info
    most = LARGEST_IMAGE if by_rows else LARGEST_DECODED
    if width * height > most:
        raise ValueError(f"it has {width}x{height} pixels, and may have {most / 1e6:.0f} million")
    return 2 ** max(0, math.ceil(math.log(width * height / LARGEST_EXACT, 4)))


def check_sides(height: int, width: int) -> None:
    """ValueError for an image, or a frame as seen, that is more oblong than MOST_OBLONG."""
    if not min(height, width) or max(height, width) > MOST_OBLONG * min(height, width):
        raise ValueError(
            f"it has {width}x{height} pixels, and its sides may differ by a factor of {MOST_OBLONG}: crop it"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as RGB. ValueError for 32-bit pixels, whose white nobody knows."""
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, mode {image.mode}; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(rgba, mask=rgba)
    return opaque


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it is damaged, as viewers do."""
    try:
        value = image.getexif().get(0x0112, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # Pillow raises many kinds
        return 1


def _of_array(pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3), (H, W, 4) or (H, W), on any device -> uint8 (H, W, 3)."""
    rule = "give a path, or uint8 (height, width, 3)"
    if isinstance(pixels, torch.Tensor) and (pixels.is_meta or pixels.is_nested or pixels.layout != torch.strided):
        raise ValueError(f"image is a tensor without pixels ({pixels.device}, {pixels.layout}): {rule}")
    shape = tuple(pixels.shape)
    if pixels.dtype not in (torch.uint8, np.uint8) or len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"image is {pixels.dtype} {shape}: {rule}")
    check_sides(*shape[:2])
    rgb = pixels.detach().cpu() if isinstance(pixels, torch.Tensor) else torch.from_numpy(np.array(pixels))
    return rgb if shape[2:] == (3,) else torch.from_numpy(np.array(_to_rgb(Image.fromarray(rgb.numpy()))))
