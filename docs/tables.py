"""Write the tables of README.md and docs/*.md from results files, the presets and the models' own sizes.

    python docs/tables.py            # rewrite every table that stands between markers
    python docs/tables.py --check    # change nothing; exit status 1 where a table differs (CI)

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function of TABLES, at the end of this file.
Results: docs/judge/*.json (the judge of nano), benchmarks/results/* (speed and memory).
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling import volume as exchanged

from kandinsky5.config import PRESETS, PipelineConfig
from kandinsky5.extras import lora, magcache
from kandinsky5.nano import captions, distill, train_dit, train_text, train_vae, world
from kandinsky5.nano.presets import PRESETS as NANO_PRESETS
from kandinsky5.runtime import budget
from kandinsky5.runtime.memory import dit_memory
from kandinsky5.runtime.parallel import choose_ranks
from kandinsky5.runtime.pieces import PIECE
from kandinsky5.training import report
from kandinsky5.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
JUDGE, RESULTS = ROOT / "docs" / "judge", ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the tables, or with --check compare them; returns the number of files that differ, 1 at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table differs")
    check, stale = parser.parse_args(arguments).check, []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = MARKED.sub(lambda match: match[1] + "\n".join(TABLES[match[2]]()) + "\n" + match[3], text)
        if new != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8", newline="\n")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale; run python docs/tables.py' if check else 'rewritten'}")
    return int(check and bool(stale))


def table(*rows: tuple) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


# ---------------------------------------------------------------------------------------------- released models


def presets() -> list[str]:
    """The presets, and where on Hugging Face their weights are."""
    head = ("preset", "download: kandinskylab/…", "steps", "guidance", "shift", "H×W", "frames", "RoPE", "attention")
    rows = [(*head, "shift from")]
    for name, preset in PRESETS.items():
        s = preset.sampling
        attention = f"NABLA {preset.dit.nabla.P:g}" if preset.dit.nabla else "full"
        sampler = (s.num_inference_steps, f"{s.guidance_scale:g}", f"{s.shift:g}")
        size = (f"{s.height}×{s.width}", s.num_frames, f"{s.rope_scale[1]:g}")
        rows.append((f"`{name}`", f"`{download(name)}`", *sampler, *size, attention, shift_source(name)))
    return table(*rows)


def shift_source(preset: str) -> str:
    """Which source of the shift a preset follows, and which say otherwise (docs/converting.md)."""
    if preset.endswith("10s") or "-10s-" in preset or preset == "i2v-lite-5s":
        return "guide; command line 5"
    if PRESETS[preset].makes_images:
        return "authors' pipeline; scheduler 5"
    if "pro-sft" in preset:
        return "scheduler, command line"
    return "as sft" if "pro" in preset else "command line, guide"


def download(preset: str) -> str:
    """The last part of the Hugging Face name of a preset's weights; an -sd and an -hd preset share them."""
    capitals = {"t2v": "T2V", "i2v": "I2V", "t2i": "T2I", "i2i": "I2I", "lite": "Lite", "pro": "Pro"}
    words = preset.removesuffix("-sd").removesuffix("-hd").split("-")
    return "-".join(["Kandinsky-5.0", *(capitals.get(word, word) for word in words), "Diffusers"])


CARDS = (8, 12, 16, 24, 48, 80)
COLUMNS = {  # of the table by card
    "t2v-lite-sft-5s": "Lite 5 s",
    "t2v-lite-sft-10s": "Lite 10 s",
    "t2v-pro-sft-5s-sd": "Pro 5 s SD",
    "t2v-pro-sft-10s-sd": "Pro 10 s SD",
    "t2v-pro-sft-5s-hd": "Pro 5 s HD",
    "t2v-pro-sft-10s-hd": "Pro 10 s HD",
}
NAMES = {None: "all", "model": "model", "blocks": "blocks"}  # of --offload in a cell of that table


def cards(quantize: str | None = None, columns: dict[str, str] = COLUMNS) -> list[str]:
    """For each card and model the first of `budget.choices` that fits, with its peak."""
    rows: list[tuple] = [("card", *columns.values())]
    for card in CARDS:
        cells = []
        for name in columns:
            config, some = PRESETS[name], budget.choices(quantize=quantize)
            found = budget.first_that_fits(config, card * 10**9, some)
            how = found and NAMES[found.offload] + ", tiles" * found.tile_space
            cells.append(f"{how}: {budget.peak(config, found) / 1e9:.0f} GB" if found else "–")
        rows.append((f"{card} GB", *cells))
    return table(*rows)


