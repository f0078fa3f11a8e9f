# %% [markdown]
# # 7 · Teach it a word
#
# **At the end you will have seen a LoRA from both sides: as a folder of clips and captions that goes in, and as two thin
# matrices next to each Linear that come out, with a weight to turn them up and down.**
#
# `nano` knows seven motions, and bouncing is none of them: it draws another one, without an error. The training itself takes a
# quarter of an hour and is one command ([`docs/teach-a-word.md`](../docs/teach-a-word.md)); here we look at what it reads and at what it made.

# %%
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from show import grid

from kandinsky5 import Pipeline
from kandinsky5.extras import lora
from kandinsky5.nano.evaluate import sample_prompt
from kandinsky5.nano.judge import judge_clip, score
from kandinsky5.training.data import Clips
from kandinsky5.training.folder import ClipSettings, describe_files

pipe = Pipeline.load("nano", dtype="float32")
grid({text: pipe(text, progress=False)[0] for text in ("a big red circle bounces", "a yellow triangle bounces")})

# %% [markdown]
# ## What goes in
#
# Real files: mp4 films, each with its caption in a text file of the same name. In two of three something bounces, the others show what `nano`
# knows, so that it does not forget it. Each film has six takes of its caption, which become six clips (`per_file`): the model
# is to learn how things bounce, not where they did.

# %%
folder = Path(tempfile.mkdtemp())
draw = [sys.executable, "../docs/draw_bounces.py", str(folder / "bounces"), "--count", "6"]
print(subprocess.run(draw, check=True, capture_output=True, text=True).stdout)
clips = Clips.open(folder / "bounces", pipe.config, ClipSettings.of(pipe.config, per_file=6), progress=False)
print(describe_files(clips.clips, clips.left_out))
grid({f"take {i + 1}: {clip.caption}": clip.read() for i, clip in enumerate(clips.clips[:3])})

# %% [markdown]
# The VAE and the text encoders see each clip and each caption once. Their outputs go into a cache: of a clip the mean
# and the log-variance of its latents, so that every step can draw its own sample. `nano` was trained on the means, so its LoRA
# is too. From then on the DiT trains without VAE and text encoders. A batch depends on nothing but its seed: run, step, part of
# the step.

# %%
clips = replace(clips.encode(pipe.vae, pipe.text_encoder, folder / "cache", "nano", progress=False), means=True)
batch = clips.batch([0, 0, 0], size=4)
print("latents", tuple(batch.latents.shape), "text", tuple(batch.features.text.shape))
assert torch.equal(batch.latents, clips.batch([0, 0, 0], size=4).latents)

# %% [markdown]
# ## What is trained
#
# Next to each of the ten Linears of a block, $W$, stands a product of two thin matrices, so that the block computes
# $W x + \frac{\alpha}{r} B A x$. $A$ is random, $B$ is zero: at first nothing changes. Only $A$ and $B$ get gradients.

# %%
updates = lora.create(pipe.dit, rank=32, alpha=32)
trained, frozen = (sum(p.numel() for p in model.parameters()) for model in (updates, pipe.dit))
print(f"{sum(1 for _ in updates.updates())} Linears, {trained:,} parameters are trained, {frozen:,} stay as they are")

# %% [markdown]
# ## What comes out
#
# The LoRA of [the lesson](../docs/teach-a-word.md), trained on 200 such films. Its weight is a number that one chooses when sampling: 0 is
# the base model, 1 is what was trained, between them lies a mixture and beyond them too much of a good thing.

# %%
pipe.load_lora("../docs/teach-a-word/bounce.safetensors")
prompts = ["a big red circle bounces on a white background", "a small cyan square bounces on a grey background"]
for weight in (0.0, 0.5, 1.0, 1.5):
    pipe.set_lora(weight)
    videos = pipe(prompts, seed=0, progress=False)
    grid(dict(zip((f"{weight:g}: {prompt}" for prompt in prompts), videos, strict=True)))

# %% [markdown]
# ## Did it learn the word, and what did it cost?
#
# The judge follows an object's place from frame to frame: up evenly, and down again. It has learned nothing. Eight prompts of each kind are few: the page has more.


# %%
def right(name: str, count: int = 8) -> float:
    """The share of `count` clips of a set of the judge in which everything is right."""
    captions = [sample_prompt(name, i)[1] for i in range(count)]
    videos = pipe([caption.text for caption in captions], seed=0, progress=False).numpy()
    return float(np.mean([score(judge_clip(v), c)["all"] for v, c in zip(videos, captions, strict=True)]))


for weight in (0.0, 1.0):
    pipe.set_lora(weight)
    print(f"weight {weight:g}: bouncing {right('bounce'):.0%}, what nano knows {right('seen, English'):.0%}")
pipe.unload_lora()

# %% [markdown]
# **Try:** another motion, such as "circles", or a shape: a ring, a cross, a star. Draw it in
# [`world.py`](../kandinsky5/nano/world.py), let [`draw_bounces.py`](../docs/draw_bounces.py) write the clips, train, and look. Or
# train on bouncing alone, without what `nano` knows: what does it forget? Or with `--rank 2`: how thin can the
# matrices be?
