"""Likely mistakes in this code, built in one at a time: the test that must notice each of them does.

This shows that the tests see. A row of MUTATIONS is a line of our code as it is and as it could be wrong; the
case is one of tests/cases.py, compared with the stored result of the references (golden_data.py). A row of FAST_PATHS
is the same for ways to compute that the cases do not take; what notices is the test that compares them with the plain
definition.
"""

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import cases
import test_compile
import test_fast
import test_kernels
import test_magcache
import test_memory
import test_nano_text
import test_offload
import test_pieces
import test_pipeline
import test_quantize
import test_qwen_vision
import test_text_encoder
import test_weights_convert_int8
import vision_data
from golden_data import load_golden_pipeline, measure_error
from kandinsky5 import (
    Pipeline,
    attention,
    clip,
    dit,
    nabla,
    pipeline,
    qwen,
    qwen_vision,
    rope,
    sampler,
    text_encoder,
    vae,
    vae_tiling,
    video_io,
)
from kandinsky5.extras import magcache
from kandinsky5.nano import train_text
from kandinsky5.runtime import compile as compiling
from kandinsky5.runtime import fast, fast_vae, kernels, memory, offload, pieces, quantize
from random_weights import build_small_pipeline, save_small_checkpoint
from weights_convert import scales


class Mutation(NamedTuple):
    """In the source of `function` the text `right` becomes `wrong`; then `case` must leave its tolerance."""

    name: str
    case: str
    function: Callable
    right: str
    wrong: str


