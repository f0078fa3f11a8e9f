"""Offloading: the same numbers from models that are never whole in the memory of their device."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5 import Pipeline
from kandinsky5.checkpoint import find_weights, load_weights, map_weights
from kandinsky5.config import LITE, DiTConfig
from kandinsky5.dit import DiT
from kandinsky5.runtime import offload
from random_weights import SMALL_DIT, save_small_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in float32."""
    return save_small_checkpoint(tmp_path_factory.mktemp("native") / "small")


def run(pipe, **arguments):
    return pipe(["a fox", "a red fox in the snow"], progress=False, output_type="float", **arguments)


def parameters(pipe):
    return [*pipe.dit.parameters(), *pipe.vae.parameters(), *pipe.text_encoder.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_with_and_without(saved, dtype):
    image, size = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8), {"height": 16, "width": 16}
    plain, *offloaded = (Pipeline.load(saved, dtype=dtype, offload=mode) for mode in (None, "model", "blocks"))
    for arguments in ({"num_frames": 1} | size, {"image": image, "num_inference_steps": 1} | size):
        expected = run(plain, **arguments)
        for pipe in offloaded:
            assert (pipe.device, pipe.dtype) == (plain.device, plain.dtype)
            for _ in range(2):
                assert run(pipe, **arguments).equal(expected)


@pytest.mark.parametrize("mode", offload.MODES)
def test_only_what_works_is_awake(saved, mode):
    pipe, here = Pipeline.load(saved, offload=mode), []

    def note(*_):
        models = {"qwen": pipe.text_encoder.qwen, "dit": pipe.dit, "vae": pipe.vae}
        lists = pipe.text_encoder.qwen.blocks, pipe.dit.visual_blocks
        blocks = [block for blocks in lists for block in blocks]
        names = [name for name, model in models.items() if not next(model.parameters()).is_meta]
        here.append((*names, sum(not next(block.parameters()).is_meta for block in blocks)))

    assert all(p.is_meta for p in parameters(pipe))
    for module in (pipe.text_encoder.qwen.norm, pipe.dit.visual_blocks[1].feed_forward, pipe.vae.decoder.conv_in):
        module.register_forward_hook(note)
    run(pipe, num_inference_steps=1)
    encoding, sampling, decoding = here[:1], here[-3:-2], here[-2:]  # of two videos
    blocks = {"model": (2, 2), "blocks": (0, 1)}[mode]
    assert (encoding, sampling, decoding) == ([("qwen", blocks[0])], [("dit", blocks[1])], 2 * [("vae", 0)])
    assert all(p.is_meta for p in parameters(pipe))


def test_a_block_comes_while_the_one_before_it_works(saved, monkeypatch):
    pipe, came, fetch = Pipeline.load(saved, offload="blocks"), threading.Event(), offload.Stream._bring
    second = pipe.dit.visual_blocks[1]

    def fetch_and_tell(stream, block, slot):
        state = fetch(stream, block, slot)
        if block is second:
            came.set()
        return state

    monkeypatch.setattr(offload.Stream, "_bring", fetch_and_tell)

    def wait_for_the_next(block, *_):
        assert came.wait(timeout=10) and next(second.parameters()).is_meta == (block is not second)

    for block in pipe.dit.visual_blocks:
        block.register_forward_pre_hook(wait_for_the_next)
    run(pipe, num_inference_steps=1)


def test_cast_weights_take_turns_in_two_places(tmp_path):
    config = replace(SMALL_DIT, num_visual_blocks=7)
    save_file(DiT(config).state_dict(), tmp_path / "dit.safetensors")
    with torch.device("meta"):
        dit = DiT(config)
    offload.rest(dit, map_weights(dit, find_weights(tmp_path, "dit"), torch.bfloat16), CPU, "blocks")
    places = []
    for block in dit.visual_blocks:
        block.register_forward_pre_hook(lambda block, _: places.append(block.feed_forward.linear_in.weight.data_ptr()))
    with torch.no_grad(), offload.awake(dit):
        x, text = torch.randn(1, 1, 4, 4, 33).bfloat16(), torch.randn(1, 3, 16).bfloat16()
        dit(x, text, torch.randn(1, 24).bfloat16(), torch.tensor([0.5]), rope_scale=(1.0, 1.0, 1.0))
    assert len(set(places)) == 2 and places[:5] == places[2:]


