"""A video says how it was made, and is made again from that; a stranger's video decides nothing."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from command_line import CONFIG, FOX, ROOT
from kandinsky5 import Pipeline, video_io
from kandinsky5.cli import run as run_cli
from kandinsky5.config_file import load_config, save_config
from kandinsky5.extras.magcache import StepSkipping
from kandinsky5.extras.magcache.__main__ import save
from random_weights import SMALL


def test_compile_is_recorded_and_replayed_only_if_requested(cli, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "kandinsky5.pipeline.compile_models", lambda dit, *_: compiled.append(vars(dit).update(compiled_with={}))
    )
    assert cli(*FOX, "--compile")[0] == 0 and video_io.read_metadata("out.mp4")["compile"] is True
    code, _, lines = cli("--replay", "out.mp4", "-o", "again.mp4")
    assert code == 0 and len(compiled) == 1 and ["--compile" in line for line in lines] == [True]
    assert cli("--replay", "out.mp4", "--compile", "-o", "again.mp4")[0] == 0 and len(compiled) == 2


def test_int8_is_recorded_and_replayed_to_the_same_bytes(cli):
    assert cli(*FOX, "--quantize", "int8", "-o", "a.mp4")[0] == cli(*FOX, "-o", "b.mp4")[0] == 0
    assert cli("--replay", "a.mp4", "-o", "c.mp4")[0] == 0
    a, b, c = (video_io.read_metadata(f"{name}.mp4") for name in "abc")
    assert (a["quantize"], b["quantize"], c["quantize"]) == ("int8", None, "int8")
    assert Path("a.mp4").read_bytes() == Path("c.mp4").read_bytes() != Path("b.mp4").read_bytes()


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


PROGRAM = """
import json, socket, sys
import torch
before = {name for name in sys.modules if name.startswith(("torch", "sympy"))}

def forbidden(*arguments, **options):
    raise AssertionError("called")

socket.socket = socket.create_connection = socket.getaddrinfo = forbidden
import sample
assert sample.main(["--replay", "a.mp4", "-o", "b.mp4"]) == 0
assert not torch.cuda.is_initialized()
compiler = ("torch._dynamo", "torch._inductor", "sympy")
assert not [name for name in sys.modules if name.startswith(compiler) and name not in before]
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_another_process_writes_the_same_bytes_and_imports_little(here):
    """On the CPU without a GPU, network, compiler or reference."""
    assert sample.main([*FOX, "--image", "image.png", "-o", "a.mp4"]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in modules and not {"diffusers", "transformers", "matplotlib"} & set(modules)


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
        ["--height", "480", "--width", "480", "--steps", "1"],
        ["--image", "image.png"],
    ],
    ids=lambda options: options[0],
)
def test_options_win_over_replayed_settings(cli, monkeypatch, options):
    """480 pixels also change the RoPE scale of a checkpoint that names none; latents are shown, which are small."""

    def show(self, latents, *_):
        return (latents[..., :3].clamp(-1, 1) * 100 + 128).to(torch.uint8)

    monkeypatch.setattr(Pipeline, "decode", show)
    first = [*FOX, "--num-frames", "1", "--guidance", "1", "--seed", "2"]
    size = ["--height", "32", "--width", "48"]  # an image of its own would choose another
    assert cli(*first, *size, "-o", "a.png")[0] == 0
    assert cli("--replay", "a.png", *options, "-o", "b.png")[0] == 0
    assert cli(*first, *size, *options, "-o", "direct.png")[0] == 0
    assert Path("b.png").read_bytes() == Path("direct.png").read_bytes() != Path("a.png").read_bytes()


def test_replay_with_another_model_takes_its_defaults(cli, checkpoint):
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


def test_replay_with_other_weights_needs_them_named(cli, refused, here):
    assert cli(*FOX)[0] == 0
    old, replay = Path("small/dit.safetensors").resolve(), ["--replay", "out.mp4", "-o", "again.mp4"]
    state = {name: tensor * 1.01 for name, tensor in load_file(old).items()}  # as after more training
    Path("small/dit.safetensors").unlink()
    save_file(state, "small/dit.safetensors")
    refused(replay, "small has changed since out.mp4 was made with it", "--checkpoint small")
    code, _, lines = cli(*replay, "--checkpoint", "small")
    before, now = (video_io.read_metadata(name)["fingerprint"][:8] for name in ("out.mp4", "again.mp4"))
    assert code == 0 and len(lines) == 1 and before in lines[0] and now in lines[0]
    assert before != now and not video_io.read_video("again.mp4")[0].equal(video_io.read_video("out.mp4")[0])
    Path("small/dit.safetensors").unlink()
    Path("small/dit.safetensors").symlink_to(old)
    assert cli(*replay)[0] == 0 and Path("again.mp4").read_bytes() == Path("out.mp4").read_bytes()


