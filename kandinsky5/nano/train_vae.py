"""The first stage, the VAE: single frames without the posterior's noise, then clips with it, then the decoder alone.

    python -m kandinsky5.nano.train_vae --folder runs/vae

Frames alone teach positions, shapes and colours in a third of the time (single_frame.py); clips teach time. Temporal
kernel weights start at zero and single frames never update them, so clip training starts from a per-frame VAE and not
from one that averages three frames.
"""

import contextlib
import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5 import screen, video_io
from kandinsky5.nano import presets, stages
from kandinsky5.nano.captions import Caption, describe
from kandinsky5.nano.clips import draw_videos
from kandinsky5.nano.evaluate import reconstruct
from kandinsky5.nano.judge import judge_clip, psnr, score
from kandinsky5.nano.single_frame import forget_the_past, single_frame
from kandinsky5.nano.world import SHAPES, coverage, draw_scene, sample_scene
from kandinsky5.runtime import fast
from kandinsky5.runtime.device import choose_dtype
from kandinsky5.training.loop import generator
from kandinsky5.training.modes import autocast
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.state import load_average, save_average
from kandinsky5.vae import VAE

FRAMES_RECIPE = Recipe(steps=2600, learning_rate=1e-3, constant=0.6, ema=0.995, weight_decay=0.0)
# The past's kernels start from 0 with a small rate: at the first stage's rate they would undo its work in 20 steps.
CLIPS_RECIPE = Recipe(steps=900, learning_rate=2e-4, constant=0.4, ema=0.998, weight_decay=0.0)
DECODER_RECIPE = Recipe(steps=2000, learning_rate=1e-4, constant=0.4, ema=0.998, weight_decay=0.0)
FRAMES, CLIPS = 16, 3  # in a batch
CONFETTI_STEPS = 300  # on confetti only; afterwards it is a quarter of the frames
FIRST_LOGVAR = -5.0  # of the posterior when its noise starts, with the clips: 0.08 of the latents
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 2.0  # a pixel at an edge weighs up to this much more: plain L1 leaves them blurred
COLOUR_WEIGHT = 1.0  # of the error in colour, compared with brightness
SQUARE_WEIGHT = 2.0  # of the squared error, compared with the absolute one: it finds positions and colours sooner
LONG_EVERY = 96  # steps, one clip of nano-10s's size: GroupNorm's statistics depend on the size
TEST_SEED = 10**6  # scenes never drawn for training


def main() -> None:
    """Train on frames, on clips, standardise the latents, train the decoder; each unless it is finished."""
    folder, accumulate = stages.parse("train_vae", __doc__)
    standardised = folder / "standardised"
    if not (standardised / "state.pt").is_file():
        vae = train_frames(folder / "frames", replace(FRAMES_RECIPE, accumulate=accumulate))
        vae = train_clips(folder / "clips", vae, replace(CLIPS_RECIPE, accumulate=accumulate))
        with stages.first_rank_first():
            if not (standardised / "state.pt").is_file():
                save_average(standardise(vae), standardised)
    start = load_average(VAE(presets.VAE), standardised)
    vae = train_decoder(folder / "decoder", start, replace(DECODER_RECIPE, accumulate=accumulate))
    print(test(vae, folder / "decoder", DECODER_RECIPE.steps, count=300))


def train_frames(folder: Path, recipe: Recipe = FRAMES_RECIPE) -> VAE:
    """The VAE of single frames; returns it with averaged weights."""
    torch.manual_seed(recipe.seed)
    vae = VAE(presets.VAE)
    forget_the_past(vae)

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        frames = draw_frames(seed, FRAMES if seed[1] < CONFETTI_STEPS else FRAMES // 4)
        with single_frame(vae):
            return vae_loss(vae, frames, torch.zeros(latent_shape(vae, frames)))

    return stages.train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=300)


