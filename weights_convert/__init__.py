"""Convert checkpoints of other layouts to the native one and back; only this package knows other people's names."""

from weights_convert.convert import from_diffusers, from_official, to_diffusers
from weights_convert.inspect import inspect
from weights_convert.merge import merge_lora

__all__ = ["from_diffusers", "from_official", "inspect", "merge_lora", "to_diffusers"]
