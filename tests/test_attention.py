"""Every path through attention.py against the dense definition."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky5 import attention as module
from kandinsky5.attention import (
    KERNELS,
    attention,
    block_sparse_attention,
    build_block_mask,
    chunked_attention,
    dense_attention,
    expand_block_map,
    use,
)
from random_weights import relative_error


def random_qkv(*shape, dtype=torch.float32):
    return tuple(torch.randn(3, *shape).to(dtype))


def random_map(B, N, tiles, share):
    """Some tiles by chance, the diagonal always, and one row that keeps everything."""
    chosen = torch.rand(B, N, tiles, tiles) < share
    chosen[..., 1, :] = True
    return chosen | torch.eye(tiles, dtype=torch.bool)


def test_definition_is_softmax_by_hand():
    q, k, v = random_qkv(1, 1, 3, 4)
    weights = torch.exp(q[0, 0] @ k[0, 0].T / 2)
    torch.testing.assert_close(dense_attention(q, k, v)[0, 0], weights / weights.sum(-1, keepdim=True) @ v[0, 0])


def test_masked_keys_have_no_weight():
    q, k, v = random_qkv(2, 3, 5, 8)
    mask = torch.tensor([True, True, True, False, False])
    torch.testing.assert_close(
        attention(q, k, v, mask[None, None, None]), dense_attention(q, k[..., :3, :], v[..., :3, :])
    )


@pytest.mark.parametrize("scores", [1, 3000, 10**9])
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_equals_dense(scores, masked, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)  # one head at a time, a few, all at once
    q, k, v = (x[..., :n, :] for x, n in zip(random_qkv(2, 3, 600, 16), (600, 70, 70), strict=True))
    mask = (torch.rand(2, 1, 1, 70) < 0.5) if masked else None
    expected = dense_attention(q, k, v, mask)
    with torch.no_grad():  # the probabilities take the place of the scores
        assert relative_error(chunked_attention(q, k, v, mask), expected) < 1e-6
    with torch.enable_grad():
        out = chunked_attention(q.requires_grad_(), k, v, mask)
    assert out.requires_grad
    assert relative_error(out.detach(), expected) < 1e-6


def test_chunks_make_nothing_of_the_size_of_all_scores():
    """Nor of the mask, which is the same for all heads and queries: for Lite's two prompts it would be 683 MB."""
    q, k, v = (torch.randn(2, 64, n, 8) for n in (1024, 256, 256))
    with torch.no_grad(), LargestTensor() as largest:
        chunked_attention(q, k, v, torch.rand(2, 1, 1, 256) < 0.5)
    assert largest.size == module.SCORES < 2 * 64 * 1024 * 256 / 10


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has in memory that anything returns inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scores, pairs", [(10**9, 10**9), (3 * 64 * 64, 80), (1, 1)])
def test_block_sparse_equals_dense(share, fused, scores, pairs, monkeypatch):
    """All tiles that keep equally many at once, a few of two heads, and one of one."""
    monkeypatch.setattr(module, "SCORES", scores)
    monkeypatch.setattr(module, "TILE_PAIRS", pairs)
    q, k, v = random_qkv(2, 3, 6 * 64, 16)
    chosen = random_map(2, 3, 6, share)
    expected = dense_attention(q, k, v, expand_block_map(chosen))
    for grad in (False, True):  # without, the probabilities take the place of the scores
        with torch.set_grad_enabled(grad):
            assert relative_error(block_sparse_attention(q, k, v, chosen, fused), expected) < 1e-6


@pytest.mark.parametrize("kernel, most", [("auto", 6e-3), ("chunked", 6e-3), ("sdpa", 3e-3)])
def test_errors_in_bf16(kernel, most):
    """0.0045 and 0.0022 measured: scores in bf16 cost a factor of two."""
    q, k, v = random_qkv(1, 2, 16 * 64, 64, dtype=torch.bfloat16)
    chosen = random_map(1, 2, 16, 0.3)
    for given, mask in ((chosen, expand_block_map(chosen)), (None, None)):
        for grad in (False, True):
            with use(kernel), torch.set_grad_enabled(grad):
                out = attention(q, k, v, block_map=given)
            assert relative_error(out, dense_attention(q.double(), k.double(), v.double(), mask)) < most


@pytest.mark.parametrize("kernel", set(KERNELS) - {"flex"})
def test_every_kernel_that_one_can_choose_computes_the_same(kernel):
    q, k, v = random_qkv(1, 2, 10 * 64, 16)
    chosen, mask = random_map(1, 2, 10, 0.3), torch.rand(1, 1, 1, 640) < 0.5
    for options in ({}, {"mask": mask}, {"block_map": chosen}):
        bools = expand_block_map(chosen) if "block_map" in options else options.get("mask")
        with use(kernel):
            assert relative_error(attention(q, k, v, **options), dense_attention(q, k, v, bools)) < 1e-6