def train_clips(folder: Path, vae: VAE, recipe: Recipe = CLIPS_RECIPE) -> VAE:
    """Continue from a VAE of single frames with clips; returns it with averaged weights."""
    vae = copy.deepcopy(vae).requires_grad_(True)
    with torch.no_grad():  # only the KL has shaped the log-variance so far, and that makes it 0
        channels = vae.config.latent_channels
        weight, bias = vae.quant_conv.parameters()
        weight[channels:] = 0
        bias[channels:] = FIRST_LOGVAR

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        only_frames = seed[1] % 4 == 1  # single images must keep working: image-to-video encodes one
        video = draw_frames([1, *seed], FRAMES // 4) if only_frames else draw_clips(seed)
        noise = torch.randn(latent_shape(vae, video), generator=generator(seed))
        with single_frame(vae) if only_frames else contextlib.nullcontext():
            return vae_loss(vae, video, noise)

    return stages.train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=200)


def train_decoder(folder: Path, vae: VAE, recipe: Recipe = DECODER_RECIPE) -> VAE:
    """Continue with the decoder alone, so that the latents stay; returns the VAE with averaged weights."""
    vae = copy.deepcopy(vae)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        only_frames = seed[1] % 8 == 1  # with more of them, clips get worse
        video = draw_frames([3, *seed], FRAMES // 8) if only_frames else draw_clips([2, *seed], halved=False)
        noise = torch.randn(latent_shape(vae, video), generator=generator(seed))
        with single_frame(vae) if only_frames else contextlib.nullcontext():
            return vae_loss(vae, video, noise)

    return stages.train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=300)


