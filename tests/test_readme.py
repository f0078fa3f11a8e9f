"""README.md is true as far as it can be run: every code block and command, the table of models, the links.

Small models stand in for the released ones: a download is nano in the Diffusers layout, and a preset has nano's sizes.
Commands run in this process, in a folder of their own, with options added that make them short.
"""

import argparse
import importlib
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import sample
import weights_convert.__main__
from kandinsky5 import PRESETS
from kandinsky5.checkpoint import SHIPPED
from kandinsky5.clip import CLIPText
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.extras.magcache import __main__ as magcache
from kandinsky5.nano import distill, judge, presets, train_dit, train_text, train_vae
from kandinsky5.qwen import Qwen
from kandinsky5.vae import VAE
from kandinsky5.vae_tiling import vae_memory
from weights_convert import from_diffusers, to_diffusers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(block[1], block[2], id=f"line {README[: block.start()].count(chr(10)) + 1}")
    for block in FENCED.finditer(README)
]
IN_THE_TEXT = re.findall(r"`((?:python|pytest|pip|make|to-diffusers) [^`]+)`", FENCED.sub("", README))

# What is not run here, and why. Files that it names must be there.
NOT_RUN = {
    "python3 -m venv": "these tests run in such an environment already",
    ". .venv/bin/activate": "likewise",
    "pip install": "likewise; .ci/run installs by the README's own lines. Its extras are looked up",
    "python notebooks/build.py": ".ci/run does, with --check",
    "python benchmarks/compare.py": "tests/parity/test_benchmarks.py does, in small: it needs diffusers",
    "pytest": ".ci/run runs the tests, those with a marker, and the parity suite with the libraries that it needs",
}


@pytest.mark.parametrize("language, block", BLOCKS)
def test_block_runs(language, block, run):
    if language == "python":
        exec(compile(block, "README.md", "exec"), {})
    else:
        assert language == "bash"
        for command in re.split(r"\n| && ", block.strip()):
            run(command)


@pytest.mark.parametrize("command", IN_THE_TEXT)
def test_command_in_the_text_runs(command, run):
    run(f"python -m weights_convert {command}" if command.startswith("to-diffusers") else command)


def test_the_blocks_and_commands_are_found():
    assert README.count("```") == 2 * len(BLOCKS) >= 16
    assert "python sample.py --help" in IN_THE_TEXT


def test_options_in_the_text_exist():
    programs = (
        "sample.py",
        "weights_convert/__main__.py",
        "kandinsky5/extras/magcache/__main__.py",
        "kandinsky5/nano/train_dit.py",
        "kandinsky5/nano/distill.py",
        "tests/parity/conftest.py",
    )
    sources = " ".join((ROOT / program).read_text() for program in programs)
    options = set(re.findall(r"`(--[\w-]+)", README)) - {"--extra-index-url"}  # pip's
    assert len(options) > 10
    assert [option for option in options if f'"{option}"' not in sources] == []


def test_the_table_of_released_models_is_the_presets():
    rows = re.findall(r"^\| `.2v-[^|,]*\| \d+ \|.*×.*$", README, re.MULTILINE)
    expected = []
    for name, preset in PRESETS.items():
        sampling = preset.sampling
        expected.append(
            f"| `{name}` | {sampling.num_inference_steps} | {sampling.guidance_scale:g} | "
            f"{sampling.shift:g} | {sampling.height}×{sampling.width} | {sampling.num_frames} | "
            f"{sampling.rope_scale[1]:g} | {f'NABLA {preset.dit.nabla.P:g}' if preset.dit.nabla else 'full'} |"
        )
    assert rows == expected


def test_the_table_of_nano_shows_what_the_judge_found():
    sets = ("seen, English", "seen, Russian", "held out, English", "held out, Russian", "two objects")
    for name in presets.PRESETS:
        judged = json.loads((ROOT / "docs" / "judge" / f"judge_{name}.json").read_text())["sets"]
        rates = [f"{100 * judged[s]['answers']['all']['rate']:.1f}" if s in judged else "–" for s in sets]
        (row,) = re.findall(rf"^\| `{name}` \| .*$", README, re.MULTILINE)
        assert f"| {' | '.join(rates)} |" in row, name


