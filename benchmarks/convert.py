"""Converting a 4 GB checkpoint, compared with diffusers loading and saving the same folder: time and peak memory.

    pip install -e '.[parity]' -c constraints.txt && python benchmarks/convert.py [--folder DIR] [--repeats 3]

The checkpoint is small but for its DiT, which has Lite's size in bf16 and random weights, in three shards. Every run
is a process of its own, and all run in turn. A run starts with the files in the page cache, and ends when what it wrote
is on the disk (the converter waits for that itself). Peak memory is the largest resident set of the process, mapped
files included. The table goes to benchmarks/results/convert.md.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import describe_machine

from kandinsky5.files import write_text

ROOT = Path(__file__).resolve().parent.parent
TESTS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

BUILD = """
import sys, torch
from diffusers import Kandinsky5Transformer3DModel
from pathlib import Path
from small_diffusers import build_small_pipeline, name_standard_tokenizer
folder, blocks = sys.argv[1:]
pipe = build_small_pipeline()
torch.set_default_dtype(torch.bfloat16)
lite = Kandinsky5Transformer3DModel(
    in_visual_dim=16, out_visual_dim=16, visual_cond=True, in_text_dim=64, in_text_dim2=32, time_dim=512,
    model_dim=1792, ff_dim=7168, num_text_blocks=2, num_visual_blocks=int(blocks), axes_dims=(16, 24, 24))
with torch.no_grad():
    for parameter in lite.parameters():
        parameter.normal_()
pipe.register_modules(transformer=lite)
pipe.save_pretrained(folder)
lite.save_pretrained(folder + "/transformer", max_shard_size="1500MB")
name_standard_tokenizer(Path(folder))
print(2 * sum(parameter.numel() for parameter in lite.parameters()))
"""

RUNS = {
    "diffusers: from_pretrained, save_pretrained": """
import sys, torch
from diffusers import DiffusionPipeline
from theirs import QwenTokenizer
tokenizer = QwenTokenizer.from_pretrained(sys.argv[1] + "/tokenizer")
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], tokenizer=tokenizer, torch_dtype=torch.bfloat16)
pipe.save_pretrained(sys.argv[2])
""",
    "weights_convert from-diffusers": """
import sys
from weights_convert.__main__ import main
sys.exit(main(["from-diffusers", sys.argv[1], sys.argv[2], "--quiet"]))
""",
    "weights_convert to-diffusers": """
import sys
from weights_convert.__main__ import main
sys.exit(main(["to-diffusers", sys.argv[3], sys.argv[2], "--quiet"]))
""",
}


def main() -> None:
    """Measure all three and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write about 12 GB (default: the temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--blocks", type=int, default=32, help="visual blocks (default: 32, as Lite has)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="RESULTS")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["PYTHONPATH"] = os.pathsep.join(TESTS)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, native, out = (f"{folder}/{name}" for name in ("diffusers", "native", "out"))
        nbytes = int(run(BUILD, source, str(options.blocks))["printed"])
        run(RUNS["weights_convert from-diffusers"], source, native)
        measured = {name: [] for name in RUNS}
        for _ in range(options.repeats):
            for name, code in RUNS.items():
                measured[name].append(run(code, source, out, native))
                shutil.rmtree(out)
    table = build_table(measured, nbytes, options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "convert.md", table)
    print(table)


def build_table(measured: dict[str, list[dict]], nbytes: int, options: argparse.Namespace) -> str:
    """Markdown, and below it where the figures come from; next to ours the ratio to diffusers of that turn."""
    lines = [
        f"| {nbytes / 1e9:.1f} GB DiT | s | GB/s | peak MB | times faster | from to | part of the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    theirs, *_ = measured.values()
    for name, runs in measured.items():
        seconds, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
        faster = [a["seconds"] / b["seconds"] for a, b in zip(theirs, runs, strict=True)]
        part = statistics.median(b["peak"] / a["peak"] for a, b in zip(theirs, runs, strict=True))
        compared = f"{statistics.median(faster):.2f} | {min(faster):.2f} to {max(faster):.2f} | {part:.3f}"
        lines.append(f"| {name} | {seconds:.1f} | {nbytes / seconds / 1e9:.2f} | {peak:,.0f} | {compared} |")
    machine = describe_machine(options.threads)
    return "\n".join([
        *lines,
        "",
        f"Medians of {options.repeats} turns, until all is on the disk. {machine['date']}, load {machine['load']}. "
        f"{machine['machine']}.",
        "",
    ])  # fmt: skip


def run(code: str, *arguments: str) -> dict:
    """Seconds, peak resident megabytes, and what was printed, of `code` in a Python of its own."""
    os.sync()  # so that no run waits for what an earlier one wrote
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {printed[-3000:]}")
    return {"seconds": seconds, "peak": usage.ru_maxrss / 1024, "printed": printed.splitlines()[-1]}


if __name__ == "__main__":
    main()
