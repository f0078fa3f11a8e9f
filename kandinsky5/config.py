"""The sizes of every model and the defaults of every released checkpoint.

Frozen dataclasses hold them, `PRESETS` names them, and `config.json` of a native checkpoint folder is one of
them written down. Presets are written as differences from the Lite text-to-video model.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace

# The spelling mistakes are the authors': the models were trained with exactly these words.
TEMPLATE = """\
<|im_start|>system
You are a promt engineer. Describe the video in detail.
Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.
Describe the location of the video, main characters or objects and their action.
Describe the dynamism of the video and presented actions.
Name the visual style of the video: whether it is a professional footage, user generated content, some kind of \
animation, video game or scren content.
Describe the visual effects, postprocessing and transitions if they are presented in the video.
Pay attention to the order of key actions shown in the scene.<|im_end|>
<|im_start|>user
{}<|im_end|>"""

# The template of the authors' code for an image, and for a single frame of a video.
IMAGE_TEMPLATE = """\
<|im_start|>system
You are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, text, spatial \
relationships of the objects and background:<|im_end|>
<|im_start|>user
{}<|im_end|>"""

# For editing, where <|image_pad|> stands for as many tokens as the vision tower makes of the image. The official code
# drops 55 tokens, which are the 52 before the prompt and three of its own: the weights were trained so.
EDIT_TEMPLATE = """\
<|im_start|>system
You are a promt engineer. Based on the provided source image (first image) and target image (second image), create \
an interesting text prompt that can be used together with the source image to create the target image:<|im_end|>
<|im_start|>user
{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>"""

NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)


@dataclass(frozen=True)
class NablaConfig:
    """Block-sparse attention (arXiv 2507.13546): which tiles of 8×8 tokens a tile attends to."""

    P: float = 0.9  # share of the pooled attention mass that is kept
    window: tuple[int, int, int] = (11, 3, 3)  # tiles (T, H, W) around a tile that are always kept


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer; the defaults are Lite (2.0 billion parameters)."""

    dim: int = 1792
    ff_dim: int = 7168
    time_dim: int = 512
    num_text_blocks: int = 2
    num_visual_blocks: int = 32
    rope_axes: tuple[int, int, int] = (16, 24, 24)  # rotary channels for T, H, W; their sum is the head dim
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    visual_cond: bool = True  # the input also carries conditioning latents and a mask: 16 + 16 + 1 channels
    text_dim: int = 3584
    pooled_dim: int = 768
    nabla: NablaConfig | None = None  # None: full attention

    @property
    def head_dim(self) -> int:
        """Channels of one attention head: all of them rotate, each with one of the three axes."""
        return sum(self.rope_axes)

    @property
    def num_heads(self) -> int:
        """Attention heads of a block, in self- and cross-attention alike."""
        return self.dim // self.head_dim

    @property
    def input_channels(self) -> int:
        """Channels of the tensor that goes in: latents, and with `visual_cond` conditioning latents and mask."""
        return 2 * self.in_channels + 1 if self.visual_cond else self.in_channels


@dataclass(frozen=True)
class VAEConfig:
    """A VAE; the defaults are HunyuanVideo's causal one: 8× smaller in space, 4× in time."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_stage: int = 2  # in the encoder; the decoder has one more
    norm_groups: int = 32
    image_channels: int = 3
    latent_channels: int = 16
    scaling_factor: float = 0.476986  # latents = z · scaling_factor
    # After which stages the encoder's grid halves, and the decoder's doubles: True where time does so too.
    halves_time: tuple[bool, ...] = (False, True, True)
    dimensions: int = 3  # 2: FLUX.1's, which takes each frame for itself (vae2d.py)

    @property
    def space_factor(self) -> int:
        """Pixels along a side of a latent: 8."""
        return 2 ** len(self.halves_time)

    @property
    def time_factor(self) -> int:
        """Frames of a latent frame, but for the first, which stands for one: 4."""
        return 2 ** sum(self.halves_time)

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, h, w) of the latents of a video of this size."""
        return (num_frames - 1) // self.time_factor + 1, height // self.space_factor, width // self.space_factor


@dataclass(frozen=True)
class QwenConfig:
    """The language model of Qwen2.5-VL-7B."""

    vocab_size: int = 152064
    dim: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    ff_dim: int = 18944
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    image_token: int = 151655  # stands where an image's tokens go

    @property
    def head_dim(self) -> int:
        """Channels of one query head; a key and value head has as many."""
        return self.dim // self.num_heads

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """How many of a head's rotary pairs turn with T, H and W: 16, 24 and 24 of 64."""
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8


@dataclass(frozen=True)
class QwenVisionConfig:
    """The vision tower of Qwen2.5-VL-7B, and the areas of the images that it is given."""

    dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ff_dim: int = 3420
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)  # blocks that see the whole image; the others see one window
    out_dim: int = 3584  # the language model's width
    norm_eps: float = 1e-6
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class CLIPConfig:
    """The text tower of CLIP ViT-L/14."""

    vocab_size: int = 49408
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ff_dim: int = 3072
    max_positions: int = 77
    norm_eps: float = 1e-5
    start_token: int = 49406
    end_token: int = 49407  # also the padding


