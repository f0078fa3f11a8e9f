"""The references, made comparable: how diffusers and transformers compute the cases of tests/cases.py.

What is changed in them, for tests only, and why:
- rotary embedding: diffusers rounds queries and keys to bf16 even in a float32 model; not here.
- attention with a block mask: uncompiled flex_attention ignores the blocks; here a masked softmax over them.
- the prompt template: 0.42.1 says "prompt" where the models were trained with "promt", and drops 128 tokens.
- first frames of image-to-video: diffusers pools the four frames' statistics; here each has its own (official).
"""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import diffusers.models.transformers.transformer_kandinsky as transformer_module
import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

import cases


class QwenTokenizer(Qwen2TokenizerFast):
    """Stands in for Qwen2VLProcessor, which needs torchvision: text alone goes through it unchanged."""

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        return super().__call__(text, **kwargs)


def load_components(folder: Path, dtype: torch.dtype, device: str = "cpu") -> dict:
    """The parts of a Diffusers folder, as the arguments of both pipelines."""
    parts = {
        "transformer": Kandinsky5Transformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        "vae": AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae", torch_dtype=dtype),
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
        "text_encoder_2": CLIPTextModel.from_pretrained(folder / "text_encoder_2", dtype=dtype),
    }
    for model in parts.values():
        model.eval().to(device)
    return parts | {
        "tokenizer": QwenTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }


def make_comparable(monkeypatch) -> None:
    """Apply the changes that this file's first lines list, until the monkeypatch is undone."""
    processor = transformer_module.Kandinsky5AttnProcessor
    source = textwrap.dedent(inspect.getsource(processor.__call__))
    assert source.count(".to(torch.bfloat16)") == 1
    namespace = dict(vars(transformer_module))
    exec(source.replace(".to(torch.bfloat16)", ".to(x.dtype)"), namespace)
    monkeypatch.setattr(processor, "__call__", namespace["__call__"])

    plain = transformer_module.dispatch_attention_fn

    def masked(query, key, value, attn_mask=None, **kwargs):
        if attn_mask is None:
            return plain(query, key, value, **kwargs)
        keep = attn_mask.to_dense().bool().repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)
        scores = torch.einsum("bqnd,bknd->bnqk", query.float(), key.float()) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~keep, -torch.inf).softmax(dim=-1)
        return torch.einsum("bnqk,bknd->bqnd", weights, value.float()).to(value.dtype)

    namespace["dispatch_attention_fn"] = masked

    monkeypatch.setattr(Kandinsky5I2VPipeline, "normalize_first_frame", official_first_frames)


def official_first_frames(self, latents: Tensor) -> Tensor:
    """The official rule, one frame of one sample at a time, in NumPy."""
    found = latents.float().cpu().numpy().copy()
    for sample in found:
        after = sample[4:9].copy()
        for frame in range(min(4, len(sample))):
            mean, std = sample[frame].mean(), sample[frame].std(ddof=1)
            new_mean = np.clip(after.mean(), mean - 0.05, mean + 0.1)
            new_std = np.clip(after.std(ddof=1), std - 0.1, std + 0.25)
            sample[frame] = (sample[frame] - mean) / std * new_std + new_mean
    return torch.from_numpy(found).to(latents)


def _dit(parts: dict, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor, sparse: dict | None = None) -> Tensor:
    model = parts["transformer"]
    x, text, pooled = (v.to(model.dtype) for v in (x, text, pooled))
    T, H, W = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    positions = [torch.arange(n, device=x.device) for n in (T, H, W)]
    return model(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * t,
        visual_rope_pos=positions,
        text_rope_pos=torch.arange(text.shape[1], device=x.device),
        scale_factor=cases.ROPE_SCALE,
        sparse_params=sparse,
    ).sample


def _dit_mask(parts: dict, lengths: Tensor, **batch: Tensor) -> Tensor:
    """Each sample alone with its real tokens, since a batch of the references' would attend to the padding."""
    results = []
    for i, length in enumerate(lengths):
        sample = {name: value[i : i + 1] for name, value in batch.items()}
        results.append(_dit(parts, **sample | {"text": sample["text"][:, :length]}))
    return torch.cat(results)


def _dit_nabla(parts: dict, x: Tensor, **rest: Tensor) -> Tensor:
    T, H, W = x.shape[1], x.shape[2] // 16, x.shape[3] // 16
    window = Kandinsky5T2VPipeline.fast_sta_nabla(T, H, W, *cases.NABLA.window, device=x.device)
    return _dit(parts, x, **rest, sparse={"sta_mask": window[None, None], "P": cases.NABLA.P, "to_fractal": True})


