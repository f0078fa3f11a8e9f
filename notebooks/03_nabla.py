# %% [markdown]
# # 3 · NABLA: which tiles see each other
#
# **At the end you will know how Kandinsky 5 makes attention affordable in long clips, step by step on a real model's queries
# and keys, and what sparsity costs in error and gains in time.**
#
# Full attention of $L$ video tokens computes $L^2$ scores: 10 seconds at 512 × 768 are 93,696 tokens after patching,
# almost nine billion scores per head and block. NABLA ([arXiv 2507.13546](https://arxiv.org/abs/2507.13546),
# [`kandinsky5/nabla.py`](../kandinsky5/nabla.py)) first looks at the video coarsely and then computes only the tiles
# where the attention mass is:
#
# ```text
# tokens (T, H, W) ──to_tiles──> tile order ──pool──> softmax over tiles ──select_mass──┐
#                                                                                      OR ──> block_map
# grid   (T, H, W) ──────────────build_window──────────────────────────────────────────┘
# ```

# %%
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from show import COLOURS, label, panel, play

from kandinsky5 import Pipeline, nabla, vae_tiling, video_io
from kandinsky5.attention import dense_attention, expand_block_map
from kandinsky5.config import NablaConfig, Tiling
from kandinsky5.dit import DiT
from kandinsky5.extras.probe import record_attention
from kandinsky5.nano.presets import LONG
from kandinsky5.nano.world import draw_scene, sample_scene
from kandinsky5.runtime.kernels import block_sparse_attention

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## Tile order
#
# A tile is 8 × 8 tokens of one frame, 128 × 128 pixels of the video. `to_tiles` puts its 64 tokens next to each other:
# from then on a tile is 64 consecutive tokens. The videos show the order of the tokens of two frames, dark to light:
# row by row, as in any other transformer, and in tile order.

# %%
grid = (2, 16, 24)
numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(1, *grid, 1)
tile_order = nabla.to_tiles(numbers).flatten()  # which token comes first, second, …
assert nabla.from_tiles(nabla.to_tiles(numbers), grid).equal(numbers)
when = torch.empty_like(tile_order)
when[tile_order] = torch.arange(len(tile_order))  # of each token: when it comes


def animation(order, scale=8, step=12):
    """order (T, H, W): when each token comes → frames in which the tokens that have come are coloured."""
    order = torch.cat([torch.nn.functional.pad(frame, (0, 2), value=10**6) for frame in order], dim=1)  # side by side
    colours = torch.tensor(plt.get_cmap("viridis")(order.clamp(max=numbers.numel()) / numbers.numel())[..., :3])
    frames = []
    for count in range(0, numbers.numel() + 16 * step, step):
        shown = torch.where((order < count)[..., None], colours, torch.where(order[..., None] < 10**6, 0.88, 1.0))
        frames.append((255 * shown).to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1))
    return torch.stack(frames)  # (F, H, W, 3)


play({"row by row: frame 0, frame 1": animation(numbers.view(grid)), "tile order": animation(when.view(grid))}, fps=12, height=150)

# %% [markdown]
# The same as a still, with the last token of each tile numbered:

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.1))
for axes_of_order, (name, order) in zip(
    (axes[:2], axes[2:]), {"row by row": numbers.view(grid), "tile order": when.view(grid)}.items(), strict=True
):
    for t, ax in enumerate(axes_of_order):
        panel(ax, order[t], vmin=0, vmax=order.numel(), cmap="viridis")
        ax.set_title(f"{name}, frame {t}", fontsize=9)
        for h in range(7, 16, 8):
            for w in range(7, 24, 8):
                ax.text(w, h, int(order[t, h, w]), color="white", fontsize=7, ha="right", va="center")
        for line in (7.5, 15.5):
            ax.axvline(line, color="white", lw=0.8)
        ax.axhline(7.5, color="white", lw=0.8)
plt.show()

# %% [markdown]
# ## Queries and keys of a real model
#
# A DiT with `nano`'s weights and NABLA switched on, at the size of the `nano-10s` preset: 33 frames of 128 × 128 are 9
# latent frames of 8 × 8 tokens, one tile each. Its input is a drawn scene, halfway to noise, with the scene's colours
# and shapes as a prompt. `record_attention` stores the queries and keys (after norm and RoPE) and the map that the
# model computed from them.

