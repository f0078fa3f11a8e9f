"""What finetune says before a run: what it would train on and need; and what it writes after it: results and a card."""

import math
import os
import re
import shlex
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kandinsky5 import __version__, checkpoint
from kandinsky5.config import DiTConfig, PipelineConfig
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.files import write_text
from kandinsky5.runtime.device import choose_device, choose_dtype
from kandinsky5.runtime.memory import free_memory, vae_memory
from kandinsky5.screen import printable
from kandinsky5.tensor_files import DTYPES
from kandinsky5.training import spread
from kandinsky5.training.curves import read_rows
from kandinsky5.training.folder import describe_files
from kandinsky5.training.job import Job
from kandinsky5.training.recipe import Recipe
from kandinsky5.training.state import load_progress

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks


def describe(job: Job) -> str:
    """The table of --check: files, buckets, what is left out, tokens, and memory as computed, of each process."""
    clips, recipe, options, ranks = job.clips, job.recipe, job.options, job.ranks
    training, held = clips.hold_out(options.hold_out)
    buckets = Counter((clip.num_frames, *clip.size) for clip in clips.clips)
    files = len({clip.content for clip in clips.clips})
    lines = [
        describe_files(clips.clips, clips.left_out),
        "",
        f"{len(clips.clips):,} clips of {files:,} files, {len(clips.left_out):,} files left out; "
        f"{len(held.clips):,} clips held out",
        "",
        f"{'frames':>6} {'height':>6} {'width':>6} {'clips':>7} {'tokens per step':>15}   GB to encode    to train",
    ]
    for bucket, count in sorted(buckets.items()):
        frames, height, width = bucket
        each_step = tokens_of(clips.config, *bucket) * options.batch_size * recipe.accumulate
        gigabytes = " ".join(f"{needed / 1e9:11.1f}" for needed in memory_of(bucket, job))
        lines.append(f"{frames:6} {height:6} {width:6} {count:7,} {each_step:15,}    {gigabytes}")
    epochs = recipe.steps * recipe.accumulate * options.batch_size / max(len(training.clips), 1)
    lines += ["", f"{recipe.steps:,} steps see each clip about {epochs:,.1f} times. Memory is computed, not measured."]
    lines.append(find_misfit(job) or "It fits into the memory that is free here.")
    most = max(buckets, key=lambda bucket: tokens_of(clips.config, *bucket))
    tokens, batch = tokens_of(clips.config, *most), options.batch_size * recipe.accumulate
    passes = 2 + bool(options.full) + bool(options.checkpointing)  # the gradient of activations takes another forward
    operations = passes * batch * forward_work(clips.config.dit, tokens)
    rate = device_rate(clips.config.dit, options.device, recipe.dtype) * (ranks.data * ranks.sequence if ranks else 1)
    seconds = operations / rate
    lines.append(
        f"A step of the largest clips takes {operations:.1e} operations: at least {seconds:.2g} s at the rate of a "
        f"large matrix product here, {recipe.steps * seconds / 3600:.2g} hours in all (computed from that rate)."
    )
    return "\n".join(lines)


