"""Models that are larger than the memory of their device: the weights rest in mapped files and come when needed.

    "model"    only the running model is on the device: first CLIP and Qwen, then the DiT, then the VAE
    "blocks"   likewise, and of Qwen, CLIP and the DiT only the running block and the next one, which is prefetched

On a GPU both cost the time of copying. With "blocks" a thread puts the weights of a block side by side in pinned
memory, from where they cross the bus in one copy, while the block before it runs: only events make one wait for the
other. The DiT's, which come again in every step, stay pinned where they take less than half of the free memory. Where
the system pins none, they come from pageable memory, and one line says what that costs.

On a CPU nothing is copied where file and model have the same precision: the pages of the file are the weights, and the
system may drop them and read them again. Only tensors that need a cast, such as those of a float32 file for a model in
bf16, take memory; with "blocks" those of two blocks at a time.

A resting model has its parameters on the meta device. What is written to its weights while they are here is lost when
they go.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky5.dit import DiT
from kandinsky5.runtime.free import free_memory
from kandinsky5.screen import printable, say

MODES = ("model", "blocks")
ARENA = 2**32  # bytes pinned at a time, for several blocks: PyTorch rounds each request up to a power of two


def check_mode(mode: str | None, sharded: bool = False) -> None:
    """Raise ValueError unless it is None or, where no weights are spread over ranks, one of MODES."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"offload {mode!r}: choose {' or '.join(MODES)}, or leave it out to keep all on the device")
    if mode and sharded:
        raise ValueError(f"offload {mode!r}: sharded weights are on their devices in shares: leave one of the two out")


def rest(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, mode: str) -> nn.Module:
    """Let `model`, built on the meta device, run with `weights`, which stay where they are until `awake`.

    weights: read-only views (`checkpoint.map_weights`) by parameter name, in any precision; computation is in the
    model's. With mode "blocks" the model's `run_blocks` brings each block's weights when the block's turn comes.
    """
    own, streamed = dict(weights), []
    for name, blocks in model.named_children():
        if mode == "blocks" and isinstance(blocks, nn.ModuleList) and hasattr(model, "run_blocks"):
            for i, block in enumerate(blocks):
                prefix = f"{name}.{i}."
                inside = {key.removeprefix(prefix): own.pop(key) for key in weights if key.startswith(prefix)}
                vars(block).update(resting=inside, works_on=device)
                streamed.append(block)
    if streamed:
        assert "run_blocks" not in vars(model), "what wraps run_blocks would be lost: rest the model first"
        sizes = [measure(block.state_dict())[1] for block in streamed]
        free = free_memory(torch.device("cpu")) if isinstance(model, DiT) else 0
        stream = Stream(device, max(sizes), keep=free is not None and sum(sizes) <= free / 2, total=sum(sizes))
        model.run_blocks = stream.run_blocks  # type: ignore[assignment]
        vars(model)["stream"] = stream
    vars(model).update(resting=own, works_on=device)
    if device.type != "meta":
        for part in model.children():
            part.register_forward_pre_hook(_check_awake)
    return model


def _check_awake(part: nn.Module, _: Any) -> None:
    if next((p.is_meta for p in part.parameters()), False):
        raise ValueError("this model rests (offload): call it by hand inside `with runtime.offload.awake(model)`")