def test_the_table_of_stages_has_the_steps_of_the_recipes():
    start, dit = train_dit.RECIPE, train_dit.LAST_RECIPE
    steps = {
        "vae": (train_vae.FRAMES_RECIPE, train_vae.CLIPS_RECIPE, train_vae.DECODER_RECIPE),
        "text": (train_text.QWEN_RECIPE, train_text.CLIP_RECIPE),
        "start": (start,),
    } | {stage: (recipe,) for stage, recipe in distill.RECIPES.items()}
    cells = {stage: " + ".join(f"{recipe.steps:,}" for recipe in recipes) for stage, recipes in steps.items()}
    cells["dit"] = f"{dit.cycles} × {dit.steps:,}"
    rows = re.findall(r"^\| `make (\w+)` \| [^|]* \| ([^|]*) \| [^|]* \|$", README, re.MULTILINE)
    assert dict(rows) == cells


def test_what_is_said_of_nano_is_what_the_judge_found():
    def judged(name: str) -> dict:
        return json.loads((ROOT / "docs" / "judge" / f"judge_{name}.json").read_text())

    def rates(name: str) -> dict[str, float]:
        return {key: 100 * summary["answers"]["all"]["rate"] for key, summary in judged(name)["sets"].items()}

    text, nano, few = " ".join(README.split()), rates("nano"), "seen, English"
    wanted = {"seen, English": 95, "seen, Russian": 93, "held out, English": 85, "held out, Russian": 85}
    assert all(nano[key] >= least for key, least in (wanted | {"two objects": 75}).items())
    for name, less in (("nano-nocfg", 2), ("nano-distilled16steps", 3)):
        assert all(rates(name)[key] >= nano[key] - less for key in (*wanted, "two objects")), name
    assert "at most 2 less than nano, of `nano-distilled16steps` 3: reached." in text

    failed = [
        [key for key, right in mistake["answers"].items() if not right and key != "all"]
        for name, mistakes in judged("nano")["mistakes"].items()
        for mistake in mistakes
        if name not in ("VAE", "ground truth") and not mistake["answers"]["all"]
    ]
    many, shape = (sum(key in wrong for wrong in failed) for key in ("objects", "shape"))
    asked = sum(judged("nano")["sets"][name]["clips"] for name in [*wanted, "two objects", "image to video"])
    assert (
        f"Of the {len(failed)} of nano's {asked:,} clips that fail, {many} show an object too many or too few" in text
    )
    assert f"{failed.count(['objects'])} of them nothing else wrong, and {shape} another shape" in text

    two = judged("nano")["sets"]["two objects"]["answers"]
    share = {key: round(100 * answer["rate"]) for key, answer in two.items()}
    low, *_, high = sorted(share[key] for key in ("colour", "shape", "motion"))
    assert f"colour, shape and motion of both are right in {low} to {high} %" in text
    assert f"where the one stands to the other in {share['relation']} %" in text
    image = judged("nano")["sets"]["image to video"]["answers"]["motion and first frame"]["rate"]
    assert image >= 0.95 and f"the motion and the first frame are right in {100 * image:.0f} %" in text

    drawn, vae = judged("nano")["sets"]["ground truth"], judged("nano")["sets"]["VAE"]
    assert drawn["answers"]["all"]["rate"] == 1 and vae["answers"]["all"]["rate"] >= 0.97 and vae["psnr"] >= 30
    seen = f"all of the drawn clips and on {100 * vae['answers']['all']['rate']:.1f} % of what the VAE makes of them"
    assert f"{seen} ({vae['psnr']:.0f} dB)" in text

    sparse, full = "nano-10s", "nano-10s-full-attention"
    wrong = {name: {mistake["index"] for mistake in judged(name)["mistakes"][few]} for name in (sparse, full)}
    only = len(wrong[full] - wrong[sparse]), len(wrong[sparse] - wrong[full])
    assert f"has {rates(sparse)[few]:.1f} with NABLA and {rates(full)[few]:.1f} with full attention" in text
    assert f"{only[0]} are right only with NABLA, {only[1]} only without): at most 2 points less were" in text
    assert rates(sparse)[few] >= rates(full)[few] - 2
    asked = judged(sparse)["sets"][few]["clips"]
    assert f"give or take {196 * sum(only) ** 0.5 / asked:.1f} points (95 %)" in text  # of the clips that differ


