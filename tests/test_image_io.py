"""Images of every kind, as Pillow's own functions show them or as they were before they were stored; and limits."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kandinsky5 import image_io
from kandinsky5.image_io import read_image

READABLE = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")


def smooth_image(height=64, width=96) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BILINEAR)


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = np.linspace(0, 255, image.width).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width=16, height=16, before=b"", after=b"") -> bytes:
    """A black one of one bit a pixel, with other chunks around its pixels."""
    rows = zlib.compress(bytes((width // 8 + 1) * height if height < 20_000 else 9), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + after + chunk(b"IEND", b"")


def segment(mark: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return b"\xff" + bytes([mark]) + struct.pack(">H", len(body) + 2) + body


def as_pillow_shows(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def difference(a, b) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def is_refused(data, *words) -> None:
    with pytest.raises(ValueError, match="cannot read") as error:
        read_image(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(str(word) in str(error.value) for word in words)


# --- as it is meant to be seen


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_as_pillow_does(file_format, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a camera"  # an entry before the orientation
    exif[0x0112] = orientation
    data = encoded(smooth_image(32, 48), file_format, exif=exif)
    expected = as_pillow_shows(data)
    assert expected.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert np.array_equal(read_image(data), expected)


TIFF = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # only: turn a quarter
PROFILE = f"\nexif\n{len(TIFF) + 6:8}\n{(b'Exif' + bytes(2) + TIFF).hex()}\n".encode()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("seen", ["raw profile", "XMP in PNG", "XMP in JPEG", "MM", "LONG"])
def test_orientation_is_read_where_the_format_keeps_it(seen):
    image = smooth_image(32, 48)
    jpeg, plain = encoded(image, "JPEG"), encoded(image, "PNG")
    entry = struct.pack(">HHII", 0x0112, 4, 1, 6)
    data = {
        "raw profile": plain[:33] + chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE)) + plain[33:],
        "XMP in PNG": plain[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + plain[33:],
        "XMP in JPEG": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + jpeg[2:],
        "MM": encoded(
            image, "JPEG", exif=b"Exif\0\0" + struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 274, 3, 1, 6, 0, 0)
        ),
        "LONG": encoded(image, "WEBP", exif=b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)),
    }[seen]
    assert read_image(data).shape == (48, 32, 3) == as_pillow_shows(data).shape


@pytest.mark.parametrize("elsewhere", ["comment", "pixels", "other segment", "text", "thumbnail"])
def test_what_looks_like_exif_elsewhere_turns_nothing(elsewhere):
    image, lure = smooth_image(32, 48), b"Exif\0\0" + TIFF
    jpeg, plain = encoded(image, "JPEG"), encoded(image, "PNG")
    data = {
        "comment": jpeg[:2] + segment(0xFE, lure) + jpeg[2:],
        "pixels": encoded(image, "BMP")[:-60] + lure + bytes(60 - len(lure)),
        "other segment": jpeg[:2] + segment(0xED, lure) + jpeg[2:],
        "text": plain[:33] + chunk(b"tEXt", b"a\0eXIf" + TIFF) + plain[33:],
        "thumbnail": jpeg + encoded(image, "JPEG", exif=lure),
    }[elsewhere]
    assert read_image(data).shape == (32, 48, 3)


@pytest.mark.parametrize(
    "tiff",
    [struct.pack(">2sHI", b"MM", 42, 10**9), b"MM", b"II*\0" + bytes(3), TIFF.replace(b"\6", b"\x63"), b"XX" + TIFF],
)
def test_damaged_exif_is_ignored(tiff):
    assert read_image(encoded(smooth_image(32, 48), "JPEG", exif=b"Exif\0\0" + tiff)).shape == (32, 48, 3)


KINDS = {
    "jpeg": encoded(smooth_image(), "JPEG", quality=95),
    "progressive": encoded(smooth_image(), "JPEG", quality=95, progressive=True),
    "grey jpeg": encoded(smooth_image().convert("L"), "JPEG"),
    "cmyk": encoded(smooth_image().convert("CMYK"), "JPEG"),
    "odd jpeg": encoded(smooth_image(63, 97), "JPEG", quality=95, subsampling=2),
    "webp": encoded(smooth_image(63, 97), "WEBP", quality=95),
    "webp with alpha": encoded(with_alpha(smooth_image()), "WEBP", quality=95),
    "avif with alpha": encoded(with_alpha(smooth_image(63, 97)), "AVIF"),
    "grey": encoded(smooth_image(65, 97).convert("L"), "PNG"),
    "one bit": encoded(smooth_image(65, 97).convert("1"), "PNG"),
    "palette": encoded(smooth_image(65, 97).convert("P"), "PNG"),
    "palette with a clear colour": encoded(smooth_image(65, 97).convert("P"), "PNG", transparency=5),
    "palette with alphas": encoded(smooth_image(65, 97).quantize(9), "PNG", transparency=bytes(range(0, 255, 30))),
    "clear colour": encoded(Image.new("RGB", (30, 20), (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
    "rgba": encoded(with_alpha(smooth_image(65, 97)), "PNG"),
    "grey with alpha": encoded(with_alpha(smooth_image(65, 97)).convert("LA"), "PNG"),
    "gif": encoded(smooth_image(65, 97), "GIF"),
    "gif with a clear colour": encoded(smooth_image(65, 97).quantize(8), "GIF", transparency=3),
    "bmp": encoded(smooth_image(), "BMP"),
    "packed tiff": encoded(smooth_image(), "TIFF", compression="tiff_lzw"),
    "rgba tiff": encoded(with_alpha(smooth_image()), "TIFF"),
    "cmyk tiff": encoded(smooth_image().convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_rgb_on_white(kind):
    assert difference(read_image(KINDS[kind]), as_pillow_shows(KINDS[kind])) <= 1


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_brightness(file_format):
    ramp = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (8, 1))  # 0, 257, ... 65535 are 0, 1, ... 255
    assert np.array_equal(read_image(encoded(Image.fromarray(ramp), file_format))[0, :, 1], np.arange(256))


@pytest.mark.parametrize("file_format", ["WEBP", "GIF", "AVIF", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(file_format):
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert difference(read_image(data), np.full((32, 48, 3), (255, 0, 0))) <= 4


def test_photos_with_a_second_image_are_the_first():
    """As phones and stereo cameras write them."""
    data = encoded(smooth_image(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.array_equal(read_image(data), as_pillow_shows(data))


@pytest.mark.parametrize("kind", ["jpeg", "rgba", "palette with a clear colour", "gif", "grey with alpha", "one bit"])
def test_one_image_is_the_same_however_it_is_given(kind, tmp_path):
    data, path = KINDS[kind], tmp_path / "image"
    path.write_bytes(data)
    expected = read_image(path)
    read = io.BytesIO(data)
    read.seek(9)
    with open(path, "rb") as file:
        ways = [
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            read,
            file,
            Image.open(path),
            Image.open(path).copy(),
        ]
        ways += [Image.open(path).convert("RGBA"), expected, expected.numpy(), expected.numpy()[:, ::-1][:, ::-1]]
        ways += [read, file]  # again
        assert all(torch.equal(read_image(way), expected) for way in ways)
    assert read.tell() == 9


def test_pillows_images_are_left_as_they_were():
    image = Image.open(
        io.BytesIO(encoded(smooth_image(), "GIF", save_all=True, append_images=[smooth_image().rotate(9)]))
    )
    image.seek(1)
    read_image(image)
    assert (image.tell(), image.size, image.mode) == (1, (96, 64), image.copy().mode)


def test_arrays_may_be_grey_or_have_alpha():
    grey, rgba = np.asarray(smooth_image().convert("L")), np.array(with_alpha(smooth_image()))
    assert torch.equal(read_image(grey), torch.from_numpy(np.repeat(grey[..., None], 3, 2)))
    assert torch.equal(read_image(torch.from_numpy(rgba)), read_image(encoded(Image.fromarray(rgba), "PNG")))


# --- what is damaged, or is none


@pytest.mark.parametrize("file_format", READABLE)
@pytest.mark.parametrize("part", [0, 0.05, 0.5, 0.95])
def test_a_truncated_image_is_an_error_and_not_half_an_image(file_format, part):
    data = encoded(smooth_image(), file_format)
    is_refused(data[: int(part * len(data))], "JPEG, PNG, WebP")


def test_a_flipped_bit_in_a_png_is_an_error():
    data = bytearray(encoded(smooth_image(), "PNG", compress_level=0))
    data[len(data) // 2] ^= 1  # which no decompression notices before the end
    is_refused(bytes(data))


def test_heic_needs_a_plugin_that_may_be_registered(monkeypatch):
    data = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(99)
    is_refused(data, "HEIC", "JPEG")
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: smooth_image(8, 8), None))
    assert read_image(data).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "source",
    [
        b"", "text", 3, object(), {}, [1], io.StringIO("text"), Image.new("F", (8, 8)), Image.new("I", (8, 8)),
        Image.new("RGB", (0, 5)), encoded(smooth_image(), "PPM"), encoded(smooth_image(), "PDF"), "a\0b", "x" * 10**6,
    ],
    ids=lambda source: repr(source)[:20],
)  # fmt: skip
def test_what_is_no_image_is_refused(source):
    is_refused(source, "give a whole")


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8, 3)), np.zeros((8, 8, 2), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8,), np.uint8),
     np.zeros((1, 8, 8, 3), np.uint8), torch.zeros(8, 8, 3, dtype=torch.int64)],
)  # fmt: skip
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError) as error:
        read_image(array)
    assert "\n" not in str(error.value)


# --- limits


def inflated(size: int) -> bytes:
    compress = zlib.compressobj(9)
    return b"".join(compress.compress(bytes(2**20)) for _ in range(size >> 20)) + compress.flush()


def resized(data: bytes, at: int, form: str, width: int, height: int) -> bytes:
    """A file whose header tells another size."""
    return data[:at] + struct.pack(form, width, height) + data[at + struct.calcsize(form) :]


BLACK = Image.new("L", (16, 16))
JPEG = encoded(BLACK, "JPEG")
SIZE = JPEG.index(b"\xff\xc0") + 5
GIF = encoded(BLACK, "GIF")
TAGS = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]


def tiff(*tags: tuple[int, int, int, int], size: int = 4096) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted({tag[0]: tag for tag in (*TAGS, *tags)}.values()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(size)


BOMBS = {
    "10,000 squared": lambda: png(10_000, 10_000),
    "2^31 squared": lambda: png(2**31 - 1, 2**31 - 1),
    "grey JPEG of 65,500 squared": lambda: resized(JPEG, SIZE, ">HH", 65_500, 65_500),
    "progressive JPEG of 200 megapixels": lambda: resized(
        (p := encoded(BLACK, "JPEG", progressive=True)), p.index(b"\xff\xc2") + 5, ">HH", 16_000, 12_000
    ),
    "GIF of 65,535 squared": lambda: resized(GIF, 6, "<HH", 65_535, 65_535),
    "BMP of 30,000 squared": lambda: resized(encoded(BLACK.convert("RGB"), "BMP"), 18, "<ii", 30_000, 30_000),
    "TIFF of 2^31 squared": lambda: tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31), (273, 4, 1, 200), (279, 4, 1, 256)),
    "AVIF of 100 megapixels": lambda: encoded(BLACK.resize((10_000, 10_000)), "AVIF", speed=10),
    "WebP of 13,000 squared": lambda: encoded(BLACK.resize((13_000, 13_000)), "WEBP", method=0, lossless=True),
    "tiles of 30,000 squared": lambda: tiff(
        (259, 3, 1, 5), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 200), (325, 4, 1, 256)
    ),
    "16,000 to 1": lambda: png(16_000, 1),
    "1 to 16,000": lambda: png(1, 16_000),
    "a gigabyte of text": lambda: png(before=chunk(b"zTXt", b"c\0\0" + inflated(2**30))),
    "a gigabyte of text behind": lambda: png(after=chunk(b"iTXt", b"c\0\1\0\0\0" + inflated(2**30))),
    "a gigabyte of colour profile": lambda: png(before=chunk(b"iCCP", b"c\0\0" + inflated(2**30))),
    "300,000 chunks": lambda: png(before=chunk(b"tEXt", b"a\0b") * 300_000),
    "300,000 chunks behind": lambda: png(after=chunk(b"tEXt", b"a\0b") * 300_000),
    "a million JPEG comments": lambda: JPEG[:2] + segment(0xFE, b"") * 1_000_000 + JPEG[2:],
    "EXIF in 2,000 parts": lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 2_000 + JPEG[2:],
    "a GIF comment in 100,000 parts": lambda: (
        GIF[: (e := GIF.index(b",", 13))] + b"!\xfe" + (b"\xff" + b"x" * 255) * 100_000 + b"\0" + GIF[e:]
    ),
    "500,000 GIF extensions": lambda: GIF[: (e := GIF.index(b",", 13))] + b"!\xfe\1x\0" * 500_000 + GIF[e:],
    "2 million TIFF strips": lambda: tiff((273, 4, 2_000_000, 99), (279, 4, 2_000_000, 99), size=9_000_000),
    "1,000 scans": lambda: (
        (p := encoded(BLACK, "JPEG", progressive=True))[:-2] + p[p.rindex(b"\xff\xda") : -2] * 1_000 + p[-2:]
    ),
}
LARGE = ("AVIF of 100 megapixels", "WebP of 13,000 squared", "a gigabyte", "EXIF in 2,000")  # themselves slow to make


@pytest.mark.parametrize("bomb", [name for name in BOMBS if not name.startswith(LARGE)])
def test_what_inflates_is_refused_at_once(bomb):
    is_refused(BOMBS[bomb]())


PROGRAM = """
import sys
from kandinsky5.image_io import read_image

