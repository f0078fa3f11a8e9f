"""sample.py as its users meet it: the file says how it was made, a replay makes it again, a mistake costs one line."""

import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import kandinsky5
import sample
from kandinsky5 import video_io
from kandinsky5.checkpoint import fingerprint
from kandinsky5.cli import run as run_cli
from kandinsky5.config import TextConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.dit import DiT
from kandinsky5.extras.magcache import StepSkipping
from kandinsky5.extras.magcache.__main__ import save
from random_weights import SMALL, SMALL_DIT, SMALL_NABLA, save_small_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIG = replace(SMALL, text=TextConfig(template="<|im_start|>{}<|im_end|>", dropped_tokens=1))
BARS = ("encoding:", "sampling:", "decoding:")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A native folder, with one token for each byte: the real vocabularies take a second to read, run after run."""
    folder = tmp_path_factory.mktemp("native") / "small"
    save_small_checkpoint(folder, CONFIG)
    for name, ends in (("qwen", [""]), ("clip", ["", "</w>"])):
        tokens = [character + end for end in ends for character in sorted(ByteLevel.alphabet())]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / f"{name}_tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / f"{name}_tokenizer" / "merges.txt").write_text("")
    (folder / "qwen_tokenizer" / "added_tokens.json").unlink()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, checkpoint):
    """The working folder: a checkpoint `small` of links, so that its files can be replaced, and an image."""
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    for path in checkpoint.iterdir():
        Path("small", path.name).symlink_to(path)
    pixels = torch.randint(0, 256, (1, 40, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video_io.write_video("image.png", pixels)
    return tmp_path


@pytest.fixture
def cli(here, capsys):
    """Runs a command line; returns the exit code, stdout, and the lines of stderr that are no progress bars."""

    def run(*arguments):
        try:
            code = run_cli(lambda: sample.main([str(argument) for argument in arguments]))
        except SystemExit as end:  # argparse, after --help
            code = end.code
        out, err = capsys.readouterr()
        return code, out, without_bars(err)

    return run


@pytest.fixture
def refused(cli):
    """Asserts that a command line ends with code 2 and one line with these words, and changes no file."""

    def check(arguments, *words):
        before = snapshot()
        code, out, lines = cli(*arguments)
        assert (code, out, len(lines)) == (2, "", 1), lines
        assert all(str(word) in lines[0] for word in words) and "error: " in lines[0] and len(lines[0]) < 700, lines[0]
        assert snapshot() == before

    return check


def without_bars(err: str) -> list[str]:
    return [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith(BARS)]


def snapshot() -> dict:
    return {str(path): path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}


def in_process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


FOX = ("a fox", "--checkpoint", "small")


# --- what is written


def test_stdout_is_one_line_and_stderr_shows_the_progress(here, capsys):
    assert sample.main([*FOX]) == 0
    out, err = capsys.readouterr()
    assert out == "out.mp4: 5 frames of 32x48, seed 0\n"
    assert [bar for bar in BARS if bar not in err] == [] and "2/2" in err and "step/s" in err and "frame/s" in err
    frames, fps = video_io.read_video("out.mp4")
    assert frames.shape == (5, 32, 48, 3) and fps == 24


def test_what_is_not_given_is_the_checkpoints_own_and_all_of_it_is_in_the_file(cli, here):
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
        "dtype": "bfloat16",
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
        "attention": "auto",
        "compile": False,
        "tile_space": False,
        "enlarge": 1,
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


def test_compile_is_in_the_file_and_a_replay_does_without_unless_asked(cli, monkeypatch):
    asked = []
    monkeypatch.setattr("kandinsky5.pipeline.compile_models", lambda *models: asked.append(1))
    assert cli(*FOX, "--compile")[0] == 0 and video_io.read_metadata("out.mp4")["compile"] is True
    code, _, lines = cli("--replay", "out.mp4", "-o", "again.mp4")
    assert code == 0 and len(asked) == 1 and ["--compile" in line for line in lines] == [True]
    assert cli("--replay", "out.mp4", "--compile", "-o", "again.mp4")[0] == 0 and len(asked) == 2


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
    monkeypatch.setattr("kandinsky5.extras.preview.open_place", lambda place: lambda step, picture: seen.append(step))
    assert cli(*FOX, "--steps", steps, "--preview")[0] == 0
    assert seen == shown


# --- replay


@pytest.mark.parametrize(
    "output, options",
    [
        ("a.mp4", []),
        ("a.mp4", ["--image", "image.png"]),
        ("a.png", ["--num-frames", "1"]),
        ("a.mp4", ["--seed", "9", "--schedule", "diffusers", "--quality", "3", "--negative-prompt", "", "--fps", "7"]),
    ],
    ids=["t2v", "i2v", "png", "options"],
)
def test_replay_writes_the_same_bytes_from_any_folder(cli, here, monkeypatch, output, options):
    assert cli(*FOX, *options, "-o", output)[0] == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    code, _, lines = cli("--replay", here / output, "-o", f"again{output[1:]}")
    assert (code, lines) == (0, [])
    assert Path(f"again{output[1:]}").read_bytes() == (here / output).read_bytes()


def test_replay_in_another_process_writes_the_same_bytes(here):
    assert sample.main([*FOX, "--image", "image.png", "-o", "a.mp4"]) == 0
    done = in_process("--replay", "a.mp4", "-o", "b.mp4")
    assert done.returncode == 0, done.stderr
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_replay_does_not_follow_the_checkpoints_new_defaults(cli):
    assert cli(*FOX)[0] == 0
    config = load_config("small/config.json")
    Path("small/config.json").unlink()
    sampling = replace(config.sampling, shift=2.0, num_inference_steps=3, negative_prompt="rain", fps=5, num_frames=1)
    sampling = replace(sampling, rope_scale=(1.0, 2.0, 2.0), guidance_scale=2.0, height=64, width=64)
    save_config(replace(config, sampling=sampling), "small/config.json")
    assert cli("--replay", "out.mp4", "-o", "again.mp4")[0] == 0
    assert Path("again.mp4").read_bytes() == Path("out.mp4").read_bytes()


def test_replay_of_skipped_steps_needs_no_file_of_ratios(cli):
    """What the file said is in the video's metadata, so that the plan is the same whatever became of the file."""
    skipping = StepSkipping((1.0,) * 3, (1.0,) * 3, threshold=0.5, source="made up")
    save(skipping, Path("ratios.json"))
    assert cli(*FOX, "--steps", "4", "-o", "plain.mp4")[0] == 0
    assert cli(*FOX, "--steps", "4", "--step-skipping", "ratios.json")[0] == 0
    expected = dataclasses.asdict(skipping) | {"conditional": [1, 1, 1], "unconditional": [1, 1, 1]}
    assert video_io.read_metadata("out.mp4")["step_skipping"] == expected
    save(dataclasses.replace(skipping, threshold=0), Path("ratios.json"))
    assert cli("--replay", "out.mp4", "-o", "again.mp4")[0] == 0
    assert Path("again.mp4").read_bytes() == Path("out.mp4").read_bytes()
    assert not video_io.read_video("out.mp4")[0].equal(video_io.read_video("plain.mp4")[0])


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "4"],
        ["--steps", "3", "--shift", "2"],
        ["--height", "480", "--width", "480"],
        ["--image", "image.png"],
    ],
    ids=lambda options: options[0],
)
def test_an_option_beside_replay_wins_and_the_rest_stays(cli, options):
    """480 pixels also change the RoPE scale of a checkpoint that names none."""
    first = [*FOX, "--num-frames", "1", "--guidance", "1", "--seed", "2"]
    size = ["--height", "32", "--width", "48"]  # an image of its own would choose another
    assert cli(*first, *size, "-o", "a.png")[0] == 0
    assert cli("--replay", "a.png", *options, "-o", "b.png")[0] == 0
    assert cli(*first, *size, *options, "-o", "direct.png")[0] == 0
    assert Path("b.png").read_bytes() == Path("direct.png").read_bytes() != Path("a.png").read_bytes()


