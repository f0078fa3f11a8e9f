"""What is compared: one function for each piece of work, and the table of rows at the end.

A function builds one side and returns what is to be measured, a callable without arguments that returns its result
as a tensor. `side` is "ours" or "theirs" (or "exact", see `Row`); with `tiny` everything is small and finishes at
once, to see that a row works; `folder` is for files. To add a row, write such a function and a line in `ROWS`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from both_sides import build, build_text_encoder, build_their_pipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kandinsky5 import Pipeline, checkpoint, nabla, vae_tiling
from kandinsky5.config import (
    NEGATIVE_PROMPT,
    CLIPConfig,
    DiTConfig,
    NablaConfig,
    PipelineConfig,
    QwenConfig,
    SamplingConfig,
    Tiling,
    VAEConfig,
)
from kandinsky5.dit import DiT
from kandinsky5.extras import preview
from kandinsky5.files import write_json
from kandinsky5.runtime import fast, kernels, offload
from kandinsky5.runtime.compile import compile_models
from kandinsky5.runtime.heap import keep_freed_memory
from kandinsky5.runtime.memory import ONE_PASS
from kandinsky5.vae import VAE
from weights_convert import tables
from weights_convert.sizes import to_their_config

Work = Callable[[], Tensor | None]

ROPE_SCALE = (1.0, 1.0, 1.0)
TEXT_TOKENS = 64  # of the prompt that the DiT's rows attend to
TINY_DIT = DiTConfig(
    dim=128, ff_dim=256, time_dim=32, num_text_blocks=1, num_visual_blocks=2, text_dim=64, pooled_dim=32
)
TINY_VAE = VAEConfig(channels=(16, 16, 32, 32), norm_groups=8)
TINY_QWEN = QwenConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ff_dim=96)
TINY_CLIP = CLIPConfig(dim=32, num_layers=2, num_heads=2, ff_dim=64)
SMALL = PipelineConfig(
    name="small",
    dit=DiTConfig(dim=512, ff_dim=2048, time_dim=256, num_visual_blocks=8, text_dim=512, pooled_dim=256),
    vae=VAEConfig(channels=(32, 64, 128, 128), norm_groups=16),
    qwen=QwenConfig(dim=512, num_layers=4, num_heads=8, num_kv_heads=2, ff_dim=2048),
    clip=CLIPConfig(dim=256, num_layers=4, num_heads=4, ff_dim=1024),
    sampling=SamplingConfig(rope_scale=None),
)
PROMPTS = [
    f"A {animal} {verb} slowly through the deep white snow while the camera follows it from far behind and then rises"
    for animal, verb in zip(
        ("fox", "dog", "cat", "horse", "bear", "bird", "man", "child"),
        ("walks", "runs", "moves", "turns", "looks", "comes", "goes", "jumps"),
        strict=True,
    )
]


# --- the DiT ---------------------------------------------------------------------------------------------------


def dit_dense(side: str, tiny: bool, folder: Path) -> Work:
    """One forward of Lite's width with 4 of its 32 visual blocks, full attention."""
    config, grid = (TINY_DIT, (2, 8, 12)) if tiny else (DiTConfig(num_visual_blocks=4), (13, 32, 48))
    return dit_forward(side, config, grid)


def dit_dense_both_keep(side: str, tiny: bool, folder: Path) -> Work:
    """The same, where theirs too keeps the memory that it frees until its forward ends, as nobody does for it."""
    forward = dit_dense(side, tiny, folder)

    def run() -> Tensor | None:
        with keep_freed_memory(torch.device("cpu")):
            return forward()

    return run if side == "theirs" else forward


