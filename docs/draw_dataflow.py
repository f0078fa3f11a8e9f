"""Draw docs/dataflow.svg, the README's picture: python docs/draw_dataflow.py (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"font.family": "sans-serif", "svg.hashsalt": "kandinsky5"}
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

INK, DATA, MODEL, LOOP = "#1f2933", "#f3f4f6", "#dbe7f6", "#fdebd3"
figure, axes = plt.subplots(figsize=(14, 5.6))
axes.set(xlim=(0, 140), ylim=(0, 56))
axes.axis("off")


def box(x, y, width, height, title, detail="", color=MODEL):
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1.1))
    lines = detail.count("\n") + 1 if detail else 0
    x, y = x + width / 2, y + height / 2
    axes.text(x, y + 1.1 * lines, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(x, y - 1.3, detail, ha="center", va="center", fontsize=8.5, linespacing=1.35, color=INK)


def arrow(start, end, label="", at=None, bend=0.0):
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)
    if label:
        axes.text(*at, label, ha="center", va="center", fontsize=8.5, color=INK, family="monospace")


box(1, 42, 16, 8, "prompt", color=DATA)
box(25, 46, 24, 7.5, "Qwen2.5-VL", "28 layers; template cut off")
box(25, 35.5, 24, 7.5, "CLIP ViT-L/14", "12 layers; one vector")
arrow((17, 47), (25, 49.5))
arrow((17, 45), (25, 40))
box(1, 22, 16, 8, "image", "if there is one", DATA)
box(25, 22, 24, 8, "VAE encoder", "causal 3D convolutions")
arrow((17, 26), (25, 26))
box(1, 8, 16, 8, "seed", "noise from the CPU", DATA)

box(72, 4, 38, 51, "", color=LOOP)
axes.text(
    91, 52.6, "× steps, from t = 1 (noise) to 0", ha="center", va="center", fontsize=10, color=INK, style="italic"
)
box(76, 40, 30, 10, "text blocks × 2", "self-attention, 1D RoPE\nfeed-forward")
box(76, 20.5, 30, 14, "visual blocks × 32", "self-attention, 3D RoPE; NABLA\ncross-attention to the text\nfeed-forward")
box(76, 6.5, 30, 8, "Euler step", "x ← x + (t′ − t) · velocity")
arrow((91, 40), (91, 34.5))
arrow((91, 20.5), (91, 14.5), "velocity", (96, 17.5))
arrow((76, 9), (76, 23), "x", (71.2, 16), bend=-0.5)

arrow((49, 49.5), (76, 46), "text (B,S,3584)", (60.5, 50.2))
arrow((49, 39.2), (76, 31.5), "pooled (B,768)", (61, 38.6))
arrow((49, 26), (76, 27.5), "first frame (B,1,h,w,16)", (60.5, 28.9))
arrow((17, 12), (76, 24.5), "noise (B,T,h,w,16)", (40, 14.2))

box(117, 20.5, 22, 14, "VAE decoder", "windows of 17 frames,\nblended")
arrow((106, 10.5), (128, 20.5), "latents", (121, 13.2))
box(119, 41, 18, 8, "video", "(B,F,H,W,3)", DATA)
arrow((128, 34.5), (128, 41))
axes.text(
    70, 1.2, "Lite, 5 seconds: 512 × 768 pixels × 121 frames  =  31 × 64 × 96 latents  =  47,616 tokens of width 1792",
    ha="center", va="center", fontsize=9.5, color=INK,
)  # fmt: skip

path = Path(__file__).with_name("dataflow.svg")
figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