# fmt: off
MUTATIONS = [Mutation(*row) for row in (
    # the VAE's fast convolutions
    ("last frame of a pair added", "vae_decode",
     fast_vae.conv_in_pairs, "x_3 - x_1, w_last", "x_1 - x_3, w_last"),
    ("difference of a pair added twice", "vae_encode",
     fast_vae.conv_in_pairs, ".sub_(difference)", ".add_(difference)"),
    ("half difference of the wrong frames", "vae_decode",
     fast_vae.conv_in_pairs, "(w_0 - w_1 + w_2) / 2", "(w_0 + w_1 - w_2) / 2"),
    ("odd last frame from the first three", "vae_decode",
     fast_vae.conv_in_pairs, "x[:, :, -3:]", "x[:, :, :3]"),
    ("pieces forget their past", "vae_decode",
     fast_vae.conv_normalised, "before=window", "before=None"),
    ("variance without that of the means", "vae_encode",
     fast_vae.FastGroupNorm.statistics, "outer.var(dim=1, correction=0)", "0"),
    ("statistics of the first piece", "vae_decode",
     fast_vae.conv_normalised, "norm.statistics(x[some])", "norm.statistics(x[some, :, :step])"),
    ("input of other frames added", "vae_decode",
     fast_vae.conv_normalised, "plus=plus(some, frames)", "plus=plus(some, slice(0, window.shape[2] - 2))"),
    ("rows of the top added to all pairs of frames", "vae_decode",
     fast_vae.conv_in_pairs, "frame.add_(plus[rows])", "frame.add_(plus[:, :, i, : frame.shape[2]])"),
    ("odd last frame without what is added", "vae_decode",
     fast_vae.conv_in_pairs, "y.add_(plus[:, :, -1:])", "y"),
    ("upsampling adds the wrong two weights", "vae_decode",
     fast_vae._merge, "if odd else", "if not odd else"),
    ("upsampling reads even rows only", "vae_decode",
     fast_vae.conv_of_repeated, "slice(odd_row, odd_row + H + 1)", "slice(0, H + 1)"),
    ("fast encoder without its middle blocks", "vae_encode",
     fast_vae.FastEncoder.forward, "self.mid(x)", "x"),
    ("fast decoder without its middle blocks", "vae_decode",
     fast_vae.FastDecoder.forward, "self.mid(self.conv_in(lay_out(z)))", "self.conv_in(lay_out(z))"),
    ("fast residual block without its shortcut", "vae_decode",
     fast_vae.FastResidualBlock.forward, "self.shortcut(x[some, :, frames])", "None"),
    ("fast conv padded on both sides in time", "vae_encode_time",
     fast_vae.FastCausalConv3d.forward, "_pad(x, past=2)", "F.pad(x, (1, 1, 1, 1, 1, 1), mode='replicate')"),
    ("epsilon of frames normalised one by one 1e-5", "vae_decode",
     fast_vae.FastGroupNorm.activate, "eps=self.eps", "eps=1e-5"),
    ("epsilon of a whole clip's norm 1e-5", "vae_decode_time",
     fast_vae.FastGroupNorm.activate_all, "self.eps", "1e-5"),
    # the diffusion transformer
    ("shift and scale swapped", "dit",
     fast.modulate_in_one_pass, "weight, bias, eps", "bias, weight, eps"),
    ("scale without the 1", "dit",
     fast.modulate_in_one_pass, "(1 + scale)", "scale"),
    ("LayerNorm's epsilon 1e-6", "dit",
     fast.modulate_in_one_pass, "eps=1e-5", "eps=1e-6"),
    ("blocks modulate with the shift of another sub-layer", "dit",
     fast.FastVisualBlock.forward, "(x, ff_shift, ff_scale)", "(x, cross_shift, ff_scale)"),
    ("text blocks gate with the gate of another sub-layer", "dit",
     fast.FastTextBlock.forward, "text, ff_gate", "text, attn_gate"),
    ("final layer's shift and scale swapped in its fast form", "dit",
     fast.FastFinalLayer.forward, "shift, scale = ", "scale, shift = "),
    ("cached rotations of another grid", "dit",
     fast.FastDiT.rotate_video, "config, grid, tuple", "config, (grid[0], grid[2], grid[1]), tuple"),
    ("cached rotations of the text's first token for all", "dit",
     fast.FastDiT.rotate_text, "_keep_text(config, length, device)",
     "_keep_text(config, 1, device).expand(length, -1)"),
    ("shift and scale of the definition swapped", "dit_mask",
     dit.modulate, "* (1 + scale) + shift", "* (1 + shift) + scale"),
    ("scale of the definition without the 1", "dit_mask",
     dit.modulate, "* (1 + scale)", "* scale"),
    ("epsilon of the definition's LayerNorm 1e-6", "dit_mask",
     dit.Norm.__init__, "eps=1e-5", "eps=1e-6"),
    ("gate dropped", "dit",
     dit.add_gated, "gate * out.float()", "out.float()"),
    ("modulation read as shift, gate, scale", "dit",
     dit.VisualBlock.forward, "self_shift, self_scale, self_gate,", "self_shift, self_gate, self_scale,"),
    ("modulation of cross-attention and feed-forward swapped", "dit",
     dit.VisualBlock.forward, "cross_shift, cross_scale, cross_gate,\n        ff_shift, ff_scale, ff_gate,",
     "ff_shift, ff_scale, ff_gate,\n        cross_shift, cross_scale, cross_gate,"),
    ("modulation without SiLU", "dit",
     dit.Modulation.forward, "F.silu(vec)", "vec"),
    ("final layer's shift and scale swapped", "dit",
     dit.FinalLayer.forward, "shift, scale = (", "scale, shift = ("),
    ("patch order of the output like the input's", "dit",
     dit.unpatchify, "(C pt ph pw)", "(pt ph pw C)"),
    ("patch order of the input like the output's", "dit",
     dit.patchify, "(pt ph pw C)", "(C pt ph pw)"),
    ("patch height and width swapped", "dit",
     dit.patchify, "(pt ph pw C)", "(pt pw ph C)"),
    ("RoPE pairs half-split", "dit",
     rope.apply_rope, "x.float().unflatten(-1, (-1, 2))", "x.float().unflatten(-1, (2, -1)).mT.contiguous()"),
    ("RoPE turned backwards", "dit",
     rope.apply_rope, "pairs * rotations", "pairs * rotations.conj()"),
    ("RoPE frequencies for twice the channels", "dit",
     rope.build_angles, "/ (dim // 2)", "/ dim"),
    ("RoPE scale ignored", "dit",
     rope.build_angles_3d, " / factor", ""),
    ("RoPE without the time axis", "dit",
     rope.build_angles_3d, "t[:, None, None]", "0 * t[:, None, None]"),
    ("RoPE before the norms of queries and keys", "dit",
     dit.Attention.project,
     "q, k = self.q_norm(q), self.k_norm(k)\n    if rotations is not None:\n"
     "        q, k = self.rotate(q, rotations), self.rotate(k, rotations)\n",
     "if rotations is not None:\n        q, k = self.rotate(q, rotations), self.rotate(k, rotations)\n"
     "    q, k = self.q_norm(q), self.k_norm(k)\n"),
    ("norms of queries and keys swapped", "dit",
     dit.Attention.project, "self.q_norm(q), self.k_norm(k)", "self.k_norm(q), self.q_norm(k)"),
    ("norms of queries and keys missing", "dit",
     dit.Attention.project, "self.q_norm(q), self.k_norm(k)", "q, k"),
    ("RMSNorm's epsilon 1e-5", "dit",
     dit.RMSNorm.forward, "eps=None", "eps=1e-5"),
    ("RMSNorm's epsilon 1e-6", "dit",
     dit.RMSNorm.forward, "eps=None", "eps=1e-6"),
    ("pooled vector not added", "dit",
     dit.DiT.forward, " + self.pooled_embedder(pooled)", ""),
    ("time not scaled by 1000", "dit",
     dit.TimeEmbedder.forward, "1000 * t.float()", "t.float()"),
    ("sine before cosine", "dit",
     dit.TimeEmbedder.forward, "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    ("cross-attention to the text from before its blocks", "dit",
     dit.DiT.forward, "text = self.run_blocks(", "_ = self.run_blocks("),
    ("text embedder's norm missing", "dit",
     dit.TextEmbedder.forward, "self.norm(self.linear(text))", "self.linear(text)"),
    ("text embedder's epsilon 1e-6", "dit",
     dit.TextEmbedder.__init__, "nn.LayerNorm(dim)", "nn.LayerNorm(dim, eps=1e-6)"),
    ("GELU by tanh", "dit",
     dit.FeedForward.forward, "F.gelu(self.linear_in(x))", "F.gelu(self.linear_in(x), approximate='tanh')"),
    ("text mask dropped in the text blocks", "dit_mask",
     dit.DiT.forward, "vec, rotations, text_mask)  # (B, S", "vec, rotations, None)  # (B, S"),
    ("text mask dropped in cross-attention", "dit_mask",
     dit.DiT.forward, "rotations, text_mask, config.nabla", "rotations, None, config.nabla"),
    ("mask added to the scores as values", "dit_mask",
     kernels.attend_through, "attn_mask=mask)", "attn_mask=None if mask is None else mask.to(q.dtype))"),
    ("mask of the definition inverted", "dit_mask",
     attention.dense_attention, "~mask", "mask"),
    ("a block skipped", "dit",
     dit.DiT.run_blocks, "in blocks:", "in list(blocks)[1:]:"),

    # NABLA
    ("NABLA without the window", "dit_nabla",
     nabla.block_map, " | window", ""),
    ("NABLA by the window alone", "dit_nabla",
     nabla.block_map, "select_mass(pooled_attention(q, k), config.P) | window",
     "window.expand(*q.shape[:2], -1, -1)"),
    ("NABLA keeps the mass 1 - P", "dit_nabla",
     nabla.select_mass, ">= 1 - P", ">= P"),
    ("NABLA cuts one tile late", "dit_nabla",
     nabla.select_mass, "ascending.cumsum(dim=-1)", "(ascending.cumsum(dim=-1) - ascending)"),
    ("NABLA sorts the other way", "dit_nabla",
     nabla.select_mass, "probability.sort(dim=-1)", "probability.sort(dim=-1, descending=True)"),
    ("NABLA's means not divided by the root of D", "dit_nabla",
     nabla.pooled_attention, " / math.sqrt(q.shape[-1])", ""),
    ("NABLA's window as wide to each side as in all", "dit_nabla",
     nabla.build_window, "width // 2", "width"),
    ("NABLA's window with height and width swapped", "dit_nabla",
     nabla.build_window, "(T, H, W), window,", "(T, H, W), (window[0], window[2], window[1]),"),
    ("tile order not undone", "dit_nabla",
     nabla.from_tiles, "B (T H W h w) C", "B (T H h W w) C"),
    ("tiles with rows and columns swapped on the way back", "dit_nabla",
     nabla.from_tiles, "B (T H W h w) C", "B (T H W w h) C"),
    ("RoPE not in tile order", "dit_nabla",
     dit.DiT.rotate_video, "nabla.to_tiles(angles[None])[0]", "angles.flatten(0, 2)"),
    ("tiles of queries taken for tiles of keys", "dit_nabla",
     kernels.block_sparse_attention, "block_map.reshape", "block_map.mT.reshape"),

    # the VAE
    ("conv padded on both sides in time", "vae_encode",
     vae.CausalConv3d.forward, "(1, 1, 1, 1, 2, 0)", "(1, 1, 1, 1, 1, 1)"),
    ("conv padded with zeros", "vae_decode",
     vae.CausalConv3d.forward, 'mode="replicate"', 'mode="constant"'),
    ("pieces padded with zeros", "vae_decode",
     fast_vae._pad, "x[..., 0], x[..., -1]", "0, 0"),
    ("residual block without its shortcut", "vae_decode",
     vae.ResidualBlock.forward, "self.shortcut(x) + y", "y"),
    ("second conv without its norm", "vae_encode",
     vae.ResidualBlock.forward, "F.silu(self.norm_2(y))", "F.silu(y)"),
    ("encoder without SiLU before its last conv", "vae_encode",
     vae.Encoder.forward, "F.silu(self.norm_out(x))", "self.norm_out(x)"),
    ("decoder without SiLU before its last conv", "vae_decode",
     vae.Decoder.forward, "F.silu(self.norm_out(x))", "self.norm_out(x)"),
    ("attention not causal in time", "vae_encode",
     vae.CausalAttention.forward, "k[:, :, : (i + 1) * frame], v[:, :, : (i + 1) * frame]", "k, v"),
    ("attention without its residual", "vae_decode",
     vae.CausalAttention.forward, "x + rearrange(", "rearrange("),
    ("first frame doubled and the last one lost", "vae_decode",
     vae.Upsample.forward, "return ",
     "x = torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2) if self.double_time else x\n    return "),
    ("time doubled in the encoder's order mirrored", "vae_decode",
     vae.Decoder.__init__, "config.halves_time[stage]", "config.halves_time[::-1][stage]"),
    ("GroupNorm's epsilon 1e-5", "vae_decode",
     vae.GroupNorm.__init__, "eps=1e-6", "eps=1e-5"),
    ("quant conv left out", "vae_encode",
     vae.VAE.encode_moments, "self.quant_conv(self.encoder(video))", "self.encoder(video)"),
    ("post-quant conv left out", "vae_decode",
     vae.VAE.decode, "self.post_quant_conv(z)", "z"),
    ("mean and log-variance swapped", "vae_encode",
     vae.Posterior.from_moments, "mean, logvar = moments", "logvar, mean = moments"),
    ("the posterior's mean instead of a sample", "i2v",
     vae.Posterior.sample, "self.mean + torch.exp(0.5 * self.logvar) * noise", "self.mean"),
    ("variance instead of standard deviation", "i2v",
     vae.Posterior.sample, "0.5 * self.logvar", "self.logvar"),

    # its tiling
    ("blend in time one frame too wide", "vae_decode_time",
     vae_tiling._tile_time, "out_size - out_stride", "out_size - out_stride + 1"),
    ("blend in time as wide in frames as in latents", "vae_decode_time",
     vae_tiling._tile_time, "overlap = out_size - out_stride", "overlap = size - stride"),
    ("blend in time begins a step too far", "vae_encode_time",
     vae_tiling._fade_in, "torch.arange(n, device=tile.device)", "torch.arange(1, n + 1, device=tile.device)"),
    ("window in time without its extra frame", "vae_decode_time",
     vae_tiling._tile_time, "start + size + 1", "start + size"),
    ("last frame of a window dropped and not the first", "vae_encode_time",
     vae_tiling._tile_time, "window[:, :, 1:]", "window[:, :, :-1]"),
    ("stride in time one too large", "vae_decode_time",
     vae_tiling._tile_time, "x.shape[2] - 1, stride)", "x.shape[2] - 1, stride + 1)"),
    ("blend in space one pixel too narrow", "vae_decode_space",
     vae_tiling._tile_space, "out_size - out_stride", "out_size - out_stride - 1"),
    ("blend in space begins a step too far", "vae_encode_space",
     vae_tiling._fade_in, "torch.arange(n, device=tile.device)", "torch.arange(1, n + 1, device=tile.device)"),
    ("tiles one column too narrow", "vae_encode_space",
     vae_tiling._tile_space, "left : left + size]", "left : left + size - 1]"),
    ("tiles blended to the left before upwards", "vae_decode_space",
     vae_tiling._tile_space,
     "if top > 0:\n                _fade_in(tile, bottoms_above[column], dim=3)\n"
     "            if right is not None:\n                _fade_in(tile, right, dim=4)\n",
     "if right is not None:\n                _fade_in(tile, right, dim=4)\n"
     "            if top > 0:\n                _fade_in(tile, bottoms_above[column], dim=3)\n"),

    # Qwen
    ("RoPE pairs interleaved", "qwen",
     rope.apply_rope_half_split, "x.chunk(2, dim=-1)", "x.unflatten(-1, (-1, 2)).unbind(-1)"),
    ("positions after the template begin at 0 again", "text",
     text_encoder.TextEncoder.encode, ".T[common:]", ".T[: len(i) - common]"),
    ("cached keys before and new ones exchanged", "text",
     qwen.GroupedAttention.forward, "zip(before, (k, v), strict", "zip((k, v), before, strict"),
    ("new tokens see too few of the cached ones", "text",
     qwen.Qwen.forward, ".tril(P)", ".tril(P - 1)"),
    ("RoPE with theta 10,000", "qwen",
     qwen.Qwen.build_angles, ", self.config.rope_theta", ""),
    ("key and value heads repeated in the wrong order", "qwen",
     qwen.GroupedAttention.forward,
     "k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)",
     "k.repeat(1, self.group, 1, 1), v.repeat(1, self.group, 1, 1)"),
    ("last norm missing", "qwen",
     qwen.Qwen.forward, "return self.norm(x)", "return x"),
    ("not causal", "qwen",
     qwen.GroupedAttention.forward, "self.attend(q, k, v, mask)", "self.attend(q, k, v)"),
    ("RMSNorm's epsilon 1e-5", "qwen",
     qwen.RMSNorm.forward, "eps=self.eps", "eps=1e-5"),
    ("SiLU on the wrong half", "qwen",
     qwen.SwiGLU.forward, "F.silu(self.gate(x)) * self.linear_in(x)", "self.gate(x) * F.silu(self.linear_in(x))"),

    # CLIP
    ("GELU instead of quick GELU", "clip",
     clip.CLIPBlock.forward, "y * torch.sigmoid(1.702 * y)", "nn.functional.gelu(y)"),
    ("pooled at the last end token", "clip",
     clip.CLIPText.forward, "(ids == self.config.end_token).int().argmax(dim=1)", "ids.shape[1] - 1"),
    ("last norm missing", "clip",
     clip.CLIPText.forward, "self.norm(x)[", "x["),
    ("not causal", "clip",
     clip.CLIPText.forward, ".tril()", ""),
    ("LayerNorm's epsilon 1e-6", "clip",
     clip.CLIPBlock.__init__, "self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)",
     "self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6)"),

    # the text around them
    ("features a token late", "text",
     text_encoder.TextEncoder.encode, "dropped - common :]", "dropped - common :].roll(1, dims=1)"),
    ("prompt for CLIP without its start token", "pooled",
     text_encoder.TextEncoder.clip_ids, "[start, *", "[*"),
    ("padding not masked", "t2v",
     text_encoder.TextFeatures.mask.fget, "< self.lengths[:, None]",
     "< self.lengths.max().expand(len(self.lengths), 1)"),

    # sampler and pipeline
    ("guidance away from the prompt", "t2v",
     sampler.guided_velocity, "conditional - unconditional", "unconditional - conditional"),
    ("guidance added to the prompt's branch", "t2v",
     sampler.guided_velocity, "unconditional + guidance_scale", "conditional + guidance_scale"),
    ("the other schedule", "t2v",
     sampler.flow_schedule, 'rule == "official"', 'rule != "official"'),
    ("shift applied once, not twice", "t2v",
     sampler.flow_schedule, "torch.linspace(1, shifted(0.001), steps,", "torch.linspace(1, 0.001, steps,"),
    ("the next step's time given to the network", "t2v",
     sampler.euler_sample, "velocity(x, t)\n", "velocity(x, t_next)\n"),
    ("mask kept from the network", "t2v",
     pipeline.Pipeline.predict, "features.mask if len(features.mask) > 1 else None", "None"),
    ("latents multiplied by the VAE's factor", "t2v",
     pipeline.Pipeline.decode, "latents.to(device) / self", "latents.to(device) * self"),
    ("RoPE scale of 480 to 854 pixels for all sizes", "t2v",
     rope.scale_for_size, "2.0 if 480 <= height <= 854 and 480 <= width <= 854 else 3.16", "2.0"),
    ("first frame not written back", "i2v",
     sampler.euler_sample, "velocity(x, t)\n        x = _with_first_frame(x, first_frame)\n", "velocity(x, t)\n"),
    ("first frames normalised together", "i2v",
     sampler.normalise_first_frames, "f(first, dim=(2, 3, 4)", "f(first, dim=(1, 2, 3, 4)"),
    ("first frames not normalised", "i2v",
     sampler.normalise_first_frames, "after.shape[1] == 0", "True"),
    ("first frames' limits swapped", "i2v",
     sampler.normalise_first_frames, "mean - 0.05, mean + 0.1", "mean - 0.1, mean + 0.05"),
    ("image latents not scaled", "i2v",
     pipeline.Pipeline.encode_image, "z * self.config.vae.scaling_factor", "z"),
    ("image in [0, 1]", "i2v",
     video_io.from_uint8, " * 2 - 1", ""),
    ("mask channel not set", "i2v",
     sampler.build_condition, "condition[:, :1, ..., -1] = 1", "pass"),
    ("mask channel set in all frames", "i2v",
     sampler.build_condition, "condition[:, :1, ..., -1] = 1", "condition[..., -1] = 1"),
    ("image also in the conditioning channels", "i2v",
     sampler.build_condition, "condition[:, :1, ..., -1] = 1",
     "condition[:, :1, ..., -1] = 1; condition[:, :1, ..., :16] = image"),
)]

