"""config.json of a native checkpoint: a `PipelineConfig` written down, and read with every value checked.

A value of another type, a value that no model can have, or two that do not go together end in one line that names
the field, the value and the rule, before anything of the size that they say is built.
"""

import dataclasses
import functools
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from kandinsky5.config import PipelineConfig
from kandinsky5.files import read_json, write_json
from kandinsky5.screen import listed

type_hints = functools.cache(typing.get_type_hints)  # which compiles every annotation
UNIONS = (types.UnionType, typing.Union)  # `int | None`, and what Python makes of `Literal[1] | None`


def save_config(config: PipelineConfig, path: str | Path) -> None:
    """Write `config` as JSON."""
    write_json(path, dataclasses.asdict(config))


def load_config(path: str | Path) -> PipelineConfig:
    """Read what `save_config` wrote. ValueError, in one line, if the file is no JSON or `check_config` objects."""
    document = read_json(path)
    try:
        config = from_json(PipelineConfig, document)
        check_config(config)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a Kandinsky 5 configuration ({error}): correct it, convert the checkpoint again, or update "
            "this package if a newer one wrote the file"
        ) from error
    return config


def from_json(kind, value, key: str = ""):
    """`value`, as json.loads gives it, as an annotation says: dataclass, tuple, union, Literal, bool, int, float, str.

    key: the names that lead to the value, for messages. ValueError for a value of another type, for infinite numbers,
    and for a name that is no field of the dataclass.
    """
    for option in typing.get_args(kind) if typing.get_origin(kind) in UNIONS else (kind,):
        origin, inside = typing.get_origin(option), typing.get_args(option)
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, dict):
            hints = type_hints(option)
            if unknown := sorted(value.keys() - hints.keys()):
                raise ValueError(f"{option.__name__} has no field {listed(unknown)}; its fields are {', '.join(hints)}")
            needed = [f.name for f in dataclasses.fields(option) if f.default is f.default_factory]  # both MISSING
            if missing := [name for name in needed if name not in value]:
                raise ValueError(f"{key or option.__name__} does not say its {', '.join(missing)}")
            return option(**{n: from_json(hints[n], v, f"{key}.{n}".removeprefix(".")) for n, v in value.items()})
        if origin is tuple and isinstance(value, list):
            items = inside[:1] * len(value) if inside[-1] is ... else inside
            if len(items) == len(value):
                return tuple(from_json(item, v, key) for item, v in zip(items, value, strict=True))
        if option is float and type(value) in (int, float):
            if abs(value) <= sys.float_info.max:  # NaN is not
                return float(value)
        elif type(value) is option or origin is typing.Literal and value in inside:
            if option is not int or abs(value) < 2**64:
                return value
    raise ValueError(f"{key or 'it'} is {reprlib.repr(value)} and should be {_in_words(kind)}")