def dit_nabla(side: str, tiny: bool, folder: Path, peaked: float | None = None) -> Work:
    """The same with NABLA, P 0.9. Here the window alone (11, 3, 3 of 13, 2, 3 tiles) keeps 52 % of the map, and as
    random weights attend everywhere about equally, the mass brings that to 92 %.

    theirs: diffusers' flex backend as it stands, which uncompiled computes full attention (docs/differences.md).
    exact: the same model with a masked softmax over its own block mask, which is what NABLA means.
    """
    config, grid, nabla_config = DiTConfig(num_visual_blocks=4), (13, 32, 48), NablaConfig(P=0.9)
    if tiny:
        config, grid, nabla_config = TINY_DIT, (2, 32, 32), NablaConfig(P=0.9, window=(1, 1, 1))
    forward = dit_forward(side, replace(config, nabla=nabla_config), grid, peaked)
    if side != "exact":
        return forward

    import diffusers.models.transformers.transformer_kandinsky as module

    plain = module.dispatch_attention_fn

    def masked(query, key, value, attn_mask=None, **rest):  # (B, L, N, D) each
        if attn_mask is None:
            return plain(query, key, value, **{**rest, "backend": None})
        kept = attn_mask.to_dense().bool()  # (B, N, L/64, L/64)
        share = float(kept.float().mean())
        assert tiny or abs(share - (0.70 if peaked else 0.92)) < 0.01, share  # as the table says
        heads = []
        for n in range(query.shape[2]):  # one at a time: a mask of all heads would be 0.7 GB
            mask = kept[:, n].repeat_interleave(nabla.TILE, dim=1).repeat_interleave(nabla.TILE, dim=2)
            heads.append(F.scaled_dot_product_attention(query[:, :, n], key[:, :, n], value[:, :, n], mask))
        return torch.stack(heads, dim=2)

    def run() -> Tensor:
        with mock.patch.object(module, "dispatch_attention_fn", masked):
            return forward()

    return run


def dit_nabla_peaked(side: str, tiny: bool, folder: Path) -> Work:
    """The same with maps more like trained ones: the mass sits on few tiles, so that about 70 % are kept."""
    return dit_nabla(side, tiny, folder, peaked=4)


def dit_dense_float32(side: str, tiny: bool, folder: Path) -> Work:
    """One block of Lite's width on 2,688 tokens, in float32."""
    config, grid = (TINY_DIT, (2, 8, 12)) if tiny else (DiTConfig(num_text_blocks=1, num_visual_blocks=1), (7, 32, 48))
    return dit_forward(side, config, grid, dtype=torch.float32)


def dit_matmul_share(side: str, tiny: bool, folder: Path) -> Work:
    """The dense forward compared with bare bf16 matmuls of as many floating-point operations, on this machine."""
    config, grid = (TINY_DIT, (2, 8, 12)) if tiny else (DiTConfig(num_visual_blocks=4), (13, 32, 48))
    if side == "ours":
        return dit_forward(side, config, grid)
    flop = dit_flop(config, grid)
    size = 64 if tiny else 3072  # 2048 and 4096 reach the same rate within 6 %
    a, b, out = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(3))
    count = max(1, round(flop / (2 * size**3)))

    def run() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return run


def dit_nabla_long_float32(side: str, tiny: bool, folder: Path) -> Work:
    """One forward of that in float32, in which it takes minutes."""
    return dit_nabla_long(side, tiny, folder, torch.float32, steps=1)


def dit_nabla_long(side: str, tiny: bool, folder: Path, dtype: torch.dtype = torch.bfloat16, steps: int = 3) -> Work:
    """31,744 tokens, one visual block of Lite's width. "theirs" is our own dense path here.

    The window keeps 12.7 % of the tiles; queries so long that their maps are peaked add the rest to 15 %. Three
    forwards in one heap, as the pipeline takes them: the first of them gets its memory from the system.
    """
    config, grid, nabla_config = DiTConfig(num_visual_blocks=1), (31, 64, 64), NablaConfig(P=0.9)
    if tiny:
        config, grid, nabla_config = TINY_DIT, (2, 32, 32), NablaConfig(P=0.9, window=(1, 1, 1))
    if side == "theirs":
        return dit_forward("ours", config, grid, peaked=5.3, steps=steps, dtype=dtype)
    forward = dit_forward("ours", replace(config, nabla=nabla_config), grid, peaked=5.3, steps=steps, dtype=dtype)
    build_map, shares = kernels.map_head_by_head, []

    def block_map(*arguments) -> Tensor:
        kept = build_map(*arguments)
        if not shares:  # in the run to warm up
            shares.append(float(kept.float().mean()))
            assert tiny or 0.145 <= shares[0] < 0.155, shares  # as the table says
        return kept

    def run() -> Tensor:
        with mock.patch.object(kernels, "map_head_by_head", block_map):
            return forward()

    return run


