"""The scripts in benchmarks/ run, and what they report is what happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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

    row = compare.Row("different", "a mistake", different, wanted=None, tolerance=1e-2)
    monkeypatch.setattr(compare, "ROWS", [row])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--tiny", "--repeats", "1", "--threads", "1"])
    with pytest.raises(SystemExit, match="different"):
        compare.main()
    assert "1.0e-01 **too large**" in capsys.readouterr().out


def test_memory_is_what_was_allocated(tmp_path, compare, monkeypatch):
    """64 MB that are freed before the end, beside 32 MB that were there before."""
    before = torch.ones(8 * 2**20)

    def allocate(side, tiny, folder):
        return lambda: torch.ones(16 * 2**20).sum() + before[0]

    monkeypatch.setattr(compare, "ROWS", [compare.Row("allocate", "", allocate, None, None, "memory")])
    compare.run_alone("allocate", "ours", str(tmp_path), str(tmp_path / "measured.pt"), tiny=True)
    peak = torch.load(tmp_path / "measured.pt")["peak"]
    assert 64 * 2**20 <= peak < 72 * 2**20, f"{peak / 2**20:.1f} MiB"


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
