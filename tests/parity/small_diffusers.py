"""A whole Diffusers checkpoint, small and random, written by the real libraries.

The sizes are small where they may be; the vocabularies are the real ones, the VAE's factors (8 in space, 4 in time)
and the 16 latent channels too, so that both references' pipelines run on it.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from random_weights import randomise
from theirs import QwenTokenizer
from tokenizer_data import tokenizer_folder

PIPELINES = {
    "t2v": Kandinsky5T2VPipeline,
    "i2v": Kandinsky5I2VPipeline,
    "t2i": Kandinsky5T2IPipeline,
    "i2i": Kandinsky5I2IPipeline,
}
VISION = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "fullatt_block_indexes": [1]}
NABLA = dict(
    attention_type="nabla", attention_P=0.8, attention_wT=5, attention_wH=3, attention_wW=1,
    attention_add_sta=True, attention_method="topcdf",
)  # fmt: skip


def save_small_checkpoint(
    folder: Path, kind: str = "t2v", nabla: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> Path:
    """`build_small_pipeline`, saved by `DiffusionPipeline.save_pretrained(folder, **options)`."""
    build_small_pipeline(kind, nabla, seed).to(dtype).save_pretrained(folder, **options)
    name_standard_tokenizer(Path(folder))
    return Path(folder)


def name_standard_tokenizer(folder: Path) -> None:
    """Make model_index.json name a tokenizer class that diffusers can import. Then `from_pretrained(folder,
    tokenizer=load_qwen_tokenizer())` works, which it does not with Qwen2VLProcessor where torchvision is missing."""
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def build_small_pipeline(kind: str = "t2v", nabla: bool = False, seed: int = 0) -> DiffusionPipeline:
    """kind: one of PIPELINES; every parameter is random, norms, gates and modulations included."""
    return PIPELINES[kind](
        transformer=randomise(build_transformer(nabla, visual_cond=kind != "t2i"), seed),
        vae=randomise(build_image_vae() if kind in ("t2i", "i2i") else build_vae(), seed + 1),
        text_encoder=randomise(build_qwen(vision=VISION if kind == "i2i" else None), seed + 2),
        text_encoder_2=randomise(build_clip(), seed + 3),
        tokenizer=load_qwen_tokenizer(),
        tokenizer_2=CLIPTokenizerFast.from_pretrained(tokenizer_folder("clip-vit-large-patch14")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def build_transformer(
    nabla: bool = False, text_dim: int = 64, pooled_dim: int = 32, visual_cond: bool = True
) -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, visual_cond=visual_cond, patch_size=(1, 2, 2), in_text_dim=text_dim,
        in_text_dim2=pooled_dim, time_dim=48, model_dim=64, ff_dim=96, num_text_blocks=2, num_visual_blocks=2,
        axes_dims=(8, 12, 12), **(NABLA if nabla else {}),
    )  # fmt: skip


def build_vae(channels: tuple[int, ...] = (16, 24, 32, 32), groups: int = 8) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(block_out_channels=channels, norm_num_groups=groups)


def build_image_vae(channels: tuple[int, ...] = (16, 24, 32, 32), groups: int = 8) -> AutoencoderKL:
    """FLUX.1's, smaller; `sample_size` is that of a tile."""
    stages = len(channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages,
        block_out_channels=channels, layers_per_block=2, latent_channels=16, norm_num_groups=groups, sample_size=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def build_qwen(
    tie_word_embeddings: bool = False, vision: dict | None = None, **text_sizes
) -> Qwen2_5_VLForConditionalGeneration:
    """Vision tower and lm_head too, as released checkpoints have them (tied, the embedding is the lm_head)."""
    text = dict(
        vocab_size=151680, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=2048, pad_token_id=151643,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    text |= text_sizes
    vision = vision or dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32)
    vision = {**vision, "out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie_word_embeddings)
    )


def build_clip(dim: int = 32) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=dim, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=dim
        )
    )


def load_qwen_tokenizer() -> QwenTokenizer:
    folder = tokenizer_folder("qwen2.5")
    added_tokens = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    # normalized=False as a released tokenizer_config.json says; without it <|im_end|> is missed before some marks
    decoder = {i: AddedToken(token, normalized=False, special=True) for token, i in added_tokens.items()}
    return QwenTokenizer.from_pretrained(
        folder, added_tokens_decoder=decoder, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