def test_what_is_said_of_nano_from_nothing_is_what_the_judge_found():
    text = " ".join(README.split())

    def examined(name: str) -> tuple[dict[str, float], dict[str, list[dict]]]:
        """Of each set per cent all right, and the clips that are not."""
        document = json.loads((ROOT / "docs" / "judge" / f"from_nothing_{name}.json").read_text())
        rates = {key: 100 * summary["answers"]["all"]["rate"] for key, summary in document["sets"].items()}
        mistakes = document["mistakes"].items()
        return rates, {key: [clip for clip in clips if not clip["answers"]["all"]] for key, clips in mistakes}

    def halos(clips: list[dict]) -> int:
        return sum(8 < clip["unexplained"] < 100 and clip["objects"] == 1 for clip in clips)

    rate, failed = examined("12000_steps")
    one = failed["seen, English"] + failed["held out, English"]
    seen, held_out, two = (f"{rate[key]:.0f}" for key in ("seen, English", "held out, English", "two objects"))
    assert f"{seen} % right with one object, {held_out} held out, {two} with two objects" in text
    only_that_one = "show only that one, and 9 to 99 pixels too many"
    assert f"of the {len(one)} with one object that fail, {halos(one)} {only_that_one}" in text

    rate, failed = examined("18000_steps_nano")
    one = failed["seen, English"] + failed["seen, Russian"]
    assert (
        f"{rate['seen, English']:.1f} % right with one object, in Russian {rate['seen, Russian']:.1f}, held out "
        f"{rate['held out, English']:.1f} and {rate['held out, Russian']:.1f}, with two objects "
        f"{rate['two objects']:.1f}" in text
    )
    assert f"of the {len(one)} clips that fail there, {halos(one)} show only that one object, and 9 to 99" in text
    before, after = (
        json.loads((ROOT / "docs" / "judge" / f"distilled_after_{steps}_steps.json").read_text())["sets"]["two objects"]
        for steps in (500, 1000)
    )
    rates = [100 * result["answers"]["all"]["rate"] for result in (before, after)]
    assert f"had {rates[0]:.1f} % right with two objects and not {rates[1]:.1f} (of {before['clips']} other" in text
    fewer = [examined(f"18000_steps_{name}")[0]["two objects"] for name in ("nano-nocfg", "nano-distilled16steps")]
    assert (
        f"`nano-nocfg` has {fewer[0]:.1f} with two objects and `nano-distilled16steps` {fewer[1]:.1f}, where at most "
        f"2 and 3 less than {rate['two objects']:.1f}" in text
    )


def test_the_table_of_speed_shows_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text()).values()
    table = README.split("| work | theirs / ours | wanted |\n|---|---|---|\n")[1].split("\n\n")[0].split("\n")
    lines = {}
    for row in measured:
        missed = "" if row["wanted"] is None or row["ratio"] >= row["wanted"] else ", **missed**"
        wanted = "–" if row["wanted"] is None else f"{row['wanted']:.3g}{missed}"
        lines[row["work"]] = f"| {row['work']} | {row['ratio']:.2f} | {wanted} |"
    assert set(table) <= set(lines.values())
    assert {lines[row["work"]] for row in measured if row["wanted"] is not None} <= set(table), "a target is left out"