@dataclass(frozen=True)
class TextConfig:
    """What stands around a prompt, as in the official code; diffusers 0.42.1 corrects a word and drops 128 tokens."""

    template: str = TEMPLATE  # what Qwen reads, with the prompt at {}
    dropped_tokens: int = 129  # the template's tokens before the prompt: their features are dropped
    image_template: str | None = None  # for a single frame; None: the same as for more
    image_dropped_tokens: int = 0
    dropped_from_prompt: int = 0  # how many of the dropped tokens are the prompt's own first ones
    max_tokens: int = 256  # of a prompt that are read


RELEASED_TEXT = TextConfig(image_template=IMAGE_TEMPLATE, image_dropped_tokens=41)


@dataclass(frozen=True)
class SamplingConfig:
    """What `Pipeline.__call__` uses where the caller gives no value."""

    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    shift: float = 5.0
    height: int = 512
    width: int = 768
    num_frames: int = 121
    fps: int = 24
    rope_scale: tuple[float, float, float] | None = (1.0, 2.0, 2.0)  # None: by size (`rope.scale_for_size`)
    image_area: int = 512 * 768  # image-to-video without height and width: the image's shape at this area
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width): editing without them takes that most like its image
    negative_prompt: str = NEGATIVE_PROMPT
    normalise_first_frames: bool = True  # after image-to-video; needs a clip of about ten latent frames to make sense


@dataclass(frozen=True)
class Tiling:
    """How the VAE's work is cut up; in pixels and frames. The defaults are those of diffusers."""

    time: bool = True
    frames: int = 16  # a window holds this many frames and one before them
    frame_stride: int = 12
    space: bool = False
    pixels: int = 256
    pixel_stride: int = 192


