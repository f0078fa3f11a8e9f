"""Models that are larger than the memory of their device: the weights rest in mapped files and come when needed.

    "model"    CLIP and Qwen, the DiT, the VAE: whichever works is on the device, the others rest
    "blocks"   likewise, and of Qwen, CLIP and the DiT only the block that works and the next, which comes meanwhile

On a GPU both cost the time of copying. On a CPU nothing is copied where file and model have the same precision: the
pages of the file are the weights, and the system may drop them and read them again. What is copied is what has to be
cast, such as a float32 file for a model in bf16, with "blocks" that of two blocks at a time.

A resting model has its parameters on the meta device. What is written to weights that are awake is lost when they go.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

MODES = ("model", "blocks")


def check_mode(mode: str | None) -> None:
    """ValueError unless it is None or one of MODES."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"offload {mode!r}: choose {' or '.join(MODES)}, or leave it out to keep all on the device")


def rest(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, mode: str) -> nn.Module:
    """Let `model`, built on the meta device, work with `weights`, which stay where they are until `awake`.

    weights: read-only views (`checkpoint.map_weights`) by parameter name, in any precision: the model says which it
    works in. With mode "blocks" its lists of blocks bring their weights themselves, one after the other.
    """
    own = dict(weights)
    for name, blocks in list(model.named_children()):
        if mode == "blocks" and isinstance(blocks, nn.ModuleList):
            inside = {key.removeprefix(f"{name}."): own.pop(key) for key in weights if key.startswith(f"{name}.")}
            setattr(model, name, StreamedBlocks(blocks, inside, device))
    vars(model).update(resting=own, works_on=device)
    return model


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


class StreamedBlocks(nn.ModuleList):
    """A list of blocks that, when a model goes through it, come one by one and go again.

    `for block in blocks` is all that a model does with it: each block has its weights while the loop's body runs, and
    a thread fetches those of the next.
    """

    def __init__(self, blocks: nn.ModuleList, weights: Mapping[str, Tensor], device: torch.device):
        super().__init__(nn.ModuleList.__iter__(blocks))
        for i, block in enumerate(super().__iter__()):
            names = [name for name in weights if name.startswith(f"{i}.")]
            inside = {name.removeprefix(f"{i}."): weights[name] for name in names}
            vars(block).update(resting=inside, works_on=device)

    def __iter__(self) -> Iterator[nn.Module]:
        blocks = list(super().__iter__())
        slots: list[dict[str, Tensor]] = [{}, {}]  # one for the block that works, one for the next
        if not blocks:
            return
        with ThreadPoolExecutor(max_workers=1) as thread:
            coming = thread.submit(_fetch_ahead, blocks[0], slots[0])
            for i, block in enumerate(blocks):
                block.load_state_dict(coming.result(), assign=True)
                if i + 1 < len(blocks):
                    coming = thread.submit(_fetch_ahead, blocks[i + 1], slots[(i + 1) % 2])
                try:
                    yield block
                finally:
                    device = vars(block)["works_on"]
                    if device.type == "cuda":  # it runs behind, and the block's slot is wanted for the next
                        torch.cuda.current_stream(device).synchronize()
                    block.to("meta")


def _fetch(module: nn.Module, slot: dict[str, Tensor], pin: bool = False) -> dict[str, Tensor]:
    """The weights of a resting module, on its device and in its precision: as they are, or copied into the slot.

    Memory is reserved once in a slot and used again for each block: freed and reserved every time, it is torn into
    pieces that nothing fits into.
    """
    device, wanted, state = vars(module)["works_on"], module.state_dict(), {}
    for name, x in vars(module)["resting"].items():
        if (x.device, x.dtype) != (device, wanted[name].dtype):
            if name not in slot:
                slot[name] = torch.empty_like(wanted[name], device=device)
            x = slot[name].copy_(x.pin_memory() if pin else x, non_blocking=pin)
        state[name] = x
    return state


def _fetch_ahead(block: nn.Module, slot: dict[str, Tensor]) -> dict[str, Tensor]:
    """`_fetch`, in a thread beside the computation: to a GPU through pinned memory and a stream of its own."""
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