def vae_loss(vae: VAE, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction and KL. video (B, 3, F, H, W) in [−1, 1]; noise like its latents, zeros for the mean itself."""
    posterior = vae.encode(video)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    error = vae.decode(type(posterior)(mean, logvar).sample(noise)).float() - video
    colour = error - error.mean(dim=1, keepdim=True)
    reconstruction = error.abs() + SQUARE_WEIGHT * error.square() + COLOUR_WEIGHT * (colour.abs() + colour.square())
    reconstruction = (edge_weights(video) * reconstruction).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # per latent element, in nats
    square = (error.detach().clamp(-2, 2) / 2).square().mean()
    kind = "clip" if video.shape[2] > 1 else "frame"
    figures = {
        f"{kind}_psnr": float(-10 * torch.log10(square)),
        "kl": float(kl.detach()),
        "latent_std": float(mean.detach().std()),
    }
    return reconstruction + KL_WEIGHT * kl, figures


def edge_weights(video: Tensor) -> Tensor:
    """1 on flat areas, up to 1 + EDGE_WEIGHT where a pixel's neighbours differ most; (B, 3, F, H, W) → (B, 1, …)."""
    frames = video.transpose(1, 2).flatten(0, 1)  # (B F, 3, H, W)
    spread = F.max_pool2d(frames, 3, 1, 1) + F.max_pool2d(-frames, 3, 1, 1)  # largest minus smallest, up to 2
    spread = spread.amax(dim=1, keepdim=True).unflatten(0, (len(video), -1)).transpose(1, 2)  # (B, 1, F, H, W)
    return 1 + EDGE_WEIGHT * spread / 2


def draw_frames(seed: list[int], confetti: int) -> Tensor:
    """A batch of single frames, some of them confetti, (B, 3, 1, H, W) in [−1, 1]."""
    rng = np.random.default_rng(seed)
    frames = [draw_confetti(rng) for _ in range(confetti)]
    frames += [draw_scene(sample_scene([*seed, i]), 1) for i in range(FRAMES - confetti)]
    return video_io.from_uint8(np.stack(frames))


def draw_clips(seed: list[int], halved: bool = True) -> Tensor:
    """A batch of clips, whole or their first half, (B, 3, F, H, W) in [−1, 1]; sometimes one of nano-10s's size."""
    step = seed[-2]
    if step % LONG_EVERY == 0:
        return draw_videos([sample_scene(seed)], num_frames=33, size=128)
    clips = draw_videos([sample_scene([*seed, i]) for i in range(CLIPS)])
    return clips if not halved or step % 8 in (3, 4) else clips[:, :, :9]  # half a clip teaches almost as much


def draw_confetti(rng: np.random.Generator, size: int = 64, count: int = 10) -> np.ndarray:
    """Overlapping shapes of any colour and size on any colour, uint8 (1, H, W, 3).

    The world's frames are mostly background, and a VAE that sees only them paints everything pinkish for thousands of
    steps. Here colours are everywhere.
    """
    y, x = np.indices((size, size), dtype=np.float32) + 0.5
    frame = np.broadcast_to(rng.uniform(0, 255, 3), (size, size, 3))
    for _ in range(count):
        circle = [rng.uniform(0, size), rng.uniform(0, size), rng.uniform(5, 20)]
        centre_x, centre_y, radius = np.array(circle, np.float32)[:, None, None]  # (1, 1) each
        shape = SHAPES[rng.integers(len(SHAPES))]
        share = coverage(shape, x - centre_x, y - centre_y, radius)[..., None]
        frame = frame + share * (rng.uniform(0, 255, 3) - frame)
    return (frame + 0.5).astype(np.uint8)[None]


@torch.no_grad()
def standardise(vae: VAE, count: int = 256) -> VAE:
    """Give each latent channel mean 0 and standard deviation 1 over clips, in place, without changing reconstructions.

    The 1×1×1 convs on both sides of the latents absorb it: what one removes, the other restores.
    """
    C = vae.config.latent_channels
    total = square = torch.zeros(C, dtype=torch.float64)
    bar = screen.bar(count, "standardising latents", "clip")
    for start in range(0, count, 8):
        video = draw_videos([sample_scene([TEST_SEED - 1, i]) for i in range(start, start + 8)])
        with autocast(torch.device("cpu")):
            posterior = vae.encode(video)
        mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
        total = total + mean.mean(dim=(0, 2, 3, 4)) * 8 / count
        square = square + (mean.square() + variance).mean(dim=(0, 2, 3, 4)) * 8 / count
        bar.update(8)
    bar.close()
    shift, scale = total.float(), (square - total**2).sqrt().float()  # (16,) each
    weight, bias = vae.post_quant_conv.parameters()
    bias.add_(weight[..., 0, 0, 0] @ shift)
    weight.mul_(scale.view(1, C, 1, 1, 1))
    weight, bias = vae.quant_conv.parameters()
    weight[:C] /= scale.view(C, 1, 1, 1, 1)
    bias[:C] = (bias[:C] - shift) / scale
    bias[C:] -= 2 * scale.log()
    return vae


def latent_shape(vae: VAE, video: Tensor) -> tuple[int, ...]:
    """The shape of `vae.encode(video).mean`."""
    return (len(video), vae.config.latent_channels, *vae.config.latent_grid(*video.shape[2:]))


def test(vae: VAE, folder: Path, step: int, count: int = 24) -> dict[str, float]:
    """PSNR on unseen clips and single frames, and the share of reconstructed clips that the judge finds right."""
    scenes = [sample_scene([TEST_SEED, i], "all") for i in range(count)]
    vae = copy.deepcopy(vae).to(choose_dtype("auto", torch.device("cpu")))  # as it will be used
    fast.install(vae)
    truth = np.stack([draw_scene(scene) for scene in scenes])  # (B, F, H, W, 3)
    results, frames = reconstruct(vae, truth), reconstruct(vae, truth[:, :1])
    captions = [Caption("", scene.background, tuple(map(describe, scene.objects))) for scene in scenes]
    right = [score(judge_clip(clip), caption)["all"] for clip, caption in zip(results, captions, strict=True)]
    pairs = [np.concatenate([truth[i, ::4], results[i, ::4]], axis=1) for i in range(6)]  # (5, 2H, W, 3)
    sheet = np.concatenate(list(np.concatenate(pairs, axis=1)), axis=1)  # (12H, 5W, 3)
    with screen.showing(image := f"sample_{step:06d}.png"):
        video_io.write_video(folder / image, sheet[None])
    return {
        "clip_psnr": float(np.mean([psnr(a, b) for a, b in zip(truth, results, strict=True)])),
        "frame_psnr": float(np.mean([psnr(a, b) for a, b in zip(truth[:, :1], frames, strict=True)])),
        "judged_right": float(np.mean(right)),
    }


if __name__ == "__main__":
    sys.exit(stages.run(main, stages.RESUMES))
