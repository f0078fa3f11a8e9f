"""Samples during the training of nano's DiTs: clips of unseen prompts, judged, and a contact sheet of them."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kandinsky5 import video_io
from kandinsky5.config import PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.files import write_text
from kandinsky5.nano.captions import LANGUAGES, Caption, write_caption
from kandinsky5.nano.judge import judge_clip, score
from kandinsky5.nano.world import Scene, draw_scene, sample_scene
from kandinsky5.pipeline import Pipeline
from kandinsky5.runtime import fast, kernels
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.screen import showing
from kandinsky5.text_encoder import TextEncoder
from kandinsky5.vae import VAE

TEST_SEED = 2 * 10**6  # of the scenes


def sampler(
    config: PipelineConfig, vae: VAE, text_encoder: TextEncoder, folder: Path, count: int
) -> Callable[[DiT, int], dict[str, float]]:
    """For `train`: judges `count` samples of a DiT, whose contact sheet goes to the folder of the run."""

    def sample(dit: DiT, step: int) -> dict[str, float]:
        return judge_samples(config, dit, vae, text_encoder, folder / f"sample_{step:06d}.png", count)

    return sample


def build_pipeline(config: PipelineConfig, dit: DiT, vae: VAE, text_encoder: TextEncoder) -> Pipeline:
    """Copies of the models, in the precision and with the faster forms that `Pipeline.load` gives them here."""
    dit, vae, text_encoder = copy.deepcopy((dit, vae, text_encoder))
    for model in (dit, vae, text_encoder):
        model.to(choose_dtype("auto", torch.device("cpu"))).eval()
        kernels.install(model, "auto")
    fast.install(dit, vae)
    return Pipeline(config, dit, vae, text_encoder)


def judge_samples(
    config: PipelineConfig, dit: DiT, vae: VAE, text_encoder: TextEncoder, image: Path, count: int = 32
) -> dict[str, float]:
    """The judge's rates on unseen prompts, one object and two, English and Russian; a contact sheet goes to `image`."""
    pipe = build_pipeline(config, dit, vae, text_encoder)
    size = (config.sampling.height, config.sampling.width)
    tests = [draw_test(i, 1 if i < count * 3 // 4 else 2) for i in range(count)]
    steps = min(config.sampling.num_inference_steps, 25)
    texts = [caption.text for _, caption in tests]
    frames = pipe(texts, num_inference_steps=steps, progress=False, seed=TEST_SEED).numpy()
    answers = [score(judge_clip(clip), caption) for clip, (_, caption) in zip(frames, tests, strict=True)]
    one, two = answers[: count * 3 // 4], answers[count * 3 // 4 :]
    figures = {
        f"{which}_{name}": np.mean([answer[name] for answer in chosen])
        for which, chosen in (("one", one), ("two", two))
        for name in ("all", "colour", "shape", "motion")
    }

    few = tests[:8]
    given = []  # the clips that start with a given image
    for scene, caption in few:
        first = torch.from_numpy(draw_scene(scene, 1, *size)[0])
        given.append(pipe(caption.text, image=first, num_inference_steps=steps, progress=False)[0].numpy())
    motions = [score(judge_clip(clip), caption)["motion"] for clip, (_, caption) in zip(given, few, strict=True)]
    figures["image_motion"] = np.mean(motions)
    rows = [*frames[:8, ::4], *frames[-4:, ::4], *(clip[::4] for clip in given[:4])]  # (5, H, W, 3) each
    text = "\n".join(caption.text for _, caption in [*tests[:8], *tests[-4:], *few[:4]])
    with showing(f"{image.name} and .txt"):
        video_io.write_video(image, np.concatenate([np.concatenate(list(row), axis=1) for row in rows])[None])
        write_text(image.with_suffix(".txt"), text + "\n")
    return {name: round(float(value), 3) for name, value in figures.items()}


def draw_test(index: int, num_objects: int) -> tuple[Scene, Caption]:
    """A scene never trained on, and a caption of it, whose text may have occurred in training."""
    rng = np.random.default_rng([TEST_SEED, index])
    scene = sample_scene(rng, "train", num_objects)
    return scene, write_caption(scene, LANGUAGES[index % 2], rng)
