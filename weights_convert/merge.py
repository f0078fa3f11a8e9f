"""LoRAs merged into a checkpoint: W' = W + Σ weight · alpha / rank · B A, some rows at a time, rounded once."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from kandinsky5.checkpoint import find_checkpoint, find_part, find_weights, models_of, without_weights
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import load_config, save_config
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.screen import listed
from kandinsky5.tensor_files import CHUNK, FLOATS, Stored, Weights
from weights_convert.diffusers_files import TOKENIZERS
from weights_convert.write import Options, Part, list_files, write_folder


@dataclass(frozen=True)
class Merged(Stored):
    """A weight (out, in) in a file, to which updates are added while it is read."""

    updates: tuple[lora.Update, ...] = ()

    def chunks(self) -> Iterator[Tensor]:
        """The values in order, (n,) in float32: of whole rows, together about `CHUNK` bytes as they are stored."""
        row = self.nbytes // self.shape[0]
        count = max(1, CHUNK // row)
        for first in range(0, self.shape[0], count):
            last = min(first + count, self.shape[0])
            begin, end = self.start + first * row, self.start + last * row
            values = Stored(self.path, begin, end, (last - first, self.shape[1]), self.dtype).read()
            for update in self.updates:
                values = lora.merged(values, update.A, update.B[first:last], update.scale)
            yield values.flatten()


def merge_lora(
    checkpoint: str | Path, loras: list[tuple[str | Path, float]], dst: str | Path, **options
) -> PipelineConfig:
    """Write the native folder `dst`: `checkpoint` with LoRAs, (file, weight) each, merged into its DiT.

    The other models' files are shared, not copied. ValueError if a LoRA is for another model, or the weights are int8.
    """
    folder, settings = find_checkpoint(checkpoint), Options(**options)
    config = load_config(folder / "config.json")
    with without_weights():
        dit = DiT(config.dit)
    updates: dict[str, list[lora.Update]] = {}
    for file, weight in loras:
        one = lora.load(file)
        lora.check_fit(dit, one)
        one.set_weight(weight)
        for name, update in one.updates():
            updates.setdefault(f"{name}.weight", []).append(update)
    weights = find_weights(folder, "dit", config.base)
    part = build_part(weights, updates, [f"{Path(file).name}:{weight:g}" for file, weight in loras])
    linked: dict[str, Path] = {}
    for name in [*models_of(config)[1:], *(f"{model}_tokenizer" for model in TOKENIZERS)]:
        place = find_part(folder, name, config.base)
        inside = list_files(place, lambda path, name=name: path.parts[0].split(".")[0].split("-")[0] == name)  # type: ignore[misc]
        linked |= inside
    config = replace(config, base=None)
    write_folder(Path(dst), [part], lambda place: save_config(config, place / "config.json"), linked, settings)
    return config


def build_part(weights: Weights, updates: dict[str, list[lora.Update]], names: list[str]) -> Part:
    """The DiT's tensors as they are stored, with updates where there are some. ValueError for quantised ones."""
    if odd := [name for name in updates if weights.tensors[name].dtype not in FLOATS]:
        raise ValueError(f"{weights.source} is quantised ({listed(odd, 1)}): merge into the weights that it came from")
    tensors = dict(weights.tensors)
    for name, own in updates.items():
        tensors[name] = Merged(**asdict(tensors[name]), updates=tuple(own))
    metadata = {**weights.metadata, "merged": json.dumps(names, ensure_ascii=False)}
    return Part("dit", tensors, {name: stored.dtype for name, stored in tensors.items()}, metadata)
