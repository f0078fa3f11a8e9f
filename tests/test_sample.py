"""sample.py as its users meet it: what it writes, and that a mistake costs one line."""

import functools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kandinsky5
import sample
from command_line import BARS, CONFIG, FOX, ROOT, in_process, snapshot, without_bars
from kandinsky5 import sample_command, video_io
from kandinsky5.checkpoint import fingerprint
from kandinsky5.cli import dispatch
from kandinsky5.cli import run as run_cli
from kandinsky5.config_file import save_config
from kandinsky5.extras import prompts
from kandinsky5.runtime.device import choose_device, choose_dtype
from random_weights import SMALL, SMALL_DIT, SMALL_NABLA

# --- what is written


def test_stdout_is_one_line_and_stderr_shows_the_progress(here, capsys):
    assert sample.main([*FOX]) == 0
    out, err = capsys.readouterr()
    assert out == "out.mp4: 5 frames of 32x48, seed 0\n"
    assert [bar for bar in BARS[:-1] if bar not in err] == [] and "2/2" in err and "step/s" in err and "frame/s" in err
    frames, fps = video_io.read_video("out.mp4")
    assert frames.shape == (5, 32, 48, 3) and fps == 24


def test_defaults_are_the_checkpoints_and_are_in_the_file(cli, here):
    assert cli(*FOX)[0] == 0
    sampling = SMALL.sampling
    assert video_io.read_metadata("out.mp4") == {
        "prompt": "a fox",
        "negative_prompt": sampling.negative_prompt,
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "shift": 5.0,
        "schedule": "official",
        "step_skipping": False,
        "rope_scale": [1.0, 3.16, 3.16],  # by size
        "seed": 0,
        "image": None,
        "image_sha256": None,
        "fps": 24,
        "quality": 8.0,
        "checkpoint": "small",
        "fingerprint": fingerprint(here / "small"),
        "model": "small",
        "dtype": str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch."),
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
        "attention": "auto",
        "compile": False,
        "tile_space": False,
        "enlarge": 1,
        "quantize": None,
        "loras": [],
        "trigger": True,
        "expanded_from": None,
        "instruction_sha256": None,
        "version": kandinsky5.__version__,
    }


def test_every_option_reaches_the_pipeline_and_the_file(cli):
    arguments = "--negative-prompt rain --height 48 --width 64 --num-frames 1 --steps 3 --guidance 2 --shift 4 "
    arguments += "--schedule diffusers --seed 7 --fps 12 --quality 3 --device cpu --dtype float32 -o out.png"
    assert cli(*FOX, *arguments.split()) == (0, "out.png: 1 frame of 48x64, seed 7\n", [])
    settings = video_io.read_metadata("out.png")
    expected = dict(negative_prompt="rain", height=48, width=64, num_frames=1, num_inference_steps=3, guidance_scale=2)
    expected |= dict(shift=4, schedule="diffusers", seed=7, fps=12, quality=3, device="cpu", dtype="float32")
    assert {name: settings[name] for name in expected} == expected
    pipe = kandinsky5.Pipeline.load("small", "cpu", torch.float32)
    names = [name for name in expected if name not in ("fps", "quality", "device", "dtype")]
    frames = pipe("a fox", progress=False, **{name: expected[name] for name in names})
    assert video_io.read_image("out.png").equal(frames[0, 0])


def test_offloading_changes_nothing_in_the_file(cli):
    for mode in ("model", "blocks"):
        assert cli(*FOX, "--offload", mode, "-o", f"{mode}.mp4")[0] == 0
    assert cli(*FOX, "-o", "plain.mp4")[0] == 0
    assert Path("model.mp4").read_bytes() == Path("blocks.mp4").read_bytes() == Path("plain.mp4").read_bytes()


@pytest.mark.parametrize("prompt", ["", "fox " * 3000, "кот\n\t😀 'x' \"y\" {} %s \\"])
def test_any_prompt_is_allowed(cli, prompt):
    assert cli(prompt, *FOX[1:])[0] == 0
    assert video_io.read_metadata("out.mp4")["prompt"] == prompt


