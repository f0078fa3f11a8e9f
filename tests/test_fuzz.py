"""Each kind of file that is read, mutated: nothing but ValueError or OSError with one printable line may come of it.

A fixed seed and a few dozen mutations per kind by default; `pytest -m fuzz` makes a few thousand.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import random
import signal
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import save
from torch import nn

from converted import diffusers
from kandinsky5 import files, image_io, video_io
from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config_file import load_config
from kandinsky5.extras import magcache, prompts, replay
from kandinsky5.tensor_files import read_index, read_safetensors
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.training import curves, job, state, state_folder
from kandinsky5.training import data as clip_data
from kandinsky5.training.folder import read_captions
from kandinsky5.training.footage import probe, read_frames
from kandinsky5.training.recipe import Recipe
from weights_convert import diffusers_files, lora, match, write_native
from weights_convert.read import read_weights

resource = pytest.importorskip("resource", reason="measures memory, and Windows has another way to ask for it")

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


# ---------------------------------------------------------------------------------------------- of many videos, of runs


def inside(data: bytes, choose: random.Random) -> bytes:
    """A zip of torch.save with its pickle mutated, and the right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate(content, choose) if name.endswith("data.pkl") else content)
    return file.getvalue()


@functools.cache
def run_state() -> bytes:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    values = {"step": 1, "seconds": 1.0, "rows": [], "recipe": dataclasses.asdict(RECIPE), "began_with": ""}
    file = io.BytesIO()
    torch.save(values | {"model": weights, "average": weights, "optimizers": [optimizer.state_dict()]}, file)
    return file.getvalue()


RECIPE = Recipe(steps=4, dtype="float32")


def resumed(path: Path) -> None:
    """All that is read of a run's state."""
    model = nn.Linear(3, 2)
    state.load_recipe(path.parent)
    state.load_average(nn.Linear(3, 2), path.parent)
    state.resume(state.Run(path.parent, model, nn.Linear(3, 2), [torch.optim.AdamW(model.parameters())], RECIPE, ""))


@functools.cache
def state_of_ranks() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model/weight": torch.ones(2, 3)}, storage_writer=dcp.FileSystemWriter(f"{folder}/s"), no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder, "s").iterdir()}


def read_ranks(path: Path) -> None:
    """A state of ranks with this file, and digests that fit."""
    place = path.parent / "state-000001"
    place.mkdir(exist_ok=True)
    for name, data in (state_of_ranks() | {path.name: path.read_bytes()}).items():
        (place / name).write_bytes(data)
    (place / "values.pt").unlink(missing_ok=True)
    digests = {file.name: state_folder.sha256(file) for file in place.iterdir()}
    torch.save({"step": 1, "seconds": 0, "groups": [], "digests": digests}, place / "values.pt")
    state.load_average(nn.ParameterDict({"weight": torch.zeros(2, 3)}), path.parent)


def begun(path: Path) -> None:
    """What finetune makes of another run.json in its folder."""
    options = argparse.Namespace(to=path.parent, rank=4, trigger="", sizes=[(64, 64)])
    clips = argparse.Namespace(clips=(), digest="0")
    job.begin(argparse.Namespace(options=options, folder=SHIPPED / "nano", clips=clips, ranks=None))


@functools.cache
def run_json() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        begun(Path(folder, "run.json"))
        return Path(folder, "run.json").read_bytes()


def entry() -> bytes:
    tensors = {"text": torch.ones(2, 4), "pooled": torch.ones(4)}
    return save(tensors, {"sha256": clip_data._checksum(tensors)})


def cached(path: Path) -> None:
    """A cached entry is read, or made again."""
    refused = not clip_data._is_whole(path)
    clip_data._keep(path, lambda: {"text": torch.ones(2, 4), "pooled": torch.ones(4)})
    assert clip_data.read_features([path]).text.shape == (1, 2, 4)
    if refused:
        raise ValueError("made again")


def footage_of(path: Path) -> None:
    read_frames(probe(path), [0.0, 0.05], 16, 16)


@functools.cache
def sentences() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, "model_prefix": f"{folder}/a"}
        words = ["a red fox runs through snow", "two cats", "the moon rises over the sea", "24 fps"] * 5
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), **options)
        return Path(folder, "a.model").read_bytes()


def lora_config() -> bytes:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {"to_query": 2}, "alpha_pattern": {"x": 1}}
    return json.dumps(config).encode()


def read_lora(path: Path) -> None:
    """A LoRA in PEFT's layout, with this file next to it."""
    module = "base_model.model.visual_transformer_blocks.0.self_attention.to_query"
    state = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    path.with_name("adapter_model.safetensors").write_bytes(save(state))
    lora.read(path.with_name("adapter_model.safetensors"))


PROMPTS = b'{"prompt": "a fox", "seed": 3, "image": "a.png"}\n{"prompt": "a cat", "fps": 12.5, "steps": 2}\n'
SCHEDULER = b'{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}'
PREPARATION = b'{"min_pixels": 3136, "patch_size": 14, "size": {"longest_edge": 9}, "do_resize": true}'