# %%
pipe = Pipeline.load("nano", dtype=torch.float32)


def run(config: NablaConfig, num_frames: int, side: int, t: float = 0.5):
    """One pass of a DiT with this NABLA config over a noisy clip: velocity, and q, k, v and map of each block."""
    dit = DiT(replace(pipe.config.dit, nabla=config)).eval()
    dit.load_state_dict(pipe.dit.state_dict())
    scene = sample_scene(3, num_objects=2, canvas=(side, side))
    said = " and ".join(f"a {thing.colour} {thing.shape}" for thing in scene.objects)
    video = video_io.from_uint8(draw_scene(scene, num_frames, side, side)[None])
    latents = vae_tiling.encode(pipe.vae, video, Tiling()).mean.permute(0, 2, 3, 4, 1)  # (1, T, H, W, 16)
    latents = latents * pipe.config.vae.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.lerp(latents, noise, t), torch.zeros(*latents.shape[:-1], 17)], dim=-1)
    words = pipe.text_encoder.encode([said])
    name = "visual_blocks.*.self_attention"
    everything = lambda q, k, v, mask, tiles: (q, k, v, tiles)  # noqa: E731
    with record_attention(dit, name, keep=everything) as seen:
        velocity = dit(x, words.text, words.pooled, torch.tensor([t]), rope_scale=(1.0, 1.0, 1.0))
    grid = (latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2)
    return velocity, [calls[0] for calls in seen.values()], grid


config = LONG.dit.nabla
velocity, recorded, grid = run(config, num_frames=33, side=128)
q, k, v, kept = recorded[2]  # of block 2
print(f"{config}, grid {grid}: {q.shape[2]} tokens, {q.shape[2] // nabla.TILE} tiles")
print("q, k, v (B, N, L, D)", tuple(q.shape), "  map (B, N, L/64, L/64)", tuple(kept.shape))

# %% [markdown]
# ## The pooled map, and where it is cut
#
# Queries and keys are averaged over each tile, and a softmax over tiles says where the mass *probably* is. Then, row by
# row, NABLA keeps the largest entries that together hold the share $P$. Top: the pooled attention of each head; rows
# are query tiles (here: latent frames). Bottom: the tiles that are kept; grey ones are kept by the window alone. A head
# that attends uniformly keeps many tiles, a head that knows where to look keeps few.

# %%
pooled = nabla.pooled_attention(q, k)  # (B, N, tiles, tiles)
selected = nabla.select_mass(pooled, config.P)
window = nabla.build_window(grid, config.window, q.device)
assert kept.equal(selected | window)  # what the model did

figure, axes = plt.subplots(2, q.shape[1], figsize=(10, 3.7))
for head, (above, below) in enumerate(axes.T):
    shown = panel(above, pooled[0, head], vmin=0, vmax=float(pooled.max()), cmap="magma")
    panel(below, torch.where(selected[0, head], 2, window.int()), vmin=0, vmax=2, cmap="Greys")
    above.set_title(f"head {head}", fontsize=9)
    below.set_title(f"{kept[0, head].float().mean():.0%} of tiles", fontsize=9)
label(axes[0, 0], "pooled\nattention")
label(axes[1, 0], "kept")
figure.colorbar(shown, ax=axes[0], label="probability")
figure.suptitle(f"Block 2: queries of 9 tiles (rows) and keys (columns); P = {config.P}, window {config.window}")
plt.show()

# %% [markdown]
# ## A longer row: the cut for several P
#
# From here on the clip has more tiles: 45 frames of 256 × 256 are 12 × 2 × 2. Left: one row of the pooled map, sorted.
# An entry is kept if it and all *smaller* ones sum to at least $1 - P$. Right: the same row on the video, 12 frames of
# 2 × 2 tiles; the query's tile is marked, the kept ones are light.

