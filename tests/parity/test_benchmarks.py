"""The scripts in benchmarks/ run, and what they report is what happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("compare")


def test_every_row_runs_and_both_sides_agree(tmp_path, compare):
    """At toy size, in about a minute; exit code 0 says that every result agrees with the reference's."""
    command = [sys.executable, BENCHMARKS / "compare.py", "--tiny", "--repeats", "1", "--threads", "1"]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "compare.json").read_text())
    assert list(results) == [row.name for row in compare.ROWS]
    for name, result in results.items():
        assert result["ours"] > 0 and result["theirs"] > 0, name
        assert f"| {result['work']} | " in (tmp_path / "compare.md").read_text()


def test_a_different_result_is_reported(tmp_path, compare, monkeypatch, capsys):
    def different(side, tiny, folder):
        return lambda: torch.ones(5) + (0.1 if side == "ours" else 0)

    row = compare.Row("different", "a mistake", different, target=None, tolerance=1e-2)
    monkeypatch.setattr(compare, "ROWS", [row])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--tiny", "--repeats", "1", "--threads", "1"])
    with pytest.raises(SystemExit, match="different"):
        compare.main()
    assert "1.0e-01 **too large**" in capsys.readouterr().out


def test_theirs_is_run_once_where_it_takes_minutes(compare, monkeypatch, capsys):
    runs = {"ours": 0, "theirs": 0}

    def slow(side, tiny, folder):
        def run():
            runs[side] += 1
            return torch.ones(5)

        return run

    row = compare.Row("slow", "flex", slow, target=None, tolerance=1e-2, once=True)
    monkeypatch.setattr(compare, "ROWS", [row])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--tiny", "--repeats", "3", "--threads", "1"])
    compare.main()
    assert runs == {"ours": 1 + 3, "theirs": 1}


def test_table_shows_the_spread_and_which_targets_are_met(compare, monkeypatch):
    def result(work, target, ratios, error=None, agrees=True, once=False):
        pairs = [{"ours": {"seconds": 1 + i}, "theirs": {"seconds": 1 + i * (not once)}} for i in range(len(ratios))]
        figures = {"ours": 1.0, "theirs": 1.0, "ratio": sorted(ratios)[1], "spread": [min(ratios), max(ratios)]}
        said = {"error": error, "agrees": agrees, "tiny": False, "machine": "here", "date": "today 12:00", "load": 0}
        return {"work": work, "measure": "time", "target": target, "pairs": pairs, **figures, **said}

    rows = [
        compare.Row(name, "", None, target, None) for name, target in (("dit", 1.6), ("nabla", 12), ("encode", 1.1))
    ]
    monkeypatch.setattr(compare, "ROWS", rows)
    results = {"dit": result("first", 1.6, [1.5, 1.7, 1.65]), "nabla": result("second", 12, [10, 13, 11.9], once=True)}
    results["encode"] = result("third", 1.1, [2, 2, 2], 0.5, agrees=False) | {"matmul": 0.42}
    emulated = {"machine": "here restricted to AVX2", "precision": "float32", "share": 0.75}
    results["dit@avx2"] = result("fourth", 1.6, [1.5, 1.5, 1.5]) | emulated
    table = compare.build_table(results)
    assert "| first | bf16 | as it is | 1 s | 1 s | 1.65 | 1.50 to 1.70 |  | 3 | 1.6 | met |  | today |" in table
    assert "1 s | 1 s | 11.90 | 10.00 to 13.00 |  | 1 + 3 | 12 | **not met** |  | today |" in table
    assert "3 | 1.1 | **not met** | 5.0e-01 **too large** |" in table  # however fast
    assert "| fourth | float32 | AVX2 | 1 s | 1 s | 1.50 | 1.50 to 1.50 | 0.75 | 3 | 1.6 | **not met** |" in table
    assert table.endswith("A bare bf16 matmul ran at 0.42 to 0.42 Tflop/s next to 1 rows.\n")


