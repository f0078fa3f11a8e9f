"""A run on disk: what it records, and what it refuses to resume from."""

import functools
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from kandinsky5.dit import DiT
from kandinsky5.training import curves, state, state_folder
from kandinsky5.training.recipe import Recipe
from tiny_training import TINY, tiny_run, train


def run(recipe: Recipe, folder, start: float = 1.0) -> None:
    """Two steps of a Linear."""
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, start)
    nn.init.zeros_(model.bias)
    loss = lambda seed: (model(torch.ones(1, 2)).sum(), {})  # noqa: E731
    train(model, loss, recipe, folder, stop_after=2, progress=False)


def edit(folder, change) -> None:
    """`change` the state of a run."""
    content = torch.load(folder / "state.pt")
    change(content)
    torch.save(content, folder / "state.pt")


def test_a_run_resumes_with_its_own_recipe_only(tmp_path):
    recipe = Recipe(steps=4, seed=3, dtype="float32")
    run(recipe, tmp_path)
    run(recipe, tmp_path)
    assert state.load_recipe(tmp_path) == recipe
    with pytest.raises(ValueError, match=r"steps 4, not 5, seed 3, not 0: "):
        run(Recipe(steps=5, dtype="float32"), tmp_path)


def test_a_run_keeps_the_precision_that_auto_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "choose_dtype", lambda dtype, device: torch.bfloat16)
    run(Recipe(4), tmp_path)
    assert state.load_recipe(tmp_path).dtype == "bfloat16"
    monkeypatch.setattr(state, "choose_dtype", lambda dtype, device: torch.float32)  # on another machine
    run(Recipe(4), tmp_path)
    assert state.load_recipe(tmp_path).dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype bfloat16, not float32"):
        run(Recipe(4, dtype="float32"), tmp_path)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_states_with_the_older_field_bf16_resume(tmp_path, bf16, dtype):
    run(Recipe(4, dtype=dtype), tmp_path)

    def change(content):
        del content["recipe"]["dtype"]
        content["recipe"]["bf16"] = bf16

    edit(tmp_path, change)
    assert state.load_recipe(tmp_path).dtype == dtype
    run(Recipe(4), tmp_path)
    with pytest.raises(ValueError, match=f"dtype {dtype}, not"):
        run(Recipe(4, dtype="float32" if bf16 else "bfloat16"), tmp_path)


def test_a_run_does_not_resume_from_other_weights(tmp_path):
    def begin(start: float, origin: str) -> None:
        run(Recipe(4, origin=origin), tmp_path / origin.split("/")[-1], start)

    for _ in range(2):
        begin(1.0, "one")
        begin(1.0, "./one")  # the same by another path
        begin(1.0, "")
        begin(2.0, "")  # random: any will do
    assert state.load_recipe(tmp_path / "one").origin == "one"
    with pytest.raises(ValueError, match="not with these weights"):
        begin(2.0, "one")

    def change(content):
        del content["recipe"]["origin"], content["began_with"]  # as before they were recorded

    edit(tmp_path / "one", change)
    with pytest.raises(ValueError, match="at random, not with these weights"):
        begin(1.0, "one")


@pytest.mark.parametrize("content", [b"", b"no state", b"half", b"a bit", b"foreign"])
def test_a_damaged_state_is_refused(tmp_path, content):
    tiny_run(tmp_path, stop_after=2)
    path = tmp_path / "state.pt"
    if content == b"foreign":
        torch.save(nn.Linear(1, 1), path)
    elif content == b"a bit":
        weight = torch.load(path)["average"]["visual_blocks.0.feed_forward.linear_in.weight"]
        whole = bytearray(path.read_bytes())
        whole[whole.index(weight.numpy().tobytes())] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(path.read_bytes()[:5000] if content == b"half" else content)
    for use in (tiny_run, state.load_recipe, functools.partial(state.load_average, DiT(TINY))):
        with pytest.raises(ValueError, match=r"state.pt is damaged"):
            use(tmp_path)


CHANGES = {
    "step": [None, "x"], "seconds": [None, "x"], "rows": [5], "recipe": [[1]], "model": [[1], {1: torch.ones(1)}],
    "average": [5, {"weight": 1}], "optimizers": [None, 7, [], [{}]],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, value) for field, values in CHANGES.items() for value in values])
def test_a_state_of_other_kinds_is_damaged(tmp_path, field, value):
    run(Recipe(4), tmp_path)
    edit(tmp_path, lambda content: content.pop(field) if value is None else content.update({field: value}))
    with pytest.raises(ValueError, match="is damaged"):
        run(Recipe(4), tmp_path)


