"""Training on several ranks ends where one process ends, whatever they share, and resumes in any number.

What torchrun does when a rank ends is tried in test_launch_training.py.
"""

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from kandinsky5.config import DiTConfig
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.runtime.parallel import Ranks
from kandinsky5.training import clip_loss as clip_losses
from kandinsky5.training import curves, loop, spread, state, state_folder
from kandinsky5.training.clip_loss import Conditioning, clip_loss
from kandinsky5.training.data import Clips
from kandinsky5.training.flow import FlowTimes, flow_loss
from kandinsky5.training.folder import Clip
from kandinsky5.training.loop import generator
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.spread import own_rows
from random_weights import SMALL, randomise, relative_error
from ranks import on_ranks

CONFIG = replace(
    SMALL,
    dit=DiTConfig(
        dim=64, ff_dim=96, time_dim=32, num_text_blocks=1, num_visual_blocks=1, rope_axes=(4, 6, 6), text_dim=16,
        pooled_dim=24, visual_cond=True,
    ),
)  # fmt: skip
SIZES = [(4, 6), (6, 4)]  # of latents: two buckets


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven clips of 3 latent frames in two sizes, in the cache."""
    folder, random = tmp_path_factory.mktemp("cache"), generator([1])
    made, entries, texts = [], [], []
    for i in range(8):
        h, w = SIZES[i % 3 > 1]
        shapes = {"mean": (16, 3, h, w), "logvar": (16, 3, h, w), "first_mean": (16, 1, h, w)}
        shapes["first_logvar"] = shapes["first_mean"]
        entry = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        text = {"text": torch.randn(i % 4 + 2, 16, generator=random), "pooled": torch.randn(24, generator=random)}
        for tensors, places in ((entry, entries), (text, texts)):
            places.append(folder / f"{len(entries)}-{len(texts)}.safetensors")
            save_file(tensors, places[-1])
        made.append(Clip(f"{i}.mp4", hashlib.sha256(b"%d" % i).hexdigest(), None, 0.0, (8 * h, 8 * w), 9, 24, f"{i}"))
    save_file({"text": torch.randn(1, 16), "pooled": torch.randn(24)}, folder / "empty.safetensors")
    return Clips(tuple(made), {}, CONFIG, folder, tuple(entries), tuple(texts), folder / "empty.safetensors")


@dataclass(frozen=True)
class How:
    """How a run is trained; what changes no result comes last."""

    batch_size: int = 4
    accumulate: int = 2
    steps: int = 3
    ema: float = 0.9
    given: float = 0.5  # share of samples with their first frame
    stop_after: int | None = None
    sequence: int = 1
    shard: bool = False


def build() -> DiT:
    return randomise(DiT(CONFIG.dit)).requires_grad_(True)


def train(clips: Clips, folder: Path, how: How):
    """The averaged weights in one piece, and what was seen on the way; `folder` holds the run."""
    dit, average, ranks = build(), None, None
    if torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        ranks = Ranks(1, how.sequence, world // how.sequence, "cpu", how.shard)
    if how.shard:
        average = build()
        for model in (dit, average):
            spread_weights(model)
    recipe = Recipe(how.steps, 1e-2, warmup=2, ema=how.ema, accumulate=how.accumulate, dtype="float32", seed=3)
    loss = clip_loss(
        dit, clips, how.batch_size, FlowTimes(), Conditioning(0.3, how.given), how.accumulate,
        spread.own_rows(how.accumulate, ranks),
    )  # fmt: skip
    with mock.patch.object(curves, "plot_losses"):
        average = loop.train(
            dit, loss, recipe, folder, log_every=1, stop_after=how.stop_after, progress=False, ranks=ranks,
            average=average,
        )  # fmt: skip
    return {name: spread.whole(x) for name, x in average.state_dict().items()}


def spread_weights(model: DiT) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from kandinsky5.runtime.shard import shard

    shard(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def curve(folder: Path) -> dict[str, list[float]]:
    rows = curves.read_rows(folder / "loss.csv")
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name not in ("seconds",)}


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    """Runs in one process, by how they are trained: the folder and the averaged weights."""
    known = {}

    def run(how: How):
        if how not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[how] = folder, train(clips, folder, how)
        return known[how]

    return run


def check(clips, folder, alone, how: How, world: int) -> None:
    """The same curves and weights as one process."""
    expected, weights = alone(replace(how, sequence=1, shard=False))
    found = on_ranks(world, train, clips, folder, how)
    curves, expected_curves = curve(folder), curve(expected)
    assert curves.keys() == expected_curves.keys()
    for name, values in expected_curves.items():
        assert curves[name] == pytest.approx(values, rel=2e-5), name  # as the log has six digits
    for one in found:
        assert max(relative_error(x, weights[name]) for name, x in one.items()) < 2e-4  # AdamW enlarges rounding


@pytest.mark.parametrize(
    "world, how",
    [
        (2, How()),  # a batch for each
        pytest.param(4, How(), marks=pytest.mark.torchrun),  # half a batch for each
        (2, How(batch_size=3, accumulate=1)),  # two clips and one
        pytest.param(4, How(sequence=2), marks=pytest.mark.torchrun),
        (4, How(shard=True, sequence=2)),
    ],
)
def test_ranks_end_where_one_process_ends(clips, tmp_path, alone, world, how):
    check(clips, tmp_path, alone, how, world)


SHARED = How(shard=True)


@pytest.mark.torchrun
def test_several_resume_what_one_process_saved(clips, tmp_path, alone):
    train(clips, tmp_path, How(stop_after=1))
    assert (tmp_path / "state.pt").is_file()
    check(clips, tmp_path, alone, SHARED, 2)
    assert [path.name for path in tmp_path.glob("*state*")] == ["state-000003"]


def test_any_number_resumes_what_two_ranks_saved(clips, tmp_path, alone):
    on_ranks(2, train, clips, tmp_path / "4", replace(SHARED, stop_after=1))
    shutil.copytree(tmp_path / "4", tmp_path / "1")
    check(clips, tmp_path / "4", alone, How(), 4)
    weights = train(clips, tmp_path / "1", How())
    expected, right = alone(How())
    assert curve(tmp_path / "1")["loss"] == pytest.approx(curve(expected)["loss"], rel=2e-5)
    assert max(relative_error(x, right[name]) for name, x in weights.items()) < 2e-4
    average = state.load_average(DiT(CONFIG.dit), tmp_path / "4").state_dict()
    assert max(relative_error(x, right[name]) for name, x in average.items()) < 2e-4
    assert state.load_progress(tmp_path / "4")[0] == 3 and state.load_recipe(tmp_path / "4").seed == 3


@pytest.mark.parametrize("how", [pytest.param(How(), marks=pytest.mark.torchrun), SHARED])
def test_a_resumed_run_of_two_is_the_unbroken_one(clips, tmp_path, how):
    whole, _ = on_ranks(2, train, clips, tmp_path / "whole", how)
    for stop in (1, None):
        parts, _ = on_ranks(2, train, clips, tmp_path / "parts", replace(how, stop_after=stop))
    assert all(x.equal(parts[name]) for name, x in whole.items())


def sizes():
    """Bytes that this rank keeps of a sharded model, and which of its parameters are not in float32."""
    dit = build().to(torch.bfloat16)
    spread_weights(dit)
    kept = sum(p.to_local().nbytes for p in dit.parameters() if isinstance(p, DTensor))
    wide = {name for name, p in dit.named_parameters() if p.dtype == torch.float32}
    return (
        kept,
        sum(p.numel() * p.element_size() for p in dit.parameters()),
        wide,
        all(isinstance(p, DTensor) for p in dit.parameters()),
    )


def test_a_rank_keeps_its_share_of_the_bytes():
    found = on_ranks(4, sizes)
    islands = {
        f"{name}.{kind}" for name, m in DiT(CONFIG.dit).named_modules() if isinstance(m, Float32Linear)
        for kind in ("weight", "bias")
    }  # fmt: skip
    assert sum(kept for kept, *_ in found) == found[0][1]
    assert all(kept < 0.3 * whole and wide == islands and every for kept, whole, wide, every in found)


@pytest.fixture(scope="module")
def saved(clips, tmp_path_factory):
    """The state of two ranks after a step."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, train, clips, folder, How(stop_after=1))
    return folder


