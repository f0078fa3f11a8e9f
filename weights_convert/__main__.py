"""python -m weights_convert from-diffusers SRC DST"""

import argparse
import sys

from weights_convert import convert


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with one line on stderr if not."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def run_from_diffusers(options) -> int:
    config = convert.from_diffusers(options.src, options.dst, preset=options.preset)
    print(f"{options.dst}: {config.name}, {' and '.join(config.tasks)}")
    if options.preset is None:
        print_presets(config)
    return 0


def print_presets(config) -> None:
    names = convert.presets_like(config)
    sampling = config.sampling
    print(
        f"It samples with {sampling.num_inference_steps} steps and guidance {sampling.guidance_scale:g} by default. A distilled "
        "or no-CFG checkpoint needs other numbers: convert it with --preset NAME."
    )
    print(f"Presets of this size: {', '.join(names) or 'none'}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m weights_convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("from-diffusers", help="Diffusers layout → native folder")
    command.add_argument("src", metavar="SRC", help="folder with model_index.json")
    command.add_argument("dst", metavar="DST", help="native folder to write; it must not exist yet")
    command.add_argument("--preset", metavar="NAME", help="sample with the defaults of this preset")
    command.set_defaults(run=run_from_diffusers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
