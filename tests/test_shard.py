"""Weights spread over ranks: each reads and keeps its rows, and the result is that of one process."""

import functools
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from image_golden import convert, load_pipeline
from kandinsky5 import Pipeline, checkpoint
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.runtime import memory, shard
from kandinsky5.runtime.compile import check_compile
from kandinsky5.runtime.parallel import Ranks, find_ranks
from kandinsky5.runtime.quantize import to_int8
from random_weights import SMALL, SMALL_DIT, relative_error, save_small_checkpoint
from ranks import on_ranks
from test_parallel import HEADS_4

CALL = {"num_frames": 5, "num_inference_steps": 2, "progress": False, "output_type": "float"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("native") / "small", replace(SMALL, dit=HEADS_4))


def sharded(folder, guidance, sequence, dtype, quantize=None):
    """A video, the bytes of this rank's weights, the dtypes of float32 layers, and what was read of the files."""
    read = []

    def counting(stored, own, dtype):
        read.append(stored.nbytes)
        return cast(stored, own, dtype)

    cast = checkpoint.cast
    with mock.patch.object(shard, "cast", counting):
        pipe = Pipeline.load(folder, dtype=dtype, quantize=quantize, ranks=Ranks(guidance, sequence, shard=True))
    models = (pipe.dit, pipe.text_encoder.qwen)
    own = sum(p.to_local().nbytes for m in models for p in m.parameters() if isinstance(p, DTensor))
    whole = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
    islands = {p.dtype for m in pipe.dit.modules() if isinstance(m, Float32Linear) for p in m.parameters()}
    videos = [pipe(["a fox", "a red fox in the snow"], **CALL) for _ in range(2)]
    skipping = {"conditional": [1.0], "unconditional": [1.0], "kept": 0.0}
    videos.append(pipe("a fox", step_skipping=skipping, **CALL))
    return videos, own, whole, islands, sum(read)


def alone(folder, dtype, quantize=None):
    pipe = Pipeline.load(folder, dtype=dtype, quantize=quantize)
    skipping = {"conditional": [1.0], "unconditional": [1.0], "kept": 0.0}
    return pipe(["a fox", "a red fox in the snow"], **CALL), pipe("a fox", step_skipping=skipping, **CALL)


@pytest.mark.parametrize(("guidance", "sequence"), [(2, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_keeps_its_share(saved, guidance, sequence, dtype):
    expected, skipped = alone(saved, dtype)
    world = guidance * sequence
    for videos, own, whole, islands, read in on_ranks(world, sharded, saved, guidance, sequence, dtype):
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        for video, result in zip(videos, (expected, expected, skipped), strict=True):
            assert math.sqrt(float((video - result).square().mean())) < tolerance
        assert own < 1.05 * whole / world + 4000  # shares of small weights are not equal
        assert islands == {torch.float32}
        assert read < 1.05 * whole / world + 4000 or dtype == torch.bfloat16  # which the file holds in float32


@pytest.mark.skipif(not shard.SPREADS_INT8, reason="this PyTorch spreads floating-point weights alone")
def test_int8_weights_are_shared_too(saved):
    expected, _ = alone(saved, torch.float32, "int8")
    for videos, own, whole, *_ in on_ranks(2, sharded, saved, 2, 1, torch.float32, "int8"):
        assert math.sqrt(float((videos[0] - expected).square().mean())) < 1e-6 and own < 1.05 * whole / 2 + 4000


def test_an_older_pytorch_refuses_int8_in_one_line(monkeypatch):
    monkeypatch.setattr(shard, "SPREADS_INT8", False)
    with pytest.raises(ValueError, match="int8") as refusal:
        shard.shard(to_int8(DiT(SMALL_DIT)), mesh=None)
    assert "\n" not in str(refusal.value)


def refusals(folder):
    ranks, lines = Ranks(2, 1, shard=True), []
    for option in ({"offload": "blocks"}, {"compile": True}):
        with pytest.raises(ValueError, match="shard") as refusal:
            Pipeline.load(folder, ranks=ranks, **option)
        lines.append(str(refusal.value))
    with pytest.raises(ValueError, match="cuda") as refusal:
        find_ranks(ranks, SMALL, torch.device("cuda"))
    lines.append(str(refusal.value))
    assert not check_compile("auto", torch.device("cuda"), sharded=True)
    return lines


def test_what_sharding_excludes_is_refused(saved):
    for lines in on_ranks(2, refusals, saved):
        assert all("\n" not in line for line in lines)


SKIPPING = {"conditional": [1.0] * 5, "unconditional": [1.2, 1.0, 1.1, 1.0, 1.3], "kept": 0.2}  # not in the same steps


def unlike(folder, ranks=None):
    """Videos where halves of the ranks could run other blocks: one pass skips a step, one rank has less memory."""
    pipe = Pipeline.load(folder, dtype=torch.float32, ranks=ranks and ranks())
    free = 10**12 if ranks is None or dist.get_rank() else 10**9
    needed = {"ONE_PASS": 0, "PIECE": 4, "dit_memory": lambda *given: 10**8 if given[3] else 10**10}
    with mock.patch.multiple(memory, free_memory=lambda device: free, **needed):
        videos = [pipe("a fox", **CALL)]
    with mock.patch.object(memory, "ONE_PASS", 0):
        return [*videos, pipe("a fox", step_skipping=SKIPPING, **CALL | {"num_inference_steps": 6})]


def test_ranks_that_share_weights_run_the_same_blocks(saved):
    expected = unlike(saved)
    for videos in on_ranks(2, unlike, saved, functools.partial(Ranks, 2, 1, shard=True)):
        for video, alone in zip(videos, expected, strict=True):
            assert math.sqrt(float((video - alone).square().mean())) < 1e-6


def wrong_rows(folder):
    """A rank that reads the first rows where it should read its own."""
    with mock.patch.object(shard, "own_rows", lambda count, mesh: slice(0, -(-count // mesh.size()))):
        pipe = Pipeline.load(folder, dtype=torch.float32, ranks=Ranks(2, 1, shard=True))
    return pipe(["a fox", "a red fox in the snow"], **CALL)


def test_rows_of_another_rank_change_the_video(saved):
    expected, _ = alone(saved, torch.float32)
    for video in on_ranks(2, wrong_rows, saved):
        assert float((video - expected).abs().max()) > 1e-2 or not torch.isfinite(video).all()


def sharded_image(folder):
    pipe = Pipeline.load(folder, dtype=torch.float32, ranks=Ranks(2, 1, shard=True))
    return pipe("a fox", height=32, width=48, num_inference_steps=2, output_type="float", progress=False)


def test_image_models_are_shared_too():
    folder = Path(convert("t2i").name) / "native"
    expected = load_pipeline("t2i")("a fox", height=32, width=48, num_inference_steps=2, output_type="float")
    for image in on_ranks(2, sharded_image, folder):
        assert relative_error(image, expected) < 1e-6