TRAINED_ON = ((512, 768, 121), (512, 768, 73), (256, 384, 73), (256, 384, 25))  # height, width, frames; largest first
WAYS: dict[str, dict] = {  # of fine-tuning, the fastest first
    "LoRA": {},
    "int8": {"quantize": "int8"},
    "blocks streamed": {"offload": "blocks"},
    "int8, blocks streamed": {"quantize": "int8", "offload": "blocks"},
    "full": {"full": True},
}


def finetune_bytes(name: str, clip: tuple[int, int, int], way: str) -> float:
    """What fine-tuning a preset on one clip at a time needs, in bf16, at rank 32, with gradient checkpointing."""
    usual = {
        "full": False,
        "quantize": None,
        "offload": None,
        "modules": lora.MODULES,
        "rank": 32,
        "checkpointing": True,
    }
    config, (height, width, frames) = PRESETS[name], clip
    recipe = Recipe(1, dtype="bfloat16", ema=0)
    return report.memory(
        config.dit, report.tokens_of(config, frames, height, width), recipe, argparse.Namespace(**usual | WAYS[way])
    )


def finetune_memory() -> list[str]:
    """What fine-tuning needs, in GB, by model, clip and way."""
    rows: list[tuple] = [("model, clip", *WAYS)]
    for name, label in (("t2v-lite-sft-5s", "Lite"), ("t2v-pro-sft-5s-sd", "Pro")):
        for height, width, frames in TRAINED_ON:
            needed = (finetune_bytes(name, (height, width, frames), way) / 1e9 for way in WAYS)
            rows.append((f"{label}, {height}×{width}, {frames} frames", *(f"{gigabytes:.0f}" for gigabytes in needed)))
    return table(*rows)


def finetune_cards() -> list[str]:
    """The largest of those clips that a LoRA trains on with each card, by the first way that fits."""
    rows: list[tuple] = [("card", "Lite", "Pro")]
    for card in (12, 16, 24, 48, 80):
        cells = []
        for name in ("t2v-lite-sft-5s", "t2v-pro-sft-5s-sd"):
            needs = ((clip, way, finetune_bytes(name, clip, way)) for clip in TRAINED_ON for way in list(WAYS)[:-1])
            fits = ((*found[0], found[1]) for found in needs if found[2] + budget.CONTEXT <= card * 10**9)
            height, width, frames, way = next(fits)
            cells.append(f"{height}×{width}, {frames} frames: {way}")
        rows.append((f"{card} GB", *cells))
    return table(*rows)


def tokens(config: PipelineConfig) -> int:
    """Video tokens of the DiT."""
    return math.prod(budget.latent_grid(config)) // math.prod(config.dit.patch_size)


def computed(config: PipelineConfig) -> tuple[float, ...]:
    """GB in bf16, weights apart, as `kandinsky5 memory` prints them: of a DiT forward, at once and in pieces, and of
    decoding, whole and in tiles."""
    plain, tiled = budget.Choice(), budget.Choice(tile_space=True)
    _, sampling, decoding = budget.moments(config, plain)
    in_tiles = budget.moments(config, tiled)[2]
    sizes = (budget.all_at_once(config, plain), sampling.computed, decoding.computed, in_tiles.computed)
    return tuple(size / 1e9 for size in sizes)


