"""Whose tensor is whose: our names against those of the Diffusers layout, model by model.

A row is "our module": "their module", with {} for a number; `.weight` and `.bias` stay what they are. Every row
is read in both directions: `match.py` builds our model without weights, asks it for its names, and looks up
what each is called over there. A row missing here, or one too many there, ends the conversion with the list.
"""

import re
from dataclasses import replace


def theirs(model: str, name: str) -> str:
    """The Diffusers name of our tensor: ("dit", "text_embedder.norm.bias") → "text_embeddings.norm.bias".

    KeyError for a name that no row has.
    """
    module, _, kind = name.rpartition(".")
    template, indices = as_template(module)
    if template not in TABLES[model]:
        raise KeyError(f"weights_convert/tables.py has no row for {model}'s {template}")
    return f"{TABLES[model][template].format(*indices)}.{kind}"


def kind_of(model: str, tensors: dict) -> str:
    """The key of these tables for a model's tensors: "vae2d" for a VAE whose convolutions are 2-D, else `model`."""
    ends = MARKS["vae2d"][0]
    flat = any(name.endswith(ends) and len(tensor.shape) == 4 for name, tensor in tensors.items())
    return "vae2d" if model == "vae" and flat else model


def as_template(module: str) -> tuple[str, list[str]]:
    """ "blocks.3.norm" → ("blocks.{}.norm", ["3"])."""
    number = re.compile(r"(?<=\.)\d+(?=\.|$)")
    return number.sub("{}", module), number.findall(module)


