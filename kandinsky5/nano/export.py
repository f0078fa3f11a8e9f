"""The trained family as checkpoint folders for `Pipeline.load`, all in bf16, each with its model card.

python -m kandinsky5.nano.export --runs runs --vae runs/vae --text runs/text --to kandinsky5/nano/weights

`nano` is complete. The others hold a DiT and name `nano` as their base for VAE, encoders and tokenizers. The judge's
tables go into the cards if they exist: `judge_NAME.json` in the folder --judged.
"""

import argparse
import contextlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kandinsky5 import cli, screen
from kandinsky5.checkpoint import fill_checkpoint, find_checkpoint, find_part, fingerprint
from kandinsky5.config_file import load_config
from kandinsky5.dit import DiT
from kandinsky5.files import new_folder, write_text
from kandinsky5.nano import presets, world
from kandinsky5.nano.evaluate import DEFAULT_SETS, JUDGE_SEED, format_table
from kandinsky5.nano.stages import is_checkpoint, load_text_encoder, load_vae
from kandinsky5.nano.world import CANVAS
from kandinsky5.training.state import load_average, load_progress, load_recipe

RUNS = {"nano": "dit", "nano-nocfg": "nocfg", "nano-distilled16steps": "distilled", "nano-10s": "sparse"}
START, LONG = "start", "long"  # the runs that dit and sparse continue from


def main() -> None:
    """Write a checkpoint folder for each run that there is."""
    arguments, remarks = _parse()
    for name, run in RUNS.items():
        if (arguments.runs / run / "state.pt").is_file():
            judged = arguments.judged / f"judge_{name}.json" if arguments.judged else None
            if judged and not judged.is_file():
                screen.say(f"there is no {judged}: the card of {name} says that it is not evaluated yet")
            folder = arguments.to / name
            with new_folder(folder, replace=True) as new:  # VAE and tokenizers may come from the old one
                export(name, arguments.runs / run, arguments.vae, arguments.text, new)
                before = stages_before(name, arguments.runs, arguments.vae, arguments.text)
                write_card(name, arguments.runs / run, before, new, judged, remarks.get(name, ""))
            print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*')) / 1e6:.2f} MB")
        elif name == "nano-10s" and (arguments.runs / LONG / "state.pt").is_file():
            screen.say(f"{arguments.runs / LONG} waits for the stage {run}, which makes {name} of it")


