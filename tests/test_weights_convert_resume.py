"""Conversions that are interrupted, killed or repeated: nothing half done, nothing trusted that is not checked."""

import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from converted import STEM, copy_transformer, diffusers, names_in, native
from kandinsky5.files import locked
from weights_convert import from_diffusers, to_diffusers, write
from weights_convert.__main__ import main

DIT = dict(only="dit", max_shard_size=100_000, progress=False)


def interrupt(monkeypatch, function: str, after: int = 0) -> None:
    """Let `write.function` end in KeyboardInterrupt once it has been called `after` times."""
    run, calls = getattr(write, function), iter(range(after))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(write, function, interrupted)


def start(dst: Path, src: Path | None = None, shards: int = 3, **options) -> dict[str, int]:
    """Convert until `shards` are written; their names and inodes."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "write_shard", shards)
        to_diffusers(src or native(), dst, **{**DIT, **options})
    return {path.name: path.stat().st_ino for path in dst.with_name(f".{dst.name}.partial").rglob("*.safetensors")}


def is_equal(folder: Path, other: Path) -> bool:
    places = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    if places != sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file()):
        return False
    return all((folder / place).read_bytes() == (other / place).read_bytes() for place in places)


@pytest.fixture
def whole(tmp_path) -> Path:
    to_diffusers(native(), tmp_path / "whole", **DIT)
    return tmp_path / "whole"


def test_finished_shards_are_not_written_again(whole, tmp_path):
    finished = start(tmp_path / "dst")
    assert len(finished) == 3 and names_in(tmp_path) == [".dst.partial", "whole"]
    to_diffusers(native(), tmp_path / "dst", resume=True, **DIT)
    assert names_in(tmp_path) == ["dst", "whole"] and is_equal(tmp_path / "dst", whole)
    assert finished.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "dst").rglob("*")}.items()


def test_a_checkpoint_resumes_in_the_model_where_it_stopped(tmp_path):
    """With models before it that are finished, and models after it that were not begun."""
    options = {**DIT, "only": None, "max_shard_size": 1_000_000}
    to_diffusers(native(), tmp_path / "whole", **options)
    models = {path.parent.name for path in (tmp_path / "whole").rglob("*.safetensors")}
    count = len(list((tmp_path / "whole").rglob("*.safetensors")))
    start(tmp_path / "dst", shards=count // 2, **{"only": None, "max_shard_size": 1_000_000})
    partial = list((tmp_path / ".dst.partial").rglob("*.safetensors"))
    begun, finished = {path.parent.name for path in partial}, {path.stat().st_ino for path in partial}
    assert 1 < len(begun) < len(models)
    to_diffusers(native(), tmp_path / "dst", resume=True, **options)
    assert is_equal(tmp_path / "dst", tmp_path / "whole")
    assert finished <= {path.stat().st_ino for path in (tmp_path / "dst").rglob("*.safetensors")}


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def flip_in_header(data: bytes) -> bytes:
    at = data.index(b"sha256") + 30
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = [lambda data: b"", cut, flip, flip_in_header, lambda data: data + b"\0", lambda data: bytes(len(data))]


@pytest.mark.parametrize("damage", DAMAGES, ids=["empty", "cut", "bit", "bit of the header", "longer", "zeros"])
def test_a_damaged_shard_is_written_again(damage, whole, tmp_path):
    start(tmp_path / "dst")
    shard = next((tmp_path / ".dst.partial" / "transformer").glob("*-00002-of-*"))
    shard.write_bytes(damage(shard.read_bytes()))
    to_diffusers(native(), tmp_path / "dst", resume=True, **DIT)
    assert is_equal(tmp_path / "dst", whole)


@pytest.mark.parametrize("place", [0, -1], ids=["first value", "last value"])
def test_a_source_that_changed_in_one_value_is_noticed(place, tmp_path):
    """Also where size and time are the same, as after rsync -t."""
    src = Path(shutil.copytree(native(), tmp_path / "src"))
    start(tmp_path / "dst", src)
    file = src / "dit.safetensors"
    before, state = file.stat(), load_file(file)
    for tensor in state.values():
        tensor.view(-1)[place] += 1
    save_file(state, file, safe_open(file, "pt").metadata())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    to_diffusers(src, tmp_path / "dst", resume=True, **DIT)
    to_diffusers(src, tmp_path / "right", **DIT)
    assert is_equal(tmp_path / "dst", tmp_path / "right")


@pytest.mark.skipif(os.name == "nt", reason="removes files that are open, which Windows does not do")
@pytest.mark.parametrize("again", [dict(dtype="fp16", resume=True), dict(resume=False)], ids=["other", "not asked"])
def test_another_run_keeps_nothing(again, tmp_path):
    start(tmp_path / "dst", shards=2)
    written = {path.stat().st_ino for path in (tmp_path / ".dst.partial").rglob("*.safetensors")}
    held = [open(path) for path in (tmp_path / ".dst.partial").rglob("*.safetensors")]  # no inode is used again
    to_diffusers(native(), tmp_path / "dst", **{**DIT, **again})
    assert not written & {path.stat().st_ino for path in (tmp_path / "dst").rglob("*")}
    assert all(file.close() is None for file in held)


def test_files_of_another_base_do_not_stay(tmp_path, monkeypatch):
    src = diffusers()
    first, second = (Path(shutil.copytree(native(), tmp_path / name)) for name in ("first", "second"))
    (first / "qwen_tokenizer" / "only_here.txt").write_text("first")
    texts = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "write_shard")  # after the small files
        from_diffusers(src, tmp_path / "dst", only="dit", base=first, progress=False)
    from_diffusers(src, tmp_path / "dst", only="dit", base=second, resume=True, progress=False)
    assert not (tmp_path / "dst" / "qwen_tokenizer" / "only_here.txt").exists()
    assert {path: path.read_bytes() for path in texts} == texts


def test_a_complete_folder_is_left_as_it_is(whole, tmp_path, capsys):
    inodes = {path: path.stat().st_ino for path in whole.rglob("*")}
    command = ["to-diffusers", str(native()), str(whole), "--only", "dit", "--max-shard-size", "100KB", "--quiet"]
    assert main([*command, "--resume"]) == 0
    assert "complete" in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in whole.rglob("*")} == inodes and names_in(tmp_path) == ["whole"]
    assert main(command) == 2


@pytest.mark.parametrize("file", ["shard", "config.json", "index"])
def test_a_folder_that_differs_is_not_called_complete(file, whole, capsys):
    pattern = {"shard": "*-00002-of-*.safetensors", "config.json": "config.json", "index": "*.index.json"}[file]
    path = next((whole / "transformer").glob(pattern))
    path.write_bytes(flip(path.read_bytes()))
    command = ["to-diffusers", str(native()), str(whole), "--only", "dit", "--max-shard-size", "100KB", "--quiet"]
    assert main([*command, "--resume"]) == 2
    assert path.name in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, which Windows does not do")
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and for power cuts alone
    steps = run_and_die(tmp_path / "counted", None)
    shutil.rmtree(tmp_path / "counted")
    assert steps > 30
    for step in random.Random(0).sample(range(1, steps), 8):  # before 0 there is no folder yet
        run_and_die(tmp_path / "dst", step)
        assert names_in(tmp_path) == [".dst.partial", "whole"]
        to_diffusers(native(), tmp_path / "dst", resume=True, **DIT)
        assert is_equal(tmp_path / "dst", whole)
        shutil.rmtree(tmp_path / "dst")


def run_and_die(dst: Path, step: int | None) -> int:
    """`to_diffusers` in a process that SIGKILL ends at its `step`-th touch of the file system, in the middle of a write
    if that is one. Without `step` it ends by itself, and the number of its steps is returned.

    Steps and not seconds: how far a run has come after a while depends on what else the machine does.
    """
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, which would wait for the dead
        passed = 0

        def touch(event: str, details: tuple) -> None:
            nonlocal passed
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and ".partial" in str(details[0]):
                passed += 1
                if passed - 1 == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        def half_then_all(file, data):
            write_all(file, data[: len(data) // 2])
            touch("open", (".partial",))
            write_all(file, data[len(data) // 2 :])

        write_all, write.write_all = write.write_all, half_then_all
        sys.addaudithook(touch)
        to_diffusers(native(), dst, **DIT)
        (dst.parent / "steps").write_text(str(passed))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if step is not None:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return step
    steps = int((dst.parent / "steps").read_text())
    (dst.parent / "steps").unlink()
    return steps


def test_all_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """So that a power cut leaves no complete-looking folder with empty files in it."""
    src, on_disk, renamed = native(), set(), []
    monkeypatch.setattr(os, "fsync", lambda handle: on_disk.add((os.fstat(handle).st_ino, os.fstat(handle).st_size)))
    rename = os.rename

    def checked(source, target):
        assert all((path.stat().st_ino, path.stat().st_size) in on_disk for path in (source, *source.rglob("*")))
        rename(source, target)
        renamed.append(target)

    monkeypatch.setattr(os, "rename", checked)
    to_diffusers(src, tmp_path / "dst", **DIT)
    assert renamed == [tmp_path / "dst"] and (tmp_path.stat().st_ino, tmp_path.stat().st_size) in on_disk


def test_two_conversions_to_one_place_do_not_meet(tmp_path):
    pytest.importorskip("fcntl", reason="folders have no locks here")
    (tmp_path / ".dst.partial").mkdir()
    with locked(tmp_path / ".dst.partial", "taken"), pytest.raises(ValueError, match="dst"):
        to_diffusers(native(), tmp_path / "dst", **DIT)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    src = native()
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="free some disk space"):
        to_diffusers(src, tmp_path / "dst", progress=False)
    assert names_in(tmp_path) == []


def test_a_disk_that_fails_while_writing_leaves_nothing(tmp_path, monkeypatch):
    src = native()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        to_diffusers(src, tmp_path / "dst", **DIT)
    assert names_in(tmp_path) == []


def test_verify_names_the_tensor_that_changed(tmp_path):
    _, file = copy_transformer(tmp_path)
    write.verify_shard(file)
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=f"{STEM}.safetensors.*: [a-z_.0-9]+$"):
        write.verify_shard(file)
