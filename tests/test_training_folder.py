"""A folder of footage and captions becomes clips, or one line that says what is wrong with it."""

import importlib.util
import json
from pathlib import Path

import pytest

from footage_files import flat, write, write_sound
from kandinsky5.config import PipelineConfig, SamplingConfig
from kandinsky5.nano import presets
from kandinsky5.nano.judge import judge_clip
from kandinsky5.training.folder import ClipSettings, describe_files, find_clips

CONFIG = PipelineConfig(sampling=SamplingConfig(height=32, width=48, num_frames=5, fps=10))


def settings(**options) -> ClipSettings:
    return ClipSettings.of(CONFIG, **options)


def folder_of(tmp_path: Path, captions: dict[str, str] | None = None, **frames: int) -> Path:
    for name, count in frames.items():
        write(tmp_path / f"{name}.mp4", flat([20 + 5 * i for i in range(count)]))
    for name, text in (dict.fromkeys(frames, "a fox") if captions is None else captions).items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_captions_belong_to_their_clips(tmp_path):
    folder_of(tmp_path, {"b": "the second ", "a": "the first"}, a=5, b=5)
    assert {clip.file: clip.caption for clip in find_clips(tmp_path, settings()).clips} == {
        "a.mp4": "the first", "b.mp4": "the second",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_captions_in_one_file(tmp_path, name):
    (tmp_path / "sub").mkdir()
    folder_of(tmp_path, {}, a=5)
    folder_of(tmp_path / "sub", {}, a=5)
    rows = {"sub/a.mp4": 'лиса, "бежит"', "a.mp4": "a fox"}
    if name == "captions.csv":
        text = 'file,text\nsub/a.mp4,"лиса, ""бежит"""\na.mp4,a fox\n'
    else:
        text = "\n".join(json.dumps({"file": file, "text": text}, ensure_ascii=False) for file, text in rows.items())
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert {clip.file: clip.caption for clip in find_clips(tmp_path, settings()).clips} == rows


@pytest.mark.parametrize("spoil, named", [
    (lambda d: (d / "a.txt").unlink(), "a.mp4"),
    (lambda d: (d / "c.txt").write_text("a fox"), "c.txt"),
    (lambda d: (d / "a.txt").write_text(" \n"), "a.mp4"),
    (lambda d: (d / "a.txt").write_bytes("лиса".encode("cp1251")), "a.txt"),
    (lambda d: (d / "a.txt").write_bytes("a fox".encode("utf-16-le")), "a.txt"),
    (lambda d: (d / "captions.csv").write_text("file,text\na.mp4,x\n"), "captions.csv"),
    (lambda d: (d / "a.txt").write_text("fox " * 99999), "a.mp4"),
    (lambda d: (d / "a.mp4").write_bytes(b"nothing"), "a.mp4"),
    (lambda d: [path.unlink() for path in d.iterdir()], "no usable"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, spoil, named):
    folder_of(tmp_path, a=5, b=5)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        find_clips(tmp_path, settings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", [
    "file,text\na.mp4,x\na.mp4,y\n", "name,text\na.mp4,x\n", "file,text\na.mp4\n", "file,text\na.mp4,a fox, running\n",
    "file,text,text\na.mp4,x,y\n", 'file,text\na.mp4,"x\nb.mp4,y\n', "file,text\na.mp4," + "x" * 200_000,
])  # fmt: skip
def test_invalid_tables_are_refused(tmp_path, table):
    folder_of(tmp_path, {}, a=5)
    (tmp_path / "captions.csv").write_text(table)
    with pytest.raises(ValueError, match=r"captions\.csv"):
        find_clips(tmp_path, settings())


def test_line_separators_in_json_are_part_of_a_caption(tmp_path):
    folder_of(tmp_path, {}, a=5)
    row = json.dumps({"file": "a.mp4", "text": "a fox\u2028runs"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(row + "\r\n", encoding="utf-8", newline="")
    assert find_clips(tmp_path, settings()).clips[0].caption == "a fox\u2028runs"


def test_unusable_files_are_left_out_with_a_reason(tmp_path):
    folder_of(tmp_path, a=5, short=4, one=1)
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "sound.txt").write_text("a song")
    found = find_clips(tmp_path, settings())
    assert [clip.file for clip in found.clips] == ["a.mp4"]
    assert [*found.left_out] == ["one.mp4", "short.mp4", "sound.mp4"]
    table = describe_files(found.clips, found.left_out).splitlines()
    assert len(table) == 5 and table[1].split()[:5] == ["0.50", "10.00", "32", "48", "1"]
    assert table[1].endswith("a.mp4: a fox")


def test_damaged_files_are_skipped_only_on_request(tmp_path):
    folder_of(tmp_path, a=5, b=5)
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[:-400])
    with pytest.raises(ValueError, match="b.mp4"):
        find_clips(tmp_path, settings(), decode=True)
    found = find_clips(tmp_path, settings(skip_damaged=True))
    assert [clip.file for clip in found.clips] == ["a.mp4"] and [*found.left_out] == ["b.mp4"]


@pytest.mark.parametrize("cut, per_file, starts", [
    ("start", 1, [0.0]), ("middle", 1, [0.4]), ("start", 9, [0.0, 0.5]), ("middle", 2, [0.15, 0.65]),
])  # fmt: skip
def test_clips_of_longer_footage(tmp_path, cut, per_file, starts):
    folder_of(tmp_path, a=13)
    found = find_clips(tmp_path, settings(cut=cut, per_file=per_file)).clips
    assert [round(clip.start, 2) for clip in found] == pytest.approx(starts, abs=0.06)
    assert all(len(clip.read()) == 5 for clip in found)


def test_random_cuts_depend_on_the_seed_alone(tmp_path):
    folder_of(tmp_path, a=30)
    starts = [
        [clip.start for clip in find_clips(tmp_path, settings(cut="random", per_file=3, seed=seed)).clips]
        for seed in (1, 1, 2)
    ]
    assert starts[0] == starts[1] != starts[2] and all(0 <= start <= 2.5 for start in starts[0])


def test_rate_becomes_the_models(tmp_path):
    folder_of(tmp_path, a=10)
    clip = find_clips(tmp_path, settings(fps=5.0)).clips[0]
    assert clip.read()[:, 16, 24, 0].tolist() == pytest.approx([20, 30, 40, 50, 60], abs=4)


@pytest.mark.parametrize(
    "options",
    [{"sizes": [(33, 48)]}, {"num_frames": 6}, {"num_frames": 0}, {"cut": "end"}, {"per_file": 0}, {"fps": 0}],
)
def test_settings_the_model_has_no_grid_for(options):
    with pytest.raises(ValueError):
        settings(**options)


def test_the_lessons_folder_is_one_of_clips(tmp_path):
    path = Path(__file__).parents[1] / "docs" / "draw_bounces.py"
    spec = importlib.util.spec_from_file_location("draw_bounces", path)
    draw_bounces = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_bounces)
    draw_bounces.draw(tmp_path / "bounces", 3, takes=2)
    found = find_clips(tmp_path / "bounces", ClipSettings.of(presets.NANO, per_file=9), decode=True)
    assert ["bounc" in clip.caption for clip in found.clips] == [True] * 4 + [False] * 2 and not found.left_out
    for first, second in zip(found.clips[::2], found.clips[1::2], strict=True):
        shown = [judge_clip(clip.read().numpy()).objects[0] for clip in (first, second)]
        assert len({(one.colour, one.shape, one.motion, one.size) for one in shown}) == 1
        assert len({one.position for one in shown}) == 2