def test_replay_of_another_version_is_a_note(cli, monkeypatch):
    assert cli(*FOX)[0] == 0
    monkeypatch.setattr("kandinsky5.extras.replay.__version__", "9.9")
    code, _, lines = cli("--replay", "out.mp4", "-o", "again.mp4")
    assert code == 0 and len(lines) == 1 and "0.1.0" in lines[0] and "9.9" in lines[0]
    assert video_io.read_metadata("again.mp4")["version"] == "9.9"


def test_replay_of_a_strangers_file_is_refused(refused):
    Path("text.mp4").write_text("no film")
    video_io.write_video("plain.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    video_io.write_video("other.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata={"prompt": "a fox"})
    refused(["--replay", "missing.mp4"], "cannot read missing.mp4", "sample.py wrote")
    refused(["--replay", "text.mp4"], "cannot read text.mp4", "sample.py wrote")
    refused(["--replay", "plain.mp4"], "plain.mp4 carries no settings")
    refused(["--replay", "other.mp4"], "other.mp4 does not say its negative_prompt, height", "sample.py wrote")
    refused(["--replay", "image.png"], "image.png carries no settings")


written = {}


def read_settings(cli) -> dict:
    """What a video that is made here says; the checkpoint is the same for all tests, so one video does."""
    if not written:
        assert cli(*FOX, "-o", "good.mp4")[0] == 0
        written.update(video_io.read_metadata("good.mp4"))
    return written


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("height", "512", "bad.mp4 holds damaged settings (height is '512' and should be a whole number): give a file"),
        ("height", -16, "replaying bad.mp4: height -16: a side is a multiple of 16"),
        ("num_inference_steps", 10**30, "num_inference_steps"),
        ("rope_scale", [1, 2], "rope_scale is [1, 2] and should be a list of 3 times a finite number"),
        ("prompt", None, "prompt is None and should be a text"),
        ("dtype", "int8", "dtype is 'int8' and should be one of bfloat16, float16, float32"),
        ("quantize", "int4", "quantize is 'int4' and should be one of int8 or null"),
        ("compile", 0, "compile is 0 and should be true or false"),
        ("step_skipping", {"conditional": [1.0, None]}, "conditional is None"),
        ("step_skipping", {}, "does not say its conditional"),
    ],
)
def test_a_wrong_value_in_a_replayed_file_is_named_with_its_rule(cli, refused, name, value, words):
    settings = read_settings(cli) | {name: value}
    video_io.write_video("bad.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata=settings)
    refused(["--replay", "bad.mp4"], "bad.mp4", words)


def stranger(cli, **changes) -> list[str]:
    """A replay of a small file whose settings were changed by hand."""
    settings = read_settings(cli) | changes
    video_io.write_video("strange.mp4", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), metadata=settings)
    return ["--replay", "strange.mp4", "-o", "again.mp4"]


@pytest.mark.parametrize("spelling", ["{}", "../{}"])
def test_a_replay_finds_files_outside_the_current_folder(cli, here, monkeypatch, spelling):
    places = {name: str(here / name) if spelling == "{}" else f"../{name}" for name in ("small", "image.png")}
    (here / "work" / "clips").mkdir(parents=True)
    monkeypatch.chdir(here / "work")
    options = ["--checkpoint", places["small"], "--image", places["image.png"]]
    assert cli("a fox", *options, "-o", "clips/a.mp4")[0] == 0
    settings = video_io.read_metadata("clips/a.mp4")
    assert (settings["checkpoint"], settings["image"]) == ("../small", "../image.png")
    for folder, name in (("work", "clips/a.mp4"), ("work/clips", "a.mp4"), (".", "work/clips/a.mp4")):
        monkeypatch.chdir(here / folder)
        assert cli("--replay", name, "-o", "again.mp4")[0] == 0
        assert Path("again.mp4").read_bytes() == (here / "work/clips/a.mp4").read_bytes()


def test_a_file_of_an_older_version_finds_its_absolute_paths(cli, here):
    digest = hashlib.sha256(Path("image.png").read_bytes()).hexdigest()
    replay = stranger(cli, checkpoint=str(here / "small"), image=str(here / "image.png"), image_sha256=digest)
    assert cli(*replay)[0] == 0
    settings = video_io.read_metadata("again.mp4")
    assert (settings["checkpoint"], settings["image"]) == ("small", "image.png")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder outside of all that it uses, as /proc is")