def test_a_kernel_is_used_inside_its_block_only_and_unknown_names_are_refused():
    with use("dense"):
        assert module._kernel == "dense"
    assert module._kernel == "auto"
    with pytest.raises(ValueError, match="'fast': choose one of auto, sdpa"), use("fast"):
        pass


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "queries", "with_map", "taken"),
    [
        ("auto", "cpu", torch.bfloat16, 512, False, "chunked_attention"),
        ("auto", "cpu", torch.bfloat16, 511, False, "scaled_dot_product_attention"),
        ("auto", "cpu", torch.float32, 512, False, "scaled_dot_product_attention"),
        ("auto", "cuda", torch.bfloat16, 512, False, "scaled_dot_product_attention"),
        ("auto", "meta", torch.bfloat16, 512, True, "scaled_dot_product_attention"),
        ("auto", "cpu", torch.bfloat16, 512, True, "block_sparse_attention"),
        ("auto", "cuda", torch.bfloat16, 512, True, "_compiled_flex_attention"),
        ("sdpa", "cpu", torch.bfloat16, 512, False, "scaled_dot_product_attention"),
        ("sdpa", "cuda", torch.bfloat16, 512, True, "block_sparse_attention, fused"),
        ("chunked", "cpu", torch.float32, 64, False, "chunked_attention"),
        ("dense", "cuda", torch.float32, 64, True, "dense_attention"),
    ],
)
def test_auto_takes_what_its_docstring_says(monkeypatch, kernel, device, dtype, queries, with_map, taken):
    """Without a GPU: what stands for a tensor says where it is, and each kernel says its name."""
    for owner, name in (
        (module, "chunked_attention"),
        (module, "dense_attention"),
        (module.F, "scaled_dot_product_attention"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: name)
    monkeypatch.setattr(module, "_compiled_flex_attention", lambda: lambda *_, **__: "_compiled_flex_attention")
    monkeypatch.setattr(
        module, "block_sparse_attention", lambda *_, fused: "block_sparse_attention" + ", fused" * fused
    )
    place = {"is_cuda": device == "cuda", "is_meta": device == "meta", "device": SimpleNamespace(type=device)}
    q = SimpleNamespace(dtype=dtype, shape=(1, 2, queries, 16), **place)
    block_map = torch.ones(1, 2, queries // 64, queries // 64, dtype=torch.bool) if with_map else None
    with use(kernel):
        assert attention(q, q, q, block_map=block_map) == taken


def test_flex_equals_dense():
    q, k, v = random_qkv(2, 3, 6 * 64, 16)
    chosen = random_map(2, 3, 6, 0.2)
    expected = dense_attention(q, k, v, expand_block_map(chosen))
    assert relative_error(flex_attention(q, k, v, block_mask=build_block_mask(chosen)), expected) < 1e-6


def test_compiled_flex_is_given_the_tile_size_of_the_map(monkeypatch):
    """Its kernels' default of 128 tokens refuses a map in tiles of 64; only the call can be seen without a GPU."""
    given = {}
    monkeypatch.setattr(module, "_compiled_flex_attention", lambda: lambda q, k, v, **options: given.update(options))
    q, chosen = torch.randn(1, 1, 128, 16), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with use("flex"):
        attention(q, q, q, block_map=chosen)
    assert given["kernel_options"] == {"BLOCK_M": 64, "BLOCK_N": 64}
    assert given["block_mask"].BLOCK_SIZE == (64, 64)


def test_block_mask_holds_the_map():
    chosen = random_map(2, 3, 6, 0.2)
    mask = build_block_mask(chosen)
    assert mask.BLOCK_SIZE == (64, 64)
    assert mask.to_dense().bool().equal(chosen)
    assert mask.full_kv_num_blocks.equal(chosen.sum(-1, dtype=torch.int32))


def test_the_comparison_can_fail():
    q, k, v = random_qkv(1, 1, 6 * 64, 16)
    chosen = random_map(1, 1, 6, 0.2)
    wrong = chosen.clone()
    wrong[0, 0, 0, 3] ^= True
    assert (
        relative_error(block_sparse_attention(q, k, v, wrong), dense_attention(q, k, v, expand_block_map(chosen)))
        > 1e-3
    )


def test_gradients_flow_through_block_sparse():
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 4 * 64, 8))
    chosen = random_map(1, 2, 4, 0.3)
    upstream = torch.randn_like(q)
    ours = torch.autograd.grad((block_sparse_attention(q, k, v, chosen) * upstream).sum(), (q, k, v))
    expected = torch.autograd.grad((dense_attention(q, k, v, expand_block_map(chosen)) * upstream).sum(), (q, k, v))
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 1e-5
