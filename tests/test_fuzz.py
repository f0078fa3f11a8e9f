"""Each kind of file that is read, mutated: nothing but ValueError or OSError with one printable line may come of it.

A fixed seed and a few dozen mutations per kind by default; `pytest -m fuzz` makes a few thousand.
"""

import dataclasses
import functools
import io
import json
import random
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from converted import diffusers
from kandinsky5 import files, image_io, video_io
from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config_file import load_config
from kandinsky5.extras import magcache, replay
from kandinsky5.tensor_files import read_index, read_safetensors
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.training.folder import read_captions
from weights_convert import lora, match, write_native
from weights_convert.read import read_weights

WORDS = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"1" * 30,
    b'"\\ud800"',
    b"[" * 200,
    b"{}",
    b'"a"',
    b"\x1b]0;x\x07",
    b"[8]",
    b"\0",
]


def mutate(data: bytes, choose: random.Random, protected: int = 0) -> bytes:
    """`data` with a few bytes changed, cut out, doubled, or replaced by words that JSON and our formats know."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at, size = choose.randrange(protected, len(changed) + 1), choose.randint(1, 20)
        kind = choose.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = choose.randrange(256)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = changed[at : at + size]
        elif kind == 3:
            changed[at : at + size] = choose.choice(WORDS)
        else:
            changed = changed[: max(at, protected + 1)] if choose.random() < 0.3 else changed
    return bytes(changed)


def header(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with only its header mutated, and mostly of the right length."""
    length = int.from_bytes(data[:8], "little")
    text = mutate(data[8 : 8 + length], choose)
    return (
        (len(text) if choose.random() < 0.9 else choose.randrange(2**40)).to_bytes(8, "little")
        + text
        + data[8 + length :]
    )


def numbers(data: bytes, choose: random.Random) -> bytes:
    """A JSON document with one value somewhere inside replaced."""
    document = json.loads(data)
    at = document
    while isinstance(at, dict | list) and at:
        key = choose.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or choose.random() < 0.2:
            at[key] = choose.choice(
                [None, -1, 0, 2**40, 10**400, 0.5, 1e308, "", "\ud800", [], {}, [[1]], "a" * 20_000]
            )
            break
        at = at[key]
    return json.dumps(document).encode()


def describe(path: Path) -> None:
    """What the converter does with a DiT's weights and config before it writes."""
    source = write_native.read_source("dit", path.parent)
    match.describe_model("dit", source.sizes, "x")


def encode(path: Path) -> None:
    Tokenizer.load(path.parent).encode("a red fox, 24 fps <|im_end|>")


def read_values(path: Path) -> None:
    for stored in read_weights(path).tensors.values():
        list(stored.chunks())


@functools.cache
def pickle(**options) -> bytes:
    file = io.BytesIO()
    state = {f"blocks.{i}.weight": torch.zeros(4, 3) for i in range(4)}
    torch.save({"state_dict": state, "step": 3}, file, **options)
    return file.getvalue()


def small_tensors() -> bytes:
    return save({f"blocks.{i}.weight": torch.zeros(4, i + 1) for i in range(4)}, {"format": "pt"})


def small_index() -> bytes:
    return json.dumps(
        {"metadata": {}, "weight_map": {f"blocks.{i}.weight": "x.safetensors" for i in range(4)}}
    ).encode()


@functools.cache
def image(file_format: str, **options) -> bytes:
    y, x = np.mgrid[:24, :40].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([6 * x, 9 * y, x * y], axis=2)).save(file, file_format, exif=TURNED, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112], TURNED[0x010E] = 6, "a description"
SETTINGS = {field.name: None for field in dataclasses.fields(replay.Settings)} | {
    "prompt": "a fox", "negative_prompt": "", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2,
    "guidance_scale": 5.0, "shift": 5.0, "schedule": "official", "step_skipping": False, "rope_scale": [1, 1, 1],
    "seed": 0, "fps": 24.0, "quality": 8.0, "checkpoint": "nano", "fingerprint": "0", "model": "nano",
    "dtype": "float32", "device": "cpu", "attention": "auto", "compile": False, "tile_space": False, "version": "0.1",
    "enlarge": 1, "loras": [], "trigger": True,
}  # fmt: skip


@functools.cache
def film(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"film{suffix}")
        frames = np.zeros((1 if suffix == ".png" else 3, 16, 16, 3), np.uint8)
        video_io.write_video(path, frames, metadata={"prompt": "a fox", "seed": 3})
        return path.read_bytes()


def settings() -> bytes:
    return json.dumps(SETTINGS).encode()