def test_a_preview_is_no_part_of_the_video(cli):
    assert cli(*FOX, "-o", "plain.mp4")[0] == 0
    assert cli(*FOX, "--preview", "preview.png") == (0, "out.mp4: 5 frames of 32x48, seed 0\n", [])
    assert Path("out.mp4").read_bytes() == Path("plain.mp4").read_bytes()
    assert video_io.read_image("preview.png").shape == (32, 48, 3)


@pytest.mark.parametrize(
    "steps, shown", [(2, [1]), (10, [*range(1, 10)]), (16, [*range(1, 16, 2)]), (31, [*range(3, 31, 4)])]
)
def test_a_preview_is_shown_at_most_ten_times(cli, monkeypatch, steps, shown):
    seen = []
    monkeypatch.setattr("kandinsky5.extras.preview.open_place", lambda place: lambda step, frame: seen.append(step))
    assert cli(*FOX, "--steps", steps, "--preview")[0] == 0
    assert seen == shown


def test_no_output_takes_the_place_of_an_input(cli, refused):
    assert cli(*FOX)[0] == 0
    Path("link.mp4").symlink_to("out.mp4")
    assert cli(*FOX, "--image", "image.png", "--num-frames", "1", "-o", "still.png")[0] == 0
    Path("a.jsonl").write_text('{"prompt": "a fox", "image": "image.png"}')
    for options in (
        ["--replay", "out.mp4", "-o", "out.mp4"],
        ["--replay", "out.mp4", "-o", "link.mp4"],
        [*FOX, "--image", "image.png", "--num-frames", "1", "-o", "image.png"],
        [*FOX, "--image", "image.png", "--preview", "image.png"],
        [*FOX, "--num-frames", "1", "--preview", "a.png", "-o", "./a.png"],
        ["--replay", "image.png", "--preview", "image.png"],
        ["--replay", "still.png", "-o", "image.png"],  # which was made from it
        ["--prompts", "a.jsonl", "--checkpoint", "small", "-o", "many", "--preview", "image.png"],
    ):
        refused(options, "another name")


def test_the_default_name_is_numbered_a_given_one_overwritten(cli):
    first = cli(*FOX)[1], cli(*FOX)[1], cli("--replay", "out.mp4")[1]
    assert [line.split(":")[0] for line in first] == ["out.mp4", "out-2.mp4", "out-3.mp4"]
    before = Path("out.mp4").read_bytes()
    assert before == Path("out-2.mp4").read_bytes() == Path("out-3.mp4").read_bytes()
    assert cli(*FOX, "--seed", "4", "-o", "out.mp4")[0] == 0 and Path("out.mp4").read_bytes() != before


# --- mistakes


@pytest.mark.parametrize(
    "options, named",  # the value, the rule's numbers, the remedy's option
    [
        ("--height 40", "height 40 16 32 48"),
        ("--width 0", "width 0 16 32"),
        ("--width -16", "width -16 16"),
        ("--num-frames 6", "6 4k 5 9"),
        ("--num-frames 0", "0 4k 1 5"),
        ("--steps 0", "0 1"),
        ("--steps -3", "-3 1"),
        ("--steps many", "--steps 'many' --help"),
        ("--guidance nan", "guidance_scale nan"),
        ("--guidance inf", "guidance_scale inf"),
        ("--shift 0", "shift 0.0"),
        ("--shift nan", "shift nan"),
        ("--shift inf", "shift inf"),
        ("--schedule linear", "--schedule 'linear' official diffusers"),
        ("--seed -1", "seed -1 0"),
        ("--seed 99999999999999999999", "seed 99999999999999999999 0"),
        ("--fps 0", "fps 0.0 1 1000"),
        ("--quality 11", "quality 11.0 1 10"),
        ("--quality nan", "quality nan 1 10"),
        ("--device banana", "device banana cpu cuda"),
        ("--device cuda:99", "cuda:99 cpu"),
        ("--step-skipping", "small i2v-lite-5s kandinsky5.extras.magcache"),
        ("--step-skipping missing.json", "missing.json"),
        ("--step-skipping fox", "'fox' .json"),
        ("--preview", "--preview FILE.png"),
        ("--preview fox", "'fox' .png"),
        ("--preview missing/a.png", "missing/a.png"),
        ("--offload disk", "--offload 'disk' model blocks"),
        ("--dtype int8", "int8 bfloat16 float32"),
        ("--dtype float64", "--dtype 'float64' bfloat16 float32"),
        ("--dtype float64 --schedule official", "--dtype 'float64' bfloat16 float32"),
        ("--height 16400", "height 16400 16384"),
        ("--height 1600000000 --width 1600000000", "height 1600000000 16384"),
        ("--image ribbon.png", "ribbon.png 400000x1 50"),
        ("--image missing.png", "missing.png"),
        ("--image image.png --image image.png", "--image one --help"),
        ("--image text.jpg", "text.jpg JPEG PNG WebP"),
        ("--image half.png", "half.png"),
        ("--image folder", "folder"),
        ("-o missing/out.mp4", "missing/out.mp4"),
        ("-o folder.mp4", "folder.mp4"),
        ("-o /proc/out.mp4", "/proc/out.mp4"),
        ("-o out.gif", "out.gif .mp4 .png"),
        ("-o out.png", "5 out.png --num-frames .mp4"),
        ("two words", "two words --help"),
        ("--stpes 3", "--stpes 3"),
    ],
)
def test_a_bad_option_is_answered_in_one_line(refused, options, named):
    Path("text.jpg").write_text("no picture")
    Path("half.png").write_bytes(Path("image.png").read_bytes()[:4000])
    video_io.write_video("ribbon.png", torch.zeros(1, 1, 400000, 3, dtype=torch.uint8))
    Path("folder").mkdir()
    Path("folder.mp4").mkdir()
    refused([*FOX, *options.split()], *named.split())


