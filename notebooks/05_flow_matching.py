# %% [markdown]
# # 5 · Flow matching
#
# **At the end you will have trained a flow model in half a minute, and know what the schedule, its shift, guidance and the
# number of steps do, first on points in a plane where everything can be seen, then on videos.**
#
# The theory fits in three lines. Data $x_0$ and noise $\varepsilon$ are joined by a straight path, which has one velocity:
#
# $$x_t = (1 - t)\,x_0 + t\,\varepsilon, \qquad \dot x_t = \varepsilon - x_0, \qquad
#   \mathcal L = \mathbb E\,\bigl\| v_\theta(x_t, t) - (\varepsilon - x_0) \bigr\|^2 .$$
#
# The network cannot know which of all paths through $x_t$ it is on, so it learns their mean velocity; following that
# mean from noise at $t = 1$ to $t = 0$ gives samples of the data.

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from show import COLOURS, grid
from torch import nn

from kandinsky5 import Pipeline
from kandinsky5.dit import TimeEmbedder
from kandinsky5.nano.evaluate import sample_prompt, wilson
from kandinsky5.nano.judge import judge_clip, score
from kandinsky5.sampler import euler_sample, flow_schedule, guided_velocity
from kandinsky5.training.curves import read_rows
from kandinsky5.training.flow import FlowTimes, flow_loss
from kandinsky5.training.loop import generator, train
from kandinsky5.training.recipe import Recipe

# %% [markdown]
# ## Train one
#
# The data are points on two half moons, two classes. The network is three Linears whose input is the point, the
# embedded time (the DiT's embedding) and the class; class 2 means "no class", for guidance. Loop, times, loss and
# random numbers are those that train the DiT: [`kandinsky5/training/loop.py`](../kandinsky5/training/loop.py).


# %%
def draw_moons(count, random):
    """Points (count, 2) and classes (count,): 0 the upper moon, 1 the lower one."""
    classes = torch.randint(2, (count,), generator=random)
    angle = math.pi * torch.rand(count, generator=random)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=-1)
    points = torch.where(classes[:, None] == 0, upper, -upper)
    return 1.5 * points + 0.08 * torch.randn(count, 2, generator=random), classes


class Toy(nn.Module):
    def __init__(self, dim=128):
        super().__init__()
        self.time_embedder = TimeEmbedder(32, dim)
        self.class_embedder = nn.Embedding(3, dim)
        self.linear_in = nn.Linear(2, dim)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 2))

    def forward(self, x, t, classes):  # (B, 2), (B,), (B,) → velocity (B, 2)
        return self.layers(self.linear_in(x) + self.time_embedder(t) + self.class_embedder(classes))


def loss(seed):
    random = generator(seed)
    x_0, classes = draw_moons(512, random)
    classes[torch.rand(512, generator=random) < 0.15] = 2  # no class
    t, noise = FlowTimes("uniform").sample(512, random), torch.randn(512, 2, generator=random)
    predicted = toy_in_training(torch.lerp(x_0, noise, t[:, None]), t, classes)
    return flow_loss(predicted, noise - x_0, torch.ones(512, 1)), {}


torch.manual_seed(0)
toy_in_training = Toy()
recipe = Recipe(steps=2500, learning_rate=3e-3, warmup=50, ema=0.99, dtype="float32")
with tempfile.TemporaryDirectory() as folder:
    toy = train(toy_in_training, loss, recipe, folder, log_every=25, progress=False)  # the averaged weights
    rows = read_rows(Path(folder) / "loss.csv")

