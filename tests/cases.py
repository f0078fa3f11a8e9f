"""What is compared with the references: for each case its inputs, and how our code computes it.

The same cases serve three times: against diffusers and transformers themselves (tests/parity/), against their stored
results (tests/test_golden.py), and with mistakes built in (tests/test_mutations.py).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kandinsky5 import vae_tiling
from kandinsky5.config import NablaConfig, PipelineConfig, Tiling
from kandinsky5.dit import DiT
from kandinsky5.pipeline import Pipeline
from kandinsky5.runtime import fast_vae

NABLA = NablaConfig(P=0.6, window=(1, 3, 1))  # unlike in height and width, so that these cannot be confused
ROPE_SCALE = (1.0, 2.0, 3.16)
SPATIAL = Tiling(space=True, pixels=32, pixel_stride=24)
PROMPTS = ["A red fox runs through deep snow, the camera follows it.", "Кот спит.", ""]
NEGATIVE = "blurry"
PIPELINE = dict(height=32, width=48, num_inference_steps=3, guidance_scale=3.0)
FRAMES = {"t2v": 9, "i2v": 25}  # I2V: 7 latent frames, so that there are some to take statistics from
SEED = 7


def build_inputs(config: PipelineConfig) -> dict[str, dict[str, Tensor]]:
    """Random inputs for a checkpoint of this config, always the same ones.

    Uniform numbers of NumPy's frozen generator are the same bits on every machine and in every version. torch.randn's
    are not: it computes logarithms, and their last bits depend on the processor.
    """
    generator = np.random.RandomState(SEED)

    def pixels(*shape):  # [-1, 1]
        return torch.from_numpy(generator.uniform(-1, 1, shape)).float()

    def noise(*shape):  # mean 0, variance 1
        return pixels(*shape) * 3**0.5

    def ids(vocab_size, *shape):
        return torch.from_numpy(generator.randint(0, vocab_size, shape, dtype=np.int64))

    dit, clip, channels = config.dit, config.clip, config.vae.latent_channels
    words = {"text": noise(2, 7, dit.text_dim), "pooled": noise(2, dit.pooled_dim), "t": torch.tensor([0.93, 0.31])}
    clip_ids = ids(clip.end_token, 3, clip.max_positions)
    for row, length in enumerate((1, 30, clip.max_positions - 1)):
        clip_ids[row, length:] = clip.end_token
    return {
        "dit": {"x": noise(2, 3, 8, 12, dit.input_channels), **words},
        "dit_mask": {"x": noise(2, 2, 4, 6, dit.input_channels), **words, "lengths": torch.tensor([7, 3])},
        "dit_nabla": {"x": noise(2, 2, 48, 32, dit.input_channels), **words},
        "vae_encode": {"video": pixels(1, 3, 9, 24, 40)},
        "vae_encode_time": {"video": pixels(1, 3, 29, 16, 24)},
        "vae_encode_space": {"video": pixels(1, 3, 17, 40, 72)},
        "vae_decode": {"z": noise(1, channels, 3, 3, 5)},
        "vae_decode_time": {"z": noise(1, channels, 8, 2, 3)},
        "vae_decode_space": {"z": noise(1, channels, 5, 5, 9)},
        "qwen": {"ids": ids(min(config.qwen.vocab_size, 1000), 2, 37)},
        "clip": {"ids": clip_ids},
        "text": {},
        "pooled": {},
        "t2v": {"latents": noise(2, 3, 4, 6, channels)},
        "i2v": {"image": ids(256, 32, 48, 3).to(torch.uint8)},
    }


def _dit(nabla: NablaConfig | None = None) -> Callable[..., Tensor]:
    def run(
        pipe: Pipeline, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        x, text, pooled = (v.to(pipe.dtype) for v in (x, text, pooled))
        # The first `lengths` tokens of each text are real: its result must be the one that it gets alone.
        mask = None if lengths is None else torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        return with_nabla(pipe.dit, nabla)(x, text, pooled, t, mask, rope_scale=ROPE_SCALE)

    return run


def with_nabla(dit: DiT, nabla: NablaConfig | None) -> DiT:
    """The same modules under another configuration."""
    other = copy.copy(dit)
    other.config = replace(dit.config, nabla=nabla)
    return other


def _encode(tiling: Tiling, **thresholds: int) -> Callable[[Pipeline, Tensor], Tensor]:
    def run(pipe: Pipeline, video: Tensor) -> Tensor:
        with mock.patch.multiple(fast_vae, **thresholds):
            return torch.cat(vae_tiling.encode(pipe.vae, video.to(pipe.dtype), tiling), dim=1)

    return run


def _decode(tiling: Tiling, **thresholds: int) -> Callable[[Pipeline, Tensor], Tensor]:
    def run(pipe: Pipeline, z: Tensor) -> Tensor:
        with mock.patch.multiple(fast_vae, **thresholds):
            return vae_tiling.decode(pipe.vae, z.to(pipe.dtype), tiling)

    return run


def _text(pipe: Pipeline) -> Tensor:
    """The real tokens of a batch of unequal prompts, one after the other: (sum of lengths, dim)."""
    features = pipe.text_encoder.encode(PROMPTS)
    return features.text[features.mask]


def _t2v(pipe: Pipeline, latents: Tensor, schedule: str = "diffusers") -> Tensor:
    """Two prompts of unequal length in one batch; the references run each alone."""
    pipe = with_tasks(pipe)
    return pipe(
        PROMPTS[:2], negative_prompt=NEGATIVE, num_frames=FRAMES["t2v"], shift=5.0, schedule=schedule,
        latents=latents, output_type="float", progress=False, **PIPELINE,
    )  # fmt: skip


def _i2v(pipe: Pipeline, image: Tensor) -> Tensor:
    pipe = with_tasks(pipe)
    return pipe(
        PROMPTS[0], image=image, negative_prompt=NEGATIVE, num_frames=FRAMES["i2v"], shift=5.0, schedule="diffusers",
        seed=SEED, output_type="float", progress=False, **PIPELINE,
    )  # fmt: skip


def with_tasks(pipe: Pipeline) -> Pipeline:
    """The same models for both tasks and with full attention, whatever the checkpoint was made for."""
    config = replace(pipe.config, tasks=("t2v", "i2v"), dit=replace(pipe.config.dit, nabla=None))
    return Pipeline(config, with_nabla(pipe.dit, None), pipe.vae, pipe.text_encoder)


# What so small clips would not all do by themselves, where the VAE has its fast forms.
AT_ONCE = {"PIECE": 2**60, "PAIRS_FROM": 2**60}  # all frames, plain convolutions
IN_PIECES = {"PIECE": 0, "PAIRS_FROM": 2**60}  # as large clips on CUDA
IN_PAIRS = {"PIECE": 0, "PAIRS_FROM": 0, "BAND": 1000}  # as large clips on a CPU, a few rows at a time
OURS: dict[str, Callable[..., Tensor]] = {
    "dit": _dit(),
    "dit_mask": _dit(),
    "dit_nabla": _dit(NABLA),
    "vae_encode": _encode(Tiling(), **IN_PAIRS),
    "vae_encode_time": _encode(Tiling(), **AT_ONCE),
    "vae_encode_space": _encode(SPATIAL, **IN_PIECES),
    "vae_decode": _decode(Tiling(), **IN_PAIRS),
    "vae_decode_time": _decode(Tiling(), **AT_ONCE),
    "vae_decode_space": _decode(SPATIAL, **IN_PIECES),
    "qwen": lambda pipe, ids: pipe.text_encoder.qwen(ids),
    "clip": lambda pipe, ids: pipe.text_encoder.clip(ids),
    "text": _text,
    "pooled": lambda pipe: pipe.text_encoder.encode(PROMPTS).pooled,
    "t2v": _t2v,
    "i2v": _i2v,
}
FRAME_CASES = ("t2v", "i2v")  # compared in levels of 1/255, the others by relative error
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def is_compared(name: str, dtype: torch.dtype) -> bool:
    """Frames only in float32: in bf16 diffusers keeps the sampler's state and times in bf16, ours are float32."""
    return dtype == torch.float32 or name not in FRAME_CASES


@torch.no_grad()
def compute(name: str, pipe: Pipeline, inputs: dict[str, Tensor]) -> Tensor:
    """Our result of one case, in float32 on the CPU."""
    return OURS[name](pipe, **{key: value.to(pipe.device) for key, value in inputs.items()}).float().cpu()
