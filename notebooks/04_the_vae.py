# %% [markdown]
# # 4 · The VAE
#
# **At the end you will know what is in the 16 channels of a latent, what "causal" means here and where it is not quite true,
# and what tiling does to the pixels.**
#
# The VAE ([`kandinsky5/vae.py`](../kandinsky5/vae.py), that of HunyuanVideo) packs a video 8 × in height and width and
# 4 × in time, so that the DiT has 1/256 of the positions to process: $4k + 1$ frames become $k + 1$ latent frames.
# `nano` has the same architecture with few channels, trained on small coloured shapes. All clips here are drawn from
# the small world.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from show import COLOURS, grid, label, panel, play

from kandinsky5 import Pipeline, vae_tiling, video_io
from kandinsky5.config import Tiling
from kandinsky5.nano.world import Object, Scene, draw_scene
from kandinsky5.vae import CausalConv3d

_ = torch.set_grad_enabled(False)
pipe = Pipeline.load("nano", dtype=torch.float32)
vae = pipe.vae


def draw(scene, num_frames=17, side=64):
    """A scene → the VAE's video (1, 3, F, H, W) in [-1, 1]."""
    return video_io.from_uint8(draw_scene(scene, num_frames, side, side)[None])


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


# %% [markdown]
# ## There and back
#
# The encoder returns a Gaussian for each latent value, a mean and a variance; decoding the mean gives the best
# reconstruction. The third row is the error, five times amplified: look for it at edges, and where things move.

# %%
things = (
    Object("red", "triangle", "right", "big", start=(17, 18, 12), end=(46, 18, 12)),  # x, y, radius
    Object("cyan", "diamond", "grow", None, start=(34, 45, 7), end=(34, 45, 12.5)),
)
video = draw(Scene("black", things))
posterior = vae.encode(video)
back = vae.decode(posterior.mean)
print("video", tuple(video.shape), "→ mean and logvar", tuple(posterior.mean.shape), "→ video", tuple(back.shape))
print(f"{video.numel() / posterior.mean.numel():.0f} times fewer values; PSNR {psnr(back, video):.1f} dB")
print(f"standard deviation of the latents: across the clip {posterior.mean.std():.2f}, of the noise the encoder adds "
      f"{torch.exp(posterior.logvar / 2).mean():.3f}")  # fmt: skip
original, decoded = (video_io.to_uint8(v)[0] for v in (video, back.clamp(-1, 1)))
enlarged = (128 + 5 * (decoded.int() - original.int())).clamp(0, 255).to(torch.uint8)
grid({"video": original, "decoded": decoded, "error × 5 (grey: none)": enlarged}, columns=7, title="Encoded and decoded")
play({"video": original, "decoded": decoded})

# %% [markdown]
# ## Latent channels as images
#
# The 16 channels of the middle latent frame, each 8 × 8, next to the video frame it belongs to. In this VAE each
# channel has mean 0 and standard deviation 1 over the training clips; blue is below, red above. A channel is neither a
# colour nor an edge: it is whatever 4 × 8 × 8 pixels needed. But things are where they are in the video, which is why
# the DiT can patchify.

# %%
z = posterior.mean[0]  # (16, T, h, w)
figure = plt.figure(figsize=(10, 2.9))
left, right = figure.subfigures(1, 2, width_ratios=[1, 3])
panel(left.subplots(), original[8])
left.suptitle("frame 8", fontsize=10)
for channel, ax in enumerate(right.subplots(2, 8).flatten()):
    shown = panel(ax, z[channel, 2], cmap="RdBu_r", vmin=-3, vmax=3)
    ax.set_title(str(channel), fontsize=9)
right.colorbar(shown, ax=right.axes, label="latent value", shrink=0.9)
right.suptitle("channels of latent frame 2", fontsize=10)
plt.show()

# %% [markdown]
# Which channels matter? Set one to zero in the whole clip and decode. The figure shows the error that each one leaves,
# and what is lost without the three most important ones.

# %%
missed = []
for channel in range(16):
    without = posterior.mean.clone()
    without[:, channel] = 0
    missed.append((psnr(vae.decode(without), back), channel))