def test_tokens_and_decoding_of_what_a_video_costs_are_computed_from_the_presets():
    rows = re.findall(
        r"^\| (`.2v-[^|]*) \| ([\d,]+) \| .* \| (same|[\d.]+ GB, [\d.]+ in tiles) \|$", README, re.MULTILINE
    )
    named, said = [], ""
    for names, tokens, decoding in rows:
        said = said if decoding == "same" else decoding  # as in the row above
        for name in re.findall(r"`([^`]+)`", names):
            named.append(name)
            config, sampling = PRESETS[name], PRESETS[name].sampling
            time, space = config.vae.time_factor, config.vae.space_factor
            size = (1 + sampling.num_frames // time, sampling.height // space, sampling.width // space)
            assert int(tokens.replace(",", "")) == math.prod(size) // math.prod(config.dit.patch_size), name
            tilings = (config.tiling, replace(config.tiling, space=True))
            whole, tiled = (vae_memory(config.vae, size, torch.bfloat16, tiling) / 1e9 for tiling in tilings)
            assert said == f"{whole:.1f} GB, {tiled:.1f} in tiles", name
    assert sorted(named) == sorted(PRESETS)


def test_what_the_weights_need_is_computed_from_the_models():
    (pro, pro_two, pro_wide), (lite, lite_two, lite_wide) = map(memory, ("t2v-pro-sft-5s-sd", "t2v-lite-sft-5s"))
    others = ", ".join(f"{title} {pro[title.lower()]:.1f}" for title in ("Qwen", "VAE", "CLIP"))
    streamed = f"of Qwen and of CLIP; the DiT {pro_two['dit']:.1f} (Lite {lite_two['dit']:.1f})"
    for row in (
        f"| all there | {sum(pro.values()):.1f} GB | {sum(lite.values()):.1f} GB "
        f"| DiT {pro['dit']:.1f} (Lite {lite['dit']:.1f}), {others} |",
        f"| `--offload model` | {largest(pro):.1f} GB | {largest(lite):.1f} GB | Pro: the DiT; Lite: Qwen and CLIP |",
        f"| `--offload blocks` | {largest(pro_two):.1f} GB | {largest(lite_two):.1f} GB "
        f"| embedding and two blocks {streamed} |",
        f"widen them for the moment in which they work (Pro {pro_wide:.2f} GB, Lite {lite_wide:.2f})",
    ):
        assert row in README, row


def memory(preset: str) -> tuple[dict[str, float], dict[str, float], float]:
    """GB in bf16 of each model; of each with two blocks; of the DiT's largest `Float32Linear` in float32."""
    config = PRESETS[preset]
    with torch.device("meta"):
        models = {"dit": DiT(config.dit), "qwen": Qwen(config.qwen), "clip": CLIPText(config.clip)}
        models["vae"] = VAE(config.vae)
    whole = {name: model.state_dict() for name, model in models.items()}
    rest = re.compile(r"text_blocks|(visual_)?blocks\.([2-9]|\d\d)")
    two = {
        name: {key: x for key, x in state.items() if not rest.match(key)}
        for name, state in whole.items()
        if name != "vae"  # is never streamed
    }
    wide = max(gigabytes(m.state_dict()) for m in models["dit"].modules() if isinstance(m, Float32Linear))
    return (
        {name: gigabytes(state) / 2 for name, state in whole.items()},
        {name: gigabytes(state) / 2 for name, state in two.items()},
        wide,
    )


def gigabytes(state: dict[str, torch.Tensor]) -> float:
    return sum(x.nbytes for x in state.values()) / 1e9


def largest(models: dict[str, float]) -> float:
    """What is on the device at once: Qwen and CLIP while they read the prompt, later the DiT."""
    return max(models["dit"], models["qwen"] + models["clip"])


def test_each_preset_has_its_download_and_the_converter_line_after_it():
    lines = []
    for name in PRESETS:
        folder = name.removesuffix("-sd").removesuffix("-hd")
        download = (
            f"hf download kandinskylab/Kandinsky-5.0-{released_id(folder)}-Diffusers --local-dir downloads/{folder}"
        )
        lines += [download] * (download not in lines)
        lines.append(f"python -m weights_convert from-diffusers downloads/{folder} weights/{name} --preset {name}")
    assert "```bash\n" + "\n".join(lines) + "\n```" in README


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    titles = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]  # as GitHub does
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 20
    assert [link for link in local if not ((ROOT / link).exists() if link[0] != "#" else link[1:] in titles)] == []


def test_each_file_has_its_row_in_the_reading_order():
    rows = re.findall(r"^\| \[`([\w/]+\.py)`\]\(\1\) \| [A-Z][^|]+\. \|$", README, re.MULTILINE)
    files = [path for package in ("kandinsky5", "weights_convert") for path in (ROOT / package).rglob("*.py")]
    names = {
        str(path.relative_to(ROOT)) for path in files if path.read_text().count("\n") > 10
    }  # not those that only name
    assert len(rows) == len(set(rows)) and set(rows) == names | {"sample.py"}


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """What stands in for a download: nano in the Diffusers layout."""
    folder = tmp_path_factory.mktemp("downloads") / "nano"
    to_diffusers(SHIPPED / "nano", folder, progress=False)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, download) -> Callable[[str], None]:
    """Runs commands, in a working folder that is empty but for docs/; presets have nano's sizes and take two steps."""
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(ROOT / "docs")
    for name, preset in PRESETS.items():
        like = presets.LONG if preset.dit.nabla else presets.NANO
        small = replace(like, name=name, sampling=replace(like.sampling, num_inference_steps=2, num_frames=5))
        monkeypatch.setitem(PRESETS, name, small)
    return partial(run_command, download=download)


