"""From a prompt, or an image and a prompt, to a video: the whole of Kandinsky 5.0 in one call.

    prompt ─ text encoders ─> features ─┐
    seed ──> noise ─────────────────────┴─ Euler steps through the DiT ─> latents ─ VAE decoder ─> frames

This is the one place that checks what a user asks for; everything below it may trust its input.
"""

import contextlib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky5 import attention as attentions
from kandinsky5 import checkpoint, sampler, vae_tiling, video_io
from kandinsky5.clip import CLIPText
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import check_models_fit, load_config
from kandinsky5.dit import DiT
from kandinsky5.extras import magcache
from kandinsky5.qwen import Qwen
from kandinsky5.rope import scale_for_size
from kandinsky5.runtime.compile import compile_models
from kandinsky5.runtime.heap import keep_freed_memory
from kandinsky5.runtime.offload import awake, check_mode, rest
from kandinsky5.text_encoder import MAX_TOKENS, TextEncoder, TextFeatures
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.vae import VAE

# Latent positions of a batch below which both passes of guidance go as one (rows guidance-… of benchmarks/compare.py):
# 4 % faster at 2,688 and at 4,096, 1 % here, then as fast (bf16, two threads, small model and Lite's width). What a
# second pass holds besides is nothing beside the weights (55 MB at Lite's width, computed), so memory is not asked.
ONE_PASS = 6144
LONGEST_SIDE = 16384  # pixels: x264's limit
KEPT_BY_HEAP = 300_000_000  # bytes that glibc may keep of what decoding has freed: measured, see vae_tiling.vae_memory


