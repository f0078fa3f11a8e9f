"""What a DiT is fine-tuned on: a folder of clips, encoded once into a cache, in batches that depend only on a seed.

    folder ─ find_clips ─> clips ─ encode (VAE, text encoders) ─> cache ─ batch(seed) ─> latents, features

The cache holds the VAE's mean and log-variance of each clip, so that every batch draws its latents anew, and the text
features of each caption. An entry is named by a hash of all that it depends on, and written completely or not at all:
the same command resumes after a kill, and what is there already is verified. After `encode` the models are not needed.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kandinsky5 import screen, vae_tiling, video_io
from kandinsky5.checkpoint import save_weights
from kandinsky5.config import PipelineConfig
from kandinsky5.files import check_free_space, locked, make_folder
from kandinsky5.runtime import launch
from kandinsky5.runtime.memory import during
from kandinsky5.runtime.offload import awake, find_place
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.training.folder import REMEDY, Clip, ClipSettings, find_clips
from kandinsky5.training.loop import generator
from kandinsky5.vae import VAE, Posterior


class ClipBatch(NamedTuple):
    """B clips of one size, on the CPU."""

    latents: Tensor  # (B, T, h, w, 16) scaled, float32
    first_frame: Tensor  # (B, 1, h, w, 16) of frame 0 alone, as the pipeline encodes an image; scaled, float32
    features: TextFeatures  # text (B, S, dim), padded to the longest
    clips: tuple[Clip, ...]  # B


@dataclass(frozen=True)
class Clips:
    """Clips of a folder; `encode` comes before `batch`."""

    clips: tuple[Clip, ...]
    left_out: dict[str, str]  # file: why
    config: PipelineConfig
    cache: Path | None = None
    entries: tuple[Path, ...] = ()  # in the cache, of each clip
    texts: tuple[Path, ...] = ()  # likewise
    empty_text: Path | None = None
    means: bool = False  # whether batches take the mean of each clip's latents instead of a sample

    @classmethod
    def open(
        cls, folder: str | Path, config: PipelineConfig, settings: ClipSettings, decode: bool = False,
        progress: bool = True,
    ) -> "Clips":  # fmt: skip
        """The clips of `folder`; nothing is encoded yet. decode: read each once, to find damaged ones now.

        Raises ValueError as `find_clips`.
        """
        found = find_clips(Path(folder), settings, decode, progress)
        for name, reason in found.left_out.items():
            screen.say(f"left out: {screen.printable(name, 200)} {reason}")
        return cls(found.clips, found.left_out, config)

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on: contents, cuts, sizes and captions; not of names."""
        parts = sorted(repr((*_identity(clip), clip.caption)) for clip in self.clips)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(
        self, vae: VAE, text_encoder: TextEncoder, cache: str | Path, origin: str, progress: bool = True,
        rank: int = 0, ranks: int = 1,
    ) -> "Clips":  # fmt: skip
        """The same clips with everything encoded in `cache`, a folder; what is there already is verified, not redone.

        origin: of the weights, such as `checkpoint.fingerprint(folder, ("vae", "qwen", "clip"))`.
        rank, ranks: one of that many processes, which encode their shares at the same time and wait for each other.
        Raises ValueError for a damaged clip and while another process encodes there, OSError for a full disk.
        """
        cache = Path(cache)
        make_folder(cache)
        texts = [*dict.fromkeys(clip.caption for clip in self.clips), ""]
        clip_names = [cache / f"{_key(origin, vae, repr(_identity(c)), self.config)}.safetensors" for c in self.clips]
        text_names = {t: cache / f"{_key(origin, text_encoder, t, self.config)}.safetensors" for t in texts}
        refusal = f"another process is encoding in {cache}: wait for it, or choose another folder"
        own, show = slice(rank, None, ranks), partial(screen.bar, show=progress)
        with locked(cache, refusal) if rank == 0 else contextlib.nullcontext():
            for left in cache.glob(".*.safetensors") if rank == 0 else ():  # half written by a run that was killed
                left.unlink()
            if ranks > 1:
                launch.check_shared(cache)
            clips = list(zip(self.clips, clip_names, strict=True))[own]
            with show(len(clips), "encoding clips", "clip") as bar, awake(vae), torch.no_grad():
                for clip, path in clips:
                    _keep(path, partial(encode_clip, vae, clip, self.config))
                    bar.update()
            models, mine = (text_encoder.qwen, text_encoder.clip), texts[own]
            with show(len(mine), "encoding captions", "text") as bar, awake(*models), torch.no_grad():
                for text in mine:
                    _keep(text_names[text], partial(encode_caption, text_encoder, text))
                    bar.update()
            if ranks > 1:
                launch.meet()
        written = sum(path.stat().st_size for path in {*clip_names, *text_names.values()})
        if progress:
            screen.say(f"{cache}: {len(self.clips):,} clips and {len(texts) - 1:,} captions, {written:,} bytes")
        places = tuple(text_names[clip.caption] for clip in self.clips)
        return replace(self, cache=cache, entries=tuple(clip_names), texts=places, empty_text=text_names[""])

    def empty(self) -> TextFeatures:
        """Features of the empty prompt, (1, …), which caption dropout needs."""
        assert self.empty_text, "encode comes first"
        return read_features([self.empty_text])

    def hold_out(self, share: float) -> tuple["Clips", "Clips"]:
        """Clips for training, and a share of the files, at least one if it is above 0 and there are two, held out.

        Which files depends on their contents alone, and all clips of one file stay together. Raises ValueError for a
        share outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueError(f"--hold-out {share:.0%}: give a share from 0 to 99%, as some must be left to train on")
        files = sorted({clip.content for clip in self.clips})
        count = min(max(round(share * len(files)), 1), len(files) - 1) if share > 0 else 0
        held = set(files[:count])
        return self._select(lambda clip: clip.content not in held), self._select(lambda clip: clip.content in held)

    def _select(self, keep: Callable[[Clip], bool]) -> "Clips":
        rows = [i for i, clip in enumerate(self.clips) if keep(clip)]
        entries, texts = (tuple(x[i] for i in rows if x) for x in (self.entries, self.texts))
        return replace(self, clips=tuple(self.clips[i] for i in rows), entries=entries, texts=texts)

    # ------------------------------------------------------------------------------------------ batches

    def batch(self, seed: list[int], size: int, accumulate: int = 1, rank: int = 0, ranks: int = 1) -> ClipBatch:
        """The batch of a `seed` as the training loop gives it: run, step, and which of the step's `accumulate` batches.

        Every epoch takes each clip once, in an order that depends on the run's seed, in batches of one size of clip,
        the last of which begins again with its first. rank, ranks: one of that many processes gets its rows of the
        same batch: together, and in any number, they train on the same data with the same noise.
        """
        run, step, part = seed
        chosen = self.order(run, size, step * accumulate + part)
        random, mine = generator([*seed, 1]), slice(rank, None, ranks)
        latents, first = read_latents([self.entries[i] for i in chosen], self.config, None if self.means else random)
        features = read_features([self.texts[i] for i in chosen[mine]])
        return ClipBatch(latents[mine], first[mine], features, tuple(self.clips[i] for i in chosen[mine]))

    def order(self, seed: int, size: int, index: int) -> list[int]:
        """Which clips make up batch number `index` of a run: `size` of them, all of one shape."""
        shapes: dict[tuple, list[int]] = {}
        for i, clip in enumerate(self.clips):
            shapes.setdefault((clip.num_frames, *clip.size), []).append(i)
        per_epoch = sum(-(-len(rows) // size) for rows in shapes.values())
        epoch, number = divmod(index, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        batches: list[np.ndarray] = []
        for _, rows in sorted(shapes.items()):
            whole = -(-len(rows) // size) * size
            batches += list(np.resize(rng.permutation(rows), whole).reshape(-1, size))
        return batches[rng.permutation(per_epoch)[number]].tolist()


# ---------------------------------------------------------------------------------------------- encoding


@during("encoding the clips")
def encode_clip(vae: VAE, clip: Clip, config: PipelineConfig) -> dict[str, Tensor]:
    """Mean and log-variance (16, T, h, w) of a clip, and (16, 1, h, w) of its first frame alone, unscaled."""
    device, dtype = find_place(vae)
    try:
        video = video_io.from_uint8(clip.read()[None]).to(device, dtype)  # (1, 3, F, H, W)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from error
    whole = vae_tiling.encode(vae, video, config.tiling)
    first = vae_tiling.encode(vae, video[:, :, :1], config.tiling)
    parts = {"mean": whole.mean, "logvar": whole.logvar, "first_mean": first.mean, "first_logvar": first.logvar}
    return {name: part[0].cpu().contiguous() for name, part in parts.items()}


@during("encoding the captions")
def encode_caption(text_encoder: TextEncoder, caption: str) -> dict[str, Tensor]:
    """Features of one caption: text (S, dim), pooled (dim,). An image's caption too has the template of videos."""
    features = text_encoder.encode([caption])
    return {"text": features.text[0].cpu().contiguous(), "pooled": features.pooled[0].cpu().contiguous()}


