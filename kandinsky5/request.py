"""What a user asks for: every default filled in, every check made, the images read, before any model works.

`Request.resolve` is the one place that checks input; the pipeline and everything below it may trust a request.
All refusals are ValueErrors of one line: what is wrong, the rule, the remedy.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kandinsky5 import image_io, sampler, video_io
from kandinsky5.config import PipelineConfig
from kandinsky5.image_io import Source as Image
from kandinsky5.rope import scale_for_size
from kandinsky5.runtime.device import plain_defaults
from kandinsky5.screen import shown

LONGEST_SIDE = 16384  # pixels: x264's limit
LONGEST_PROMPT = 100_000  # characters; a few hundred tokens are read, and a longer text is not a prompt but a mistake
MOST_VIDEOS = 10_000  # of one call
ROPE_RULE = "give three positive numbers for T, H and W, up to a million, such as (1, 2, 2)"
OUTPUT_TYPES = ("uint8", "float", "latents")


@dataclass(frozen=True, eq=False)
class Request:
    """All that decides what `Pipeline.generate` makes: P prompts, n videos of each, B = P·n in all."""

    prompts: tuple[str, ...]  # P
    negative_prompts: tuple[str, ...]  # P
    images: tuple[Tensor, ...] | None  # P or 1, each uint8 (height, width, 3): frame 0 of videos, or what to edit
    qwen_images: tuple[Tensor, ...] | None  # for editing the whole images at half their sides, which Qwen sees
    height: int
    width: int
    num_frames: int
    times: Tensor  # (steps + 1,) float32: flow times from 1 to 0
    guidance_scale: float
    shift: float
    schedule: str
    skips: tuple[tuple[bool, ...], ...]  # for each step, which of its passes reuse their last residual; () for none
    rope_scale: tuple[float, float, float]
    seeds: tuple[int, ...]  # B
    latents: Tensor | None  # (B, T, h, w, 16): noise to use instead of the seeds'
    latent_shape: tuple[int, int, int, int]  # (T, h, w, 16) of one video
    num_videos_per_prompt: int
    max_sequence_length: int
    output_type: str

    @property
    def batch(self) -> int:
        """B, the number of videos."""
        return len(self.seeds)

    @property
    def steps(self) -> int:
        """The number of steps, each of which ends at the next of `times`."""
        return len(self.times) - 1

    @property
    def guided(self) -> bool:
        """Whether each step needs a second pass, with the negative prompt."""
        return abs(self.guidance_scale - 1) > 1e-6

    @classmethod
    @plain_defaults()
    def resolve(
        cls, config: PipelineConfig, prompt: str | list[str], image: Image | list | None = None,
        negative_prompt: str | list[str] | None = None, height: int | None = None, width: int | None = None,
        num_frames: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        shift: float | None = None, schedule: str = "official", step_skipping: Any = False,
        rope_scale: tuple[float, float, float] | None = None, seed: int | list[int] = 0, latents: Tensor | None = None,
        num_videos_per_prompt: int = 1, max_sequence_length: int | None = None, output_type: str = "uint8",
    ) -> "Request":  # fmt: skip
        """The arguments of `Pipeline.__call__`; None means the config's value. latents: (B, T, h, w, 16).

        Raises ValueError for invalid or unsupported ones.
        """
        sampling = config.sampling
        prompts = check_texts("prompt", prompt, None)
        count = len(prompts)
        negative = sampling.negative_prompt if negative_prompt is None else negative_prompt
        images = read_images(image, count)
        check_task(config, images is not None)
        height, width = choose_size(config, images, height, width)
        fit = video_io.cover_size if config.edits else video_io.resize_image
        num_frames = whole("num_frames", sampling.num_frames if num_frames is None else num_frames)
        check_size(config, height, width, num_frames)
        steps = sampling.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = whole("num_inference_steps", steps)
        shift = number("shift", sampling.shift if shift is None else shift)
        guidance = number("guidance_scale", sampling.guidance_scale if guidance_scale is None else guidance_scale)
        if not abs(guidance) <= 1000:
            raise ValueError(f"guidance_scale {guidance:g}: it must be from -1000 to 1000; 1 turns guidance off")
        each = whole("num_videos_per_prompt", num_videos_per_prompt, 1, MOST_VIDEOS // count)
        seeds = choose_seeds(seed, count, each)
        most = config.text.max_tokens if max_sequence_length is None else max_sequence_length
        shape = (*config.vae.latent_grid(num_frames, height, width), config.vae.latent_channels)
        return cls(
            prompts=prompts,
            negative_prompts=check_texts("negative_prompt", negative, count),
            images=images and tuple(fit(one, height, width) for one in images),
            qwen_images=tuple(map(video_io.halve_image, images)) if images and config.edits else None,
            height=height, width=width, num_frames=num_frames,
            times=sampler.flow_schedule(steps, shift, choose("schedule", schedule, sampler.RULES)),
            guidance_scale=guidance, shift=shift, schedule=schedule,
            skips=plan_skips(step_skipping, config.name, steps, guidance),
            rope_scale=choose_rope_scale(rope_scale, sampling.rope_scale, height, width),
            seeds=seeds,
            latents=None if latents is None else check_latents(latents, (len(seeds), *shape)),
            latent_shape=shape, num_videos_per_prompt=each,
            max_sequence_length=whole("max_sequence_length", most, 1, 10**4),
            output_type=choose("output_type", output_type, OUTPUT_TYPES),
        )  # fmt: skip

    def noise(self) -> tuple[Tensor, list[torch.Generator]]:
        """Initial noise (B, T, h, w, 16) float32, and each video's generator as its noise leaves it.

        Drawn on the CPU in float32, so that a seed means the same on every device and in every precision.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        if self.latents is not None:
            return self.latents, generators
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        noise = [torch.randn(self.latent_shape, generator=one, **options) for one in generators]
        return torch.stack(noise), generators


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int, of Python's or NumPy's. Raises ValueError for other types and outside low … high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} {shown(value)}: give a whole number")
    value = int(value)
    if value.bit_length() > 63:
        raise ValueError(f"{name} {shown(value)}: give a whole number from 0 to 2⁶³ − 1")
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{name} {shown(value)}: it must be at least {low} and at most {high:,}")
    return value


