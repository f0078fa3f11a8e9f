"""Right weights in the wrappings of other tools are read; what is not right is refused for the right reason."""

import collections
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import STEM, copy_transformer, diffusers, edit_json, names_in, native, tensors
from weights_convert import from_diffusers, from_official, inspect
from weights_convert.read import read_weights


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with a DiT's config.json and no weights yet."""
    folder, file = copy_transformer(tmp_path)
    file.unlink()
    return folder


STATE: dict[str, torch.Tensor] = {}


def state() -> dict[str, torch.Tensor]:
    """The DiT's tensors under their names in the Diffusers layout."""
    return STATE or STATE.update(tensors(diffusers() / "transformer")) or STATE


def halves() -> list[dict[str, torch.Tensor]]:
    names = sorted(state())
    return [{n: state()[n] for n in names[::2]}, {n: state()[n] for n in names[1::2]}]


def prefixed(*prefixes: str):
    return lambda to: save_file(
        {p + n: x.clone() for p in prefixes for n, x in state().items()}, to / "model.safetensors"
    )


def wrapped_inside(to: Path) -> None:
    names = {n: n.replace("blocks.0.", "blocks.0._orig_mod.").replace("attention.", "attention._fsdp_wrapped_module.")
             for n in state()}  # fmt: skip
    save_file({"module." + names[n]: x for n, x in state().items()}, to / "model.safetensors")


def shards(save, name: str, index: str = ""):
    def make(to: Path) -> None:
        files = [name.format(i) for i in (1, 2)]
        for file, half in zip(files, halves(), strict=True):
            save(half, to / file)
        if index:
            weight_map = {n: file for file, half in zip(files, halves(), strict=True) for n in half}
            (to / index).write_text(json.dumps({"weight_map": weight_map}))

    return make


def saved(wrap, name: str = "x.pt", **options):
    return lambda to: torch.save(wrap(state()), to / name, **options)


def beside(name: str):
    """The weights, and next to them something else that a trainer leaves."""

    def make(to: Path) -> None:
        torch.save(state(), to / "pytorch_model.bin")
        torch.save({"a": torch.ones(1)}, to / name)

    return make


def variants(to: Path) -> None:
    save_file(state(), to / f"{STEM}.safetensors")
    save_file({n: x.half() for n, x in state().items()}, to / f"{STEM}.fp16.safetensors")


def ordered(tensors):
    found = collections.OrderedDict(tensors)
    found._metadata = {"": {"version": 1}}  # as state_dict() has it
    return found


OLD = {"_use_new_zipfile_serialization": False}
READ = {
    "of another trainer": prefixed("model.diffusion_model."),
    "of DataParallel": prefixed("module."),
    "of torch.compile": prefixed("_orig_mod."),
    "of an average": prefixed("ema_model.module."),
    "of compiled blocks in FSDP": wrapped_inside,
    "sharded .bin": shards(torch.save, "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"),
    "shards without index": shards(save_file, STEM + "-0000{}-of-00002.safetensors"),
    "variant's shards and index": shards(
        save_file, STEM + ".fp16-0000{}-of-00002.safetensors", f"{STEM}.safetensors.index.fp16.json"
    ),
    "transformers' variant": shards(save_file, "model-0000{}-of-00002.fp16.safetensors"),
    "before PyTorch 1.6": saved(dict, "x.bin", **OLD),
    "before PyTorch 1.6, ordered": saved(ordered, "x.pth", **OLD),
    "ordered": saved(ordered),
    "protocol 4": saved(dict, pickle_protocol=4),
    "parameters": saved(lambda s: {n: torch.nn.Parameter(x) for n, x in s.items()}),
    "in model": saved(lambda s: {"model": s, "step": 3, "loss": 0.5, "done": True, "note": None}),
    "in state_dict.model": saved(lambda s: {"state_dict": {"model": s}, "epoch": 1}),
    "next to an optimizer": saved(lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}),
    "next to an average": saved(lambda s: {"ema": s, "state_dict": s}),
    "rng_state.pth": beside("rng_state.pth"),
    "optimizer.bin": beside("optimizer.bin"),
    "another .pt": beside("latest.pt"),
    "plain and fp16": variants,
    "safetensors called .bin": lambda to: save_file(state(), to / "pytorch_model.bin"),
    "pickle called .safetensors": lambda to: torch.save(state(), to / "model.safetensors"),
}