def _identity(clip: Clip) -> tuple:
    return clip.content, clip.start, clip.size, clip.num_frames, clip.fps


def _key(origin: str, model: VAE | TextEncoder, what: str, config: PipelineConfig) -> str:
    """Name of an entry: a hash of the weights, of how they compute, and of what is encoded."""
    dtype = find_place(model)[1]
    how = (config.tiling,) if isinstance(model, VAE) else (model.template(), config.text.max_tokens)
    return hashlib.sha256(repr((type(model).__name__, origin, str(dtype), how, what)).encode()).hexdigest()


def _keep(path: Path, compute: Callable[[], dict[str, Tensor]]) -> None:
    """Write the tensors of `compute` to `path`, unless they are there whole. Raises OSError for a full disk."""
    if path.is_file() and _is_whole(path):
        return
    tensors = compute()
    check_free_space(path.parent, sum(t.nbytes for t in tensors.values()))
    save_weights(tensors, path, {"sha256": _checksum(tensors)})


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (file.metadata() or {}).get("sha256") == _checksum(tensors)
    except (SafetensorError, OSError):
        return False


def _checksum(tensors: dict[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def _read(path: Path, *names: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).float() for name in names}
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be read ({error}): run the same command again, which encodes it anew") from error


def read_latents(paths: list[Path], config: PipelineConfig, random: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Clips (B, T, h, w, 16) and their first frames (B, 1, h, w, 16), scaled, float32.

    random: samples the posteriors; without it they are their means.
    """
    entries = [_read(path, "mean", "logvar", "first_mean", "first_logvar") for path in paths]
    drawn = []
    for prefix in ("", "first_"):
        mean, logvar = (torch.stack([entry[prefix + name] for entry in entries]) for name in ("mean", "logvar"))
        noise = torch.randn(mean.shape, generator=random) if random else torch.zeros_like(mean)
        z = Posterior(mean, logvar).sample(noise)  # (B, 16, T, h, w)
        drawn.append((z * config.vae.scaling_factor).permute(0, 2, 3, 4, 1))
    return drawn[0], drawn[1]


def read_features(paths: list[Path]) -> TextFeatures:
    """The features of B captions, text (B, S, dim) padded to the longest."""
    entries = [_read(path, "text", "pooled") for path in paths]
    lengths = torch.tensor([len(entry["text"]) for entry in entries])
    longest = int(lengths.max())
    text = torch.stack([F.pad(entry["text"], (0, 0, 0, longest - len(entry["text"]))) for entry in entries])
    return TextFeatures(text, lengths, torch.stack([entry["pooled"] for entry in entries]))