def weights() -> list[str]:
    """What the weights need on the GPU, for each precision and mode of offloading."""
    rows: list[tuple] = [("weights", "Lite", "Pro", "largest in Lite", "largest in Pro")]
    for quantize in (None, "int8"):
        lite, pro = (
            budget.weigh(PRESETS[name], quantize, torch.bfloat16) for name in ("t2v-lite-sft-5s", "t2v-pro-sft-5s-sd")
        )
        label = "int8" if quantize else "bf16"
        totals = (f"{sum(size.whole for size in models.values()) / 1e9:.1f} GB" for models in (lite, pro))
        rows.append((f"{label}, all resident", *totals, parts(lite), parts(pro)))
        for mode in ("model", "blocks"):
            cells, largest = [], []
            for models in (lite, pro):
                size = {name: one.streamed if mode == "blocks" else one.whole for name, one in models.items()}
                groups = {"DiT": size["dit"], "Qwen + CLIP": size["qwen"] + size["clip"], "VAE": size["vae"]}
                largest.append(max(groups, key=groups.__getitem__))
                cells.append(f"{groups[largest[-1]] / 1e9:.1f} GB")
            rows.append((f"{label}, `--offload {mode}`", *cells, *largest))
    return table(*rows)


def parts(models: dict[str, budget.Size]) -> str:
    names = {"dit": "DiT", "qwen": "Qwen", "vae": "VAE", "clip": "CLIP"}
    return ", ".join(f"{names[name]} {models[name].whole / 1e9:.1f}" for name in names)


def costs() -> list[str]:
    """What a video of each preset costs; presets that cost the same share a row."""
    rows: dict[tuple, list[str]] = {}
    for name, config in PRESETS.items():
        flop, share = operations(config)
        cells = (f"{tokens(config):,}", f"{flop / 1e15:,.0f}", f"{100 * share:.0f} %", f"{flop / 400e12 / 60:.1f}")
        memory = (f"{gb:.1f} GB" for gb in computed(config))
        rows.setdefault((*cells, *memory), []).append(f"`{name}`")
    head = ("preset", "tokens", "DiT, PFLOP", "self-attention", "minutes at 400 TFLOP/s")
    head += ("DiT activations", "in pieces", "decoding", "with `--tile-space`")
    return table(head, *((", ".join(names), *cells) for cells, names in rows.items()))


def operations(config: PipelineConfig) -> tuple[float, float]:
    """Floating-point operations of all DiT passes with full attention, and self-attention's share of them."""
    dit, L, S = config.dit, tokens(config), 256
    attention = 4 * L * L * dit.dim
    linear = 12 * L * dit.dim**2 + 4 * S * dit.dim**2 + 4 * L * dit.dim * dit.ff_dim
    block = attention + linear + 4 * L * S * dit.dim
    passes = config.sampling.num_inference_steps * (1 if config.sampling.guidance_scale == 1 else 2)
    return passes * dit.num_visual_blocks * block, attention / block


SEVERAL = ("t2v-lite-sft-5s", "t2v-pro-sft-5s-sd", "t2v-pro-sft-5s-hd", "t2v-pro-sft-10s-hd")
RATE, NVLINK, PCIE = 400e12, 300e9, 25e9  # operations and bytes per second and GPU: assumptions


def several() -> list[str]:
    """What more GPUs do for a step, and for the memory of each."""
    rows: list[tuple] = [("model", "GPUs", "ranks", "step", "by NVLink", "by PCIe", "sent", "memory", "with `--shard`")]
    for name in SEVERAL:
        config = PRESETS[name]
        flop = operations(config)[0] / config.sampling.num_inference_steps
        for gpus in (1, 2, 4, 8):
            guidance, sequence = choose_ranks(gpus, config.dit.num_heads, guided=True)
            sent = 2 // guidance * exchanged(config.dit, tokens(config), sequence)
            times = [flop / RATE / gpus + sent / bandwidth for bandwidth in (NVLINK, PCIE)]
            rows.append((
                COLUMNS[name] if gpus == 1 else "", gpus, f"{guidance}x{sequence}", f"{times[0]:.1f} s",
                *(f"{flop / RATE / time:.1f}×" for time in times), f"{sent / 1e9:.1f} GB",
                *(f"{size / 1e9:.0f} GB" for size in memory_of_rank(config, sequence, gpus)),
            ))  # fmt: skip
    return table(*rows)


def memory_of_rank(config: PipelineConfig, sequence: int, gpus: int) -> tuple[int, int]:
    """Bytes of a GPU in a step or in decoding, whichever needs more; and with shares of DiT and Qwen."""
    sizes, grid = budget.weigh(config, None, torch.bfloat16), budget.latent_grid(config)
    step = dit_memory(config.dit, (1, *grid), torch.bfloat16, PIECE, sequence)
    decoding = budget.moments(config, budget.Choice(tile_space=True))[2].computed
    whole = sum(size.whole for size in sizes.values())
    spread = sum(sizes[name].whole for name in ("dit", "qwen"))
    rest = whole - spread + spread // gpus
    gathered = sizes["dit"].streamed if gpus > 1 else 0  # two of its blocks are whole while they run
    return whole + max(step, decoding), rest + max(step + gathered, decoding)