figure, ax = plt.subplots(figsize=(7, 2.3))
ax.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows])
ax.set(title=f"Trained in {float(rows[-1]['seconds']):.0f} seconds", xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()

# %% [markdown]
# The loss does not go to zero, and need not: what remains is the variance of the velocities of all paths through a
# point.
#
# ## Straight paths, bent flow
#
# Left: what the network is trained on, straight lines from noise (grey) to data, which cross everywhere. Right: what it
# learns from them. A flow has one velocity at each point and time, so its paths never cross at the same time; they
# start straight towards the mean of the data, and bend where the moons part.

# %%
_ = torch.set_grad_enabled(False)
random = torch.Generator().manual_seed(1)
x_0, classes = draw_moons(300, random)
noise = torch.randn(300, 2, generator=random)


def toy_velocity(classes, guidance_scale=1.0):
    """(x, t) → guided velocity of the toy, for `euler_sample`."""

    def velocity(x, t):
        conditional, unconditional = (toy(x, t.expand(len(x)), c) for c in (classes, torch.full_like(classes, 2)))
        return guided_velocity(conditional, unconditional, guidance_scale)

    return velocity


def toy_path(steps, shift=1.0, rule="official", classes=classes, guidance_scale=1.0):
    """All points that the sampler visits from `noise`: (steps + 1, 300, 2)."""
    visited = [noise]
    euler_sample(toy_velocity(classes, guidance_scale), noise, flow_schedule(steps, shift, rule),
                 callback=lambda step, t, x: visited.append(x))  # fmt: skip
    return torch.stack(visited)


paths = toy_path(100)
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
for ax, (title, lines) in zip(
    axes, {"Training: lines": torch.stack([noise, x_0]), "Sampling: the learned flow": paths}.items(), strict=True
):
    for i in range(90):
        ax.plot(*lines[:, i].T, color=COLOURS[classes[i]], lw=0.6, alpha=0.6)
    ax.scatter(*lines[0, :90].T, s=6, color="0.5", zorder=3, label="noise, t = 1")
    for c in (0, 1):
        chosen = classes[:90] == c
        ax.scatter(*lines[-1, :90][chosen].T, s=8, color=COLOURS[c], zorder=4, label=f"class {c}, t = 0")
    ax.set(title=title, xlabel="x", ylabel="y", xlim=(-3.2, 3.2), ylim=(-2.6, 2.6), aspect="equal")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# ## Schedules
#
# Sampling visits times from 1 to 0. An even spacing is *shifted* towards the noise,
# $t \leftarrow s\,t / (1 + (s-1)\,t)$. Thousands of latents carry the same layout, and together they reveal it through
# a lot of noise. So the layout is decided at times close to 1, and that is where steps are needed; the released models
# use s = 5 or 10. diffusers shifts its end point once and then everything again, so that its last step is tiny and the
# earlier ones are longer. Left: the times. Right: the length of each step.

# %%
steps = 16
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.2))
for shift, colour in zip((1, 3, 5, 10), COLOURS, strict=False):
    left.plot(flow_schedule(steps, shift), "o-", ms=3, color=colour, label=f"shift {shift}")
left.set(title="Shift (official schedule)", xlabel="step", ylabel="flow time t")
left.legend(fontsize=8)
for rule, colour in (("official", COLOURS[2]), ("diffusers", COLOURS[6])):
    schedule = flow_schedule(steps, 5, rule)
    middle.plot(schedule, "o-", ms=3, color=colour, label=f"{rule}: last from {schedule[-2]:.3f}")
    right.plot(range(1, steps + 1), -schedule.diff(), "o-", ms=3, color=colour, label=rule)
middle.set(title="Two schedules, shift 5", xlabel="step", ylabel="flow time t")
right.set(title="Length of each step, shift 5", xlabel="step", ylabel="Δt", yscale="log")
right.minorticks_off()
right.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
middle.legend(fontsize=8)
right.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# ## Few steps
#
# Euler's method follows the velocity at the beginning of each step in a straight line, so it errs where paths bend. A
# single step takes every point to the mean of its class: at $t = 1$ nothing of the data is visible, and that is where
# the mean velocity leads. With a few steps the points fall short of the moons. The curves show the mean distance to the
# end points of 1,000 steps: half the step gives half the error, which is order 1. (A method of order 2 is in [notebook
# 6](06_change_it.ipynb).)

