"""Damaged and hostile folders of weights, and wrong arguments: one line, exit code 2, nothing left behind."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import STEM, copy_transformer, diffusers, edit_header, names_in, native
from weights_convert.__main__ import main

BIAS = "visual_embeddings.in_layer.bias"
INDEX = f"{STEM}.safetensors.index.json"


def edit(change):
    return lambda folder, file: edit_header(file, change)


def put(name: str, content: bytes):
    return lambda folder, file: (folder / name).write_bytes(content)


def index(weight_map):
    return put(INDEX, json.dumps({"weight_map": weight_map}).encode())


def overlap(header):
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"][0] -= 4
    header[first]["data_offsets"][1] += 4


def share(header):
    names = [f"visual_transformer_blocks.{i}.self_attention.query_norm.weight" for i in (0, 1)]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def without_a_tensor(folder: Path, file: Path) -> None:
    state = load_file(file)
    del state["visual_transformer_blocks.1.cross_attention.key_norm.weight"]
    save_file(state, file)


def with_many_names(folder: Path, file: Path) -> None:
    save_file(load_file(file) | {f"\x1b]0;{i}\x07": torch.ones(1) for i in range(5_000)}, file)


def resave(**more):
    return lambda folder, file: save_file(load_file(file) | more, file)


def as_list(header):
    header[BIAS] = list(header[BIAS].values())


def twice(folder: Path, file: Path) -> None:
    edit_header(file, lambda header: header)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = b'{"__metadata__": {}, ' + content[9 : 8 + length]
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


BROKEN = f"{STEM}.safetensors"
REFUSED = {
    "truncated": (lambda _, file: file.write_bytes(file.read_bytes()[:-100]), BROKEN),
    "longer": (lambda _, file: file.write_bytes(file.read_bytes() + b"a"), BROKEN),
    "header beyond the file": (lambda _, file: file.write_bytes((2**40).to_bytes(8, "little") + b"{"), BROKEN),
    "header of 4 EB": (lambda _, file: file.write_bytes(b"\xff" * 8 + b"{"), BROKEN),
    "empty": (put(BROKEN, b""), BROKEN),
    "web page": (put(BROKEN, b"<html>404</html>"), BROKEN),
    "overlapping": (edit(overlap), BROKEN),
    "sharing bytes": (edit(share), BROKEN),
    "dtype of another size": (edit(lambda h: h[BIAS].update(dtype="F64")), BIAS),
    "unknown dtype": (edit(lambda h: h[BIAS].update(dtype="X7")), BIAS),
    "dtype a table": (edit(lambda h: h[BIAS].update(dtype={"a": 1})), BIAS),
    "entry a list": (edit(as_list), BIAS),
    "entry null": (edit(lambda h: h.update({BIAS: None})), BIAS),
    "shape of 10^400": (edit(lambda h: h[BIAS].update(shape=[10**400])), BIAS),
    "shape of floats": (edit(lambda h: h[BIAS].update(shape=[64.0])), BIAS),
    "shape of booleans": (edit(lambda h: h[BIAS].update(shape=[True, 64])), BIAS),
    "offsets of 10^19": (edit(lambda h: h[BIAS].update(data_offsets=[0, 10**19])), BIAS),
    "header a list": (edit(lambda h: [1]), BROKEN),
    "metadata a list": (edit(lambda h: h.update(__metadata__=[1])), BROKEN),
    "a key twice": (twice, "__metadata__"),
    "a lone surrogate": (edit(lambda h: h.update({"\ud800": h.pop(BIAS)})), BROKEN),
    "integers": (edit(lambda h: h[BIAS].update(dtype="I32")), f"{BIAS} is stored as I32"),
    "a tensor missing": (without_a_tensor, "visual_transformer_blocks.1.cross_attention.key_norm.weight is missing"),
    "unknown tensors": (resave(**{"lora.up": torch.ones(2)}), "lora.up is not known"),
    "many names": (with_many_names, "4,994 more"),
    "config of another depth": (put("config.json", b'{"num_visual_blocks": 60}'), "num_visual_blocks = 60"),
    "config that is deep": (put("config.json", b'{"a":' * 1000 + b"1" + b"}" * 1000), "config.json"),
    "config of half JSON": (put("config.json", b"{" * 100_000), "config.json"),
    "config of a key twice": (put("config.json", b'{"model_dim": 64, "model_dim": 64}'), "'model_dim'"),
    "config of 11 MB": (put("config.json", b'{"a": "' + b"x" * 11_000_000 + b'"}'), "config.json"),
    "no weights": (lambda _, file: file.unlink(), "transformer"),
    "two sets of weights": (lambda folder, file: shutil.copy(file, folder / "other.safetensors"), "other.safetensors"),
    "index to another folder": (index({"a": "../../etc/passwd"}), "'../../etc/passwd'"),
    "index to a folder and back": (index({"a": f"../transformer/{BROKEN}"}), f"'../transformer/{BROKEN}'"),
    "index without its shard": (index({"a": "gone.safetensors"}), "gone.safetensors"),
    "index of numbers": (index({"a": 5}), INDEX),
    "index of nothing": (index({}), INDEX),
    "index that is deep": (put(INDEX, b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), INDEX),
    "index that lists too much": (index({"a": BROKEN}), "transformer"),
    "index that is a pipe": (lambda folder, _: os.mkfifo(folder / "config.json.index.json"), None),
    "weights that are a pipe": (lambda _, file: (file.unlink(), os.mkfifo(file)), "transformer"),
    "weights that are endless": (lambda _, file: (file.unlink(), file.symlink_to("/dev/zero")), "transformer"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_damaged_weights_are_refused_by_name(damage, tmp_path, capsys):
    folder, file = copy_transformer(tmp_path)
    make, words = REFUSED[damage]
    make(folder, file)
    code = main(["from-diffusers", str(folder), str(tmp_path / "dst"), "--only", "dit", "--quiet"])
    printed = capsys.readouterr().err
    if words is None:
        assert code == 0
        return
    assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1 and words in printed, printed
    assert len(printed) < 2000 and printed[:-1].isprintable()
    assert names_in(tmp_path) == ["transformer"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("from-diffusers gone dst", "gone"),
        ("from-diffusers gone dst --only vae", "gone"),
        ("from-diffusers {diffusers} {diffusers}", "{diffusers}"),
        ("from-diffusers {diffusers} dst --preset t2v-lite-sft", "t2v-lite-sft-"),
        ("from-diffusers {diffusers} dst --preset i2v-lite-5s", "i2v-lite-5s"),
        ("from-official --dit {native}/dit.safetensors dst", "--vae, --qwen, --clip"),
        ("from-official --only dit --dit {native}/vae.safetensors dst", "vae.safetensors"),
        ("to-diffusers gone dst", "gone"),
        ("to-diffusers {native} dst --base {native}", "--base"),
        ("inspect gone", "gone"),
        ("inspect {native}/config.json", "config.json"),
    ],
)
def test_wrong_arguments_are_named(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"native": native(), "diffusers": diffusers()}
    assert main([word.format(**places) for word in arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and words.format(**places) in printed, printed
    assert names_in(tmp_path) == []
