"""How a step of the released models scales over several GPUs, and what the ranks send each other.

    torchrun --nproc-per-node 4 benchmarks/scaling.py [--preset t2v-lite-sft-5s] [--blocks 4] [--repeats 3]
    python benchmarks/scaling.py --volume          # the bytes of each preset by its formula, on any machine

Under torchrun a DiT with random weights in bf16 and `--blocks` of its visual blocks (all are alike) runs at the
released size: on rank 0 alone, then with its tokens on half of the ranks, as with guidance, and on all. Efficiency is
time alone / (ranks × time together): 1 would be exchanges that cost nothing. The bytes that a rank sends are counted,
next to the formula. It runs on CPUs too, in float32, best with --tiny. No figure of it has been measured on GPUs yet.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks", "tests", "tests/parity")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from kandinsky5.config import PRESETS, DiTConfig, PipelineConfig  # noqa: E402
from kandinsky5.dit import DiT  # noqa: E402
from kandinsky5.runtime import ending, fast, kernels, launch, parallel  # noqa: E402
from kandinsky5.runtime.budget import latent_grid  # noqa: E402
from kandinsky5.runtime.device import choose_device  # noqa: E402

TINY = DiTConfig(dim=256, ff_dim=512, time_dim=64, num_text_blocks=1, num_visual_blocks=2, rope_axes=(8, 12, 12))


def volume(config: DiTConfig, tokens: int, sequence: int, itemsize: int = 2) -> int:
    """Bytes that a rank sends in the exchanges of one pass: in each block queries, keys, values and results.

    Of its tokens / sequence it sends all heads but its own.
    """
    per_block = 4 * tokens * config.dim * itemsize * (sequence - 1) // sequence**2
    return config.num_visual_blocks * per_block


def show_volumes() -> None:
    """Print the formula's bytes for each preset that makes videos."""
    print(f"{'preset':34} ranks  sent by each rank, per step")
    for name, preset in PRESETS.items():
        if preset.makes_images:
            continue
        tokens = math.prod(latent_grid(preset)) // math.prod(preset.dit.patch_size)
        guided = preset.sampling.guidance_scale != 1
        for world in (2, 4, 7, 8):
            try:
                guidance, sequence = parallel.choose_ranks(world, preset.dit.num_heads, guided)
            except ValueError:
                continue
            passes = 2 // guidance if guided else 1
            sent = passes * volume(preset.dit, tokens, sequence)
            print(f"{name:34} {guidance}x{sequence}    {sent / 1e9:8.2f} GB")


def measure(dit: DiT, given: dict, repeats: int, device: torch.device) -> float:
    """Median seconds of a forward, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            dit(**given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def build(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """A DiT with random weights, the same on every rank."""
    torch.manual_seed(0)
    dit = DiT(config).to(device=device, dtype=dtype).eval().requires_grad_(False)
    fast.install(dit, device=device)
    kernels.install(dit, "auto")
    return dit


def inputs(config: DiTConfig, grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict:
    """Random inputs of a forward; the same on every rank."""
    random = torch.Generator("cpu").manual_seed(1)
    shapes = {
        "x": (1, *grid, config.input_channels),
        "text": (1, 256, config.text_dim),
        "pooled": (1, config.pooled_dim),
    }
    tensors = {name: torch.randn(shape, generator=random).to(device, dtype) for name, shape in shapes.items()}
    return {**tensors, "t": torch.tensor([0.5], device=device), "rope_scale": (1.0, 2.0, 2.0)}


def run(options: argparse.Namespace) -> int:
    """Measure on all ranks, and print the table on rank 0."""
    preset: PipelineConfig = PRESETS[options.preset]
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config, grid = replace(preset.dit, num_visual_blocks=options.blocks, num_text_blocks=1), latent_grid(preset)
    if options.tiny:
        config, grid = replace(TINY, nabla=preset.dit.nabla), (3, 32, 32)
    given, world = inputs(config, grid, device, dtype), dist.get_world_size()
    tokens = math.prod(grid) // math.prod(config.patch_size)
    alone = 0.0
    if dist.get_rank() == 0:
        alone = measure(build(config, device, dtype), given, options.repeats, device)
    alone = max(launch.meet(alone))
    print(f"{options.preset}, {config.num_visual_blocks} blocks, {tokens:,} tokens, {world} ranks on {device}, {dtype}")
    print(f"{'':14}  {'seconds':>8}  {'speed-up':>8}  {'efficiency':>10}  {'sent by a rank':>14}  by the formula")
    print(f"{'one pass alone':14}  {alone:8.3f}")
    for sequence in sorted({world, world // 2} - {0, 1}):
        if config.num_heads % sequence or world % sequence:
            continue
        ranks = parallel.Ranks(sequence=sequence, data=world // sequence, device=device.type)
        dit, sent, exchange = build(config, device, dtype), [0], parallel.all_to_all_single_autograd

        def counting(x, to, sizes, group, sent=sent, exchange=exchange):
            sent[0] += x.element_size() * (sum(sizes) - sizes[group.rank()])
            return exchange(x, to, sizes, group)

        ranks.spread(dit)
        with mock.patch.object(parallel, "all_to_all_single_autograd", counting), torch.no_grad():
            dit(**given)
        together = max(launch.meet(measure(dit, given, options.repeats, device)))
        known = volume(config, tokens, sequence, dtype.itemsize)
        print(
            f"{sequence:3} in sequence  {together:8.3f}  {alone / together:8.2f}  {alone / together / sequence:10.2f}  "
            f"{sent[0] / 1e6:11.1f} MB  {known / 1e6:.1f} MB"
        )
    return 0


def main() -> int:
    """The command."""
    videos = [name for name, preset in PRESETS.items() if not preset.makes_images]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", action="store_true", help="only print the bytes of each preset by the formula")
    parser.add_argument("--preset", choices=videos, default="t2v-lite-sft-5s", help="default: t2v-lite-sft-5s")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="visual blocks (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="forwards of each row (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    options = parser.parse_args()
    if options.blocks < 1 or options.repeats < 1:
        parser.error(f"--blocks {options.blocks} and --repeats {options.repeats} must be at least 1")
    if options.volume:
        show_volumes()
        return 0
    if not launch.is_one_of_many():
        parser.error("start it with torchrun --nproc-per-node N, or give --volume")
    return ending.together(lambda: run(options), lambda error: str(error) if isinstance(error, ValueError) else None)


if __name__ == "__main__":
    sys.exit(main())
