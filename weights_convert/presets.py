"""Which release a checkpoint is: presets that fit its sizes, and what it takes over from the one that is given."""

import difflib
from dataclasses import asdict, replace

from kandinsky5.config import PRESETS, PipelineConfig, find_preset


def use_preset(config: PipelineConfig, preset: str, task_known: bool = True, vae_known: bool = True) -> PipelineConfig:
    """`config` with name, task, attention, template and sampling of a preset, and its VAE's sizes if none are known.

    ValueError for other sizes, or if the task is known to be another one.

    The preset wins over the checkpoint's own NABLA and shift: one download serves an -sd and an -hd preset.
    """
    chosen = find_preset(preset)
    theirs, ours = asdict(replace(chosen.dit, nabla=None)), asdict(replace(config.dit, nabla=None))
    if theirs != ours:
        differences = [f"{field} {value}, not {ours[field]}" for field, value in theirs.items() if value != ours[field]]
        raise ValueError(f"preset {preset} has another DiT than the checkpoint: {'; '.join(differences)}")
    if task_known and chosen.tasks != config.tasks:
        raise ValueError(f"preset {preset} is for {chosen.tasks[0]}, the checkpoint for {' and '.join(config.tasks)}")
    own = {name: getattr(config, name) for name in ("qwen", "qwen_vision", "clip", "tiling", "base")}
    return replace(chosen, vae=config.vae if vae_known else chosen.vae, **own)


def presets_like(config: PipelineConfig, task_known: bool = True) -> list[str]:
    """The presets that a checkpoint may be, those most like its name first: same DiT, and if known task and attention.

    An -sd and an -hd preset share a download, so that either fits where the other one does.
    """

    def shared(name: str) -> str:
        return name.removesuffix("-sd").removesuffix("-hd")

    fits = {
        shared(name)
        for name, preset in PRESETS.items()
        if replace(preset.dit, nabla=None) == replace(config.dit, nabla=None)
        and (not task_known or (preset.dit.nabla, preset.tasks) == (config.dit.nabla, config.tasks))
    }
    own = config.name.lower()
    likeness = {name: difflib.SequenceMatcher(None, own, shared(name)).ratio() for name in PRESETS}
    return sorted((name for name in PRESETS if shared(name) in fits), key=lambda name: -likeness[name])