def save_on_a_full_disk(clips, folder):
    with mock.patch.object(torch, "save", side_effect=RuntimeError("unexpected pos")):
        with pytest.raises(OSError, match="free some disk space"):
            train(clips, folder, How(stop_after=1))


def test_a_full_disk_leaves_no_half_of_a_state(clips, tmp_path):
    on_ranks(1, save_on_a_full_disk, clips, tmp_path)
    assert not list(tmp_path.glob("*state*"))


def cut(data):
    return data[:-20]


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("place", ["values.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_state_of_ranks_is_refused(clips, saved, tmp_path, place, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "state-000001" / place
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="state-000001 is damaged"):
        train(clips, tmp_path, How())


def test_the_further_of_two_states_counts(clips, tmp_path):
    for step in (1, 2):
        train(clips, tmp_path / f"{step}", How(stop_after=step))
    ranks = tmp_path / "1" / "state-000001"
    ranks.mkdir()
    assert state_folder.find(tmp_path / "1") == ranks
    (tmp_path / "2" / "state-000001").mkdir()
    assert state_folder.find(tmp_path / "2") == tmp_path / "2" / "state.pt"


@pytest.mark.parametrize("data, accumulate, batch_size", [(2, 1, 1), (4, 2, 1), (6, 4, 2)])
def test_more_ranks_than_clips_are_refused(data, accumulate, batch_size):
    with pytest.raises(ValueError, match="--batch-size"):
        spread.check_shares(accumulate, batch_size, data)


# --- mistakes, each of which must be seen


def not_averaged(model):
    pass


def own_sum(predicted, target, loss_mask, elements=None):
    return flow_loss(predicted, target, loss_mask)


def first_rows(accumulate, ranks):
    return (0, own_rows(accumulate, ranks)[1])


def no_average(average, model, decay):
    pass


MISTAKES = {
    "gradients are not averaged": (spread, "average_gradients", not_averaged, How()),
    "a rank divides by its own mask": (clip_losses, "flow_loss", own_sum, How(batch_size=3, accumulate=1)),
    "all take the first rows": (spread, "own_rows", first_rows, How(accumulate=1)),
    "the average stays": (loop, "update_average", no_average, SHARED),
}


def train_wrongly(clips, folder, name):
    place, what, wrong, how = MISTAKES[name]
    with mock.patch.object(place, what, wrong):
        return train(clips, folder, how)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(clips, tmp_path, alone, name):
    how = MISTAKES[name][-1]
    expected, weights = alone(replace(how, shard=False))
    found = on_ranks(2, train_wrongly, clips, tmp_path, name)
    apart = max(relative_error(x, weights[n]) for one in found for n, x in one.items())
    losses = np.array(curve(tmp_path)["loss"]) / np.array(curve(expected)["loss"])
    assert apart > 1e-3 or abs(losses - 1).max() > 1e-3