class SlowLane:
    """Copies as on a GPU, as late as its rules allow: a copy is made where computation waits for it."""

    def __init__(self, device=None):
        self.pins, self.rooms, self.started = 0, 0, {}

    def pinned(self, size):
        self.pins += 1
        return torch.zeros(size, dtype=torch.uint8)

    def room(self, size):
        self.rooms += 1
        return torch.zeros(size, dtype=torch.uint8)

    def copy(self, to, source, after):
        assert after is None or after["computed"], "the slot's block may still run"
        event = {"copy": lambda: to.copy_(source)}
        return event

    def mark(self):
        return {"computed": True}

    def wait(self, event):
        (event or {}).pop("copy", lambda: None)()

    wait_here = wait

    def finish(self):
        pass


def load_with(lane, saved, keep):
    """A pipeline whose DiT's blocks come through this lane, and their stream."""
    pipe = Pipeline.load(saved, dtype=torch.float32, offload="blocks")
    stream = vars(pipe.dit)["stream"]
    stream.keep, stream.lane, finish = keep, lane, stream.end
    stream.end = lambda: (finish(), setattr(stream, "lane", lane))
    return pipe, stream


@pytest.mark.parametrize("keep, arena, pins", [(True, 2**32, 1), (True, 1, 4), (False, 2**32, 4)])
def test_packed_blocks_compute_the_same(saved, keep, arena, pins, monkeypatch):
    """The logic of a GPU: blocks packed once each or in two places, and the next one on its way behind every block."""
    monkeypatch.setattr(offload, "ARENA", arena)
    lane, missed = SlowLane(), []
    pipe, stream = load_with(lane, saved, keep)
    arrive = stream._arrive
    stream._arrive = lambda block: (missed.append(block) if stream.coming is None else None, arrive(block))[1]
    expected = run(Pipeline.load(saved, dtype=torch.float32))
    for _ in range(2):
        assert run(pipe).equal(expected)
    assert lane.pins <= pins and lane.rooms == 4  # all blocks, two and two; or two slots in each of two videos
    # Only the first forward and the first block of the second do not know what comes after the last block of a kind.
    text, visual = pipe.dit.text_blocks[0], pipe.dit.visual_blocks[0]
    assert missed == [text, visual, text, text]


@pytest.mark.parametrize("keep", [True, False])
def test_without_pinned_memory_blocks_compute_the_same(saved, keep, monkeypatch, capsys):
    """As under WSL 2, or a low limit: pageable memory takes its place, and one line says so, not one per block."""
    empty, refused = torch.empty, []

    def refuse(*size, pin_memory=False, **how):
        if pin_memory:
            refused.append(size)
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(SlowLane, "pinned", offload.Lane.pinned)
    offload._say_once.cache_clear()
    expected = run(Pipeline.load(saved, dtype=torch.float32))
    pipe, _ = load_with(SlowLane(), saved, keep)
    for _ in range(2):
        assert run(pipe).equal(expected)
    said = capsys.readouterr().err.splitlines()
    assert refused and len(said) == 1 and said[0].startswith("note: ") and "ulimit" in said[0]


def test_weights_side_by_side_are_cut_out_again():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2)}
    places, size = offload.measure(tensors)
    assert all(place % 256 == 0 for place in places.values()) and size == 768
    views = offload.cut(torch.zeros(size, dtype=torch.uint8), tensors, places)
    for name, view in views.items():
        view.copy_(tensors[name])
    assert all(views[name].equal(x) and views[name].dtype == x.dtype for name, x in tensors.items())


def test_a_model_sleeps_when_the_last_that_wants_it_leaves(saved):
    """As threads do that decode at once."""
    pipe = Pipeline.load(saved, "cpu", torch.float32, offload="model")
    one, two = offload.awake(pipe.vae), offload.awake(pipe.vae, pipe.dit)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not next(pipe.vae.parameters()).is_meta and not next(pipe.dit.parameters()).is_meta
    two.__exit__(None, None, None)
    assert next(pipe.vae.parameters()).is_meta and next(pipe.dit.parameters()).is_meta


def test_threads_that_encode_at_once_get_the_same(saved):
    pipe, found = Pipeline.load(saved, "cpu", torch.float32, offload="blocks"), []
    expected = Pipeline.load(saved, "cpu", torch.float32).text_encoder.encode(["a fox"])

    def encode():
        with torch.no_grad(), offload.awake(pipe.text_encoder.qwen, pipe.text_encoder.clip):
            found.extend(pipe.text_encoder.encode(["a fox"]) for _ in range(4))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all(x.equal(y) for features in found for x, y in zip(features, expected, strict=True))