def number(name: str, value: object) -> float:
    """`value` as a float. Raises ValueError for other types; NaN and infinity have no rule here."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} {shown(value)}: give a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def choose(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value`, if it is one of these. Raises ValueError if not."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {shown(value)}: choose {', '.join(choices)}")
    return value


def check_functions(callback: object, progress: object, solver: object) -> None:
    """Raises ValueError where what is to be called cannot be, or `progress` is no yes or no."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback {shown(callback)}: give a function of (step, t, latents), or None")
    if not callable(solver):
        raise ValueError(f"solver {shown(solver)}: give a function such as sampler.euler_sample")
    if not isinstance(progress, (bool, int)):
        raise ValueError(f"progress {shown(progress)}: give True or False")


def check_texts(name: str, texts: object, count: int | None) -> tuple[str, ...]:
    """A string (`count` times) or a list of `count` strings, as a tuple. Raises ValueError for anything else."""
    listed = (texts,) * (count or 1) if isinstance(texts, str) else texts
    if isinstance(listed, (list, tuple)) and len(listed) > MOST_VIDEOS:
        raise ValueError(f"{name}: a list of {len(listed):,}; give at most {MOST_VIDEOS:,} at once")
    rule = "at least one string" if count is None else f"{count}, one for each prompt"
    if not isinstance(listed, (list, tuple)) or not listed or len(listed) != (count or len(listed)):
        raise ValueError(f"{name} {shown(texts)}: give one string, or a list of {rule}")
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(f"{name} {shown(text)}: give one string, or a list of {rule}")
        if len(text) > LONGEST_PROMPT:
            raise ValueError(
                f"{name} of {len(text)} characters: give at most {LONGEST_PROMPT}; a few hundred tokens are read"
            )
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} {shown(text)}: it is not Unicode text; encode it as UTF-8")
    return tuple(listed)


def read_images(image: Image | list | None, count: int) -> tuple[Tensor, ...] | None:
    """One image, or a list of `count`, as uint8 (H, W, 3) each. Raises ValueError for what is no image."""
    if image is None:
        return None
    if not isinstance(image, (list, tuple)):
        return (image_io.read_image(image),)
    if len(image) != count:
        raise ValueError(f"{len(image)} images for {count} prompts: give one image, or a list of one for each prompt")
    return tuple(image_io.read_image(one) for one in image)


def check_task(config: PipelineConfig, has_image: bool) -> None:
    """Raises ValueError where the checkpoint needs an image and has none, or the other way round."""
    what, ends = ("images", "2i") if config.makes_images else ("videos", "2v")
    if not has_image and f"t{ends}" not in config.tasks:
        raise ValueError(
            f"{config.name} makes {what} from an image and a prompt: give an image (--image), or use a t{ends} "
            "checkpoint"
        )
    if config.edits and config.qwen_vision is None:
        raise ValueError(f"{config.name} has no vision tower: convert it again with --with-vision")
    if has_image and f"i{ends}" not in config.tasks:
        raise ValueError(
            f"{config.name} makes {what} from a prompt alone: leave the image out, or use an i{ends} checkpoint"
        )