def test_a_path_that_shares_no_folder_is_recorded_by_name(cli, here, monkeypatch):
    monkeypatch.chdir("/proc")
    assert cli("a fox", "--checkpoint", here / "small", "-o", here / "a.mp4")[0] == 0
    assert video_io.read_metadata(here / "a.mp4")["checkpoint"] == "small"


def test_of_several_checkpoints_the_recorded_one_is_replayed(cli, here, monkeypatch):
    assert cli(*FOX)[0] == 0
    shutil.copytree("small", "elsewhere/small")
    monkeypatch.chdir(here / "elsewhere")
    state = {name: tensor * 1.01 for name, tensor in load_file("small/dit.safetensors").items()}
    save_file(state, "small/dit.safetensors")
    assert cli("--replay", "../out.mp4", "-o", "again.mp4")[0] == 0
    assert Path("again.mp4").read_bytes() == (here / "out.mp4").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "/dev/zero", "image_sha256": "0"},
        {"image": "../image.png", "image_sha256": "0"},
        {"image": "pipe.png", "image_sha256": "0"},
        {"image": "image.png", "image_sha256": "0"},
        {"checkpoint": "/"},
        {"checkpoint": "../nowhere"},
        {"checkpoint": "../small", "fingerprint": "0"},
        {"num_inference_steps": 10**6},
        {"num_frames": 4 * 10**9 + 1},
        {"prompt": "x" * 5_000_000},
        {"prompt": "x" * 200_000},
        {"height": 16384, "width": 16384, "num_frames": 4001},
        {"fps": 0},
        {"enlarge": 10**9},
        {"loras": [{"file": "/dev/zero", "weight": 1.0, "fingerprint": "0"}]},
        {"loras": [{"file": "pipe.png", "weight": 1.0, "fingerprint": "0"}]},
        {"loras": [{"file": "../small/dit.safetensors", "weight": 1.0, "fingerprint": "0"}] * 3},
        {"step_skipping": {"conditional": [1.0] * 300_000, "unconditional": [1.0] * 300_000}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_excessive_or_foreign_settings_are_refused(cli, refused, changes):
    os.mkfifo("pipe.png")
    refused(stranger(cli, **changes), "strange.mp4")


def test_a_stranger_chooses_no_device_and_compiles_nothing(cli, monkeypatch):
    monkeypatch.setattr("kandinsky5.pipeline.compile_models", lambda *models: pytest.fail("compiled"))
    code, _, lines = cli(*stranger(cli, compile=True, device="cuda:7"))
    assert code == 0 and video_io.read_metadata("again.mp4")["device"] == "cpu" and len(lines) == 2


@pytest.mark.parametrize(
    "changes, options, shown",
    [
        ({"prompt": "a fox " * 3000}, [], ["a fox a fox", "32x48, frames: 5", "steps: 2", "seed 0", "with small"]),
        ({"seed": 7, "num_inference_steps": 1}, ["--steps", "3"], ["steps: 3", "seed 7"]),
        ({"num_frames": 1}, ["--seed", "5", "a bear"], ['"a bear", 32x48, frames: 1,', "seed 5"]),
        ({"prompt": "\x1b]52;c;cHduZWQ=\x07\u202ex"}, [], [r"\x1b]52;c;cHduZWQ=\x07", r"\u202e"]),
    ],
    ids=["long prompt", "steps", "options", "escapes"],
)
def test_a_replay_begins_with_what_it_makes(here, cli, capsys, changes, options, shown):
    replay = stranger(cli, **changes)
    assert run_cli(lambda: sample.main([*replay, *options])) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("replaying strange.mp4: ") and len(first) < 400 and first.isprintable()
    assert all(words in first for words in shown)


def test_recorded_text_is_printed_without_control_characters(cli):
    osc = "\x1b]52;c;cHduZWQ=\x07"
    code, _, lines = cli(*stranger(cli, version=osc, device=osc, prompt=f"a {osc} fox"))
    assert code == 0 and not any("\x1b" in line or "\x07" in line for line in lines)


def test_an_emulated_precision_is_noted(cli, monkeypatch):
    assert cli(*FOX, "--dtype", "bfloat16", "--num-frames", "1", "--steps", "1", "-o", "out.mp4")[0] == 0
    monkeypatch.setattr("kandinsky5.extras.replay.is_native", lambda dtype, device: dtype != torch.bfloat16)
    code, _, lines = cli("--replay", "out.mp4", "-o", "again.mp4")
    assert code == 0 and len(lines) == 1 and "--dtype float32" in lines[0]
    assert Path("again.mp4").read_bytes() == Path("out.mp4").read_bytes()
    assert cli("--replay", "out.mp4", "--dtype", "float32", "-o", "again.mp4")[2] == []