# %%
_, recorded, grid = run(NablaConfig(P=0.9, window=(3, 3, 3)), num_frames=45, side=256)
tiles = (grid[0], grid[1] // nabla.SIDE, grid[2] // nabla.SIDE)


def concentration(block):
    """How far the pooled rows are from uniform, for each head: the mass of the largest tenth of the tiles."""
    rows = nabla.pooled_attention(*recorded[block][:2])[0]  # (N, tiles, tiles)
    return rows.sort(dim=-1, descending=True).values[..., : rows.shape[-1] // 10].sum(dim=-1).mean(dim=-1)


concentrations = torch.stack([concentration(block) for block in range(len(recorded))])  # (blocks, N)
block, head = divmod(int(concentrations.argmax()), concentrations.shape[1])
q, k, v, _ = recorded[block]
pooled = nabla.pooled_attention(q, k)
query = 5 * tiles[1] * tiles[2]  # first tile of latent frame 5
row = pooled[0, head, query]

cuts = (0.3, 0.6, 0.9)
figure = plt.figure(figsize=(10, 4.2))
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
ax = left.subplots()
ordered = row.sort(descending=True).values
ax.bar(range(len(row)), ordered / ordered.max(), color="0.8", width=1, align="edge", label="probability / largest")
ax.plot([0, *ordered.cumsum(0)], color=COLOURS[0], label="sum so far")
last = int(nabla.select_mass(row, cuts[-1]).sum())
for P, colour in zip(cuts, COLOURS[1:], strict=False):
    count = int(nabla.select_mass(row, P).sum())
    ax.plot([0, count, count], [P, P, 0], color=colour, ls="--", lw=1.2)
    ax.text(last + 0.6, P - 0.06, f"P = {P}: {count} tiles", color=colour, fontsize=9)
ax.set(xlabel="tiles, most probable first", ylabel="share", title=f"One row: block {block}, head {head}", ylim=(0, 1.02))
ax.legend(fontsize=8, loc="center right")
panels = right.subplots(2, 2).flatten()


def on_the_video(values, columns=6):
    """A row of the map (tiles,) → its frames as 2 × 2 tiles, six frames next to each other, (H, W)."""
    frames = torch.nn.functional.pad(values.float().view(tiles), (0, 1, 0, 1), value=torch.nan)
    rows = [torch.cat(list(row), dim=1) for row in frames.split(columns)]
    return torch.cat(rows, dim=0)[:-1, :-1]


names = ["pooled attention", *(f"kept, P = {P}" for P in cuts)]
for ax, name, values in zip(panels, names, [row, *(nabla.select_mass(row, P) for P in cuts)], strict=True):
    panel(ax, on_the_video(values), cmap="magma", vmin=0, vmax=float(values.max()))
    corner = (5 * (tiles[2] + 1) - 0.5, -0.5)  # the query: frame 5, first row, first column
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, ec="#40c0ff", lw=2))
    ax.set(xlim=(-1.5, 18.5))
    ax.set_title(name, fontsize=9)
right.suptitle("The row on the video: frames 0 to 5, below them 6 to 11", fontsize=10)
plt.show()

# %% [markdown]
# ## Window and union
#
# The coarse look can miss a neighbour, so nearby tiles are always kept: a window over time, height and width. The map
# is the union. Compare the diagonal bands of the window (near in time) with what the mass adds far from them: this head
# looks mostly at later frames.

# %%
config = NablaConfig(P=0.6, window=(3, 3, 3))
selected = nabla.select_mass(pooled[0, head], config.P)
window = nabla.build_window(grid, config.window, q.device)
union = nabla.block_map(q, k, grid, config)[0, head]
assert union.equal(selected | window)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
images = {
    "pooled attention": pooled[0, head],
    f"mass, P = {config.P}": selected,
    f"window {config.window}": window,
    "union": union,
}
for ax, (name, values) in zip(axes, images.items(), strict=True):
    panel(ax, values.float(), cmap="magma" if name.startswith("pooled") else "Greys", vmin=0)
    share = "" if name.startswith("pooled") else f": {values.float().mean():.0%} kept"
    ax.set_title(name + share, fontsize=9)
    ax.set_xlabel("key tile", fontsize=9)
axes[0].set_ylabel("query tile", fontsize=9)
plt.show()

# %% [markdown]
# ## Against the definition
#
# Attention over the kept tiles is *exact*: the same as the definition, softmax over all tokens, with the others masked out.
# And with P = 1 nothing is masked.


# %%
def error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


tile_map = nabla.block_map(q, k, grid, config)
sparse = block_sparse_attention(q, k, v, tile_map)
masked = dense_attention(q, k, v, expand_block_map(tile_map))
full = dense_attention(q, k, v)
everything = block_sparse_attention(q, k, v, nabla.block_map(q, k, grid, replace(config, P=1.0)))
print(f"kept tiles against the masked definition:   {error(sparse, masked):.1e}")
print(f"P = 1 against full attention:               {error(everything, full):.1e}")
print(f"P = {config.P} against full attention:             {error(sparse, full):.1e}")
assert error(sparse, masked) < 1e-5 and error(everything, full) < 1e-5