def attention_long(side: str, tiny: bool, folder: Path) -> Work:
    """Of that only the attention of one block: 28 heads of 64, the window and tiles drawn at random to 15 %."""
    heads, grid = (2, (2, 32, 32)) if tiny else (28, (31, 32, 32))  # in tokens
    generator = torch.Generator().manual_seed(1)
    shape = (3, 1, heads, math.prod(grid), 64)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    if side == "theirs":
        return lambda: kernels.attend_through("auto", q, k, v)
    window = nabla.build_window(grid, NablaConfig().window, torch.device("cpu"))  # (L/64, L/64)
    share = max(0.0, 0.15 - window.float().mean().item()) / (1 - window.float().mean().item() + 1e-9)
    kept = (torch.rand(1, heads, *window.shape, generator=generator) < share) | window
    return lambda: kernels.block_sparse_attention(q, k, v, kept)


def guidance_short(side: str, tiny: bool, folder: Path) -> Work:
    """Guidance for 2,688 latent positions: one batch of two, as the pipeline asks; theirs: two passes."""
    return guidance(side, *((TINY_DIT, (2, 8, 12)) if tiny else (SMALL.dit, (7, 16, 24))))


def guidance_long(side: str, tiny: bool, folder: Path) -> Work:
    """The same for 19,968 positions at Lite's width: two passes, as the pipeline asks; theirs: one batch of two."""
    return guidance(side, *((TINY_DIT, (12, 32, 32)) if tiny else (DiTConfig(num_visual_blocks=1), (13, 32, 48))))


def guidance(side: str, config: DiTConfig, grid: tuple[int, int, int]) -> Work:
    """Ours is what the pipeline chooses for this size, "theirs" our other way."""
    inputs, dit = dit_inputs(config, grid), build("ours", "dit", config, torch.bfloat16)
    both = {name: torch.cat([x, x]) for name, x in inputs.items()}
    together = (math.prod(grid) < ONE_PASS) == (side == "ours")

    def run() -> Tensor:
        with keep_freed_memory(inputs["x"].device):
            if together:
                return dit(**both, rope_scale=ROPE_SCALE)
            return torch.cat([dit(**inputs, rope_scale=ROPE_SCALE) for _ in range(2)])

    return run


def streaming(side: str, tiny: bool, folder: Path) -> Work:
    """1,536 tokens through 8 Lite blocks, whose mapped weights come and go (--offload blocks); theirs: all there."""
    config, grid = (TINY_DIT, (1, 8, 8)) if tiny else (DiTConfig(num_visual_blocks=8), (4, 32, 48))
    inputs, file = dit_inputs(config, grid), folder / "streamed" / "dit.safetensors"
    if not file.exists():
        file.parent.mkdir()
        state = build("ours", "dit", config, torch.bfloat16).state_dict()
        save_file({name: x.bfloat16() for name, x in state.items()}, file)
    with torch.device("meta"):
        dit = DiT(config)
    weights = checkpoint.find_weights(file.parent, "dit")
    if side == "theirs":
        checkpoint.load_weights(dit, weights, "cpu", torch.bfloat16)
    else:
        offload.rest(dit, checkpoint.map_weights(dit, weights, torch.bfloat16), torch.device("cpu"), "blocks")
    fast.install(dit)
    kernels.install(dit, "auto")

    def run() -> Tensor:
        with keep_freed_memory(inputs["x"].device), offload.awake(dit):
            return dit(**inputs, rope_scale=ROPE_SCALE)

    return run


def dit_compiled(side: str, tiny: bool, folder: Path) -> Work:
    """A compiled DiT of Lite's width, one block, 1,536 tokens; theirs: plain code. The run to warm up compiles."""
    config, grid = (TINY_DIT, (1, 8, 8)) if tiny else (DiTConfig(num_text_blocks=1, num_visual_blocks=1), (4, 32, 48))
    inputs, dit = dit_inputs(config, grid), build("ours", "dit", config, torch.bfloat16)
    if side == "ours":
        compile_models(dit, build("ours", "vae", TINY_VAE, torch.bfloat16))
    return lambda: dit(**inputs, rope_scale=ROPE_SCALE)