def adapter() -> bytes:
    module = "transformer.visual_transformer_blocks.0.self_attention.to_query"
    state = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    return save(state, {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 1}'})


def fp8() -> bytes:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    return save({"a.weight": weight, "a.scale_weight": torch.ones(4, 2), "a.input_scale": torch.ones(1)})


CAPTIONS = b'{"file": "a.mp4", "text": "a fox"}\n{"file": "b.mp4", "text": "a cat"}\n'


def captions(path: Path) -> None:
    read_captions(path.parent, ["a.mp4", "b.mp4"], ["a.mp4", "b.mp4", path.name])


def replayed(path: Path) -> None:
    """What a replay makes of these settings, up to the loading of its checkpoint."""
    film = path.with_suffix(".png")
    try:
        metadata = json.loads(path.read_bytes())
    except RecursionError:  # of Python's own reader, which no file of ours has to bear
        return
    video_io.write_video(film, np.zeros((1, 16, 16, 3), np.uint8), metadata=metadata)
    replay.read_settings(str(film), {"checkpoint": "nano"})


def vocabulary() -> bytes:
    return (SHIPPED / "nano" / "clip_tokenizer" / "tokenizer.json").read_bytes()


def ratios() -> bytes:
    return (magcache.FOLDER / "nano.json").read_bytes()


def their_config() -> bytes:
    return (diffusers() / "transformer" / "config.json").read_bytes()


def our_config() -> bytes:
    return (SHIPPED / "nano" / "config.json").read_bytes()


def merges() -> bytes:
    pairs = json.loads(vocabulary())["model"]["merges"][:3]
    return "\n".join(["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs)]).encode()


# name of the file, its content, how it is mutated, what reads it, and how costly that is
Case = tuple[str, Callable[[], bytes], Callable[[bytes, random.Random], bytes], Callable[[Path], object], int]
KINDS: dict[str, Case] = {
    "safetensors header": ("x.safetensors", small_tensors, header, read_safetensors, 1),
    "index": ("x.safetensors.index.json", small_index, mutate, read_index, 1),
    "config.json": ("config.json", our_config, mutate, load_config, 1),
    "values of config.json": ("config.json", our_config, numbers, load_config, 1),
    "Diffusers config.json": ("config.json", their_config, numbers, describe, 4),
    "ratios": ("x.json", ratios, mutate, magcache.load, 1),
    "values of ratios": ("x.json", ratios, numbers, magcache.load, 1),
    "JSON": ("x.json", small_index, mutate, files.read_json, 1),
    "tokenizer.json": ("tokenizer.json", vocabulary, mutate, encode, 8),
    "values of tokenizer.json": ("tokenizer.json", vocabulary, numbers, encode, 8),
    "merges.txt": ("merges.txt", merges, mutate, encode, 2),
    **{
        f"{kind} image": ("image", functools.partial(image, kind), mutate, image_io.read_image, 2)
        for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
    },
    "GIF image": ("image", lambda: image("GIF"), mutate, image_io.read_image, 2),
    "progressive JPEG": ("image", lambda: image("JPEG", progressive=True), mutate, image_io.read_image, 2),
    "packed TIFF": ("image", lambda: image("TIFF", compression="tiff_lzw"), mutate, image_io.read_image, 2),
    "BMP image": ("image", lambda: image("BMP"), mutate, image_io.read_image, 2),
    "video": ("film.mp4", lambda: film(".mp4"), mutate, video_io.read_video, 8),
    "metadata of a video": ("film.mp4", lambda: film(".mp4"), mutate, video_io.read_metadata, 8),
    "metadata of a PNG": ("film.png", lambda: film(".png"), mutate, video_io.read_metadata, 2),
    "settings of a replay": ("settings", settings, numbers, replayed, 8),
    "LoRA": ("x.safetensors", adapter, header, lora.read, 1),
    "fp8 and scales": ("x.safetensors", fp8, header, read_values, 1),
    "captions.csv": ("captions.csv", lambda: b'file,text\na.mp4,a fox\nb.mp4,"a, b"\n', mutate, captions, 1),
    "captions.jsonl": ("captions.jsonl", lambda: CAPTIONS, mutate, captions, 1),
    "pickle in a zip": ("x.pt", pickle, mutate, read_values, 1),
    "old pickle": ("x.pt", lambda: pickle(_use_new_zipfile_serialization=False), mutate, read_values, 1),
}


def hang(*_) -> None:
    raise AssertionError("it hangs")


def fuzz(kind: str, count: int, folder: Path) -> int:
    """Mutate and read `count` times; how often it was refused. Fails on any other end."""
    name, content, change, read, cost = KINDS[kind]
    choose, refused = random.Random(f"{kind} 1"), 0
    original, before = content(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGPROF, hang)
    if name == "config.json" and read is describe:
        (folder / "x.safetensors").symlink_to(diffusers() / "transformer" / "diffusion_pytorch_model.safetensors")
    if name == "merges.txt":
        tokens = json.loads(vocabulary())["model"]["vocab"]
        (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    if name == "x.safetensors.index.json":
        (folder / "x.safetensors").write_bytes(small_tensors())
    (folder / name).write_bytes(original)
    read(folder / name)  # what is refused as it stands, mutations would not reach the inside of
    for number in range(max(count // cost, 1)):
        (folder / name).write_bytes(change(original, choose))
        signal.setitimer(signal.ITIMER_PROF, 10)  # of processor time: a hang
        try:
            read(folder / name)
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 4000, f"{kind} {number}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(kind, tmp_path):
    assert fuzz(kind, 60, tmp_path) > 0


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_mutated_files_are_read_or_refused(kind, tmp_path):
    assert fuzz(kind, 4000, tmp_path) > 100
