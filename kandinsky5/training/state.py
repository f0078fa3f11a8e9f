"""A training run on disk: its state, from which it resumes exactly.

state.pt       everything in `Run`, in one file that is never half written
state-000120/  likewise, of several ranks (`state_folder.py`)
"""

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from kandinsky5.files import LARGEST, make_folder, replacing
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.training import state_folder
from kandinsky5.training.recipe import Recipe

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

Model = TypeVar("Model", bound=nn.Module)  # the same type in and out


@dataclass
class Run(Generic[Model]):
    """Everything a training run consists of."""

    folder: Path
    model: Model
    average: Model  # the same model with averaged weights
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    began_with: str  # digest of the initial weights where the recipe names their origin, else empty
    ranks: "Ranks | None" = None  # that train it together
    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)  # of each batch since the last row of the log
    skipped: int = 0  # steps, the last ones in a row, whose gradient was not finite

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return next(self.model.parameters()).device


def save(run: Run) -> None:
    """Write the state, completely or not at all; several ranks write it together (`state_folder.py`)."""
    values = {
        "step": run.step,
        "seconds": run.seconds,
        "rows": run.rows,
        "recipe": asdict(run.recipe),
        "began_with": run.began_with,
    }
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    if run.ranks:
        values["groups"] = [optimizer["param_groups"] for optimizer in optimizers]
        state_folder.write(run.folder, run.step, values, _tensors(run))
        return
    weights = {"model": run.model.state_dict(), "average": run.average.state_dict()}
    _write(values | weights | {"optimizers": optimizers}, run.folder / "state.pt")
    state_folder.remove_others(run.folder, run.folder / "state.pt")


