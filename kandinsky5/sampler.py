"""From noise to latents: an ordinary differential equation, solved by Euler's method.

The network predicts the velocity of a straight path from data to noise, x_t = (1 − t)·x_0 + t·noise, so
velocity = dx/dt = noise − x_0. Sampling walks from t = 1 (noise) to t = 0 (data).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

RULES = ("official", "diffusers")

Callback = Callable[[int, float, Tensor], Tensor | bool | None]


def flow_schedule(steps: int, shift: float, rule: str = "official") -> Tensor:
    """Flow times from 1 down to 0: (steps + 1,) float32.

    A shift s > 1 spends more of the steps near the noise: t ← s·t / (1 + (s − 1)·t).
    "official" shifts an even spacing. "diffusers" ends its even spacing at a time that is shifted already and
    shifts again, so that its last steps are much smaller; use it to compare with Kandinsky5T2VPipeline, whose rule is
    FlowMatchEulerDiscreteScheduler.set_timesteps. Raises ValueError for invalid steps, shift or rule.
    """
    if not 1 <= steps <= 10**6:
        raise ValueError(f"{steps} steps: sampling takes at least 1 step and at most a million")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift}: it must be positive and finite; the models use 5 or 10, 1 changes nothing")
    if rule not in RULES:
        raise ValueError(f"schedule {rule!r}: choose one of {', '.join(RULES)}")

    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    if rule == "official":
        return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu"))
    times = shifted(torch.linspace(1, shifted(0.001), steps, dtype=torch.float32, device="cpu"))
    return torch.cat([times, times.new_zeros(1)])


def guided_velocity(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: v_u + w·(v_c − v_u), any shape."""
    return unconditional + guidance_scale * (conditional - unconditional)


def euler_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Tensor,
    first_frame: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate x from schedule[0] to schedule[-1].

    velocity: (x, t) → dx/dt, t a 0-dim float32 tensor on the CPU; x: (B, T, H, W, C) float32 noise;
    first_frame: clean latents (B, 1, H, W, C) that are written into frame 0 before every step and at the end;
    callback: (step, t, latents) after each step, t being the time that was reached; it may return new latents,
    or False to stop there.
    """
    x = _with_first_frame(x, first_frame)
    for step, (t, t_next) in enumerate(pairwise(schedule)):
        x = x + (t_next - t) * velocity(x, t)
        x = _with_first_frame(x, first_frame)
        if callback is not None:
            answer = callback(step, float(t_next), x)
            if answer is False:
                break
            if isinstance(answer, Tensor):
                x = _with_first_frame(answer.to(x), first_frame)
    return x


def _with_first_frame(x: Tensor, first_frame: Tensor | None) -> Tensor:
    return x if first_frame is None else torch.cat([first_frame, x[:, 1:]], dim=1)


def build_condition(latents: Tensor, image: Tensor | None, channels: int, edits: bool) -> Tensor:
    """The channels next to noisy latents (B, T, h, w, 16): conditioning latents, and a mask. (B, T, h, w, 17)

    image: clean latents (B, 1, h, w, 16), or None; channels: 17, or 0 for a DiT that has none.
    Editing (`edits`) has the source image there, under a mask of 1, and sampling never changes it.
    checkpoint: image-to-video has zeros there, as text-to-video has: its image is in the latents themselves, and the
    mask is 1 where frame 0 is given.
    """
    condition = latents.new_zeros(*latents.shape[:-1], channels)
    if image is not None and channels:
        condition[:, :1, ..., -1] = 1
        if edits:
            condition[..., :-1] = image
    return condition


def normalise_first_frames(latents: Tensor, count: int = 4, reference: int = 5) -> Tensor:
    """Move the statistics of the first frames towards those of the frames after them; image-to-video only.

    The given frame 0 is a little off from what the network draws, which shows as a mesh. Each of the first
    `count` frames of latents (B, T, H, W, C) gets the mean and std of the next `reference` frames, but moves
    from its own mean by at most −0.05 / +0.1 and from its own std by at most −0.1 / +0.25. As in the official
    code, statistics are one number for a frame of a sample; diffusers' pipeline_kandinsky_i2v.py pools the frames.
    """
    after = latents[:, count : count + reference]
    if after.shape[1] == 0:
        return latents
    first = latents[:, :count]
    mean, std = (f(first, dim=(2, 3, 4), keepdim=True) for f in (torch.mean, torch.std))  # (B, 4, 1, 1, 1)
    target_mean, target_std = (f(after, dim=(1, 2, 3, 4), keepdim=True) for f in (torch.mean, torch.std))
    new_mean = torch.clamp(target_mean, mean - 0.05, mean + 0.1)
    new_std = torch.clamp(target_std, std - 0.1, std + 0.25)
    return torch.cat([(first - mean) / std * new_std + new_mean, latents[:, count:]], dim=1)


def watch_steps(steps: int, callback: Callback | None, update: Callable[[], object]) -> Callback:
    """A callback for the solver: moves the bar, looks for NaN in the latents (B, T, h, w, 16), asks the user's.

    Raises ValueError for NaN and for what a callback may not return.
    """

    def after_step(step: int, t: float, x: Tensor) -> Tensor | bool | None:
        update()
        check_finite(x, f"after step {step + 1} of {steps} the latents")
        answer = callback(step, t, x) if callback else None
        who = f"after step {step + 1} of {steps} the callback"
        if isinstance(answer, Tensor):
            check_like(answer, x, who)
            check_finite(answer, f"{who}'s latents")
        elif answer is not None and not isinstance(answer, bool):
            raise ValueError(f"{who} returned a {type(answer).__name__}: return a tensor, False to stop, or nothing")
        return answer

    return after_step


def check_like(answer: object, x: Tensor, who: str) -> None:
    """Raises ValueError unless `answer` is a tensor that can take the place of latents x: of their shape, dense."""
    shape = getattr(answer, "shape", None)
    if not isinstance(answer, Tensor) or (shape, answer.layout, answer.is_meta) != (x.shape, x.layout, x.is_meta):
        what = f"latents {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ValueError(f"{who} returned {what}: it must return latents {tuple(x.shape)}, dense and with values")


def check_finite(x: Tensor, what: str) -> None:
    """Raises ValueError for NaN or infinity in x, of any shape."""
    if not x.is_meta and not torch.isfinite(x).all():
        raise ValueError(
            f"{what} contain NaN or infinity: float16 overflows where bfloat16 and float32 do not; "
            "if the precision is not it, the weights are damaged"
        )
