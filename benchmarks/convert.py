"""Converting a 4 GB checkpoint, beside diffusers loading and saving the same folder: time and peak memory.

    pip install '.[parity]' -c constraints.txt && python benchmarks/convert.py [--folder DIR] [--repeats 3]

The checkpoint is small but for its DiT, which has Lite's size in bf16 and random weights, in three shards. Every run
is a process of its own; all runs start with the files in the page cache, and none waits for the disk at the end.
Peak memory is the largest resident set of the process, mapped files included.
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

ROOT = Path(__file__).parent.parent
TESTS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

BUILD = """
import sys, torch
from diffusers import Kandinsky5Transformer3DModel
from pathlib import Path
from small_diffusers import build_small_pipeline, name_standard_tokenizer
pipe = build_small_pipeline()
torch.set_default_dtype(torch.bfloat16)
lite = Kandinsky5Transformer3DModel(
    in_visual_dim=16, out_visual_dim=16, visual_cond=True, in_text_dim=64, in_text_dim2=32, time_dim=512,
    model_dim=1792, ff_dim=7168, num_text_blocks=2, num_visual_blocks=32, axes_dims=(16, 24, 24))
with torch.no_grad():
    for parameter in lite.parameters():
        parameter.normal_()
pipe.register_modules(transformer=lite)
pipe.save_pretrained(sys.argv[1])
lite.save_pretrained(sys.argv[1] + "/transformer", max_shard_size="1500MB")
name_standard_tokenizer(Path(sys.argv[1]))
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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write about 12 GB (default: the temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, native, out = (f"{folder}/{name}" for name in ("diffusers", "native", "out"))
        run(BUILD, source)
        run(RUNS["weights_convert from-diffusers"], source, native)
        measured = {name: [] for name in RUNS}
        for _ in range(options.repeats):
            for name, code in RUNS.items():
                measured[name].append(run(code, source, out, native))
                shutil.rmtree(out)
    nbytes = 2 * 2_007_702_848
    print(f"| {nbytes / 1e9:.1f} GB DiT, {os.cpu_count()} cores, median of {options.repeats} | s | GB/s | peak MB |")
    print("|---|---|---|---|")
    for name, runs in measured.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {name} | {seconds:.1f} | {nbytes / seconds / 1e9:.2f} | {peak:,.0f} |")


def run(code: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident megabytes of `code` in a Python of its own."""
    os.sync()  # so that no run waits for what an earlier one wrote
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(TESTS)}
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {errors[-3000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