@pytest.mark.parametrize("wrapping", READ)
def test_common_wrappings_are_read(wrapping, source, tmp_path):
    READ[wrapping](source)
    from_diffusers(source, tmp_path / "native", only="dit", progress=False)
    ours, theirs = tensors(native(), "dit"), tensors(tmp_path / "native", "dit")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_one_shard_stands_for_all(source):
    shards(save_file, "model-0000{}-of-00002.safetensors")(source)
    found = read_weights(source / "model-00002-of-00002.safetensors")
    assert found.tensors.keys() == state().keys()


def cut_lfs(to: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4000\n"
    (to / "model.safetensors").write_text(pointer)


def missing_shard(to: Path) -> None:
    shards(save_file, "model-0000{}-of-00003.safetensors")(to)


def compressed(to: Path) -> None:
    torch.save(state(), to / "plain.pt")
    with zipfile.ZipFile(to / "plain.pt") as plain, zipfile.ZipFile(to / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (to / "plain.pt").unlink()


def quantised(dtype, **more):
    return lambda to: save_file({n: x.to(dtype) for n, x in state().items()} | more, to / "model.safetensors")


FP8, ONE = torch.float8_e4m3fn, torch.ones(1)
REFUSED = {
    "git-lfs pointer": (cut_lfs, ["model.safetensors", "git lfs pull"]),
    "missing shard": (missing_shard, ["model-0000", "number 3"]),
    "compressed": (compressed, ["x.pt", "compressed"]),
    "int8": (quantised(torch.int8), ["I8"]),
    "uint16": (quantised(torch.uint16), ["U16"]),
    "GGUF": (lambda to: (to / "model.bin").write_bytes(b"GGUF" + bytes(100)), ["model.bin", "GGUF"]),
    "two sets": (prefixed("a.", "b."), ["'a.'"]),
    "two averages": (saved(lambda s: {"fast": s, "slow": s}), ["x.pt", "fast", "slow"]),
    "two files": (lambda to: [save_file(state(), to / f"{n}.safetensors") for n in "ab"], ["a.safetensors"]),
    "views": (saved(lambda s: {n: x[..., ::2] for n, x in s.items()}), ["x.pt"]),
    "numbers alone": (saved(lambda s: {"a": 1}), ["x.pt"]),
    "a list": (saved(lambda s: [1, 2]), ["x.pt"]),
    "fp8 without values": (
        quantised(FP8, **{"a.weight": torch.ones(4, 0).to(FP8), "a.scale_weight": ONE}),
        ["a.weight"],
    ),
    "scale without values": (
        quantised(FP8, **{"a.weight": torch.ones(4, 8).to(FP8), "a.scale_weight": torch.ones(4, 0)}),
        ["a.weight", "(4, 0)"],
    ),
    "int8 next to fp8": (
        quantised(FP8, **{"a.weight": torch.ones(4, 8).to(FP8), "a.scale_weight": ONE, "a.input_scale": ONE.char()}),
        ["a.weight is not known"],
    ),
    "an adapter": (
        lambda to: save_file(state() | {"x.lora_A.weight": torch.ones(2)}, to / "model.safetensors"),
        ["lora_A"],
    ),
}


@pytest.mark.parametrize("wrapping", REFUSED)
def test_other_things_are_refused_for_their_reason(wrapping, source, tmp_path):
    make, words = REFUSED[wrapping]
    make(source)
    with pytest.raises(ValueError) as caught:
        from_diffusers(source, tmp_path / "native", only="dit", progress=False)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert len(message) < 1500 and str(source) in message and names_in(tmp_path) == ["transformer"]


@pytest.mark.parametrize("old", [False, True])
def test_no_code_in_a_pickle_runs(old, source, tmp_path):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "code was run"),))

    torch.save({"state_dict": state(), "args": Code()}, source / "x.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="mkdir"):
        read_weights(source)
    assert not (tmp_path / "code was run").exists()


DOUBLED = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # twice what is on top, 60 times


@pytest.mark.parametrize(
    "instructions",
    [
        b"\x80\x02r\xff\xff\xff\x07.",  # a memo of a gigabyte
        b"\x80\x02" + b"\x8f" * 10**6 + b".",  # a million sets
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a text of 2 GB
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x02}" * 10**6,  # longer than any
        b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.",  # a key whose hash is that of 100,000 levels
        b"\x80\x02}()" + DOUBLED + b"K\x01u.",  # and of 2⁶⁰ items
        b"\x80\x02)" + DOUBLED + b"Q.",  # a storage by such a name
        b"\x80\x02](" + b"K\x01" * 9 + b"eq\0ctorch\nSize\nh\0\x85R.",  # nine axes
        b"\x80\x02](K\x01K\x01\x86eq\0ccollections\nOrderedDict\nh\0\x85R.",  # a list of pairs, again and again
        b"",
    ],
)
def test_pickles_that_inflate_are_refused(instructions, tmp_path):
    resource = pytest.importorskip("resource", reason="measures memory, and Windows has another way to ask for it")

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", instructions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="x.pt"):
        read_weights(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_zip_with_a_million_entries_is_refused(tmp_path):
    entry = b"PK\x01\x02" + bytes(24) + b"\x01\0" + bytes(16) + b"a"
    directory = entry * 100_000
    end = b"PK\x05\x06" + bytes(4) + b"\xff\xff" * 2 + len(directory).to_bytes(4, "little") + bytes(6)
    (tmp_path / "x.pt").write_bytes(b"PK" + directory + end)
    with pytest.raises(ValueError, match="x.pt"):
        read_weights(tmp_path)


@pytest.mark.parametrize("link", ["link", "models--lab--K5/snapshots/9f3c2e1d", "plain"])
def test_a_model_is_called_after_what_the_user_named(link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = Path("models--lab--K5/snapshots/9f3c2e1d")
    shutil.copytree(diffusers() / "transformer", snapshot)
    Path("link").symlink_to(snapshot)
    shutil.copytree(snapshot, "plain")
    name = from_diffusers(link, "native", only="dit", progress=False).name
    assert name == {"plain": "plain", str(snapshot): "K5"}.get(link, "link")


def test_a_hugging_face_cache_of_links_is_converted(tmp_path):
    cache = tmp_path / "models--lab--K5"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "9f3c"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in diffusers().rglob("*") if p.is_file())):
        if path.name != "kandinsky5.json":
            place = snapshot / path.relative_to(diffusers())
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blobs / str(number))
            place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    found = from_diffusers(snapshot, tmp_path / "native", progress=False)
    assert found.name == "K5" and not (tmp_path / "native" / "qwen_tokenizer" / "tokenizer.json").is_symlink()
    from_official(tmp_path / "alone", dit=snapshot / "transformer", only="dit", progress=False)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer.json", "tokenizer"])
