"""LoRA (arXiv 2106.09685): low-rank updates of a finished DiT's Linears, W' = W + weight · alpha / rank · B A.

    updates = lora.load("camera.safetensors")   # the authors', diffusers', kohya's or our layout
    lora.add(dit, updates, weight=0.8)          # next to the Linears; lora.remove(dit, updates) takes them off again
    lora.merge(dit, updates, weight=0.8)        # or into the weights, once and for all

An update is a forward hook of its Linear, so the Linear may be of any kind: offloaded, quantised, compiled, computed in
float32. The DiT's own parameters and state_dict stay as they are. Others' names of tensors are known to
`weights_convert/lora.py`.
"""

import hashlib
import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky5.checkpoint import save_weights, without_weights
from kandinsky5.config import DiTConfig
from kandinsky5.dit import DiT, Float32Linear
from kandinsky5.runtime.device import plain_defaults
from kandinsky5.runtime.offload import find_place
from kandinsky5.screen import listed, shown

# The ten Linears of each block that the released LoRAs update.
MODULES = r"(text|visual)_blocks\.\d+\.(self_attention|cross_attention|feed_forward)\."


class Update(nn.Module):
    """The update of one Linear: x (…, in) → scale · B A x (…, out), in the precision of the Linear's result."""

    def __init__(self, A: Tensor, B: Tensor, alpha: float):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)  # (rank, in), (out, rank)
        self.alpha = alpha
        self.weight = 1.0  # what the user gives to the whole LoRA

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.weight * self.alpha / len(self.A)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x, A, B = (tensor.to(dtype) for tensor in (x, self.A, self.B))
        with torch.autocast(x.device.type, enabled=False):  # float32 layers are to stay so in training
            return self.scale * F.linear(F.linear(x, A), B)

    def after(self, linear: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        """The forward hook: adds the update to the Linear's output (…, out)."""
        return out + self(inputs[0], out.dtype)


class LoRA(nn.Module):
    """Updates by the names of their Linears. The native layout stores its state_dict, `NAME.A` and `NAME.B`."""

    def __init__(self, updates: Mapping[str, Update], name: str = "", trigger: str = ""):
        super().__init__()
        self.name, self.trigger, self.before_prompt, self.fingerprint = name, trigger, "", ""
        for path, update in updates.items():
            place: nn.Module = self
            *parents, last = path.split(".")
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, update)

    def updates(self) -> Iterator[tuple[str, Update]]:
        """Name of the Linear and its update, one after the other."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Update))

    def set_weight(self, weight: float) -> None:
        """Multiply all updates by `weight` from now on; 0 turns them off. Raises ValueError for no finite number."""
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not abs(weight) <= sys.float_info.max:
            raise ValueError(f"weight {shown(weight)} of the LoRA {self.name}: give a finite number, such as 0.8")
        for _, update in self.updates():
            update.weight = float(weight)


def fingerprint(lora: LoRA) -> str:
    """SHA-256 of names, alphas and values as they are stored, the same in every layout."""
    digest = hashlib.sha256()
    for name, update in sorted(lora.updates(), key=lambda item: item[0]):
        digest.update(repr((name, update.alpha, str(update.A.dtype))).encode())
        for factor in (update.A, update.B):
            digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@plain_defaults()
def create(dit: DiT, rank: int, alpha: float, modules: str = MODULES) -> LoRA:
    """A new LoRA in float32, to be trained: A random, B zero, so that it changes nothing yet.

    modules: a regular expression that is searched in the Linears' names. Raises ValueError if it matches none, and for
    a rank that no Linear has.
    """
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise ValueError(f"modules {modules!r} is no regular expression ({error})") from error
    linears = {name: linear for name, linear in dit.named_modules() if is_linear(linear) and pattern.search(name)}
    if not linears:
        raise ValueError(f"modules {modules!r} matches none of the DiT's Linears, such as visual_blocks.0.feed_forward")
    widest = min(min(linear.in_features, linear.out_features) for linear in linears.values())
    if not 1 <= rank <= widest:
        raise ValueError(f"rank {rank}: give 1 to {widest}, the width of the narrowest of these Linears")
    device, updates = find_place(dit)[0], {}
    for name, linear in linears.items():
        A = torch.empty(rank, linear.in_features, device="cpu").uniform_(-1, 1) / linear.in_features**0.5
        updates[name] = Update(A.to(device), torch.zeros(linear.out_features, rank, device=device), alpha)
    return LoRA(updates)


def load(path: str | Path | LoRA) -> LoRA:
    """Read a LoRA, file or folder, in any layout that `weights_convert/lora.py` knows, on the CPU and frozen.

    Raises ValueError, in one line, for anything else and for factors that do not belong together.
    """
    if isinstance(path, LoRA):
        return path
    from weights_convert.lora import read  # which knows other people's names

    if not isinstance(path, (str, Path)):
        raise ValueError(f"LoRA {shown(path)}: give the path of its file or folder")
    file = read(Path(path))
    updates = {name: Update(pair.A, pair.B, pair.alpha) for name, pair in file.pairs.items()}
    lora = LoRA(updates, file.name, file.metadata.get("trigger", "")).eval().requires_grad_(False)
    lora.fingerprint = fingerprint(lora)
    return lora


def open_all(options: Iterable[Mapping[str, Any]], config: DiTConfig) -> list[LoRA]:
    """The LoRAs of options with a `file` each. Raises ValueError, before any weights of the model are loaded."""
    loras = [load(option["file"]) for option in options]
    if loras:
        with without_weights():
            dit = DiT(config)
        for lora in loras:
            check_fit(dit, lora)
    return loras


def set_weights(loras: list[LoRA], weight: float | Sequence[float]) -> None:
    """Give all LoRAs one weight, or each its own. Raises ValueError for too many or too few."""
    weights = weight if isinstance(weight, (list, tuple)) else [weight] * len(loras)
    if len(weights) != len(loras):
        raise ValueError(f"{len(weights)} weights for {len(loras)} LoRAs: give one number, or one for each")
    for lora, its_weight in zip(loras, weights, strict=True):
        lora.set_weight(its_weight)


def save(lora: LoRA, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file in the native layout; metadata: what it should say besides alphas and trigger."""
    from weights_convert.lora import describe_alphas

    alphas = {name: update.alpha for name, update in lora.updates()}
    own = {"trigger": lora.trigger} if lora.trigger else {}
    state = {name: tensor.detach().cpu() for name, tensor in lora.state_dict().items()}
    save_weights(state, Path(path), {"format": "pt", **metadata, **own, **describe_alphas(alphas)})


