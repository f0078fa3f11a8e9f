"""Convert checkpoints of other layouts to the native one and back; only this package knows other people's names.

read ──> sizes (configs) ──> match (names: tables) ──> write_native or write_diffusers ──> write
"""

from weights_convert.inspect import inspect
from weights_convert.merge import merge_lora
from weights_convert.write_diffusers import to_diffusers
from weights_convert.write_native import from_diffusers, from_official

__all__ = ["from_diffusers", "from_official", "inspect", "merge_lora", "to_diffusers"]
