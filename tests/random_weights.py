"""Small models with random weights, for tests that need no reference."""

import torch
from torch import Tensor, nn

from kandinsky5.config import CLIPConfig, DiTConfig, NablaConfig, QwenConfig, VAEConfig

SMALL_DIT = DiTConfig(
    dim=64,
    ff_dim=96,
    time_dim=32,
    num_text_blocks=2,
    num_visual_blocks=2,
    rope_axes=(8, 12, 12),
    text_dim=40,
    pooled_dim=24,
)
SMALL_NABLA = NablaConfig(P=0.5, window=(3, 1, 1))
SMALL_VAE = VAEConfig(channels=(16, 32, 32, 32), norm_groups=8)
SMALL_QWEN = QwenConfig(vocab_size=1000, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ff_dim=96)
SMALL_CLIP = CLIPConfig(vocab_size=1000, dim=64, num_layers=2, num_heads=4, ff_dim=96, start_token=998, end_token=999)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, norms, gates and modulations included: what is 0 or 1 hides mistakes.

    Matrices keep the size of what they multiply; scales of norms are about 1 and biases about 0, both ± 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = {f"{name}.weight" for name, m in model.named_modules() if "Norm" in type(m).__name__}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise + (name in scales))
    return model.eval().requires_grad_(False)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖, infinite where shapes differ or anything is not a number."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return error if error == error else float("inf")