def export(file: Path, folder: Path) -> None:
    """Write a LoRA in the authors' layout, `folder`/official, and diffusers', `folder`/diffusers.safetensors."""
    from weights_convert.lora import read, write

    found = read(file)
    write(found, folder / "official", "official")
    write(found, folder / "diffusers.safetensors", "diffusers")


def check_fit(dit: DiT, lora: LoRA) -> None:
    """Raise ValueError that names the Linears which this DiT does not have, or has in another size."""
    modules, unknown, other = dict(dit.named_modules()), [], []
    for name, update in lora.updates():
        linear, size = modules.get(name), (update.A.shape[1], update.B.shape[0])
        if not is_linear(linear):
            unknown.append(name)
        elif (linear.in_features, linear.out_features) != size:  # type: ignore[union-attr]
            other.append(f"{name} is {linear.in_features} → {linear.out_features} here and {size[0]} → {size[1]} there")  # type: ignore[union-attr]
    if unknown or other:
        problems = [f"{name} is not here" for name in unknown] + other
        raise ValueError(
            f"the LoRA {lora.name} is for another model ({listed(problems, 3)}): "
            "see which with python -m weights_convert inspect"
        )


def is_linear(module: nn.Module | None) -> bool:
    """Whether the module is a Linear of any kind, quantised ones included."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def add(
    dit: DiT, lora: LoRA, weight: float = 1.0, dtype: torch.dtype | None = None, trigger: bool = True
) -> LoRA:  # fmt: skip
    """Let `dit` compute with the updates, moved to its device, until `remove`; returns `lora`.

    dtype: of the factors; by default the DiT's, and float32 next to its float32 layers. Training keeps them in float32.
    trigger: whether the pipeline is to put the LoRA's phrase before prompts.
    Raises ValueError where `check_fit` does.
    """
    check_fit(dit, lora)
    if lora in vars(dit).get("loras", {}):
        raise ValueError(
            f"the LoRA {lora.name} is loaded already: give it another weight, set_lora, or unload it first"
        )
    device, own = find_place(dit)
    lora.set_weight(weight)
    lora.before_prompt = f"{lora.trigger.rstrip()} " if lora.trigger and trigger else ""
    handles = []
    for name, update in lora.updates():
        linear = dit.get_submodule(name)
        update.to(device, dtype or (torch.float32 if isinstance(linear, Float32Linear) else own))
        handles.append(linear.register_forward_hook(update.after))
    vars(dit).setdefault("loras", {})[lora] = handles
    _compile_anew(dit)
    return lora


def remove(dit: DiT, lora: LoRA) -> None:
    """Undo `add`: the DiT computes as before."""
    for handle in vars(dit)["loras"].pop(lora):
        handle.remove()
    _compile_anew(dit)


def _compile_anew(dit: DiT) -> None:
    """torch.compile does not notice hooks by itself."""
    if any(module._compiled_call_impl for module in dit.modules()):
        torch.compiler.reset()


@torch.no_grad()
def merge(dit: DiT, lora: LoRA, weight: float = 1.0) -> None:
    """Add the updates to the weights themselves, which cannot be undone: computed in float32, rounded once.

    Raises ValueError where `check_fit` does, and for weights that rest (offload) or are quantised.
    """
    check_fit(dit, lora)
    linears = {name: dit.get_submodule(name) for name, _ in lora.updates()}
    if fixed := [n for n, linear in linears.items() if linear.weight.is_meta or not linear.weight.is_floating_point()]:  # type: ignore[operator]
        raise ValueError(
            f"cannot merge into weights that are offloaded or quantised ({listed(fixed, 1)}): add the LoRA instead, or "
            "merge it into the checkpoint, python -m weights_convert merge-lora"
        )
    lora.set_weight(weight)
    for name, update in lora.updates():
        old = linears[name].weight
        old.copy_(merged(old, update.A.to(old.device), update.B.to(old.device), update.scale))  # type: ignore[arg-type, operator]


def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale · B A, (out, in), in float32 at least; W (out, in) and B (out, rank) may be some rows of the whole."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) + scale * (B.to(dtype) @ A.to(dtype))
