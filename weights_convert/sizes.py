"""The sizes of the models: from other people's config.json files, and from the tensors themselves.

What both say must agree; what the config.json does not say comes from the tensors, and what neither says from the
defaults of `kandinsky5.config`, which are those of the released models.
"""

import math

from kandinsky5.config import CLIPConfig, DiTConfig, NablaConfig, QwenConfig, VAEConfig

# Our field: their key. Each row is read in both directions.
KEYS = {
    "dit": {
        "dim": "model_dim",
        "ff_dim": "ff_dim",
        "time_dim": "time_dim",
        "num_text_blocks": "num_text_blocks",
        "num_visual_blocks": "num_visual_blocks",
        "rope_axes": "axes_dims",
        "patch_size": "patch_size",
        "in_channels": "in_visual_dim",
        "out_channels": "out_visual_dim",
        "visual_cond": "visual_cond",
        "text_dim": "in_text_dim",
        "pooled_dim": "in_text_dim2",
    },
    "vae": {
        "channels": "block_out_channels",
        "blocks_per_stage": "layers_per_block",
        "norm_groups": "norm_num_groups",
        "image_channels": "in_channels",
        "latent_channels": "latent_channels",
        "scaling_factor": "scaling_factor",
    },
    "qwen": {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ff_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
    "clip": {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ff_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "start_token": "bos_token_id",
        "end_token": "eos_token_id",
    },
}
ModelConfig = DiTConfig | VAEConfig | QwenConfig | CLIPConfig
CONFIGS = {"dit": DiTConfig, "vae": VAEConfig, "qwen": QwenConfig, "clip": CLIPConfig}
# What names the class to build.
CLASS_KEYS: dict[str, dict[str, str | list[str]]] = {
    "dit": {"_class_name": "Kandinsky5Transformer3DModel"},
    "vae": {"_class_name": "AutoencoderKLHunyuanVideo"},
    "qwen": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
    "clip": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
}
# Keys that may only have this value, as our models compute nothing else.
FIXED: dict[str, dict[str, str | bool]] = {
    "dit": {},
    "vae": {"act_fn": "silu", "mid_block_add_attention": True},
    "qwen": {"hidden_act": "silu", "use_sliding_window": False},
    "clip": {"hidden_act": "quick_gelu"},
}


def build_config(model: str, config: dict, shapes: dict[str, tuple[int, ...]], where: str) -> ModelConfig:
    """The sizes of one model. config: their config.json, or {}; shapes: of their tensors, by their names.

    ValueError where the two contradict each other, or the config asks for what our models do not compute.
    """
    said = read_config(model, config, where)
    certain, family = SEE[model](Shapes(model, shapes, where))
    for field, value in certain.items():
        if said.get(field, value) != value:
            raise ValueError(
                f"{where}: config.json says {KEYS[model][field]} = {said[field]}, its tensors have {value}: "
                "use the config.json that belongs to these weights"
            )
    return CONFIGS[model](**{**family, **certain, **said})


def read_config(model: str, config: dict, where: str) -> dict:
    """Our fields as far as their config.json gives them; ValueError for what our models do not compute."""
    if model in ("qwen", "clip"):
        # Older configs have the text model's sizes at the top, newer ones (and whole CLIPs) in text_config.
        config = {**config, **(config.get("text_config") or {})}
    for key, value in FIXED[model].items():
        if config.get(key, value) != value:
            raise ValueError(f"{where}: config.json says {key} = {config[key]!r}; this code computes only {value!r}")
    rope = config.get("rope_parameters") or {}
    config = {"rope_theta": rope.get("rope_theta"), **{k: v for k, v in config.items() if v is not None}}

    said = {}
    defaults = CONFIGS[model]()
    for field, key in KEYS[model].items():
        if config.get(key) is not None:
            said[field] = _as_type_of(getattr(defaults, field), config[key], f"{where}: config.json says {key}")
    if model == "dit":
        said["nabla"] = read_nabla(config, where)
    if model == "vae" and config:
        # diffusers: the last stages of those that halve space halve time as well, but never the very last stage.
        space = config.get("spatial_compression_ratio", 8)
        time = config.get("temporal_compression_ratio", config.get("time_compression_ratio", 4))  # Tencent's key
        if not {space, time} <= {1, 2, 4, 8, 16}:
            raise ValueError(
                f"{where}: config.json says compression ratios {space} and {time}; they are powers of two up to 16"
            )
        halvings, first = space.bit_length() - 1, len(said.get("channels", defaults.channels)) - time.bit_length()
        said["halves_time"] = tuple(stage >= first for stage in range(halvings))
    if model == "clip" and config:
        # Old configs have 0 and 2, which were never CLIP's: transformers reads them as the last two of the vocabulary.
        vocabulary, old = said.get("vocab_size", defaults.vocab_size), said.get("end_token", 2) == 2
        if old:
            said["end_token"] = vocabulary - 1
        if "start_token" not in said or old and said["start_token"] == 0:
            said["start_token"] = vocabulary - 2
    return said


def to_their_config(model: str, sizes) -> dict:
    """The config.json that diffusers or transformers builds a model of these sizes from."""
    config = {key: getattr(sizes, field) for field, key in KEYS[model].items()} | FIXED[model]
    if model == "dit" and sizes.nabla:
        wT, wH, wW = sizes.nabla.window
        window = {"attention_wT": wT, "attention_wH": wH, "attention_wW": wW}
        config |= {"attention_type": "nabla", "attention_P": sizes.nabla.P, **window}
        config |= {"attention_add_sta": True, "attention_method": "topcdf"}
    if model == "vae":
        config |= {"out_channels": sizes.image_channels}
        config |= {"spatial_compression_ratio": sizes.space_factor, "temporal_compression_ratio": sizes.time_factor}
        stages = len(sizes.channels)
        config |= {
            "down_block_types": ["HunyuanVideoDownBlock3D"] * stages,
            "up_block_types": ["HunyuanVideoUpBlock3D"] * stages,
        }
    if model == "clip":
        config["projection_dim"] = sizes.dim
    if model == "qwen":
        third = sizes.head_dim // 2 * 3 // 8
        section = [sizes.head_dim // 2 - 2 * third, third, third]  # 16, 24, 24 for heads of 128
        # What is not there is made as small as it can be: no vision layers, and the embedding as the head.
        vision = {
            "model_type": "qwen2_5_vl_vision",
            "depth": 0,
            "hidden_size": 16,
            "num_heads": 1,
            "intermediate_size": 16,
        }
        config = {
            "text_config": {
                **config,
                "model_type": "qwen2_5_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta, "mrope_section": section},
            },
            "vision_config": {**vision, "out_hidden_size": sizes.dim},
            "tie_word_embeddings": True,
        }
    return {**CLASS_KEYS[model], **config}


def read_nabla(config: dict, where: str) -> NablaConfig | None:
    """NABLA's settings in the DiT's config.json, None for full attention; ValueError where they are incomplete."""
    kind = config.get("attention_type", "regular")
    if kind == "regular":
        return None
    if kind != "nabla":
        raise ValueError(f"{where}: config.json says attention_type = {kind!r}; this code knows 'regular' and 'nabla'")
    missing = [
        key for key in ("attention_P", "attention_wT", "attention_wH", "attention_wW") if config.get(key) is None
    ]
    if missing:
        raise ValueError(f"{where}: config.json says attention_type = 'nabla' but no {', '.join(missing)}")
    window = tuple(config[f"attention_w{axis}"] for axis in "THW")
    return NablaConfig(P=float(config["attention_P"]), window=window)


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


# Each returns what the tensors say for certain, and what they say if the model is one of the released family.


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
    # A patch of v places is v·(2c + 1) numbers going in (v·c without visual_cond) and v·c coming out.
    visual_cond = patch_in != patch_out
    places = patch_in - 2 * patch_out if visual_cond else 4
    side = math.isqrt(max(places, 1))
    family = {
        "rope_axes": (head_dim - 2 * (head_dim * 3 // 8), head_dim * 3 // 8, head_dim * 3 // 8),
        "patch_size": (1, side, side),
        "in_channels": patch_out // side**2,
        "out_channels": patch_out // side**2,
        "visual_cond": visual_cond,
    }
    return certain, family


def see_vae(shapes: Shapes) -> tuple[dict, dict]:
    """The fields of `VAEConfig`, as far as tensors show them."""
    first = "encoder.down_blocks.{}.resnets.0.conv1.conv.weight"
    stages = shapes.number(first)
    certain = {
        "channels": tuple(shapes.of(first.format(stage), axes=5)[0] for stage in range(stages)),
        "blocks_per_stage": shapes.number("encoder.down_blocks.0.resnets.{}.conv1.conv.weight"),
        "image_channels": shapes.of("encoder.conv_in.conv.weight", axes=5)[1],
        "latent_channels": shapes.of("post_quant_conv.weight", axes=5)[0],
    }
    return certain, {}


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


SEE = {"dit": see_dit, "vae": see_vae, "qwen": see_qwen, "clip": see_clip}


def _as_type_of(default, value, what: str):
    """A value from a JSON file as the type of our field; sizes are positive."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)) and value:
        return tuple(_as_type_of(default[0], item, what) for item in value)
    if isinstance(default, float) and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is type(default) and (isinstance(value, bool) or 0 <= value < 2**31):
        return value
    raise ValueError(f"{what} = {value!r}, which is no {type(default).__name__} as in {default!r}")