class Pipeline:
    """The models of one checkpoint, ready to sample: `.dit`, `.vae`, `.text_encoder`, and their `.config`."""

    def __init__(
        self, config: PipelineConfig, dit: DiT, vae: VAE, text_encoder: TextEncoder, attention_kernel: str = "auto"
    ):
        self.config, self.attention_kernel = config, attention_kernel
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder

    @classmethod
    def load(
        cls,
        folder_or_preset: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        attention: str = "auto",
        offload: str | None = None,
        compile: bool = False,
        tile_space: bool = False,
    ) -> "Pipeline":
        """Load a native checkpoint folder (README: how to convert one), or a small model of this package: "nano".

        On the CPU the weight files are mapped, not copied. device "meta" checks names and shapes and loads nothing.
        attention: how the DiT computes it, one of `kandinsky5.attention.KERNELS`.
        offload: "model" keeps on the device only the model that works, "blocks" only its block (`offload.py`).
        compile: use torch.compile (`compile.py`); the first video takes a minute or more, and all differ by rounding.
        tile_space: let the VAE work in tiles of 256 pixels: less memory, not quite the same pixels (`vae_tiling.py`).
        ValueError where there is no such device, dtype, kernel or mode, the folder is in another layout, or weights and
        config.json do not fit.
        """
        device = _check_device(device)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"dtype {dtype!r}: give torch.bfloat16, torch.float16, torch.float32 or torch.float64")
        attentions.check_kernel(attention, device)
        check_mode(offload)
        folder = checkpoint.find_checkpoint(folder_or_preset)
        config = load_config(folder / "config.json")
        check_models_fit(config)
        if tile_space:
            config = replace(config, tiling=replace(config.tiling, space=True))
        with torch.device("meta"):
            dit, vae, qwen, clip = DiT(config.dit), VAE(config.vae), Qwen(config.qwen), CLIPText(config.clip)
        for name, model in {"dit": dit, "vae": vae, "qwen": qwen, "clip": clip}.items():
            place = checkpoint.find_part(folder, name, config.base)
            if offload:
                rest(model, checkpoint.map_weights(model, place, name, dtype), device, offload)
            else:
                checkpoint.load_weights(model, place, name, device, dtype)
        names = ("qwen_tokenizer", "clip_tokenizer")
        tokenizers = (Tokenizer.load(checkpoint.find_part(folder, name, config.base) / name) for name in names)
        text_encoder = TextEncoder(config.text, qwen, clip, *tokenizers)
        if compile:
            compile_models(dit, vae)
        return cls(config, dit, vae, text_encoder, attention)

    @property
    def device(self) -> torch.device:
        """Where the models work, with offloading too; what comes out of the pipeline is on the CPU."""
        return getattr(self.dit, "works_on", self.dit.patch_embedder.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the models; the latents of the sampler are float32 always."""
        return self.dit.patch_embedder.weight.dtype

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str],
        image: str | Path | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        schedule: str = "official",
        step_skipping: bool | str | Path | dict | magcache.StepSkipping = False,
        rope_scale: tuple[float, float, float] | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = MAX_TOKENS,
        output_type: str = "uint8",
        callback: Callable[[int, float, Tensor], Tensor | bool | None] | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Make one video per prompt, or `num_videos_per_prompt` of each. None means the preset's value.

        image: path, or uint8 (H, W, 3): the video starts with it. Without height and width it keeps its shape.
        height, width: pixels, multiples of 16 (with NABLA 128); num_frames: 4k + 1.
        guidance_scale: 1 means one pass a step and no negative prompt.
        schedule: "official", or "diffusers" (sampler.flow_schedule); rope_scale: positions (T, H, W) are divided by it.
        step_skipping: True leaves the DiT's blocks out of about half the steps, where this package knows the
            checkpoint's ratios; or a file of ratios (magcache).
        seed: video i of the result is drawn from seed + i, on the CPU in float32, so that neither the device nor
            the precision nor its neighbours change it.
        latents: initial noise (B, T, H/8, W/8, 16) in place of the seed's. With an image the seed also draws the
            sample of its latent frame: behind the noise, or, where latents are given, at once. So the seed's own
            noise given as latents makes the same video without an image, and another sample of frame 0 with one.
        callback: (step, t, latents) after each step; may return new latents, or False to stop and decode.

        Returns B = prompts × num_videos_per_prompt videos, those of one prompt side by side, on the CPU:
        output_type "uint8" (B, F, H, W, 3), "float" the same in [0, 1], "latents" (B, T, H/8, W/8, 16) float32.
        ValueError, in one line, for a value of the right type that cannot be used.
        """
        sampling = self.config.sampling
        prompts = _check_prompts(prompt)
        image = None if image is None else _as_image(image)
        height, width = self.choose_size(image, height, width)
        num_frames = sampling.num_frames if num_frames is None else num_frames
        num_inference_steps = sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
        shift = sampling.shift if shift is None else shift
        seed = operator.index(seed)  # of NumPy too
        rope_scale = rope_scale or sampling.rope_scale or scale_for_size(height, width)
        guided = abs(guidance_scale - 1) > 1e-6
        negatives = _check_negative_prompts(negative_prompt, sampling.negative_prompt, len(prompts))
        self._check_task(image)
        self._check_size(height, width, num_frames)
        _check_counts(num_videos_per_prompt, max_sequence_length, output_type, guidance_scale, rope_scale)
        times = sampler.flow_schedule(num_inference_steps, shift, schedule)
        skips = [False] * num_inference_steps
        if step_skipping:
            skips = magcache.plan_skips(step_skipping, self.config.name, num_inference_steps, guided)
        batch = len(prompts) * num_videos_per_prompt
        latents, generators = self._initial_noise(latents, seed, batch, height, width, num_frames)
        if output_type != "latents":
            self._check_memory(latents, output_type)  # now and not when the steps are done

        texts = [*prompts, *negatives] if guided else prompts
        bar = tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress)
        with bar, awake(self.text_encoder.qwen, self.text_encoder.clip):
            features = self.text_encoder.encode(texts, max_sequence_length)
            bar.update(len(texts))
        features = features.repeat(num_videos_per_prompt)  # those of the prompts, then those of the negative ones
        first_frame = None if image is None else self._encode_image(image, height, width, generators)
        condition = self._build_condition(latents, first_frame)

        # With guidance a step asks for 2B velocities. Short passes go as one, which saves the time of starting each
        # operation but masks the padding of the shorter prompts; long ones go as two of B. The numbers are the same.
        together = guided and latents[..., 0].numel() < ONE_PASS
        passes = [features]
        if guided and not together:
            passes = [features.select(0, batch), features.select(batch, 2 * batch)]

        def velocity(x: Tensor, t: Tensor) -> Tensor:  # (B, T, H, W, 16) → the same, float32
            x = torch.cat([x, condition], dim=-1).to(self.dtype)  # (B, T, H, W, 33)
            x = torch.cat([x, x]) if together else x
            t = t.to(x.device).expand(len(x))
            predicted = torch.cat([self._predict(x, words, t, rope_scale) for words in passes])  # (B or 2B, …)
            if not guided:
                return predicted
            conditional, unconditional = predicted.chunk(2)
            return sampler.guided_velocity(conditional, unconditional, guidance_scale)

        skipped = f"{sum(skips)} skipped" if any(skips) else None
        bar = tqdm(total=num_inference_steps, desc="sampling", unit="step", postfix=skipped, disable=not progress)
        skipping = magcache.skip_steps(self.dit, skips, len(passes))
        with bar, awake(self.dit), keep_freed_memory(self.device), skipping:

            def after_step(step: int, t: float, x: Tensor) -> Tensor | bool | None:
                bar.update()
                _check_finite(x, f"after step {step + 1} of {num_inference_steps} the latents")
                answer = callback(step, t, x) if callback else None
                _check_answer(answer, x, f"after step {step + 1} of {num_inference_steps} the callback")
                return answer

            latents = sampler.euler_sample(velocity, latents, times, first_frame, after_step)
        if first_frame is not None and sampling.normalise_first_frames:
            latents = sampler.normalise_first_frames(latents)
        if output_type == "latents":
            return _to_cpu(latents)
        return self.decode(latents, output_type, progress)

    def choose_size(self, image: Tensor | None, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels (height, width) of the video where some of this is given; image: (H, W, 3)."""
        sampling = self.config.sampling
        if image is not None and height is None and width is None:
            image_height, image_width, _ = image.shape
            divisor = self.config.side_divisor
            return video_io.keep_aspect_size(image_height, image_width, sampling.image_area, divisor)
        return sampling.height if height is None else height, sampling.width if width is None else width

    @torch.inference_mode()
    def decode(self, latents: Tensor, output_type: str = "uint8", progress: bool = False) -> Tensor:
        """Scaled latents (B, T, H/8, W/8, 16) → frames (B, F, H, W, 3), uint8 or float32 in [0, 1], on the CPU.

        ValueError for another shape or output_type, and where NaN or infinity comes out.
        """
        if output_type not in ("uint8", "float"):
            raise ValueError(f"output_type {output_type!r}: latents decode to uint8 or float")
        if latents.ndim != 5 or 0 in latents.shape or latents.shape[-1] != self.config.vae.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)}: decoding takes (B, T, H/8, W/8, 16), as sampling gives")
        z = (latents.to(self.device) / self.config.vae.scaling_factor).to(self.dtype)
        z = z.permute(0, 4, 1, 2, 3)  # (B, 16, T, h, w)
        takes = f"takes {self._check_memory(latents, output_type) / 1e9:.1f} GB"
        to_output = video_io.to_uint8 if output_type == "uint8" else video_io.to_float
        num_frames, pieces = (z.shape[2] - 1) * self.config.vae.time_factor + 1, []
        bar = tqdm(total=len(z) * num_frames, desc="decoding", unit="frame", postfix=takes, disable=not progress)
        with bar, awake(self.vae):
            for one in z.split(1):  # all at once would take as many times the memory
                for piece in vae_tiling.decode_pieces(self.vae, one, self.config.tiling):  # (1, 3, f, H, W)
                    _check_finite(piece, "the decoded frames")
                    pieces.append(_to_cpu(to_output(piece)))
                    bar.update(piece.shape[2])
        return torch.cat(pieces, dim=1)[0].unflatten(0, (len(z), num_frames))  # (B, F, H, W, 3)

    def _check_memory(self, latents: Tensor, output_type: str) -> int:
        """Bytes that decoding (B, T, h, w, 16) takes on the device; ValueError where that, or the CPU, has less."""
        batch, T, h, w, _ = latents.shape
        vae, tiling, on_gpu = self.config.vae, self.config.tiling, self.device.type == "cuda"
        frames, height, width = vae.time_factor * (T - 1) + 1, vae.space_factor * h, vae.space_factor * w
        video = 2 * frames * height * width * vae.image_channels  # twice when pieces become one tensor
        finished = batch * video * (1 if output_type == "uint8" else 4)
        # `vae_memory` counts one video in bytes. Finished ones lie in the CPU's memory, and resting weights come yet.
        resting = sum(weight.nbytes for weight in self.vae.parameters() if weight.is_meta)
        more = (resting if on_gpu else finished + KEPT_BY_HEAP) - video
        in_tiles = replace(tiling, space=True)
        needed, tiled = (vae_tiling.vae_memory(vae, (T, h, w), self.dtype, kind) + more for kind in (tiling, in_tiles))

        clip, fewer = f"{frames} frames of {height}x{width}", ""
        if batch > 1:
            clip, fewer = f"{batch} × {clip}", "ask for fewer videos at once, or "
        less = f"{fewer}ask for less --height, --width or --num-frames"
        free = _free_memory(self.device)
        if free is not None and needed > free:
            tiles = f"decode in tiles (--tile-space: {tiled / 1e9:.1f} GB), or " if tiled < min(needed, free) else ""
            alone = "keep the other models off the GPU meanwhile (--offload model), or "
            raise ValueError(
                f"decoding {clip} takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
                f"{alone if on_gpu and not hasattr(self.vae, 'resting') else ''}{tiles}{less}"
            )
        left = _free_memory(torch.device("cpu"))
        if on_gpu and left is not None and finished > left:
            raise ValueError(
                f"{clip}, when they are decoded, take {finished / 1e9:.1f} GB of the CPU's memory and "
                f"{left / 1e9:.1f} GB are free: {less}"
            )
        return needed

    def _predict(self, x: Tensor, features: TextFeatures, t: Tensor, rope_scale: tuple) -> Tensor:
        """One pass through the DiT; the result in float32, the precision of the sampler."""
        mask = features.mask if len(features.mask) > 1 else None  # a prompt alone has no padding to hide
        text, pooled = features.text.to(self.dtype), features.pooled.to(self.dtype)
        with attentions.use(self.attention_kernel):
            return self.dit(x, text, pooled, t, mask, rope_scale).float()

    def _initial_noise(
        self, latents: Tensor | None, seed: int, batch: int, height: int, width: int, num_frames: int
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Noise (B, T, H/8, W/8, 16) float32 on the device, and each video's generator behind its noise."""
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed}: give a whole number from 0 to 2⁶³ − 1")
        vae = self.config.vae
        T = (num_frames - 1) // vae.time_factor + 1
        shape = (T, height // vae.space_factor, width // vae.space_factor, vae.latent_channels)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(batch)]
        if latents is None:
            latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = torch.as_tensor(latents)
        if tuple(latents.shape) != (batch, *shape):
            raise ValueError(
                f"latents {tuple(latents.shape)}: this prompt and size need {(batch, *shape)}, (B, T, H/8, W/8, 16)"
            )
        if not latents.is_meta and not torch.isfinite(latents).all():
            raise ValueError("the given latents contain NaN or infinity: give finite numbers, such as torch.randn's")
        return latents.float().to(self.device), generators

    def _encode_image(self, image: Tensor, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
        """uint8 (H, W, 3) → the clean first latent frame of each video, (B, 1, H/8, W/8, 16) float32."""
        image = video_io.resize_image(image, height, width)[None]  # (F = 1, H, W, 3)
        video = video_io.from_uint8(image[None]).to(self.device, self.dtype)  # (1, 3, 1, H, W)
        with awake(self.vae):
            posterior = vae_tiling.encode(self.vae, video, self.config.tiling)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (1, 16, 1, h, w)
        noise = torch.cat([torch.randn(mean.shape, generator=generator) for generator in generators])
        z = type(posterior)(mean, logvar).sample(noise.to(self.device))  # (B, 16, 1, h, w)
        return (z * self.config.vae.scaling_factor).permute(0, 2, 3, 4, 1)

    def _build_condition(self, latents: Tensor, first_frame: Tensor | None) -> Tensor:
        """The channels beside the latents: zeros, and a mask that is 1 where frame 0 is given. (B, T, h, w, 17)

        checkpoint: the conditioning latents are zeros for image-to-video too; the image is in the latents
        themselves. A DiT without visual_cond gets no such channels.
        """
        extra = self.config.dit.input_channels - self.config.dit.in_channels  # 17 or 0
        condition = latents.new_zeros(*latents.shape[:-1], extra)
        if first_frame is not None and extra:
            condition[:, :1, ..., -1] = 1
        return condition

    def _check_task(self, image: Tensor | None) -> None:
        tasks, name = self.config.tasks, self.config.name
        if image is None and "t2v" not in tasks:
            raise ValueError(
                f"{name} makes videos from an image and a prompt: give an image (--image), or use a t2v checkpoint"
            )
        if image is not None and "i2v" not in tasks:
            raise ValueError(f"{name} makes videos from a prompt alone: leave the image out, or use an i2v checkpoint")

    def _check_size(self, height: int, width: int, num_frames: int) -> None:
        divisor, time = self.config.side_divisor, self.config.vae.time_factor
        for name, side in (("height", height), ("width", width)):
            if side < divisor or side % divisor:
                low = max(side // divisor, 1) * divisor
                rule = (
                    f"with NABLA a side is a multiple of {divisor}"
                    if self.config.dit.nabla
                    else f"a side is a multiple of {divisor}"
                )
                raise ValueError(f"{name} {side}: {rule}; try {low} or {low + divisor}")
            if side > LONGEST_SIDE:
                raise ValueError(f"{name} {side}: an mp4 holds sides up to {LONGEST_SIDE}; give --height and --width")
        if num_frames < 1 or (num_frames - 1) % time:
            low = max(num_frames - 1, 0) // time * time + 1
            raise ValueError(f"{num_frames} frames: a clip has {time}k + 1 frames; try {low} or {low + time}")


def _check_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:  # PyTorch has no one way to say no
        usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = re.split(r"\n|\. ", str(error))[0]
        raise ValueError(f"device {device}: cannot be used here ({reason}); choose {' or '.join(usable)}") from error


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device without swapping, where the system says so."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, unused
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_left_in_container()], default=None)


def _left_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes until a container's limit is reached, if there is one: of control groups, version 2 or 1.

    Pages of files, such as mapped weights, count as used there, but make room when it is wanted.
    """
    left = []
    for limit, used, stat, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            most, now = (int((cgroup / name).read_text()) for name in (limit, used))
            counts = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            left.append(most - now + sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
    return left


def _check_prompts(prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt {prompt!r}: give a string, or a list of at least one string")
    return list(prompts)


def _check_negative_prompts(negative: str | list[str] | None, default: str, count: int) -> list[str]:
    negatives = (
        [default if negative is None else negative] * count if not isinstance(negative, (list, tuple)) else negative
    )
    if len(negatives) != count or not all(isinstance(n, str) for n in negatives):
        raise ValueError(f"negative_prompt {negative!r}: give one string, or a list of {count}, one for each prompt")
    return list(negatives)


def _check_counts(
    num_videos: int, max_sequence_length: int, output_type: str, guidance_scale: float, rope_scale: tuple
) -> None:
    if not 1 <= num_videos <= 10**4:
        raise ValueError(f"num_videos_per_prompt {num_videos}: it must be at least 1 and at most 10,000")
    if max_sequence_length < 1:
        raise ValueError(
            f"max_sequence_length {max_sequence_length}: it must be at least 1; the models know {MAX_TOKENS}"
        )
    if output_type not in ("uint8", "float", "latents"):
        raise ValueError(f"output_type {output_type!r}: choose uint8, float or latents")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale {guidance_scale}: it must be a finite number; 1 turns guidance off")
    if len(rope_scale) != 3 or not all(0 < s < math.inf for s in rope_scale):
        raise ValueError(f"rope_scale {rope_scale}: give three positive numbers for T, H, W, such as (1, 2, 2)")


def _as_image(image: str | Path | Tensor) -> Tensor:
    """Path, array or picture of Pillow's → uint8 tensor (H, W, 3)."""
    if isinstance(image, (str, Path)):
        return video_io.read_image(image)
    image = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image is {image.dtype} {tuple(image.shape)}: give a path, or uint8 (height, width, 3)")
    return image


def _to_cpu(x: Tensor) -> Tensor:
    return x if x.is_meta else x.cpu()


def _check_answer(answer: Tensor | bool | None, x: Tensor, who: str) -> None:
    """What a callback may return when it was given the latents x (B, T, H, W, 16)."""
    if isinstance(answer, Tensor):
        if answer.shape != x.shape:
            raise ValueError(f"{who} returned latents {tuple(answer.shape)}: they must stay {tuple(x.shape)}")
        _check_finite(answer, f"{who}'s latents")
    elif answer is not None and not isinstance(answer, bool):
        raise ValueError(f"{who} returned a {type(answer).__name__}: return a tensor, False to stop, or nothing")


def _check_finite(x: Tensor, what: str) -> None:
    if not x.is_meta and not torch.isfinite(x).all():
        raise ValueError(
            f"{what} contain NaN or infinity: float16 overflows where bfloat16 and float32 do not; "
            "if the precision is not it, the weights are damaged"
        )