def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
try:
    shape = tuple(read_image(sys.argv[1]).shape)
except ValueError as error:
    shape = ()
assert peak() - before < int(sys.argv[2]) * 1000, f"{peak() - before} kB"
print(shape)
"""


def read_in_process(path, most: int) -> str:
    """The shape of an image that was read within `most` MB."""
    if sys.platform != "linux":
        pytest.skip("reads /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(most)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.fuzz
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_little_memory(bomb, tmp_path):
    (tmp_path / "image").write_bytes(BOMBS[bomb]())
    assert read_in_process(tmp_path / "image", 150 + (tmp_path / "image").stat().st_size // 1_000_000) == "()"


@pytest.mark.fuzz
@pytest.mark.parametrize("size, expected", [((8192, 6144), (3072, 4096, 3)), ((16_320, 12_240), (3060, 4080, 3))])
def test_photos_of_50_and_200_megapixels_take_little_memory(size, expected, tmp_path):
    y, x = np.arange(size[1], dtype=np.uint8)[:, None], np.arange(size[0], dtype=np.uint8)[None]
    rgb = np.stack(np.broadcast_arrays(x, y, np.uint8(128)), axis=2)
    Image.fromarray(rgb).save(tmp_path / "photo.jpg")
    assert read_in_process(tmp_path / "photo.jpg", 150) == str(expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "Pillow's"])
def test_what_is_larger_than_a_video_is_halved(kind, monkeypatch):
    """As the mean of 2 × 2 pixels, which the video's own resizing begins with too."""
    image = smooth_image(96, 144)
    source = (
        image
        if kind == "Pillow's"
        else encoded(image, kind, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    )
    whole = np.asarray(read_image(source)).astype(float)
    monkeypatch.setattr(image_io, "LARGEST_EXACT", 5_000)
    halved = read_image(source)
    assert halved.shape == (48, 72, 3)
    assert difference(halved, whole.reshape(48, 2, 72, 2, 3).mean(axis=(1, 3)).round()) <= (2 if kind == "JPEG" else 1)


def test_the_callers_own_limit_is_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(KINDS["jpeg"]).shape == (64, 96, 3) and Image.MAX_IMAGE_PIXELS == 100
