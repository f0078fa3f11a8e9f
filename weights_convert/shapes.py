"""The sizes of the models as their tensors' shapes show them.

Each `see_` function returns what the tensors show for certain, and what they show if the model is of the released
family.
"""

import math

from kandinsky5.config import FLUX


class Shapes:
    """Shapes by name, with a plain error where a name is missing."""

    def __init__(self, model: str, shapes: dict[str, tuple[int, ...]], where: str):
        self.model, self.shapes, self.where = model, shapes, where

    def of(self, name: str, axes: int = 2) -> tuple[int, ...]:
        """The shape of one tensor; ValueError if there is none, or none with so many axes."""
        shape = self.shapes.get(name)
        if shape is None:
            raise ValueError(f"{self.where} has no tensor {name}: these are not the weights of a {self.model}")
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{self.where}: {name} has the shape {shape}: these are not the weights of a {self.model}")
        return shape

    def number(self, template: str) -> int:
        """How many of "blocks.{}.norm.weight" there are, counted from 0."""
        return next(n for n in range(len(self.shapes) + 1) if template.format(n) not in self.shapes)


def see_dit(shapes: Shapes) -> tuple[dict, dict]:
    """The fields of `DiTConfig`; in the family one head has 1/4 of its channels for T and 3/8 for H and W each."""
    dim, patch_in = shapes.of("visual_embeddings.in_layer.weight")
    patch_out = shapes.of("out_layer.out_layer.weight")[0]
    time_dim, pooled_dim = shapes.of("pooled_text_embeddings.in_layer.weight")
    (head_dim,) = shapes.of("visual_transformer_blocks.0.self_attention.query_norm.weight", axes=1)
    certain = {
        "dim": dim,
        "ff_dim": shapes.of("visual_transformer_blocks.0.feed_forward.in_layer.weight")[0],
        "time_dim": time_dim,
        "num_text_blocks": shapes.number("text_transformer_blocks.{}.feed_forward.in_layer.weight"),
        "num_visual_blocks": shapes.number("visual_transformer_blocks.{}.feed_forward.in_layer.weight"),
        "text_dim": shapes.of("text_embeddings.in_layer.weight")[1],
        "pooled_dim": pooled_dim,
    }
    # A patch of v positions has v·(2c + 1) values going in (v·c without visual_cond) and v·c coming out.
    visual_cond = patch_in != patch_out
    positions = patch_in - 2 * patch_out if visual_cond else 4
    side = math.isqrt(max(positions, 1))
    family = {
        "rope_axes": (head_dim - 2 * (head_dim * 3 // 8), head_dim * 3 // 8, head_dim * 3 // 8),
        "patch_size": (1, side, side),
        "in_channels": patch_out // side**2,
        "out_channels": patch_out // side**2,
        "visual_cond": visual_cond,
    }
    return certain, family


def see_vae(shapes: Shapes, conv: str = ".conv", axes: int = 5) -> tuple[dict, dict]:
    """The fields of `VAEConfig`, as far as tensors show them. conv: what a convolution's name has before ".weight"."""
    block = f"encoder.down_blocks.{{}}.resnets.{{}}.conv1{conv}.weight"
    stages = shapes.number(block.format("{}", 0))
    certain = {
        "channels": tuple(shapes.of(block.format(stage, 0), axes)[0] for stage in range(stages)),
        "blocks_per_stage": shapes.number(block.format(0, "{}")),
        "image_channels": shapes.of(f"encoder.conv_in{conv}.weight", axes)[1],
        "latent_channels": shapes.of(f"decoder.conv_in{conv}.weight", axes)[1],
    }
    return certain, {}


def see_vae2d(shapes: Shapes) -> tuple[dict, dict]:
    """The same of a 2-D VAE; FLUX.1's scaling where no config says one."""
    certain, _ = see_vae(shapes, conv="", axes=4)
    certain |= {"halves_time": (False,) * (len(certain["channels"]) - 1), "dimensions": 2}
    return certain, {"scaling_factor": FLUX.scaling_factor}


def see_qwen(shapes: Shapes) -> tuple[dict, dict]:
    """The fields of `QwenConfig`; in the family a head has 128 channels."""
    vocab_size, dim = shapes.of("model.embed_tokens.weight")
    certain = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": shapes.number("model.layers.{}.input_layernorm.weight"),
        "ff_dim": shapes.of("model.layers.0.mlp.gate_proj.weight")[0],
    }
    kv_dim = shapes.of("model.layers.0.self_attn.k_proj.weight")[0]
    return certain, {"num_heads": max(dim // 128, 1), "num_kv_heads": max(kv_dim // 128, 1)}


def see_qwen_vision(shapes: Shapes) -> tuple[dict, dict]:
    """The fields of `QwenVisionConfig`; in the family a head has 80 channels."""
    dim = shapes.of("visual.patch_embed.proj.weight", axes=5)[0]
    certain = {
        "dim": dim,
        "num_layers": shapes.number("visual.blocks.{}.norm1.weight"),
        "ff_dim": shapes.of("visual.blocks.0.mlp.gate_proj.weight")[0],
        "out_dim": shapes.of("visual.merger.mlp.2.weight")[0],
    }
    return certain, {"num_heads": max(dim // 80, 1)}


def see_clip(shapes: Shapes) -> tuple[dict, dict]:
    """The fields of `CLIPConfig`; in the family a head has 64 channels, and the last two tokens are start and end."""
    vocab_size, dim = shapes.of("text_model.embeddings.token_embedding.weight")
    certain = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": shapes.number("text_model.encoder.layers.{}.layer_norm1.weight"),
        "ff_dim": shapes.of("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "max_positions": shapes.of("text_model.embeddings.position_embedding.weight")[0],
    }
    family = {"num_heads": max(dim // 64, 1), "start_token": vocab_size - 2, "end_token": vocab_size - 1}
    return certain, family


SEE = {
    "dit": see_dit,
    "vae": see_vae,
    "vae2d": see_vae2d,
    "qwen": see_qwen,
    "qwen_vision": see_qwen_vision,
    "clip": see_clip,
}