def choose_size(
    config: PipelineConfig, images: tuple[Tensor, ...] | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """Pixels (height, width) of the videos: as requested, or by the images, each (H, W, 3). Raises ValueError."""
    sampling = config.sampling
    if images is not None and height is None and width is None:
        area, divisor = sampling.image_area, config.side_divisor
        if sampling.sizes:
            ratios = [one.shape[1] / one.shape[0] for one in images]  # of the sizes the nearest, as in both references
            sizes = [min(sampling.sizes, key=lambda size: abs(size[1] / size[0] - ratio)) for ratio in ratios]
        else:
            sizes = [video_io.keep_aspect_size(one.shape[0], one.shape[1], area, divisor) for one in images]
        if len(set(sizes)) > 1:
            raise ValueError(f"these images ask for results of {sizes}: give --height and --width, as all get one size")
        return sizes[0]
    height = sampling.height if height is None else height
    return whole("height", height), whole("width", sampling.width if width is None else width)


def check_size(config: PipelineConfig, height: int, width: int, num_frames: int) -> None:
    """Raises ValueError where the models have no such grid, or an mp4 could not hold it."""
    divisor, time = config.side_divisor, config.vae.time_factor
    for name, side in (("height", height), ("width", width)):
        if side < divisor or side % divisor:
            low = max(side // divisor, 1) * divisor
            nabla = "with NABLA " if config.dit.nabla else ""
            raise ValueError(f"{name} {side}: {nabla}a side is a multiple of {divisor}; try {low} or {low + divisor}")
        if side > LONGEST_SIDE:
            raise ValueError(f"{name} {side}: an mp4 holds sides up to {LONGEST_SIDE}; give --height and --width")
    if config.makes_images and num_frames != 1:
        raise ValueError(f"{num_frames} frames: {config.name} makes single images; leave --num-frames out")
    if num_frames < 1 or (num_frames - 1) % time:
        low = max(num_frames - 1, 0) // time * time + 1
        raise ValueError(f"{num_frames} frames: a clip has {time}k + 1 frames; try {low} or {low + time}")


def choose_seeds(seed: int | list[int], count: int, each: int) -> tuple[int, ...]:
    """One seed for each video: seed + i for video i; with a list, seed[p] + j for video j of prompt p.

    Raises ValueError for what is no seed.
    """
    listed = seed if isinstance(seed, (list, tuple)) else None
    if listed is not None and len(listed) != count:
        raise ValueError(f"{len(listed)} seeds for {count} prompts: give one, or one for each prompt")
    firsts = [whole("seed", one) for one in ([seed] if listed is None else listed)]
    if min(firsts) < 0:
        raise ValueError(f"seed {min(firsts)}: give a whole number from 0 to 2⁶³ − 1")
    return tuple(first + i for first in firsts for i in range(count * each if listed is None else each))


def plan_skips(step_skipping: Any, model: str, steps: int, guidance_scale: float) -> tuple[tuple[bool, ...], ...]:
    """Which passes of which steps to skip: () or MagCache's plan. Raises ValueError where it knows no ratios."""
    if step_skipping is None or step_skipping is False:
        return ()
    from kandinsky5.extras import magcache  # an extra: without it everything else works

    return tuple(magcache.plan_skips(step_skipping, model, steps, abs(guidance_scale - 1) > 1e-6))


def choose_rope_scale(
    requested: object, configured: tuple[float, float, float] | None, height: int, width: int
) -> tuple[float, float, float]:
    """What positions (T, H, W) are divided by: as requested, the checkpoint's, or by size. Raises ValueError."""
    scale = (configured or scale_for_size(height, width)) if requested is None else requested
    if not isinstance(scale, (list, tuple)) or len(scale) != 3:
        raise ValueError(f"rope_scale {shown(scale)}: {ROPE_RULE}")
    T, H, W = (number("rope_scale", factor) for factor in scale)
    if not all(0 < factor <= 1e6 for factor in (T, H, W)):
        raise ValueError(f"rope_scale {shown(scale)}: {ROPE_RULE}")
    return T, H, W


def check_latents(latents: object, shape: tuple[int, ...]) -> Tensor:
    """Given noise as float32 of that shape, (B, T, h, w, 16). Raises ValueError for anything else."""
    try:
        given = torch.as_tensor(latents)
        given_shape = tuple(given.shape)  # which a nested tensor lacks
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"latents {shown(latents)}: give a tensor {shape}, such as torch.randn's") from error
    if given_shape != shape or given.layout != torch.strided or given.is_complex() or given.is_quantized:
        raise ValueError(f"latents {shown(given_shape)}: this prompt and size need {shape}, (B, T, H/8, W/8, 16)")
    if given.is_meta or not torch.isfinite(given.float()).all():
        raise ValueError("the given latents contain NaN or infinity: give finite numbers, such as torch.randn's")
    return given.float()


def check_sampled(latents: object, channels: int, device: torch.device) -> None:
    """Raises ValueError for what cannot be decoded on `device`: latents are (B, T, H/8, W/8, channels)."""
    if isinstance(latents, Tensor) and latents.layout == torch.strided and not latents.is_complex():
        sized = latents.ndim == 5 and 0 not in latents.shape and latents.shape[-1] == channels
        if sized and latents.is_meta == (device.type == "meta"):
            return
    what = tuple(latents.shape) if isinstance(latents, Tensor) else shown(latents)
    raise ValueError(f"latents {what}: decoding takes (B, T, H/8, W/8, {channels}), as sampling gives")