# ---------------------------------------------------------------------------------------------- nano

SETS = {
    "seen, English": "one object",
    "seen, Russian": "one object, Russian prompt",
    "held out, English": "unseen combination",
    "held out, Russian": "unseen combination, Russian prompt",
    "two objects": "two objects",
}
TARGETS = dict(zip(SETS, (95, 93, 85, 85, 75), strict=True))  # of nano
DISTANCES = {"nano-nocfg": 2, "nano-distilled16steps": 3}  # points that these may be below nano
FAMILIES = {"judge_": "bundled", "from_nothing_18000_steps_": "from scratch"}


def vocabulary() -> list[str]:
    """The English words that nano was trained on."""
    verbs = [verb for forms in captions.ENGLISH_VERB.values() for verb, _ in forms]
    directions = [word for words in captions.ENGLISH_DIRECTION.values() for word in words]
    places = [place for pair in captions.ENGLISH_PLACE.values() for place in pair]
    rows = {
        "colours": world.COLOURS,
        "shapes": world.SHAPES,
        "sizes": [word for words in captions.ENGLISH_SIZE.values() for word in words],
        "verbs": verbs,
        "directions": directions,
        "backgrounds": world.BACKGROUNDS,
        "between two objects": places,
    }
    return table(("", "words"), *((name, ", ".join(words)) for name, words in rows.items()))


def judged(name: str) -> dict:
    return json.loads((JUDGE / f"{name}.json").read_text(encoding="utf-8"))


def percent(result: dict, subset: str, answer: str = "all") -> float | None:
    """How many per cent of a set's clips are right, None where the judge was not run on it."""
    answers = result["sets"].get(subset, {}).get("answers", {})
    return 100 * answers[answer]["rate"] if answer in answers else None


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def nano() -> list[str]:
    """The judge's verdict on the models of the package."""
    names = ["nano", "nano-float32", *(name for name in NANO_PRESETS if name != "nano")]
    results = [judged(f"judge_{name}") for name in names]
    counts = {key: result["sets"][key]["clips"] for result in results for key in result["sets"]}
    rows = [("", *(f"`{name}`" for name in names))]
    rows.append(("precision", *(result["settings"]["dtype"] for result in results)))
    passes = ((r["sampling"]["num_inference_steps"], 2 - (r["sampling"]["guidance_scale"] == 1)) for r in results)
    rows.append(("steps × passes", *(f"{steps} × {count}" for steps, count in passes)))
    for key, label in SETS.items():
        rows.append((f"{label} ({counts[key]} clips)", *(cell(percent(result, key)) for result in results)))
    label = f"image and prompt: motion and first frame ({counts['image to video']} clips)"
    answer = "motion and first frame"
    rows.append((label, *(cell(percent(result, "image to video", answer)) for result in results)))
    return table(*rows)


def nano_frame() -> list[str]:
    """The judge's verdict on nano's single frames."""
    result = judged("judge_nano-one-frame")["sets"]["one frame"]["answers"]
    names = ("objects", "background", "colour", "shape", "size", "all")
    cells = (f"{100 * result[name]['rate']:.1f} of {result[name]['asked']}" for name in names)
    return table(("objects, and nothing else", *names[1:-1], "all of these"), tuple(cells))