def find_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision a model computes, also one that rests, is wrapped, or has some weights in others."""
    weights = [p for name, p in model.named_parameters() if name.endswith("patch_embedder.weight")]
    weight = next(p for p in (*weights, *model.parameters()) if p.is_floating_point())
    works_on = (vars(module).get("works_on") for module in model.modules())
    return next((device for device in works_on if device is not None), weight.device), weight.dtype


@contextlib.contextmanager
def awake(*models: nn.Module) -> Iterator[None]:
    """Inside, those of the models that rest are on their device, also where several threads want one; others are left
    alone."""
    woken = []
    try:
        for model in models:
            with one_at_a_time:
                users = vars(model).get("users", 0)
                if hasattr(model, "resting") and (users or next(model.parameters()).is_meta):
                    if not users:  # not strict: without streamed blocks
                        model.load_state_dict(_fetch(model, {}), strict=False, assign=True)
                    vars(model)["users"] = users + 1
                    woken.append(model)
        yield
    finally:
        for model in woken:
            with one_at_a_time:
                vars(model)["users"] -= 1
                if not vars(model)["users"]:
                    if "stream" in vars(model):
                        vars(model)["stream"].end()
                    model.to("meta")


one_at_a_time = threading.Lock()  # puts models to sleep or wakes them


class Stream:
    """The blocks of a model on their way to its device: a slot for the running one, and one that a thread fills."""

    def __init__(self, device: torch.device, size: int, keep: bool, total: int):
        """size: bytes of the largest block; total: of all; keep: whether packed blocks stay in pinned memory."""
        self.device, self.size, self.keep = device, size, keep
        self.pinned_at_once = max(size, min(total, ARENA))
        self.spare = torch.empty(0, dtype=torch.uint8)  # pinned, for the next packed blocks
        self.slots: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.coming: tuple[nn.Module, Future] | None = None  # the block in the slot that is filled
        self.after: dict[int, nn.Module] = {}  # by a block's id: the one that ran after it, the last time
        self.last: nn.Module | None = None
        self.lane: Lane | None = None
        self.turn = threading.Lock()  # several threads may want the blocks, which pass one at a time

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        """What a model whose blocks rest has as `run_blocks`: x (B, L, dim) → the same.

        Each block has its weights while it runs, and those of the next one come meanwhile: behind the last one those of
        whichever ran then in the pass before.
        """
        with self.turn:
            return self._run(blocks, x, *arguments)

    def _run(self, blocks: nn.ModuleList, x: Tensor, *arguments) -> Tensor:
        if self.device.type == "cuda" and self.lane is None:
            self.lane = Lane(self.device)
        if self.lane and torch.is_grad_enabled():  # gradients of blocks that ran before still read their slots
            for slot in self.slots:
                slot["computed"] = self.lane.mark()
        for i, block in enumerate(blocks):
            if self.last is not None:
                self.after[id(self.last)] = block
            slot = self._arrive(block)
            self.last, self.slots = block, self.slots[::-1]
            following = blocks[i + 1] if i + 1 < len(blocks) else self.after.get(id(block))
            if following is not None:
                self._send_for(following)
            try:
                x = block(x, *arguments)
            finally:
                if self.lane:
                    slot["computed"] = self.lane.mark()
                block.to("meta")
        return x

    def end(self) -> None:
        """No block is needed any more: what was coming is dropped, and the slots' memory is free."""
        if self.coming is not None:
            self.coming[1].exception()  # waits, and an error was somebody else's
        if self.lane:
            self.lane.finish()
        self.slots, self.coming, self.last, self.lane = ({}, {}), None, None, None

    def _send_for(self, block: nn.Module) -> None:
        thread = ThreadPoolExecutor(max_workers=1)
        self.coming = block, thread.submit(self._bring, block, self.slots[0])
        thread.shutdown(wait=False)

    def _arrive(self, block: nn.Module) -> dict[str, Any]:
        """Give the block its weights; returns the slot that they are in."""
        if self.coming is None or self.coming[0] is not block:  # nothing is coming, or another one
            if self.coming is not None:
                self.coming[1].result()
            self._send_for(block)
        assert self.coming is not None
        state = self.coming[1].result()
        self.coming, slot = None, self.slots[0]
        if self.lane:
            self.lane.wait(slot["arrived"])
        block.load_state_dict(state, assign=True)
        return slot

    def _bring(self, block: nn.Module, slot: dict[str, Any]) -> dict[str, Tensor]:
        """The weights of a block, in the thread: on a GPU its copy has been started, on a CPU they are in memory."""
        if self.lane is None:
            state = _fetch(block, slot)
            for x in state.values():
                if not x.is_meta:
                    x.view(-1).view(torch.uint8)[::4096].max()  # a byte of each page, so that it is read from disk now
            return state
        target, packed = block.state_dict(), vars(block).get("packed")
        places, size = measure(target)
        if packed is None:
            if self.keep:
                if len(self.spare) < size:
                    self.spare = self.lane.pinned(self.pinned_at_once)
                packed, self.spare = self.spare[:size], self.spare[size:]
                vars(block)["packed"] = packed
            else:
                if "pinned" not in slot:
                    slot["pinned"] = self.lane.pinned(self.size)
                self.lane.wait_here(slot.get("arrived"))  # the copy from it, two blocks ago
                packed = slot["pinned"][:size]
            for name, view in cut(packed, target, places).items():
                view.copy_(vars(block)["resting"][name])
        if "room" not in slot:
            slot["room"] = self.lane.room(self.size)
        room = slot["room"][:size]
        slot["arrived"] = self.lane.copy(room, packed, slot.get("computed"))
        return cut(room, target, places)


class Lane:
    """Copies to a GPU next to its computation: a stream of their own, which events order."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def pinned(self, size: int) -> Tensor:
        """Bytes (size,) of the CPU's memory from which copies run by themselves, or pageable ones."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # little memory, a limit of the system or container, WSL 2
            _say_once(printable(str(error).partition("\n")[0], 100))
            return torch.empty(size, dtype=torch.uint8)

    def room(self, size: int) -> Tensor:
        """Bytes (size,) on the GPU."""
        with torch.cuda.stream(self.stream):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, to: Tensor, source: Tensor, after: Any) -> Any:
        """Start a copy of bytes (n,) behind the event `after`; returns the event of its end."""
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def mark(self) -> Any:
        """An event behind all computation that has been started."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        """Let computation that is started from now on wait for the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def wait_here(self, event: Any) -> None:
        """Wait for the event in this thread."""
        if event is not None:
            event.synchronize()

    def finish(self) -> None:
        """Wait for all that the GPU has to do."""
        torch.cuda.synchronize(self.device)


@functools.cache
def _say_once(reason: str) -> None:
    """Print what unpinned memory costs, once per reason."""
    say(
        f"note: streamed weights cannot be pinned in memory ({reason}): their copies take several times as long, and "
        "computation waits for them; free some RAM, or raise the limit (ulimit -l)"
    )


def measure(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Where each of these tensors begins when they lie side by side, aligned, and how many bytes they take."""
    places, size = {}, 0
    for name, x in tensors.items():
        places[name] = size
        size += -(-x.nbytes // 256) * 256
    return places, size


def cut(packed: Tensor, tensors: Mapping[str, Tensor], places: Mapping[str, int]) -> dict[str, Tensor]:
    """Views of bytes (size,) with the shapes and precisions of these tensors."""
    return {
        name: packed[place : place + tensors[name].nbytes].view(tensors[name].dtype).view(tensors[name].shape)
        for name, place in places.items()
    }


def _fetch(module: nn.Module, slot: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a resting module, on its device and in its precision: as they are, or copied into the slot.

    A slot's memory is allocated once and reused for each block: freed and allocated every time, memory gets
    fragmented until nothing fits.
    """
    device, target, state = vars(module)["works_on"], module.state_dict(), {}
    for name, x in vars(module)["resting"].items():
        if (x.device, x.dtype) != (device, target[name].dtype):
            if name not in slot or slot[name].shape != target[name].shape:  # of a block of another kind
                slot[name] = torch.empty_like(target[name], device=device)
            x = slot[name].copy_(x)
        state[name] = x
    return state