# %%
exact = toy_path(1000)[-1]
counts = (1, 2, 4, 8, 16, 32, 64)
figure = plt.figure(figsize=(10, 3.7))
scatter, curves = figure.subfigures(1, 2, width_ratios=[1.15, 1])
for ax, steps in zip(scatter.subplots(2, 2).flatten(), (1, 2, 4, 16), strict=True):
    ends = toy_path(steps)[-1]
    for c in (0, 1):
        ax.scatter(*ends[classes == c].T, s=4, color=COLOURS[c])
    ax.set(title=f"{steps} step{'s' * (steps > 1)}", xlim=(-2.7, 2.7), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
ax = curves.subplots()
for (shift, rule), colour in zip(((1, "official"), (3, "official"), (3, "diffusers")), COLOURS, strict=False):
    errors = [float((toy_path(steps, shift, rule)[-1] - exact).norm(dim=-1).mean()) for steps in counts]
    ax.plot(counts, errors, "o-", ms=4, color=colour, label=f"{rule}, shift {shift}")
ax.plot(counts, [1.0 / n for n in counts], "k:", lw=1, label="1 / steps")
ax.set(title="Distance to 1,000 steps", xlabel="steps", ylabel="mean distance", xscale="log", yscale="log")
ax.minorticks_off()
ax.set_xticks(counts, counts)
ax.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Guidance
#
# $v_u + w\,(v_c - v_u)$: $w = 0$ ignores the class, $w = 1$ is the class as it was learned, $w > 1$ extrapolates. All
# points below (green) are sampled for class 0 (grey in the background, blue in the figures above). Too much guidance
# loses diversity, and finally leaves the data.

# %%
scales = (0, 1, 2, 4, 8)
figure, axes = plt.subplots(1, len(scales), figsize=(10, 2.2), sharey=True)
for ax, scale in zip(axes, scales, strict=True):
    ends = toy_path(50, classes=torch.zeros_like(classes), guidance_scale=scale)[-1]
    ax.scatter(*x_0[classes == 0].T, s=5, color="0.8")
    ax.scatter(*ends.T, s=4, color=COLOURS[2])
    ax.set(title=f"w = {scale}", xlim=(-3.4, 2.9), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
axes[0].set_ylabel("class 0")
plt.show()

# %% [markdown]
# ## The same on videos
#
# Now `nano`. First guidance: 0 ignores the prompt, 1 is the prompt as it was learned. With 2, `nano`'s default, the
# circle is larger. Then come artefacts: corners at 4, and at 8 hardly a circle is left.

# %%
pipe = Pipeline.load("nano", dtype=torch.float32)
prompt, seed = "a red circle moves right", 6
scales = (0.0, 1.0, 2.0, 4.0, 8.0)
videos = {
    f"guidance {w:g}": pipe(prompt, seed=seed, guidance_scale=w, num_inference_steps=25, progress=False)[0] for w in scales
}
grid(videos, columns=6, title=f"“{prompt}”, the same noise, 25 steps")

# %% [markdown]
# **Few steps.** One step superimposes many videos that fit the prompt; with two, a second object still hangs above the
# circle; with four there is one circle, and from eight on, on another background, it hardly changes. The curves show
# the distance of the latents to those of 100 steps, for both schedules. diffusers' last step is tiny, so that two steps
# are hardly better than one; with many steps the schedules differ little.

# %%
reference = pipe(prompt, seed=seed, num_inference_steps=100, output_type="latents", progress=False)
counts = (1, 2, 4, 8, 16, 32)
results = {}
for rule in ("official", "diffusers"):
    for steps in counts:
        results[rule, steps] = pipe(
            prompt, seed=seed, num_inference_steps=steps, schedule=rule, output_type="latents", progress=False
        )
few = {f"{n} step{'s' * (n > 1)}": pipe.decode(results["official", n])[0] for n in counts[:5]}
grid(few, columns=6, title="Official schedule")
figure, ax = plt.subplots(figsize=(6, 3))
for rule in ("official", "diffusers"):
    errors = [float((results[rule, n] - reference).norm() / reference.norm()) for n in counts]
    ax.plot(counts, errors, "o-", label=rule)
ax.set(title="Latents against those of 100 steps", xlabel="steps", ylabel="relative distance", xscale="log", yscale="log")
ax.minorticks_off()
ax.set_xticks(counts, counts)
ax.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
ax.legend()
plt.show()

# %% [markdown]
# ## How many prompts are followed?
#
# One video proves little, but `nano`'s world can be measured: [`kandinsky5/nano/judge.py`](../kandinsky5/nano/judge.py)
# finds objects, colours, shapes and motions in a clip, and says whether *everything* in the prompt is true of it. Below
# is the share of 24 prompts for which it is, for several guidance scales, shifts and numbers of steps. The bars are
# intervals of 95 %: with 24 prompts they are wide, so look at large differences only.

# %%
pipe = Pipeline.load("nano")
asked = [sample_prompt("seen, English", i, seed=5)[1] for i in range(24)]
print(f"such as “{asked[0].text}”, “{asked[1].text}”")


def obeyed(**options):
    """In how many of the clips everything is as the prompt says."""
    clips = pipe([said.text for said in asked], progress=False, **options)
    return sum(score(judge_clip(clip.numpy()), said)["all"] for clip, said in zip(clips, asked, strict=True))


sweeps = {
    "guidance scale (12 steps, shift 3)": {w: {"guidance_scale": w, "num_inference_steps": 12} for w in (0, 1, 2, 4, 8)},
    "shift (4 steps, guidance 2)": {s: {"shift": s, "num_inference_steps": 4} for s in (0.3, 1, 3, 10)},
    "steps (guidance 2, shift 3)": {n: {"num_inference_steps": n} for n in (1, 2, 4, 8, 16)},
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
for ax, (name, settings) in zip(axes, sweeps.items(), strict=True):
    right = [obeyed(**options) for options in settings.values()]
    low, high = zip(*(wilson(count, len(asked)) for count in right), strict=True)
    shares = [count / len(asked) for count in right]
    ax.vlines(range(len(shares)), low, high, color=COLOURS[0], alpha=0.35, lw=4)
    ax.plot(shares, "o-", color=COLOURS[0])
    ax.set(xlabel=name, ylim=(0, 1.02))
    ax.set_xticks(range(len(shares)), list(settings))
axes[0].set_ylabel("share of prompts followed")
plt.show()

# %% [markdown]
# With guidance 0 no prompt is followed, with 1 to 4 most are, with 8 fewer than half. Four steps need a shift of 1 or
# 3: at 0.3 and at 10 fewer prompts are followed. One step is never enough, two rarely; with four about nine in ten
# prompts are followed, from eight on nearly all.
#
# The released *distilled* checkpoints need only 16 steps and no guidance: there, the network was trained further to
# predict the result of many guided steps of its teacher
# ([`kandinsky5/training/distill.py`](../kandinsky5/training/distill.py), `step_target`, `guided_target`).
#
# **Try:** other moons; `FlowTimes("logit-normal", mean=0.5)` for the toy; a network that predicts $x_0$ instead of the
# velocity ($v = (x_t - x_0)/t$); `schedule="diffusers"` in the sweep over steps. Next: [change it](06_change_it.ipynb).