def nano_targets() -> list[str]:
    """The targets, and whether the two families meet them."""
    families = {label: {n: judged(file + n) for n in ("nano", *DISTANCES)} for file, label in FAMILIES.items()}
    rows: list[tuple] = [("target", *(f"{label}" for label in families))]
    for key, least in TARGETS.items():
        values = [percent(family["nano"], key) for family in families.values()]
        rows.append((f"`nano`, {SETS[key]}: at least {least} %", *(met(v, v >= least) for v in values)))
    values = [percent(f["nano"], "image to video", "motion and first frame") for f in families.values()]
    rows.append(("`nano`, from an image, motion and first frame: at least 95 %", *(met(v, v >= 95) for v in values)))
    for name, distance in DISTANCES.items():
        below = [max(percent(f["nano"], k) - percent(f[name], k) for k in SETS) for f in families.values()]
        label = f"`{name}`: at most {distance} points below `nano` in any row"
        rows.append((label, *(met(b, b <= distance) for b in below)))
    values = [percent(f["nano"], "VAE") for f in families.values()]
    rows.append(("judge, on the VAE's reconstructions: at least 97 %", *(met(v, v >= 97) for v in values)))
    decibels = [f["nano"]["sets"]["VAE"]["psnr"] for f in families.values()]
    rows.append(("VAE: at least 30 dB PSNR", *(met(d, d >= 30) for d in decibels)))
    sparse, full = (percent(judged(f"judge_nano-10s{kind}"), "seen, English") for kind in ("", "-full-attention"))
    label = "`nano-10s`: at most 2 points below its own full attention"
    rows.append((label, met(full - sparse, full - sparse <= 2), "not judged"))
    return table(*rows)


def met(value: float, yes: bool) -> str:
    return f"{value:.1f}: {'met' if yes else '**not met**'}"


def nano_failures() -> list[str]:
    """What is wrong with the clips of nano that fail, and with which mask nano-10s fails."""
    result = judged("judge_nano")
    sets = [*SETS, "image to video"]
    clips = sum(result["sets"][key]["clips"] for key in sets)
    wrong = [
        {key for key, right in clip["answers"].items() if not right and key != "all"}
        for name in sets
        for clip in result["mistakes"].get(name, [])
        if not clip["answers"]["all"]
    ]
    rows: list[tuple] = [("`nano`, clips", f"{clips:,}"), ("that fail", len(wrong))]
    rows.append(("too many or too few objects, or stray pixels", sum("objects" in keys for keys in wrong)))
    rows.append(("nothing but that", wrong.count({"objects"})))
    rows.append(("another shape", sum("shape" in keys for keys in wrong)))
    sparse, full = (
        {clip["index"] for clip in judged(f"judge_nano-10s{kind}")["mistakes"]["seen, English"]}
        for kind in ("", "-full-attention")
    )
    total = judged("judge_nano-10s")["sets"]["seen, English"]["clips"]
    only = len(full - sparse), len(sparse - full)
    interval = 196 * sum(only) ** 0.5 / total
    rows.append(("`nano-10s`: right with NABLA only, with full attention only", f"{only[0]}, {only[1]} of {total}"))
    rows.append(("95 % interval of the difference, points", f"±{interval:.1f}"))
    return table(("", ""), *rows)


def lesson() -> list[str]:
    """What nano's LoRA for a new word gives and costs, by its weight; without it nano's verdict on the same prompts."""
    base, kinds = judged("judge_nano-float32"), ("bounce", "seen, English")
    rows: list[tuple] = [("weight", "bouncing", *(SETS[kind] for kind in kinds[1:]))]
    names = sorted(path.stem for path in JUDGE.glob("bounce_weight_*.json"))
    results = {name.removeprefix("bounce_weight_"): judged(name)["sets"] for name in names}
    for weight, sets in results.items():
        right = {kind: f"{found['answers']['all']['right']} of {found['clips']}" for kind, found in sets.items()}
        for kind in kinds[1:]:
            if weight == "0" and kind in results["1"]:
                count = results["1"][kind]["clips"]  # nano's own run has 300: of these, the same as with the LoRA
                wrong = sum(clip["index"] < count for clip in base["mistakes"][kind])
                right[kind] = f"{count - wrong} of {count}"
        rows.append((weight, *(right.get(kind, "–") for kind in kinds)))
    return table(*rows)


