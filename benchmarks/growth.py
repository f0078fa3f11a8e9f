"""How time and memory of one layer's attention grow with the tokens, from 1k to 64k.

    python benchmarks/growth.py     # growth.md, growth.json and, with matplotlib, growth.svg in benchmarks/results

4 heads of 64 in bf16. Block-sparse keeps 16 tiles of 64 tokens for each tile of queries, its map given like q, k and v;
what NABLA's own map costs is a line for itself, which grows with the square of the tiles.
Every figure is from a process of its own. Memory is the growth of its largest resident set (VmHWM) while the
attention runs for the first time, the result included; time is the median of five further runs, or as many as fit
into two seconds. What takes longer than --seconds or, over the resting process, more than --memory is stopped, and
not tried with more tokens. The exponents p of tokensᵖ are least-squares fits to the logarithms, from 8k tokens on:
below, time and memory that do not depend on the tokens show.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import describe_machine, memory
from torch import Tensor

from kandinsky5 import attention, nabla
from kandinsky5.config import NablaConfig
from kandinsky5.files import replacing, write_text
from kandinsky5.nabla import TILE
from kandinsky5.runtime import kernels
from kandinsky5.runtime.heap import keep_freed_memory

HEADS, HEAD_DIM, KEPT = 4, 64, 16
TOKENS = [2**i for i in range(10, 17)]
FIT_FROM = 8192
METHODS = {
    "dense": lambda q, k, v, block_map: attention.dense_attention(q, k, v),
    "chunked": lambda q, k, v, block_map: kernels.chunked_attention(q, k, v),
    "SDPA": lambda q, k, v, block_map: F.scaled_dot_product_attention(q, k, v),
    "block-sparse": kernels.block_sparse_attention,
    "NABLA's map": lambda q, k, v, block_map: build_map(q, k),
}
UNITS = {"seconds": "s", "peak": "MB"}


def main() -> None:
    """Measure, and print and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="L", help="multiples of 64")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=60, help="limit of one attention (default: 60)")
    parser.add_argument("--memory", type=float, default=8, help="limit in GB (default: 8)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # what measure_alone calls
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        method, tokens = options.alone
        run_alone(method, int(tokens), options)
        return
    measured = {method: {} for method in options.methods}
    stopped = {}
    for tokens in options.tokens:
        for method in options.methods:
            result = stopped.get(method) or measure_alone(method, tokens, options)
            if isinstance(result, str):
                stopped[method] = result
            measured[method][tokens] = result
            shown = result if isinstance(result, str) else ", ".join(format_figure(result, key) for key in UNITS)
            print(f"{tokens:6,} tokens, {method}: {shown}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    table = build_table(measured, options)
    write_text(options.out / "growth.md", table)
    write_text(options.out / "growth.json", json.dumps(measured, indent=1) + "\n")
    plot(measured, options.out / "growth.svg")
    print("\n" + table)


def measure_alone(method: str, tokens: int, options: argparse.Namespace) -> dict | str:
    """Seconds and peak bytes of a method in a fresh process, or which limit it met."""
    limits = ["--threads", str(options.threads), "--seconds", str(options.seconds), "--memory", str(options.memory)]
    command = [sys.executable, __file__, *limits, "--alone", method, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -signal.SIGALRM:
        return f"over {options.seconds:g} s"
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return f"over {options.memory:g} GB"
    if done.returncode:
        sys.exit(f"{method}, {tokens} tokens: {done.stderr}")
    return json.loads(done.stdout)


@torch.inference_mode()
def run_alone(method: str, tokens: int, options: argparse.Namespace) -> None:
    """In the fresh process: print what `measure_alone` returns."""
    run = METHODS[method]
    run(*build_inputs(2 * KEPT * TILE))  # PyTorch loads and compiles what it needs
    inputs = build_inputs(tokens)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resting = memory("VmRSS")
    limit = memory("VmData") + int(1e9 * options.memory)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start_clock(options.seconds)
    run(*inputs)
    peak = memory("VmHWM") - resting
    times = []
    with keep_freed_memory(torch.device("cpu")):  # as while sampling
        run(*inputs)
        while not times or len(times) < 5 and sum(times) < 2:
            start_clock(options.seconds)
            start = time.perf_counter()
            run(*inputs)
            times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times), "peak": peak}))


