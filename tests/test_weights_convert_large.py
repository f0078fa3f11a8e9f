"""A bf16 DiT of Lite's size goes native and back: the same bytes, bounded memory. `pytest -m large`, 20 GB of disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kandinsky5.config import LITE
from kandinsky5.files import write_json
from kandinsky5.runtime.quantize import quantise
from kandinsky5.tensor_files import Stored, read_safetensors
from weights_convert import tables
from weights_convert.match import describe_model
from weights_convert.read import read_weights
from weights_convert.sizes import to_their_config
from weights_convert.write import Part, plan_shards, verify_shard, write_index

pytestmark = pytest.mark.large
SHARD = 1_500_000_000
RUN = """
import sys
from weights_convert.__main__ import main
status = main()
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def test_lite_goes_native_and_back_in_bounded_memory(tmp_path):
    source = tmp_path / "transformer"
    largest = write_random_lite(source)
    limit = largest + 500e6
    options = ["--only", "dit", "--verify", "--quiet"]
    run_below(limit, "from-diffusers", source, tmp_path / "native", *options)
    run_below(limit, "to-diffusers", tmp_path / "native", tmp_path / "back", *options, "--max-shard-size", str(SHARD))
    run_below(limit, "from-diffusers", source, tmp_path / "fp32", *options, "--dtype", "fp32")
    run_below(500e6, "from-diffusers", source, tmp_path / "int8", *options, "--dtype", "int8")
    int8 = read_safetensors(tmp_path / "int8" / "dit.safetensors").tensors
    assert sum(stored.nbytes for stored in int8.values()) < 0.63 * sum(
        s.nbytes for s in read_weights(source).tensors.values()
    )
    name = "visual_blocks.31.feed_forward.linear_out"
    weight = read_weights(source).tensors[tables.theirs("dit", f"{name}.weight")].read()
    assert all(
        x.equal(int8[f"{name}.{kind}"].read()) for kind, x in zip(("weight", "scale"), quantise(weight), strict=True)
    )

    back = tmp_path / "back" / "transformer"
    assert len(list(source.glob("*.safetensors"))) == len(list(back.glob("*.safetensors"))) == 3
    before, after = read_weights(source), read_weights(back)
    assert before.tensors.keys() == after.tensors.keys()
    for name, stored in before.tensors.items():
        pairs = zip(stored.chunks(), after.tensors[name].chunks(), strict=True)
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)
    verify_shard(tmp_path / "native" / "dit.safetensors")


def write_random_lite(folder: Path) -> int:
    """Three shards of random bf16 and their index; returns the bytes of the largest tensor."""
    folder.mkdir()
    write_json(folder / "config.json", to_their_config("dit", LITE))
    shapes, _ = describe_model("dit", LITE, "Lite")
    names = {tables.theirs("dit", name): shape for name, shape in shapes.items()}
    tensors = {name: Stored(folder, 0, 0, shape, "BF16") for name, shape in names.items()}
    part = Part("diffusion_pytorch_model", tensors, dict.fromkeys(names, "BF16"), {})
    shards = plan_shards(part, SHARD)
    for file, inside in shards.items():
        save_file({name: torch.randn(names[name], dtype=torch.bfloat16) for name in inside}, folder / file)
    write_index(folder, part, shards)
    return max(part.nbytes(name) for name in names)


def run_below(limit: float, *arguments) -> None:
    """Run the converter; its peak resident memory, mapped files included, must stay below `limit` bytes."""
    result = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split()[-2]) * 1024
    print(f"{' '.join(map(str, arguments))}: peak {peak / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
    assert peak < limit
