"""Models that are larger than the memory of their device: the weights rest in mapped files and come when needed.

    "model"    only the running model is on the device: first CLIP and Qwen, then the DiT, then the VAE
    "blocks"   likewise, and of Qwen, CLIP and the DiT only the running block and the next one, which is prefetched

On a GPU both cost the time of copying. On a CPU nothing is copied where file and model have the same precision: the
pages of the file are the weights, and the system may drop them and read them again. Only tensors that need a cast, such
as those of a float32 file for a model in bf16, take memory; with "blocks" those of two blocks at a time.

A resting model has its parameters on the meta device. What is written to its weights while they are here is lost when
they go.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

MODES = ("model", "blocks")


def check_mode(mode: str | None) -> None:
    """Raise ValueError unless it is None or one of MODES."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"offload {mode!r}: choose {' or '.join(MODES)}, or leave it out to keep all on the device")


def rest(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, mode: str) -> nn.Module:
    """Let `model`, built on the meta device, run with `weights`, which stay where they are until `awake`.

    weights: read-only views (`checkpoint.map_weights`) by parameter name, in any precision; computation is in the
    model's. With mode "blocks" the model's `run_blocks` brings each block's weights when the block's turn comes.
    """
    own, streamed = dict(weights), False
    for name, blocks in model.named_children():
        if mode == "blocks" and isinstance(blocks, nn.ModuleList) and hasattr(model, "run_blocks"):
            streamed = True
            for i, block in enumerate(blocks):
                prefix = f"{name}.{i}."
                inside = {key.removeprefix(prefix): own.pop(key) for key in weights if key.startswith(prefix)}
                vars(block).update(resting=inside, works_on=device)
    if streamed:
        assert "run_blocks" not in vars(model), "what wraps run_blocks would be lost: rest the model first"
        model.run_blocks = run_streamed  # type: ignore[assignment]
    vars(model).update(resting=own, works_on=device)
    return model


def find_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision a model computes, also one that rests, is wrapped, or has some weights in others."""
    weights = [p for name, p in model.named_parameters() if name.endswith("patch_embedder.weight")]
    weight = next(p for p in (*weights, *model.parameters()) if p.is_floating_point())
    works_on = (vars(module).get("works_on") for module in model.modules())
    return next((device for device in works_on if device is not None), weight.device), weight.dtype


@contextlib.contextmanager
def awake(*models: nn.Module) -> Iterator[None]:
    """Inside, those of the models that rest are on their device; others are left alone."""
    sleepers = [model for model in models if hasattr(model, "resting") and next(model.parameters()).is_meta]
    try:
        for model in sleepers:
            model.load_state_dict(_fetch(model, {}), strict=False, assign=True)  # not strict: without streamed blocks
        yield
    finally:
        for model in sleepers:
            model.to("meta")


def run_streamed(blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
    """What a model whose blocks rest has as `run_blocks`: x (B, L, dim) → the same.

    Each block has its weights while it runs, and a thread fetches those of the next one meanwhile.
    """
    slots: list[dict[str, Tensor]] = [{}, {}]  # one for the running block, one for the next
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = [thread.submit(_fetch_ahead, block, slots[i % 2]) for i, block in enumerate(blocks[:1])]
        for i, block in enumerate(blocks):
            block.load_state_dict(coming.pop().result(), assign=True)
            if i + 1 < len(blocks):
                coming = [thread.submit(_fetch_ahead, blocks[i + 1], slots[(i + 1) % 2])]
            try:
                x = block(x, *arguments)
            finally:
                device = vars(block)["works_on"]
                if device.type == "cuda":  # it runs behind, and the block's slot is needed for the one after the next
                    torch.cuda.current_stream(device).synchronize()
                block.to("meta")
    return x


def _fetch(module: nn.Module, slot: dict[str, Tensor], pin: bool = False) -> dict[str, Tensor]:
    """The weights of a resting module, on its device and in its precision: as they are, or copied into the slot.

    A slot's memory is allocated once and reused for each block: freed and allocated every time, memory gets
    fragmented until nothing fits.
    """
    device, target, state = vars(module)["works_on"], module.state_dict(), {}
    for name, x in vars(module)["resting"].items():
        if (x.device, x.dtype) != (device, target[name].dtype):
            if name not in slot:
                slot[name] = torch.empty_like(target[name], device=device)
            x = slot[name].copy_(x.pin_memory() if pin else x, non_blocking=pin)
        state[name] = x
    return state


def _fetch_ahead(block: nn.Module, slot: dict[str, Tensor]) -> dict[str, Tensor]:
    """`_fetch`, in a thread next to the computation: to a GPU through pinned memory and a stream of its own."""
    device = vars(block)["works_on"]
    if device.type == "cuda":
        stream = _side_stream(device)
        with torch.cuda.stream(stream):
            state = _fetch(block, slot, pin=True)
        stream.synchronize()
        return state
    state = _fetch(block, slot)
    for x in state.values():
        if not x.is_meta:
            x.view(-1).view(torch.uint8)[::4096].max()  # a byte of each page, so that it is read from disk now
    return state


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
