"""The VAE: single frames first, without the posterior's noise, then clips with it, then the decoder alone.

    python -m kandinsky5.nano.train_vae --folder runs/vae

A causal conv on a single frame sees that frame three times over, as its past is replicated: it is a 2-D conv with
the kernel summed over time, a third of the work. Frames alone teach places, shapes and colours; clips, time. The
kernels start with nothing for the past, and frames alone do not change that: clips begin with a VAE that takes
each frame for itself, and not with one that averages three.
"""

import argparse
import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5 import video_io
from kandinsky5.nano import presets
from kandinsky5.nano.judge import judge_clip, psnr, score
from kandinsky5.nano.world import SHAPES, Caption, Scene, coverage, draw_scene, sample_scene
from kandinsky5.pipeline import Pipeline
from kandinsky5.training.loop import Recipe, generator, load_average, refusals_in_one_line, save_average, train
from kandinsky5.vae import VAE, CausalConv3d, Upsample, repeat

FRAMES_RECIPE = Recipe(steps=2600, learning_rate=1e-3, constant=0.6, ema=0.995, weight_decay=0.0)
# The past's kernels start from 0 with a small rate: at the first stage's they would undo in 20 steps what it learnt.
CLIPS_RECIPE = Recipe(steps=900, learning_rate=2e-4, constant=0.4, ema=0.998, weight_decay=0.0)
DECODER_RECIPE = Recipe(steps=2000, learning_rate=1e-4, constant=0.4, ema=0.998, weight_decay=0.0)
FRAMES, CLIPS = 16, 3  # in a batch
CONFETTI_STEPS = 300  # of pictures of confetti only; after them a quarter of the frames are
FIRST_LOGVAR = -5.0  # of the posterior when its noise comes in, with the clips: 0.08 of the latents
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 2.0  # a pixel at an edge weighs up to this much more: plain L1 leaves them blurred
COLOUR_WEIGHT = 1.0  # of the error's colour beside its brightness
SQUARE_WEIGHT = 2.0  # of the squared error beside the absolute one: it finds places and colours sooner
LONG_EVERY = 96  # steps; then one clip of the size of nano-10s, as GroupNorm's statistics depend on it
TEST_SEED = 10**6  # scenes that are never drawn for training


