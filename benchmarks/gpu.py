"""Us on a GPU next to diffusers at its best there: flex backend, repeated blocks compiled, as its documentation says.

    pip install -e '.[parity]' -c constraints.txt && python benchmarks/gpu.py [--rows NAME ...]

Without diffusers its lines are left out. Both sides hold the same random weights in bf16, drawn on the GPU. Rows of the
DiT run `--blocks` of its visual blocks (4) at the released size, as all are alike: times are of one block, and the last
column says what a step of the whole model takes at that rate. Each side runs once to compile, and then `--repeats`
times in turn; one that fails says why, and the others continue. The share is of the rate of bare bf16 matrix products
on this GPU, for the operations of the definition on the tiles that are kept: 1 would be a model without norms, softmax
and memory traffic. Inputs and queries are such that NABLA's maps are peaked, as trained ones are; a row says how many
tiles they keep. Rows go one by one to RESULTS/gpu.json and the table to gpu.md; --resume leaves out what is there.
About five minutes on an H100 or H200 and as many again for diffusers, most of them compiling (computed, not measured).
"""

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks", "tests", "tests/parity")]

import torch  # noqa: E402
from both_sides import build_theirs  # noqa: E402
from rows import TINY_DIT, TINY_QWEN, TINY_VAE, dit_flop, dit_inputs, vae_flop  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kandinsky5 import checkpoint, vae_tiling  # noqa: E402
from kandinsky5.config import PRESETS, DiTConfig, NablaConfig, QwenConfig, Tiling, VAEConfig  # noqa: E402
from kandinsky5.dit import DiT  # noqa: E402
from kandinsky5.files import write_text  # noqa: E402
from kandinsky5.nabla import TILE  # noqa: E402
from kandinsky5.qwen import Qwen  # noqa: E402
from kandinsky5.runtime import fast, kernels, offload  # noqa: E402
from kandinsky5.runtime.compile import check_compile, compile_models  # noqa: E402
from kandinsky5.vae import VAE  # noqa: E402

BF16 = torch.bfloat16
THEIRS = "diffusers, compiled"
CHANNELS_LAST = torch.channels_last_3d
Work = Callable[[], object]


class Options(NamedTuple):
    """What all rows need to know."""

    device: torch.device
    blocks: int
    tiny: bool
    compiled: bool


