"""Windows, macOS and file systems of other machines, played on this one: what they lack ends nothing."""

import _pyio
import errno
import importlib.util
import ntpath
import os
import sys
import types
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
import pytest
import torch

import kandinsky5.runtime.ending
from kandinsky5 import cli, files, pipeline, video_io
from kandinsky5.checkpoint import find_checkpoint
from kandinsky5.dit import DiT
from kandinsky5.extras import replay
from kandinsky5.runtime import launch
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.training import state_folder
from kandinsky5.vae import Decoder
from weights_convert import write


def refuse(error):
    """A function that raises it, whatever it is given."""

    def refusing(*_, **__):
        raise error

    return refusing


@pytest.fixture
def windows(monkeypatch):
    """Paths have drives and backslashes; the current folder is C:\\work."""
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os, "getcwd", lambda: "C:\\work")
    monkeypatch.setattr(ntpath, "abspath", lambda path: ntpath.normpath(ntpath.join("C:\\work", path)))


def test_a_drive_is_no_weight(windows):
    assert cli.lora_file("C:\\a.safetensors") == {"file": "C:\\a.safetensors", "weight": 1.0}
    assert cli.lora_file("C:\\a.safetensors:0.5") == {"file": "C:\\a.safetensors", "weight": 0.5}
    with pytest.raises(Exception, match="weight"):
        cli.lora_file("C:\\a.safetensors:b")


@pytest.mark.parametrize("path, recorded", [
    ("images\\fox.png", "images/fox.png"), ("C:\\work\\a\\fox.png", "a/fox.png"), ("C:\\other\\fox.png", "fox.png"),
    ("D:\\a\\fox.png", "fox.png"), ("..\\fox.png", "../fox.png"),
])  # fmt: skip
def test_recorded_paths_have_slashes_on_every_system(path, recorded, windows):
    assert replay._portable(path) == recorded


def test_finished_files_are_known_by_paths_with_slashes(tmp_path, monkeypatch):
    (tmp_path / "transformer").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "transformer" / name).touch()
    plain = PurePath.relative_to
    monkeypatch.setattr(PurePath, "relative_to", lambda path, *others: PureWindowsPath(plain(path, *others)))
    write.clear(tmp_path, keep={"transformer/a.safetensors"})
    assert os.listdir(tmp_path / "transformer") == ["a.safetensors"]
    assert list(write.list_files(tmp_path, lambda _: True)) == ["transformer/a.safetensors"]


def test_a_checkpoint_may_be_named_with_slashes(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    for name in ("weights/lite", "weights\\lite"):
        with pytest.raises(ValueError, match="no checkpoint folder"):
            find_checkpoint(name)


def test_small_files_are_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr("io.open", _pyio.open)
    monkeypatch.setattr(os, "linesep", "\r\n")
    monkeypatch.setattr("locale.getencoding", lambda: "cp1252")
    files.write_text(tmp_path / "a.txt", "лиса\n")
    assert (tmp_path / "a.txt").read_bytes() == "лиса\n".encode()


def test_a_file_that_is_open_elsewhere_stays(tmp_path, monkeypatch):
    """Windows does not replace what is open or mapped: the work is kept next to it."""
    monkeypatch.setattr(os, "replace", refuse(PermissionError(errno.EACCES, "Access is denied")))
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OSError, match="a.json.*Access is denied"):
        files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OSError, match="a.png"):
        video_io.write_video(tmp_path / "a.png", np.zeros((1, 2, 2, 3), np.uint8))
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_older_state_that_is_mapped_stays(tmp_path, monkeypatch):
    (tmp_path / "state.pt").touch()
    (tmp_path / "state-000007").mkdir()
    monkeypatch.setattr(Path, "unlink", refuse(PermissionError("it is mapped")))
    state_folder.remove_others(tmp_path, tmp_path / "state-000007")
    assert len(os.listdir(tmp_path)) == 2


def test_folders_that_cannot_be_synchronised_or_locked_are_written(tmp_path, monkeypatch):
    """As on network drives; for a file the error counts, as its bytes may be lost."""
    fcntl = pytest.importorskip("fcntl", reason="folders have no locks here")
    monkeypatch.setattr(fcntl, "flock", refuse(OSError(errno.ENOLCK, "No locks available")))
    fsync = refuse(OSError(errno.EINVAL, "Invalid argument"))
    with monkeypatch.context() as patch, files.new_folder(tmp_path / "a"):
        patch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Invalid"), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with files.new_folder(tmp_path / "b") as folder:
            (folder / "file").touch()
    assert os.listdir(tmp_path) == ["a"]


def test_one_file_by_two_names_is_one_file(tmp_path):
    """As a.png and A.png are on macOS and Windows."""
    (tmp_path / "a.png").touch()
    os.link(tmp_path / "a.png", tmp_path / "A.png")
    with pytest.raises(ValueError, match="A.png would replace the file of --image"):
        files.check_apart({"-o": tmp_path / "A.png"}, {"--image": tmp_path / "a.png"})


def test_without_onednn_a_cpu_emulates_half_precision(monkeypatch):
    """PyTorch for macOS has none of its operations."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_an_apple_gpu_has_no_float64():
    with pytest.raises(ValueError, match="float64.*float32"):
        choose_dtype("float64", torch.device("mps"))
    assert choose_dtype("float64", torch.device("cpu")) == torch.float64


def test_an_apple_gpu_computes_the_definitions(monkeypatch):
    """Their convolutions and norms get whole tensors; the faster forms pass views, which kernels there misread."""
    load = pipeline.load_models
    monkeypatch.setattr(pipeline, "choose_device", torch.device)
    monkeypatch.setattr(pipeline, "load_models", lambda f, c, _, *how: load(f, c, torch.device("cpu"), *how))
    pipe = pipeline.Pipeline.load("nano", "mps", torch.float32)
    assert type(pipe.dit) is DiT and type(pipe.vae.decoder) is Decoder


def test_a_pytorch_without_processes_runs_one(monkeypatch):
    lacking = types.ModuleType("torch.distributed")
    lacking.is_available = lambda: False
    monkeypatch.setitem(sys.modules, "torch.distributed", lacking)
    monkeypatch.setattr(torch, "distributed", lacking)
    for name in ("launch", "ending"):
        spec = importlib.util.spec_from_file_location(name, Path(launch.__file__).with_name(f"{name}.py"))
        alone = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alone)
        monkeypatch.setattr(kandinsky5.runtime, name, alone)
    assert (alone.launch.rank(), alone.launch.world(), alone.launch.meet(3)) == (0, 1, [3])
    assert alone.together(lambda: 5, str) == 5


def test_several_gpus_without_nccl_are_refused(monkeypatch):
    store = types.SimpleNamespace(set=lambda *_: None)
    monkeypatch.setattr(launch, "joined", {})
    monkeypatch.setattr(launch, "meet", lambda value=None, seconds=0: [value, value])
    monkeypatch.setattr(launch, "machines", [])
    monkeypatch.setattr(launch.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(launch.dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="NCCL"):
        launch.join()