def main() -> None:
    """Train on frames, then on clips, and standardise the latents; each as far as it is not done."""
    parser = argparse.ArgumentParser("python -m kandinsky5.nano.train_vae", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the run lives; it goes on from there")
    folder = parser.parse_args().folder
    check_folder(folder, holds_runs=True)
    if not (folder / "standardised" / "state.pt").is_file():
        vae = train_clips(folder / "clips", train_frames(folder / "frames"))
        save_average(standardise(vae), folder / "standardised")
    vae = train_decoder(folder / "decoder", load_average(VAE(presets.VAE), folder / "standardised"))
    print(test(vae, folder / "decoder", DECODER_RECIPE.steps, count=300))


def check_folder(folder: Path, holds_runs: bool) -> None:
    """ValueError where `folder` is of something else: it is to be a run itself or, as here, a place of several."""
    if str(folder) in presets.PRESETS:
        raise ValueError(f"--folder {folder} would hide the checkpoint of that name: take another")
    if (folder / "origin.txt").is_file():
        raise ValueError(f"--folder {folder} holds clips, which any stage may read: take another for the run")
    if holds_runs and (folder / "loss.csv").is_file():
        raise ValueError(f"--folder {folder} is the run of another stage: take another, or this stage's own")
    if not holds_runs and any(folder.glob("*/loss.csv")):
        raise ValueError(f"--folder {folder} holds other runs: take another, such as {folder / 'dit'}")


def is_checkpoint(source: Path) -> bool:
    """Whether it is a checkpoint's folder, or the name of one in the package, and not a run's folder."""
    return (source / "config.json").is_file() or not source.exists() and str(source) in presets.PRESETS


def as_checkpoint(source: Path) -> Pipeline | None:
    """The checkpoint that `source` is, in float32; None for a run's folder."""
    return Pipeline.load(source, dtype=torch.float32) if is_checkpoint(source) else None


def load_vae(folder: Path) -> VAE:
    """What this stage left in `folder`, frozen, in float32; the latents are final once it is standardised.

    Here and in the other stages a checkpoint stands in for a run: `nano` is the one of the package.
    """
    if checkpoint := as_checkpoint(folder):
        return checkpoint.vae
    done = "decoder" if (folder / "decoder" / "state.pt").is_file() else "standardised"
    return load_average(VAE(presets.VAE), folder / done)


def train_frames(folder: Path, recipe: Recipe = FRAMES_RECIPE) -> VAE:
    """The VAE of single frames; returns it with averaged weights."""
    torch.manual_seed(recipe.seed)
    vae = VAE(presets.VAE)
    forget_the_past(vae)

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        frames = draw_frames(seed, FRAMES if seed[1] < CONFETTI_STEPS else FRAMES // 4)
        with single_frame(vae):
            return vae_loss(vae, frames, torch.zeros(latent_shape(vae, frames)))

    return train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=300)


def train_clips(folder: Path, vae: VAE, recipe: Recipe = CLIPS_RECIPE) -> VAE:
    """Go on from a VAE of single frames with clips; returns it with averaged weights."""
    vae = copy.deepcopy(vae).requires_grad_(True)
    with torch.no_grad():  # nothing but the KL has shaped the log-variance so far, and that makes it 0
        channels = vae.config.latent_channels
        weight, bias = vae.quant_conv.parameters()
        weight[channels:] = 0
        bias[channels:] = FIRST_LOGVAR

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        only_frames = seed[1] % 4 == 1  # images must go on working alone: image-to-video encodes one
        video = draw_frames([1, *seed], FRAMES // 4) if only_frames else draw_clips(seed)
        noise = torch.randn(latent_shape(vae, video), generator=generator(seed))
        with single_frame(vae) if only_frames else contextlib.nullcontext():
            return vae_loss(vae, video, noise)

    return train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=200)


def train_decoder(folder: Path, vae: VAE, recipe: Recipe = DECODER_RECIPE) -> VAE:
    """Go on with the decoder alone, so that latents stay what they are; returns the VAE with averaged weights."""
    vae = copy.deepcopy(vae)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        only_frames = seed[1] % 8 == 1  # more of them, and clips get worse
        video = draw_frames([3, *seed], FRAMES // 8) if only_frames else draw_clips([2, *seed], halved=False)
        noise = torch.randn(latent_shape(vae, video), generator=generator(seed))
        with single_frame(vae) if only_frames else contextlib.nullcontext():
            return vae_loss(vae, video, noise)

    return train(vae, loss, recipe, folder, sample=lambda vae, step: test(vae, folder, step), sample_every=300)


def vae_loss(vae: VAE, video: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction and KL. video (B, 3, F, H, W) in [−1, 1]; noise like its latents, zeros for the mean itself."""
    posterior = vae.encode(video)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    error = vae.decode(type(posterior)(mean, logvar).sample(noise)).float() - video
    colour = error - error.mean(dim=1, keepdim=True)
    reconstruction = error.abs() + SQUARE_WEIGHT * error.square() + COLOUR_WEIGHT * (colour.abs() + colour.square())
    reconstruction = (edge_weights(video) * reconstruction).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # of one latent channel, in nats
    square = (error.detach().clamp(-2, 2) / 2).square().mean()
    kind = "clip" if video.shape[2] > 1 else "frame"
    figures = {
        f"{kind}_psnr": float(-10 * torch.log10(square)),
        "kl": float(kl.detach()),
        "latent_std": float(mean.detach().std()),
    }
    return reconstruction + KL_WEIGHT * kl, figures


def edge_weights(video: Tensor) -> Tensor:
    """1 on plain areas, up to 1 + EDGE_WEIGHT where a pixel's neighbours differ most; (B, 3, F, H, W) → (B, 1, …)."""
    frames = video.transpose(1, 2).flatten(0, 1)  # (B F, 3, H, W)
    spread = F.max_pool2d(frames, 3, 1, 1) + F.max_pool2d(-frames, 3, 1, 1)  # largest minus smallest, up to 2
    spread = spread.amax(dim=1, keepdim=True).unflatten(0, (len(video), -1)).transpose(1, 2)  # (B, 1, F, H, W)
    return 1 + EDGE_WEIGHT * spread / 2


def draw_frames(seed: list[int], confetti: int) -> Tensor:
    """A batch of single frames, some of them confetti, (B, 3, 1, H, W) in [−1, 1]."""
    rng = np.random.default_rng(seed)
    pictures = [draw_confetti(rng) for _ in range(confetti)]
    pictures += [draw_scene(sample_scene([*seed, i]), 1) for i in range(FRAMES - confetti)]
    return video_io.from_uint8(np.stack(pictures))


def draw_clips(seed: list[int], halved: bool = True) -> Tensor:
    """A batch of clips, whole or their first half, (B, 3, F, H, W) in [−1, 1]; now and then one of nano-10s."""
    step = seed[-2]
    if step % LONG_EVERY == 0:
        return draw_videos([sample_scene(seed)], num_frames=33, size=128)
    clips = draw_videos([sample_scene([*seed, i]) for i in range(CLIPS)])
    return clips if not halved or step % 8 in (3, 4) else clips[:, :, :9]  # half a clip teaches almost as much


def draw_confetti(rng: np.random.Generator, size: int = 64, count: int = 10) -> np.ndarray:
    """Shapes of any colour and size over each other on any colour, uint8 (1, H, W, 3).

    The world's pictures are mostly background, and a VAE that sees only them paints everything pinkish for
    thousands of steps. Here colours are everywhere.
    """
    y, x = np.indices((size, size), dtype=np.float32) + 0.5
    picture = np.broadcast_to(rng.uniform(0, 255, 3), (size, size, 3))
    for _ in range(count):
        circle = [rng.uniform(0, size), rng.uniform(0, size), rng.uniform(5, 20)]
        centre_x, centre_y, radius = np.array(circle, np.float32)[:, None, None]  # (1, 1) each
        shape = SHAPES[rng.integers(len(SHAPES))]
        share = coverage(shape, x - centre_x, y - centre_y, radius)[..., None]
        picture = picture + share * (rng.uniform(0, 255, 3) - picture)
    return (picture + 0.5).astype(np.uint8)[None]


def draw_videos(scenes: list[Scene], num_frames: int = 17, size: int = 64) -> Tensor:
    """Scenes drawn for the VAE, (B, 3, F, H, W) in [−1, 1]."""
    return video_io.from_uint8(np.stack([draw_scene(scene, num_frames, size, size) for scene in scenes]))


@torch.no_grad()
def standardise(vae: VAE, count: int = 256) -> VAE:
    """Give each latent channel mean 0 and standard deviation 1 over clips, in place, changing no reconstruction.

    The 1×1×1 convs on both sides of the latents take it up: what the one takes off, the other puts back.
    """
    C = vae.config.latent_channels
    total = square = torch.zeros(C, dtype=torch.float64)
    for start in range(0, count, 8):
        video = draw_videos([sample_scene([TEST_SEED - 1, i]) for i in range(start, start + 8)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(video)
        mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
        total = total + mean.mean(dim=(0, 2, 3, 4)) * 8 / count
        square = square + (mean.square() + variance).mean(dim=(0, 2, 3, 4)) * 8 / count
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
    B, _, frames, height, width = video.shape
    config = vae.config
    T = (frames - 1) // config.time_factor + 1
    return (B, config.latent_channels, T, height // config.space_factor, width // config.space_factor)


@torch.no_grad()
def forget_the_past(vae: VAE) -> None:
    """Let every causal conv see its own frame only: the kernels for the two frames before become 0."""
    for conv in vae.modules():
        if isinstance(conv, CausalConv3d):
            conv.weight[:, :, :-1] = 0
            conv.weight[:, :, -1] *= 3**0.5  # as large an answer as the whole kernel would give


@contextlib.contextmanager
def single_frame(vae: VAE) -> Iterator[None]:
    """Inside, the VAE takes videos of one frame only, with the same result in a third of the time.

    Gradients reach the part of the kernels that is for a frame itself, not that for frames before.
    """

    def conv_of_repeated(upsample: Upsample, x: Tensor) -> Tensor:
        return conv_2d(upsample.conv, repeat(x, double_time=False))  # the first frame is never doubled

    def conv_2d(conv: CausalConv3d, x: Tensor) -> Tensor:
        padded = F.pad(x[:, :, 0], (1, 1, 1, 1), mode="replicate")  # (B, C, H + 2, W + 2)
        kernel = conv.weight[:, :, -1] + conv.weight[:, :, :-1].detach().sum(dim=2)
        return F.conv2d(padded, kernel, conv.bias, conv.stride[1:])[:, :, None]

    convs = {m: functools.partial(conv_2d, m) for m in vae.modules() if isinstance(m, CausalConv3d)}
    upsamples = {m: functools.partial(conv_of_repeated, m) for m in vae.modules() if isinstance(m, Upsample)}
    for module, forward in (convs | upsamples).items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in convs | upsamples:
            del module.forward


@torch.inference_mode()
def reconstruct(vae: VAE, video: Tensor) -> Tensor:
    """video (B, 3, F, H, W) → uint8 (B, F, H, W, 3), through the posterior's mean, in bf16 as in the pipeline."""
    with torch.autocast("cpu", torch.bfloat16):
        return video_io.to_uint8(vae.decode(vae.encode(video).mean).float())


def test(vae: VAE, folder: Path, step: int, count: int = 24) -> dict[str, float]:
    """PSNR on fresh clips and single frames, and how many reconstructed clips the judge finds right."""
    scenes = [sample_scene([TEST_SEED, i], "all") for i in range(count)]
    video = draw_videos(scenes)
    results = torch.cat([reconstruct(vae, part) for part in video.split(4)]).numpy()  # (B, F, H, W, 3)
    truth = video_io.to_uint8(video).numpy()
    frames = reconstruct(vae, video[:, :, :1]).numpy()
    right = [score(judge_clip(clip), describe(scene))["all"] for clip, scene in zip(results, scenes, strict=True)]
    pairs = [np.concatenate([truth[i, ::4], results[i, ::4]], axis=1) for i in range(6)]  # (5, 2H, W, 3)
    save_sheet(np.concatenate(pairs, axis=1), folder / f"sample_{step:06d}.png")
    return {
        "clip_psnr": float(np.mean([psnr(a, b) for a, b in zip(truth, results, strict=True)])),
        "frame_psnr": float(np.mean([psnr(a, b) for a, b in zip(truth[:, :1], frames, strict=True)])),
        "judged_right": float(np.mean(right)),
    }


def describe(scene: Scene) -> Caption:
    """All that can be said of a scene, without words: what the judge should find in a perfect clip of it."""
    said = tuple(
        {"colour": thing.colour, "shape": thing.shape, "motion": thing.motion}
        | ({"size": thing.size} if thing.size else {})
        for thing in scene.objects
    )
    return Caption("", scene.background, said)


def save_sheet(columns: np.ndarray, path: Path) -> None:
    """Images (N, H, W, 3) side by side as one PNG."""
    video_io.write_video(path, np.concatenate(list(columns), axis=1)[None])


if __name__ == "__main__":
    with refusals_in_one_line():
        main()