def main() -> int:
    """Run the rows and print the table; 1 if something of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--blocks", type=int, default=4, help="visual blocks of the DiT (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that RESULTS holds")
    parser.add_argument("--out", type=Path, metavar="RESULTS", help="default: benchmarks/results; with --tiny nowhere")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too, to see that every row runs")
    arguments = parser.parse_args()
    if arguments.blocks < 1 or arguments.repeats < 1:
        parser.error(f"--blocks {arguments.blocks} and --repeats {arguments.repeats} must be at least 1")
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("there is no CUDA GPU here; --tiny shows on a CPU that every row runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, arguments.blocks, arguments.tiny, check_compile("auto", device))
    out = arguments.out or (None if arguments.tiny else Path(__file__).parent / "results")
    file = out / "gpu.json" if out else None
    results = json.loads(file.read_text()) if file and file.exists() else {}
    failed: list[str] = []
    for name in arguments.rows or ROWS:
        if arguments.resume and name in results:
            continue
        print(f"{name}: {ROWS[name][0]}", flush=True)
        try:
            results[name] = measure(name, options, arguments.repeats)
        except Exception as error:
            print(f"    left out: {in_short(error)}", flush=True)
            failed.append(name)
            continue
        finally:
            clear()
        failed += [name] * ("failed" in results[name]["sides"]["ours"])
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(results, indent=1) + "\n")
            write_text(file.with_suffix(".md"), build_table(results))
    print("\n" + build_table(results) + "\nfailed: " * bool(failed) + ", ".join(failed))
    return 1 if failed else 0


def measure(name: str, options: Options, repeats: int) -> dict:
    """All sides of a row in turn, in seconds and bytes. The first one is ours."""
    work, row, per, whole = ROWS[name]
    seconds: dict[str, list[float]] = {}
    peaks, failed = {}, {}
    with torch.no_grad(), row(options) as (sides, flop):
        for side, run in sides.items():
            try:
                run()  # compiles
                wait(options.device)
                peaks[side] = peak_of(run, options.device)
                seconds[side] = []
            except Exception as error:  # no diffusers, too little memory, or too little shared memory for a kernel
                failed[side] = in_short(error)
                print(f"    {side} left out: {failed[side]}", flush=True)
        for _ in range(repeats):
            for side in seconds:
                wait(options.device)
                start = time.perf_counter()
                sides[side]()
                wait(options.device)
                seconds[side].append(time.perf_counter() - start)
            print("    " + "; ".join(f"{side} {values[-1]:.4g} s" for side, values in seconds.items()), flush=True)
    rate, parts = matmul_rate(options), options.blocks if per == "block" else 1
    own = seconds.get("ours", [])
    measured: dict[str, dict] = {side: {"failed": reason} for side, reason in failed.items()}
    for side, values in seconds.items():
        middle = statistics.median(values)
        measured[side] = {
            "seconds": middle / parts,
            "ratio": statistics.median(b / a for a, b in zip(own, values, strict=True)) if own else None,
            "share": flop / middle / rate if flop else None,
            "peak": peaks[side],
            "step": whole * middle / parts if whole else None,
        }
    return {
        "work": work,
        "per": per,
        "sides": {side: measured[side] for side in sides},
        "rate": rate,
        "tiny": options.tiny,
        "gpu": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def build_table(results: dict) -> str:
    """Markdown: for each row that was measured a line for each of its sides."""
    head = ("work", "side", "time", "per", "times ours", "share of the matmul rate", "peak", "a step of all blocks")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    rows = [results[name] for name in ROWS if name in results]
    for row in rows:
        for side, got in row["sides"].items():
            cells = [row["work"], side, f"left out: {got.get('failed')}", row["per"], "–", "–", "–", "–"]
            if "seconds" in got:
                ratio, share = ("–" if got[key] is None else f"{got[key]:.2f}" for key in ("ratio", "share"))
                step = "–" if got["step"] is None else f"{got['step']:.1f} s"
                cells[2:] = f"{got['seconds']:.4g} s", row["per"], ratio, share, f"{got['peak'] / 1e9:.1f} GB", step
            lines.append(f"| {' | '.join(cells)} |")
    toy = " (toy sizes: no figures to keep)"
    machines = sorted({f"{row['gpu']}, torch {row['torch']}" + toy * row["tiny"] for row in rows})
    rates = [row["rate"] / 1e12 for row in rows]
    if rates:
        lines += ["", f"{'; '.join(machines)}. Bare bf16 matmuls: {min(rates):.3g} to {max(rates):.3g} Tflop/s."]
    return "\n".join(lines) + "\n"


def in_short(error: Exception) -> str:
    """The start of an error, or its line on memory that ran out, without what would break a table."""
    told = [line for line in str(error).splitlines() if "out of resource" in line or "out of memory" in line]
    return " ".join((told or [str(error) or type(error).__name__])[0].replace("|", "/").split())[:200]


def later(build: Callable[[], Work]) -> Work:
    """Work that is built when it first runs: where that fails, for want of diffusers, only its own line is missing."""
    built = functools.cache(build)
    return lambda: built()()


# --- rows: contexts that give the work of each side, ours first, and the operations of its definition ----------------

Sides = Iterator[tuple[dict[str, Work], int | None]]


def dit_step(preset: str) -> Callable[[Options], contextlib.AbstractContextManager]:
    """A forward of the preset's DiT with a few of its blocks, at its size."""

    @contextlib.contextmanager
    def row(options: Options) -> Sides:
        config, grid = replace(PRESETS[preset].dit, num_visual_blocks=options.blocks), latents(preset)
        if options.tiny:
            nabla = NablaConfig(P=0.9, window=(1, 1, 1)) if config.nabla else None
            config, grid = replace(TINY_DIT, num_visual_blocks=options.blocks, nabla=nabla), (2, 32, 32)
        ours = draw(DiT, config, options.device)
        for block in ours.visual_blocks if config.nabla else ():
            block.self_attention.q_norm.weight.fill_(5.3)
        fast.install(ours)
        kernels.install(ours, "auto")
        plain = twin(ours)
        if options.compiled:
            compile_models(ours, draw(VAE, TINY_VAE, options.device))
        given = {name: x.to(options.device) for name, x in dit_inputs(config, grid).items()}
        if config.nabla:
            coarse = given["x"][:, :, ::16, ::16].repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
            given["x"] = coarse + 0.3 * given["x"]
        kept = share_of_tiles(plain, config, given)
        print(f"    {100 * kept:.0f} % of the tiles", flush=True)
        scale = PRESETS[preset].sampling.rope_scale or (1.0, 1.0, 1.0)
        sides: dict[str, Work] = {"ours": lambda: ours(**given, rope_scale=scale)}
        if options.compiled:
            sides["ours, not compiled"] = lambda: plain(**given, rope_scale=scale)
        sides[THEIRS] = later(lambda: their_step(config, plain.state_dict(), given, options))
        yield sides, dit_flop(config, grid, kept)

    return row