def test_states_without_steps_and_with_foreign_recipes(tmp_path):
    state.save_average(nn.Linear(2, 1), tmp_path / "finished")
    with pytest.raises(ValueError, match="finished weights"):
        state.load_progress(tmp_path / "finished")
    run(Recipe(4), tmp_path)
    edit(tmp_path, lambda content: content["recipe"].update(colour="red"))
    with pytest.raises(ValueError, match="is damaged"):
        state.load_recipe(tmp_path)


def test_a_pickle_that_inflates_is_refused_before_it_is_read(tmp_path, monkeypatch):
    run(Recipe(4), tmp_path)
    whole = (tmp_path / "state.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(tmp_path / "state.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2 * state.LARGEST) if name.endswith("data.pkl") else old.read(name))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("it was inflated"))
    with pytest.raises(ValueError, match="is damaged"):
        run(Recipe(4), tmp_path)


class Code:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_of_ranks_runs_no_code(tmp_path):
    place = tmp_path / "state-000001"
    dcp.save({"model/a": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(place), no_dist=True)

    def sign() -> None:
        (place / "values.pt").unlink(missing_ok=True)
        digests = {path.name: state_folder.sha256(path) for path in place.iterdir()}
        torch.save({"step": 1, "seconds": 0, "groups": [], "digests": digests}, place / "values.pt")

    sign()
    assert state.load_average(nn.ParameterDict({"a": torch.zeros(2)}), tmp_path)["a"].tolist() == [1, 1]
    odd = (Code(tmp_path / "run"), {"a": (nn.Linear, 3)}, torch.distributed.checkpoint.FileSystemWriter)
    for pickled in (*map(pickle.dumps, odd), b"\x80\x02Nr\xff\xff\xff\xff."):  # the last asks for 64 GB
        (place / ".metadata").write_bytes(pickled)
        sign()
        with pytest.raises(ValueError, match="is damaged"):
            state.load_average(nn.ParameterDict({"a": torch.zeros(2)}), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    b"step;loss\n1;2\n", "step,loss\n1,é\n".encode("latin-1"), b"step,loss\n1," + b"9" * 200_000,
    b"step,loss\none,2\n", b"step,loss\n1,2,3\n", b"step,loss\n1,much\n",
])  # fmt: skip
def test_logs_that_other_programs_changed_are_named(tmp_path, content):
    (tmp_path / "loss.csv").write_bytes(content)
    with pytest.raises(ValueError, match="loss.csv"):
        curves.drop_rows_after(tmp_path / "loss.csv", 3)


def test_a_log_saved_with_a_byte_order_mark_goes_on(tmp_path):
    (tmp_path / "loss.csv").write_text("step,loss\n1,2\n9,3\n", encoding="utf-8-sig")
    curves.drop_rows_after(tmp_path / "loss.csv", 3)
    curves.append_row(tmp_path / "loss.csv", {"step": 2, "loss": 1.5})
    assert curves.read_rows(tmp_path / "loss.csv") == [{"step": "1", "loss": "2"}, {"step": "2", "loss": "1.5"}]


def test_a_state_too_large_for_memory_is_not_called_damaged(tmp_path, monkeypatch):
    tiny_run(tmp_path, stop_after=2)

    def full(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        tiny_run(tmp_path)


def test_finished_weights_do_not_resume_as_a_run(tmp_path):
    state.save_average(DiT(TINY), tmp_path)
    with pytest.raises(ValueError, match="finished weights"):
        tiny_run(tmp_path)


def test_a_file_instead_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="name a folder"):
            tiny_run(folder)


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    tiny_run(tmp_path, stop_after=2)
    before = (tmp_path / "state.pt").read_bytes()

    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*state.pt"):
        tiny_run(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"state.pt", "loss.csv", "loss.png"}


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    state.save_average(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} was written for another model") as caught:
        state.load_average(nn.Linear(2, 3), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_part_of_what_was_trained_is_loaded_alone(tmp_path):
    trained = nn.ModuleDict({"qwen": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    state.save_average(trained, tmp_path)
    assert state.load_average(nn.Linear(2, 3), tmp_path, "qwen.").weight.equal(trained["qwen"].weight)
    with pytest.raises(ValueError, match=f"{tmp_path} was written for another model"):
        state.load_average(nn.Linear(2, 3), tmp_path, "head.")


def test_a_recipe_that_was_not_recorded_is_not_made_up(tmp_path):
    state.save_average(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="records no recipe"):
        state.load_recipe(tmp_path)


def test_a_run_leaves_its_averaged_weights(tmp_path):
    model, average = tiny_run(tmp_path)
    left = state.load_average(DiT(TINY), tmp_path).state_dict()
    assert all(weight.equal(left[name]) for name, weight in average.state_dict().items())
    assert not all(weight.equal(left[name]) for name, weight in model.state_dict().items())