def run_command(command: str, download: Path) -> None:
    """Run one command of the README; an AssertionError if it fails."""
    words = fill_in(shlex.split(command, comments=True))
    provide(words, download)
    match words:
        case ["python", "sample.py", *options]:
            steps = [] if {"--help", "--replay"} & {*options} else ["--steps", "2"]
            assert exit_code(sample.main, [*options, *steps]) == 0
        case ["python", "-m", "weights_convert", *options]:
            assert exit_code(weights_convert.__main__.main, options) == 0
        case ["python", "-m", "kandinsky5.extras.magcache", *options]:
            assert exit_code(magcache.main, options) == 0
        case ["python", "-m", "kandinsky5.nano.judge", *options]:
            judge.main([*options, "--prompts", "1", "--steps", "1", "--sets", next(iter(judge.EXAM))])
        case ["python", "-m", "kandinsky5.nano.train_dit" | "kandinsky5.nano.export" as module, *options]:
            parse(module, options)  # they run in test_make_nano.py
        case ["make", *targets]:
            check_make(targets)
        case ["hf", "download", name, "--local-dir", place]:
            assert name == f"kandinskylab/Kandinsky-5.0-{released_id(Path(place).name)}-Diffusers"
            provide([place], download)
        case _:
            assert any(command.startswith(start) for start in NOT_RUN), f"nothing here runs {command!r}"
            check_names(words)


def fill_in(words: list[str]) -> list[str]:
    """The words in capitals of the section Converting, replaced by files that are there, or a folder that is not."""
    source = "downloads/t2v-lite-sft-5s"
    parts = {"--vae": f"{source}/vae", "--qwen": f"{source}/qwen", "--clip": f"{source}/clip"}
    values = {"SRC": source, "FILE": f"{source}/transformer/diffusion_pytorch_model.safetensors"}
    values |= {"NATIVE": "weights/t2v-lite-sft-5s", "NAME": "t2v-lite-sft-5s"}
    values["DST"] = next(name for name in map("new{}".format, itertools.count()) if not Path(name).exists())
    return [
        parts.get(before, source) if word == "PATH" else values.get(word, word)
        for before, word in zip(["", *words], words, strict=False)
    ]


def provide(words: list[str], download: Path) -> None:
    """Make what a reader has by now: downloads, what the converter made of them, prompts, a video."""
    for word in words:
        folder, _, name = "/".join(Path(word).parts[:2]).partition("/")
        place = Path(folder, name)
        if place.exists():
            continue
        if folder == "downloads":
            shutil.copytree(download, place)
            for name, number in (("qwen", ""), ("clip", "_2")):  # also as their makers publish them
                shutil.copytree(place / f"text_encoder{number}", place / name)
                shutil.copytree(place / f"tokenizer{number}", place / name, dirs_exist_ok=True)
        elif folder == "weights" and "from-diffusers" not in words:
            from_diffusers(download, place, preset=name, progress=False)
        elif word == "prompts.txt":
            place.write_text("a red fox in snow\n")
        elif word == "out.mp4":
            assert sample.main(["a red circle", "--steps", "1", "-o", "out.mp4"]) == 0


def released_id(preset: str) -> str:
    """What stands between "Kandinsky-5.0-" and "-Diffusers" in the name of the preset's download."""
    capitals = {"t2v": "T2V", "i2v": "I2V", "lite": "Lite", "pro": "Pro"}
    words = preset.removesuffix("-sd").removesuffix("-hd").split("-")
    return "-".join(capitals.get(word, word) for word in words)


def exit_code(main, arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # argparse
        return end.code


def check_make(targets: list[str]) -> None:
    """`make` knows how, and the options of the package's commands that it would run are theirs."""
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for target in targets if "=" not in target} <= {*rules}, rules
    if not shutil.which("make"):
        return
    make = ["make", "-n", "PYTHON=python", *targets]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for module, options in re.findall(r"^python -m (kandinsky5\S+) (.+)$", done.stdout, re.MULTILINE):
        parse(module, shlex.split(options))


def parse(module: str, options: list[str]) -> None:
    """Let the module's own parser read the options, and stop there."""

    class Parsed(Exception):
        pass

    def stop(parser, arguments=None, namespace=None):
        parse_args(parser, arguments, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        parse_args = argparse.ArgumentParser.parse_args
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module, *options])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()


def check_names(words: list[str]) -> None:
    """The repository's files and extras that a command names are there."""
    for word in words:
        if ("/" in word or word.endswith((".py", ".txt"))) and not word.startswith((".venv", "downloads/")):
            assert (ROOT / word).exists(), word
    extras = (ROOT / "setup.py").read_text().split("extras_require")[1]
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert f'"{extra}": ' in extras, extra
