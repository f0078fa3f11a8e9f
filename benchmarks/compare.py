"""Us compared with diffusers on the same machine, in one run: time or peak memory of each piece of work, and the error.

    pip install -e '.[parity]' -c constraints.txt && python benchmarks/compare.py [--rows NAME ...] [--threads 2]

Absolute figures mean little, so every row is a ratio theirs / ours (above 1: we are ahead) with equal weights and
inputs on both sides. Times are taken in turn, ours, theirs, ours, theirs, …, and the ratio is the median over such
pairs, with the smallest and the largest next to it; where theirs takes a minute it runs once, and stands in each pair
("1 + 2 runs", and what varies is ours). Memory is taken in a fresh process for every figure, which holds
one side alone. rows.py describes each row. The table goes to RESULTS/compare.md and compare.json, a plot of the
ratios (with matplotlib) to compare.svg; rows that were not run now stay in it as they are. The machine should do
nothing else meanwhile.

    python benchmarks/compare.py --isa avx2 [--resume]   # float32 rows, as with AVX2 alone, a quarter of an hour

The share of the matmul rate says how much of the time bare matrix products of as many operations, in this precision
on these threads, would have taken: what is physically possible is near 1, and above it only where a form saves
multiplications (the VAE's). --resume leaves out rows of the last day; --table only writes the table and its targets.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks", "tests", "tests/parity")]

import torch  # noqa: E402
from rows import ROWS, Row  # noqa: E402

from kandinsky5.files import replacing, write_text  # noqa: E402
from random_weights import relative_error  # noqa: E402

SIDES = ("ours", "theirs")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# What of a measurement each kind of row compares, and how it is printed.
KINDS = {
    "time": ("seconds", 1, "s"),
    "load": ("seconds", 1, "s"),
    "memory": ("peak", 1e-6, "MB"),
    "file": ("peak", 1e-6, "MB"),
}


def main() -> None:
    """Run the rows and print the table; exit code 1 where results disagree."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements of each row (default: 5)")
    parser.add_argument("--seconds", type=float, help="start no further pair after that (default: 300; avx2: 90)")
    parser.add_argument("--isa", choices=("avx2",), help="forbid newer instructions, and measure the float32 rows")
    parser.add_argument("--resume", action="store_true", help="leave out rows that were measured in the last day")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the table again")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that every row runs")
    parser.add_argument("--out", type=Path, metavar="RESULTS", help="default: benchmarks/results; with --tiny nowhere")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)  # what measure_alone calls
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error(f"--repeats {options.repeats} and --threads {options.threads} must be at least 1")
    if options.isa and "ONEDNN_MAX_CPU_ISA" not in os.environ:  # libraries read it when they are loaded: once more
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    options.seconds = options.seconds or (90 if options.isa else 300)
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the temporary folder goes too
    if options.alone:
        run_alone(*options.alone, options.tiny)
        return

    rows = [row for row in ROWS if (row.name in options.rows if options.rows else row.avx2 or not options.isa)]
    out = options.out or (None if options.tiny else Path(__file__).parent / "results")
    results = read_results(out)
    if options.resume:
        rows = [row for row in rows if not is_recent(results.get(key_of(row, options.isa)))]
    if options.table:
        rows = []
    if (load := os.getloadavg()[0]) > 0.5 and not options.tiny:
        print(f"this machine is busy (load {load:.1f}): these will be no figures to keep", flush=True)
    with tempfile.TemporaryDirectory(prefix="kandinsky5-benchmark-") as folder:
        for number, row in enumerate(rows, start=1):
            print(f"[{number}/{len(rows)}] {row.name}: {row.work}", flush=True)
            results[key_of(row, options.isa)] = compare(row, Path(folder), options)
            write_results(results, out)
    write_results(results, out)
    print("\n" + build_table(results))
    wrong = [row.name for row in rows if not results[key_of(row, options.isa)]["agrees"]]
    if wrong:
        sys.exit(f"the two sides' results differ by more than they may in: {', '.join(wrong)}")


def key_of(row: Row, isa: str | None) -> str:
    """A row's name among the results, where each kind of processor has its own."""
    return f"{row.name}@{isa}" if isa else row.name


def is_recent(result: dict | None) -> bool:
    """Whether a row was measured in the last 24 hours."""
    return result is not None and time.time() - time.mktime(time.strptime(result["date"], "%Y-%m-%d %H:%M")) < 86400


def in_order(results: dict) -> list[tuple[Row, dict]]:
    """All rows that have results, in the order of `ROWS`, first as this processor is and then with AVX2 alone."""
    pairs = [(row, key_of(row, isa)) for isa in (None, "avx2") for row in ROWS]
    return [(row, results[key] | {"target": row.target}) for row, key in pairs if key in results]