@dataclass(frozen=True)
class PipelineConfig:
    """The contents of `config.json` in a native checkpoint folder."""

    name: str = "t2v-lite-sft-5s"
    # "t2v": a video from a prompt, "i2v": from an image and a prompt; "t2i": an image (F = 1) likewise, "i2i": an edit
    tasks: tuple[str, ...] = ("t2v",)
    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    qwen: QwenConfig = field(default_factory=QwenConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    text: TextConfig = RELEASED_TEXT
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tiling: Tiling = field(default_factory=Tiling)
    qwen_vision: QwenVisionConfig | None = None  # with it the folder also has qwen_vision and qwen_head (`lm_head`)
    base: str | None = None  # folder, relative to this one, of the models and tokenizers that are not in it

    @property
    def qwen_head(self) -> QwenConfig:
        """Sizes of the head, by the model's name: those of its language model."""
        return self.qwen

    @property
    def makes_images(self) -> bool:
        """Whether single images come out and not videos."""
        return not {"t2i", "i2i"}.isdisjoint(self.tasks)

    @property
    def edits(self) -> bool:
        """Whether an image is a source to change and not frame 0."""
        return "i2i" in self.tasks

    @property
    def side_divisor(self) -> int:
        """What height and width must divide by: one patch of latents, or a NABLA tile of 8 × 8 patches."""
        patch = math.lcm(*self.dit.patch_size[1:])
        return self.vae.space_factor * patch * (8 if self.dit.nabla else 1)


LITE = DiTConfig()
PRO = DiTConfig(dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60, rope_axes=(32, 48, 48))
IMAGE = DiTConfig(dim=2560, ff_dim=10240, num_visual_blocks=50, rope_axes=(32, 48, 48), visual_cond=False)
FLUX = VAEConfig(scaling_factor=0.3611, halves_time=(False, False, False), dimensions=2)
HD = {"height": 768, "width": 1280, "rope_scale": (1.0, 3.16, 3.16), "image_area": 1024 * 1024}


def build_preset(name: str, dit: DiTConfig, P: float | None = None, **sampling) -> PipelineConfig:
    """A row of the table in docs/converting.md: `P` turns NABLA on, `sampling` differs from `SamplingConfig`."""
    return PipelineConfig(
        name=name,
        tasks=(name[:3],),
        dit=replace(dit, nabla=NablaConfig(P=P) if P else None),
        sampling=SamplingConfig(**sampling),
    )


def build_image_preset(name: str) -> PipelineConfig:
    """The same for Lite's images: "t2i-…" from a prompt, "i2i-…" edits an image."""
    text, edits = TextConfig(template=IMAGE_TEMPLATE, dropped_tokens=41, max_tokens=512), name.startswith("i2i")
    if edits:
        text = TextConfig(template=EDIT_TEMPLATE, dropped_tokens=55, dropped_from_prompt=3, max_tokens=512)
    return PipelineConfig(
        name=name, tasks=(name[:3],), dit=replace(IMAGE, visual_cond=edits), vae=FLUX, text=text,
        qwen_vision=QwenVisionConfig() if edits else None,
        sampling=SamplingConfig(
            guidance_scale=3.5, shift=3.0, height=1024, width=1024, num_frames=1, rope_scale=(1.0, 1.0, 1.0),
            sizes=((1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896)),
            negative_prompt="",
        ),
    )  # fmt: skip


_LONG = {"num_frames": 241, "shift": 10.0}
_ONE_PASS = {"guidance_scale": 1.0}
_DISTILLED = {"guidance_scale": 1.0, "num_inference_steps": 16}

PRESETS: dict[str, PipelineConfig] = {
    preset.name: preset
    for preset in (
        build_preset("t2v-lite-sft-5s", LITE),
        build_preset("t2v-lite-pretrain-5s", LITE),
        build_preset("t2v-lite-nocfg-5s", LITE, **_ONE_PASS),
        build_preset("t2v-lite-distilled16steps-5s", LITE, **_DISTILLED),
        build_preset("t2v-lite-sft-10s", LITE, P=0.9, **_LONG),
        build_preset("t2v-lite-pretrain-10s", LITE, P=0.9, **_LONG),
        build_preset("t2v-lite-nocfg-10s", LITE, P=0.9, **_LONG, **_ONE_PASS),
        build_preset("t2v-lite-distilled16steps-10s", LITE, P=0.9, **_LONG, **_DISTILLED),
        build_preset("i2v-lite-5s", LITE, shift=10.0),
        build_preset("t2v-pro-sft-5s-sd", PRO),
        build_preset("t2v-pro-sft-5s-hd", PRO, P=0.8, **HD),
        build_preset("t2v-pro-sft-10s-sd", PRO, P=0.9, **_LONG),
        build_preset("t2v-pro-sft-10s-hd", PRO, P=0.7, **_LONG, **HD),
        build_preset("t2v-pro-pretrain-5s-sd", PRO),
        build_preset("t2v-pro-pretrain-5s-hd", PRO, P=0.8, **HD),
        build_preset("t2v-pro-pretrain-10s-sd", PRO, P=0.9, **_LONG),
        build_preset("t2v-pro-pretrain-10s-hd", PRO, P=0.7, **_LONG, **HD),
        build_preset("t2v-pro-distilled-5s-sd", PRO, **_DISTILLED),
        build_preset("t2v-pro-distilled-5s-hd", PRO, P=0.8, **_DISTILLED, **HD),
        build_preset("i2v-pro-sft-5s-sd", PRO),
        build_preset("i2v-pro-sft-5s-hd", PRO, P=0.8, **HD),
        build_preset("i2v-pro-distilled-5s-sd", PRO, **_DISTILLED),
        build_preset("i2v-pro-distilled-5s-hd", PRO, P=0.8, **_DISTILLED, **HD),
        *(build_image_preset(f"{task}-lite-{stage}") for task in ("t2i", "i2i") for stage in ("sft", "pretrain")),
    )
}


NANO_NAMES = ("nano", "nano-nocfg", "nano-distilled16steps", "nano-10s")  # small models bundled with the package


def find_preset(name: str) -> PipelineConfig:
    """`PRESETS[name]`, or a ValueError that offers the closest names."""
    if name not in PRESETS:
        names = (*PRESETS, *NANO_NAMES)
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the presets are {', '.join(names)}"
        raise ValueError(f"{name!r} is neither a folder nor a preset: {hint}")
    return PRESETS[name]