def start_clock(seconds: float) -> None:
    """End this process by SIGALRM that many seconds from now, in the middle of a matmul too."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def build_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v (1, N, L, D) and a map that keeps each tile itself and KEPT − 1 (if there are) others."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, HEADS, tokens, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    tiles = tokens // TILE
    order = torch.rand(1, HEADS, tiles, tiles, generator=generator)
    order.diagonal(dim1=-2, dim2=-1).fill_(2)
    chosen = order.topk(min(KEPT, tiles)).indices
    return q, k, v, torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, chosen, True)


def build_map(q: Tensor, k: Tensor) -> Tensor:
    """NABLA's map for q, k (1, N, L, D), taken for L/64 frames of one tile; bool (1, N, L/64, L/64)."""
    grid = (q.shape[2] // TILE, nabla.SIDE, nabla.SIDE)
    return nabla.block_map(q, k, grid, NablaConfig(P=0.9, window=(3, 1, 1)))


def fit_exponent(figures: dict[int, dict | str], key: str) -> float | None:
    """p of the fit c · tokensᵖ from FIT_FROM on; None for fewer than three points."""
    points = [(math.log(n), math.log(f[key])) for n, f in figures.items() if n >= FIT_FROM and not isinstance(f, str)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None


def format_figure(figure: dict | str, key: str) -> str:
    if isinstance(figure, str):
        return figure
    return f"{figure[key]:.3g} s" if key == "seconds" else f"{1e-6 * figure[key]:,.1f} MB"


def build_table(measured: dict[str, dict[int, dict | str]], options: argparse.Namespace) -> str:
    """Markdown: time and memory of each method, the exponents, and below where the figures come from."""
    head = [f"{method}, {what}" for what in ("time", "memory") for method in measured]
    lines = [f"| tokens | {' | '.join(head)} |", "|" + "---|" * (1 + len(head))]
    for tokens in options.tokens:
        figures = [format_figure(measured[method][tokens], key) for key in UNITS for method in measured]
        lines.append(f"| {tokens:,} | {' | '.join(figures)} |")
    fits = [fit_exponent(measured[method], key) for key in UNITS for method in measured]
    lines.append(f"| exponent | {' | '.join('' if fit is None else f'{fit:.2f}' for fit in fits)} |")
    machine = describe_machine(options.threads)
    return "\n".join([
        *lines,
        "",
        f"{HEADS} heads of {HEAD_DIM}, bf16; block-sparse keeps {KEPT} tiles of {TILE} tokens for each query tile.",
        "Memory: the largest resident set (VmHWM) of a fresh process over the resting one, which holds q, k, v and the",
        f"map. Exponents: of tokens, fitted from {FIT_FROM:,} tokens on. Limits: {options.seconds:g} s and "
        f"{options.memory:g} GB.",
        f"{machine['date']}, load {os.getloadavg()[0]:.1f}. {machine['machine']}.",
        "",
    ])  # fmt: skip


def plot(measured: dict[str, dict[int, dict | str]], path: Path) -> None:
    """Both figures over the tokens, all axes logarithmic, with the exponents in the legend.

    No plot without matplotlib, nor where every method met a limit.
    """
    if all(isinstance(figure, str) for figures in measured.values() for figure in figures.values()):
        return
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (key, unit) in zip(both, UNITS.items(), strict=True):
        ticks = set()
        for marker, (method, figures) in zip("osD^v", measured.items(), strict=False):
            points = {n: f[key] for n, f in figures.items() if not isinstance(f, str)}
            scale = 1 if unit == "s" else 1e-6
            fit = fit_exponent(figures, key)
            label = method if fit is None else f"{method}: tokens^{fit:.2f}"
            axes.plot(points.keys(), [scale * y for y in points.values()], marker=marker, label=label)
            ticks |= figures.keys()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(ticks), [f"{n // 1024}k" for n in sorted(ticks)])
        axes.set_xlabel("tokens")
        axes.set_ylabel(
            f"{'time of one attention' if unit == 's' else 'peak memory over the resting process'} / {unit}"
        )
        axes.grid(alpha=0.3)
        axes.margins(y=0.3)  # room for the legend
        axes.legend(loc="upper left")
    with replacing(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