def memory_of(bucket: tuple[int, int, int], job: Job) -> tuple[float, float]:
    """Bytes on each device to encode a clip of (frames, height, width) and to train on its share of a batch of them."""
    vae, dtype = job.config.vae, getattr(torch, job.recipe.dtype)
    encoding = vae_memory(vae, vae.latent_grid(*bucket), dtype, job.config.tiling)  # of decoding: the same grids
    rows = -(-job.options.batch_size // spread.own_rows(job.recipe.accumulate, job.ranks)[1])
    return encoding, memory(job.config.dit, tokens_of(job.config, *bucket) * rows, job.recipe, job.options, job.ranks)


def find_misfit(job: Job) -> str:
    """One line if the largest clips need more memory than is free on the device, else empty."""
    device = choose_device(job.options.device)
    needs = [memory_of(bucket, job) for bucket in {(clip.num_frames, *clip.size) for clip in job.clips.clips}]
    encoding, training = max(need[0] for need in needs), max(need[1] for need in needs)
    free = free_memory(device)
    if free is None or max(encoding, training) <= free:
        return ""
    doing, needed = ("encoding a clip", encoding) if encoding > free else ("training", training)
    return (
        f"It does not fit: {doing} takes about {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on {device}: "
        "choose smaller --sizes, fewer --num-frames or a smaller --batch-size"
    )


def forward_work(config: DiTConfig, tokens: int) -> float:
    """Floating-point operations of the visual blocks for one clip of so many tokens, with full attention.

    Left out are what runs over text and the thin rest, a few per cent of the released models.
    """
    linears = 2 * (6 * config.dim**2 + 2 * config.dim * config.ff_dim)  # q, k, v, out; cross q, out; feed-forward
    return float(config.num_visual_blocks * tokens * (linears + 4 * tokens * config.dim))


def device_rate(config: DiTConfig, device: str, dtype: str) -> float:
    """Operations per second of a product of the feed-forward's size, measured on the device just now."""
    place = choose_device(device)
    how: dict[str, Any] = {"device": place, "dtype": choose_dtype(dtype, place)}
    x, weight = torch.ones(1024, config.dim, **how), torch.ones(config.dim, config.ff_dim, **how)
    best = math.inf
    for _ in range(4):  # the first is slow
        begun = time.perf_counter()
        (x @ weight).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2 * x.shape[0] * weight.numel() / best


def tokens_of(config: PipelineConfig, frames: int, height: int, width: int) -> int:
    """Video tokens of one clip."""
    return math.prod(config.vae.latent_grid(frames, height, width)) // math.prod(config.dit.patch_size)


def memory(config: DiTConfig, tokens: float, recipe: Recipe, options: Namespace, ranks: "Ranks | None" = None) -> float:
    """Bytes on the device while a DiT is trained on so many tokens at once, next to VAE and text models at rest.

    ranks: those that share the tokens, or the weights, of which each has its share and two blocks whole.
    """
    with checkpoint.without_weights():
        dit = DiT(config)
    count = sum(p.numel() for p in dit.parameters())
    block = sum(p.numel() for p in dit.visual_blocks[0].parameters())
    each = 4 if recipe.dtype == "float32" else 2
    tokens /= ranks.sequence if ranks else 1
    shares, whole = (ranks.data * ranks.sequence, 2 * block) if ranks and ranks.shard else (1, 0)
    # A visual block keeps for its gradient 64 bytes per token and channel in bf16 (computed, Lite's proportions), of
    # which 24 are the feed-forward's; in the backward pass two gradients of its hidden layer come on top.
    inside = tokens * (5 * config.dim * 4 + 10 * config.dim * each + 5 * config.ff_dim * each)
    between = tokens * config.dim * each * config.num_visual_blocks
    activations = between + inside if options.checkpointing else inside * config.num_visual_blocks
    copies = 4 * (4 if not recipe.ema else 5)  # weight, gradient, AdamW's two averages, and EMA's; float32
    if options.full:
        trained = sum(p.numel() for name, p in dit.named_parameters() if re.search(options.modules or "", name))
        return (4 * (count - trained) + trained * copies) / shares + 4 * whole + activations
    frozen = each * (count / shares + whole)
    if options.offload == "blocks":
        frozen = each * (count - (config.num_visual_blocks - 2) * block)
    if options.quantize:
        frozen *= 0.55
    linears = [m for name, m in dit.named_modules() if isinstance(m, nn.Linear) and re.search(options.modules, name)]
    trained = options.rank * sum(linear.in_features + linear.out_features for linear in linears)
    return frozen + trained * copies + activations


def write_results(job: Job, model: nn.Module) -> None:
    """The LoRA or checkpoint, its card, and on the screen the command that samples with it."""
    options = job.options
    facts = {
        "base": job.config.name,
        "base_fingerprint": checkpoint.fingerprint(job.folder),
        "steps": str(options.steps),
        "data": job.clips.digest,
        "recipe": recipe_in_words(job.recipe, options),
        "made_by": f"kandinsky5 {__version__}",
    }
    command = ["python", "sample.py", job.clips.clips[0].caption.removeprefix(options.trigger).strip()]
    if isinstance(model, lora.LoRA):
        out = options.to / "lora.safetensors"
        lora.save(model, out, {**facts, "rank": str(options.rank)})
        if options.export:
            lora.export(out, options.to)
        command += ["--checkpoint", str(options.checkpoint), "--lora", str(out)]
    else:
        assert isinstance(model, DiT)
        out = options.to / "checkpoint"
        if not out.exists():
            save_whole(out, job, model)
        command[2] = f"{options.trigger} {command[2]}".strip()
        command += ["--checkpoint", str(out)]
    command += size_options(job)
    write_card(job, facts, shlex.join(command))
    print(printable(f"{out}: {options.steps:,} steps on {len(job.clips.clips):,} clips. Sample with it:"))
    print(f"    {printable(shlex.join(command))}")


def recipe_in_words(recipe: Recipe, options: Namespace) -> str:
    """One line: what a reader needs to repeat it."""
    what = "all weights" if options.full else f"LoRA of rank {options.rank}, alpha {options.alpha:g}"
    times = f"logit(t) of mean {options.logit_mean:g} and deviation {options.logit_std:g}, shift {options.shift:g}"
    return (
        f"{what}; AdamW, learning rate {recipe.learning_rate:g}, {recipe.steps} steps of "
        f"{options.batch_size * recipe.accumulate} clips, {recipe.dtype}, seed {recipe.seed}; {times}; latents: "
        f"{options.latents}"
    )


def size_options(job: Job) -> list[str]:
    """Options of sample.py for the size and length that most clips have, where they are not the checkpoint's."""
    (frames, height, width), _ = Counter((c.num_frames, *c.size) for c in job.clips.clips).most_common(1)[0]
    own = job.config.sampling
    given = {"--num-frames": (frames, own.num_frames), "--height": (height, own.height), "--width": (width, own.width)}
    return [part for option, (ours, theirs) in given.items() if ours != theirs for part in (option, str(ours))]


def save_whole(out: Path, job: Job, dit: DiT) -> None:
    """A checkpoint folder with this DiT, in the precision of the one it came from, which lends the other models."""
    folder, config = job.folder, job.config
    stored = checkpoint.find_weights(folder, "dit", config.base).tensors
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(DTYPES[stored[name].dtype])
    others = folder / config.base if config.base else folder
    base = os.path.relpath(others.resolve(), out.resolve())
    checkpoint.save_checkpoint(out, replace(config, base=base), {"dit": dit}, {})


CARD = """\
# {name}

{what}

- **Base**: {base} ({base_fingerprint:.16})
- **Data**: {count:,} clips of {files:,} files, {held:,} clips held out; digest {data:.16}
- **Recipe**: {recipe}
- **Trained**: {steps} steps in {hours:.2f} hours; loss {loss}{held_out}
- **Trigger**: {trigger}
- **Made by**: {made_by}

```bash
{command}
```
"""


def write_card(job: Job, facts: dict[str, str], command: str) -> None:
    """The model card of a run, README.md in its folder."""
    clips, options = job.clips, job.options
    rows, samples = read_rows(options.to / "loss.csv"), read_rows(options.to / "samples.csv")
    held_out = [row["loss"] for row in samples if row.get("loss")]
    text = CARD.format(
        name=printable(options.to.name, 100),
        what="A fine-tuned DiT." if options.full else "A LoRA.",
        count=len(clips.clips),
        files=len({clip.content for clip in clips.clips}),
        held=len(clips.hold_out(options.hold_out)[1].clips),
        hours=load_progress(options.to)[1] / 3600,
        loss=f"from {rows[0]['loss']} to {rows[-1]['loss']}",
        held_out=f", held-out {held_out[-1]}" if held_out else "",
        trigger=printable(options.trigger, 200) or "none",
        command=command,
        **{**facts, "steps": f"{int(facts['steps']):,}"},
    )
    write_text(options.to / "README.md", text)