def test_replay_with_another_model_takes_its_own_steps_and_scales_and_says_so(cli, checkpoint):
    shutil.copytree("small", "other", symlinks=True)
    Path("other/config.json").unlink()
    scaled = replace(
        CONFIG,
        name="other",
        sampling=replace(SMALL.sampling, num_inference_steps=3, guidance_scale=1.0, rope_scale=(1.0, 2.0, 2.0)),
    )
    save_config(scaled, "other/config.json")
    assert cli(*FOX)[0] == 0
    made_by = video_io.read_metadata("out.mp4")["fingerprint"][:8]
    assert cli("--replay", "out.mp4", "--checkpoint", "other", "-o", "again.mp4")[2] == [
        f"note: out.mp4 was made by small ({made_by}), this is other ({made_by}); "
        "its own steps, guidance, shift and size hold"
    ]
    assert cli("a fox", "--checkpoint", "other", "-o", "direct.mp4")[0] == 0
    assert Path("again.mp4").read_bytes() == Path("direct.mp4").read_bytes()


def test_replay_says_what_is_not_as_it_was(cli, refused, here):
    assert cli(*FOX, "--image", "image.png")[0] == 0
    replay = ["--replay", "out.mp4", "-o", "again.mp4"]
    Path("image.png").rename("moved.png")
    refused(replay, "the image image.png", "--image")
    assert cli(*replay, "--image", "moved.png")[0] == 0
    assert video_io.read_video("again.mp4")[0].equal(video_io.read_video("out.mp4")[0])
    Path("again.mp4").unlink()
    video_io.write_video("image.png", torch.zeros(1, 40, 70, 3, dtype=torch.uint8))
    refused(replay, "image.png is not the image that out.mp4 was made from", "--image")
    Path("moved.png").replace("image.png")
    Path("small").rename("moved")
    refused(replay, "the checkpoint small", "--checkpoint")
    assert cli(*replay, "--checkpoint", "moved")[0] == 0


