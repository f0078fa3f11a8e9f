"""The house keeps its rules: definitions hold equations only, rooms stay small, imports run one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kandinsky5"
DEFINITIONS = (
    "dit",
    "attention",
    "vae",
    "vae2d",
    "vae_tiling",
    "nabla",
    "rope",
    "qwen",
    "qwen_vision",
    "clip",
    "sampler",
    "text_encoder",
)
COMMANDS = ("__init__", "__main__", "cli", "sample_command")
STORY = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in COMMANDS)
# What depends on where and how the model runs, and not on what it computes.
RUNTIME_WORDS = (
    r"device\.type|\.device [=!]=|is_cuda|is_cpu|is_meta|dtype [=!]=|dtype (?:not )?in\b|is_grad_enabled|no_grad|"
    r"inference_mode|autocast|is_compiling|lru_cache|\binto="
)
EXCEPTIONS = {
    "dit": ["dtype in"],  # a Float32Linear stays in float32 when its model is cast to half precision
    "sampler": ["is_meta"] * 3,  # on the meta device there are no values to find NaN among
}

# For each place the rooms of the package that it may import; a folder stands for what is in it.
LEAVES = {"config", "config_file", "files", "tensor_files", "screen", "image_io", "video_io", "runtime.device"}
MODELS = {*DEFINITIONS, "attention", "tokenizer", "checkpoint", *LEAVES}
MAY_IMPORT = {
    **{name: set() for name in ("config", "screen")},
    "files": {"screen"},
    **{name: {"files", "screen"} for name in ("tensor_files", "tokenizer", "image_io")},
    "video_io": {"files", "screen", "image_io"},
    "config_file": {"config", "files", "screen"},
    "checkpoint": {"config", "config_file", "files", "screen", "tensor_files", "tokenizer"},
    **{name: {"attention", "nabla", "rope", "config"} for name in ("dit", "qwen", "clip", "rope", "nabla", "sampler")},
    "attention": {"nabla", "config"},
    "vae": {"config"},
    "vae2d": {"vae", "config"},
    "vae_tiling": {"vae", "vae2d", "config"},
    "qwen_vision": {"attention", "qwen", "rope", "config"},
    "text_encoder": {"clip", "qwen", "qwen_vision", "tokenizer", "config"},
    # Step skipping and LoRA are extras, which are imported only where they are asked for.
    "request": {
        "config",
        "screen",
        "rope",
        "sampler",
        "text_encoder",
        "image_io",
        "video_io",
        "runtime.device",
        "extras.magcache",
    },
    "pipeline": {*MODELS, "request", "runtime", "extras.expand", "extras.magcache", "extras.lora"},
    "cli": {"screen"},
    "sample_command": {
        "cli",
        "checkpoint",
        "config",
        "config_file",
        "files",
        "screen",
        "request",
        "pipeline",
        "video_io",
        "runtime.device",
        "runtime.ending",
        "runtime.launch",
        "runtime.parallel",
        "extras",
    },
    "runtime": {*MODELS, "runtime"},
    # LoRAs under other people's names; the words that nano knows
    "extras": {*MODELS, "runtime", "extras", "request", "weights_convert", "nano.captions"},
    "training": {*MODELS, "runtime", "training", "request", "extras.lora"},
    "nano": {*MODELS, "runtime", "training", "nano", "pipeline", "cli"},  # it samples and judges what it trains
    "weights_convert": {*MODELS, "runtime", "weights_convert", "cli", "extras.lora"},
}
SHORT = {"Pipeline": "pipeline", "PRESETS": "config"}  # what kandinsky5/__init__.py passes on
ENTRIES = ("__main__.py", "finetune.py", "job.py")  # commands, which may ask the pipeline for a video


def code(path: Path) -> str:
    """The source without comments and docstrings."""
    return re.sub(r'"""(?:.|\n)*?"""|#.*', "", path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """The rooms of this project that a file imports: "dit", "runtime.fast", "weights_convert"."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for block in [b for b in ast.walk(tree) if isinstance(b, ast.If) and ast.unparse(b.test) == "TYPE_CHECKING"]:
        block.body = []  # annotations depend on nothing
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = PACKAGE / node.module.removeprefix("kandinsky5").strip(".").replace(".", "/")
            for name in (SHORT.get(alias.name, alias.name) for alias in node.names if alias.name != "__version__"):
                is_room = (inside / name).is_dir() or (inside / f"{name}.py").is_file()
                found.add(f"{node.module}.{name}" if is_room else node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    ours = {name for name in found if name.split(".")[0] in ("kandinsky5", "weights_convert")}
    return {"weights_convert" if name.startswith("w") else name.removeprefix("kandinsky5.") for name in ours}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_do_not_ask_how_they_run(name):
    assert re.findall(RUNTIME_WORDS, code(PACKAGE / f"{name}.py")) == EXCEPTIONS.get(name, [])


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_run_one_way(place):
    if place == "weights_convert":
        files = sorted((ROOT / place).glob("*.py"))
    else:
        files = sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / f"{place}.py"]
    for path in files:
        if path.name in ENTRIES:
            continue
        allowed = MAY_IMPORT[place]
        wrong = {room for room in imports(path) if room not in allowed and room.split(".")[0] not in allowed}
        assert wrong == set(), path


def test_only_the_parity_suite_imports_the_references():
    """What runs at import is checked in a process of its own, in test_replay.py."""
    places = [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "weights_convert").glob("*.py")]
    for path in [*places, *(ROOT / "tests").glob("*.py")]:
        assert not re.search(r"^\s*(?:import|from) (?:diffusers|transformers|peft)\b", code(path), re.MULTILINE), path


def test_rooms_of_the_story_are_short():
    for name in STORY:
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        assert text.count("\n") <= 350, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{name}.{node.name}"
    assert (ROOT / "sample.py").read_text(encoding="utf-8").count("\n") <= 100
