"""Checkpoints of other layouts to the native one and back; the only place that knows other people's names."""

from weights_convert.convert import from_diffusers

__all__ = ["from_diffusers"]