def decoder_compiled(side: str, tiny: bool, folder: Path) -> Work:
    """A compiled decoder, 3×16×24 latents; theirs: plain code."""
    config, grid = (TINY_VAE, (2, 4, 6)) if tiny else (VAEConfig(), (3, 16, 24))
    vae = build("ours", "vae", config, torch.bfloat16)
    z = torch.randn(1, 16, *grid, generator=torch.Generator().manual_seed(1)).bfloat16()
    if side == "ours":
        compile_models(build("ours", "dit", TINY_DIT, torch.bfloat16), vae)
    return lambda: vae.decode(z)


def preview_file(side: str, tiny: bool, folder: Path) -> Work:
    """A preview of 7×16×24 latents written into a PNG; theirs: a step of the small model with guidance."""
    config, grid = (TINY_DIT, (2, 8, 12)) if tiny else (SMALL.dit, (7, 16, 24))
    if side == "theirs":
        return guidance("ours", config, grid)
    vae = build("ours", "vae", TINY_VAE if tiny else SMALL.vae, torch.bfloat16)
    callback = preview.build_callback(vae, preview.in_file(folder / "preview.png"))
    before, after = torch.randn(2, 1, *grid, 16, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        callback(0, 0.9, before)  # which draws nothing
        callback(1, 0.8, after)

    return run


def dit_forward(
    side: str,
    config: DiTConfig,
    grid: tuple[int, int, int],
    peaked: float | None = None,
    steps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Work:
    """The DiT on latents of `grid`, ours or diffusers', with the same weights and inputs.

    peaked: latents that are much alike within 8 × 8 tokens, and queries that many times as long. steps: how often ours
    runs in a row in one heap.
    """
    inputs = dit_inputs(config, grid, dtype=dtype)
    dit = build(side, "dit", config, dtype)
    if peaked is not None:
        coarse = inputs["x"][:, :, ::16, ::16].repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
        inputs["x"] = coarse + 0.3 * inputs["x"]
        for name, parameter in dit.named_parameters():
            if "visual" in name and name.endswith(("self_attention.q_norm.weight", "self_attention.query_norm.weight")):
                parameter *= peaked
    if side != "ours":
        return lambda: call_their_dit(dit, config, **inputs)

    def run() -> Tensor:
        with keep_freed_memory(inputs["x"].device):  # as the pipeline does, there for all its steps together
            return [dit(**inputs, rope_scale=ROPE_SCALE) for _ in range(steps)][-1]

    return run


def dit_inputs(
    config: DiTConfig, grid: tuple[int, int, int], device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random arguments of `DiT.forward`; grid (T, H, W) of latents."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "x": normal(1, *grid, config.input_channels),
        "text": normal(1, TEXT_TOKENS, config.text_dim),
        "pooled": normal(1, config.pooled_dim),
        "t": torch.tensor([0.7], device=device),
    }


def call_their_dit(dit, config: DiTConfig, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
    """Diffusers' transformer, as its pipeline calls it."""
    from diffusers import Kandinsky5T2VPipeline

    sparse = None
    T, H, W = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    if config.nabla:
        dit.set_attention_backend("flex")
        window = Kandinsky5T2VPipeline.fast_sta_nabla(T, H // 8, W // 8, *config.nabla.window, device="cpu")
        sparse = {"sta_mask": window[None, None], "P": config.nabla.P, "to_fractal": True}
    return dit(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * t,
        visual_rope_pos=[torch.arange(n) for n in (T, H, W)],
        text_rope_pos=torch.arange(text.shape[1]),
        sparse_params=sparse,
    ).sample


def dit_flop(config: DiTConfig, grid: tuple[int, int, int], kept: float = 1.0) -> int:
    """Floating-point operations of a forward by its definition, where NABLA keeps this share of the tiles."""
    with torch.device("meta"):
        dit = DiT(replace(config, nabla=None))
    with FlopCounterMode(display=False) as counter:
        dit(**dit_inputs(config, grid, device="meta", dtype=torch.float32), rope_scale=ROPE_SCALE)
    tokens = math.prod(grid) // 4
    attention = config.num_visual_blocks * 4 * tokens**2 * config.dim
    return counter.get_total_flops() - round((1 - kept) * attention)


def vae_flop(grid: tuple[int, int, int], encode: bool = False, config: VAEConfig | None = None) -> int:
    """Floating-point operations of decoding latents of `grid`, or encoding its video, tiled in time, by definition."""
    with torch.device("meta"):
        vae, z = VAE(config or VAEConfig()), torch.empty(1, 16, *grid)
        video = torch.empty(1, 3, 4 * grid[0] - 3, 8 * grid[1], 8 * grid[2])
    with FlopCounterMode(display=False) as counter:
        vae_tiling.encode(vae, video, Tiling()) if encode else vae_tiling.decode(vae, z, Tiling())
    return counter.get_total_flops()


def load_dit(side: str, tiny: bool, folder: Path) -> Work:
    """From the files of `write_dit` to the end of a first forward on a tiny input."""
    config = loaded_dit_config(tiny)
    inputs = dit_inputs(config, (1, 4, 4))
    if side == "theirs":
        from diffusers import Kandinsky5Transformer3DModel as Theirs

    for path in (folder / "ours", folder / "theirs"):
        read_through(next(path.glob("*.safetensors")))

    def run() -> Tensor:
        if side == "theirs":
            dit = Theirs.from_pretrained(folder / "theirs", torch_dtype=torch.bfloat16)
            return call_their_dit(dit, config, **inputs)
        with torch.device("meta"):
            dit = DiT(config)
        checkpoint.load_weights(dit, checkpoint.find_weights(folder / "ours", "dit"), "cpu", torch.bfloat16)
        fast.install(dit)
        kernels.install(dit, "auto")
        return dit(**inputs, rope_scale=ROPE_SCALE)

    return run


def write_dit(tiny: bool, folder: Path) -> None:
    """A DiT in bf16, all of it as in the releases, in both layouts."""
    if (folder / "ours").exists():
        return
    config = loaded_dit_config(tiny)
    weights = {name: x.bfloat16() for name, x in build("ours", "dit", config, torch.bfloat16).state_dict().items()}
    for side in ("ours", "theirs"):
        (folder / side).mkdir()
    save_file(weights, folder / "ours" / "dit.safetensors")
    theirs = {tables.theirs("dit", name): weight for name, weight in weights.items()}
    save_file(theirs, folder / "theirs" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "theirs" / "config.json", to_their_config("dit", config))


def loaded_dit_config(tiny: bool) -> DiTConfig:
    return TINY_DIT if tiny else DiTConfig()  # Lite, 4.0 GB


def read_through(path: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass


# --- the VAE ---------------------------------------------------------------------------------------------------


def vae_decode_float32(side: str, tiny: bool, folder: Path) -> Work:
    return vae_decode(side, tiny, torch.float32, (5, 4, 6) if tiny else (5, 16, 24))


def vae_decode_short_float32(side: str, tiny: bool, folder: Path) -> Work:
    return vae_decode(side, tiny, torch.float32, (3, 4, 6) if tiny else (3, 16, 24))


def vae_decode_bfloat16(side: str, tiny: bool, folder: Path) -> Work:
    """exact: diffusers with these bf16 weights and latents, computed in float32. Thirty layers that round to bf16 are
    about 0.016 away from that on either side, and so 0.02 from each other."""
    return vae_decode(side, tiny, torch.bfloat16, (5, 4, 6) if tiny else (5, 16, 24))


def vae_decode_tiled(side: str, tiny: bool, folder: Path) -> Work:
    """A longer and larger clip, tiled in time and space."""
    return vae_decode(side, tiny, torch.bfloat16, (6, 4, 34) if tiny else (17, 32, 48), space=True)


def vae_decode(side: str, tiny: bool, dtype: torch.dtype, grid: tuple[int, int, int], space: bool = False) -> Work:
    """Decode latents of `grid`, tiled in time as both sides do by default, and in space with `space`."""
    config = TINY_VAE if tiny else VAEConfig()
    z = torch.randn(1, config.latent_channels, *grid, generator=torch.Generator().manual_seed(1)).to(dtype)
    vae = build(side, "vae", config, dtype)
    if side == "exact":
        vae, z = vae.float(), z.float()
    if side == "ours":
        return lambda: vae_tiling.decode(vae, z, Tiling(space=space))
    if space:
        vae.enable_tiling()
    return lambda: vae.decode(z).sample


def vae_encode_float32(side: str, tiny: bool, folder: Path) -> Work:
    return vae_encode(side, tiny, folder, torch.float32, frames=9)


def vae_encode(side: str, tiny: bool, folder: Path, dtype: torch.dtype = torch.bfloat16, frames: int = 17) -> Work:
    """Mean and log-variance of a video."""
    config, size = (TINY_VAE, (frames, 16, 24)) if tiny else (VAEConfig(), (frames, 128, 192))
    video = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
    vae = build(side, "vae", config, dtype)
    if side == "ours":
        return lambda: torch.cat(vae_tiling.encode(vae, video, Tiling()), dim=1)
    return lambda: vae.encode(video).latent_dist.parameters


# --- text, and all together ------------------------------------------------------------------------------------


def text_1(side: str, tiny: bool, folder: Path) -> Work:
    """A prompt and the default negative prompt through both encoders, as each pipeline calls them."""
    return text(side, tiny, PROMPTS[:1])


def text_8(side: str, tiny: bool, folder: Path) -> Work:
    """Eight prompts in one batch, and the default negative prompt for each."""
    return text(side, tiny, PROMPTS)


def text_1_without_head(side: str, tiny: bool, folder: Path) -> Work:
    """As `text_1`, but theirs does not compute the scores of 152,064 words for each token, which nobody reads."""
    return text(side, tiny, PROMPTS[:1], head=False)


def text(side: str, tiny: bool, prompts: list[str], head: bool = True) -> Work:
    """Full width, but 2 of Qwen's 28 layers and 1 of CLIP's 12. The result holds both encoders' features."""
    qwen, clip = (TINY_QWEN, TINY_CLIP) if tiny else (QwenConfig(num_layers=2), CLIPConfig(num_layers=1))
    config = replace(SMALL, qwen=qwen, clip=clip)
    negatives = [NEGATIVE_PROMPT] * len(prompts)
    if side == "ours":
        encoder = build_text_encoder(config, torch.bfloat16)
        lengths = {len(encoder.qwen_tokenizer.encode(prompt)) for prompt in prompts}
        assert lengths == {20}, f"the prompts have {lengths} tokens"

        def encode(*batches: list[str]) -> list[tuple[Tensor, Tensor]]:  # the pipeline encodes all texts at once
            features = encoder.encode([prompt for batch in batches for prompt in batch])
            starts = range(0, len(features.mask), len(prompts))
            parts = [features.select(start, start + len(prompts)) for start in starts]
            return [(part.text, part.pooled) for part in parts]
    else:
        pipe = build_their_pipeline(config, torch.bfloat16, models=("qwen", "clip"))
        if not head:
            pipe.text_encoder.lm_head = torch.nn.Identity()

        def encode(*batches: list[str]) -> list[tuple[Tensor, Tensor]]:
            return [pipe.encode_prompt(batch)[:2] for batch in batches]

    def run() -> Tensor:  # all texts of a batch are of one length, so that there is no padding
        return torch.cat([features.flatten() for batch in encode(prompts, negatives) for features in batch])

    return run


def pipeline_bfloat16(side: str, tiny: bool, folder: Path) -> Work:
    return pipeline(side, tiny, torch.bfloat16)


def pipeline_float32(side: str, tiny: bool, folder: Path) -> Work:
    return pipeline(side, tiny, torch.float32)


def pipeline(side: str, tiny: bool, dtype: torch.dtype) -> Work:
    """Prompt to frames with a small model: 25 frames of 128 × 192, 8 steps, guidance 5, from the same noise."""
    config, grid, steps = (SMALL, (7, 16, 24), 8)
    if tiny:
        dit = replace(TINY_DIT, text_dim=TINY_QWEN.dim, pooled_dim=TINY_CLIP.dim)
        config = replace(SMALL, dit=dit, vae=TINY_VAE, qwen=TINY_QWEN, clip=TINY_CLIP)
        grid, steps = (2, 4, 6), 2
    noise = torch.randn(1, *grid, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"height": 8 * grid[1], "width": 8 * grid[2], "num_frames": 4 * grid[0] - 3}
    options |= {"num_inference_steps": steps, "guidance_scale": 5.0}
    if side == "ours":
        dit, vae = (build(side, name, getattr(config, name), dtype) for name in ("dit", "vae"))
        ours = Pipeline(config, dit, vae, build_text_encoder(config, dtype))
        options |= {"schedule": "diffusers", "output_type": "float", "progress": False}
        return lambda: ours(PROMPTS[0], latents=noise, **options)
    theirs = build_their_pipeline(config, dtype)
    latents = torch.cat([noise, noise.new_zeros(*noise.shape[:-1], 17)], dim=-1)  # conditioning and mask
    return lambda: torch.as_tensor(theirs(PROMPTS[0], latents=latents.clone(), output_type="np", **options).frames)


# Largest error of rows in float32 that hold a DiT: diffusers rounds rotated queries and keys to bf16 there too, which
# is 1e-4 of the result. Without that rounding both sides agree to 3e-6 (one block at Lite's width). A pipeline's
# guidance, of 5, multiplies it.
ROTATED = 2e-4


class Row(NamedTuple):
    """A line of the table."""

    name: str
    work: str  # what stands in the table
    run: Callable[[str, bool, Path], Work]
    target: float | None  # the least ratio theirs / ours that we aim for
    tolerance: float | None  # the largest relative error of the results; None: there is none to compare
    # "load": time in a fresh process; "memory": peak over the resting process; "file": the same against the files of
    # folder/ours
    measure: str = "time"
    exact: bool = False  # the error is taken from run("exact", …), as theirs does not compute what it should
    prepare: Callable[[bool, Path], None] | None = None  # writes files
    once: bool = False  # theirs takes minutes: measured once, without a run to warm up
    dtype: str = "bf16"  # what both sides compute in, or "float32"
    flop: Callable[[], int] | None = None  # operations by the definition, for the share of the matmul rate
    avx2: bool = False  # also measured as on a processor with AVX2 alone (--isa avx2)


def dense_flop() -> int:
    return dit_flop(DiTConfig(num_visual_blocks=4), (13, 32, 48))


def small_step_flop() -> int:
    """Both passes of guidance."""
    return 2 * dit_flop(SMALL.dit, (7, 16, 24))


def pipeline_flop() -> int:
    """Eight steps and decoding; those of the text, less than a hundredth, are left out."""
    return 8 * small_step_flop() + vae_flop((7, 16, 24), config=SMALL.vae)


ROWS = [
    Row("dit", "DiT forward, dense, Lite width, 4 blocks, 13×32×48", dit_dense, None, 2e-2, flop=dense_flop),
    Row("dit-heap", "DiT forward, dense, theirs too in our heap", dit_dense_both_keep, None, 2e-2, flop=dense_flop),
    Row(
        "nabla",
        "DiT forward, NABLA P 0.9, 92 % of the tiles; flex, eager",
        dit_nabla,
        None,
        2e-2,
        exact=True,
        once=True,
        flop=lambda: dit_flop(DiTConfig(num_visual_blocks=4), (13, 32, 48), 0.92),
    ),
    Row(
        "nabla-peaked",
        "DiT forward, NABLA, 70 % of the tiles; flex, eager",
        dit_nabla_peaked,
        None,
        2e-2,
        exact=True,
        once=True,
        flop=lambda: dit_flop(DiTConfig(num_visual_blocks=4), (13, 32, 48), 0.7),
    ),
    Row(
        "nabla-long",
        "3 forwards, 1 block, 31×64×64, NABLA, 15 % of the tiles; our own dense",
        dit_nabla_long,
        2.5,
        None,
        flop=lambda: 3 * dit_flop(DiTConfig(num_visual_blocks=1), (31, 64, 64), 0.15),
    ),
    Row("attention-long", "of that the attention alone; our own dense", attention_long, None, None),
    Row("guidance-short", "guidance, 7×16×24, in one pass; in two", guidance_short, None, 2e-2, flop=small_step_flop),
    Row(
        "guidance-long",
        "guidance, 13×32×48, Lite width, 1 block, in two passes; in one",
        guidance_long,
        None,
        2e-2,
        flop=lambda: 2 * dit_flop(DiTConfig(num_visual_blocks=1), (13, 32, 48)),
    ),
    Row("streaming", "DiT forward, 8 blocks, 4×32×48, --offload blocks; all there", streaming, None, 1e-6),
    Row("compiled", "DiT forward, 1 block, 4×32×48, compiled; plain", dit_compiled, None, 2e-2),
    Row("compiled-decoder", "VAE decode 3×16×24, compiled; plain", decoder_compiled, None, 2e-2),
    Row("preview", "a preview of 7×16×24 in a PNG; a step of the small model", preview_file, 100, None),
    Row("share", "DiT forward, share of the bf16 matmul rate", dit_matmul_share, 0.6, None),
    Row(
        "decode32",
        "VAE decode 5×16×24, float32",
        vae_decode_float32,
        1.35,
        1e-5,
        dtype="float32",
        flop=lambda: vae_flop((5, 16, 24)),
    ),
    Row(
        "decode16",
        "VAE decode 5×16×24, bf16",
        vae_decode_bfloat16,
        1.35,
        2e-2,
        exact=True,
        flop=lambda: vae_flop((5, 16, 24)),
    ),
    Row(
        "decode32-memory",
        "VAE decode 5×16×24, float32, peak memory",
        vae_decode_float32,
        1,
        1e-5,
        "memory",
        dtype="float32",
    ),
    Row("decode16-memory", "VAE decode 5×16×24, bf16, peak memory", vae_decode_bfloat16, 1, None, "memory"),
    Row("tiled-memory", "VAE decode 17×32×48, spatial tiles, peak memory", vae_decode_tiled, 2, None, "memory"),
    Row("encode", "VAE encode 17×128×192", vae_encode, 1.1, 2e-2, flop=lambda: vae_flop((5, 16, 24), encode=True)),
    Row("text", "text: a prompt and the negative prompt", text_1, 3, 2e-2),
    Row("text-headless", "text: the same, theirs without its unused lm_head", text_1_without_head, None, 2e-2),
    Row("text8", "text: 8 prompts and negative prompts", text_8, 4, 2e-2),
    Row("load", "load a 4.02 GB DiT, to its first forward", load_dit, 2, 2e-2, "load", prepare=write_dit),
    Row(
        "load-file",
        "load a 4.02 GB DiT, peak memory; size of the file",
        load_dit,
        1 / 1.1,
        None,
        "file",
        prepare=write_dit,
    ),
    Row("load-memory", "load a 4.02 GB DiT, peak memory", load_dit, 1, 2e-2, "memory", prepare=write_dit),
    Row("pipeline", "pipeline, small model, 8 steps, guidance 5", pipeline_bfloat16, 1.5, 1e-1, flop=pipeline_flop),
    Row(
        "pipeline32",
        "pipeline, the same in float32",
        pipeline_float32,
        1.4,
        5 * ROTATED,
        dtype="float32",
        flop=pipeline_flop,
        avx2=True,
    ),
    Row(
        "dit32",
        "DiT forward, dense, Lite width, 1 block, 7×32×48, float32",
        dit_dense_float32,
        1.15,
        ROTATED,
        dtype="float32",
        avx2=True,
        flop=lambda: dit_flop(DiTConfig(num_text_blocks=1, num_visual_blocks=1), (7, 32, 48)),
    ),
    Row(
        "decode32-short",
        "VAE decode 3×16×24, float32",
        vae_decode_short_float32,
        1.5,
        1e-5,
        dtype="float32",
        avx2=True,
        flop=lambda: vae_flop((3, 16, 24)),
    ),
    Row(
        "encode32",
        "VAE encode 9×128×192, float32",
        vae_encode_float32,
        1.3,
        1e-5,
        dtype="float32",
        avx2=True,
        flop=lambda: vae_flop((3, 16, 24), encode=True),
    ),
    Row(
        "nabla-long32",
        "forward, 1 block, 31×64×64, NABLA, 15 % of the tiles, float32; our own dense",
        dit_nabla_long_float32,
        2.5,
        None,
        once=True,
        dtype="float32",
        avx2=True,
        flop=lambda: dit_flop(DiTConfig(num_visual_blocks=1), (31, 64, 64), 0.15),
    ),
]