def their_config(model: str, folder: str) -> tuple[Callable[[], bytes], Callable[[Path], None]]:
    """The config.json of a model in a Diffusers folder, and what the converter does with it."""

    def read(path: Path) -> None:
        weights = next((diffusers() / folder).glob("*.safetensors"))
        with contextlib.suppress(FileExistsError):
            (path.parent / weights.name).symlink_to(weights)
        source = write_native.read_source(model, path.parent)
        match.describe_model(model, source.sizes, "x")

    return lambda: (diffusers() / folder / "config.json").read_bytes(), read


def vocabulary() -> bytes:
    return (SHIPPED / "nano" / "clip_tokenizer" / "tokenizer.json").read_bytes()


def ratios() -> bytes:
    return (magcache.FOLDER / "nano.json").read_bytes()


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
    **{
        f"Diffusers config.json of {model}": ("config.json", whole, numbers, read, 8)
        for model, (whole, read) in {
            model: their_config(model, folder) for model, folder in diffusers_files.FOLDERS.items()
        }.items()
    },
    "scheduler_config.json": ("x.json", lambda: SCHEDULER, numbers, diffusers_files.read_shift, 1),
    "preprocessor_config.json": (
        "preprocessor_config.json",
        lambda: PREPARATION,
        numbers,
        lambda path: diffusers_files.read_pixel_limits(path.parent),
        1,
    ),
    "model_index.json": (
        "model_index.json",
        lambda: (diffusers() / "model_index.json").read_bytes(),
        mutate,
        lambda path: diffusers_files.read_tasks(path.parent),
        1,
    ),
    "ratios": ("x.json", ratios, mutate, magcache.load, 1),
    "values of ratios": ("x.json", ratios, numbers, magcache.load, 1),
    "JSON": ("x.json", small_index, mutate, files.read_json, 1),
    "tokenizer.json": ("tokenizer.json", vocabulary, mutate, encode, 8),
    "values of tokenizer.json": ("tokenizer.json", vocabulary, numbers, encode, 8),
    "merges.txt": ("merges.txt", merges, mutate, encode, 2),
    "SentencePiece": ("a.model", sentences, mutate, encode, 8),
    **{
        f"{kind} image": ("image", functools.partial(image, kind), mutate, image_io.read_image, 2)
        for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
    },
    "GIF image": ("image", lambda: image("GIF"), mutate, image_io.read_image, 2),
    "progressive JPEG": ("image", lambda: image("JPEG", progressive=True), mutate, image_io.read_image, 2),
    "packed TIFF": ("image", lambda: image("TIFF", compression="tiff_lzw"), mutate, image_io.read_image, 2),
    "BMP image": ("image", lambda: image("BMP"), mutate, image_io.read_image, 2),
    "video": ("film.mp4", lambda: film(".mp4"), mutate, video_io.read_video, 8),
    "footage": ("film.mp4", lambda: film(".mp4"), mutate, footage_of, 8),
    "metadata of a video": ("film.mp4", lambda: film(".mp4"), mutate, video_io.read_metadata, 8),
    "metadata of a PNG": ("film.png", lambda: film(".png"), mutate, video_io.read_metadata, 2),
    "settings of a replay": ("settings", settings, numbers, replayed, 8),
    "LoRA": ("x.safetensors", adapter, header, lora.read, 1),
    "LoRA's config": ("adapter_config.json", lora_config, numbers, read_lora, 2),
    "prompts.jsonl": ("prompts.jsonl", lambda: PROMPTS, mutate, prompts.read, 1),
    "prompts.txt": ("prompts.txt", lambda: "a fox\nкот\n".encode(), mutate, prompts.read, 1),
    "state of a run": ("state.pt", run_state, mutate, resumed, 8),
    "pickle of a state": ("state.pt", run_state, inside, resumed, 8),
    "metadata of ranks": (".metadata", lambda: state_of_ranks()[".metadata"], mutate, read_ranks, 8),
    "tensors of ranks": ("__0_0.distcp", lambda: state_of_ranks()["__0_0.distcp"], mutate, read_ranks, 8),
    "run.json": ("run.json", run_json, numbers, begun, 8),
    "log": ("loss.csv", lambda: b"step,loss\n1,0.5\n2,0.25\n", mutate, curves.read_rows, 1),
    "cache of clips": ("x.safetensors", entry, mutate, cached, 2),
    "fp8 and scales": ("x.safetensors", fp8, header, read_values, 1),
    "captions.csv": ("captions.csv", lambda: b'file,text\na.mp4,a fox\nb.mp4,"a, b"\n', mutate, captions, 1),
    "captions.jsonl": ("captions.jsonl", lambda: CAPTIONS, mutate, captions, 1),
    "pickle in a zip": ("x.pt", pickle, mutate, read_values, 1),
    "pickle of tensors": ("x.pt", pickle, inside, read_values, 2),
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