def test_block_sparse_memory_grows_linearly(tmp_path):
    """From 16k to 32k and 64k tokens: twice as many more take twice as much more; of the definition, four times.

    glibc is told to give back what is freed: else it keeps 8 MB more at times.
    """
    growth, environment = [], {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    for method, tokens in (("block-sparse", ["16384", "32768", "65536"]), ("dense", ["1024", "2048", "4096"])):
        command = [sys.executable, BENCHMARKS / "growth.py", "--threads", "1", "--methods", method, "--out", tmp_path]
        run = subprocess.run([*command, "--tokens", *tokens], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        peaks = [figures["peak"] for figures in json.loads((tmp_path / "growth.json").read_text())[method].values()]
        growth.append((peaks[2] - peaks[1]) / (peaks[1] - peaks[0]))
    assert 1.5 < growth[0] < 2.5 and growth[1] > 3.3, growth
    assert "| exponent |" in (tmp_path / "growth.md").read_text()


@pytest.mark.parametrize(("limit", "said"), [("--seconds=0.01", "over 0.01 s"), ("--memory=0.1", "over 0.1 GB")])
def test_what_takes_too_long_or_too_much_is_stopped(tmp_path, limit, said):
    command = [sys.executable, BENCHMARKS / "growth.py", "--threads", "1", "--methods", "dense", limit]
    run = subprocess.run([*command, "--tokens", "4096", "8192", "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"| 4,096 | {said} | {said} |\n| 8,192 | {said} | {said} |" in (tmp_path / "growth.md").read_text()


def test_converting_is_compared(tmp_path):
    command = [sys.executable, BENCHMARKS / "convert.py", "--blocks", "1", "--repeats", "1", "--threads", "1"]
    run = subprocess.run(
        [*command, "--folder", tmp_path, "--out", tmp_path / "results"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    head, _, theirs, *ours = (tmp_path / "results" / "convert.md").read_text().splitlines()[:5]
    assert head.startswith("| 0.3 GB DiT |") and "| 1.00 | 1.00 to 1.00 | 1.000 |" in theirs
    for name, line in zip(("from-diffusers", "to-diffusers"), ours, strict=True):
        assert line.startswith(f"| weights_convert {name} | ") and float(line.split(" | ")[-1].strip(" |")) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_memory_is_what_was_allocated(tmp_path, compare, monkeypatch):
    """64 MB that are freed before the end, next to 32 MB that were there before."""
    before = torch.ones(8 * 2**20)

    def allocate(side, tiny, folder):
        return lambda: torch.ones(16 * 2**20).sum() + before[0]

    monkeypatch.setattr(compare, "ROWS", [compare.Row("allocate", "", allocate, None, None, "memory")])
    compare.run_alone("allocate", "ours", str(tmp_path), str(tmp_path / "measured.pt"), tiny=True)
    peak = torch.load(tmp_path / "measured.pt")["peak"]
    assert 60 * 2**20 <= peak < 72 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_the_matmuls_have_as_many_operations_as_the_dit(tmp_path, compare):
    """Counted by hand from the layers: two for each weight and token, four for each pair of tokens and channel."""
    rows = sys.modules["rows"]
    work = rows.dit_matmul_share("theirs", tiny=True, folder=tmp_path)
    with FlopCounterMode(display=False) as counter:
        work()
    config, L, S = rows.TINY_DIT, 2 * 4 * 6, rows.TEXT_TOKENS
    dim, ff, vec = config.dim, config.ff_dim, config.time_dim
    attention, feed_forward = 4 * dim**2, 2 * dim * ff
    visual = L * (attention + 2 * dim**2 + feed_forward) + S * 2 * dim**2 + 9 * dim * vec + 2 * L * (L + S) * dim
    text = S * (attention + feed_forward) + 6 * dim * vec + 2 * S**2 * dim
    ends = L * (4 * 33 * dim + dim * 4 * 16) + S * config.text_dim * dim + 2 * dim * vec
    ends += config.pooled_dim * vec + dim * vec + vec**2
    expected = 2 * (config.num_visual_blocks * visual + config.num_text_blocks * text + ends)
    assert abs(counter.get_total_flops() - expected) <= 64**3  # half a matmul


@pytest.mark.parametrize("stages, code", [(1, 0), (3, 1)])
def test_a_side_that_fails_says_why_and_the_others_go_on(stages, code, tmp_path, monkeypatch):
    """Without diffusers, and with a kernel that does not fit: 8 warps and one stage, or our own choice, three."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu, plain = __import__("gpu"), flex_attention.flex_attention

    def run(*tensors, kernel_options, **how):
        if kernel_options["fwd_num_stages"] == stages and (stages > 1 or kernel_options["fwd_num_warps"] == 8):
            raise RuntimeError("backend raised:\nNo valid configs. out of resource: shared memory | Required: 114688")
        return plain(*tensors, **how)

    monkeypatch.setattr(flex_attention, "flex_attention", run)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    command = ["gpu.py", "--tiny", "--repeats", "1", "--out", str(tmp_path), "--rows", "flex-64", "decode-sd"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == code
    flex, decode = (row["sides"] for row in json.loads((tmp_path / "gpu.json").read_text()).values())
    failed = {side for side, got in flex.items() if "114688" in got.get("failed", "")}
    assert failed == (
        {"8 warps, 1 stage"} if stages == 1 else {"ours", "4 warps, 3 stages (ours)", "8 warps, 3 stages"}
    )
    assert all(got["seconds"] > 0 for side, got in flex.items() if side not in failed)
    assert decode["ours"]["seconds"] > 0 and "accelerate" in decode[gpu.THEIRS]["failed"]
    assert len({line.count("|") for line in lines_of(tmp_path)}) == 1


def lines_of(folder: Path) -> list[str]:
    """The lines of the table that gpu.py wrote."""
    return [line for line in (folder / "gpu.md").read_text().splitlines() if line.startswith("|")]


def test_the_table_of_skipped_steps_has_a_row_for_each_setting(tmp_path):
    command = [sys.executable, BENCHMARKS / "magcache.py", "--clips", "1", "--rounds", "1", "--threads", "1"]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    table = (tmp_path / "magcache.md").read_text()
    assert "| 50 steps | 50 | 1.00 |" in table and table.count("\n| threshold ") == 5


def test_rows_of_a_gpu_run_at_toy_size_on_a_cpu(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--blocks", "1", "--repeats", "1", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    sides = [side for row in results.values() for side in row["sides"].values()]
    assert len(results) == 12 and len(sides) == 35 and all(side["seconds"] > 0 for side in sides)
    assert (tmp_path / "gpu.md").read_text().count("toy sizes: no figures to keep") == 1
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0 and "ours 0" not in again.stdout
