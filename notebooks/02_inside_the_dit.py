# %% [markdown]
# # 2 · Inside the DiT
#
# **At the end you will know what each part of a block does while a video is made (modulation, positions, attention,
# residual stream), and will have broken some of them to see what they are for.**
#
# All figures are recorded from the running model with [`kandinsky5.extras.probe`](../kandinsky5/extras/probe.py), which
# attaches hooks to modules and removes them again; the model itself, [`kandinsky5/dit.py`](../kandinsky5/dit.py), is
# not changed. Keep that file open next to this notebook.

# %%
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from show import COLOURS, grid, label, panel, play

from kandinsky5 import Pipeline, dit, sampler
from kandinsky5.extras.probe import record, record_attention, weights
from kandinsky5.rope import apply_rope, build_angles, build_angles_3d, build_rotations
from kandinsky5.runtime import fast

pipe = Pipeline.load("nano")
config, sampling = pipe.config.dit, pipe.config.sampling
prompt, seed = "a yellow triangle moves up", 0
T, H, W = GRID = (5, 4, 4)  # latents 5 × 8 × 8 in patches of 1 × 2 × 2
print(f"{T * H * W} video tokens of {config.dim} channels in {config.num_visual_blocks} visual blocks,")
print(f"{config.num_heads} heads of {config.head_dim}; rotary channels for time, height, width: {config.rope_axes}")

# %% [markdown]
# One sampling run records everything: what the modulations return, what each block returns, what each of its sub-layers
# returns, and the attention to the text. `keep` selects what to store of each output, so that memory stays small. With
# guidance the batch holds two samples, the one with the prompt first: `x[0]` below.


# %%
def size(x):
    """Root mean square over channels (and tokens, where there are any): one number."""
    return x[0].float().square().mean().sqrt()


def sizes_of_tokens(x):
    return x[0].float().square().mean(dim=-1).sqrt()  # (L,)


sub_layers = ("self_attention", "cross_attention", "feed_forward")
with (
    record(pipe.dit, "visual_blocks.*.modulation", *(f"visual_blocks.*.{s}" for s in sub_layers), keep=size) as sizes,
    record(pipe.dit, "patch_embedder", "visual_blocks.*", keep=sizes_of_tokens) as stream,
    record_attention(pipe.dit, "visual_blocks.*.cross_attention", keep=weights()) as to_text,
    record_attention(pipe.dit, "visual_blocks.*.self_attention", keep=weights(), calls=[15, 35]) as to_video,
):
    frames = pipe(prompt, seed=seed, progress=False)[0]

times = sampler.flow_schedule(sampling.num_inference_steps, sampling.shift)[:-1]
blocks = range(config.num_visual_blocks)
grid({prompt: frames}, columns=7, title="The video that this notebook looks into")

# %% [markdown]
# ## Modulation: time turns the layers up and down
#
# Each sub-layer of a block computes
#
# $$x \leftarrow x + \mathrm{gate}\cdot f\bigl(\mathrm{norm}(x)\,(1 + \mathrm{scale}) + \mathrm{shift}\bigr),$$
#
# and shift, scale and gate depend only on the flow time and the prompt's CLIP vector. The figure shows the size of the
# gates on the way from noise (left) to data (right). With a gate of 0 a sub-layer would leave the tokens unchanged;
# here none comes close to that. Cross-attention's gates are the smallest, and fall towards the data; most others change
# little, and the gate of block 0's feed-forward doubles.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), sharey=True)
for i, (ax, sub_layer) in enumerate(zip(axes, sub_layers, strict=True)):
    for block in blocks:
        gates = [call[3 * i + 2] for call in sizes[f"visual_blocks.{block}.modulation"]]  # shift, scale, gate, …
        ax.plot(times, gates, label=f"block {block}")
    ax.set(title=sub_layer.replace("_", " "), xlabel="flow time t (noise → data)", xlim=(1, 0))
axes[0].set(ylabel="gate, root mean square", ylim=(0, None))
axes[1].legend(fontsize=8, ncols=2)
figure.suptitle("How much each sub-layer may add")
plt.show()

# %% [markdown]
# ## The residual stream
#
# The tokens themselves show what the sub-layers add, gate included. Left: the size of the tokens after each block, at
# the beginning, in the middle and at the end of sampling; the shaded range is from the smallest token to the largest.
# Right: each sub-layer's output (before its gate), in the middle of sampling. Because of the LayerNorm before every
# sub-layer the size of the stream itself does not matter: only what a sub-layer adds *relative* to it does.