@pytest.mark.parametrize("option", ["--num-frames", "--steps"])
def test_absurd_counts_end_in_one_line(refused, option):
    refused([*FOX, option, str(4 * 10**15 + 1)])


def test_compiling_without_a_compiler(refused, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused([*FOX, "--compile"], "no-such-compiler", "--no-compile")


def test_nothing_to_do_is_said(refused):
    refused([], "--replay FILE")


def test_an_image_needs_an_i2v_checkpoint_and_i2v_an_image(refused):
    for task, options, words in [
        ("t2v", ["--image", "image.png"], "i2v"),
        ("i2v", [], "--image"),
    ]:
        Path("small/config.json").unlink()
        save_config(replace(CONFIG, tasks=(task,)), "small/config.json")
        refused([*FOX, *options], "small", words)


def test_nabla_asks_for_sides_of_128(refused):
    Path("small/config.json").unlink()
    save_config(replace(CONFIG, dit=replace(SMALL_DIT, nabla=SMALL_NABLA)), "small/config.json")
    refused([*FOX, "--height", "144"], "height 144", "NABLA", 128, 256)


def test_a_process_ends_with_code_2_and_no_traceback(here):
    done = in_process("a fox", "--steps", "many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "'many'" in done.stderr


# --- nothing is left half-written


@pytest.mark.parametrize("limit", [1000, 30_000])
def test_a_full_disk_leaves_the_old_file_and_the_frames(cli, limit):
    assert cli(*FOX, "--height", "128", "--width", "128", "-o", "whole.png", "--num-frames", "1")[0] == 0
    Path("out.png").write_bytes(b"the old film")
    resource = pytest.importorskip("resource", reason="Windows limits no sizes of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the system refuses to write more
    try:
        code, _, lines = cli(*FOX, "--height", "128", "--width", "128", "--num-frames", "1", "-o", "out.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "out.npz" in lines[-1] and Path("out.png").read_bytes() == b"the old film"
    parts = sorted(Path().glob("out.npz*"))
    Path("joined.npz").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(parts) > 1 and (np.load("joined.npz")["frames"][0] == video_io.read_image("whole.png").numpy()).all()


def test_frames_are_kept_where_the_file_cannot_be_replaced(cli, monkeypatch):
    def immutable(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(video_io, "_encode_mp4", immutable)
    code, _, lines = cli(*FOX)
    assert code == 2 and lines[-1].endswith("out.npz")
    assert np.load("out.npz")["frames"].shape == (5, 32, 48, 3)


def test_a_termination_in_the_middle_is_130_and_one_line(cli, monkeypatch):
    monkeypatch.setattr(kandinsky5.Pipeline, "sample", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = snapshot()
    assert cli(*FOX) == (130, "", ["interrupted: nothing was written"])
    assert snapshot() == before


@pytest.mark.skipif(os.name == "nt", reason="sends a signal, which on Windows ends a process at once")
def test_ctrl_c_in_the_middle_is_130_and_one_line(here):
    Path("out.mp4").write_bytes(b"the old film")
    before = snapshot()
    command = [sys.executable, str(ROOT / "sample.py"), *FOX, "--steps", "10000"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, preexec_fn=heard)
    shown = b""
    while not re.search(rb" [1-9]\d*/10000 ", shown):  # the bar has moved
        piece = os.read(process.stderr.fileno(), 1000)
        assert piece, shown.decode()
        shown += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert without_bars((shown + err).decode()) == ["interrupted: nothing was written"]
    assert snapshot() == before


def test_ctrl_c_while_the_file_is_written_leaves_the_old_one(cli, monkeypatch):
    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_io, "_encode_mp4", interrupted)
    Path("out.mp4").write_bytes(b"the old film")
    before = snapshot()
    assert cli(*FOX) == (130, "", ["interrupted: nothing was written"])
    assert snapshot() == before


def test_a_mistake_of_ours_is_no_mistake_of_theirs(here, monkeypatch):
    """A bug keeps its traceback: only what PyTorch says of memory is answered in one line."""
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("unexpected keyword")):
        monkeypatch.setattr(kandinsky5.Pipeline, "generate", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            sample.main([*FOX])


@pytest.mark.parametrize("kind, error, words", [
    ("OutOfMemoryError", "out of memory. Tried to allocate 2.00 GiB", ("2.00 GiB", "--tile-space", "--offload")),
    ("AcceleratorError", "CUDA error: the launch timed out and was terminated\nCUDA", ("timed out", "nvidia-smi")),
])  # fmt: skip
def test_a_gpu_that_fails_is_one_line(refused, monkeypatch, kind, error, words):
    def run(*_, **__):
        raise getattr(torch, kind)(error)

    monkeypatch.setattr(kandinsky5.Pipeline, "generate", run)
    refused([*FOX, "--device", "cpu"], *words)


def test_a_video_that_does_not_fit_is_refused_before_step_one(cli, refused, monkeypatch):
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: 7 * 10**8)
    large = [*FOX, "--height", "512", "--width", "512", "--dtype", "float32"]
    monkeypatch.setattr(kandinsky5.Pipeline, "sample", lambda *arguments: pytest.fail("steps were made"))
    refused(large, "5 frames", "512x512", "0.7 GB", "--tile-space", "--num-frames")


def test_tiles_in_space_are_asked_for_and_kept_in_the_file(cli):
    code, _, _ = cli(*FOX, "--width", "320", "--num-frames", "1", "--tile-space", "-o", "out.mp4")
    assert code == 0 and video_io.read_metadata("out.mp4")["tile_space"] is True
    assert cli("--replay", "out.mp4", "-o", "again.mp4")[0] == 0
    assert cli("--replay", "out.mp4", "--no-tile-space", "-o", "whole.mp4")[0] == 0
    tiled, again, whole = (video_io.read_video(f"{name}.mp4")[0] for name in ("out", "again", "whole"))
    assert again.equal(tiled) and not whole.equal(tiled)


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ([], False),
        (["--num-frames", "5"], True),
        (["--image", "image.png"], True),  # 40 × 70
    ],
)
def test_a_size_that_nano_was_not_trained_on_is_noted(cli, options, noted):
    code, _, lines = cli("a red circle moves left", "--steps", "1", *options)
    assert code == 0 and len(lines) == noted
    assert all(line.startswith("note: nano ") and "17 frames of 64x64" in line for line in lines)


@pytest.mark.parametrize(("extra", "noted"), [(0, False), (1, True), (40, True)])
def test_a_prompt_longer_than_what_is_read_is_noted(cli, extra, noted):
    tokenizer = kandinsky5.Pipeline.load("nano").text_encoder.qwen_tokenizer
    assert len(tokenizer.encode(" red" * 256)) == 256
    code, _, lines = cli(" red" * (256 + extra), "--steps", "1", "--num-frames", "1")
    cuts = [line for line in lines if "256 tokens" in line and f" {extra} more" in line]
    assert code == 0 and len(cuts) == noted


def test_frames_are_enlarged_by_repeating_pixels(cli):
    assert cli(*FOX, "--num-frames", "1", "-o", "small.png")[0] == 0
    assert cli(*FOX, "--num-frames", "1", "--enlarge", "3", "-o", "large.png")[0] == 0
    small, large = video_io.read_image("small.png"), video_io.read_image("large.png")
    assert large.shape == (96, 144, 3) and large.equal(small.repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert cli("--replay", "large.png", "-o", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("large.png").read_bytes()


@pytest.mark.parametrize("fps, rate", [("23.976", 23.976), ("60000/1001", 60000 / 1001), ("12", 12)])
def test_frame_rates_may_be_fractions(cli, fps, rate):
    assert cli(*FOX, "--fps", fps)[0] == 0
    assert video_io.read_video("out.mp4")[1] == pytest.approx(rate, rel=1e-5)


def test_a_file_can_do_without_settings(cli):
    assert cli(*FOX, "--no-metadata")[0] == 0 and b"a fox" not in Path("out.mp4").read_bytes()
    with pytest.raises(ValueError, match="out.mp4"):
        video_io.read_metadata("out.mp4")


def test_minimal_path_and_all_options_write_the_same_file(cli):
    common = [*FOX, "--steps", "3", "--seed", "5", "--negative-prompt", "rain", "--image", "image.png", "--fps", "7"]
    assert cli(*common, "-o", "minimal.mp4")[0] == 0
    assert run_cli(lambda: dispatch(["sample", *common, "--schedule", "official", "-o", "all.mp4"])) == 0
    assert Path("minimal.mp4").read_bytes() == Path("all.mp4").read_bytes()


# --- help, import


def test_help_teaches(cli):
    code, out, lines = cli("--help")
    assert code == 0 and lines == []
    for word in ("python sample.py", "--checkpoint", "--image", "--replay", "--output FILE", "diamond", "diffusers"):
        assert word in out, word
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert len(options) == 33


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", " \n\n", "no prompt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", "a\n" * 10_001, "10,000"),
        ("a.jsonl", '{"prompt": "a fox"}\n{"seed": 3}\n', "line 2"),
        ("a.jsonl", '{"prompt": "a fox", "sed": 3}', "sed"),
        ("a.jsonl", '{"prompt": "a fox", "image": 3}', "image"),
        ("a.jsonl", '{"prompt": "a fox", "fps": "24"}', "fps"),
        ("a.jsonl", '{"prompt": "a fox", "height": 50}', "50"),
        ("a.jsonl", '{"prompt": "a fox"}\n\n{"prompt": "a fox", "steps": "x"}', "line 3"),
        ("a.jsonl", '{"prompt": "a\u2028fox"}\n{"prompt": "a fox", "image": "none.png"}', "line 2"),
        ("a.json", '{"prompt": "a fox"}', ".jsonl"),
        ("a.jsonl", '["a fox"]', "line 1"),
        ("a.jsonl", '{"prompt": "a fox", "prompt": "two"}', "line 1"),
    ],
)
def test_lists_that_are_none_are_refused(refused, name, text, words):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(["--prompts", name, "--checkpoint", "small", "-o", "videos"], words)


@pytest.mark.parametrize(
    "wrong", [["a fox"], ["-o", "x.mp4"], [], ["--replay", "x.mp4", "-o", "d"], ["-o", "image.png"]]
)
def test_a_list_needs_a_folder_and_nothing_else(refused, wrong):
    Path("two.txt").write_text("a fox\na cat\n")
    refused(["--prompts", "two.txt", "--checkpoint", "small", *wrong], "--prompts")


@pytest.mark.parametrize("option", ["--replay", "--prompts"])
def test_a_file_has_a_name(refused, option):
    refused([option, "", "-o", "x"], option)


@pytest.mark.parametrize("option", [["--ranks", "1x2"], ["--shard"]])
def test_ranks_need_torchrun(refused, option):
    refused(["a fox", "--checkpoint", "small", *option], "torchrun")


def test_an_interrupted_list_keeps_what_is_finished(cli, monkeypatch):
    Path("two.txt").write_text("a fox\na cat\n")
    write, written = video_io.write_video, []

    def once(path, *given, **how):
        if written:
            raise KeyboardInterrupt
        written.append(write(path, *given, **how))

    monkeypatch.setattr(video_io, "write_video", once)
    many = ["--prompts", "two.txt", "--checkpoint", "small", "--num-frames", "1", "-o", "images"]
    code, out, lines = cli(*many)
    assert (code, out) == (130, "") and "nothing was written" not in lines[-1] and len([*Path("images").iterdir()]) == 1


def test_a_folder_that_cannot_be_made_is_named(refused):
    Path("two.txt").write_text("a fox\na cat\n")
    refused(["--prompts", "two.txt", "--checkpoint", "small", "-o", "/proc/videos"], "cannot make the folder")


def test_another_image_at_the_same_place_is_another_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"prompt": "a fox", "image": "fox.png", "seed": 3}
    Path("fox.png").write_bytes(b"a fox")
    first = prompts.name_video(settings, "nano", False)
    Path("fox.png").rename("moved.png")
    assert prompts.name_video(settings | {"image": "moved.png"}, "nano", False) == first
    Path("fox.png").write_bytes(b"a cat")
    assert prompts.name_video(settings, "nano", False) != first


@pytest.mark.parametrize("prompt", ["CON", "nul.", "a fox: red?", "c:\\fox\\..", 'fox*|<>"\t', " ...", "лиса/…"])
def test_names_are_names_on_every_system(prompt):
    """Windows keeps some for devices, and refuses colons, ends of dots and more."""
    name = prompts.name_video({"prompt": prompt}, "nano", True)
    assert re.fullmatch(r"\w[\w-]*-[0-9a-f]{10}\.png", name) and len(name.encode()) < 255


def test_names_have_only_letters_that_the_file_system_takes(monkeypatch):
    names = {}
    for encoding in ("utf-8", "ascii", "cp1251"):
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda encoding=encoding: encoding)
        names[encoding] = [prompts.name_video({"prompt": text}, "nano", False) for text in ("кот и a fox", "猫")]
        assert all(name.encode(encoding) for name in names[encoding])
    (fox, cat), ascii_names, _ = names.values()
    assert fox.startswith("кот-и-a-fox-") and cat.startswith("猫-")
    assert ascii_names == [fox.replace("кот-и-", ""), cat.replace("猫", "video")]


