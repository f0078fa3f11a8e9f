"""From a prompt, or an image and a prompt, to a video: the whole of Kandinsky 5.0 in one call.

    prompt ─ text encoders ─> features ─┐
    seed ──> noise ─────────────────────┴─ Euler steps through the DiT ─> latents ─ VAE decoder ─> frames

What a user asks for becomes a `Request` (request.py), where every check is made; the stages below may trust it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kandinsky5 import checkpoint, sampler, vae_tiling, video_io
from kandinsky5.config import PipelineConfig
from kandinsky5.config_file import check_models_fit, load_config
from kandinsky5.dit import DiT
from kandinsky5.request import Image, Request, check_functions, check_sampled
from kandinsky5.runtime import fast, kernels, memory
from kandinsky5.runtime.compile import check_compile, compile_models
from kandinsky5.runtime.device import choose_device, choose_dtype, plain_defaults
from kandinsky5.runtime.heap import keep_freed_memory
from kandinsky5.runtime.loading import load_models
from kandinsky5.runtime.offload import awake, check_mode, find_place
from kandinsky5.runtime.pieces import in_pieces
from kandinsky5.sampler import Callback, euler_sample
from kandinsky5.screen import bar
from kandinsky5.text_encoder import TextEncoder, TextFeatures
from kandinsky5.tokenizer import Tokenizer
from kandinsky5.vae import VAE, Posterior
from kandinsky5.vae2d import VAE2D

if TYPE_CHECKING:
    from kandinsky5.runtime.parallel import Ranks

MAP: vae_tiling.Each = map  # how passes and windows run in one process: one after the other
Solver = Callable[..., Tensor]  # as sampler.euler_sample


class Pipeline:
    """The models of one checkpoint, ready to sample: `.dit`, `.vae`, `.text_encoder`, and their `.config`."""

    def __init__(
        self, config: PipelineConfig, dit: DiT, vae: VAE | VAE2D, text_encoder: TextEncoder,
        ranks: "Ranks | None" = None,
    ):  # fmt: skip
        self.config, self.ranks = config, ranks
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder
        self.loras: list = []  # of extras.lora.LoRA, by load_lora
        self._turns = [True]  # taken while a call runs; unlike a lock it can be copied and pickled

    @classmethod
    @plain_defaults()
    def load(
        cls, folder_or_preset: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
        attention: str = "auto", offload: str | None = None, compile: bool | str = False, tile_space: bool = False,
        quantize: str | None = None, ranks: "str | Ranks | None" = None,
    ) -> "Pipeline":  # fmt: skip
        """Load a native checkpoint folder (README: how to convert one), or a bundled model: "nano".

        device: "auto" is CUDA if there is a GPU, else the CPU, where weight files are mapped and not copied; "meta"
            checks names and shapes and loads nothing.
        dtype: "auto" is bfloat16 where the device computes in it natively, else float32.
        attention: how the DiT computes it, one of `kandinsky5.runtime.kernels.KERNELS`.
        offload: "model" keeps only the running model on the device, "blocks" only its running block (`offload.py`).
        compile: use torch.compile, slow at first; "auto", which commands take: on CUDA, if it can (`compile.py`).
        tile_space: let the VAE work in tiles of 256 pixels: less memory, not quite the same pixels (`vae_tiling.py`).
        quantize: "int8" rounds the weights of the DiT's and Qwen's blocks to 8 bits while they load (`quantize.py`).
        ranks: under torchrun, how processes share a video: "auto", "2x4" (guidance x sequence) or `parallel.Ranks`.
        Raises ValueError for invalid arguments, a folder in another layout, and weights that config.json does not fit.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        kernels.check_kernel(attention, device)
        folder = checkpoint.find_checkpoint(folder_or_preset)
        config = load_config(folder / "config.json")
        check_models_fit(config)
        if tile_space:
            config = replace(config, tiling=replace(config.tiling, space=True))
        if ranks is not None:
            from kandinsky5.runtime import parallel  # importing it takes half a second

            ranks = parallel.find_ranks(ranks, config, device)
        sharded = ranks is not None and ranks.shard
        compile = check_compile(compile, device, sharded)
        check_mode(offload, sharded)
        models = load_models(folder, config, device, dtype, offload, quantize, ranks)
        names = ("qwen_tokenizer", "clip_tokenizer")
        words, clip_words = (Tokenizer.load(checkpoint.find_part(folder, name, config.base) / name) for name in names)
        dit, vae, qwen, clip, *vision_and_head = models.values()
        text_encoder = TextEncoder(config.text, qwen, clip, words, clip_words, *vision_and_head)
        fast.install(dit, vae, device=device)
        kernels.install(dit, attention)
        kernels.install(text_encoder, "auto")
        if compile:
            compile_models(dit, vae, attention)
        return cls(config, dit, vae, text_encoder, ranks and ranks.spread(dit))

    @property
    def device(self) -> torch.device:
        """Where the models run, with offloading too; what comes out of the pipeline is on the CPU."""
        return find_place(self.dit)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the DiT; the latents of the sampler are float32 always."""
        return find_place(self.dit)[1]

    def __repr__(self) -> str:
        models = {"DiT": self.dit, "VAE": self.vae, "Qwen": self.text_encoder.qwen, "CLIP": self.text_encoder.clip}
        sizes = (f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:,.1f} M" for name, m in models.items())
        video, dtype = self.config.sampling, str(self.dtype).removeprefix("torch.")
        dtype += ", weights in int8," * any(p.dtype == torch.int8 for m in models.values() for p in m.parameters())
        return (
            f"Pipeline({self.config.name}: {' and '.join(self.config.tasks)}, {video.num_frames} "
            f"frame{'s' * (video.num_frames > 1)} of {video.height}x{video.width}; "
            f"parameters: {', '.join(sizes)}; {dtype} on {self.device})"
        )

    def __call__(
        self, prompt: str | list[str], image: Image | list | None = None,
        negative_prompt: str | list[str] | None = None, height: int | None = None, width: int | None = None,
        num_frames: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        shift: float | None = None, schedule: str = "official", step_skipping: Any = False,
        rope_scale: tuple[float, float, float] | None = None, seed: int | list[int] = 0, latents: Tensor | None = None,
        num_videos_per_prompt: int = 1, max_sequence_length: int | None = None, output_type: str = "uint8",
        callback: Callback | None = None, progress: bool = True, solver: Solver = euler_sample,
    ) -> Tensor:  # fmt: skip
        """Make one video per prompt, or `num_videos_per_prompt` of each. None means the preset's value.

        prompt, image, negative_prompt, seed: one for all prompts, or a list of one for each.
        image: path, bytes, open file, array or Pillow's: frame 0; without height and width the video has its shape.
        height, width: pixels, multiples of 16 (with NABLA 128); num_frames: 4k + 1.
        guidance_scale: 1 means one pass per step and no negative prompt. Below 1 it is applied as it stands.
        schedule: "official", or "diffusers" (sampler.flow_schedule); rope_scale: positions (T, H, W) are divided by it.
        step_skipping: True leaves the blocks out of about half the steps, by known ratios; or a file (magcache).
        seed: video i is drawn from seed + i (with a list, the j-th of prompt p from seed[p] + j), on the CPU in
            float32, so that neither device nor precision nor the rest of the batch changes it.
        latents: initial noise (B, T, H/8, W/8, 16) instead of the seed's. In image-to-video the same generator then
            samples the posterior of frame 0, so the seed's own noise as `latents` reproduces T2V but not I2V.
        callback: (step, t, latents) after each step; may return new latents, or False to stop and decode.
        solver: integrates from noise to latents, with the signature of `sampler.euler_sample`.

        Returns B = prompts × num_videos_per_prompt videos, those of one prompt adjacent, on the CPU:
        output_type "uint8" (B, F, H, W, 3), "float" the same in [0, 1], "latents" (B, T, H/8, W/8, 16) float32.
        Raises ValueError, in one line, for invalid requests, and while another call runs.
        """
        request = Request.resolve(
            self.config, prompt, image, negative_prompt, height, width, num_frames, num_inference_steps,
            guidance_scale, shift, schedule, step_skipping, rope_scale, seed, latents, num_videos_per_prompt,
            max_sequence_length, output_type,
        )  # fmt: skip
        return self.generate(request, callback, progress, solver)

    @plain_defaults()
    @torch.no_grad()
    def generate(
        self, request: Request, callback: Callback | None = None, progress: bool = True, solver: Solver = euler_sample
    ) -> Tensor:
        """The videos of a request, as `__call__` returns them: uint8 or float (B, F, H, W, 3), or latents.

        Raises ValueError where memory is too small, for NaN, and while another call runs.
        """
        check_functions(callback, progress, solver)
        with self._alone():
            shape = (request.batch, *request.latent_shape)
            memory.plan_steps(self.config.dit, self.dit, shape, request.guided, self.ranks)
            if request.output_type != "latents":
                self._check_decoding(shape, request.output_type)
            features = self.encode_text(request, progress)
            noise, generators = request.noise()
            image = self.encode_image(request, generators)
            latents = self.sample(request, features, noise, image, callback, progress, solver)
            if request.output_type == "latents":
                return _to_cpu(latents)
            return self.decode(latents, request.output_type, progress)

    @memory.during("loading a LoRA")
    def load_lora(self, file_or_folder: Any, weight: float = 1.0, trigger: bool = True) -> None:
        """Add a LoRA to the DiT, and the trigger phrase in it to every prompt. Raises ValueError if it does not fit."""
        from kandinsky5.extras import lora  # an extra: without it everything else works

        with self._alone():
            self.loras.append(lora.add(self.dit, lora.load(file_or_folder), weight, trigger=trigger))

    def set_lora(self, weight: float | list[float]) -> None:
        """Give all loaded LoRAs this weight, or each its own. Raises ValueError for too many or too few."""
        from kandinsky5.extras import lora

        lora.set_weights(self.loras, weight)

    def unload_lora(self) -> None:
        """Take all LoRAs off again."""
        from kandinsky5.extras import lora

        with self._alone():
            while self.loras:
                lora.remove(self.dit, self.loras.pop())

    @plain_defaults()
    def expand(self, prompt: str | list[str], image: Image | list | None = None, **how: Any) -> str | list[str]:
        """The prompt, or each of a list, as Qwen writes it out in detail. Raises as `extras.expand.expand_all` does."""
        from kandinsky5.extras import expand

        with self._alone():
            return expand.expand_all(self.text_encoder, self.config, prompt, image, **how)

    @memory.during("encoding text")
    def encode_text(self, request: Request, progress: bool = False) -> TextFeatures:
        """Features of the B prompts and, with guidance, of the B negative ones after them: text (2B, S, dim)."""
        start = "".join(one.before_prompt for one in self.loras)
        texts = [*(start + prompt for prompt in request.prompts), *(request.negative_prompts if request.guided else ())]
        seen = [*(request.qwen_images or ())]
        seen *= len(texts) // max(len(seen), 1)  # each with its prompt, and again with its negative one
        encoder = self.text_encoder
        models = (encoder.qwen, encoder.clip, *([encoder.vision] if encoder.vision and seen else []))
        memory.check_encoding(self.config, models, texts, request.max_sequence_length, seen)
        progressed = bar(len(texts), "encoding", "text", show=progress)
        with progressed, awake(*models):
            features = encoder.encode(texts, request.max_sequence_length, request.num_frames == 1, seen or None)
            progressed.update(len(texts))
        return features.repeat(request.num_videos_per_prompt)

    @memory.during("encoding the image")
    def encode_image(self, request: Request, generators: list[torch.Generator]) -> Tensor | None:
        """Clean latents of the images: each video's first frame, or the source of each edit; None without images.

        (B, 1, H/8, W/8, 16) float32.
        """
        if request.images is None:
            return None
        device, dtype = find_place(self.vae)
        video = video_io.from_uint8(torch.stack(request.images)[:, None]).to(device, dtype)  # (P or 1, 3, 1, H, W)
        with awake(self.vae):
            posteriors = [vae_tiling.encode(self.vae, one, self.config.tiling) for one in video.split(1)]
        mean = torch.cat([one.mean.float() for one in posteriors])  # (P or 1, 16, 1, h, w)
        logvar = torch.cat([one.logvar.float() for one in posteriors])
        if len(mean) > 1:
            mean, logvar = (x.repeat_interleave(request.num_videos_per_prompt, dim=0) for x in (mean, logvar))
        drawn = [torch.randn(mean[:1].shape, generator=one, dtype=torch.float32, device="cpu") for one in generators]
        z = Posterior(mean, logvar).sample(torch.cat(drawn).to(device))  # (B, 16, 1, h, w)
        return (z * self.config.vae.scaling_factor).permute(0, 2, 3, 4, 1)

    @memory.during("sampling")
    def sample(
        self, request: Request, features: TextFeatures, noise: Tensor, image: Tensor | None = None,
        callback: Callback | None = None, progress: bool = False, solver: Solver = euler_sample,
    ) -> Tensor:  # fmt: skip
        """Noise (B, T, h, w, 16) → latents, the same in float32, on the device. image: what `encode_image` gives."""
        device, dtype = find_place(self.dit)
        config, noise = self.config, noise.to(device)
        condition = sampler.build_condition(noise, image, config.dit.input_channels - noise.shape[-1], config.edits)
        first_frame = None if config.edits else image
        # With guidance a step asks for 2B velocities, in one pass or in two of B, which masks less padding.
        plan = memory.plan_steps(self.config.dit, self.dit, tuple(noise.shape), request.guided, self.ranks)
        passes, skips, each = [features], request.skips, MAP
        if request.guided and not plan.together:
            passes = [features.select(0, request.batch), features.select(request.batch, 2 * request.batch)]
            each, skips = self.ranks.divide_passes(skips) if self.ranks else (MAP, skips)

        def velocity(x: Tensor, t: Tensor) -> Tensor:  # (B, T, H, W, 16) → the same, float32
            x = torch.cat([x, condition], dim=-1).to(dtype)  # (B, T, H, W, 33)
            x = torch.cat([x, x]) if plan.together else x
            t = t.to(device).expand(len(x))
            predicted = torch.cat([*each(lambda words: self.predict(x, words, t, request.rope_scale, dit), passes)])
            if not request.guided:
                return predicted
            conditional, unconditional = predicted.chunk(2)
            return sampler.guided_velocity(conditional, unconditional, request.guidance_scale)

        dit = self.dit
        if skips:
            from kandinsky5.extras import magcache  # an extra: without it everything else works

            dit = magcache.skip_steps(dit, skips, plan.together)
        note = str(plan) + f", {sum(map(all, request.skips))} skipped" * bool(request.skips)
        progressed = bar(request.steps, "sampling", "step", note, show=progress)
        with (
            progressed, awake(self.dit), keep_freed_memory(device), in_pieces(self.dit, plan.piece),
        ):  # fmt: skip
            after_step = sampler.watch_steps(request.steps, callback, progressed.update)
            latents = solver(velocity, noise, request.times, first_frame, after_step)
        sampler.check_like(latents, noise, "the solver")
        if first_frame is not None and config.sampling.normalise_first_frames:
            latents = sampler.normalise_first_frames(latents)
        return latents

    def predict(
        self, x: Tensor, features: TextFeatures, t: Tensor, rope_scale: tuple, dit: DiT | None = None
    ) -> Tensor:
        """One pass through the DiT, or another: x (B, T, h, w, 33) → velocity (B, T, h, w, 16) in float32."""
        mask = features.mask if len(features.mask) > 1 else None  # a prompt alone has no padding to hide
        text, pooled = features.text.to(x), features.pooled.to(x)
        return (dit or self.dit)(x, text, pooled, t, mask, rope_scale=rope_scale).float()

    @memory.during("decoding")
    @plain_defaults()
    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "uint8", progress: bool = False) -> Tensor:
        """Scaled latents (B, T, H/8, W/8, 16) → frames (B, F, H, W, 3), uint8 or float32 in [0, 1], on the CPU.

        Raises ValueError for another shape or output_type, and where NaN or infinity comes out.
        """
        if output_type not in ("uint8", "float"):
            raise ValueError(f"output_type {output_type!r}: latents decode to uint8 or float")
        device, dtype = find_place(self.vae)
        check_sampled(latents, self.config.vae.latent_channels, device)
        memory.release(device)
        takes = f"takes {self._check_decoding(tuple(latents.shape), output_type) / 1e9:.1f} GB"
        z = (latents.to(device) / self.config.vae.scaling_factor).to(dtype)
        z = z.permute(0, 4, 1, 2, 3)  # (B, 16, T, h, w)
        to_output = video_io.to_uint8 if output_type == "uint8" else video_io.to_float
        each = partial(self.ranks.map, "team") if self.ranks else MAP
        num_frames, pieces = (z.shape[2] - 1) * self.config.vae.time_factor + 1, []
        progressed = bar(len(z) * num_frames, "decoding", "frame", takes, show=progress)
        with progressed, awake(self.vae):
            for one in z.split(1):  # all at once would take as many times the memory
                for piece in vae_tiling.decode_pieces(self.vae, one, self.config.tiling, each):  # (1, 3, f, H, W)
                    sampler.check_finite(piece, "the decoded frames")
                    pieces.append(_to_cpu(to_output(piece)))
                    progressed.update(piece.shape[2])
        return torch.cat(pieces, dim=1)[0].unflatten(0, (len(z), num_frames))  # (B, F, H, W, 3)

    def _check_decoding(self, shape: tuple[int, ...], output_type: str) -> int:
        """Bytes needed to decode latents (B, T, h, w, 16). Raises ValueError where they are not free."""
        offloaded, place = hasattr(self.vae, "resting"), find_place(self.vae)
        return memory.check_decoding(self.config, shape, self.vae.parameters(), *place, output_type, offloaded)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other call of this pipeline runs: its models have one state. Raises ValueError if one does."""
        try:
            self._turns.pop()
        except IndexError:
            raise ValueError("this pipeline is running in another call: wait for it, or load a second one") from None
        try:
            yield
        finally:
            self._turns.append(True)


def _to_cpu(x: Tensor) -> Tensor:
    return x if x.is_meta else x.cpu()