FAST_PATHS = [  # name, test (of a monkeypatch and a folder), function, right, wrong
    ("chunks with the values of the first heads",
     lambda patch, folder: test_kernels.test_chunked_equals_dense(3000, False, patch),
     kernels.chunked_attention, "@ v[some]", "@ v[b, :heads]"),
    ("chunks with the mask of the first sample",
     lambda patch, folder: test_kernels.test_chunked_equals_dense(3000, True, patch),
     kernels.chunked_attention, "mask[here]", "mask[0, :1, :1]"),
    ("scores divided by D",
     lambda patch, folder: test_kernels.test_chunked_equals_dense(3000, False, patch),
     kernels._scaled_scores, "math.sqrt(q.shape[-1])", "q.shape[-1]"),
    ("softmax over the queries",
     lambda patch, folder: test_kernels.test_block_sparse_equals_dense(0.2, False, 3 * 64 * 64, 80, patch),
     kernels._softmax, "dim=-1", "dim=-2"),
    ("fused tiles with keys as values",
     lambda patch, folder: test_kernels.test_block_sparse_equals_dense(0.2, True, 3 * 64 * 64, 80, patch),
     kernels.block_sparse_attention, "(queries, keys, values)", "(queries, keys, keys)"),
    ("tiles of the first head for all heads",
     lambda patch, folder: test_kernels.test_block_sparse_equals_dense(0.2, False, 1, 1, patch),
     kernels.block_sparse_attention, "some[alike] // per_head * per_head", "some[alike] * 0"),
    ("flex with queries for keys",
     lambda patch, folder: test_kernels.test_flex_equals_dense(),
     kernels.build_block_mask, "q // TILE, k // TILE", "k // TILE, q // TILE"),
    ("short queries in chunks",
     lambda patch, folder: test_kernels.test_kernel_that_a_name_stands_for(
         "auto", "cpu", torch.bfloat16, 511, False, "sdpa"),
     kernels.choose_kernel, ">= LONG", ">= 0"),
    ("long queries never in chunks",
     lambda patch, folder: test_kernels.test_kernel_that_a_name_stands_for(
         "auto", "cpu", torch.bfloat16, 512, False, "chunked"),
     kernels.choose_kernel, ">= LONG", "< 0"),
    ("tiles gathered on CUDA",
     lambda patch, folder: test_kernels.test_kernel_that_a_name_stands_for(
         "auto", "cuda", torch.bfloat16, 512, True, "flex"),
     kernels.choose_kernel, '"auto" and device == "cuda"', '"auto" and device != "cuda"'),
    ("a kernel with NABLA's map forgotten",
     lambda patch, folder: test_kernels.test_every_kernel_computes_the_definition("dense"),
     kernels.attend_through, "mask = expand_block_map(block_map)", "mask = None"),
    ("modulations widened with the first bias",
     lambda patch, folder: test_fast.test_float32_linear_widens_half_weights_piece_by_piece(torch.bfloat16, patch),
     fast.FastFloat32Linear.forward, "bias.to(dtype)) for", "self.bias[: len(bias)].to(dtype)) for"),
    ("last letters numbered as they are met",
     lambda patch, folder: test_nano_text.test_tokenizers_are_reproducible(patch, folder),
     train_text._last_letters, "return sorted(", "return [] and sorted("),
    ("the window kept with rows for columns",
     lambda patch, folder: test_kernels.test_cached_windows_may_be_trained_with(),
     kernels._keep_window, "window, device)", "window[::-1], device)"),
    ("maps of the heads with the keys of other heads",
     lambda patch, folder: test_kernels.test_maps_of_heads_one_by_one_are_the_definition(),
     kernels.map_head_by_head, "k.split(1, dim=1), strict", "k.split(1, dim=1)[::-1], strict"),
    ("the whole template before a prompt that changes its end",
     lambda patch, folder: test_text_encoder.test_features_are_those_of_one_pass_over_template_and_prompt(
         build_small_pipeline().text_encoder, ["\na fox", "a dog"]),
     text_encoder.TextEncoder.encode, "min(len(os.path.commonprefix(ids)), dropped - self.config.dropped_from_prompt)",
     "dropped"),
    ("a model that stays on the device",
     lambda patch, folder: test_offload.test_only_what_works_is_awake(save_small_checkpoint(folder / "small"), "model"),
     offload.awake, 'model.to("meta")', "pass"),
    ("the compiler's operation without the mask",
     lambda patch, folder: test_compile.test_attention_is_one_operation_with_all_that_it_is_given(),
     compiling.attend_opaquely, "mask, kernel, 0.0", "None, kernel, 0.0"),
    ("second pass of guidance with the prompt again",
     lambda patch, folder: test_pipeline.test_guidance_in_one_pass_and_in_two_is_the_same(
         build_small_pipeline(), patch),
     pipeline.Pipeline.sample, "features.select(request.batch, 2 * request.batch)",
     "features.select(0, request.batch)"),
    ("residual of the first pass added in both",
     lambda patch, folder: test_magcache.test_a_skip_reuses_the_last_residual_of_its_own_pass(
         build_small_pipeline(), patch, False, 5, ".xx.xx"),
     magcache.skip_steps, "return x + residuals[number]", "return x + residuals[0]"),
    ("residual of the step before last kept",
     lambda patch, folder: test_magcache.test_a_skip_reuses_the_last_residual_of_its_own_pass(
         build_small_pipeline(), patch, True, 5, ".xx.xx"),
     magcache.skip_steps, "residuals[number] = residual", "residuals.setdefault(number, residual)"),
    ("skipped halves of a batch exchanged",
     lambda patch, folder: test_magcache.test_a_skip_reuses_the_last_residual_of_its_own_pass(
         build_small_pipeline(), patch, True, 5, "..xx.x"),
     magcache.choose, "a if skip else b", "b if skip else a"),
    ("weights of the block before",
     lambda patch, folder: test_offload.test_the_same_numbers_with_and_without(
         save_small_checkpoint(folder / "small"), torch.float32),
     offload.Stream._send_for, "self._bring, block,",
     "self._bring, self.last if type(self.last) is type(block) else block,"),
    ("the next block copied before the one in its slot has run",
     lambda patch, folder: test_offload.test_packed_blocks_compute_the_same(
         save_small_checkpoint(folder / "small"), True, 2**32, 1, patch),
     offload.Stream._arrive, "self.lane.wait(slot", "id(slot"),
    ("dropped tiles before kept ones",
     lambda patch, folder: test_kernels.test_tiles_are_listed_without_sorting(),
     kernels.list_tiles, "torch.where(kept, before, after)", "torch.where(kept, after, before + 1)"),
    ("stages that do not fit in shared memory",
     lambda patch, folder: test_kernels.test_stages_fit_in_shared_memory(128, 2, 99, 2),
     kernels.flex_options, "min(3, ", "max(3, "),
    ("real rotations turned backwards",
     lambda patch, folder: test_compile.test_real_rotations_are_the_complex_ones(torch.float32, 1e-6),
     compiling.as_real, "[cos, -sin, cos, sin]", "[cos, sin, cos, -sin]"),
    ("pieces only where the whole does not fit at all",
     lambda patch, folder: test_memory.test_steps_go_in_pieces_where_memory_is_short(patch),
     memory.plan_steps, "0.9 * free", "free"),
    ("the samples of a batch left out of the estimate",
     lambda patch, folder: test_memory.test_activations_are_estimated(torch.float32, 1300, 1024),
     memory.dit_memory, "some = size[0] * piece", "some = piece"),
    ("pieces rotated by the positions of the first one",
     lambda patch, folder: test_pieces.test_pieces_are_the_whole(None, 100),
     pieces.PiecewiseVisualBlock.forward, "x[:, here], rotations[here]", "x[:, here], rotations.roll(1, 0)[here]"),
    ("pieces finished with another sub-layer's gate",
     lambda patch, folder: test_pieces.test_pieces_are_the_whole(None, 1000),
     pieces.PiecewiseVisualBlock.finish, "add_gated(x, cross_gate,", "add_gated(x, self_gate,"),
    ("pieces without the text's mask",
     lambda patch, folder: test_pieces.test_pieces_are_the_whole(None, 1000),
     pieces.PiecewiseVisualBlock.finish, "None, text_mask", "None, None"),
    # Qwen with images, and its writing
    *[(f"Qwen: {name}", lambda patch, folder, test=test: test(tuple(vision_data.build_models().values())), *change)
      for name, test, *change in (
        ("windows filled column by column", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.to_windows, "(h w) (a b) C", "(h w) (b a) C"),
        ("windows as wide as four patches", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.WindowAttention.forward, '"W N S D"', '"1 N (W S) D"'),
        ("blocks that see all are counted from one", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.QwenVision.__init__, "VisionBlock(config, i in", "VisionBlock(config, i + 1 in"),
        ("padding of windows seen", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.QwenVision.forward, "torch.ones(h, w, 1", "torch.ones(-h // 8 * -8, -w // 8 * -8, 1"),
        ("half of the pairs turn with the column first", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.QwenVision.build_angles, "[rows[:, None].expand(-1, w, -1), columns[None].expand(h, -1, -1)]",
         "[columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)]"),
        ("pairs turn with rows and columns by turns", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.QwenVision.build_angles, "dim=-1)", "dim=-1).unflatten(-1, (2, -1)).mT.flatten(-2)"),
        ("neighbours merged column by column", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.Merger.forward, "(a b C)", "(b a C)"),
        ("GELU by tanh", test_qwen_vision.test_tokens_of_an_image,
         qwen_vision.Merger.forward, "F.gelu(self.linear_in(x))", "F.gelu(self.linear_in(x), approximate='tanh')"),
        ("text goes on behind an image's tokens", functools.partial(test_qwen_vision.test_positions_and_states, 1),
         qwen_vision.build_positions, "max(rows, columns)", "rows * columns"),
        ("rows and columns of positions exchanged", functools.partial(test_qwen_vision.test_positions_and_states, 1),
         qwen_vision.build_positions, "place + cells.T", "place + cells[:, [0, 2, 1]].T"),
        ("pairs for H and W exchanged", functools.partial(test_qwen_vision.test_positions_and_states, 1),
         qwen.Qwen.build_angles, "h[:, 1], w[:, 2]", "h[:, 2], w[:, 1]"),
        ("images' tokens in each other's place", functools.partial(test_qwen_vision.test_positions_and_states, 2),
         qwen.Qwen.forward, "images.to(x))", "images.flip(0).to(x))"),
        ("penalty not on the prompt", functools.partial(test_qwen_vision.test_writes_the_same_words, 2),
         qwen.generate, ".scatter(1, ids, True)\n    while", "\n    while"),
        ("penalty multiplies all scores", functools.partial(test_qwen_vision.test_writes_the_same_words, 0),
         qwen.generate, "scores / penalty, scores * penalty", "scores * penalty, scores * penalty"),
        ("new words at the last word's place", functools.partial(test_qwen_vision.test_writes_the_same_words, 1),
         qwen.generate, ".expand(-1, 3, -1) + 1", ".expand(-1, 3, -1)"),
        ("cached keys one place off", test_qwen_vision.test_cache_changes_nothing,
         qwen.GroupedAttention.forward, "cache[self] = k, v", "cache[self] = k.roll(1, dims=2), v"),
        ("padding on the left seen", test_qwen_vision.test_texts_of_unequal_length_write_what_each_writes_alone,
         qwen.Qwen.forward, "seen & mask[:, None, None] | seen.triu(P)", "seen | mask[:, None, None] & seen"),
      )],
    ("the next block fetched into the slot of the running one",
     lambda patch, folder: test_offload.test_cast_weights_take_turns_in_two_places(folder),
     offload.Stream._run, "self.slots[::-1]", "self.slots"),
    ("int8 with the scale of the next block",
     lambda patch, folder: test_quantize.test_whole_models_equal_their_rounded_weights_and_are_near(),
     quantize.dequantise, "scale.to(dtype)", "scale.roll(1, -1).to(dtype)"),
    ("int8 with a zero point",
     lambda patch, folder: test_quantize.test_whole_models_equal_their_rounded_weights_and_are_near(),
     quantize.quantise, "steps.round_()", "steps.round_().sub_(1)"),
    ("int8 with transposed scales",
     lambda patch, folder: test_quantize.test_whole_models_equal_their_rounded_weights_and_are_near(),
     quantize.dequantise, "scale.to(dtype)", "scale.T.reshape(scale.shape).to(dtype)"),
    ("int8 without its scales",
     lambda patch, folder: test_quantize.test_whole_models_equal_their_rounded_weights_and_are_near(),
     quantize.dequantise, "blocks.mul_(scale.to(dtype)[..., None])", "blocks"),
    ("a float32 island in int8",
     lambda patch, folder: test_quantize.test_which_layers_are_int8(),
     quantize.linears, "type(module) is kind", "isinstance(module, kind)"),
    ("scales of int8 weights cast with the model",
     lambda patch, folder: test_quantize.test_a_cast_changes_no_weight(torch.nn.Module.half),
     quantize.Int8Linear._apply, "and x is self.scale", "and False"),
    ("fp8 with the scales of the first rows",
     lambda patch, folder: test_weights_convert_int8.test_scales_stay_with_their_rows_in_every_piece(folder, patch),
     scales.multiply, "scales[first // high :", "scales[:"),
    ("fp8 without its second factor",
     lambda patch, folder: test_weights_convert_int8.test_fp8_and_its_scales_are_the_right_numbers(
         "musubi-tuner, two factors", folder),
     scales.multiply, "scales = scales * whole", "scales = scales + 0 * whole"),
]
# fmt: on
LIMITS = {name: 1 / 255 if name in cases.FRAME_CASES else cases.TOLERANCE[torch.float32] for name in cases.OURS}


