"""What the notebooks share: how a video and a figure are shown. Nothing here is part of a model.

They import it first, and with it the checkout that they lie in, whatever is installed.
"""

import base64
import html
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky5.video_io import write_video

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # told apart by all eyes

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)


def play(videos: dict[str, Tensor], fps: float = 10, height: int = 160) -> HTML:
    """Videos {caption: uint8 (F, H, W, 3)} side by side, looping, inside the notebook; `height` in screen pixels."""
    figures = []
    for caption, frames in videos.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            write_video(path, frames, fps=fps, quality=9)
            data = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f'<figure style="display:inline-block;margin:4px 8px 4px 0"><video autoplay loop muted playsinline controls '
            f'style="height:{height}px;image-rendering:pixelated" src="data:video/mp4;base64,{data}"></video>'
            f'<figcaption style="font-size:90%">{html.escape(caption)}</figcaption></figure>'
        )
    return HTML("".join(figures))


def grid(videos: dict[str, Tensor], columns: int = 6, title: str = "", fps: float = 10, size: float = 1.25) -> None:
    """A row per video {caption: uint8 (F, H, W, 3)}: `columns` frames from the first to the last, with their times."""
    rows = len(videos)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns + 1.2, size * rows + 0.55), squeeze=False
    )
    for i, (caption, frames) in enumerate(videos.items()):
        chosen = torch.linspace(0, len(frames) - 1, columns).round().long().tolist()
        for ax, f in zip(axes[i], chosen, strict=True):
            panel(ax, frames[f])
            if i == 0:
                ax.set_title(f"{f / fps:.1f} s", fontsize=9)
        label(axes[i, 0], caption)
    figure.suptitle(title, fontsize=10)
    plt.show()


def label(ax, text: str, width: int = 17) -> None:
    """`text` on the left of an image, in lines of `width` letters: what a row shows."""
    lines = [textwrap.fill(line, width) for line in text.split("\n")]
    ax.set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=9, labelpad=6)


def panel(ax, image: Tensor, **options):
    """An image (H, W) or (H, W, 3) in `ax`, without ticks and grid."""
    shown = ax.imshow(image, interpolation="nearest", **options)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return shown