def test_many_prompts_each_with_its_own_settings(cli):
    lines = ['{"prompt": "a fox", "num_frames": 1}', '{"prompt": "a fox", "seed": 4, "num_frames": 1, "steps": 1}']
    Path("two.jsonl").write_text("\n".join(lines))
    many = ["--prompts", "two.jsonl", "--checkpoint", "small", "-o", "images"]
    code, out, _ = cli(*many)
    images = sorted(Path("images").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    assert code == 0 and len(images) == 2 and all(path.name in out for path in images)
    cli("a fox", "--checkpoint", "small", "--num-frames", "1", "--seed", "4", "--steps", "1", "-o", "alone.png")
    assert Path("alone.png").read_bytes() == images[1].read_bytes()
    images[0].unlink()
    Path("images/videos.csv").write_bytes("file;é".encode("latin-1"))  # as a spreadsheet saves it
    before = images[1].stat().st_mtime_ns
    code, out, _ = cli(*many)
    assert code == 0 and images[0].exists() and images[1].stat().st_mtime_ns == before and "was there" in out
    table = Path("images/videos.csv").read_text().splitlines()
    assert table[0] == "file,prompt,seed,seconds" and len(table) == 3 and not table[1].endswith(",")


def test_a_long_list_keeps_no_images_in_memory(cli, monkeypatch):
    line = '{"prompt": "a fox", "image": "image.png", "num_frames": 1}'
    Path("two.jsonl").write_text(f"{line}\n{line.replace('fox', 'cat')}")
    held, load = [], sample_command.load_pipeline

    def watch(folder, config, settings, jobs, loras, many):
        held.extend(job.request.images for job in jobs)
        return load(folder, config, settings, jobs, loras, many)

    monkeypatch.setattr(sample_command, "load_pipeline", watch)
    assert cli("--prompts", "two.jsonl", "--checkpoint", "small", "-o", "images")[0] == 0 and held == [None, None]
    cli(*FOX, "--image", "image.png", "--num-frames", "1", "-o", "alone.png")
    assert Path("alone.png").read_bytes() in [path.read_bytes() for path in Path("images").glob("*.png")]