@functools.cache
def golden(plain: bool) -> Pipeline:
    return load_golden_pipeline(plain=plain)


def is_definition(function: Callable) -> bool:
    """Whether the plain pipeline shows a mistake in it; else the one that has forms and kernels installed does."""
    return function.__module__ not in (fast.__name__, fast_vae.__name__, kernels.__name__)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.case}: {m.name}")
def test_the_case_notices(mutation, monkeypatch):
    plain = is_definition(mutation.function)
    replace_code(monkeypatch, mutation.function, mutation.right, mutation.wrong)
    # What is wrong in a constructor is wrong in models that are built now.
    pipe = load_golden_pipeline(plain=plain) if mutation.function.__name__ == "__init__" else golden(plain)
    assert measure_error(mutation.case, pipe) > LIMITS[mutation.case]


@pytest.mark.parametrize("name, test, function, right, wrong", FAST_PATHS, ids=[row[0] for row in FAST_PATHS])
def test_the_comparison_with_the_plain_definition_notices(
    name, test, function, right, wrong, monkeypatch, tmp_path_factory
):
    replace_code(monkeypatch, function, right, wrong)
    with pytest.raises(AssertionError):
        test(monkeypatch, tmp_path_factory.mktemp("wrong"))


def by_comparison() -> dict[tuple, list]:
    """Rows of FAST_PATHS by what they call, which several share."""
    rows: dict[tuple, list] = {}
    for row in FAST_PATHS:
        code = row[1].__code__
        rows.setdefault((code.co_code, code.co_names, code.co_consts), []).append(row)
    return rows


