"""Kandinsky 5.0 Video in plain PyTorch, written to be read. Start at `pipeline.py`, or at README.md."""

from kandinsky5.config import PRESETS
from kandinsky5.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["PRESETS", "Pipeline", "__version__"]
