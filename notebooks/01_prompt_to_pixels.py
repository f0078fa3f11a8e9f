# %% [markdown]
# # 1 · From a prompt to pixels
#
# **At the end you will have run every stage of Kandinsky 5 Video by hand, and know the shape of everything that goes
# from one stage to the next.**
#
# The model is `nano`, which is bundled with this package: the architecture of the released models with a few million
# parameters instead of billions, trained on a small world of moving coloured shapes. It samples a video in seconds on a
# CPU. The same lines run a released checkpoint: pass its converted folder to `Pipeline.load`.
#
# ```text
# prompt ─┬─ Qwen ─> text (B, S, 128) ──┐
#         └─ CLIP ─> pooled (B, 128) ───┤
# seed ───> noise (B, T, h, w, 16) ─────┴─ DiT × steps ─> latents ─ VAE decoder ─> frames (B, F, H, W, 3)
# ```

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from show import grid, label, panel, play

from kandinsky5 import Pipeline, sampler
from kandinsky5.nano.world import Object, Scene, draw_scene

pipe = Pipeline.load("nano", dtype=torch.float32)
for name, model in {"DiT": pipe.dit, "VAE": pipe.vae, "Qwen": pipe.text_encoder.qwen, "CLIP": pipe.text_encoder.clip}.items():
    print(f"{name:4}  {sum(p.numel() for p in model.parameters()) / 1e6:5.2f} million parameters")

# %% [markdown]
# ## Stage 1: words
#
# Qwen, a language model, reads the prompt inside a template. The hidden states of the *template's* tokens before the
# prompt are dropped; what remains is one vector per token of the prompt and of the template's end. CLIP reads the bare
# prompt and returns one vector.

# %%
prompt = "a blue diamond grows"
encoder = pipe.text_encoder
ids = encoder.qwen_ids(prompt, max_sequence_length=256)
dropped = encoder.config.dropped_tokens
print("what Qwen reads:", repr(encoder.config.template.replace("{}", prompt)))
print(f"as tokens: {len(ids)}, of which the first {dropped} are dropped")

features = encoder.encode([prompt, ""])  # the empty prompt is what guidance moves away from
print("text  ", tuple(features.text.shape), "(B, S, dim): padded to the longer prompt")
print("mask  ", tuple(features.mask.shape), "(B, S):", features.mask.sum(dim=1).tolist(), "tokens are real")
print("pooled", tuple(features.pooled.shape), "(B, dim)")

# %% [markdown]
# ## Stage 2: noise
#
# The model does not work on pixels but on *latents*: 8 × smaller in height and width, 4 × in time (the first frame
# stands alone, so 4k + 1 frames become k + 1), with 16 channels. Sampling starts from Gaussian noise of that shape. It
# depends on the seed alone, not on the device or the precision.

# %%
sampling, vae = pipe.config.sampling, pipe.config.vae
F, H, W = sampling.num_frames, sampling.height, sampling.width
shape = ((F - 1) // vae.time_factor + 1, H // vae.space_factor, W // vae.space_factor, vae.latent_channels)
noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))[None]
print(f"{F} frames of {H} × {W} pixels: {F * H * W * 3:,} values")
print(f"latents (B, T, h, w, C) = {tuple(noise.shape)}: {noise.numel():,} values")

# %% [markdown]
# ## Stage 3: from noise to latents
#
# The DiT answers one question: *in which direction does this point move?* Data $x_0$ and noise $\varepsilon$ are the
# ends of a straight path, $x_t = (1 - t)\,x_0 + t\,\varepsilon$, and the network predicts its velocity
#
# $$v(x_t, t) \approx \varepsilon - x_0 .$$
#
# Sampling walks it backwards, from $t = 1$ to $t = 0$, in Euler steps $x \leftarrow x + (t' - t)\,v$. Two details:
#
# * **Guidance** evaluates the network twice, with the prompt and without, and amplifies the difference:
#   $v_u + w\,(v_c - v_u)$.
# * Next to the 16 noisy channels the network sees 16 + 1 more: conditioning latents, which are always zero, and a mask
#   that is 1 where a frame is given (image-to-video, below).

# %%
times = sampler.flow_schedule(sampling.num_inference_steps, sampling.shift)
condition = torch.zeros(*noise.shape[:-1], pipe.config.dit.input_channels - vae.latent_channels)