@pytest.mark.stages  # that it passes as it is, its own file shows
@pytest.mark.parametrize("rows", by_comparison().values(), ids=lambda rows: rows[0][0])
def test_the_same_code_recompiled_passes_the_comparison(rows, monkeypatch, tmp_path):
    for function, right in {function: right for _, _, function, right, _ in rows}.items():
        replace_code(monkeypatch, function, right, right)
    rows[0][1](monkeypatch, tmp_path)


@pytest.mark.stages  # likewise, test_golden.py
def test_the_same_code_recompiled_passes_every_case(monkeypatch):
    """It is the changed text that the test above notices, and not the way in which it is put in."""
    for function, right in {mutation.function: mutation.right for mutation in MUTATIONS}.items():
        replace_code(monkeypatch, function, right, right)
    for plain in (False, True):
        pipe = load_golden_pipeline(plain=plain)
        noticing = {mutation.case for mutation in MUTATIONS if is_definition(mutation.function) == plain}
        errors = {case: measure_error(case, pipe) for case in noticing}
        assert all(errors[case] <= LIMITS[case] for case in noticing), errors


def test_every_case_notices_something():
    assert {mutation.case for mutation in MUTATIONS} == cases.OURS.keys()


@pytest.fixture(autouse=True)
def no_table_of_a_mutation_is_left():
    yield
    forget_tables()


def forget_tables() -> None:
    for table in (kernels._keep_window, fast._keep_video, fast._keep_text):
        table.cache_clear()


def replace_code(monkeypatch: pytest.MonkeyPatch, function: Callable, right: str, wrong: str) -> None:
    """Compile the source of `function` with `right` replaced, and put that in it, for all who have imported it."""
    forget_tables()  # nothing built before the change is to be used after it
    function = unwrapped(function)
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(right)
    assert found == 1, f"{function.__qualname__} has {found} times {right!r}, not once: update the row of MUTATIONS"
    compiled = {}
    inside_class = "class _:\n" + textwrap.indent(source.replace(right, wrong), " ")  # super() asks for one
    exec(inside_class, dict(vars(sys.modules[function.__module__])), compiled)
    monkeypatch.setattr(function, "__code__", unwrapped(vars(compiled["_"])[function.__name__]).__code__)


def unwrapped(function: Callable | classmethod | property) -> Callable:
    """What is below @classmethod, @property and @torch.no_grad()."""
    function = getattr(function, "fget", function)
    return inspect.unwrap(getattr(function, "__func__", function))