def test_a_link_that_leaves_a_tokenizer_is_not_copied(name, tmp_path):
    src = Path(shutil.copytree(diffusers(), tmp_path / "src"))
    outside = Path(shutil.copytree(src / "tokenizer", tmp_path / "outside"))
    place = src / "tokenizer" if name == "tokenizer" else src / "tokenizer" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(outside if name == "tokenizer" else outside / "tokenizer.json")
    with pytest.raises(ValueError, match=name):
        from_diffusers(src, tmp_path / "dst", progress=False)
    assert names_in(tmp_path) == ["outside", "src"]


def test_a_link_that_leaves_a_base_is_not_copied(tmp_path):
    base = Path(shutil.copytree(native(), tmp_path / "base"))
    (tmp_path / "secret").write_text("x")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="notes.txt"):
        from_diffusers(diffusers(), tmp_path / "dst", only="dit", base=base, progress=False)


@pytest.mark.parametrize("name", ["tokenizer/x.json", "transformer/model.bin", "tokenizer/added_tokens.json"])
def test_pipes_in_a_folder_do_not_hang(name, tmp_path):
    src = Path(shutil.copytree(diffusers(), tmp_path / "src"))
    os.mkfifo(src / name)
    from_diffusers(src, tmp_path / "dst", progress=False)
    assert inspect(tmp_path / "dst")["layout"] == "native"


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "UniPCMultistepScheduler"),
        ("use_dynamic_shifting", True),
        ("use_karras_sigmas", True),
        ("shift_terminal", 0.02),
        ("num_train_timesteps", 500),
        ("shift", "five"),
    ],
)
def test_a_schedule_that_is_not_ours_is_refused_or_a_presets(key, value, tmp_path, monkeypatch):
    src = Path(shutil.copytree(diffusers(), tmp_path / "src"))
    edit_json(src / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(ValueError, match=key):
        from_diffusers(src, tmp_path / "dst", progress=False)


def test_a_dtype_of_float64_is_read(source, tmp_path):
    save_file({n: x.double() for n, x in state().items()}, source / "model.safetensors")
    from_diffusers(source, tmp_path / "native", only="dit", dtype="fp32", progress=False)
    ours, theirs = tensors(native(), "dit"), load_file(tmp_path / "native" / "dit.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
