"""Draw samples of the nano family: a contact sheet per model, and the README's animation.

    python docs/draw_nano.py            # docs/nano/NAME.png for every model, docs/nano.webp

Rows are prompts, columns are equally spaced frames. No cherry-picking: prompt i has seed i, given images have seed 0.
Needs matplotlib (`pip install -c constraints.txt -e '.[train]'`).
"""

import os
from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange

from kandinsky5 import Pipeline
from kandinsky5.nano import presets
from kandinsky5.nano.world import draw_scene, sample_scene

HERE = Path(__file__).parent
PROMPTS = (
    "a big red circle moves left on a white background",
    "a small yellow triangle goes up",
    "a cyan diamond grows on a grey background",
    "большой синий квадрат движется вправо на белом фоне",
    "зелёный ромб уменьшается",
    "маленький фиолетовый круг стоит на месте на сером фоне",
    "a red square moves left and a small cyan circle stands still",
    "слева синий ромб движется вниз, справа жёлтый треугольник движется вверх",
)
IMAGE_VERBS = ("moves right", "grows")  # what the drawn first frames should do
ANIMATED = tuple(  # colours down, motions across
    f"a big {colour} {shape} {verb} on a {background} background"
    for colour, shape, background in (
        ("red", "circle", "white"),
        ("blue", "square", "grey"),
        ("yellow", "triangle", "black"),
        ("purple", "diamond", "white"),
    )
    for verb in ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
)
FRAMES = 9  # of each clip on a sheet


def main() -> None:
    for name in presets.PRESETS:
        draw_sheet(Pipeline.load(name), HERE / "nano" / f"{name}.png")
    pipe = Pipeline.load("nano")
    clips = pipe(list(ANIMATED), seed=0, progress=False).numpy()  # (24, F, 64, 64, 3)
    clips = np.pad(clips, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    grid = rearrange(clips, "(rows columns) F h w C -> F (rows h) (columns w) C", columns=6)
    write_animation(HERE / "nano.webp", grid.repeat(2, axis=1).repeat(2, axis=2), pipe.config.sampling.fps)


def draw_sheet(pipe: Pipeline, path: Path) -> None:
    """A PNG with one row per prompt: clips from text, and below them clips that start from a given image."""
    sampling = pipe.config.sampling
    scenes = [sample_scene([7, i], num_objects=1) for i in range(len(IMAGE_VERBS))]
    images = [torch.from_numpy(draw_scene(scene, 1, sampling.height, sampling.width)[0]) for scene in scenes]
    nouns = [f"a {scene.objects[0].colour} {scene.objects[0].shape}" for scene in scenes]
    texts = [f"{noun} {verb}" for noun, verb in zip(nouns, IMAGE_VERBS, strict=True)]
    rows = list(zip(PROMPTS, pipe(list(PROMPTS), seed=0, progress=False).numpy(), strict=True))
    rows += [
        (f"image, and: {text}", pipe(text, image=image, seed=0, progress=False)[0].numpy())
        for text, image in zip(texts, images, strict=True)
    ]
    times = np.linspace(0, sampling.num_frames - 1, FRAMES).round().astype(int)
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.14 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(f"{pipe.config.name}: {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}")
    for axis, (prompt, clip) in zip(axes, rows, strict=True):
        strip = np.pad(clip[times], [(0, 0), (0, 0), (0, 2), (0, 0)], constant_values=255)  # (9, H, W + 2, 3)
        axis.imshow(rearrange(strip, "F H W C -> H (F W) C"), interpolation="nearest")
        axis.set_title(prompt, loc="left", fontsize=9, pad=2)
        axis.set_axis_off()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, path)
    plt.close(figure)


def write_animation(path: Path, frames: np.ndarray, fps: int) -> None:
    """frames (F, H, W, 3) uint8 as an endless animated WebP."""
    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w", format="webp", options={"loop": "0"}) as container:
        stream = container.add_stream("libwebp_anim", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"quality": "80"}
        for frame in [*frames, *[frames[-1]] * 5]:  # half a second on the last one
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


if __name__ == "__main__":
    main()