def _parse() -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the remark for each model's card."""
    parser = cli.Parser("python -m kandinsky5.nano.export", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of the runs dit, nocfg, distilled and sparse")
    add("--vae", type=Path, required=True, help="folder of the VAE's runs, or a checkpoint such as nano")
    add("--text", type=Path, required=True, help="folder of the text encoders' runs, or a checkpoint")
    add("--judged", type=Path, help="folder of the judge's results for these weights, judge_NAME.json")
    add("--remark", action="append", default=[], metavar="NAME=TEXT", help="for a card")
    add("--to", type=Path, required=True, help="each model becomes a folder of its name in it")
    arguments = parser.parse_args()
    remarks = dict(remark.split("=", 1) for remark in arguments.remark if "=" in remark)
    if len(remarks) < len(arguments.remark) or not remarks.keys() <= RUNS.keys():
        parser.error(f"--remark takes NAME=TEXT, once for each name of {', '.join(RUNS)}")
    if arguments.judged and not any(arguments.judged.glob("judge_*.json")):
        parser.error(f"--judged {arguments.judged} holds no results: judge first (python -m kandinsky5.nano.judge)")
    if not any((arguments.runs / run / "state.pt").is_file() for run in RUNS.values()):
        parser.error(
            f"--runs {arguments.runs} holds none of the runs {', '.join(RUNS.values())}: train one first (make dit)"
        )
    if not ((arguments.runs / RUNS["nano"] / "state.pt").is_file() or (arguments.to / "nano").is_dir()):
        parser.error(f"neither --runs {arguments.runs} nor --to {arguments.to} has nano, which the others build on")
    return arguments, remarks


def export(name: str, run: Path, vae_run: Path, text_run: Path, folder: Path) -> None:
    """Write the averaged weights of `run` into `folder`."""
    config = presets.PRESETS[name]
    models: dict[str, nn.Module] = {"dit": load_average(DiT(config.dit), run)}
    tokenizers = {}
    if name == "nano":
        text_encoder = load_text_encoder(text_run)
        models |= {"vae": load_vae(vae_run), "qwen": text_encoder.qwen, "clip": text_encoder.clip}
        tokenizers = {key: find_tokenizer(text_run, f"{key}_tokenizer") for key in ("qwen", "clip")}
    else:
        config = replace(config, base="../nano")
    for model in models.values():
        for parameter in model.parameters():  # the float32 islands too: they compute in float32 from bf16 weights
            parameter.data = parameter.data.to(torch.bfloat16)
    fill_checkpoint(folder, config, models, tokenizers)


def find_tokenizer(source: Path, name: str) -> Path:
    """The folder of a tokenizer, of a run or of a checkpoint or its base."""
    if is_checkpoint(source):
        folder = find_checkpoint(source)
        source = find_part(folder, name, load_config(folder / "config.json").base)
    return source / name


CARD = """\
# {name}

A small Kandinsky 5.0 Video: the released models' classes, {parameters:.1f} million parameters in the DiT.
{what}

- **Data**: clips drawn by `kandinsky5/nano/world.py`, {sampling.num_frames} frames of \
{sampling.height} × {sampling.width} at {sampling.fps} per second;
  {colours} colours, {shapes} shapes, {motions} motions, {backgrounds} backgrounds, one object or two, captions in
  English and Russian. Of the {triples} triples of colour, shape and motion {held_out} never occur in training
  (`kandinsky5/nano/held_out.json`).
- **Recipe**: {recipe}; seed {seed}.
- **Trained**: {steps:,} steps in {hours:.1f} hours, {before}.{remark}
- **Defaults**: {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}, \
shift {sampling.shift:g}{attention}.
- **Limits**: it knows only this world; prompts outside it fail silently.
- **Licence**: MIT.

## Judged

{judged}"""
JUDGED = """\
Percentages, on scenes that no model was trained on; a caption's text may have occurred in training.
"""
RESULTS = """
```bash
{command}
```

{remark}{table}"""
VARIANTS = {  # of the evaluation, in files of these endings, and a remark for the card
    "full-attention": "",
    "float32": "The other precision, on one thread of a CPU with AVX-512 and AMX:\n\n",
}
WHAT = {
    "nano": "Text and image to video, with guidance: every step runs the network twice.",
    "nano-nocfg": "`nano` with its guidance distilled into one pass per step.",
    "nano-distilled16steps": "`nano-nocfg` distilled into 16 steps of one pass.",
    "nano-10s": "`nano` fine-tuned on clips of twice the length and size, its attention distilled into NABLA.",
}
BEFORE = {
    "nano": "after the VAE and the text encoders",
    "nano-nocfg": "from nano",
    "nano-distilled16steps": "from nano-nocfg",
    "nano-10s": "from nano after a stage on its clips",
}


def stages_before(name: str, runs: Path, vae_run: Path, text_run: Path) -> str:
    """What a model was made from, with steps and hours of the runs that are still there."""
    stages = {}
    if name == "nano":
        stages = {f"VAE, {stage}": vae_run / stage for stage in ("frames", "clips", "decoder")}
        stages |= {"Qwen": text_run / "qwen", "CLIP": text_run / "clip", "a first run of the DiT": runs / START}
    if name == "nano-10s":
        stages = {"that stage": runs / LONG}
    done = {stage: load_progress(run) for stage, run in stages.items() if (run / "state.pt").is_file()}
    told = [f"{stage}: {steps:,} steps in {seconds / 3600:.1f} hours" for stage, (steps, seconds) in done.items()]
    if name == "nano":
        parts = {"VAE": vae_run, "text encoders": text_run}
        told += [f"{part} as in {source}" for part, source in parts.items() if is_checkpoint(source)]
        origin = Path(load_recipe(runs / RUNS[name]).origin).name
        told += [f"the DiT started from {origin}"] if origin and not (runs / START / "state.pt").is_file() else []
    return BEFORE[name] + (f" ({'; '.join(told)})" if told else "")


def write_card(name: str, run: Path, before: str, folder: Path, judged: Path | None, remark: str = "") -> None:
    """The model card: data, recipe, steps and hours of `run`, what came `before`, a remark, the judge's table.

    Raises ValueError if that is about other weights than those in `folder`, or incomplete.
    """
    config = presets.PRESETS[name]
    recipe, (steps, seconds) = load_recipe(run), load_progress(run)
    attention = ""
    if config.dit.nabla:
        window = " × ".join(map(str, config.dit.nabla.window))
        attention = f", NABLA with P {config.dit.nabla.P:g} and a window of {window} tiles"
    optimizer = "Muon for the blocks' matrices and AdamW for the rest" if recipe.muon else "AdamW"
    card = CARD.format(
        name=name,
        what=WHAT[name],
        parameters=sum(p.numel() for p in DiT(config.dit).parameters()) / 1e6,
        sampling=config.sampling,
        colours=len(world.COLOURS),
        shapes=len(world.SHAPES),
        motions=len(world.MOTIONS),
        backgrounds=len(world.BACKGROUNDS),
        triples=len(world.ALL_TRIPLES),
        held_out=len(world.HELD_OUT),
        remark=f" {remark}" if remark else "",
        recipe=f"{optimizer}, learning rate {recipe.learning_rate:g} with warm-up and cosine"
        f"{f', {recipe.cycles} times' if recipe.cycles > 1 else ''}, averaged weights",
        seed=recipe.seed,
        steps=steps,
        hours=seconds / 3600,
        before=before,
        attention=attention,
        judged=describe_evaluation(name, judged, folder) if judged and judged.is_file() else "Not yet.\n",
    )
    write_text(folder / "README.md", card)


def describe_evaluation(name: str, judged: Path, folder: Path) -> str:
    """The judge's results in the file `judged`, and in those of VARIANTS next to it.

    Raises ValueError if they are about other weights or another canvas, incomplete, or mixed up.
    """
    text = JUDGED + describe_results(name, judged, folder)
    for variant in VARIANTS:
        other = judged.with_name(f"{judged.stem}-{variant}.json")
        text += describe_results(name, other, folder, variant) if other.is_file() else ""
    return text


def describe_results(name: str, judged: Path, folder: Path, variant: str = "") -> str:
    """One file of results as a table, below the command that reproduces it.

    Raises ValueError as `describe_evaluation` does.
    """
    document = None
    with contextlib.suppress(json.JSONDecodeError):
        document = json.loads(judged.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not document.keys() >= {"settings", "sets"}:
        raise ValueError(f"{judged} holds no results of the judge: remove it, or judge {name} again")
    settings, full_attention = document["settings"], variant == "full-attention"
    if document.get("fingerprint") != fingerprint(folder):
        raise ValueError(f"{judged} is about another {name}: judge these weights, python -m kandinsky5.nano.judge")
    if settings["full_attention"] != full_attention or tuple(settings["canvas"]) != CANVAS:
        how = "with" if full_attention else "without"
        raise ValueError(f"{judged}: judge {name} {how} --full-attention, and without --canvas")
    if variant == "float32" and settings["dtype"] != "float32":
        raise ValueError(f"{judged}: judge {name} with --dtype float32")
    if set(document["sets"]) != set(settings["sets"]):
        raise ValueError(f"{judged} ends after {', '.join(document['sets'])}: judge {name} again")
    command = shlex.join(_command(name, settings))
    return RESULTS.format(command=command, remark=VARIANTS.get(variant, ""), table=format_table(document["sets"]))


def _command(name: str, settings: dict) -> list[str]:
    """The judge's command with these settings."""
    command = ["python", "-m", "kandinsky5.nano.judge", name]
    command += ["--prompts", str(settings["prompts"]), "--dtype", settings["dtype"]]
    for option, setting, default in (
        ("--batch-size", "batch_size", 8),
        ("--steps", "num_inference_steps", None),
        ("--guidance", "guidance_scale", None),
        ("--seed", "seed", JUDGE_SEED),
    ):
        if settings[setting] != default:
            command += [option, str(settings[setting])]
    if settings["full_attention"]:
        command.append("--full-attention")
    if settings["sets"] != list(DEFAULT_SETS):
        command += ["--sets", *settings["sets"]]
    return command


if __name__ == "__main__":
    sys.exit(cli.run(main, "what was written is complete, the rest is as before"))