def test_replay_with_other_weights_is_refused_unless_they_are_asked_for(cli, refused, here):
    assert cli(*FOX)[0] == 0
    old, replay = Path("small/dit.safetensors").resolve(), ["--replay", "out.mp4", "-o", "again.mp4"]
    state = {name: tensor * 1.01 for name, tensor in load_file(old).items()}  # as after more training
    Path("small/dit.safetensors").unlink()
    save_file(state, "small/dit.safetensors")
    refused(replay, "small has changed since out.mp4 was made with it", "--checkpoint small")
    code, _, lines = cli(*replay, "--checkpoint", "small")
    before, now = (video_io.read_metadata(name)["fingerprint"][:8] for name in ("out.mp4", "again.mp4"))
    assert code == 0 and lines == [f"note: out.mp4 was made by small ({before}), this is small ({now})"]
    assert before != now and not video_io.read_video("again.mp4")[0].equal(video_io.read_video("out.mp4")[0])
    Path("small/dit.safetensors").unlink()
    Path("small/dit.safetensors").symlink_to(old)
    assert cli(*replay)[0] == 0 and Path("again.mp4").read_bytes() == Path("out.mp4").read_bytes()


def test_no_output_takes_the_place_of_an_input(cli, refused):
    assert cli(*FOX)[0] == 0
    Path("link.mp4").symlink_to("out.mp4")
    for options in (
        ["--replay", "out.mp4", "-o", "out.mp4"],
        ["--replay", "out.mp4", "-o", "link.mp4"],
        [*FOX, "--image", "image.png", "--num-frames", "1", "-o", "image.png"],
        [*FOX, "--image", "image.png", "--preview", "image.png"],
        [*FOX, "--num-frames", "1", "--preview", "a.png", "-o", "./a.png"],
        ["--replay", "image.png", "--preview", "image.png"],
    ):
        refused(options, "would replace the file of")


