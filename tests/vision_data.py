"""A small whole Qwen2.5-VL with fixed random weights, what it is given, and what transformers computes of that.

The results are in data/golden_vision.safetensors; parity/make_vision_goldens.py writes them.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kandinsky5.config import QwenConfig, QwenVisionConfig
from kandinsky5.qwen import Qwen, QwenHead
from kandinsky5.qwen_vision import QwenVision

GOLDEN = Path(__file__).parent / "data" / "golden_vision.safetensors"
IMAGE, WORDS = 150, 140  # the image token; ids below WORDS are words
QWEN = QwenConfig(vocab_size=160, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ff_dim=96, image_token=IMAGE)
VISION = QwenVisionConfig(dim=32, num_layers=4, num_heads=2, ff_dim=24, full_blocks=(1, 3), out_dim=64)
SMALL_IMAGES = [(40, 50), (70, 100)]  # one is enlarged to the least area, the other has half a token in height


def build_models() -> dict[str, nn.Module]:
    """ "qwen", "qwen_vision" and "qwen_head", the same values on every machine."""
    models = {"qwen": Qwen(QWEN), "qwen_vision": QwenVision(VISION), "qwen_head": QwenHead(QWEN)}
    generator = np.random.RandomState(32)
    for model in models.values():
        model.eval().requires_grad_(False)
        for name, weight in sorted(model.named_parameters()):
            noise = torch.from_numpy(generator.uniform(-1, 1, weight.shape)).float()
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.5 * noise if is_norm else noise * (3 / weight[0].numel()) ** 0.5)
    return models


def random_image(height: int, width: int) -> Tensor:
    """uint8 (H, W, 3), of full contrast: the resizing filter overshoots 0 and 255."""
    generator = np.random.RandomState(height)
    return torch.from_numpy(generator.randint(0, 256, (height, width, 3), dtype=np.uint8))


def prepared_images() -> list[Tensor]:
    """Two images (3, H, W) as the tower takes them: 5 × 6 tokens, whose windows are cut off on two sides, and 2 × 3."""
    generator = np.random.RandomState(5)
    return [torch.from_numpy(generator.uniform(-2, 2, (3, 28 * h, 28 * w))).float() for h, w in GRIDS]


GRIDS = [(5, 6), (2, 3)]


def random_text(images: int) -> list[int]:
    """Words, with the tokens of one or two images among them."""
    generator = np.random.RandomState(7 + images)
    ids = generator.randint(0, WORDS, 5).tolist()
    for rows, columns in GRIDS[:images]:
        ids += [IMAGE] * (rows * columns) + generator.randint(0, WORDS, 4).tolist()
    return ids + generator.randint(0, WORDS, 6).tolist()


@functools.cache
def load_results() -> dict[str, Tensor]:
    """pixels_i uint8 (H, W, 3); tokens (30, 64); and for 0, 1 and 2 images positions_n (3, S), states_n (S, 64) and
    words_n (64,)."""
    return load_file(GOLDEN)
