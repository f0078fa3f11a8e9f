"""The tables at the released sizes: each tensor of the references' models has its place in ours, and none is left.

Nothing is loaded: both sides are on the meta device.
"""

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the parity suite needs the extra: pip install .[parity] -c constraints.txt")

from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from kandinsky5 import config as native  # noqa: E402
from kandinsky5.tensor_files import Stored, Weights  # noqa: E402
from weights_convert import tables  # noqa: E402
from weights_convert.match import build_part, describe_model, dropped  # noqa: E402
from weights_convert.sizes import build_config  # noqa: E402
from weights_convert.write import Options  # noqa: E402

DIT = dict(
    in_visual_dim=16, out_visual_dim=16, visual_cond=True, patch_size=[1, 2, 2], in_text_dim=3584, in_text_dim2=768
)  # fmt: skip
LITE = dict(
    **DIT, time_dim=512, model_dim=1792, ff_dim=7168, num_text_blocks=2, num_visual_blocks=32, axes_dims=[16, 24, 24]
)  # fmt: skip
PRO = dict(
    **DIT, time_dim=1024, model_dim=4096, ff_dim=16384, num_text_blocks=4, num_visual_blocks=60, axes_dims=[32, 48, 48]
)  # fmt: skip
IMAGE = dict(
    **DIT, time_dim=512, model_dim=2560, ff_dim=10240, num_text_blocks=2, num_visual_blocks=50, axes_dims=[32, 48, 48]
)  # fmt: skip
T2I, I2I = IMAGE | {"visual_cond": False}, IMAGE
# As the files of FLUX.1, HunyuanVideo, Qwen2.5-VL-7B-Instruct (before text_config) and clip-vit-large-patch14 say it.
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, in_channels=3, out_channels=3,
    latent_channels=16, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
    act_fn="silu", mid_block_add_attention=True,
)  # fmt: skip
FLUX = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, in_channels=3, out_channels=3,
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, act_fn="silu", mid_block_add_attention=True,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=1024,
    use_quant_conv=False, use_post_quant_conv=False, latents_mean=None, latents_std=None, force_upcast=True,
)  # fmt: skip
QWEN = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    rms_norm_eps=1e-6, rope_theta=1000000.0, vocab_size=152064, hidden_act="silu", use_sliding_window=False,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, tie_word_embeddings=False,
)  # fmt: skip
QWEN_VISION = dict(
    depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3,
    out_hidden_size=3584, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, temporal_patch_size=2,
)  # fmt: skip
CLIP = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
    max_position_embeddings=77, layer_norm_eps=1e-5, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2,
)  # fmt: skip

# our model and config.json, how the references build it, what our config must come out as
CASES = {
    "Lite": ("dit", LITE, lambda: Kandinsky5Transformer3DModel(**LITE), native.LITE),
    "Pro": ("dit", PRO, lambda: Kandinsky5Transformer3DModel(**PRO), native.PRO),
    "T2I": ("dit", T2I, lambda: Kandinsky5Transformer3DModel(**T2I), native.IMAGE),
    "I2I": ("dit", I2I, lambda: Kandinsky5Transformer3DModel(**I2I), replace(native.IMAGE, visual_cond=True)),
    "FLUX VAE": ("vae2d", FLUX, lambda: AutoencoderKL(**FLUX), native.FLUX),
    "VAE": ("vae", VAE, AutoencoderKLHunyuanVideo, native.VAEConfig()),
    "Qwen": ("qwen", QWEN, lambda: Qwen2_5_VLForConditionalGeneration(qwen_config()), native.QwenConfig()),
    "CLIP": ("clip", CLIP, lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), native.CLIPConfig()),
    "whole CLIP": ("clip", {"text_config": CLIP}, lambda: CLIPModel(CLIPConfig(text_config=CLIP)), native.CLIPConfig()),
}
PARAMETERS = {
    "Lite": 2_007_702_848, "Pro": 19_311_325_248, "VAE": 246_478_803,
    "T2I": 6_022_080_576, "I2I": 6_022_254_656, "FLUX VAE": 83_819_683,
}  # fmt: skip
QWEN_PARAMETERS = {"qwen": 7_070_619_136, "qwen_vision": 676_550_144, "qwen_head": 544_997_376}


def qwen_config() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = {key: value for key, value in QWEN.items() if not key.startswith("rope")}
    return Qwen2_5_VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config={"hidden_size": 1280})


def whole_qwen() -> Qwen2_5_VLForConditionalGeneration:
    config = qwen_config()
    config.vision_config = type(config.vision_config)(**QWEN_VISION)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_released_size_is_mapped_or_dropped(case):
    kind, config, build, expected = CASES[case]
    model = kind.removesuffix("2d")
    with torch.device("meta"):
        reference = build().state_dict()
    tensors = {name: stored(tensor) for name, tensor in reference.items()}
    assert tables.kind_of(model, tensors) == kind
    tensors = tables.respell(kind, tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    assert build_config(kind, config, shapes, case) == expected
    weights = Weights(Path(case), tensors, {})
    part = build_part(model, expected, weights, partial(tables.theirs, kind), str, model, Options())

    assert {name: t.shape for name, t in part.tensors.items()} == describe_model(model, expected, case)[0]
    assert len(part.tensors) + len(dropped(model, weights)) == len(reference)
    if case in PARAMETERS:
        assert sum(prod(t.shape) for t in part.tensors.values()) == PARAMETERS[case]
        assert not dropped(model, weights)


def test_whole_qwen_is_three_models_and_nothing_is_left():
    with torch.device("meta"):
        reference = whole_qwen().state_dict()
    tensors = tables.respell("qwen", {name: stored(tensor) for name, tensor in reference.items()})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    vision = [build_config("qwen_vision", config, shapes, "Qwen") for config in (QWEN_VISION, {})]
    assert vision == [native.QwenVisionConfig()] * 2
    weights, config, used = Weights(Path("Qwen"), tensors, {}), native.PipelineConfig(qwen_vision=vision[0]), []
    for model, count in QWEN_PARAMETERS.items():
        sizes = getattr(config, model)
        part = build_part(model, sizes, weights, partial(tables.theirs, model), str, model, Options())
        assert sum(prod(t.shape) for t in part.tensors.values()) == count
        used += [tables.theirs(model, name) for name in part.tensors]
    assert sorted(used) == sorted(tensors) and sum(QWEN_PARAMETERS.values()) == 8_292_166_656


@pytest.mark.parametrize("case", CASES)
def test_sizes_come_from_the_tensors_without_a_config(case):
    model, _, build, expected = CASES[case]
    with torch.device("meta"):
        reference = build().state_dict()
    shapes = tables.respell(model, {name: tuple(tensor.shape) for name, tensor in reference.items()})
    assert build_config(model, {}, shapes, case) == expected


def stored(tensor: torch.Tensor) -> Stored:
    return Stored(Path("a file"), 0, 2 * tensor.numel(), tuple(tensor.shape), "BF16")