@pytest.mark.parametrize("mode", offload.MODES)
def test_a_resting_model_is_refused_in_one_line(saved, mode):
    pipe = Pipeline.load(saved, "cpu", torch.float32, offload=mode)
    z, x = torch.randn(1, 16, 1, 2, 2), torch.randn(1, 3, 1, 16, 16)
    for call in (lambda: pipe.text_encoder.encode(["a"]), lambda: pipe.vae.decode(z), lambda: pipe.vae.encode(x)):
        with pytest.raises(ValueError, match="awake"), torch.no_grad():
            call()


def test_after_an_error_all_rest_and_work_again(saved):
    pipe = Pipeline.load(saved, dtype=torch.float32, offload="blocks")
    hook = pipe.dit.visual_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe)
    assert all(p.is_meta for p in parameters(pipe))
    hook.remove()
    assert run(pipe).equal(run(Pipeline.load(saved, dtype=torch.float32)))


def test_step_skipping_goes_with_it(saved):
    ratios = {"conditional": (1.0,) * 5, "unconditional": (1.0,) * 5}
    frames = [
        run(Pipeline.load(saved, offload=mode), num_inference_steps=6, step_skipping=ratios)
        for mode in (None, "blocks")
    ]
    assert frames[0].equal(frames[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_mapped_weights_equal_the_file_and_are_read_only(saved, tmp_path):
    file = Path(shutil.copy(saved / "dit.safetensors", tmp_path))
    with torch.device("meta"):
        dit = DiT(SMALL_DIT)
    views = map_weights(dit, find_weights(tmp_path, "dit"), torch.bfloat16)
    with open("/proc/self/maps") as maps:
        assert {line.split()[1] for line in maps if str(file) in line} == {"r--s"}
    stored = load_file(file)
    assert views.keys() == stored.keys() and all(views[name].equal(stored[name]) for name in stored)


def test_modes_that_are_none(saved):
    with pytest.raises(ValueError, match="offload 'cpu'.*model.*blocks"):
        Pipeline.load(saved, offload="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_a_file_larger_than_the_memory_is_only_mapped_to_be_read(tmp_path):
    """Sparse: it takes no disk. What the plain way answers depends on the system's settings for memory."""
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20  # of 1 MB: twice the memory
    save_file({"weight": torch.zeros(1, 2**19, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    header = (tmp_path / "one.safetensors").read_bytes()[8:].split(b"\0", 1)[0]
    header = header.replace(b"[1,524288]", b"[%d,524288]" % rows).replace(b"1048576]", b"%d]" % (rows * 2**20))
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 2**20)
    linear = torch.nn.Linear(2**19, rows, bias=False, device="meta")
    weight = map_weights(linear, find_weights(tmp_path, "large"), torch.bfloat16)["weight"]
    assert weight.shape == (rows, 2**19) and not weight[-1].any()
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "1":
        with pytest.raises(ValueError, match="cannot be mapped.*use --offload model or blocks"):
            load_weights(linear, find_weights(tmp_path, "large"), "cpu", torch.bfloat16)


# --- a DiT in less memory than it has weights


FORWARD = """
import json, resource, sys, time
from pathlib import Path
folder, mode, dtype, limit, out = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
import torch
from kandinsky5 import checkpoint
from kandinsky5.runtime import kernels, offload
from kandinsky5.config import DiTConfig
from kandinsky5.dit import DiT

config = json.loads(Path(folder, "dit.json").read_text())
with torch.device("meta"):
    dit = DiT(DiTConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in config.items()}))
weights = checkpoint.find_weights(Path(folder), "dit")
if mode == "none":
    checkpoint.load_weights(dit, weights, "cpu", getattr(torch, dtype))
else:
    weights = checkpoint.map_weights(dit, weights, getattr(torch, dtype))
    offload.rest(dit, weights, torch.device("cpu"), mode)
kernels.install(dit, "auto")
peak, seconds = {"RssAnon": 0, "VmData": 0}, []
def note(*_):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    peak.update({name: max(peak[name], int(status[name].split()[0]) // 1000) for name in peak})
note()
print("at first", peak)
for i in range(len(dit.visual_blocks)):
    dit.visual_blocks[i].register_forward_hook(note)
generator = torch.Generator().manual_seed(0)
x, text, pooled = (
    torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    for shape in ((1, 1, 8, 8, 33), (1, 20, dit.config.text_dim), (1, dit.config.pooled_dim))
)
with torch.no_grad(), offload.awake(dit):
    for _ in range(2):
        start = time.perf_counter()
        velocity = dit(x, text, pooled, torch.tensor([0.7]), rope_scale=(1.0, 1.0, 1.0))
        seconds.append(time.perf_counter() - start)
torch.save(velocity, out)
print(f"peak {peak} MB, forwards {seconds[0]:.2f} s and {seconds[1]:.2f} s")
"""


def forward(folder: Path, mode: str, dtype: str, limit: int = 0) -> torch.Tensor | None:
    """The velocity of the DiT in `folder`, in a process with at most `limit` bytes of its own; None if it fails."""
    command = [sys.executable, "-c", FORWARD, folder, mode, dtype, limit, folder / "velocity.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    print(f"{mode}, limit {limit / 1e6:.0f} MB:", done.stdout or done.stderr[-600:])
    if done.returncode:
        assert "map" in done.stderr or "memory" in done.stderr, done.stderr
        return None
    return torch.load(folder / "velocity.pt")


def write_random_dit(folder: Path, config: DiTConfig, dtype: torch.dtype, blocks_per_shard: int = 8) -> int:
    """A DiT's weights in shards, cheaply: cut out of one piece of noise. Returns the bytes."""
    noise, start, written, index = torch.randn(2**24 + 12345, dtype=torch.float32), 0, 0, {}
    with torch.device("meta"):
        wanted = DiT(config).state_dict()
    shards: dict[int, list[str]] = {}
    for name in wanted:
        number = int(name.split(".")[1]) // blocks_per_shard if name.startswith("visual_blocks") else 0
        shards.setdefault(number, []).append(name)
    for number, names in shards.items():
        shard = {}
        for name in names:
            shape = wanted[name].shape
            start = (start + 54321) % (2**24 - shape.numel() % 2**24)
            pieces = noise[start:].repeat(-(-shape.numel() // (len(noise) - start)))[: shape.numel()]
            pieces = pieces / shape[1] ** 0.5 if len(shape) > 1 else pieces * 0.3 + ("norm.weight" in name)
            shard[name] = pieces.to(dtype).view(shape)
        file = f"dit-{number}.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(names, file)
        written += (folder / file).stat().st_size
    (folder / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "dit.json").write_text(json.dumps(asdict(config)))
    return written


@pytest.mark.large
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_dit_runs_in_less_memory_than_it_has_weights(tmp_path, stored):
    """A float32 file is cast block by block, of one in bf16 nothing is; without offloading the limit does not do."""
    config = replace(LITE, dim=768, ff_dim=3072, num_visual_blocks={torch.bfloat16: 9, torch.float32: 5}[stored])
    size = write_random_dit(tmp_path, config, stored)
    assert size > 270e6
    velocity = forward(tmp_path, "blocks", "bfloat16", limit=400_000_000)
    assert velocity is not None and velocity.equal(forward(tmp_path, "none", "bfloat16"))
    assert velocity.float().std() > 0.1
    if stored == torch.bfloat16:
        assert forward(tmp_path, "none", "bfloat16", limit=400_000_000) is None


@pytest.mark.large
def test_4_gb_of_weights_run_in_2_gb_of_memory(tmp_path):
    size = write_random_dit(tmp_path, LITE, torch.bfloat16)
    assert size > 3.9e9
    velocity = forward(tmp_path, "blocks", "bfloat16", limit=2_000_000_000)
    assert velocity is not None and velocity.equal(forward(tmp_path, "none", "bfloat16"))
    assert forward(tmp_path, "none", "bfloat16", limit=2_000_000_000) is None


def test_what_wraps_the_blocks_is_not_dropped():
    """`rest` takes the place of run_blocks, so it comes before the compiler's wrapper and step skipping."""
    with torch.device("meta"):
        dit = DiT(SMALL_DIT)
    vars(dit)["run_blocks"] = dit.run_blocks
    with pytest.raises(AssertionError, match="would be lost"):
        offload.rest(dit, {}, CPU, "blocks")