def compare(row: Row, folder: Path, options: argparse.Namespace) -> dict:
    """Measure both sides of a row in turn; returns what JSON and table need, figures in seconds or bytes."""
    if row.prepare:
        row.prepare(options.tiny, folder)
    measure = (measure_here if row.measure == "time" else measure_alone)(row, folder, options)
    key, scale, unit = KINDS[row.measure]
    pairs, results, start = [], {}, time.perf_counter()
    while len(pairs) < options.repeats and (not pairs or time.perf_counter() - start < options.seconds):
        if row.once and pairs:
            pair = {"ours": measure("ours"), "theirs": pairs[0]["theirs"]}
        else:
            pair = {side: measure(side) for side in SIDES}
        results = {side: pair[side].pop("result", results.get(side)) for side in SIDES}
        pairs.append(pair)
        if row.once and len(pairs) == 1:
            start = time.perf_counter()  # theirs alone would take up the time that there is
        ours, theirs = (scale * pair[side][key] for side in SIDES)
        print(f"    ours {ours:,.4g} {unit}, theirs {theirs:,.4g} {unit}: {theirs / ours:.2f}", flush=True)

    error = None
    if row.tolerance is not None:
        with torch.inference_mode():
            expected = row.run("exact", options.tiny, folder)() if row.exact else results["theirs"]
        error = relative_error(results["ours"], expected)
    ratios = [pair["theirs"][key] / pair["ours"][key] for pair in pairs]
    rate = matmul_rate(64 if options.tiny else 2048, torch.float32 if row.dtype == "float32" else torch.bfloat16)
    flop = row.flop() if row.flop and not options.tiny else None
    ours = statistics.median(pair["ours"][key] for pair in pairs)
    return {
        "work": row.work,
        "measure": row.measure,
        **{side: statistics.median(pair[side][key] for pair in pairs) for side in SIDES},
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "target": row.target,
        "error": error,
        "tolerance": row.tolerance,
        "agrees": error is None or error <= row.tolerance,
        "pairs": pairs,
        "tiny": options.tiny,
        "precision": row.dtype,
        "matmul": round(rate, 4),  # Tflop/s in that precision, there and then
        "share": flop and round(flop / ours / rate / 1e12, 3),  # of that rate, for the operations of the definition
        **describe_machine(options.threads, options.isa),
    }


def measure_here(row: Row, folder: Path, options: argparse.Namespace) -> Callable[[str], dict]:
    """Build both sides and run each once, to warm up; returns what measures the time of one more run of a side.

    `once`: theirs is not run to warm up, so that its time has the little that its first run does besides.
    """
    work = {side: row.run(side, options.tiny, folder) for side in SIDES}

    @torch.inference_mode()
    def measure(side: str) -> dict:
        gc.collect()
        start = time.perf_counter()
        result = work[side]()
        return {"seconds": time.perf_counter() - start, "result": result}

    for side in SIDES[:1] if row.once else SIDES:
        measure(side)
    return measure


def measure_alone(row: Row, folder: Path, options: argparse.Namespace) -> Callable[[str], dict]:
    """Returns what measures time and memory of a side's very first run, in a fresh process."""

    def measure(side: str) -> dict:
        if row.measure == "file" and side == "theirs":
            return {"peak": sum(path.stat().st_size for path in (folder / "ours").iterdir()), "anonymous": 0}
        file = folder / "measured.pt"
        command = [sys.executable, __file__, "--threads", str(options.threads)] + ["--tiny"] * options.tiny
        subprocess.run([*command, "--alone", row.name, side, folder, file], check=True)
        return torch.load(file)

    return measure


def run_alone(name: str, side: str, folder: str, file: str, tiny: bool) -> None:
    """In the fresh process: build one side, let the process rest, run it once, write what that took into `file`.

    "peak" is the growth of the largest resident set, which counts file pages that are mapped; "anonymous" the growth
    of the part of it that is no file's.
    """
    row = next(row for row in ROWS if row.name == name)
    work = row.run(side, tiny, Path(folder))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building left over is no longer resident
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resting = memory("VmRSS"), memory("RssAnon")
    anonymous, finished = [resting[1]], threading.Event()

    def watch() -> None:  # the kernel keeps the peak of all memory, but not of its parts
        while not finished.wait(0.002):
            anonymous.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)  # an error must end the process
    watcher.start()
    start = time.perf_counter()
    with torch.inference_mode():
        result = work()
    seconds = time.perf_counter() - start
    finished.set()
    watcher.join()
    measured = {"seconds": seconds, "peak": memory("VmHWM") - resting[0], "anonymous": max(anonymous) - resting[1]}
    torch.save({**measured, "result": result}, file)