def from_scratch() -> list[str]:
    """Other runs of `make nano`, judged on the way."""
    files = {
        "from_nothing_12000_steps": "after `make start` (12,000 steps)",
        "from_nothing_18000_steps_nano": "after one cycle of `make dit` (18,000 steps)",
        "from_nothing_18000_steps_nano-nocfg": "…, `nano-nocfg` after 500 steps",
        "from_nothing_18000_steps_nano-distilled16steps": "…, `nano-distilled16steps` after 500 steps",
        "distilled_after_500_steps": "bundled `nano`, distilled in 500 + 500 steps",
        "distilled_after_1000_steps": "bundled `nano`, distilled in 1,000 + 1,000 steps",
    }
    rows: list[tuple] = [("run", "clips per set", *SETS.values())]
    for file, label in files.items():
        result = judged(file)
        clips = next(iter(result["sets"].values()))["clips"]
        rows.append((f"[{label}](judge/{file}.md)", clips, *(cell(percent(result, key)) for key in SETS)))
    return table(*rows)


STAGES = {  # what each trains, minutes on one core; of `make dit` on both
    "vae": ("the VAE: frames, then clips, then the decoder alone", "140"),
    "text": ("tokenizers; Qwen on the next token; CLIP on captions against clips", "50"),
    "start": ("the DiT, from random weights", "277"),
    "dit": ("`nano`: the DiT again, at times nearer the data", "55 + 53"),
    "nocfg": ("`nano-nocfg`, from `nano`", "13"),
    "distilled": ("`nano-distilled16steps`, from `nano-nocfg`", "15"),
    "long": ("`nano` on clips twice as long and as wide, with NABLA", "74"),
    "sparse": ("`nano-10s`: that, to answer through NABLA as with full attention", "62"),
}


def stages() -> list[str]:
    """The stages of `make nano`, with the steps of their recipes."""
    recipes = {
        "vae": (train_vae.FRAMES_RECIPE, train_vae.CLIPS_RECIPE, train_vae.DECODER_RECIPE),
        "text": (train_text.QWEN_RECIPE, train_text.CLIP_RECIPE),
        "start": (train_dit.RECIPE,),
    } | {stage: (recipe,) for stage, recipe in distill.RECIPES.items()}
    steps = {stage: " + ".join(f"{recipe.steps:,}" for recipe in some) for stage, some in recipes.items()}
    steps["dit"] = f"{train_dit.LAST_RECIPE.cycles} × {train_dit.LAST_RECIPE.steps:,}"
    rows = [(f"`make {stage}`", what, steps[stage], minutes) for stage, (what, minutes) in STAGES.items()]
    return table(("stage", "trains", "steps", "minutes"), *rows)


# ---------------------------------------------------------------------------------------------- measurements


def speed() -> list[str]:
    """Every row of benchmarks/compare.py, in the order of its own table."""
    rows: list[tuple] = [
        (
            "work",
            "precision",
            "processor",
            "threads",
            "theirs / ours",
            "spread",
            "share of the matmul rate",
            "target",
            "",
        )
    ]
    order = (RESULTS / "compare.md").read_text(encoding="utf-8")
    measured = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8")).values()
    for row in sorted(measured, key=lambda row: ("AVX2" in row["machine"], order.find(f"| {row['work']} |"))):
        work = re.sub(r", (bf16|float32)\b", "", row["work"])
        precision = row.get("precision") or ("float32" if "float32" in row["work"] else "bf16")
        processor = "AVX2" if "restricted to AVX2" in row["machine"] else "avx512_bf16"
        share = "–" if row.get("share") is None else f"{row['share']:.2f}"
        threads = re.search(r"(\d+) threads", row["machine"])[1]
        target, verdict = ("–", "") if row["target"] is None else (f"{row['target']:.3g}", "met")
        if row["target"] is not None and row["ratio"] < row["target"]:
            verdict = "**not met**"
        spread = " to ".join(f"{value:.2f}" for value in row["spread"])
        rows.append((work, precision, processor, threads, f"{row['ratio']:.2f}", spread, share, target, verdict))
    return table(*rows)


def machine() -> list[str]:
    """The processor and the versions behind the speed table."""
    measured = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8")).values()
    processors = {re.split(r", \d+ threads", row["machine"])[0] for row in measured}
    versions = {row["machine"].split("cores, ")[1] for row in measured}
    dates = sorted(row["date"][:10] for row in measured)
    return [f"Processor: {'; '.join(sorted(processors))}. {'; '.join(sorted(versions))}. {dates[0]} to {dates[-1]}."]


def quantised() -> dict:
    """Results of benchmarks/quantise.py by part."""
    return json.loads((RESULTS / "quantise.json").read_text(encoding="utf-8"))


