"""Draw the figures of docs/teach-a-word.md: nano before and after it learned to bounce, and at four weights.

    python docs/draw_lesson.py runs/bounces/lora.safetensors

Prompt i has seed i; nothing is selected. Needs matplotlib (`pip install -c constraints.txt -e '.[train]'`).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from kandinsky5 import Pipeline

HERE = Path(__file__).parent / "teach-a-word"
PROMPTS = (
    "a big red circle bounces on a white background",
    "a small yellow triangle bounces on a black background",
    "there is a cyan square bouncing on a grey background",
    "a purple diamond bounces",
    "a big blue triangle bounces on a white background",
    "a small green circle bounces",
    "a big red circle moves up on a white background",
    "a small cyan square stays still",
)
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
FRAMES = 5  # of each clip


def main() -> None:
    """Write before_after.png and weights.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lora", type=Path)
    arguments = parser.parse_args()
    pipe = Pipeline.load("nano", dtype="float32")
    pipe.load_lora(arguments.lora)
    clips = {}
    for weight in WEIGHTS:
        pipe.set_lora(weight)
        clips[weight] = pipe(list(PROMPTS), seed=0).numpy()  # (B, F, H, W, 3)
    HERE.mkdir(exist_ok=True)
    draw({"before": clips[0.0], "after": clips[1.0]}, HERE / "before_after.png", FRAMES)
    draw({f"weight {weight:g}": clips[weight] for weight in WEIGHTS}, HERE / "weights.png", 3)


def draw(columns: dict[str, np.ndarray], path: Path, frames: int) -> None:
    """One row per prompt; in each column `frames` equally spaced frames of the clip."""
    size = (0.75 * frames * len(columns) + 0.3, 0.93 * len(PROMPTS))
    figure, axes = plt.subplots(len(PROMPTS), len(columns), figsize=size, layout="constrained")
    for c, (title, clips) in enumerate(columns.items()):
        chosen = np.linspace(0, clips.shape[1] - 1, frames).round().astype(int)
        for r, (prompt, clip) in enumerate(zip(PROMPTS, clips, strict=True)):
            framed = np.pad(clip[chosen], [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
            axes[r, c].imshow(np.concatenate(list(framed), axis=1), interpolation="nearest")
            axes[r, c].set_axis_off()
            axes[r, c].set_title(prompt if c == 0 else "", fontsize=6, loc="left", pad=2)
        axes[0, c].annotate(title, (0.5, 1.3), xycoords="axes fraction", ha="center", fontsize=8, weight="bold")
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    main()
