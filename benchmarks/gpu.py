"""Us on a GPU next to diffusers at its best there: flex backend, repeated blocks compiled, as its documentation says.

    pip install -e '.[parity]' -c constraints.txt && python benchmarks/gpu.py [--rows NAME ...]

Both sides hold the same random weights in bf16, drawn on the GPU. Rows of the DiT run `--blocks` of its visual blocks
(4) at the released size, as all are alike: times are of one block, and the last column says what a step of the whole
model takes at that rate. Each side runs once to compile, and then `--repeats` times in turn. The share is of the rate
of bare bf16 matrix products on this GPU, for the operations of the definition on the tiles that are kept: 1 would be a
model without norms, softmax and memory traffic. Inputs and queries are such that NABLA's maps are peaked, as trained
ones are; a row says how many tiles they keep. Rows go one by one to RESULTS/gpu.json and the table to gpu.md;
--resume leaves out what is there. About ten minutes on an H100 (computed, not measured).
"""

import argparse
import contextlib
import gc
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
from rows import TINY_DIT, TINY_QWEN, TINY_VAE, dit_flop, dit_inputs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kandinsky5 import checkpoint, vae_tiling  # noqa: E402
from kandinsky5.config import PRESETS, DiTConfig, NablaConfig, QwenConfig, Tiling, VAEConfig  # noqa: E402
from kandinsky5.dit import DiT  # noqa: E402
from kandinsky5.files import write_text  # noqa: E402
from kandinsky5.qwen import Qwen  # noqa: E402
from kandinsky5.runtime import fast, kernels, offload  # noqa: E402
from kandinsky5.runtime.compile import check_compile, compile_models  # noqa: E402
from kandinsky5.vae import VAE  # noqa: E402

BF16 = torch.bfloat16
Work = Callable[[], object]


class Options(NamedTuple):
    """What all rows need to know."""

    device: torch.device
    blocks: int
    tiny: bool
    compiled: bool


def main() -> None:
    """Run the rows and print the table."""
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
    for name in arguments.rows or ROWS:
        if arguments.resume and name in results:
            continue
        print(f"{name}: {ROWS[name][0]}", flush=True)
        try:
            results[name] = measure(name, options, arguments.repeats)
        except torch.OutOfMemoryError as error:
            print(f"    left out: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            clear()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(results, indent=1) + "\n")
            write_text(file.with_suffix(".md"), build_table(results))
    print("\n" + build_table(results))


def measure(name: str, options: Options, repeats: int) -> dict:
    """Both sides of a row in turn, in seconds and bytes."""
    work, row, per, whole = ROWS[name]
    with torch.inference_mode(), row(options) as (ours, theirs, flop):
        sides = {"ours": ours, "theirs": theirs}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks = {}
        for side, run in sides.items():
            run()  # compiles
            wait(options.device)
            peaks[side] = peak_of(run, options.device)
        for _ in range(repeats):
            for side, run in sides.items():
                wait(options.device)
                start = time.perf_counter()
                run()
                wait(options.device)
                seconds[side].append(time.perf_counter() - start)
            print("    " + ", ".join(f"{side} {values[-1]:.4g} s" for side, values in seconds.items()), flush=True)
    rate = matmul_rate(options)
    ours_s, theirs_s = (statistics.median(seconds[side]) for side in sides)
    parts = options.blocks if per == "block" else 1
    return {
        "work": work,
        "per": per,
        "ours": ours_s / parts,
        "theirs": theirs_s / parts,
        "ratio": statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)),
        "share": flop / ours_s / rate if flop else None,
        "step": whole * ours_s / parts if whole else None,
        "peaks": peaks,
        "rate": rate,
        "tiny": options.tiny,
        "gpu": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def build_table(results: dict) -> str:
    """Markdown: a line for each row that was measured."""
    head = ("work", "per", "ours", "diffusers, compiled", "ratio", "share of the matmul rate", "our peak", "their peak")
    lines = [f"| {' | '.join((*head, 'a step of all blocks'))} |", "|" + "---|" * (len(head) + 1)]
    rows = [results[name] for name in ROWS if name in results]
    for row in rows:
        share = "–" if row["share"] is None else f"{row['share']:.2f}"
        peaks = [f"{row['peaks'][side] / 1e9:.1f} GB" for side in ("ours", "theirs")]
        step = "–" if row["step"] is None else f"{row['step']:.1f} s"
        times = [f"{row[side]:.4g} s" for side in ("ours", "theirs")]
        cells = (row["work"], row["per"], *times, f"{row['ratio']:.2f}", share, *peaks, step)
        lines.append(f"| {' | '.join(cells)} |")
    toy = " (toy sizes: no figures to keep)"
    machines = sorted({f"{row['gpu']}, torch {row['torch']}" + toy * row["tiny"] for row in rows})
    rates = [row["rate"] / 1e12 for row in rows]
    if rates:
        lines += ["", f"{'; '.join(machines)}. Bare bf16 matmuls: {min(rates):.3g} to {max(rates):.3g} Tflop/s."]
    return "\n".join(lines) + "\n"