def _in_words(kind) -> str:
    inside = typing.get_args(kind)
    if typing.get_origin(kind) in UNIONS:
        return " or ".join(_in_words(option) for option in inside)
    if typing.get_origin(kind) is tuple:
        count = "" if inside[-1] is ... else f"{len(inside)} times "
        return f"a list of {count}{_in_words(inside[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(inside)}"
    words = {dict: "a table", bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    words[type(None)] = "null"
    return words.get(kind) or f"a table of {kind.__name__}'s fields"


MAY_BE_ZERO = (  # others are above
    "num_text_blocks", "full_blocks", "dropped_tokens", "dropped_from_prompt", "start_token", "end_token",
    "image_token", "guidance_scale",
)  # fmt: skip
TASKS = ({"t2v"}, {"i2v"}, {"t2v", "i2v"}, {"t2i"}, {"i2i"})  # what one checkpoint may do
MOST = 2**24  # of a whole number; products of a few of them are still sizes that PyTorch can say
LONGEST = 10_000  # characters of a text, and eight values in a list: thirty times the released template

OVERLAP = "tiles leave no gap, and each place lies in at most eight"

# What else a configuration must be: the fields, whether they may be so, and the rule in words. Whole models are built
# from these values before their tensors are looked at, so the limits are a few times what any released model has.
RULES: tuple[tuple[str, Callable[..., bool], str], ...] = (
    ("name", lambda name: name.isprintable() and len(name) <= 200, "at most 200 printable characters"),
    ("tasks", lambda tasks: {*tasks} in TASKS, "tasks are t2v, i2v or both, or t2i, or i2i"),
    ("tasks sampling.num_frames", lambda tasks, n: n == 1 or {*tasks} <= {"t2v", "i2v"}, "an image is one frame"),
    ("tasks dit.visual_cond", lambda tasks, cond: cond or "i2i" not in tasks, "editing has conditioning channels"),
    (
        "tasks vae.dimensions",
        lambda tasks, n: n == (3 if {*tasks} <= {"t2v", "i2v"} else 2),
        "images need FLUX.1's VAE, which has 2, videos HunyuanVideo's, which has 3",
    ),
    ("dit.rope_axes", lambda axes: not any(n % 2 for n in axes), "channels rotate in pairs"),
    ("dit.dim dit.rope_axes", lambda dim, axes: dim % sum(axes) == 0, "the axes' sum, one head, divides dim"),
    ("dit.patch_size", lambda patch: patch[0] == 1 and max(patch) <= 64, "one frame, at most 64 latents a side"),
    ("dit.in_channels dit.out_channels", lambda a, b: a == b, "the velocity has the channels of the latents"),
    ("dit.num_text_blocks", lambda n: n <= 128, "at most 128 blocks (Pro has 4)"),
    ("dit.num_visual_blocks", lambda n: n <= 128, "at most 128 blocks (Pro has 60)"),
    ("dit.nabla.P", lambda P: P <= 1, "a share is at most 1"),
    ("vae.channels vae.norm_groups", lambda channels, n: not any(c % n for c in channels), "groups divide channels"),
    ("vae.channels vae.halves_time", lambda a, b: len(a) >= max(len(b), 1), "each halving has its stage"),
    ("vae.blocks_per_stage", lambda n: n <= 16, "at most 16 blocks per stage (the released VAE has 2)"),
    ("vae.dimensions vae.halves_time", lambda n, half: n == 3 or n == 2 and not any(half), "3, or 2 in space alone"),
    ("vae.image_channels", lambda n: n == 3, "images are red, green and blue"),
    ("qwen.num_layers", lambda n: n <= 128, "at most 128 layers (the 7B has 28)"),
    ("qwen.dim qwen.num_heads", lambda dim, n: dim % (2 * n) == 0, "a head has an even number of channels"),
    ("qwen.num_heads qwen.num_kv_heads", lambda n, kv: n % kv == 0, "each key head serves as many query heads"),
    ("qwen_vision.num_layers", lambda n: n <= 128, "at most 128 layers (the 7B has 32)"),
    ("qwen_vision.dim qwen_vision.num_heads", lambda dim, n: dim % (4 * n) == 0, "a head turns in pairs, half by rows"),
    ("qwen_vision.min_pixels qwen_vision.max_pixels", lambda a, b: a <= b, "the least area is not above the largest"),
    ("qwen_vision.out_dim qwen.dim", lambda a, b: a == b, "the language model reads what the vision tower gives"),
    ("clip.num_layers", lambda n: n <= 128, "at most 128 layers (ViT-L/14 has 12)"),
    ("clip.dim clip.num_heads", lambda dim, n: dim % n == 0, "the number of heads divides dim"),
    ("clip.start_token clip.end_token clip.vocab_size", lambda a, b, n: max(a, b) < n, "tokens are in the vocabulary"),
    ("clip.max_positions", lambda n: n >= 2, "there is room for the start and the end token"),
    ("text.template", lambda text: text.count("{}") == 1, "the prompt stands in it once, at {}"),
    ("text.image_template", lambda text: text is None or text.count("{}") == 1, "the prompt stands in it once, at {}"),
    ("text.dropped_tokens text.dropped_from_prompt", lambda n, lost: lost <= n, "it counts some of the dropped tokens"),
    ("text.max_tokens", lambda n: n <= 10_000, "at most 10,000 tokens of a prompt"),
    ("sampling.sizes", lambda sizes: all(0 < n <= 2**14 for size in sizes for n in size), "1 to 16,384 pixels a side"),
    ("sampling.num_frames", lambda n: n <= 10_000, "at most 10,000 frames (seven minutes)"),
    ("sampling.height", lambda n: n <= 2**14, "at most 16,384 pixels (the encoder's limit)"),
    ("sampling.width", lambda n: n <= 2**14, "at most 16,384 pixels (the encoder's limit)"),
    ("sampling.num_inference_steps", lambda n: n <= 10_000, "at most 10,000 steps"),
    ("sampling.fps", lambda n: n <= 1000, "at most 1,000 frames per second"),
    ("tiling.frames tiling.frame_stride", lambda n, stride: stride <= n <= 8 * stride, OVERLAP),
    ("tiling.pixels tiling.pixel_stride", lambda n, stride: stride <= n <= 8 * stride, OVERLAP),
    (
        "vae.halves_time tiling.time tiling.frames tiling.frame_stride",
        lambda halves, time, *n: not time or not any(k % 2 ** sum(halves) for k in n),
        "windows hold whole latent frames",
    ),
    (
        "vae.halves_time tiling.pixels tiling.pixel_stride",
        lambda halves, *n: not any(k % 2 ** len(halves) for k in n),
        "tiles hold whole latents",
    ),
)


def check_config(config: PipelineConfig) -> None:
    """ValueError, with names and values, for values that no model can have or that do not go together."""
    check_values(flatten(dataclasses.asdict(config)))


def check_values(values: dict[str, Any], say: Callable[[str], str] = str) -> None:
    """The same ValueError for some fields, {"dit.dim": 1792, …}; `say` gives a field's name in the message."""

    def named(*keys: str) -> str:
        return ", ".join(f"{say(key)} {reprlib.repr(values[key])}" for key in keys)

    for key, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        numbers = [n for n in parts if type(n) in (int, float)]
        if any(n < 0 or n == 0 and not key.endswith(MAY_BE_ZERO) for n in numbers):
            raise ValueError(f"{named(key)} should be {'at least' if key.endswith(MAY_BE_ZERO) else 'above'} 0")
        if any(type(n) is int and n > MOST for n in numbers):
            raise ValueError(f"{named(key)} should be at most {MOST}")
        if len(parts) > 8 or any(isinstance(text, str) and len(text) > LONGEST for text in parts):
            raise ValueError(f"{named(key)} should have at most 8 values, texts at most {LONGEST:,} characters")
    for names, holds, rule in RULES:
        keys = [key for key in names.split() if key in values]
        if len(keys) == len(names.split()) and not holds(*(values[key] for key in keys)):
            raise ValueError(f"{named(*keys)}: {rule}")


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """{"dit": {"dim": 1792}} → {"dit.dim": 1792}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_models_fit(config: PipelineConfig, present: Collection[str] = ("dit", "vae", "qwen", "clip")) -> None:
    """ValueError if one model's output is not the other's input, of the models that are present."""
    for other, key, theirs in (("qwen", "text_dim", "dim"), ("clip", "pooled_dim", "dim"),
                               ("vae", "in_channels", "latent_channels")):  # fmt: skip
        wants, has = getattr(config.dit, key), getattr(getattr(config, other), theirs)
        if {"dit", other} <= {*present} and wants != has:
            raise ValueError(
                f"config.json says dit.{key} {wants}, {other}.{theirs} {has}: these models do not belong together"
            )