# %%
moments = {"first step": 0, "middle": len(times) // 2, "last step": len(times) - 1}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.1))
names = ["patch_embedder", *(f"visual_blocks.{b}" for b in blocks)]
for (moment, step), colour in zip(moments.items(), COLOURS, strict=False):
    tokens = torch.stack([stream[name][step].flatten() for name in names])  # (blocks + 1, L)
    left.plot(tokens.mean(dim=1), marker="o", color=colour, label=f"{moment}, t = {times[step]:.2f}")
    left.fill_between(range(len(names)), tokens.amin(dim=1), tokens.amax(dim=1), color=colour, alpha=0.15, lw=0)
left.set(title="Tokens: mean, smallest and largest", ylabel="root mean square over channels", ylim=(0, None))
left.set_xticks(range(len(names)), ["patches", *(f"block {b}" for b in blocks)], fontsize=8)
left.legend(fontsize=8)
width = 0.25
for i, sub_layer in enumerate(sub_layers):
    step = moments["middle"]
    bars = [sizes[f"visual_blocks.{b}.{sub_layer}"][step] for b in blocks]
    right.bar([b + (i - 1) * width for b in blocks], bars, width, label=sub_layer.replace("_", " "))
right.set(title="What the sub-layers return, in the middle", ylabel="root mean square")
right.set_xticks(list(blocks), [f"block {b}" for b in blocks], fontsize=8)
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Positions are rotations
#
# Attention by itself does not know a token's position. RoPE encodes it: each pair of channels of a query or key is a
# point in the plane, rotated by an angle, position × frequency. In a dot product only the difference of two angles
# remains, so heads see *how far apart* two tokens are. Some pairs belong to time, some to height, some to width; within
# an axis the frequencies fall from 1 to nearly 0: fast pairs distinguish neighbours, slow pairs distinguish far from
# near.

# %%
figure, axes = plt.subplots(1, 6, figsize=(10, 2.2))
positions = torch.arange(T)
angles = build_angles(positions, config.rope_axes[1])  # (positions, pairs): of height
shades = plt.get_cmap("viridis")(torch.linspace(0, 0.9, T))
for pair, ax in enumerate(axes):
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    for position, angle in enumerate(angles[:, pair]):
        ax.plot([0, angle.cos()], [0, angle.sin()], color=shades[position], lw=2)
        ax.plot(angle.cos(), angle.sin(), "o", color=shades[position], ms=5, label=f"row {position}")
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
    ax.set_title(f"pair {pair}: {angles[1, pair]:.2g} rad\nper row", fontsize=9)
    ax.axis("off")
axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.suptitle("A unit vector of each of the six height pairs, in rows 0 (dark) to 4 (light)")
plt.show()

# %% [markdown]
# The effect on attention: take the *same* vector as query at one position and as key at every position. Without RoPE
# all products would be 1. With it the product falls off with distance, in space and in time; the stripes come from the
# fast pairs, which repeat after 2π ≈ 6 positions. Heads use learned vectors that are not all ones, and so can build
# other patterns from the same rotations.

# %%
big = (9, 16, 16)
where = (4, 8, 8)
table = build_angles_3d(big, config.rope_axes, (1.0, 1.0, 1.0), torch.device("cpu"))  # (9, 16, 16, D/2)
ones = torch.ones(1, 1, big[0] * big[1] * big[2], config.head_dim)
turned = apply_rope(ones, build_rotations(table.flatten(0, 2)))[0, 0].unflatten(0, big)  # (9, 16, 16, D)
product = (turned @ turned[where]) / config.head_dim
figure, axes = plt.subplots(1, 5, figsize=(10, 2.4))
for ax, t in zip(axes, range(0, 9, 2), strict=True):
    shown = panel(ax, product[t], vmin=float(product.min()), vmax=1, cmap="viridis")
    ax.set_title(f"{abs(t - where[0])} latent frames away", fontsize=9)
axes[2].plot(where[2], where[1], "r+", ms=12, mew=2)
figure.colorbar(shown, ax=axes, label="query · key / D", shrink=0.85)
figure.suptitle("The same vector everywhere, against the query at the red cross")
plt.show()

# %% [markdown]
# ## Attention to the text
#
# Every video token attends to the text tokens. Rows are the tokens that Qwen made of the prompt (the last one ends the
# template and has read the whole prompt before it), columns the five latent frames: the weight that each of the 4 × 4
# video tokens of a frame gives to that word, averaged over the heads. The maps of "yellow", "triangle" and "up" follow
# the object, although the latents are still mostly noise; the last token's map is darker there. On the right is the
# mean over all video tokens, block by block; the dotted line is where all words would be equal. In every block the last
# token gets most of the weight.

# %%
encoder = pipe.text_encoder
ids = encoder.qwen_ids(prompt, 256)[encoder.config.dropped_tokens :]
words = [encoder.qwen_tokenizer.decode([i]).strip() for i in ids]
step = 15


def weights_by_word(block, step):
    """(S, T, H, W): the mean over heads of what each video token gives to each word of the prompt."""
    heads = to_text[f"visual_blocks.{block}.cross_attention"][step][0, :, :, : len(words)]  # (N, L, S)
    return heads.mean(dim=0).T.unflatten(1, GRID)


most_uneven = max(blocks, key=lambda block: weights_by_word(block, step).flatten(1).std(dim=1).sum())
maps = weights_by_word(most_uneven, step)
columns = T + 1
figure, axes = plt.subplots(len(words) + 1, columns, figsize=(8, 1.2 * (len(words) + 1)))
for t in range(T):
    panel(axes[0, t], frames[4 * t])
    axes[0, t].set_title(f"latent frame {t}", fontsize=9)
    for row, values in zip(axes[1:], maps, strict=True):
        panel(row[t], values[t], vmin=0, vmax=float(values.max()), cmap="magma")
axes[0, -1].axis("off")
axes[0, -1].set_title("mean by block", fontsize=9)
label(axes[0, 0], "the video")
for s, (row, word) in enumerate(zip(axes[1:], words, strict=True)):
    label(row[0], f"{word}\nup to {maps[s].max():.2f}")
    row[-1].bar(blocks, [weights_by_word(block, step)[s].mean() for block in blocks], color=COLOURS[0])
    row[-1].axhline(1 / len(words), color="0.4", lw=0.8, ls=":")
    row[-1].set(ylim=(0, 1), xticks=[], yticks=[0, 1])
row[-1].set(xticks=list(blocks), xlabel="block")
figure.suptitle(f"Attention to the text in block {most_uneven}, t = {times[step]:.2f}; bright: the row's largest weight")
plt.show()

# %% [markdown]
# ## Where a video token looks in the video
#
# The same for self-attention, through which frames agree with each other: one token, marked by a red square, and the
# weight that it gives to all 80, for each block (mean over heads). Block 0 spreads it over nearly all tokens; the
# largest weights of block 3 are at and next to the token; those of block 4 move up with the object from frame to frame.

# %%
query = (2, 2, 1)  # latent frame, row, column
index = (query[0] * H + query[1]) * W + query[2]
figure, axes = plt.subplots(len(blocks), T, figsize=(7, 1.25 * len(blocks) + 0.5))
for block, row in zip(blocks, axes, strict=True):
    given = to_video[f"visual_blocks.{block}.self_attention"][0][0, :, index].mean(dim=0).unflatten(0, GRID)
    for t, ax in enumerate(row):
        shown = panel(ax, given[t], vmin=0, vmax=0.1, cmap="magma")
        if block == 0:
            ax.set_title(f"latent frame {t}", fontsize=9)
        if t == query[0]:
            ax.add_patch(plt.Rectangle((query[2] - 0.5, query[1] - 0.5), 1, 1, fill=False, ec="#ff4040", lw=2))
    label(row[0], f"block {block}")
figure.colorbar(shown, ax=axes, label="weight (1/80 if uniform)", shrink=0.6, extend="max")
figure.suptitle(f"Self-attention of the token in the red square, t = {times[15]:.2f}")
plt.show()

# %% [markdown]
# ## Change one line, see the video change
#
# `kandinsky5/dit.py` is written in small pieces: `modulate`, `add_gated`, `apply_rope`, `Norm`. `patch.multiple` replaces
# one inside its block; `fast.remove` first takes away the forms that `Pipeline.load` installs, so that the definitions
# run. The weights are those trained with the original functions, and the noise is the same. RMS instead of layer norm is
# hardly visible; without RoPE, gates or modulation nothing is left, not even the background. **Edit a line of
# `changes`, or add one, and run the cell again.**

# %%
fast.remove(pipe.dit)
changes = {
    "as it is": (dit, {"modulate": dit.modulate}),
    "no gate": (dit, {"add_gated": lambda x, gate, out: (x.float() + out.float()).type_as(x)}),
    "RMS instead of layer norm": (dit.Norm, {"forward": lambda self, x: F.rms_norm(x.float(), x.shape[-1:])}),
    "no modulation": (dit, {"modulate": lambda x, shift, scale: x}),
    "shift and scale swapped": (dit, {"modulate": lambda x, shift, scale: x * (1 + shift) + scale}),
    "no RoPE": (dit, {"apply_rope": lambda x, rotations: x}),
    "RoPE backwards": (dit, {"apply_rope": lambda x, rotations: apply_rope(x, rotations.flip(0))}),
}
videos = {}
for change, (owner, functions) in changes.items():
    with patch.multiple(owner, **functions):
        videos[change] = pipe(prompt, seed=seed, num_inference_steps=25, progress=False)[0]
grid(videos, columns=7, title="The same prompt, noise and weights")
play(videos)

# %% [markdown]
# "RoPE backwards" gives the first token the angles of the last one: every token still knows how far away the others
# are, but confuses left with right, above with below and before with after. The triangle falls apart.
#
# **Try:** drop the gates of one sub-layer only (`add_gated` is called three times per block); scale `gate` by 0.5 or 2;
# give each `module.attend` a function that returns the mean of `v`. Next: [NABLA](03_nabla.ipynb).