def test_the_default_name_is_numbered_and_a_given_one_overwritten(cli):
    first = cli(*FOX)[1], cli(*FOX)[1], cli("--replay", "out.mp4")[1]
    assert [line.split(":")[0] for line in first] == ["out.mp4", "out-2.mp4", "out-3.mp4"]
    before = Path("out.mp4").read_bytes()
    assert before == Path("out-2.mp4").read_bytes() == Path("out-3.mp4").read_bytes()
    assert cli(*FOX, "--seed", "4", "-o", "out.mp4")[0] == 0 and Path("out.mp4").read_bytes() != before


def test_replay_of_another_version_is_a_note(cli, monkeypatch):
    assert cli(*FOX)[0] == 0
    monkeypatch.setattr(kandinsky5, "__version__", "9.9")
    code, _, lines = cli("--replay", "out.mp4", "-o", "again.mp4")
    assert code == 0 and lines == ["note: out.mp4 was made by version 0.1.0, this is 9.9: they may draw it differently"]
    assert video_io.read_metadata("again.mp4")["version"] == "9.9"


def test_replay_of_a_strangers_file_is_refused(refused):
    Path("text.mp4").write_text("no film")
    video_io.write_video("plain.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    video_io.write_video("other.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata={"prompt": "a fox"})
    refused(["--replay", "missing.mp4"], "cannot read missing.mp4 (No such file", "sample.py wrote")
    refused(["--replay", "text.mp4"], "cannot read text.mp4", "sample.py wrote")
    refused(["--replay", "plain.mp4"], "plain.mp4 carries no settings")
    refused(["--replay", "other.mp4"], "other.mp4 does not say its negative_prompt, height", "sample.py wrote")
    refused(["--replay", "image.png"], "image.png carries no settings")


# --- mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        ("--height 40", "height 40: a side is a multiple of 16; try 32 or 48"),
        ("--width 0", "width 0: a side is a multiple of 16; try 16 or 32"),
        ("--width -16", "width -16: a side is a multiple of 16"),
        ("--num-frames 6", "6 frames: a clip has 4k + 1 frames; try 5 or 9"),
        ("--num-frames 0", "0 frames: a clip has 4k + 1 frames; try 1 or 5"),
        ("--steps 0", "0 steps: sampling takes at least 1 step"),
        ("--steps -3", "-3 steps: sampling takes at least 1 step"),
        ("--steps many", "--steps: invalid int value: 'many'"),
        ("--guidance nan", "guidance_scale nan"),
        ("--guidance inf", "guidance_scale inf"),
        ("--shift 0", "shift 0.0: it must be positive and finite"),
        ("--shift nan", "shift nan: it must be positive and finite"),
        ("--shift inf", "shift inf: it must be positive and finite"),
        ("--schedule linear", "--schedule: invalid choice: 'linear'"),
        ("--seed -1", "seed -1: give a whole number from 0 to"),
        ("--seed 99999999999999999999", "seed 99999999999999999999: give a whole number from 0 to"),
        ("--fps 0", "fps 0.0 is not between 1 and 1000"),
        ("--quality 11", "quality 11.0 is not between 1 (small) and 10"),
        ("--quality nan", "quality nan is not between 1 (small) and 10"),
        ("--device banana", "device banana: cannot be used here (Expected one of cpu, cuda"),
        ("--device cuda:99", "device cuda:99: cannot be used here"),
        ("--device meta", "device meta"),
        ("--step-skipping", "there are ratios for i2v-lite-5s, "),
        ("--step-skipping", "none for small: measure them with `python -m kandinsky5.extras.magcache CHECKPOINT"),
        ("--step-skipping missing.json", "cannot read missing.json (No such file or directory): give a file that"),
        ("--step-skipping fox", "'fox' does not end in .json; a prompt goes before the options"),
        ("--preview", "preview: the output is no terminal: give a file, --preview FILE.png"),
        ("--preview fox", "'fox' does not end in .png; a prompt goes before the options"),
        ("--preview missing/a.png", "cannot write missing/a.png (No such file or directory)"),
        ("--offload disk", "--offload: invalid choice: 'disk'"),
        ("--dtype int8", "int8"),
        ("--height 16400", "height 16400: an mp4 holds sides up to 16384; give --height and --width"),
        ("--height 1600000000 --width 1600000000", "height 1600000000: an mp4 holds sides up to 16384"),
        ("--image ribbon.png", "width 24784: an mp4 holds sides up to 16384; give --height and --width"),
        ("--image missing.png", "cannot read missing.png (No such file or directory): give a whole JPEG"),
        ("--image text.jpg", "cannot read text.jpg (it is no such image): give a whole JPEG, PNG or WebP"),
        ("--image half.png", "cannot read half.png"),
        ("--image folder", "cannot read folder (Is a directory): give a whole JPEG, PNG or WebP"),
        ("-o missing/out.mp4", "cannot write missing/out.mp4 (No such file or directory): choose a folder"),
        ("-o folder.mp4", "cannot write folder.mp4 (it is a folder)"),
        ("-o /proc/out.mp4", "cannot write /proc/out.mp4"),
        ("-o out.gif", "cannot write out.gif: the name must end in .mp4, or in .png for one frame"),
        ("-o out.png", "cannot write 5 frames to out.png: a .png holds one (--num-frames 1)"),
        ("two words", "cannot use two words: a prompt goes in quotes, and --help lists the options"),
        ("--stpes 3", "cannot use --stpes 3"),
    ],
)
def test_a_bad_option_is_answered_in_one_line(refused, options, words):
    Path("text.jpg").write_text("no picture")
    Path("half.png").write_bytes(Path("image.png").read_bytes()[:4000])
    video_io.write_video("ribbon.png", torch.zeros(1, 1, 400000, 3, dtype=torch.uint8))
    Path("folder").mkdir()
    Path("folder.mp4").mkdir()
    refused([*FOX, *options.split()], words)