def their_step(config: DiTConfig, weights: dict[str, Tensor], given: dict[str, Tensor], options: Options) -> Work:
    """A forward of diffusers' transformer, with what its pipeline makes once per video made here."""
    from diffusers import Kandinsky5T2VPipeline

    dit = build_theirs("dit", config, weights).to(options.device)  # its tables of angles
    if options.compiled:
        dit.compile_repeated_blocks(fullgraph=False, dynamic=True)
    x, text, sparse = given["x"], given["text"], None
    T, H, W = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    if config.nabla:
        dit.set_attention_backend("flex")
        window = Kandinsky5T2VPipeline.fast_sta_nabla(T, H // 8, W // 8, *config.nabla.window, device=x.device)
        sparse = {"sta_mask": window[None, None], "P": config.nabla.P, "to_fractal": True}
    arguments = {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "pooled_projections": given["pooled"],
        "timestep": 1000 * given["t"],
        "visual_rope_pos": [torch.arange(n, device=x.device) for n in (T, H, W)],
        "text_rope_pos": torch.arange(text.shape[1], device=x.device),
        "sparse_params": sparse,
    }
    return lambda: dit(**arguments)


def share_of_tiles(dit: nn.Module, config: DiTConfig, given: dict[str, Tensor]) -> float:
    """How many of the tiles NABLA keeps with these weights and inputs."""
    if config.nabla is None:
        return 1.0
    build, shares = kernels.map_head_by_head, []

    def watched(*arguments) -> Tensor:
        kept = build(*arguments)
        shares.append(kept.float().mean().item())
        return kept

    kernels.map_head_by_head = watched
    try:
        dit(**given, rope_scale=(1.0, 1.0, 1.0))
    finally:
        kernels.map_head_by_head = build
    return statistics.mean(shares)


@contextlib.contextmanager
def streamed(options: Options) -> Sides:
    """Blocks of Pro's width that come from pinned memory while others run."""
    config, grid = replace(PRESETS["t2v-pro-sft-5s-sd"].dit, num_visual_blocks=2 * options.blocks), (8, 64, 96)
    if options.tiny:
        config, grid = replace(TINY_DIT, num_visual_blocks=2 * options.blocks), (2, 16, 16)
    resident = draw(DiT, config, options.device)
    state = {name: x.cpu() for name, x in resident.state_dict().items()}
    with torch.device("meta"):
        dit = DiT(config).to(BF16)
    offload.rest(dit, state, options.device, "blocks")
    for model in (resident, dit):
        fast.install(model)
        kernels.install(model, "auto")
    given = {name: x.to(options.device) for name, x in dit_inputs(config, grid).items()}
    with offload.awake(dit):
        sides: dict[str, Work] = {"ours": lambda: dit(**given, rope_scale=(1.0, 1.0, 1.0))}
        sides["ours, all on the GPU"] = lambda: resident(**given, rope_scale=(1.0, 1.0, 1.0))
        yield sides, dit_flop(config, grid)


def decode(height: int, width: int) -> Callable[[Options], contextlib.AbstractContextManager]:
    """One window of 17 frames."""

    @contextlib.contextmanager
    def row(options: Options) -> Sides:
        config, size = (TINY_VAE, (2, 4, 6)) if options.tiny else (VAEConfig(), (5, height // 8, width // 8))
        ours = draw(VAE, config, options.device)
        plain = twin(ours)
        fast.install(ours)
        if options.compiled:
            compile_models(draw(DiT, TINY_DIT, options.device), ours)
        z = torch.randn(1, 16, *size, device=options.device, dtype=BF16)

        def theirs() -> Work:
            vae = build_theirs("vae", config, plain.state_dict())
            vae.use_framewise_decoding = False  # it would cut this window in two
            if options.compiled:
                vae.decoder = torch.compile(vae.decoder)
            return lambda: vae.decode(z).sample

        yield {"ours": lambda: vae_tiling.decode(ours, z, Tiling()), THEIRS: later(theirs)}, vae_flop(size)

    return row


@contextlib.contextmanager
def layouts(options: Options) -> Sides:
    """The same window in the layouts that a VAE may have; ours: padded windows, channels of a pixel side by side."""
    config, size = (TINY_VAE, (2, 4, 6)) if options.tiny else (VAEConfig(), (5, 64, 96))
    ours = draw(VAE, config, options.device)
    planes, last = twin(ours), copy.deepcopy(ours).to(memory_format=CHANNELS_LAST)
    fast.install(ours)
    z = torch.randn(1, 16, *size, device=options.device, dtype=BF16)
    z_last = z.contiguous(memory_format=CHANNELS_LAST)
    sides: dict[str, Work] = {"ours": lambda: vae_tiling.decode(ours, z, Tiling())}
    sides["definition, NCDHW"] = lambda: vae_tiling.decode(planes, z, Tiling())
    sides["definition, channels_last_3d"] = lambda: vae_tiling.decode(last, z_last, Tiling())
    yield sides, vae_flop(size)


def flex(preset: str) -> Callable[[Options], contextlib.AbstractContextManager]:
    """NABLA's kernel on a fifth of the tiles, with every number of warps and stages; ours: those that we choose."""

    @contextlib.contextmanager
    def row(options: Options) -> Sides:
        from torch.nn.attention.flex_attention import flex_attention

        config, (T, h, w) = PRESETS[preset].dit, latents(preset)
        heads, length = (2, 512) if options.tiny else (config.num_heads, T * h * w // 4)
        q, k, v = torch.randn(3, 1, heads, length, config.head_dim, device=options.device, dtype=BF16)
        kept = torch.rand(1, heads, length // TILE, length // TILE, device=options.device) < 0.2
        kept |= torch.eye(length // TILE, dtype=torch.bool, device=options.device)
        mask = kernels.build_block_mask(kept, backward=False)
        own = kernels.flex_options(config.head_dim, BF16.itemsize, kernels.shared_memory(options.device))
        run = kernels._compiled_flex_attention() if options.compiled else flex_attention
        sides: dict[str, Work] = {"ours": lambda: run(q, k, v, block_mask=mask, kernel_options=own)}
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            how = own | {"fwd_num_warps": warps, "fwd_num_stages": stages}
            name = f"{warps} warps, {stages} stage{'s' * (stages > 1)}" + " (ours)" * (how == own)
            sides[name] = functools.partial(run, q, k, v, block_mask=mask, kernel_options=how)
        yield sides, 4 * TILE**2 * config.head_dim * int(kept.sum())

    return row


@contextlib.contextmanager
def text(options: Options) -> Sides:
    """300 tokens through 4 of Qwen's 28 layers; theirs has its lm_head too, as diffusers calls it."""
    config = TINY_QWEN if options.tiny else QwenConfig(num_layers=4)
    ours = draw(Qwen, config, options.device)
    kernels.install(ours, "auto")
    ids = torch.randint(0, 1000, (2, 300), device=options.device)

    def theirs() -> Work:
        qwen = build_theirs("qwen", config, ours.state_dict()).to(options.device)
        return lambda: qwen(input_ids=ids, output_hidden_states=True).hidden_states[-1]

    yield {"ours": lambda: ours(ids), THEIRS: later(theirs)}, None


@contextlib.contextmanager
def loading(options: Options) -> Sides:
    """Lite's DiT of 4 GB from mapped files to the GPU; theirs: from_pretrained."""
    from rows import loaded_dit_config, write_dit

    config = loaded_dit_config(options.tiny)
    with tempfile.TemporaryDirectory(prefix="kandinsky5-benchmark-") as name:
        folder = Path(name)
        write_dit(options.tiny, folder)

        def ours() -> nn.Module:
            with torch.device("meta"):
                dit = DiT(config)
            return checkpoint.load_weights(dit, checkpoint.find_weights(folder / "ours", "dit"), options.device, BF16)

        def theirs() -> nn.Module:
            from diffusers import Kandinsky5Transformer3DModel

            loaded = Kandinsky5Transformer3DModel.from_pretrained(folder / "theirs", torch_dtype=BF16)
            return loaded.to(options.device)

        yield {"ours": ours, THEIRS: theirs}, None


# --- what all need ---------------------------------------------------------------------------------------------------


def draw(kind: type, config, device: torch.device) -> nn.Module:
    """A model with random weights in bf16, drawn where they stay; matrices keep the size of what they multiply."""
    with torch.device("meta"):
        model = kind(config).to(BF16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1:
                x.normal_(std=x[0].numel() ** -0.5)
            else:
                x.fill_(float("norm" in name and name.endswith("weight")))
    return model


def twin(model: nn.Module) -> nn.Module:
    """The same model once more, on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def latents(preset: str) -> tuple[int, int, int]:
    """Latents (T, h, w) of a preset's video."""
    s = PRESETS[preset].sampling
    return (s.num_frames - 1) // 4 + 1, s.height // 8, s.width // 8


def matmul_rate(options: Options) -> float:
    """Operations per second of bare bf16 matrix products, the best of ten."""
    size = 64 if options.tiny else 8192
    a, b = torch.randn(2, size, size, device=options.device, dtype=BF16)
    times = []
    for _ in range(10):
        wait(options.device)
        start = time.perf_counter()
        a @ b
        wait(options.device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_of(run: Work, device: torch.device) -> int:
    """Bytes that a run has allocated at most, the model included."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def wait(device: torch.device) -> None:
    """Until all that was started is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clear() -> None:
    """Forget the models and graphs of a row."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


ROWS = {  # name: what stands in the table, what builds both sides, what times are of, blocks · passes of a step
    "lite-5s": ("Lite 5 s, 31×64×96", dit_step("t2v-lite-sft-5s"), "block", 64),
    "lite-10s": ("Lite 10 s, 61×64×96, NABLA", dit_step("t2v-lite-sft-10s"), "block", 64),
    "pro-5s-sd": ("Pro 5 s SD, 31×64×96", dit_step("t2v-pro-sft-5s-sd"), "block", 120),
    "pro-5s-hd": ("Pro 5 s HD, 31×96×160, NABLA", dit_step("t2v-pro-sft-5s-hd"), "block", 120),
    "flex-64": ("flex at head dim 64, Lite 10 s", flex("t2v-lite-sft-10s"), "call", None),
    "flex-128": ("flex at head dim 128, Pro 5 s HD", flex("t2v-pro-sft-5s-hd"), "call", None),
    "streamed": ("Pro's blocks streamed, 8×64×96", streamed, "forward", None),
    "layouts": ("VAE, a window of 512×768, not compiled", layouts, "window", None),
    "decode-sd": ("VAE, a window of 512×768", decode(512, 768), "window", None),
    "decode-hd": ("VAE, a window of 768×1280", decode(768, 1280), "window", None),
    "text": ("4 layers of Qwen, 2 × 300 tokens", text, "prompt", None),
    "loading": ("load a DiT of 4.0 GB", loading, "load", None),
}


if __name__ == "__main__":
    sys.exit(main())