# --- rows: contexts that give our work, theirs, and the operations of ours -------------------------------------------

Sides = Iterator[tuple[Work, Work, int | None]]


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
        theirs = build_theirs("dit", config, ours.state_dict()).to(options.device)  # its tables of angles
        fast.install(ours)
        kernels.install(ours, "auto")
        if options.compiled:
            compile_models(ours, draw(VAE, TINY_VAE, options.device))
            theirs.compile_repeated_blocks(fullgraph=False, dynamic=True)
        given = {name: x.to(options.device) for name, x in dit_inputs(config, grid).items()}
        if config.nabla:
            coarse = given["x"][:, :, ::16, ::16].repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
            given["x"] = coarse + 0.3 * given["x"]
        kept = share_of_tiles(ours, config, given)
        print(f"    {100 * kept:.0f} % of the tiles", flush=True)
        flop = dit_flop(config, grid, kept)
        scale = PRESETS[preset].sampling.rope_scale or (1.0, 1.0, 1.0)
        yield lambda: ours(**given, rope_scale=scale), their_step(theirs, config, given), flop

    return row


def their_step(dit: nn.Module, config: DiTConfig, given: dict[str, Tensor]) -> Work:
    """A forward of diffusers' transformer, with what its pipeline makes once per video made here."""
    from diffusers import Kandinsky5T2VPipeline

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
    """Blocks of Pro's width that come from pinned memory while others run; theirs: ours, all on the GPU."""
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
        sides = (lambda model=model: model(**given, rope_scale=(1.0, 1.0, 1.0)) for model in (dit, resident))
        yield *sides, dit_flop(config, grid)


def decode(height: int, width: int) -> Callable[[Options], contextlib.AbstractContextManager]:
    """One window of 17 frames."""

    @contextlib.contextmanager
    def row(options: Options) -> Sides:
        config, size = (TINY_VAE, (2, 4, 6)) if options.tiny else (VAEConfig(), (5, height // 8, width // 8))
        ours = draw(VAE, config, options.device)
        theirs = build_theirs("vae", config, ours.state_dict())
        theirs.use_framewise_decoding = False  # it would cut this window in two
        fast.install(ours)
        if options.compiled:
            compile_models(draw(DiT, TINY_DIT, options.device), ours)
            theirs.decoder = torch.compile(theirs.decoder)
        z = torch.randn(1, 16, *size, device=options.device, dtype=BF16)
        yield lambda: vae_tiling.decode(ours, z, Tiling()), lambda: theirs.decode(z).sample, None

    return row


@contextlib.contextmanager
def text(options: Options) -> Sides:
    """300 tokens through 4 of Qwen's 28 layers; theirs has its lm_head too, as diffusers calls it."""
    config = TINY_QWEN if options.tiny else QwenConfig(num_layers=4)
    ours = draw(Qwen, config, options.device)
    theirs = build_theirs("qwen", config, ours.state_dict()).to(options.device)
    kernels.install(ours, "auto")
    ids = torch.randint(0, 1000, (2, 300), device=options.device)
    yield lambda: ours(ids), lambda: theirs(input_ids=ids, output_hidden_states=True).hidden_states[-1], None


@contextlib.contextmanager
def loading(options: Options) -> Sides:
    """Lite's DiT of 4 GB from mapped files to the GPU; theirs: from_pretrained."""
    from diffusers import Kandinsky5Transformer3DModel
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
            loaded = Kandinsky5Transformer3DModel.from_pretrained(folder / "theirs", torch_dtype=BF16)
            return loaded.to(options.device)

        yield ours, theirs, None


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
    "streamed": ("Pro's blocks streamed, 8×64×96; ours, all on the GPU", streamed, "forward", None),
    "decode-sd": ("VAE, a window of 512×768", decode(512, 768), "window", None),
    "decode-hd": ("VAE, a window of 768×1280", decode(768, 1280), "window", None),
    "text": ("4 layers of Qwen, 2 × 300 tokens", text, "prompt", None),
    "loading": ("load a DiT of 4.0 GB", loading, "load", None),
}


if __name__ == "__main__":
    main()
