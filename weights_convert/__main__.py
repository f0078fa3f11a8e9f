"""Kandinsky 5.0 checkpoints from one layout to another, and what a file or folder is. Works offline."""

import argparse
import json
import re
import sys

from kandinsky5 import cli
from kandinsky5.checkpoint import MODELS
from kandinsky5.config import NANO_NAMES, PRESETS, PipelineConfig
from kandinsky5.screen import printable
from weights_convert import lora, merge
from weights_convert.inspect import as_table, inspect
from weights_convert.match import DTYPES
from weights_convert.presets import presets_like
from weights_convert.write import Options
from weights_convert.write_diffusers import to_diffusers
from weights_convert.write_native import from_diffusers, from_official

VISION = "keep Qwen's vision tower and head (2.4 GB in bf16), which editing and --expand need"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0 if it worked, 2 after one line on stderr if not, 130 if interrupted."""
    return cli.run(lambda: run(arguments), stopped="run it again with --resume to keep the finished files")


def run(arguments: list[str] | None) -> None:
    """Parse the command line and call its function."""
    options = vars(build_parser().parse_args(arguments))
    options.pop("run")(**options)


def run_from_diffusers(**options) -> None:
    """`from_diffusers`, and what came out of it on stdout."""
    print_config(from_diffusers(**options), options)


def run_from_official(**options) -> None:
    """`from_official`, likewise."""
    print_config(from_official(**options), options)


def run_to_diffusers(**options) -> None:
    """`to_diffusers`, likewise."""
    config = to_diffusers(**options)
    print(f"{printable(options['dst'])}: {config.name} in the Diffusers layout")
    if config.text not in {preset.text for preset in PRESETS.values()}:
        print(
            "Diffusers has no place for its prompt template: set it on their pipeline (docs/converting.md, Unreleased "
            "models in diffusers' pipelines)"
        )


def run_lora(src: str, dst: str, to: str) -> None:
    """`lora.convert`, and what it wrote on stdout."""
    file = lora.convert(src, dst, to)
    print(f"{printable(dst)}: {len(file.pairs)} modules, {file.layout} → {to}")


def run_merge_lora(checkpoint: str, loras: list[dict], dst: str, **options) -> None:
    """`merge.merge_lora`, likewise."""
    config = merge.merge_lora(checkpoint, [(one["file"], one["weight"]) for one in loras], dst, **options)
    print(f"{printable(dst)}: {config.name} with {printable(', '.join(one['file'] for one in loras))} merged into it")


def run_inspect(path: str, as_json: bool) -> None:
    """The report of `inspect` on stdout, as a table or as JSON."""
    report = inspect(path)
    print(json.dumps(report, indent=2) if as_json else as_table(report))


def print_config(config: PipelineConfig, options: dict) -> None:
    """What was written, how it samples by default, and without --preset which presets it may be."""
    if options["only"] not in (None, "dit"):
        print(f"{printable(options['dst'])}: {options['only']} converted")
        return
    sampling, attention = config.sampling, "NABLA" if config.dit.nabla else "full attention"
    print(
        f"{printable(options['dst'])}: {config.name}, {' and '.join(config.tasks)}, {attention}; by default "
        f"{sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}, shift {sampling.shift:g}"
    )
    task_known = "src" in options  # the authors' bare files name neither task nor attention
    like = presets_like(config, task_known)
    if like and not options["preset"] and config.name not in NANO_NAMES:
        print(
            f"Presets that fit, likeliest first: {', '.join(like)}. Releases differ in steps, guidance, shift and "
            "size: convert with --preset NAME."
        )


def build_parser() -> cli.Parser:
    """The commands; each leaves the function that runs it in `run`."""
    parser = cli.Parser(cli.program("weights_convert"), description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("from-diffusers", help="Diffusers layout → native folder")
    add = command.add_argument
    add("src", metavar="SRC", help="folder with model_index.json; with --only also one model's folder or file")
    add_conversion(command, run_from_diffusers)
    add("--preset", metavar="NAME", help="sample with the defaults of this preset")
    add("--with-vision", action="store_true", help=VISION)

    command = commands.add_parser("from-official", help="official DiT file, VAE, Qwen and CLIP → native folder")
    add = command.add_argument
    add("--dit", metavar="FILE", help="safetensors file of the official release")
    add("--vae", metavar="PATH",
        help="Tencent's pytorch_model.pt, FLUX.1's ae.safetensors, or a Diffusers VAE folder")  # fmt: skip
    add("--qwen", metavar="PATH", help="Hugging Face folder of Qwen2.5-VL, or one file")
    add("--clip", metavar="PATH", help="Hugging Face folder of CLIP ViT-L/14, or one file")
    add("--qwen-tokenizer", metavar="DIR", help="if it is not next to the weights")
    add("--clip-tokenizer", metavar="DIR", help="if it is not next to the weights")
    add_conversion(command, run_from_official)
    add("--preset", metavar="NAME", help="which release this is: sets task, NABLA, shift, steps, guidance")
    add("--with-vision", action="store_true", help=VISION)

    command = commands.add_parser("to-diffusers", help="native folder → Diffusers layout")
    command.add_argument("src", metavar="SRC", help="native folder, or a bundled model: nano")
    add_conversion(command, run_to_diffusers)

    command = commands.add_parser("lora", help="a LoRA from one layout to another")
    add = command.add_argument
    add("src", metavar="SRC", help="file or folder, in any of these layouts")
    add("dst", metavar="DST", help="file to write, or for official a folder; it must not exist yet")
    add("--to", choices=lora.LAYOUTS, required=True, help="the layout to write")
    command.set_defaults(run=run_lora)

    command = commands.add_parser("merge-lora", help="native folder and LoRAs → native folder")
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="native folder, or a bundled model: nano")
    add("loras", metavar="LORA[:WEIGHT]", nargs="+", type=cli.lora_file, help="in any layout; weight 1 if not given")
    add_output(command, run_merge_lora)

    command = commands.add_parser("inspect", help="what a file or folder is")
    command.add_argument("path", metavar="PATH", help="file or folder, or a bundled model: nano")
    command.add_argument("--json", action="store_true", dest="as_json", help="as JSON")
    command.set_defaults(run=run_inspect)
    return parser


def add_conversion(command: argparse.ArgumentParser, run) -> None:
    """DST and the options of all three conversions; `run` is called with the parsed options."""
    add_output(command, run)
    add = command.add_argument
    add("--only", choices=MODELS, help="convert this model alone")
    add("--base", metavar="DIR", help="folder in DST's layout that has the other models")
    add("--dtype", choices=(*DTYPES, "int8"),
        help="cast to this precision (default: as stored); int8: the Linears of the DiT's and Qwen's blocks, half the "
        "size of bf16, for native folders")  # fmt: skip
    add("--cast-all", action="store_true", help="cast the DiT's float32 parts too")


def add_output(command: argparse.ArgumentParser, run) -> None:
    """DST and how it is written; `run` is called with the parsed options."""
    add = command.add_argument
    add("dst", metavar="DST", help="folder to write; it must not exist yet")
    add("--max-shard-size", type=parse_size, default=Options.max_shard_size, metavar="SIZE", help="default: 5GB")
    add("--resume", action="store_true", help="keep files of an interrupted run that are what would be written")
    add("--verify", action="store_true", help="read everything back and compare SHA-256 hashes")
    add("--quiet", action="store_false", dest="progress", help="no progress bar")
    command.set_defaults(run=run)


def parse_size(text: str) -> int:
    """ "5GB" → 5·10⁹; KB, MB, GB, or bytes. ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()] if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write for example 5GB or 500MB")
    return int(size)


if __name__ == "__main__":
    sys.exit(main())
