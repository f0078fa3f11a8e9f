"""The sizes of the models: from other people's config.json files, and from the tensors themselves.

Both must agree; what config.json leaves out comes from the tensors, and what neither has from the defaults of
`kandinsky5.config`, which are those of the released models.
"""

from dataclasses import asdict
from typing import Any

from kandinsky5.config import CLIPConfig, DiTConfig, NablaConfig, QwenConfig, QwenVisionConfig, VAEConfig
from kandinsky5.config_file import check_values, flatten, from_json, type_hints
from weights_convert.shapes import SEE, Shapes

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
        "image_token": "image_token_id",
    },
    "qwen_vision": {
        "dim": "hidden_size",
        "num_layers": "depth",
        "num_heads": "num_heads",
        "ff_dim": "intermediate_size",
        "full_blocks": "fullatt_block_indexes",
        "out_dim": "out_hidden_size",
        "min_pixels": "min_pixels",  # these two of preprocessor_config.json
        "max_pixels": "max_pixels",
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
KEYS["vae2d"] = KEYS["vae"]
# Their other keys that are read, and their types; time_compression_ratio is Tencent's name of temporal_….
OTHER_KEYS: dict[str, dict[str, Any]] = {
    "dit": {
        "attention_type": str, "attention_P": float, "attention_wT": int, "attention_wH": int, "attention_wW": int,
        "attention_add_sta": bool, "attention_method": str,
    },
    "vae": {"spatial_compression_ratio": int, "temporal_compression_ratio": int, "time_compression_ratio": int},
    "vae2d": {},
    "qwen": {"head_dim": int, "mrope_section": tuple[int, ...]},
    "qwen_vision": {},
    "clip": {},
}  # fmt: skip
PREPROCESSOR = ("min_pixels", "max_pixels")  # of Qwen's vision, which stand in preprocessor_config.json
NABLA_KEYS = ("attention_P", "attention_wT", "attention_wH", "attention_wW")
MAY_BE_0 = ("num_text_blocks", "bos_token_id", "eos_token_id", "mrope_section", "fullatt_block_indexes")
ModelConfig = DiTConfig | VAEConfig | QwenConfig | QwenVisionConfig | CLIPConfig
CONFIGS = {
    "dit": DiTConfig,
    "vae": VAEConfig,
    "vae2d": VAEConfig,
    "qwen": QwenConfig,
    "qwen_vision": QwenVisionConfig,
    "clip": CLIPConfig,
}
# What names the class to build, where that is no key of FIXED.
CLASS_KEYS: dict[str, dict[str, str | list[str]]] = {
    "qwen": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
    "clip": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
}
# Keys that may only have one of these values, wherever they stand, as our models compute nothing else. Of a list every
# item is meant. Quantised weights are none of ours.
FIXED: dict[str, dict[str, tuple]] = {
    "dit": {
        "_class_name": ("Kandinsky5Transformer3DModel",),
        "attention_causal": (False,),
        "attention_local": (False,),
        "attention_glob": (False,),
        "quantization_config": (),
    },
    "vae": {
        "_class_name": ("AutoencoderKLHunyuanVideo", "AutoencoderKLCausal3D"),  # Tencent's name of the same
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "down_block_types": ("HunyuanVideoDownBlock3D", "DownEncoderBlockCausal3D"),
        "up_block_types": ("HunyuanVideoUpBlock3D", "UpDecoderBlockCausal3D"),
        "out_channels": (3,),
        "shift_factor": (0,),
        "latents_mean": (),
        "latents_std": (),
        "quantization_config": (),
    },
    "vae2d": {  # but for shift_factor, which neither reference applies
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "out_channels": (3,),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
        "latents_mean": (),
        "latents_std": (),
        "quantization_config": (),
    },
    "qwen": {
        "model_type": ("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text", "qwen2"),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention",),
        "rope_type": ("default", "mrope"),  # on three axes with equal positions mrope is plain
        "type": ("default", "mrope"),
        "partial_rotary_factor": (1,),
        "quantization_config": (),
    },
    "qwen_vision": {
        "hidden_act": ("silu",),
        "patch_size": (14,),
        "spatial_patch_size": (14,),
        "temporal_patch_size": (2,),
        "spatial_merge_size": (2,),
        "window_size": (112,),
        "in_channels": (3,),
        "in_chans": (3,),
    },
    "clip": {"model_type": ("clip", "clip_text_model"), "hidden_act": ("quick_gelu",), "quantization_config": ()},
}
# The tables of a config.json that may hold what others have at the top.
TABLES = ("text_config", "text_config_dict", "rope_parameters", "rope_scaling")


def kind_of(model: str, sizes: ModelConfig) -> str:
    """The key of these tables for a model of these sizes: "vae2d" for a 2-D VAE, else `model`."""
    return "vae2d" if isinstance(sizes, VAEConfig) and sizes.dimensions == 2 else model


def build_config(model: str, config: dict, shapes: dict[str, tuple[int, ...]], where: str) -> ModelConfig:
    """The sizes of one model. config: their config.json, or {}; shapes: of their tensors, by their names.

    ValueError if the two contradict each other, or the config asks for what our models do not compute.
    """
    given = read_config(model, config, where)
    certain, family = SEE[model](Shapes(model, shapes, where))
    for field, value in certain.items():
        if given.get(field, value) != value:
            raise ValueError(
                f"{where}: config.json says {KEYS[model][field]} = {given[field]}, its tensors have {value}: "
                "use the config.json that belongs to these weights"
            )
    sizes = CONFIGS[model](**{**family, **certain, **given})
    theirs = {f"{model}.{field}": key for field, key in KEYS[model].items()}
    try:
        check_values(flatten({model: asdict(sizes)}), lambda field: theirs.get(field, field))
    except ValueError as error:
        raise ValueError(f"{where}: config.json: {error}: use the one that belongs to these weights") from error
    return sizes


def read_config(model: str, config: dict, where: str) -> dict:
    """Our fields as far as their config.json gives them; ValueError for what our models do not compute."""
    given = read_values(model, config, where)
    fields = {field: given[key] for field, key in KEYS[model].items() if key in given}
    if model == "dit":
        fields["nabla"] = read_nabla(given, where)
    if model == "vae" and config:
        fields["halves_time"] = read_halvings(given, where)
    if {"head_dim", "hidden_size", "num_attention_heads"} <= given.keys():
        if given["head_dim"] * given["num_attention_heads"] != given["hidden_size"]:
            raise ValueError(
                f"{where}: config.json says head_dim {given['head_dim']}; this code computes hidden_size / heads"
            )
    if model == "clip" and config:
        # Old configs have 0 and 2, which were never CLIP's: transformers reads them as the last two of the vocabulary.
        vocabulary, old = given.get("vocab_size", CLIPConfig.vocab_size), given.get("eos_token_id", 2) == 2
        if old:
            fields["end_token"] = vocabulary - 1
        if "start_token" not in fields or old and fields["start_token"] == 0:
            fields["start_token"] = vocabulary - 2
    return fields


def read_values(model: str, config: dict, where: str) -> dict[str, Any]:
    """What we read of a config.json, by their keys; null is as good as not there.

    ValueError for values of other types, for those of `FIXED` that are not ours, and for two that contradict each
    other: some savers write the same key at the top and in a table.
    """
    tables = [config]
    for table in tables:  # which grows meanwhile
        tables += [read_value(dict, table[name], name, where) for name in TABLES if table.get(name) is not None]
    types = type_hints(CONFIGS[model])
    kinds = {key: types[field] for field, key in KEYS[model].items()} | OTHER_KEYS[model]
    given: dict[str, Any] = {}
    for table in tables:
        for key, ours in FIXED[model].items():
            found = table.get(key)
            if found is not None and not all(v in ours for v in (found if isinstance(found, list) else [found])):
                only = " or ".join(map(repr, ours)) or "without it"
                raise ValueError(f"{where}: config.json says {key} = {found!r:.100}; this code computes only {only}")
        for key in kinds.keys() & table.keys():
            if table[key] is not None:
                value = read_value(kinds[key], table[key], key, where)
                values = value if isinstance(value, tuple) else (value,)
                if key not in MAY_BE_0 and any(type(n) in (int, float) and n <= 0 for n in values):
                    raise ValueError(
                        f"{where}: config.json says {key} is {table[key]!r}; it must be more than 0: correct it"
                    )
                if given.setdefault(key, value) != value:
                    raise ValueError(f"{where}: config.json says {key} twice, {given[key]!r:.100} and {value!r:.100}")
    return given


def read_value(kind, value, key: str, where: str):
    """A value of a config.json as the type `kind` has it; ValueError that names file, key and value for another."""
    try:
        return from_json(kind, value, key)
    except ValueError as error:
        raise ValueError(f"{where}: config.json says {error}: correct it") from error


def to_their_config(model: str, sizes, vision: QwenVisionConfig | None = None) -> dict:
    """The config.json that diffusers or transformers builds a model of these sizes from; vision: of a whole Qwen."""
    given = ("_class_name", "act_fn", "mid_block_add_attention", "hidden_act", "use_sliding_window")
    config = {key: FIXED[model][key][0] for key in given if key in FIXED[model]}
    config |= {key: getattr(sizes, field) for field, key in KEYS[model].items()}
    if model == "dit" and sizes.nabla:
        wT, wH, wW = sizes.nabla.window
        window = {"attention_wT": wT, "attention_wH": wH, "attention_wW": wW}
        config |= {"attention_type": "nabla", "attention_P": sizes.nabla.P, **window}
        config |= {"attention_add_sta": True, "attention_method": "topcdf"}
    if model == "vae":
        config |= {"spatial_compression_ratio": sizes.space_factor, "temporal_compression_ratio": sizes.time_factor}
    if model in ("vae", "vae2d"):
        whole = ("out_channels", "use_quant_conv", "use_post_quant_conv")
        config |= {key: FIXED[model][key][0] for key in whole if key in FIXED[model]}
        stages = len(sizes.channels)
        config |= {key: [FIXED[model][key][0]] * stages for key in ("down_block_types", "up_block_types")}
    if model == "vae2d":
        config |= {"sample_size": 1024, "shift_factor": 0.1159}  # as FLUX.1's own file says, for other pipelines
    if model == "clip":
        config["projection_dim"] = sizes.dim
    if model == "qwen":
        del config["image_token_id"]  # which goes to the top
        # What we do not have is made as small as possible: no vision layers, and the embedding as the head.
        tower = {"depth": 0, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": sizes.dim}
        if vision:
            keys = {field: key for field, key in KEYS["qwen_vision"].items() if field not in PREPROCESSOR}
            tower = {key: getattr(vision, field) for field, key in keys.items()}
        rope = {"rope_type": "default", "rope_theta": sizes.rope_theta, "mrope_section": sizes.rope_sections}
        config = {
            "text_config": {**config, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
            "vision_config": {**tower, "model_type": "qwen2_5_vl_vision"},
            "image_token_id": sizes.image_token,
            "tie_word_embeddings": vision is None,
        }
    return CLASS_KEYS.get(model, {}) | config


def read_nabla(given: dict[str, Any], where: str) -> NablaConfig | None:
    """NABLA's settings in the DiT's config.json, None for full attention; ValueError if they are incomplete."""
    kind = given.get("attention_type", "regular")
    if kind == "regular":
        return None
    for key, value, ours in (
        ("attention_type", kind, "nabla"),
        ("attention_add_sta", given.get("attention_add_sta", True), True),
        ("attention_method", given.get("attention_method", "topcdf"), "topcdf"),
    ):
        if value != ours:
            raise ValueError(f"{where}: config.json says {key} = {value!r:.100}; this code computes only {ours!r}")
    missing = [key for key in NABLA_KEYS if key not in given]
    if missing:
        raise ValueError(f"{where}: config.json says attention_type = 'nabla' but no {', '.join(missing)}")
    if given["attention_P"] > 1:
        raise ValueError(f"{where}: config.json says attention_P = {given['attention_P']}; it is a share, at most 1")
    return NablaConfig(P=given["attention_P"], window=tuple(given[f"attention_w{axis}"] for axis in "THW"))


def read_halvings(given: dict[str, Any], where: str) -> tuple[bool, ...]:
    """`VAEConfig.halves_time` from the compression ratios. In diffusers the first stages halve space, and the last of
    all but the very last halve time. ValueError if some would halve time alone, which none of ours does."""
    space = given.get("spatial_compression_ratio", 8)
    time = given.get("temporal_compression_ratio", given.get("time_compression_ratio", 4))
    first = len(given.get("block_out_channels", VAEConfig.channels)) - time.bit_length()
    halves_time = tuple(stage >= first for stage in range(space.bit_length() - 1))
    if (2 ** len(halves_time), 2 ** sum(halves_time)) != (space, time):
        raise ValueError(
            f"{where}: config.json says spatial_compression_ratio {space} and temporal_compression_ratio {time}; this "
            "code computes powers of two, where no stage halves time alone, such as 8 and 4"
        )
    return halves_time