def _tensors(run: Run) -> dict[str, Tensor]:
    """All tensors of a run: "model/NAME", "average/NAME", "optimizers/I/J/NAME" of the I-th one's J-th parameter."""
    found = {f"model/{name}": x for name, x in run.model.state_dict().items()}
    if run.average is not run.model:
        found |= {f"average/{name}": x for name, x in run.average.state_dict().items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            found |= {f"optimizers/{i}/{j}/{name}": x for name, x in values.items()}
    return found


def _sharded(run: Run) -> dict[str, Tensor]:
    """Like `_tensors`, those that are sharded; an optimizer has none yet, but they will be as its parameters are."""
    found = _tensors(run)
    for i, optimizer in enumerate(run.optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for j, parameter in enumerate(parameters):
            found |= {f"optimizers/{i}/{j}/{name}": parameter for name in ("exp_avg", "exp_avg_sq")}
    return {name: x for name, x in found.items() if hasattr(x, "full_tensor")}


def resume(run: Run) -> None:
    """Fill `run` from the state in its folder, if there is one; settle what autocast's dtype "auto" is.

    Raises ValueError if the state has another recipe or initial weights with another `digest`: it could not resume
    exactly. Checkpointing changes no result, and additional cycles begin where the last one ended.
    """
    path = state_folder.find(run.folder)
    state = _read(run.folder, run.device, _sharded(run)) if path else {}
    stored = _stored_recipe(state)
    if run.recipe.dtype == "auto":
        native = str(choose_dtype("auto", run.device)).removeprefix("torch.")
        run.recipe = replace(run.recipe, dtype=stored.get("dtype", native))
    if not state:
        return
    if "model" not in state:
        raise ValueError(f"{path} holds finished weights, not a run that can resume: choose another folder")
    saved = asdict(run.recipe) | stored  # states older than a field are accepted as they are
    differences = ", ".join(
        f"{name} {saved[name]}, not {value}"
        for name, value in asdict(run.recipe).items()
        if name not in ("checkpointing", "cycles", "origin") and saved[name] != value
    )
    if differences:
        raise ValueError(f"the run in {run.folder} has {differences}: resume with the same, or choose another folder")
    if state.get("began_with", "") != run.began_with:
        start = f"with what {state['recipe']['origin']} was then" if state.get("began_with") else "at random"
        raise ValueError(
            f"the run in {run.folder} began {start}, not with these weights: take those, or choose another folder"
        )
    assert path
    load_weights(run.model, state["model"], path)
    load_weights(run.average, state["average"], path)
    with _naming_damage(path):
        for optimizer, optimizer_state in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
    run.step, run.seconds, run.rows = state["step"], state["seconds"], state.get("rows", [])


def digest(model: nn.Module) -> str:
    """SHA-256, in hex, of the names and bytes of the model's weights."""
    sha256 = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha256.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def load_recipe(folder: str | Path) -> Recipe:
    """The recipe of the run in `folder`. Raises FileNotFoundError without a run, ValueError if it records none."""
    recipe = _stored_recipe(_read(folder, parts=()))
    if not recipe:
        raise ValueError(f"the run in {folder} records no recipe: run its stage once more, which writes it down")
    with _naming_damage(folder):
        return Recipe(**recipe)


def load_progress(folder: str | Path) -> tuple[int, float]:
    """Steps of the run in `folder` so far, and their seconds. Raises FileNotFoundError without a run."""
    state = _read(folder, parts=())
    if "step" not in state:
        raise ValueError(f"{folder} holds finished weights, not a run with steps: name the folder of the run")
    return state["step"], state["seconds"]


def load_average(model: Model, folder: str | Path, part: str = "") -> Model:
    """Fill `model` with the averaged weights of the run in `folder`; return it frozen, in eval mode.

    part: where `model` stands in what was trained, such as "qwen."; the rest is left. Raises FileNotFoundError without
    a run, ValueError if it trained another model.
    """
    average = _read(folder, parts=("model/", "average/"))["average"]
    weights = {name.removeprefix(part): x for name, x in average.items() if name.startswith(part)}
    return load_weights(model, weights, Path(folder)).eval().requires_grad_(False)


def load_weights(model: Model, weights: dict[str, Tensor], source: Path) -> Model:
    """`model` with these weights. Raises ValueError, naming their source, if names or shapes do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]  # of up to a hundred lines
        raise ValueError(f"{source} was written for another model: {first} Start another run, or remove it") from error
    return model


def save_average(model: nn.Module, folder: str | Path) -> None:
    """Write a finished model where `load_average` finds it."""
    make_folder(folder)
    _write({"average": model.state_dict()}, Path(folder) / "state.pt")


def _stored_recipe(state: dict) -> dict:
    """Fields of the recipe in a state; older ones have bf16, true or false, instead of dtype."""
    fields = dict(state.get("recipe", {}))
    if "bf16" in fields:
        fields["dtype"] = "bfloat16" if fields.pop("bf16") else "float32"
    return fields


def _read(
    folder: str | Path, device: torch.device | str = "cpu", sharded: Mapping[str, Tensor] | None = None,
    parts: tuple[str, ...] = ("model/", "average/", "optimizers/"),
) -> dict:  # fmt: skip
    """The newest state in a folder; of tensors that are `sharded` here (`_sharded`) only the share of this rank."""
    path, sharded = state_folder.find(Path(folder)), sharded or {}
    if path is None:
        raise FileNotFoundError(
            f"there is no {Path(folder) / 'state.pt'}: run the stage that trains it first (see the Makefile), or name "
            "a checkpoint such as nano"
        )
    with _naming_damage(path):
        if path.is_dir():
            state = _arrange(state_folder.read(path, sharded, parts, device))
        else:
            with zipfile.ZipFile(path) as archive:
                odd = [one for one in archive.infolist() if one.compress_type or one.filename.endswith(".pkl")]
                if sum(one.file_size for one in odd) > LARGEST or archive.testzip():  # checksums of all parts
                    raise ValueError
            state = torch.load(path, map_location="cpu" if sharded else device, weights_only=True, mmap=bool(sharded))
        check_state(state)
    return _cut(state, sharded) if sharded and path.is_file() else state


@contextlib.contextmanager
def _naming_damage(path: str | Path) -> Iterator[None]:
    """Inside, what a damaged state raises, which may be anything, becomes a ValueError; lack of memory does not."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) or isinstance(error, RuntimeError) and "allocate" in str(error):
            raise
        raise ValueError(
            f"{path} is damaged or not a run's state: remove it to start again, or choose another folder"
        ) from error


KINDS = {  # what a state holds; finished weights have the average alone, and older states not all of the rest
    "average": dict, "model": dict, "optimizers": list, "step": int, "seconds": int | float, "rows": list,
    "recipe": dict, "began_with": str,
}  # fmt: skip


def check_state(state: dict) -> None:
    """Raise an error of any kind unless the values have the kinds that a state has."""
    if "average" not in state or "model" in state and not {"step", "seconds", "optimizers"} <= state.keys():
        raise ValueError
    if not all(isinstance(state[name], kind) for name, kind in KINDS.items() if name in state):
        raise ValueError
    for name, x in (*state["average"].items(), *state.get("model", {}).items()):
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ValueError


def _arrange(state: dict) -> dict:
    """What a folder of ranks holds, as state.pt has it."""
    tensors: dict[str, Tensor] = state.pop("tensors")
    found: dict = {"model": {}, "average": {}}
    optimizers: list[dict] = [{"state": {}, "param_groups": groups} for groups in state.pop("groups")]
    for name, x in tensors.items():
        part, _, rest = name.partition("/")
        if part == "optimizers":
            i, j, which = rest.split("/")
            optimizers[int(i)]["state"].setdefault(int(j), {})[which] = x
        else:
            found[part][rest] = x
    found["average"] = found["average"] or found["model"]  # one process writes it twice where there is no average
    return state | found | {"optimizers": optimizers}


def _cut(state: dict, sharded: Mapping[str, Tensor]) -> dict:
    """A state of one process with this rank's share of what is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def cut(name: str, x: Tensor) -> Tensor:
        like = sharded.get(name, sharded.get(name.replace("average/", "model/", 1)))
        if not isinstance(like, DTensor):
            return x
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    for part in ("model", "average"):
        state[part] = {name: cut(f"{part}/{name}", x) for name, x in state[part].items()}
    for i, optimizer in enumerate(state["optimizers"]):
        for j, values in optimizer["state"].items():
            optimizer["state"][j] = {name: cut(f"optimizers/{i}/{j}/{name}", x) for name, x in values.items()}
    return state


def _write(state: dict, path: Path) -> None:
    """`torch.save`, completely or not at all. Raises OSError where the disk is full."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:
        raise OSError(f"cannot write {path} ({error}): free some disk space") from error
