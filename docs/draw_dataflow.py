"""Draw docs/dataflow.svg, the figure of docs/api.md: python docs/draw_dataflow.py (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"font.family": "sans-serif", "svg.hashsalt": "kandinsky5"}
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

INK, DATA, MODEL, LOOP = "#1f2933", "#f3f4f6", "#dbe7f6", "#fdebd3"
figure, axes = plt.subplots(figsize=(15, 6.4))
axes.set(xlim=(0, 150), ylim=(0, 64))
axes.axis("off")


def box(x, y, width, height, title, detail="", color=MODEL):
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1.1))
    lines = detail.count("\n") + 1 if detail else 0
    x, y = x + width / 2, y + height / 2
    axes.text(x, y + 1.1 * lines, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(x, y - 1.3, detail, ha="center", va="center", fontsize=8.5, linespacing=1.35, color=INK)


def arrow(*points, label="", at=(0, 0)):
    """Straight lines from point to point, with a head at the last."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.3, solid_capstyle="round")
    head = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=head)
    if label:
        axes.text(*at, label, ha="center", va="center", fontsize=8.5, color=INK, family="monospace")


box(1, 47, 16, 8, "prompt", color=DATA)
box(25, 52, 24, 8, "Qwen2.5-VL", "28 layers; template cut off")
box(25, 39, 24, 8, "CLIP ViT-L/14", "12 layers; one vector")
arrow((17, 52), (25, 55))
arrow((17, 50), (25, 44))
box(1, 25, 16, 8, "image", "if there is one", DATA)
box(25, 25, 24, 8, "VAE encoder", "causal 3D convolutions")
arrow((17, 29), (25, 29))
box(1, 14, 16, 8, "seed", "noise from the CPU", DATA)

box(72, 4.5, 51, 58.5, "", color=LOOP)
axes.text(
    97, 61.2, "× steps, from t = 1 (noise) to 0", ha="center", va="center", fontsize=10, color=INK, style="italic"
)
box(94, 49.5, 27, 9.5, "text blocks × 2", "self-attention, 1D RoPE\nfeed-forward")
box(74, 40, 15, 7, "vec", "= time + pooled")
box(
    94,
    26,
    27,
    18,
    "visual blocks × 32",
    "self-attention, 3D RoPE; NABLA\ncross-attention to the text\nfeed-forward; final layer",
)
box(74, 15, 17, 17, "DiT input", "16 channels of x\n+ 16 zeros + 1 mask\n(B,T,H/8,W/8,33)")
box(94, 6.5, 27, 8, "Euler step", "x ← x + (t′ − t) · velocity")
arrow((82, 36.3), (82, 40), label="t", at=(82, 35))
arrow((89, 43.5), (92, 43.5), (92, 52), (94, 52))
arrow((92, 43.5), (92, 40), (94, 40))
arrow((107.5, 49.5), (107.5, 44))
arrow((91, 29.5), (94, 29.5))
arrow((107.5, 26), (107.5, 14.5), label="velocity", at=(112.5, 20.5))
arrow((94, 10.5), (82, 10.5), (82, 15), label="x", at=(80.5, 12))

arrow((49, 56), (94, 56), label="text (B,S,3584)", at=(60.5, 57.5))
arrow((49, 43.5), (74, 43.5), label="pooled (B,768)", at=(60.5, 45))
arrow((49, 29), (74, 29), label="frame 0 (B,1,H/8,W/8,16)", at=(60.5, 30.5))
arrow((17, 18), (74, 18), label="noise (B,T,H/8,W/8,16)", at=(60.5, 19.5))

box(127, 24, 20, 14, "VAE decoder", "windows of 17 frames,\nblended")
arrow((121, 10.5), (137, 10.5), (137, 24), label="latents\n(B,T,H/8,W/8,16)", at=(136, 7.2))
box(128, 47, 18, 8, "video", "(B,F,H,W,3)", DATA)
arrow((137, 38), (137, 47))
axes.text(
    72, 1.5, "Lite, 5 seconds: 512 × 768 pixels × 121 frames  =  31 × 64 × 96 latents  =  47,616 tokens of width 1792",
    ha="center", va="center", fontsize=9.5, color=INK,
)  # fmt: skip

path = Path(__file__).with_name("dataflow.svg")
figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