@torch.no_grad()
def velocity(x, t):
    x = torch.cat([x, condition], dim=-1)  # (1, T, h, w, 33)
    answers = []
    for one in (features.select(0, 1), features.select(1, 2)):  # the prompt; the empty prompt
        answers.append(pipe.dit(x, one.text, one.pooled, t.expand(1), rope_scale=sampling.rope_scale))
    return sampler.guided_velocity(*answers, sampling.guidance_scale)


x, seen = noise, []
for t, t_next in pairwise(times):
    v = velocity(x, t)
    seen.append((float(t), x, x - t * v))  # if the path were straight from here on, it would end at x − t·v
    x = x + (t_next - t) * v
latents = x
seen.append((0.0, latents, latents))
print("latents", tuple(latents.shape), f"mean {latents.mean():.2f}, standard deviation {latents.std():.2f}")

# %% [markdown]
# ### Noise becomes a video
#
# Top: the sampler's state at time $t$, decoded as if it were finished. Bottom: the network's current estimate of the
# clean video, $\hat x_0 = x_t - t\,v$. In the lower row, *what* and *where* are decided long before the upper row shows
# anything; edges come last. (Each image is the middle frame.)

# %%
chosen = [0, 2, 5, 10, 20, 30, 40, len(seen) - 1]
figure, axes = plt.subplots(2, len(chosen), figsize=(10, 3.1))
for column, step in zip(axes.T, chosen, strict=True):
    t, noisy, guess = seen[step]
    for ax, z in zip(column, (noisy, guess), strict=True):
        panel(ax, pipe.decode(z)[0, F // 2])
    column[0].set_title(f"step {step}\nt = {t:.2f}", fontsize=9)
label(axes[0, 0], "held:\n$x_t$")
label(axes[1, 0], "guessed:\n$x_t - t\\,v$")
figure.suptitle("The middle frame on the way from noise (left) to data (right)")
plt.show()

# %% [markdown]
# ## Stage 4: pixels
#
# The VAE's decoder turns the 5 × 8 × 8 latents back into 17 frames of 64 × 64.

# %%
frames = pipe.decode(latents)
print("frames", tuple(frames.shape), frames.dtype)
grid({prompt: frames[0]}, columns=7, title="The finished video")
play({prompt: frames[0]})

# %% [markdown]
# ## The same in one line
#
# `Pipeline.__call__` does all of the above. There, both passes of guidance go through the network as one batch, so sums
# are rounded in a different order: after 50 steps a few pixels may differ by about one level of 255, and no more.

# %%
same = pipe(prompt, seed=0, progress=False)
difference = (same.int() - frames.int()).abs()
print(f"largest difference {difference.max()} of 255, mean {difference.float().mean():.5f}")
assert difference.float().mean() < 0.1

# %% [markdown]
# ## An image and a prompt
#
# Image-to-video is the same process with frame 0 given: the image is encoded, written into frame 0 of the latents
# before every step, and the mask says so. Below, three videos start from the same drawn diamond, and each prompt says
# what should happen to it.

# %%
diamond = Object("purple", "diamond", "still", "big", start=(32, 32, 13), end=(32, 32, 13))  # x, y, radius
image = torch.from_numpy(draw_scene(Scene("white", (diamond,)))[0])  # uint8 (64, 64, 3)
prompts = [f"a purple diamond {verb}" for verb in ("moves right", "moves up", "shrinks")]
videos = dict(zip(prompts, pipe(prompts, image=image, progress=False), strict=True))
grid(videos, columns=7, title="One image, three prompts")
play(videos)

# %% [markdown]
# ## One noise, several prompts
#
# The noise is the same for all, and there are still three different videos: the prompt decides. Change the prompts
# below. `nano` knows the colours red, green, blue, yellow, purple and cyan and the shapes circle, square, triangle and
# diamond, which move left, right, up or down, grow, shrink or stay still.

# %%
prompts = ["a red circle moves right", "a yellow triangle moves up", "a cyan diamond grows"]
videos = dict(zip(prompts, pipe(prompts, latents=noise.expand(3, *shape), progress=False), strict=True))
grid(videos, columns=7, title="Three prompts, the same noise")
play(videos)

# %% [markdown]
# To save one: `kandinsky5.video_io.write_video("diamond.mp4", frames, fps=10)`; or on the command line `python
# sample.py "a cyan diamond grows" -o diamond.mp4`. Next: [what happens inside the DiT](02_inside_the_dit.ipynb).
