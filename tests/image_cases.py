"""What is compared with the references of the image models, as cases.py does for videos: inputs, and our computation.

The cases serve live (tests/parity/test_image_parity.py), as stored results, and with mistakes built in
(tests/test_images.py).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cases import PROMPTS, SPATIAL
from kandinsky5 import Pipeline, vae_tiling
from kandinsky5.config import PipelineConfig, Tiling

ROPE_SCALE = (1.0, 1.0, 1.0)
SIZE = dict(height=48, width=32)
SAMPLING = dict(num_inference_steps=3, guidance_scale=3.5)
# Half of it is a size that Qwen's image processor leaves alone: what resizing gives may differ by a level.
EDITED = dict(height=112, width=224)
SEED = 11


def build_inputs(config: PipelineConfig) -> dict[str, dict[str, Tensor]]:
    """Random inputs for an image checkpoint of this config, always the same ones (see cases.build_inputs)."""
    generator = np.random.RandomState(SEED)

    def pixels(*shape):  # [-1, 1]
        return torch.from_numpy(generator.uniform(-1, 1, shape)).float()

    def noise(*shape):  # mean 0, variance 1
        return pixels(*shape) * 3**0.5

    dit, channels = config.dit, config.vae.latent_channels
    words = {"text": noise(2, 7, dit.text_dim), "pooled": noise(2, dit.pooled_dim), "t": torch.tensor([0.93, 0.31])}
    return {
        "dit": {"x": noise(2, 1, 12, 8, dit.input_channels), **words},
        "vae_encode": {"image": pixels(2, 3, 40, 24)},
        "vae_encode_tiled": {"image": pixels(1, 3, 72, 40)},
        "vae_decode": {"z": noise(2, channels, 5, 3)},
        "vae_decode_tiled": {"z": noise(1, channels, 9, 5)},
        "t2i": {"latents": noise(2, 1, 6, 4, channels)},
        "i2i": {"image": torch.from_numpy(generator.randint(0, 256, (*EDITED.values(), 3), dtype=np.uint8))},
    }


def _dit(pipe: Pipeline, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    return pipe.dit(x, text, pooled, t, rope_scale=ROPE_SCALE)


def _encode(tiling: Tiling) -> Callable[[Pipeline, Tensor], Tensor]:
    """Mean and log-variance (B, 32, h, w)."""
    return lambda pipe, image: torch.cat(vae_tiling.encode(pipe.vae, image[:, :, None], tiling), dim=1)[:, :, 0]


def _decode(tiling: Tiling) -> Callable[[Pipeline, Tensor], Tensor]:
    return lambda pipe, z: vae_tiling.decode(pipe.vae, z[:, :, None], tiling)[:, :, 0]


def _t2i(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Two prompts of unequal length in one batch; the references run each alone. Images (B, H, W, 3)."""
    images = pipe(
        PROMPTS[:2], shift=3.0, schedule="diffusers", latents=latents, output_type="float", progress=False,
        **SIZE, **SAMPLING,
    )  # fmt: skip
    return images[:, 0]


def _i2i(pipe: Pipeline, image: Tensor) -> Tensor:
    """The same image edited by two prompts of unequal length in one batch, from seeds SEED and SEED + 1."""
    images = pipe(
        PROMPTS[:2], image=image, seed=SEED, shift=3.0, schedule="diffusers", output_type="float", progress=False,
        **EDITED, **SAMPLING,
    )  # fmt: skip
    return images[:, 0]


OURS: dict[str, Callable[..., Tensor]] = {
    "dit": _dit,
    "vae_encode": _encode(Tiling()),
    "vae_encode_tiled": _encode(SPATIAL),
    "vae_decode": _decode(Tiling()),
    "vae_decode_tiled": _decode(SPATIAL),
    "t2i": _t2i,
    "i2i": _i2i,
}
IMAGES = ("t2i", "i2i")  # compared in levels of 1/255, the others by relative error
LIMITS = {name: 1 / 255 if name in IMAGES else 2e-5 for name in OURS}


def of_task(config: PipelineConfig) -> list[str]:
    """The cases for an image checkpoint of this config."""
    return [name for name in OURS if name not in IMAGES or name in config.tasks]


@torch.no_grad()
def compute(name: str, pipe: Pipeline, inputs: dict[str, Tensor]) -> Tensor:
    """Our result of one case, in float32."""
    return OURS[name](pipe, **inputs).float()


def measure_error(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Relative, or for images the largest difference; infinite where shapes differ or anything is not a number."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours.double() - theirs.double()).abs()
    error = float(difference.max() if name in IMAGES else difference.norm() / theirs.double().norm())
    return error if error == error else float("inf")