def under(ours: str, theirs: str, rows: dict[str, str]) -> dict[str, str]:
    """The same rows, each side below another module."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in rows.items()}


ATTENTION = {
    "to_q": "to_query",
    "to_k": "to_key",
    "to_v": "to_value",
    "q_norm": "query_norm",
    "k_norm": "key_norm",
    "to_out": "out_layer",
}
FEED_FORWARD = {"linear_in": "in_layer", "linear_out": "out_layer"}
TEXT_BLOCK = {
    "modulation.linear": "text_modulation.out_layer",
    **under("self_attention", "self_attention", ATTENTION),
    **under("feed_forward", "feed_forward", FEED_FORWARD),
}
VISUAL_BLOCK = {
    "modulation.linear": "visual_modulation.out_layer",
    **under("self_attention", "self_attention", ATTENTION),
    **under("cross_attention", "cross_attention", ATTENTION),
    **under("feed_forward", "feed_forward", FEED_FORWARD),
}
DIT = {
    "time_embedder.linear_in": "time_embeddings.in_layer",
    "time_embedder.linear_out": "time_embeddings.out_layer",
    "pooled_embedder.linear": "pooled_text_embeddings.in_layer",
    "pooled_embedder.norm": "pooled_text_embeddings.norm",
    "text_embedder.linear": "text_embeddings.in_layer",
    "text_embedder.norm": "text_embeddings.norm",
    "patch_embedder": "visual_embeddings.in_layer",
    **under("text_blocks.{}", "text_transformer_blocks.{}", TEXT_BLOCK),
    **under("visual_blocks.{}", "visual_transformer_blocks.{}", VISUAL_BLOCK),
    "final_layer.modulation.linear": "out_layer.modulation.out_layer",
    "final_layer.linear": "out_layer.out_layer",
}

RESIDUAL_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1.conv",
    "norm_2": "norm2",
    "conv_2": "conv2.conv",
    "shortcut": "conv_shortcut.conv",
}
MID = {
    **under("block_1", "resnets.0", RESIDUAL_BLOCK),
    "attention.norm": "attentions.0.group_norm",
    "attention.to_q": "attentions.0.to_q",
    "attention.to_k": "attentions.0.to_k",
    "attention.to_v": "attentions.0.to_v",
    "attention.to_out": "attentions.0.to_out.0",
    **under("block_2", "resnets.1", RESIDUAL_BLOCK),
}
ENDS = {
    "conv_in": "conv_in.conv",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out.conv",
    **under("mid", "mid_block", MID),
}
# Our stages count residual blocks and the resampling conv behind them in one row: its second number goes nowhere.
VAE = {
    **under("encoder", "encoder", ENDS),
    **under("encoder.stages.{}.{}", "encoder.down_blocks.{}.resnets.{}", RESIDUAL_BLOCK),
    "encoder.stages.{}.{}.conv": "encoder.down_blocks.{}.downsamplers.0.conv.conv",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **under("decoder", "decoder", ENDS),
    **under("decoder.stages.{}.{}", "decoder.up_blocks.{}.resnets.{}", RESIDUAL_BLOCK),
    "decoder.stages.{}.{}.conv": "decoder.up_blocks.{}.upsamplers.0.conv.conv",
}

# FLUX.1's 2-D one: the same modules under their plain names, as no wrapper pads them, and no quant convs.
VAE2D = {ours: theirs.removesuffix(".conv") for ours, theirs in VAE.items() if "quant_conv" not in ours}

SWIGLU = {"gate": "gate_proj", "linear_in": "up_proj", "linear_out": "down_proj"}
QWEN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    **under("feed_forward", "mlp", SWIGLU),
}
QWEN = {
    "embedding": "model.embed_tokens",
    **under("blocks.{}", "model.layers.{}", QWEN_BLOCK),
    "norm": "model.norm",
}

QWEN_VISION_BLOCK = {
    "attention_norm": "norm1",
    "attention.to_qkv": "attn.qkv",
    "attention.to_out": "attn.proj",
    "feed_forward_norm": "norm2",
    **under("feed_forward", "mlp", SWIGLU),
}
QWEN_VISION = {
    "patch_embedder": "visual.patch_embed.proj",
    **under("blocks.{}", "visual.blocks.{}", QWEN_VISION_BLOCK),
    "merger.norm": "visual.merger.ln_q",
    "merger.linear_in": "visual.merger.mlp.0",
    "merger.linear_out": "visual.merger.mlp.2",
}
QWEN_HEAD = {"": "lm_head"}

CLIP_BLOCK = {
    "attention_norm": "layer_norm1",
    "to_q": "self_attn.q_proj",
    "to_k": "self_attn.k_proj",
    "to_v": "self_attn.v_proj",
    "to_out": "self_attn.out_proj",
    "feed_forward_norm": "layer_norm2",
    "linear_in": "mlp.fc1",
    "linear_out": "mlp.fc2",
}
CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    **under("blocks.{}", "text_model.encoder.layers.{}", CLIP_BLOCK),
    "norm": "text_model.final_layer_norm",
}

TABLES = {
    "dit": DIT,
    "vae": VAE,
    "vae2d": VAE2D,
    "qwen": QWEN,
    "clip": CLIP,
    "qwen_vision": QWEN_VISION,
    "qwen_head": QWEN_HEAD,
}

# What a model has no use for, by the start of its name: of Qwen's the other two models' tensors.
DROPPED = {
    "dit": (),
    "vae": (),
    "vae2d": (),
    "qwen": ("lm_head.", "visual."),
    "qwen_vision": ("model.", "lm_head."),
    "qwen_head": ("model.", "visual."),
    "clip": (
        "vision_model.",
        "text_projection",
        "visual_projection.",
        "logit_scale",
        "text_model.embeddings.position_ids",
        "visual.",  # these in OpenAI's own files
        "input_resolution",
        "context_length",
        "vocab_size",
    ),
}

# Other spellings of the same names, by the start of the name; the first that fits is respelled.
RESPELLED = {
    "dit": {},
    "vae": {},
    "vae2d": {},
    "qwen": {
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "model.visual.": "visual.",
        "language_model.": "model.",
    },
    "clip": {
        "embeddings.": "text_model.embeddings.",
        "encoder.": "text_model.encoder.",
        "final_layer_norm.": "text_model.final_layer_norm.",
    },
}


# OpenAI's own spelling of CLIP's text tower, module by module; q, k and v are one matrix there.
OPENAI_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPENAI_CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    **under("transformer.resblocks.{}", "text_model.encoder.layers.{}", OPENAI_CLIP_BLOCK),
    "ln_final": "text_model.final_layer_norm",
}


# Black Forest Labs' own spelling of FLUX.1's VAE, module by module (`ae.safetensors`). Its decoder counts stages from
# the image back to the latents, and its attention has 1×1 convs where ours has Linears.
BFL_RESIDUAL_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
BFL_ENDS = {
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    **under("mid.block_1", "mid_block.resnets.0", BFL_RESIDUAL_BLOCK),
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    **under("mid.block_2", "mid_block.resnets.1", BFL_RESIDUAL_BLOCK),
}
BFL_VAE = {
    **under("encoder", "encoder", BFL_ENDS),
    **under("encoder.down.{}.block.{}", "encoder.down_blocks.{}.resnets.{}", BFL_RESIDUAL_BLOCK),
    "encoder.down.{}.downsample.conv": "encoder.down_blocks.{}.downsamplers.0.conv",
    **under("decoder", "decoder", BFL_ENDS),
    **under("decoder.up.{}.block.{}", "decoder.up_blocks.{}.resnets.{}", BFL_RESIDUAL_BLOCK),
    "decoder.up.{}.upsample.conv": "decoder.up_blocks.{}.upsamplers.0.conv",
}


# How the name of one tensor ends that every model of its kind has, and what may stand before that.
MARKS = {
    "dit": ("visual_embeddings.in_layer.weight", ("",)),
    "vae": ("encoder.conv_in.conv.weight", ("",)),
    "vae2d": ("encoder.conv_in.weight", ("",)),
    "qwen": ("embed_tokens.weight", ("model.language_model.", "language_model.model.", "language_model.", "model.")),
    "clip": ("token_embedding.weight", ("text_model.embeddings.", "embeddings.", "")),
}
# What torch.compile and FSDP put in front of the modules that they wrap.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(model: str, tensors: dict) -> dict:
    """The model's tensors without what other tools put before their names, such as "model.diffusion_model.".

    What is not below that start, such as other models in the same file, is left out. Of two copies the one below "ema."
    is taken, as it is what a trainer samples with. ValueError if the model is there twice otherwise.
    """
    mark, starts = MARKS[model]
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    heads = [name.removesuffix(mark) for name in tensors if name == mark or name.endswith(f".{mark}")]
    prefixes = {head.removesuffix(next((s for s in starts if head.endswith(s)), "")) for head in heads}
    averaged = {prefix for prefix in prefixes if prefix.endswith("ema.")}
    chosen = averaged if len(averaged) == 1 else prefixes
    if len(chosen) > 1:
        raise ValueError(f"it holds a {model} more than once, below {sorted(prefixes)}: save one of them alone")
    prefix = "".join(chosen)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def respell(model: str, tensors: dict) -> dict:
    """The tensors under the names that stand in the table, whichever way their saver spells them.

    ValueError if two spellings of one name are there.
    """
    tensors = unwrap(model, tensors)
    if model == "clip" and "positional_embedding" in tensors:
        tensors = respell_openai_clip(tensors)
    if model == "vae2d" and "encoder.down.0.block.0.norm1.weight" in tensors:
        tensors = respell_bfl_vae(tensors)
    respelled = {}
    for name, tensor in tensors.items():
        start = next((start for start in RESPELLED[model] if name.startswith(start)), "")
        standard = RESPELLED[model].get(start, "") + name.removeprefix(start)
        if standard in respelled:
            raise ValueError(f"two tensors are called {standard}, one of them spelled {name}")
        respelled[standard] = tensor
    return respelled


def respell_openai_clip(tensors: dict) -> dict:
    """OpenAI's names → transformers'; the rows of `in_proj` are those of q, k and v."""
    respelled = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        template, indices = as_template(module)
        if name == "positional_embedding":
            respelled["text_model.embeddings.position_embedding.weight"] = tensor
        elif template == "transformer.resblocks.{}.attn" and kind.startswith("in_proj_"):
            for part, letter in enumerate("qkv"):
                module = f"text_model.encoder.layers.{indices[0]}.self_attn.{letter}_proj"
                respelled[f"{module}.{kind.removeprefix('in_proj_')}"] = tensor.rows(part, parts=3)
        elif template in OPENAI_CLIP:
            respelled[f"{OPENAI_CLIP[template].format(*indices)}.{kind}"] = tensor
        else:
            respelled[name] = tensor
    return respelled


def respell_bfl_vae(tensors: dict) -> dict:
    """Black Forest Labs' names → diffusers'; a 1×1 conv (C, C, 1, 1) is a matrix (C, C)."""
    stages = {int(name.split(".")[2]) for name in tensors if re.match(r"decoder\.up\.\d+\.", name)}
    respelled = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        template, indices = as_template(module)
        if template.startswith("decoder.up.{}"):
            indices[0] = str(max(stages) - int(indices[0]))
        if ".attn_1." in name and tensor.shape[2:] == (1, 1):
            tensor = replace(tensor, shape=tensor.shape[:2])
        respelled[f"{BFL_VAE[template].format(*indices)}.{kind}" if template in BFL_VAE else name] = tensor
    return respelled
