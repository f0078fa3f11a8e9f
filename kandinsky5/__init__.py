"""Kandinsky 5.0 Video in plain PyTorch, written to be read. Start at `pipeline.py`, or at README.md.

    from kandinsky5 import Pipeline, video_io

    pipe = Pipeline.load("nano")  # bundled; or the folder of a converted checkpoint
    frames = pipe("a red circle moves left", seed=3)  # uint8 (B, F, H, W, 3)
    video_io.write_video("circle.mp4", frames[0], fps=10)

A preset's name is in `PRESETS`; `pipe.dit`, `pipe.vae` and `pipe.text_encoder` are the models.
"""

import sys
from typing import TYPE_CHECKING

from kandinsky5 import cli

if cli.starts_here(sys.argv, sys.orig_argv):  # `python -m kandinsky5.…` imports PyTorch before its command begins
    cli.await_run()

if TYPE_CHECKING:
    from kandinsky5.config import PRESETS
    from kandinsky5.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["PRESETS", "Pipeline", "__version__"]


def __getattr__(name: str):
    """`Pipeline` and `PRESETS`, when first asked for: PyTorch takes seconds to import, and `kandinsky5 --help` none."""
    if name == "Pipeline":
        from kandinsky5.pipeline import Pipeline

        return Pipeline
    if name == "PRESETS":
        from kandinsky5.config import PRESETS

        return PRESETS
    raise AttributeError(f"module 'kandinsky5' has no attribute {name!r}")
