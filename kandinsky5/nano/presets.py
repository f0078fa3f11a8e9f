"""The sizes of the nano family: the released models' architecture, a few million parameters in all."""

from dataclasses import replace

from kandinsky5 import config
from kandinsky5.config import PipelineConfig, QwenConfig, SamplingConfig, Tiling

TEMPLATE = """\
<|im_start|>system
Describe the video.<|im_end|>
<|im_start|>user
{}<|im_end|>"""

# The VAE's latents have mean 0 and standard deviation 1 channel by channel: train_vae.standardise.
VAE = config.VAEConfig(channels=(16, 32, 48, 48), blocks_per_stage=1, norm_groups=8, scaling_factor=1.0)
QWEN = QwenConfig(vocab_size=1280, dim=128, num_layers=3, num_heads=4, num_kv_heads=2, ff_dim=256, rope_theta=1e4)
CLIP = config.CLIPConfig(vocab_size=1280, dim=128, num_layers=2, num_heads=4, ff_dim=256, start_token=0, end_token=1)
TEXT = config.TextConfig(template=TEMPLATE, dropped_tokens=12)
# Four models of this size, one VAE and the text encoders fill the 30 MB that the bundled weights may take.
DIT = config.DiTConfig(
    dim=192, ff_dim=384, time_dim=40, num_text_blocks=1, num_visual_blocks=5, rope_axes=(8, 12, 12),
    text_dim=QWEN.dim, pooled_dim=CLIP.dim,
)  # fmt: skip
MUON = r"blocks.*(attention|feed_forward)"  # the matrices of the DiT that it trains
SAMPLING = SamplingConfig(
    num_inference_steps=50, guidance_scale=2.0, shift=3.0, height=64, width=64, num_frames=17, fps=10,
    rope_scale=(1.0, 1.0, 1.0), image_area=64 * 64, negative_prompt="", normalise_first_frames=False,
)  # fmt: skip

NANO = PipelineConfig(
    name="nano", tasks=("t2v", "i2v"), dit=DIT, vae=VAE, qwen=QWEN, clip=CLIP, text=TEXT, sampling=SAMPLING,
    tiling=Tiling(time=False),
)  # fmt: skip
NOCFG = replace(NANO, name="nano-nocfg", sampling=replace(SAMPLING, guidance_scale=1.0))
DISTILLED = replace(
    NANO, name="nano-distilled16steps", sampling=replace(SAMPLING, guidance_scale=1.0, num_inference_steps=16)
)
# 33 frames of 128 x 128 are 9 tiles of 8 x 8 tokens, one for each latent frame. The scenes are nano's, twice as large
# and in twice as many frames, so positions are divided by two: before any training motions come out right.
LONG = replace(
    NANO,
    name="nano-10s",
    dit=replace(DIT, nabla=config.NablaConfig(P=0.6, window=(3, 1, 1))),
    sampling=replace(SAMPLING, height=128, width=128, num_frames=33, image_area=128 * 128, rope_scale=(2.0, 2.0, 2.0)),
)
PRESETS = {preset.name: preset for preset in (NANO, NOCFG, DISTILLED, LONG)}
