"""Small models with random weights, for tests that need no reference."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5.checkpoint import save_checkpoint, without_weights
from kandinsky5.config import (
    CLIPConfig,
    DiTConfig,
    NablaConfig,
    PipelineConfig,
    QwenConfig,
    QwenVisionConfig,
    SamplingConfig,
    VAEConfig,
)
from kandinsky5.pipeline import Pipeline
from kandinsky5.runtime.loading import build_models
from kandinsky5.text_encoder import TextEncoder
from kandinsky5.tokenizer import Tokenizer
from tokenizer_data import tokenizer_folder

SMALL_DIT = DiTConfig(
    dim=64,
    ff_dim=96,
    time_dim=32,
    num_text_blocks=2,
    num_visual_blocks=2,
    rope_axes=(8, 12, 12),
    text_dim=16,
    pooled_dim=24,
)
SMALL_NABLA = NablaConfig(P=0.5, window=(3, 1, 1))
SMALL_VAE = VAEConfig(channels=(16, 32, 32, 32), norm_groups=8)
TINY_VAE = replace(SMALL_VAE, channels=(8, 16, 16, 16), norm_groups=4, blocks_per_stage=1)
SMALL_QWEN = QwenConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ff_dim=24)  # the real vocabulary
SMALL_VISION = QwenVisionConfig(dim=16, num_layers=2, num_heads=2, ff_dim=24, full_blocks=(1,), out_dim=16)
SMALL_CLIP = CLIPConfig(dim=24, num_layers=2, num_heads=2, ff_dim=32)  # likewise
SMALL = PipelineConfig(
    name="small",
    tasks=("t2v", "i2v"),
    dit=SMALL_DIT,
    vae=TINY_VAE,
    qwen=SMALL_QWEN,
    clip=SMALL_CLIP,
    sampling=SamplingConfig(num_inference_steps=2, height=32, width=48, num_frames=5, rope_scale=None, image_area=1536),
)


def build_small_models(config: PipelineConfig = SMALL) -> dict[str, nn.Module]:
    """The models of a checkpoint with random weights: four, or with `qwen_vision` six."""
    models = build_models(config)
    return {name: randomise(model) for name, model in models.items()}


def build_small_pipeline(config: PipelineConfig = SMALL, **changes) -> Pipeline:
    """A pipeline of small random models and the real tokenizers; `changes` replace fields of the config."""
    config = replace(config, **changes)
    models = build_small_models(config)
    dit, vae, qwen, clip, *vision_and_head = models.values()
    return Pipeline(config, dit, vae, TextEncoder(config.text, qwen, clip, *load_tokenizers(), *vision_and_head))


def build_meta_pipeline(config: PipelineConfig) -> Pipeline:
    """A pipeline of any size without weights: all its tensors are on the meta device, in bf16."""
    with without_weights():
        models = build_models(config).values()
    dit, vae, qwen, clip, *vision_and_head = (model.to(torch.bfloat16).eval() for model in models)
    return Pipeline(config, dit, vae, TextEncoder(config.text, qwen, clip, *load_tokenizers(), *vision_and_head))


def load_tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """Qwen's and CLIP's."""
    return Tokenizer.load(tokenizer_folder("qwen2.5")), Tokenizer.load(tokenizer_folder("clip-vit-large-patch14"))


def save_small_checkpoint(folder: Path, config: PipelineConfig = SMALL) -> Path:
    """The same as a native checkpoint folder, which is returned."""
    tokenizers = {"qwen": tokenizer_folder("qwen2.5"), "clip": tokenizer_folder("clip-vit-large-patch14")}
    save_checkpoint(folder, config, build_small_models(config), tokenizers)
    return folder


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