figure, ax = plt.subplots(figsize=(8, 2.2))
ax.bar([channel for _, channel in missed], [value for value, _ in missed], color=COLOURS[0])
ax.set(title="Without one channel (low: missed)", xlabel="channel", ylabel="PSNR to decoded, dB", xticks=range(16))
plt.show()
rows = {"all channels": decoded}
for _, channel in sorted(missed)[:3]:
    without = posterior.mean.clone()
    without[:, channel] = 0
    rows[f"without {channel}"] = video_io.to_uint8(vae.decode(without).clamp(-1, 1))[0]
grid(rows, columns=7, title="The channels that are missed most")

# %% [markdown]
# ## Causal: an impulse
#
# A 3 × 3 × 3 convolution usually looks one frame back and one ahead. `CausalConv3d` pads both frames in front, so that
# an output frame sees itself and the *two before*. Put one bright pixel into frame 6 of a black clip, and look where it
# comes out: in frames 6, 7 and 8, never before.

# %%
torch.manual_seed(0)
conv = CausalConv3d(1, 1)
torch.nn.init.uniform_(conv.weight, 0.2, 1.0)
torch.nn.init.zeros_(conv.bias)
impulse = torch.zeros(1, 1, 12, 7, 7)
impulse[0, 0, 6, 3, 3] = 1
answer = conv(impulse)
figure, axes = plt.subplots(2, 12, figsize=(10, 2.2))
for name, values, row in zip(("in", "out"), (impulse, answer), axes, strict=True):
    for frame, ax in enumerate(row):
        panel(ax, values[0, 0, frame], cmap="magma", vmin=0, vmax=1)
        if name == "in":
            ax.set_title(f"frame {frame}", fontsize=8)
    label(row[0], name)
figure.suptitle("Impulse response of one causal convolution")
plt.show()

# %% [markdown]
# ## … and where it is not
#
# The GroupNorms between the convolutions take their mean and variance over all frames, so the whole VAE is *almost*
# causal. Change the video in frame 9 and measure how much each latent frame moves; change a latent frame and measure
# how much each frame of the video moves. Before the changed frame the effect is not zero but small. It comes from the
# norms, and it is why a video that is encoded in two pieces is never quite the video encoded in one.

# %%
F_changed, T_changed = 9, 2  # latent frame 2 stands for frames 5 … 8, latent frame 3 for 9 … 12
spot = video.clone()
spot[:, :, F_changed, 24:40, 24:40] *= -1
moved = (vae.encode(spot).mean - posterior.mean).square().mean(dim=(0, 1, 3, 4)).sqrt()  # (T,)
nudged = posterior.mean.clone()
nudged[:, :, T_changed, 3:5, 3:5] += 1
moved_back = (vae.decode(nudged) - back).square().mean(dim=(0, 1, 3, 4)).sqrt()  # (F,)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.9))
left.bar(range(len(moved)), moved, color=[COLOURS[1] if 4 * t < F_changed else COLOURS[0] for t in range(len(moved))])
left.set(title=f"Encoder: frame {F_changed} is changed", xlabel="latent frame", ylabel="change, root mean square")
first = 4 * (T_changed - 1) + 1
colours = [COLOURS[1] if f < first else COLOURS[0] for f in range(len(moved_back))]
right.bar(range(len(moved_back)), moved_back, color=colours)
right.set(title=f"Decoder: latent frame {T_changed} is changed", xlabel="frame of the video", xticks=range(0, 17, 2))
for ax in (left, right):
    ax.set_yscale("log")
    ax.set_ylim(ax.dataLim.minposy / 5, ax.dataLim.ymax * 8)
    ax.bar(0, 0, color=COLOURS[1], label="before it: through the norms alone")
    ax.bar(0, 0, color=COLOURS[0], label="from there on")
    ax.legend(fontsize=8, loc="upper right", ncols=2)
plt.show()

# %% [markdown]
# ## Tiling: seams, with and without blending
#
# A long video does not fit in memory, so it is decoded in windows
# ([`kandinsky5/vae_tiling.py`](../kandinsky5/vae_tiling.py)). At the edge of a window the convolutions lack a neighbour
# and the norms see other statistics, so two windows do not match exactly. Windows therefore overlap by a quarter, and
# the earlier one fades into the later. Below, 33 frames of 128 × 128 are split in space only or in time only, each with
# windows that only touch and with windows that overlap and are blended. (The pipeline splits time into windows of 16
# frames, as here, and on request space into tiles of 256 pixels, here 64.)

