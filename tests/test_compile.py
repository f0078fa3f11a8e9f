"""torch.compile: the same output, one graph for a block, and none anew for another size.

But for one, the tests trace and do not generate code (aot_eager), which takes seconds where inductor takes minutes:
graphs, their breaks and recompilations are the same.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import kandinsky5.runtime.compile
from kandinsky5 import Pipeline, attention
from kandinsky5.dit import DiT
from kandinsky5.rope import apply_rope, build_rotations
from kandinsky5.runtime import fast, kernels, offload, pieces
from kandinsky5.runtime.compile import (
    HOW,
    RealAttention,
    allow_recompiling,
    as_real,
    attend_opaquely,
    check_compile,
    compile_models,
)
from kandinsky5.runtime.device import compiler_missing
from kandinsky5.vae import VAE
from random_weights import SMALL_DIT, SMALL_NABLA, SMALL_VAE, randomise, relative_error, save_small_checkpoint


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def run(dit, grid, words=7, batch=1, dtype=torch.float32):
    """grid: (T, H, W) of latents, twice as high and wide as that of tokens."""
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (
        torch.randn(batch, *shape, generator=generator).to(dtype) for shape in ((*grid, 33), (words, 16), (24,))
    )
    mask = torch.ones(batch, words, dtype=torch.bool) if batch > 1 else None
    if batch > 1:
        mask[0, -2:] = False
    with torch.no_grad():
        return dit(x, text, pooled, torch.full((batch,), 0.3), mask, rope_scale=(1.0, 1.0, 1.0))


def build(nabla=None, dtype=torch.float32):
    dit, vae = randomise(DiT(replace(SMALL_DIT, nabla=nabla))).to(dtype), randomise(VAE(SMALL_VAE))
    fast.install(dit, vae)
    kernels.install(dit, "auto")
    return dit, vae


@pytest.mark.compiled
def test_blocks_of_a_kind_share_a_graph_for_all_sizes():
    dit, vae = build()
    sizes = [((3, 10, 6), 7), ((2, 12, 8), 9)]
    expected = [run(dit, *size) for size in sizes]
    compile_models(dit, vae, backend="aot_eager")
    assert all(relative_error(run(dit, *size), v) < 1e-6 for size, v in zip(sizes, expected, strict=True))
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.compiled
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_two_kinds_of_blocks_are_two_graphs_for_all_sizes(dtype, tolerance):
    """Grids below and above the 512 tokens where bf16 goes in chunks. A batch of several counts as another kind."""
    sizes = [((3, 10, 6), 7), ((2, 12, 8), 9), ((4, 10, 6), 5), ((2, 32, 32), 11), ((2, 36, 32), 12)]
    dit, vae = build(dtype=dtype)
    expected = {batch: [run(dit, *size, batch, dtype) for size in sizes] for batch in (1, 2, 3)}
    compile_models(dit, vae, backend="aot_eager")
    for batch, count in ((1, 2), (2, 4), (3, 4)):
        for size, velocity in zip(sizes, expected[batch], strict=True):
            assert relative_error(run(dit, *size, batch, dtype), velocity) < tolerance
            assert graphs() == count
    assert not counters["graph_break"]


@pytest.mark.compiled
def test_nabla_is_two_graphs_too():
    sizes = [((3, 32, 32), 7), ((2, 48, 32), 9), ((5, 32, 64), 5)]
    dit, vae = build(SMALL_NABLA)
    expected = [run(dit, *size) for size in sizes]
    compile_models(dit, vae, backend="aot_eager")
    assert all(relative_error(run(dit, *size), v) < 1e-6 for size, v in zip(sizes, expected, strict=True))
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.compiled
def test_blocks_compute_through_the_kernel_that_is_named(monkeypatch):
    dit, vae = build()
    compile_models(dit, vae, "dense", backend="aot_eager")
    calls, dense = [], attention.dense_attention
    monkeypatch.setattr(kernels, "dense_attention", lambda *tensors: calls.append(1) or dense(*tensors))
    run(dit, (2, 12, 8))
    assert len(calls) == 2 + 2 * 2


def test_attention_is_one_operation_with_all_that_it_is_given():
    q, k, v = torch.randn(3, 2, 3, 4 * 64, 16)
    compiled = torch.compile(attend_opaquely, backend="aot_eager", fullgraph=True)
    for options in ({"mask": torch.rand(2, 1, 1, 4 * 64) < 0.5}, {"nabla": SMALL_NABLA, "grid": (1, 16, 16)}):
        assert relative_error(compiled("auto", q, k, v, **options), attention.attend(q, k, v, **options)) < 1e-6


@pytest.mark.compiled
@pytest.mark.parametrize("piece", [0, 20 * 32 * 32])  # all in pieces of two frames; some, of several
def test_the_decoder_is_compiled_once_for_all_sizes(piece, monkeypatch):
    monkeypatch.setattr("kandinsky5.runtime.fast_vae.PIECE", piece)
    dit, vae = build()
    shapes = [(1, 4, 6), (5, 4, 6), (5, 6, 4), (2, 3, 5), (1, 6, 4), (4, 8, 8), (3, 5, 5)]  # T, h, w
    zs = [torch.randn(1, 16, *shape) for shape in shapes]
    with torch.no_grad():
        expected = [vae.decode(z) for z in zs]
        compile_models(dit, vae, backend="aot_eager")
        for i, (z, video) in enumerate(zip(zs, expected, strict=True)):
            assert relative_error(vae.decode(z), video) < 1e-5
            if i == 1:
                count = graphs()
    assert graphs() == count > 0


@pytest.mark.compiled
def test_it_goes_with_streamed_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(kandinsky5.runtime.compile.compile_models, "__defaults__", ("auto", "aot_eager"))
    monkeypatch.setattr("kandinsky5.runtime.fast_vae.PIECE", 0)  # so that the decoder, too, runs what is compiled
    save_small_checkpoint(tmp_path / "small")
    plain = Pipeline.load(tmp_path / "small", dtype=torch.float32)
    with monkeypatch.context() as while_it_loads:
        while_it_loads.setattr(offload, "_fetch", lambda *_: pytest.fail("nothing is fetched yet"))
        both = Pipeline.load(tmp_path / "small", dtype=torch.float32, offload="blocks", compile=True)
    frames = [pipe("a fox", progress=False, output_type="float", guidance_scale=1) for pipe in (plain, both)]
    assert (frames[0] - frames[1]).abs().max() < 1e-4
    count = graphs()
    both("a cat", progress=False, guidance_scale=1, height=48, num_inference_steps=3)
    assert graphs() == count > 2


@pytest.mark.compiled
def test_generated_code_computes_the_same():
    """Inductor itself, on the smallest of DiTs. Without a compiler on the machine there is nothing to test."""
    try:
        check_compile(True, torch.device("cpu"))
    except ValueError as reason:
        pytest.skip(str(reason))
    dit = randomise(DiT(replace(SMALL_DIT, num_text_blocks=0, num_visual_blocks=1)))
    expected = [run(dit, grid) for grid in ((3, 10, 6), (2, 12, 8))]
    compile_models(dit, VAE(SMALL_VAE))
    assert relative_error(run(dit, (3, 10, 6)), expected[0]) < 1e-5
    assert relative_error(run(dit, (2, 12, 8)), expected[1]) < 1e-5
    assert graphs() == 1


@pytest.mark.compiled
def test_pieces_of_compiled_blocks_are_two_graphs_for_all_sizes():
    """And what is compiled as a whole is used again behind them."""
    dit, vae = build()
    sizes = [((3, 10, 6), 7), ((2, 12, 8), 9), ((5, 10, 12), 5)]  # 45, 48 and 150 tokens
    expected = [run(dit, *size) for size in sizes]
    compile_models(dit, vae, backend="aot_eager")
    whole = [run(dit, *size) for size in sizes]
    before = graphs()
    for size, velocity in zip(sizes, expected, strict=True):
        with pieces.in_pieces(dit, 20):
            assert relative_error(run(dit, *size), velocity) < 1e-6
    assert graphs() == before + 2 and not counters["graph_break"]
    assert all(run(dit, *size).equal(v) for size, v in zip(sizes, whole, strict=True)) and graphs() == before + 2


def test_options_are_those_of_the_pytorch_at_hand(monkeypatch):
    torch.compile(run, **HOW, **allow_recompiling())
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic, fullgraph: model)  # as 2.11 has it
    with torch._dynamo.config.patch(recompile_limit=8):
        assert allow_recompiling() == {} and torch._dynamo.config.recompile_limit == 32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_real_rotations_are_the_complex_ones(dtype, tolerance):
    x, rotations = torch.randn(2, 3, 20, 16).to(dtype), build_rotations(10 * torch.randn(20, 8))
    ours, exact = RealAttention.rotate(x, as_real(rotations)), apply_rope(x, rotations)
    assert ours.dtype == dtype and relative_error(ours, exact) <= tolerance


@pytest.mark.parametrize(
    "compile, device, missing, answer",
    [("auto", "cuda", None, True), ("auto", "cuda", "gcc", False), ("auto", "cpu", None, False),
     ("auto", "mps", None, False), (True, "cpu", None, True), (False, "cuda", None, False),
     (True, "cuda", "Triton here", ValueError), ("yes", "cpu", None, ValueError)],
)  # fmt: skip
def test_where_auto_compiles(compile, device, missing, answer, monkeypatch):
    monkeypatch.setattr(kandinsky5.runtime.compile, "compiler_missing", lambda device: missing)
    if answer is ValueError:
        with pytest.raises(ValueError, match=missing or compile):
            check_compile(compile, torch.device(device))
    else:
        assert check_compile(compile, torch.device(device)) is answer


@pytest.mark.parametrize("system, device, present, missing", [
    ("linux", "cpu", {"g++"}, None), ("linux", "cpu", {"gcc"}, "g++"), ("linux", "cuda", {"triton", "gcc"}, None),
    ("linux", "cuda", {"triton", "clang"}, None), ("linux", "cuda", {"gcc"}, "Triton"),
    ("linux", "cuda", {"triton"}, "gcc"), ("linux", "cuda", {"triton", "CC"}, "mycc"),
    ("darwin", "cpu", {"clang++"}, None), ("darwin", "cpu", {"g++"}, "clang++"),
    # triton-windows brings a C compiler, which it takes where CC names none; for a CPU PyTorch calls MSVC's.
    ("win32", "cuda", {"triton"}, None), ("win32", "cuda", {"triton", "CC"}, "mycc"),
    ("win32", "cuda", {"cl"}, "Triton"), ("win32", "cpu", {"cl"}, None), ("win32", "cpu", {"g++"}, "cl "),
])  # fmt: skip
def test_what_a_compiler_needs(system, device, present, missing, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name if name in present else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr("sys.platform", system)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    if "CC" in present:
        monkeypatch.setenv("CC", "mycc")
    found = compiler_missing(device)
    assert found is None if missing is None else missing in found


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_compiler_that_is_switched_off_is_missing(switch, monkeypatch):
    """Flex would run uncompiled, where it ignores blocks."""
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert compiler_missing("cpu") is None
    monkeypatch.setenv(switch, "1")
    assert switch in compiler_missing("cpu")


@pytest.mark.parametrize("capability, missing", [((6, 1), "8.0"), ((7, 5), "8.0"), ((8, 0), None), ((12, 0), None)])
def test_triton_needs_a_gpu_that_it_compiles_for(capability, missing, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = compiler_missing("cuda")
    assert found is None if missing is None else missing in found
    assert compiler_missing("cpu") is None