def _encode(space: bool) -> Callable[[dict, Tensor], Tensor]:
    def run(parts: dict, video: Tensor) -> Tensor:
        vae = _tiled(parts["vae"], space)
        posterior = vae.encode(video.to(vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    return run


def _decode(space: bool) -> Callable[[dict, Tensor], Tensor]:
    def run(parts: dict, z: Tensor) -> Tensor:
        vae = _tiled(parts["vae"], space)
        return vae.decode(z.to(vae.dtype)).sample

    return run


def _tiled(vae: AutoencoderKLHunyuanVideo, space: bool) -> AutoencoderKLHunyuanVideo:
    vae.use_tiling = space
    if space:
        vae.enable_tiling(cases.SPATIAL.pixels, cases.SPATIAL.pixels, 16, cases.SPATIAL.pixel_stride,
                          cases.SPATIAL.pixel_stride, 12)  # fmt: skip
    return vae


def build_pipeline(kind: type, parts: dict, nabla: bool = False):
    """Their pipeline with the training's template, and with full attention unless `nabla`."""
    parts = parts | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    _tiled(parts["vae"], space=False)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    assert "a prompt engineer" in pipe.prompt_template and pipe.prompt_template_encode_start_idx == 128
    pipe.prompt_template = pipe.prompt_template.replace("a prompt engineer", "a promt engineer")
    pipe.prompt_template_encode_start_idx = 129
    if not nabla:  # the cases are smaller than a NABLA tile
        pipe.get_sparse_params = lambda *_: None
    return pipe


def _encode_prompts(parts: dict) -> list[tuple[Tensor, Tensor]]:
    """Each prompt alone, since a batch of the references' would pad: (tokens, pooled) of each."""
    pipe = build_pipeline(Kandinsky5T2VPipeline, parts)
    return [pipe.encode_prompt(prompt, max_sequence_length=256)[:2] for prompt in cases.PROMPTS]


def _t2v(parts: dict, latents: Tensor) -> Tensor:
    """Each prompt alone, as in `_encode_prompts`."""
    pipe = build_pipeline(Kandinsky5T2VPipeline, parts)
    latents = torch.cat([latents, latents.new_zeros(*latents.shape[:-1], 17)], dim=-1)  # conditioning and mask
    videos = [
        pipe(
            prompt=prompt, negative_prompt=cases.NEGATIVE, num_frames=cases.FRAMES["t2v"], latents=noise[None],
            output_type="np", max_sequence_length=256, **cases.PIPELINE,
        ).frames
        for prompt, noise in zip(cases.PROMPTS, latents, strict=False)
    ]  # fmt: skip
    return torch.cat([torch.as_tensor(video) for video in videos])


def _i2v(parts: dict, image: Tensor) -> Tensor:
    pipe = build_pipeline(Kandinsky5I2VPipeline, parts)
    frames = pipe(
        image=Image.fromarray(image.cpu().numpy()), prompt=cases.PROMPTS[0], negative_prompt=cases.NEGATIVE,
        num_frames=cases.FRAMES["i2v"], generator=torch.Generator().manual_seed(cases.SEED), output_type="np",
        max_sequence_length=256, **cases.PIPELINE,
    ).frames  # fmt: skip
    return torch.as_tensor(frames)


THEIRS: dict[str, Callable[..., Tensor]] = {
    "dit": _dit,
    "dit_mask": _dit_mask,
    "dit_nabla": _dit_nabla,
    "vae_encode": _encode(False),
    "vae_encode_time": _encode(False),
    "vae_encode_space": _encode(True),
    "vae_decode": _decode(False),
    "vae_decode_time": _decode(False),
    "vae_decode_space": _decode(True),
    "qwen": lambda parts, ids: parts["text_encoder"](input_ids=ids, output_hidden_states=True).hidden_states[-1],
    "clip": lambda parts, ids: parts["text_encoder_2"](ids).pooler_output,
    "text": lambda parts: torch.cat([tokens[0] for tokens, _ in _encode_prompts(parts)]),
    "pooled": lambda parts: torch.cat([pooled for _, pooled in _encode_prompts(parts)]),
    "t2v": _t2v,
    "i2v": _i2v,
}


@torch.inference_mode()
def compute(name: str, parts: dict, inputs: dict[str, Tensor]) -> Tensor:
    """The references' result of one case, in float32 on the CPU."""
    device = parts["transformer"].device
    return THEIRS[name](parts, **{key: value.to(device) for key, value in inputs.items()}).float().cpu()
