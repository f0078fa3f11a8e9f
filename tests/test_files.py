"""Small files of others are read within limits, and ours are never half there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky5 import files
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.extras import magcache
from kandinsky5.tensor_files import read_index

ROOT = Path(__file__).resolve().parents[1]
BAD = {
    "no JSON": b"{",
    "a list": b"[1]",
    "not UTF-8": b'{"\xff": 1}',
    "a key twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep tables": b'{"a": ' * 80 + b"1" + b"}" * 80,
    "half a surrogate pair": b'{"\\ud800": 1}',
    "the other half": b'{"a": ["\\uDC00x"]}',
    "a number of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "11 MB": b'{"a": "' + b"x" * 11_000_000 + b'"}',
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
    "empty": b"",
}
READERS = {
    "JSON": files.read_json,
    "config.json": load_config,
    "index": read_index,
    "ratios": magcache.load,
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_cannot_be_read_is_refused(reader, bad, tmp_path):
    (tmp_path / "x.json").write_bytes(BAD[bad])
    with pytest.raises(ValueError, match="x.json") as caught:
        READERS[reader](tmp_path / "x.json")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "link to a device"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused(reader, kind, tmp_path):
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif "device" in kind:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="x.json"):
        READERS[reader](path)


def test_pairs_of_surrogates_and_escaped_backslashes_are_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": "\\ud83e\\udd8a", "b": "\\\\ud800"}')
    assert files.read_json(tmp_path / "x.json") == {"a": "🦊", "b": "\\ud800"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_text_is_utf8_in_any_locale(mark, tmp_path):
    save_config(PipelineConfig(name="модель"), tmp_path / "c.json")
    content = (tmp_path / "c.json").read_bytes()
    assert "модель".encode() in content
    (tmp_path / "c.json").write_bytes(mark + content)
    code = "from kandinsky5.config_file import *; save_config(load_config('c.json'), 'd.json')"
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | locale, check=True)
    assert (tmp_path / "d.json").read_bytes() == content
    (tmp_path / "t.txt").write_bytes(mark + "лиса".encode())
    assert files.read_text(tmp_path / "t.txt") == "лиса"


def test_links_may_stay_in_a_folder_or_a_model_cache(tmp_path):
    inside = tmp_path / "models--a--b" / "snapshots" / "1"
    inside.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blob").write_text("x")
    (tmp_path / "secret").write_text("x")
    (inside / "file").write_text("x")
    for name, target in (("near", "file"), ("cached", "../../blob"), ("away", "../../../secret")):
        (inside / name).symlink_to(target)
    assert files.check_inside(inside / "near", inside) and files.check_inside(inside / "cached", inside)
    with pytest.raises(ValueError, match="secret"):
        files.check_inside(inside / "away", inside)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "away").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="secret"):
        files.check_inside(plain / "away", plain)


def test_outputs_do_not_replace_files_of_folders_that_are_read(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    read = {"CHECKPOINT": tmp_path / "model", "--image": None, "--replay": str(tmp_path / "a.mp4")}
    for place in (tmp_path / "model" / "config.json", tmp_path / "model", tmp_path / "x" / ".." / "a.mp4"):
        with pytest.raises(ValueError, match="another name"):
            files.check_apart({"-o": place}, read)
    files.check_apart({"-o": tmp_path / "model", "--preview": tmp_path / "model" / "config.json"}, {})
    files.check_apart({"-o": tmp_path / "model" / "new.json", "--preview": True}, read)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_json_is_written_as_it_is_read(tmp_path):
    values = {"имя": [1, 2.5, None, True, {"a": "🦊"}]}
    files.write_json(tmp_path / "new" / "x.json", values)
    assert files.read_json(tmp_path / "new" / "x.json") == values


def test_without_locks_and_folder_handles_files_are_written(tmp_path, monkeypatch):
    """As on Windows, which has neither: nothing is refused."""
    missing = tmp_path / "missing"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "name", "nt")
        patch.setitem(sys.modules, "fcntl", None)
        with files.locked(tmp_path, "taken"), files.locked(tmp_path, "taken"):
            files.sync(missing)