# %%
things = (
    Object("red", "circle", "right", "big", (30, 32, 13), (56, 32, 13)),
    Object("cyan", "diamond", "up", "big", (96, 98, 13), (94, 66, 13)),
    Object("yellow", "triangle", "down", "big", (64, 78, 13), (62, 108, 13)),
    Object("purple", "square", "left", "big", (108, 30, 13), (84, 30, 13)),
)
large = draw(Scene("grey", things, canvas=(128, 128)), num_frames=33, side=128)
z = vae.encode(large).mean
whole = vae.decode(z)
in_space = Tiling(time=False, space=True, pixels=64, pixel_stride=48)
in_time = Tiling(time=True, space=False, frames=16, frame_stride=12)
cuts = {
    "space": {"touching": replace(in_space, pixel_stride=64), "blended": in_space},
    "time": {"touching": replace(in_time, frame_stride=16), "blended": in_time},
}
decoded = {where: {name: vae_tiling.decode(vae, z, t) for name, t in kinds.items()} for where, kinds in cuts.items()}
levels = 255 / 2  # [-1, 1] in levels of 0 … 255

figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
shown = {"in one piece": whole, **{f"{name} tiles": video for name, video in decoded["space"].items()}}
for ax, (name, video) in zip(axes, shown.items(), strict=False):
    panel(ax, video_io.to_uint8(video.clamp(-1, 1))[0, 20, 32:96, 32:96])
    ax.set_title(name, fontsize=9)
difference = levels * (decoded["space"]["touching"] - whole).abs().mean(dim=(0, 1, 2))  # (H, W)
colours = panel(axes[3], difference, cmap="magma", vmin=0)
axes[3].set_title("touching tiles − in one piece", fontsize=9)
figure.colorbar(colours, ax=axes[3], label="levels of 255", shrink=0.8)
figure.suptitle("The middle of frame 20; on the right all of it, the mean over the frames")
plt.show()

# %% [markdown]
# A difference from the untiled result is harmless by itself; a *step* between neighbours is visible. So the seam is
# measured as a jump: how much the *error*, tiled minus whole, changes from one column (in time: one frame) to the next.
# Peaks at the dotted lines, where windows begin, are seams; the slow waves elsewhere are not.


# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.1))
for ax, (where, kinds), dim, unit in zip(axes, cuts.items(), (4, 2), ("column", "frame"), strict=True):
    for (name, tiling), colour in zip(kinds.items(), (COLOURS[1], COLOURS[0]), strict=True):
        others = tuple(d for d in range(5) if d != dim)
        jumps = levels * (decoded[where][name] - whole).diff(dim=dim).abs().mean(dim=others)  # one per border
        stride = tiling.pixel_stride if where == "space" else tiling.frame_stride
        # in time a window after the first drops its first frame, so it begins one later
        borders = list(range(stride if where == "space" else stride + 1, len(jumps) + 1, stride))
        at_seams = max(jumps[b - 1] for b in borders) / jumps.median()
        ax.plot(range(1, len(jumps) + 1), jumps, color=colour, label=f"{name}: seam {at_seams:.1f} × the median")
        for border in borders:
            ax.axvline(border, color=colour, ls=":", lw=1)
    ax.set(title=f"Cut in {where}", xlabel=unit, ylabel="jump of the error, levels of 255", ylim=(0, 1.35 * ax.dataLim.ymax))
    ax.legend(fontsize=8, loc="upper right", frameon=True, framealpha=1, edgecolor="none")
plt.show()

# %% [markdown]
# Blending removes the step by spreading the difference over the overlap; the result still differs from decoding in one
# piece. It costs time, because the overlap is computed twice: 16/12 in time, (64/48)² in space.
#
# **Try:** `frame_stride=8`; decode Gaussian noise instead of `z`; sample the posterior (`posterior.sample(noise)`)
# instead of taking its mean. Next: [flow matching](05_flow_matching.ipynb).