@pytest.mark.parametrize("option", ["--num-frames", "--steps"])
def test_absurd_counts_end_in_one_line(refused, option):
    refused([*FOX, option, str(4 * 10**15 + 1)])


def test_compiling_without_a_compiler(refused, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused([*FOX, "--compile"], "there is no no-such-compiler here: install one", "--no-compile")


def test_nothing_to_do_is_said(refused):
    refused([], "no prompt: give one", "--replay FILE")


def test_a_place_that_is_no_checkpoint(refused, here):
    for folder in ("empty", "diffusers", "official/model"):
        Path(folder).mkdir(parents=True)
    Path("diffusers/model_index.json").write_text("{}")
    Path("official/model/lite.safetensors").touch()
    Path("diffusers/text_encoder").mkdir()
    Path("diffusers/text_encoder/config.json").write_text("{}")
    Path("diffusers/text_encoder/model.safetensors").touch()
    for place, words in {
        "t2v-light-sft-5s": "'t2v-light-sft-5s' is neither a folder nor a preset: did you mean t2v-lite-sft-5s",
        "t2v-lite-sft-5s": "the weights of preset 't2v-lite-sft-5s' are not part of this package: download them",
        "no/such": "there is no checkpoint folder no/such",
        "empty": "empty holds no config.json",
        "image.png": "image.png is not a folder",
        "diffusers": "Diffusers layout; convert it once: python -m weights_convert from-diffusers diffusers NEW_FOLDER",
        "diffusers/text_encoder": "Diffusers layout; convert it once: python -m weights_convert from-diffusers",
        "diffusers/text_encoder/model.safetensors": "python -m weights_convert from-diffusers diffusers NEW_FOLDER",
        "small/vae.safetensors": "small/vae.safetensors is one file of a checkpoint: give its folder, small",
        "official/model": "python -m weights_convert from-official --dit official/model/lite.safetensors",
        "official": "official layout; convert it once: python -m weights_convert from-official --dit official/model/",
        "official/model/lite.safetensors": "python -m weights_convert from-official --dit official/model/lite.",
    }.items():
        refused(["a fox", "--checkpoint", place], words)


def truncate(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


DAMAGES = {
    "missing": ("vae.safetensors", None, "small/vae.safetensors is missing"),
    "truncated": ("qwen.safetensors", truncate, "small/qwen.safetensors is no complete safetensors file"),
    "web page": ("dit.safetensors", b"<html>404</html>", "small/dit.safetensors is no complete safetensors file"),
    "empty": ("clip.safetensors", b"", "small/clip.safetensors is no complete safetensors file"),
    "half a config": ("config.json", b'{"name": ', "small/config.json"),
    "unknown field": ("config.json", b'{"flavour": 3}', "PipelineConfig has no field flavour; its fields are name"),
    "wrong type": (
        "config.json",
        b'{"name": 3}',
        "name is 3",
    ),
    "no tokenizer": ("qwen_tokenizer", None, "small/qwen_tokenizer"),
}


@pytest.mark.parametrize("name, new, words", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_answered_in_one_line(refused, name, new, words):
    path = Path("small", name)
    content = new(path) if callable(new) else new
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(FOX, words)


def test_weights_of_another_size_are_named_with_both_shapes(refused):
    Path("small/dit.safetensors").unlink()
    larger = DiT(replace(SMALL_DIT, dim=96, rope_axes=(8, 20, 20), ff_dim=192))
    save_file(larger.state_dict(), "small/dit.safetensors")
    words = "time_embedder.linear_in.weight: the configuration says (32, 64), the file has (32, 96)"
    refused(FOX, "small/dit.safetensors does not fit", words)


WRONG = [None, True, -1, 0, 7, 2**25, -(2**63), 10**30, 0.5, -1e300, 5e-324, float("nan"), float("inf"), "five", "",
         "{}", "a\0b", "9" * 5000, [], [0], [None], ["a"], [1, 2, 3], [[]], {}, {"a": 1}]  # fmt: skip


def damaged(values: dict, seed: int) -> dict:
    """`values` with one entry, anywhere inside, replaced, doubled, renamed or gone."""
    chance, values = random.Random(seed), json.loads(json.dumps(values))
    places = []

    def visit(inside):
        for key, value in inside.items() if isinstance(inside, dict) else enumerate(inside):
            places.append((inside, key))
            if isinstance(value, (dict, list)):
                visit(value)

    visit(values)
    inside, key = chance.choice(places)
    if chance.random() < 0.7 or isinstance(inside[key], dict):
        inside[key] = chance.choice(WRONG)
    elif type(inside[key]) is int:
        inside[key] *= 2
    elif isinstance(inside, dict) and chance.random() < 0.5:
        inside["flavour"] = inside.pop(key)
    else:
        del inside[key]
    return values


def test_150_damaged_configs_give_one_line_or_a_video(here, cli):
    """Each is a config.json that people who edit files by hand could write; none may end in a traceback."""
    good, codes = json.loads(Path("small/config.json").read_text()), Counter()
    Path("small/config.json").unlink()
    for seed in range(150):
        Path("small/config.json").write_text(json.dumps(damaged(good, seed)))
        codes[expect_one_line_or_a_video(cli, FOX)] += 1
    assert codes[2] > 90 and codes[0] > 6


def test_150_damaged_settings_give_one_line_or_a_video(here, cli, monkeypatch):
    monkeypatch.setattr("kandinsky5.pipeline.compile_models", lambda *models: None)
    assert cli(*FOX, "-o", "good.mp4")[0] == 0
    good, codes = video_io.read_metadata("good.mp4"), Counter()
    for seed in range(150):
        video_io.write_video("bad.png", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata=damaged(good, seed))
        codes[expect_one_line_or_a_video(cli, ["--replay", "bad.png"], "bad.png")] += 1
    assert codes[2] > 90 and codes[0] > 6


def expect_one_line_or_a_video(cli, arguments, *words) -> int:
    code, out, lines = cli(*arguments)
    lines = [line for line in lines if not line.startswith("note: ")]
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines
        assert not Path("out.mp4").exists()
    else:
        assert (code, lines) == (0, [])
        Path("out.mp4").unlink()
    return code


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dit": {"dim": -64}}, "dit.dim is -64 and should be above 0"),
        ({"dit": {"num_visual_blocks": 2.0}}, "dit.num_visual_blocks is 2.0 and should be a whole number"),
        ({"dit": {"num_visual_blocks": 10**7}}, "num_visual_blocks 10000000, vae"),
        ({"dit": {"rope_axes": [8, 12, "12"]}}, "dit.rope_axes is '12' and should be a whole number"),
        ({"dit": {"rope_axes": [8, 24]}}, "dit.rope_axes is [8, 24] and should be a list of 3 times a whole number"),
        ({"dit": {"nabla": []}}, "dit.nabla is [] and should be a table of NablaConfig's fields or null"),
        ({"dit": {"nabla": {"P": 1.5}}}, "dit.nabla.P 1.5: a share is at most 1"),
        ({"vae": None}, "vae is None and should be a table of VAEConfig's fields"),
        ({"vae": {"channels": [16, 32, 32, 30]}}, "vae.norm_groups 8: groups divide channels"),
        ({"clip": {"num_heads": 5}}, "clip.dim 24, clip.num_heads 5: the number of heads divides dim"),
        ({"clip": {"dim": 48}}, "dit.pooled_dim 24, clip.dim 48: these models do not belong together"),
        ({"text": {"template": "<|im_start|>"}}, "text.template '<|im_start|>': the prompt stands in it once, at {}"),
        ({"tiling": {"frame_stride": 6}}, "windows hold whole latent frames"),
        ({"sampling": {"guidance_scale": float("inf")}}, "sampling.guidance_scale is inf and should be a finite"),
        ({"tasks": ["t2i"]}, "tasks ('t2i',): tasks are t2v, i2v or both"),
    ],
    ids=str,
)
def test_a_wrong_value_in_config_json_is_named_with_its_rule(refused, change, words):
    values = json.loads(Path("small/config.json").read_text())
    for name, new in change.items():
        values[name] = values[name] | new if isinstance(new, dict) else new
    Path("small/config.json").unlink()
    Path("small/config.json").write_text(json.dumps(values))
    refused(FOX, "config.json", words)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("height", "512", "bad.mp4 holds damaged settings (height is '512' and should be a whole number): give a file"),
        ("height", -16, "replaying bad.mp4: height -16: a side is a multiple of 16"),
        ("num_inference_steps", 10**30, "num_inference_steps"),
        ("rope_scale", [1, 2], "rope_scale is [1, 2] and should be a list of 3 times a finite number"),
        ("prompt", None, "prompt is None and should be a text"),
        ("dtype", "int8", "dtype is 'int8' and should be one of bfloat16, float16, float32"),
        ("compile", 0, "compile is 0 and should be true or false"),
        ("step_skipping", {"conditional": [1.0, None]}, "conditional is None"),
        ("step_skipping", {}, "does not say its conditional"),
    ],
)
def test_a_wrong_value_in_a_replayed_file_is_named_with_its_rule(cli, refused, name, value, words):
    assert cli(*FOX, "-o", "good.mp4")[0] == 0
    settings = video_io.read_metadata("good.mp4") | {name: value}
    video_io.write_video("bad.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata=settings)
    refused(["--replay", "bad.mp4"], "bad.mp4", words)


@pytest.mark.parametrize(
    "model, words",
    [("dit", "after step 1 of 2 the latents contain NaN"), ("vae", "the decoded frames contain NaN")],
)
def test_nan_is_named_with_the_step_and_not_drawn(refused, model, words):
    path = Path(f"small/{model}.safetensors")
    state = load_file(path)
    path.unlink()
    name = next(n for n in state if n.endswith("weight") and not n.startswith("encoder"))
    state[name].view(-1)[0] = torch.nan
    save_file(state, path)
    refused(FOX, words)


def test_an_image_goes_to_an_i2v_checkpoint_and_a_bare_prompt_to_a_t2v_one(refused):
    for task, options, words in [
        ("t2v", ["--image", "image.png"], "small makes videos from a prompt alone: leave the image out, or use an i2v"),
        ("i2v", [], "small makes videos from an image and a prompt: give an image (--image), or use a t2v"),
    ]:
        Path("small/config.json").unlink()
        save_config(replace(CONFIG, tasks=(task,)), "small/config.json")
        refused([*FOX, *options], words)


def test_nabla_asks_for_sides_of_128(refused):
    Path("small/config.json").unlink()
    save_config(replace(CONFIG, dit=replace(SMALL_DIT, nabla=SMALL_NABLA)), "small/config.json")
    refused([*FOX, "--height", "144"], "height 144: with NABLA a side is a multiple of 128; try 128 or 256")


def test_a_mistake_in_a_process_of_its_own_leaves_code_2_and_no_traceback(here):
    done = in_process("a fox", "--checkpoint", "nowhere/at/all")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no checkpoint folder nowhere/at/all: check the spelling, or name a preset\n"


# --- nothing is left half-written


@pytest.mark.parametrize("limit", [1000, 30_000])
def test_a_full_disk_leaves_the_old_file_and_the_frames(cli, limit):
    assert cli(*FOX, "--height", "128", "--width", "128", "-o", "whole.png", "--num-frames", "1")[0] == 0
    Path("out.png").write_bytes(b"the old film")
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
    assert code == 2 and lines[-1].endswith("the frames are in out.npz")
    assert np.load("out.npz")["frames"].shape == (5, 32, 48, 3)


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_is_130_and_one_line(here, signal_sent):
    Path("out.mp4").write_bytes(b"the old film")
    before = snapshot()
    command = [sys.executable, str(ROOT / "sample.py"), *FOX, "--steps", "1000000"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, preexec_fn=heard)
    shown = b""
    while not re.search(rb" [1-9]\d*/1000000 ", shown):  # the bar has moved
        piece = os.read(process.stderr.fileno(), 1000)
        assert piece, shown.decode()
        shown += piece
    process.send_signal(signal_sent)
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


def test_out_of_memory_on_a_gpu_is_one_line(refused, monkeypatch):
    def run(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(kandinsky5.Pipeline, "generate", run)
    refused([*FOX, "--device", "cpu"], "not enough memory (out of memory)", "--tile-space", "--offload")


def test_a_video_that_will_not_fit_is_refused_before_the_first_step(cli, refused, monkeypatch):
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: 7 * 10**8)
    large = [*FOX, "--height", "512", "--width", "512"]
    monkeypatch.setattr("kandinsky5.sampler.euler_sample", lambda *arguments: pytest.fail("steps were made"))
    refused(large, "decoding 5 frames of 512x512 takes about", "0.7 GB are free", "--tile-space", "--num-frames")


def test_tiles_in_space_are_asked_for_and_kept_in_the_file(cli):
    code, _, _ = cli(*FOX, "--width", "320", "--tile-space")
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
    note = "note: nano was trained on 17 frames of 64x64 alone, and draws other sizes and lengths worse: leave out "
    assert code == 0 and [line.startswith(note) for line in lines] == [True] * noted


@pytest.mark.parametrize(("extra", "noted"), [(0, False), (1, True), (40, True)])
def test_a_prompt_longer_than_what_is_read_is_noted(cli, extra, noted):
    tokenizer = kandinsky5.Pipeline.load("nano").text_encoder.qwen_tokenizer
    assert len(tokenizer.encode(" red" * 256)) == 256
    code, _, lines = cli(" red" * (256 + extra), "--steps", "1")
    cuts = [line for line in lines if f"256 tokens are read, and this one has {extra} more" in line]
    assert code == 0 and len(cuts) == noted


# --- help, import


def test_help_teaches(cli):
    code, out, lines = cli("--help")
    assert code == 0 and lines == []
    for word in ("python sample.py", "--checkpoint", "--image", "--replay", "-o FILE", "diamond", "diffusers"):
        assert word in out, word
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert len(options) == 26


def test_importing_the_package_touches_no_gpu_no_network_and_no_reference():
    program = """
import json, socket, sys
import torch

def forbidden(*arguments, **options):
    raise AssertionError("called")

torch.cuda._lazy_init = torch.cuda.init = socket.socket = socket.create_connection = socket.getaddrinfo = forbidden
import kandinsky5, sample
assert not torch.cuda.is_initialized()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert "torch" in modules and not {"diffusers", "transformers", "matplotlib", "PIL"} & set(modules)