def int8_speed() -> list[str]:
    """CPU seconds of a block with int8 weights next to the same block without."""
    rows: list[tuple] = [
        ("a visual block of Lite's width, 2,688 tokens", "plain, s", "int8, s", "int8 / plain", "spread")
    ]
    for dtype, row in quantised()["speed"]["seconds"].items():
        spread = " to ".join(f"{value:.2f}" for value in row["spread"])
        rows.append((dtype, f"{row['plain']:.2f}", f"{row['int8']:.2f}", f"{row['ratio']:.2f}", spread))
    return table(*rows)


def int8_nano() -> list[str]:
    """Velocity and frames of nano with each kind of weights, next to float32."""
    rows: list[tuple] = [("weights of `nano`", "velocity at t = 0.9", "0.5", "0.1", "frames, PSNR")]
    for name, row in quantised()["nano"]["kinds"].items():
        errors = (f"{100 * row['velocity'][t]:.1f} %" for t in ("0.9", "0.5", "0.1"))
        rows.append((name, *errors, f"{row['psnr']:.0f} dB"))
    return table(*rows)


def int8_judge() -> list[str]:
    """The judge's verdict on nano in int8."""
    rows: list[tuple] = [("`nano`, bf16, right in %", "clips", "as it is", "int8", "clips with another verdict")]
    for key, row in quantised()["judge"].items():
        if key in SETS:
            cells = (row["clips"], f"{row['bf16']:.1f}", f"{row['int8']:.1f}", row["other verdicts"])
            rows.append((SETS[key], *cells))
    return table(*rows)


def int8_blocks() -> list[str]:
    """Error of the tokens after some of the blocks, next to float32."""
    found = quantised()["blocks"]["errors"]
    shown = (1, 2, 4, 8, 16, 32)
    rows: list[tuple] = [("error of the tokens after block", *shown)]
    rows += [(name, *(f"{100 * row[i - 1]:.2f} %" for i in shown)) for name, row in found.items()]
    return table(*rows)


def int8_text() -> list[str]:
    """What rounding a random Qwen does to features and velocity."""
    rows: list[tuple] = [("weights of Qwen", "features", "velocity")]
    for name, row in quantised()["text"]["errors"].items():
        rows.append((name, f"{100 * row['features']:.1f} %", f"{100 * row['velocity']:.1f} %"))
    return table(*rows)


def ratios() -> list[str]:
    """The checkpoints whose ratios for step skipping are in the package, and where those come from."""
    rows: list[tuple] = [("preset", "steps", "passes", "source")]
    for path in sorted(magcache.FOLDER.glob("*.json")):
        known = magcache.load(path)
        if path.stem in PRESETS or path.stem in NANO_PRESETS:
            source = "the authors" if known.source.startswith("the authors") else known.source
            rows.append((f"`{path.stem}`", len(known.conditional) + 1, 1 + bool(known.unconditional), source))
    return table(*rows)


def copied(name: str) -> list[str]:
    """The table of a Markdown file in benchmarks/results, as its script wrote it."""
    return [line for line in (RESULTS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]


TABLES = {
    "presets": presets,
    "cards": cards,
    "cards-images": lambda: cards(columns={"t2i-lite-sft": "text-to-image", "i2i-lite-sft": "editing"}),
    "cards-int8": lambda: cards("int8"),
    "finetune-memory": finetune_memory,
    "finetune-cards": finetune_cards,
    "weights": weights,
    "costs": costs,
    "several": several,
    "vocabulary": vocabulary,
    "nano": nano,
    "nano-frame": nano_frame,
    "nano-targets": nano_targets,
    "nano-failures": nano_failures,
    "lesson": lesson,
    "from-scratch": from_scratch,
    "stages": stages,
    "speed": speed,
    "machine": machine,
    "growth": lambda: copied("growth.md"),
    "int8-speed": int8_speed,
    "int8-nano": int8_nano,
    "int8-judge": int8_judge,
    "int8-blocks": int8_blocks,
    "int8-text": int8_text,
    "ratios": ratios,
    "magcache": lambda: copied("magcache.md"),
    "convert": lambda: copied("convert.md"),
}


if __name__ == "__main__":
    sys.exit(main())
