"""The references of the image models: how diffusers computes the cases of tests/image_cases.py.

What is changed in them is in theirs.py; here also the released sizes, which their pipelines would round to.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import cases
import image_cases
import theirs
from kandinsky5.config import PipelineConfig
from theirs import QwenTokenizer


def load_components(folder: Path) -> dict:
    """The parts of a Diffusers folder, as the arguments of the pipelines, in float32."""
    parts = {
        "transformer": Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ),
        "text_encoder_2": CLIPTextModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
    }
    for model in parts.values():
        model.eval()
    return parts | {
        "tokenizer": QwenTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _dit(parts: dict, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    return parts["transformer"](
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * t,
        visual_rope_pos=[torch.arange(n) for n in (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)],
        text_rope_pos=torch.arange(text.shape[1]),
        scale_factor=image_cases.ROPE_SCALE,
        sparse_params=None,
    ).sample


def _tiled(vae: AutoencoderKL, tiled: bool) -> AutoencoderKL:
    vae.use_tiling = tiled
    vae.tile_sample_min_size = cases.SPATIAL.pixels
    vae.tile_latent_min_size = cases.SPATIAL.pixels // 8
    vae.tile_overlap_factor = 1 - cases.SPATIAL.pixel_stride / cases.SPATIAL.pixels
    return vae


def _encode(tiled: bool) -> Callable[[dict, Tensor], Tensor]:
    def run(parts: dict, image: Tensor) -> Tensor:
        posterior = _tiled(parts["vae"], tiled).encode(image).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    return run


def build_t2i(parts: dict) -> Kandinsky5T2IPipeline:
    """Their pipeline with the training's template, for the cases' size."""
    _tiled(parts["vae"], False)
    pipe = Kandinsky5T2IPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert "a prompt engineer" in pipe.prompt_template and pipe.prompt_template_encode_start_idx == 40
    pipe.prompt_template = pipe.prompt_template.replace("a prompt engineer", "a promt engineer")
    pipe.prompt_template_encode_start_idx = 41
    pipe.resolutions = [(image_cases.SIZE["width"], image_cases.SIZE["height"])]
    return pipe


def _t2i(parts: dict, latents: Tensor) -> Tensor:
    pipe = build_t2i(parts)
    images = [
        pipe(
            prompt=prompt,
            negative_prompt="",
            latents=noise[None],
            output_type="np",
            **image_cases.SIZE,
            **image_cases.SAMPLING,
        ).image
        for prompt, noise in zip(cases.PROMPTS, latents, strict=False)
    ]
    return torch.cat([torch.as_tensor(image) for image in images])


class QwenProcessor(QwenTokenizer):
    """Stands in for Qwen2VLProcessor, which needs torchvision. It ignores the images that it is given, which diffusers
    has halved by another rule than the authors: it sees `source`, a Pillow image, halved by theirs."""

    source: Image.Image

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        width, height = self.source.size
        halved = self.source.resize((width // 2, height // 2), Image.Resampling.BILINEAR)
        limits = {"min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28}
        seen = Qwen2VLImageProcessorPil(**limits)(images=[halved], return_tensors="pt")
        tokens = "<|image_pad|>" * int(seen["image_grid_thw"][0].prod() // 4)
        found = super().__call__([one.replace("<|image_pad|>", tokens) for one in text], **kwargs)
        found["mm_token_type_ids"] = (found["input_ids"] == 151655).int()
        return type(found)({**found, **seen})


def build_i2i(parts: dict, image: Image.Image) -> Kandinsky5I2IPipeline:
    """Their editing pipeline with the authors' template and crop, for the size of this image."""
    _tiled(parts["vae"], False)
    processor = parts["tokenizer"]
    processor.__class__, processor.source = QwenProcessor, image
    pipe = Kandinsky5I2IPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert "a prompt engineer" in pipe.prompt_template and pipe.prompt_template_encode_start_idx == 54
    pipe.prompt_template = EDIT_TEMPLATE
    pipe.prompt_template_encode_start_idx = 55
    pipe.resolutions = [image.size]
    return pipe


def _i2i(parts: dict, image: Tensor) -> Tensor:
    source = Image.fromarray(image.numpy())
    pipe = build_i2i(parts, source)
    images = [
        pipe(
            image=source, prompt=prompt, negative_prompt="", output_type="np",
            generator=torch.Generator().manual_seed(image_cases.SEED + number), **image_cases.EDITED,
            **image_cases.SAMPLING,
        ).image
        for number, prompt in enumerate(cases.PROMPTS[:2])
    ]  # fmt: skip
    return torch.cat([torch.as_tensor(image) for image in images])


# Written out once more, and not taken from kandinsky5.config, whose template it is to check.
EDIT_TEMPLATE = (
    "<|im_start|>system\nYou are a promt engineer. Based on the provided source image (first image) and target image "
    "(second image), create an interesting text prompt that can be used together with the source image to create the "
    "target image:<|im_end|>\n<|im_start|>user\n{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
)
THEIRS: dict[str, Callable[..., Tensor]] = {
    "dit": _dit,
    "vae_encode": _encode(False),
    "vae_encode_tiled": _encode(True),
    "vae_decode": lambda parts, z: _tiled(parts["vae"], False).decode(z).sample,
    "vae_decode_tiled": lambda parts, z: _tiled(parts["vae"], True).decode(z).sample,
    "t2i": _t2i,
    "i2i": _i2i,
}


@torch.inference_mode()
def compute_all(folder: Path, config: PipelineConfig, monkeypatch) -> dict[str, Tensor]:
    """Every case of a config's task, computed in float32 from the Diffusers folder that the config was made from."""
    parts = load_components(folder)
    theirs.make_comparable(monkeypatch)
    inputs = image_cases.build_inputs(config)
    return {name: THEIRS[name](parts, **inputs[name]).float().contiguous() for name in image_cases.of_task(config)}
