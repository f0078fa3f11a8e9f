"""On a GPU every kernel against the definition of attention in float64, at both released head dims."""

import pytest
import torch

from kandinsky5 import nabla
from kandinsky5.attention import dense_attention, expand_block_map
from kandinsky5.config import NablaConfig
from kandinsky5.runtime import kernels
from kandinsky5.runtime.device import compiler_missing
from random_weights import relative_error

NABLA = NablaConfig(P=0.5, window=(3, 1, 1))
MOST = {torch.float32: 2e-3, torch.bfloat16: 8e-3}  # float32 may multiply in TF32
DTYPES = pytest.mark.parametrize("dtype", MOST, ids=lambda dtype: str(dtype).removeprefix("torch."))
HEAD_DIMS = pytest.mark.parametrize("D", [64, 128])
compiled = pytest.mark.skipif(compiler_missing("cuda") is not None, reason=f"there is no {compiler_missing('cuda')}")


def draw(device, dtype, L, D, S=None, B=1, N=3):
    generator = torch.Generator().manual_seed(L)
    shapes = (L, S or L, S or L)
    return [torch.randn(B, N, length, D, generator=generator).to(device, dtype) for length in shapes]


def exact(q, k, v, mask=None):
    return dense_attention(q.double(), k.double(), v.double(), mask)


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("L", [64, 777, 3072])
def test_full_attention(device, note, dtype, D, L):
    q, k, v = draw(device, dtype, L, D)
    error = relative_error(kernels.attend_through("auto", q, k, v), exact(q, k, v))
    note(f"{error:.1e}")
    assert error < MOST[dtype]


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("S", [77, 256])
def test_text_attention_with_a_mask(device, note, dtype, D, S):
    q, k, v = draw(device, dtype, 1000, D, S, B=2)
    mask = torch.arange(S, device=device) < torch.tensor([[S], [20]], device=device)
    mask = mask[:, None, None]
    error = relative_error(kernels.attend_through("auto", q, k, v, mask), exact(q, k, v, mask))
    note(f"{error:.1e}")
    assert error < MOST[dtype]


def nabla_error(name, device, dtype, D, grid):
    T, H, W = grid
    q, k, v = draw(device, dtype, T * H * W, D)
    mask = expand_block_map(nabla.block_map(q, k, grid, NABLA))
    return relative_error(kernels.attend_through(name, q, k, v, nabla=NABLA, grid=grid), exact(q, k, v, mask))


@compiled
@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("grid", [(2, 16, 24), (3, 32, 16), (7, 8, 24)], ids=str)
def test_nabla_through_flex(device, note, dtype, D, grid):
    error = nabla_error("flex", device, dtype, D, grid)
    note(f"{error:.1e}")
    assert error < MOST[dtype]


@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("grid", [(2, 16, 24), (7, 8, 24)], ids=str)
def test_nabla_by_gathering(device, note, dtype, D, grid):
    error = nabla_error("sdpa", device, dtype, D, grid)
    note(f"{error:.1e}")
    assert error < MOST[dtype]


@compiled
def test_flex_is_compiled_a_few_times_for_all_sizes(device, note):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for grid in ((2, 16, 24), (3, 32, 16), (7, 8, 24), (5, 16, 16), (4, 24, 24)):
        nabla_error("flex", device, torch.bfloat16, 64, grid)
    count = counters["stats"]["unique_graphs"]
    note(f"{count} graphs for 5 grids")
    assert count <= 3


@compiled
@DTYPES
@HEAD_DIMS
@pytest.mark.parametrize("grid", [(2, 16, 24), (3, 8, 24)], ids=str)  # an even number of tiles, and an odd one
def test_flex_has_the_gradients_of_the_definition(device, note, dtype, D, grid):
    T, H, W = grid
    q, k, v = (x.requires_grad_() for x in draw(device, dtype, T * H * W, D))
    out = kernels.attend_through("flex", q, k, v, nabla=NABLA, grid=grid)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    mask = expand_block_map(nabla.block_map(q, k, grid, NABLA))
    theirs = torch.autograd.grad((exact(q, k, v, mask) * upstream).sum(), (q, k, v))
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    note(f"{max(errors):.1e}")
    assert max(errors) < 4 * MOST[dtype]


def test_no_sizes_are_moved_to_the_cpu_in_a_dense_step(device):
    """A copy to the CPU would make the GPU wait in every block."""
    q, k, v = draw(device, torch.bfloat16, 1024, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.attend_through("auto", q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