def memory(key: str) -> int:
    """Bytes that the kernel reports of this process: VmRSS, VmHWM (the largest VmRSS so far), RssAnon."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def describe_machine(threads: int, isa: str | None = None) -> dict:
    """Where and with what a row was measured."""
    with open("/proc/cpuinfo") as file:
        lines = [line.partition(":") for line in file]
    model = next((value.strip() for key, _, value in lines if key.startswith("model name")), "unknown")
    flags = next((value.split() for key, _, value in lines if key.startswith("flags")), [])
    newer = () if isa else (flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    machine = " ".join([model, platform.machine(), *newer, *(["restricted to AVX2"] if isa else [])])
    there = [name for name in ("torch", "diffusers", "transformers") if find_spec(name)]
    software = ", ".join(f"{name} {version(name)}" for name in there)
    cores = f"{threads} threads on {os.cpu_count()} cores"
    return {
        "machine": f"{machine}, {cores}, {software}",
        "load": round(os.getloadavg()[0], 2),  # of the last minute, these threads included
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def matmul_rate(size: int, dtype: torch.dtype) -> float:
    """Tflop/s of one matmul of size³ with PyTorch's threads, the best of five."""
    a, b, out = (torch.randn(size, size, dtype=dtype) for _ in range(3))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def read_results(out: Path | None) -> dict:
    file = out / "compare.json" if out else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def write_results(results: dict, out: Path | None) -> None:
    """Table, figures and plot, each written next to its place and then renamed."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "compare.md", build_table(results))
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    with replacing(out / "compare.svg") as path:
        plot_ratios(results, path)


def build_table(results: dict) -> str:
    """Markdown: a line for each row in the order of `ROWS`, and below it where the figures come from."""
    head = ("work", "precision", "processor", "ours", "theirs", "ratio", "from to", "share of the matmul rate", "runs")
    head += ("target", "", "error", "date")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    rows = [result for _, result in in_order(results)]
    for row in rows:
        figures = " | ".join(format_figure(row, side) for side in SIDES)
        spread = " to ".join(f"{ratio:.2f}" for ratio in row["spread"])
        has_target = row["target"] is not None and not row["tiny"]  # targets are for full sizes
        target = f"{row['target']:.3g}" if has_target else ""
        met = ("met" if is_met(row) else "**not met**") if has_target else ""
        error = "" if row["error"] is None else f"{row['error']:.1e}" + ("" if row["agrees"] else " **too large**")
        ratio, runs, date = f"{row['ratio']:.2f}", count_runs(row), row["date"].split()[0]
        share = "" if row.get("share") is None else f"{row['share']:.2f}"
        processor = "AVX2" if "restricted to AVX2" in row["machine"] else "as it is"
        cells = (
            row["work"],
            precision_of(row),
            processor,
            figures,
            ratio,
            spread,
            share,
            runs,
            target,
            met,
            error,
            date,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machines = sorted({row["machine"] + " (toy sizes: no figures to keep)" * row["tiny"] for row in rows})
    dates, loads = ([row[key] for row in rows] for key in ("date", "load"))
    bare = ""
    for precision in ("bf16", "float32"):
        rates = [row["matmul"] for row in rows if "matmul" in row and row.get("precision", "bf16") == precision]
        if rates:  # older rows do not have it
            bare += f" A bare {precision} matmul ran at {min(rates)} to {max(rates)} Tflop/s next to {len(rates)} rows."
    lines += [
        "",
        "The ratio is the median over pairs of measurements taken one after the other, which need not be that of the "
        "two medians next to it; from the smallest to the largest of them.",
        "",
        f"{min(dates)} to {max(dates)}, load {min(loads)} to {max(loads)}. {'; '.join(machines)}.{bare}",
    ]
    return "\n".join(lines) + "\n"


def precision_of(row: dict) -> str:
    """What a row was measured in; older ones say it in their work alone."""
    return row.get("precision") or ("float32" if "float32" in row["work"] else "bf16")


def count_runs(row: dict) -> str:
    """How often both sides ran; of a side that ran once and stands in each pair, "1 + " how often the other did."""
    theirs = {str(pair["theirs"]) for pair in row["pairs"]}
    return f"{len(row['pairs'])}" if len(theirs) == len(row["pairs"]) else f"1 + {len(row['pairs'])}"


def is_met(row: dict) -> bool:
    return row["target"] is None or row["ratio"] >= row["target"] and row["agrees"]


def format_figure(row: dict, side: str) -> str:
    """Seconds, or megabytes with how many of them are anonymous."""
    _, scale, unit = KINDS[row["measure"]]
    figure = f"{scale * row[side]:,.3g} {unit}" if unit == "s" else f"{scale * row[side]:,.0f} {unit}"
    if row["measure"] == "memory":
        anonymous = statistics.median(pair[side]["anonymous"] for pair in row["pairs"])
        figure += f" (anonymous {scale * anonymous:,.0f})"
    return figure


def plot_ratios(results: dict, path: Path) -> None:
    """A bar for each row: the ratio, on a logarithmic axis, with a mark at its target."""
    from matplotlib import pyplot

    rows = [result for _, result in reversed(in_order(results))]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(rows)), layout="constrained")
    colors = ["C0" if is_met(row) else "C1" for row in rows]
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color=colors)
    for place, row in enumerate(rows):
        axes.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center")
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, [place - 0.45, place + 0.45], color="black")
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows])
    axes.set_xscale("log")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("theirs / ours; black: target; orange: not met")
    figure.savefig(path, format="svg")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
