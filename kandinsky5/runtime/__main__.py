"""What a preset or checkpoint needs of a GPU's memory, and which options would help; computed from sizes.

    kandinsky5 memory t2v-pro-sft-5s-sd --offload blocks --quantize int8
    kandinsky5 memory t2v-lite-sft-10s --card 12             # which options fit a card of 12 GB
    kandinsky5 memory weights/lite --height 768 --width 1280  # another size than the checkpoint's own

Nothing is loaded. The estimates are on the safe side; docs/memory.md says how they are made.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from kandinsky5 import cli
from kandinsky5.checkpoint import find_checkpoint, find_part, find_weights
from kandinsky5.config import NANO_NAMES, PRESETS, PipelineConfig
from kandinsky5.config_file import load_config
from kandinsky5.request import Request
from kandinsky5.runtime.budget import CONTEXT, Choice, all_at_once, choices, first_that_fits, moments, peak
from kandinsky5.runtime.device import DTYPES
from kandinsky5.runtime.offload import MODES
from kandinsky5.screen import printable


def main(arguments: list[str] | None = None) -> None:
    """Run one command line. Raises ValueError for an unknown preset, folder or size."""
    parser = cli.Parser(cli.program("kandinsky5.runtime"), description=__doc__)
    add = parser.add_argument
    add("preset", metavar="PRESET", help=f"{next(iter(PRESETS))}, …, {NANO_NAMES[0]}, or a converted checkpoint")
    add("--quantize", choices=("int8",), help="weights of the DiT and Qwen in 8 bits")
    add("--offload", choices=MODES, help="keep on the device only the running model, or its block")
    add("--tile-space", action="store_true", help="VAE in tiles of 256 pixels")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the models (default: bfloat16)")
    add("--height", type=int, metavar="PX", help="default: the preset's")
    add("--width", type=int, metavar="PX", help="likewise")
    add("--num-frames", type=int, metavar="N", help="likewise")
    add("--card", type=float, metavar="GB", help="also say which options fit a card of this size")
    options = parser.parse_args(arguments)
    if options.card is not None and not 0 < options.card < 1e6:
        raise ValueError(f"--card {options.card:g}: give the memory of a GPU in GB, such as 12")
    config, stored = find_config(options.preset)
    config = resize(config, options.height, options.width, options.num_frames)
    choice = Choice(options.offload, options.quantize or stored, options.tile_space, DTYPES[options.dtype])
    print(describe(options.preset, config, choice))
    print(advise(config, choice) if options.card is None else fit(config, choice, options.card))


def find_config(preset: str) -> tuple[PipelineConfig, str | None]:
    """The config of a preset, a bundled model or a checkpoint folder, and "int8" if its DiT and Qwen are stored so."""
    if preset in PRESETS:
        return PRESETS[preset], None
    folder = find_checkpoint(preset)
    config = load_config(folder / "config.json")
    return config, "int8" if all(is_int8(folder, name, config.base) for name in ("dit", "qwen")) else None


def is_int8(folder: Path, name: str, base: str | None) -> bool:
    """Whether a model's file holds int8. False if there is none, as after a conversion with --only."""
    place = find_part(folder, name, base)
    if not any(place.glob(f"{name}.safetensors*")):
        return False
    return any(stored.dtype == "I8" for stored in find_weights(place, name).tensors.values())


def resize(config: PipelineConfig, height: int | None, width: int | None, num_frames: int | None) -> PipelineConfig:
    """The config with another size of its videos; ValueError for an invalid one."""
    given = {"height": height, "width": width, "num_frames": num_frames}
    requested: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    without_image = replace(config, tasks=("t2i",) if config.makes_images else ("t2v",))  # of the same sizes
    checked = Request.resolve(without_image, "", **requested)
    size = {name: getattr(checked, name) for name in given}
    return replace(config, sampling=replace(config.sampling, **size))


def describe(name: str, config: PipelineConfig, choice: Choice) -> str:
    """A table of the three moments."""
    video, found = config.sampling, moments(config, choice)
    dtype = str(choice.dtype).removeprefix("torch.")
    size = f"{video.num_frames} frame{'s' * (video.num_frames > 1)} of {video.height}x{video.width}"
    lines = [f"{printable(name)}: {size}, {dtype} {choice.flags()}".rstrip()]
    lines.append(f"{'GB':10}{'weights':>10}{'computed':>10}{'together':>10}")
    for moment in found:
        cells = (moment.weights, moment.computed, moment.total)
        lines.append(f"{moment.name:10}" + "".join(f"{cell / 1e9:10.1f}" for cell in cells))
    most = max(moment.total for moment in found)
    lines.append(f"peak {most / 1e9:.1f} GB; with CUDA's own, a card of {(most + CONTEXT) / 1e9:.1f} GB")
    if (whole := all_at_once(config, choice)) > found[1].computed:
        lines.append(
            f"where memory is plenty, sampling computes all tokens at once: {whole / 1e9:.1f} GB, in less time"
        )
    return "\n".join(lines)


def advise(config: PipelineConfig, choice: Choice) -> str:
    """Which single change would lower the peak, and to what."""
    now = peak(config, choice)
    changed = {
        "--quantize int8": replace(choice, quantize="int8"),
        "--offload model": replace(choice, offload=choice.offload or "model"),
        "--offload blocks": replace(choice, offload="blocks"),
        "--tile-space": replace(choice, tile_space=True),
    }
    lower = {flag: peak(config, other) for flag, other in changed.items() if other != choice}
    lines = [f"  with {flag}: {size / 1e9:.1f} GB" for flag, size in lower.items() if size < 0.98 * now]
    return "\n".join(
        ["less:", *lines] if lines else ["no option needs less: fewer frames or less --height, --width do"]
    )


def fit(config: PipelineConfig, choice: Choice, card: float) -> str:
    """The fastest options that fit a card of so many GB: in the precision requested and in int8, or in int8 alone."""
    lines = []
    for kind in ("int8",) if choice.quantize else (None, "int8"):
        found = first_that_fits(config, int(card * 1e9), choices(choice.dtype, kind))
        label = "weights in int8" if kind else "weights as they are"
        how = f"{found.flags() or 'no option needed'}: {peak(config, found) / 1e9:.1f} GB" if found else "do not fit"
        lines.append(f"{card:g} GB card, {label}: {how}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