# %% [markdown]
# ## What sparsity costs, and gains
#
# Left, for several P: the share of the tiles that is computed, and the error compared with full attention. Right: the
# time. As a baseline, the same number of tiles per query is chosen at random. The window here is only the tile itself,
# so that P decides. One line per block of the network.

# %%
shares = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)


def at_random(tile_map):
    """As many tiles in each row as `tile_map` has, chosen at random."""
    order = torch.rand(tile_map.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=-1).argsort(dim=-1)
    return order < tile_map.sum(dim=-1, keepdim=True)


def seconds(run, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for b, (q, k, v, _) in enumerate(recorded):
    full = dense_attention(q, k, v)
    kept, errors, chance = [], [], []
    for P in shares:
        tile_map = nabla.block_map(q, k, grid, NablaConfig(P=P, window=(1, 1, 1)))
        kept.append(float(tile_map.float().mean()))
        errors.append(error(block_sparse_attention(q, k, v, tile_map, fused=True), full))
        chance.append(error(block_sparse_attention(q, k, v, at_random(tile_map), fused=True), full))
    left.plot(kept, errors, "o-", color=COLOURS[b], ms=4, label=f"block {b}")
    left.plot(kept, chance, ":", color=COLOURS[b], lw=1)
left.plot([], [], "k:", label="random tiles")
left.set(title="Error", xlabel="share of tiles that is computed", ylabel="‖sparse − full‖ / ‖full‖", yscale="log", xlim=(0, 1))
left.legend(fontsize=8)

q, k, v, _ = recorded[block]
lengths = [0.1, 0.25, 0.5, 0.75, 1.0]
count = q.shape[2] // nabla.TILE
cases = [torch.rand(1, q.shape[1], count, count, generator=torch.Generator().manual_seed(1)) < s for s in lengths]
cases = [case | torch.eye(count, dtype=torch.bool) for case in cases]
by_tiles = [1000 * seconds(lambda case=case: block_sparse_attention(q, k, v, case)) for case in cases]
right.plot([float(case.float().mean()) for case in cases], by_tiles, "o-", label="the kept tiles")
dense = 1000 * seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
right.axhline(dense, color=COLOURS[1], ls="--", label="PyTorch's fused kernel, all tiles")
pooling = 1000 * seconds(lambda: nabla.block_map(q, k, grid, config))
right.axhline(pooling, color=COLOURS[2], ls=":", label="computing the map")
right.set(
    title=f"Time of {q.shape[1]} heads, {q.shape[2]:,} tokens, one CPU thread",
    xlabel="share of tiles that is computed",
    ylabel="milliseconds",
    xlim=(0, 1.02),
    ylim=(0, None),
)
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# Time falls in proportion to the tiles that are dropped, and computing the map costs almost nothing. (If all tiles are
# kept, PyTorch's kernel is faster: ours gathers them first.) In blocks 2 to 4 NABLA's choice is better than a random
# one, in block 1 only where half or more is kept; block 0, which attends to everything almost uniformly, loses nothing
# by random choice. So how small P can be depends on the model: released long-clip models were *trained* with NABLA at P
# = 0.7 to 0.9, so that their mass is where the map can find it; `nano`'s weights here were trained with full attention
# on short clips.
#
# ## What it does to the velocity
#
# What counts in the end is the output of the whole network.

# %%
exact, _, _ = run(NablaConfig(P=1.0, window=(1, 1, 1)), num_frames=33, side=128)
for P in (0.2, 0.4, 0.6, 0.8, 0.9):
    velocity, maps, _ = run(NablaConfig(P=P, window=(3, 1, 1)), num_frames=33, side=128)
    share = torch.stack([m[3].float().mean() for m in maps]).mean()
    print(f"P = {P}: {share:4.0%} of the tiles, velocity differs by {error(velocity, exact):.3f}")

# %% [markdown]
# **Try:** other windows; the map of one head at several flow times `t`; `record_attention(…, keep=block_map)` during a whole
# sampling run, to see the map change from noise to data. Next: [the VAE](04_the_vae.ipynb).
