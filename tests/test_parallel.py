"""Several ranks compute what one process does: bit for bit, but for sums of gradients."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from image_golden import load_pipeline
from kandinsky5.config import LITE, PRO, DiTConfig, Tiling
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.nabla import block_map
from kandinsky5.request import Request
from kandinsky5.runtime import fast, kernels, memory, parallel
from kandinsky5.runtime.memory import dit_memory
from kandinsky5.runtime.parallel import Gather, Ranks, choose_ranks, collect, spread
from random_weights import SMALL, SMALL_NABLA, build_small_pipeline, randomise, relative_error
from ranks import on_ranks

HEADS_4 = DiTConfig(
    dim=64, ff_dim=96, time_dim=32, num_text_blocks=1, num_visual_blocks=2, rope_axes=(4, 6, 6), text_dim=16,
    pooled_dim=24,
)  # fmt: skip
HEADS_28 = replace(HEADS_4, dim=224, num_visual_blocks=1, rope_axes=(2, 2, 4))
GRID = {None: (3, 10, 14), SMALL_NABLA: (3, 16, 32)}  # latents: 105 tokens, which neither 2 nor 4 divides; 384


def build(config, plain=False):
    dit = randomise(DiT(config))
    if not plain:
        fast.install(dit)
        kernels.install(dit, "auto")
    return dit


def inputs(config, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "x": (batch, *GRID[config.nabla], config.input_channels),
        "text": (batch, 7, config.text_dim),
        "pooled": (batch, config.pooled_dim),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mask = torch.arange(7) < torch.tensor([[7], [3]])[:batch]
    return {**tensors, "t": torch.tensor([0.9, 0.3])[:batch], "text_mask": mask, "rope_scale": (1.0, 2.0, 2.0)}


@torch.no_grad()
def spread_velocity(config, plain=False):
    dit = build(config, plain)
    spread(dit, torch.distributed.group.WORLD)
    result = dit(**inputs(config))
    collect(dit)
    return result, dit(**inputs(config))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
@pytest.mark.parametrize("world", [2, 4])
def test_velocity_is_the_same_bits(world, nabla, plain):
    for result, alone in on_ranks(world, spread_velocity, replace(HEADS_4, nabla=nabla), plain):
        assert result.equal(alone)


def test_seven_ranks_share_28_heads():
    """Not the same bits: for 15 tokens the CPU's matrix product has another order of sums than for 105."""
    for result, alone in on_ranks(7, spread_velocity, HEADS_28):
        assert relative_error(result, alone) < 1e-6


def gradients(config, ranks=None):
    """Of the mean square of the velocity, averaged over the ranks."""
    dit = build(config).requires_grad_(True)
    if ranks:
        ranks().spread(dit)
    dit(**inputs(config)).square().mean().backward()
    grads = {name: p.grad for name, p in dit.named_parameters()}
    if ranks:
        for grad in grads.values():
            torch.distributed.all_reduce(grad)
            grad /= torch.distributed.get_world_size()
    return grads


@pytest.mark.parametrize(("nabla", "world"), [(None, 4), (SMALL_NABLA, 4), (SMALL_NABLA, 2)])
def test_gradients_are_those_of_one_process(nabla, world):
    """Not the same bits: the gradient of a weight is a sum over tokens, here of the sums over shares."""
    config = replace(HEADS_4, nabla=nabla)
    alone = gradients(config)
    for grads in on_ranks(world, gradients, config, functools.partial(Ranks, sequence=world)):
        assert all(relative_error(grads[name], alone[name]) < 2e-6 for name in alone)


# ---------------------------------------------------------------------------------------------- whole videos

PIPELINE = replace(SMALL, dit=HEADS_4, tiling=Tiling(time=True, frames=8, frame_stride=4))
CALLS = {
    "t2v": {"prompt": ["a fox", "a red fox in the snow"], "num_frames": 17},
    "i2v": {"prompt": "a fox", "image": torch.arange(32 * 48 * 3).reshape(32, 48, 3).to(torch.uint8), "num_frames": 13},
    "long": {"prompt": ["a fox", "a red fox"], "num_frames": 5},  # as if it were: its passes are two
    "skipping": {
        "prompt": "a fox", "num_frames": 5, "num_inference_steps": 6,
        "step_skipping": {"conditional": [1.0] * 5, "unconditional": [1.2, 1.0, 1.1, 1.0, 1.3], "kept": 0.2},
    },
    "skipping two": {
        "prompt": "a fox", "num_frames": 5, "num_inference_steps": 6,
        "step_skipping": {"conditional": [1.0] * 5, "unconditional": [1.2, 1.0, 1.1, 1.0, 1.3], "kept": 0.2},
    },
    "unguided": {"prompt": "a fox", "num_frames": 5, "guidance_scale": 1.0},
}  # fmt: skip


def make_videos(guidance=None, sequence=1, names=tuple(CALLS), kind=Ranks):
    pipe = build_small_pipeline(PIPELINE)
    update = lora.create(pipe.dit, 2, 2.0)
    randomise(update)
    lora.add(pipe.dit, update)
    if guidance:
        pipe.ranks = kind(guidance, sequence).spread(pipe.dit)
    seen, videos = [], {}
    for name in names:
        with mock.patch.object(memory, "ONE_PASS", 0 if name in ("long", "skipping two") else memory.ONE_PASS):
            request = {"progress": False, "output_type": "float", "guidance_scale": 3.0} | CALLS[name]
            videos[name] = pipe(callback=lambda step, t, x: seen.append(x.clone()), **request)
    return videos, seen


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (1, 4)])
def test_videos_are_the_same_bits(shape, alone):
    """Where a rank has 3 tokens, not the same bits: the CPU's matrix product sums those of 12 in another order."""
    for videos, seen in on_ranks(shape[0] * shape[1], make_videos, *shape):
        assert all(videos[name].equal(alone[0][name]) for name in CALLS if shape[1] == 1 or name in ("t2v", "i2v"))
        assert all(relative_error(videos[name], alone[0][name]) < 1e-6 for name in CALLS)
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(seen, alone[1], strict=True))


IMAGES = {  # as in test_images.py
    "t2i": {"num_videos_per_prompt": 2},
    "i2i": {"image": torch.arange(48 * 64 * 3).reshape(48, 64, 3).to(torch.uint8)},
}


def make_image(task, guidance=None, sequence=1):
    pipe = load_pipeline(task)
    if guidance:
        pipe.ranks = Ranks(guidance, sequence).spread(pipe.dit)
    with mock.patch.object(memory, "ONE_PASS", 0):
        return pipe("a fox", height=32, width=48, num_inference_steps=2, output_type="float", **IMAGES[task])


@pytest.mark.parametrize("task", IMAGES)
def test_images_are_those_of_one_process(task):
    expected = make_image(task)
    for image in on_ranks(4, make_image, task, 2, 2):
        assert relative_error(image, expected) < 1e-6


@pytest.fixture(scope="module")
def alone():
    return make_videos()


# ---------------------------------------------------------------------------------------------- the choice, the cost


@pytest.mark.parametrize(
    ("world", "heads", "guided", "ranks"),
    [
        (1, 28, True, (1, 1)), (2, 28, True, (2, 1)), (4, 28, True, (2, 2)), (8, 28, True, (2, 4)),
        (8, 32, True, (2, 4)), (7, 28, True, (1, 7)), (14, 28, True, (2, 7)), (4, 28, False, (1, 4)),
        (16, 32, True, (2, 8)), (3, 6, True, (1, 3)),
    ],
)  # fmt: skip
def test_ranks_are_chosen(world, heads, guided, ranks):
    assert choose_ranks(world, heads, guided) == ranks


@pytest.mark.parametrize(
    ("world", "heads", "guided", "requested"),
    [(3, 28, True, None), (8, 28, False, None), (8, 28, True, "1x8"), (8, 28, True, "4x2"), (8, 28, True, "2x7"),
     (8, 28, True, "8"), (8, 28, True, "x"), (8, 28, True, "0x0"), (8, 28, False, "2x4"), (5, 20, True, "2x2")],
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused(world, heads, guided, requested):
    with pytest.raises(ValueError) as refusal:
        choose_ranks(world, heads, guided, requested)
    assert str(world) in str(refusal.value) and "\n" not in str(refusal.value)


def test_requested_ranks_leave_groups():
    assert choose_ranks(8, 28, True, "2x2") == (2, 2)
    assert choose_ranks(8, 28, True, "1×4") == (1, 4)
    assert choose_ranks(8, 28, True, "1x1") == (1, 1)


def count_volume(config):
    """Bytes that this rank sends to others in the exchanges of a forward."""
    sent, exchange = [], parallel.all_to_all_single_autograd

    def counting(x, to, sizes, group):
        sent.append(x.element_size() * (sum(sizes) - sizes[group.rank()]))
        return exchange(x, to, sizes, group)

    with mock.patch.object(parallel, "all_to_all_single_autograd", counting):
        spread_velocity(config)
    return sent


def test_volume_is_the_formula():
    """SPEC §15: 4 · L · dim · itemsize / P · (P − 1) / P per rank and block."""
    config, P = replace(HEADS_4, nabla=SMALL_NABLA), 4
    tokens = 2 * 384 * config.dim * 4  # bytes of a batch of 2
    for sent in on_ranks(P, count_volume, config):
        assert sum(sent) == config.num_visual_blocks * 4 * tokens / P * (P - 1) / P


def block_peak(config):
    """Bytes that live at once in a forward's visual blocks, beyond the tokens of all."""
    from live_memory import LiveBytes

    dit, given = build(config, plain=True), inputs(config)
    kernels.install(dit, "sdpa")
    spread(dit, torch.distributed.group.WORLD)
    run, peaks = dit.run_blocks, []

    def counted(blocks, x, *arguments):
        with LiveBytes() as live:
            out = run(blocks, x, *arguments)
        peaks.append(live.peak)
        return out

    dit.run_blocks = counted
    with torch.no_grad():
        dit(**given)
    return peaks[-1] - given["x"].numel() // 4 // config.input_channels * config.dim * 4


def test_activations_fall_with_the_ranks():
    """As 1/P from two on; what one process computes alone has no copies that are exchanged."""
    config = replace(HEADS_4, nabla=None, ff_dim=256)
    one, two, four = (max(on_ranks(world, block_peak, config)) for world in (1, 2, 4))
    assert two < 0.7 * one and four < 0.53 * two


@pytest.mark.parametrize("config", [LITE, PRO])
def test_estimated_memory_falls_with_the_ranks(config):
    size = (1, 31, 96, 160)
    whole, shared = (dit_memory(config, size, torch.bfloat16, None, P) for P in (1, 4))
    tokens = 31 * 96 * 160 // 4 * config.dim * 2
    assert (shared - tokens) < 1.1 * (whole - tokens) / 4


# ---------------------------------------------------------------------------------------------- mistakes


def rotations_not_sliced(run_blocks, visual_blocks, group, blocks, x, *arguments):
    if blocks is not visual_blocks:
        return run_blocks(blocks, x, *arguments)
    text, vec, rotations, *others = arguments
    lengths = parallel.shares(x.shape[1], group.size())
    start = sum(lengths[: group.rank()])
    x = x[:, start : start + lengths[group.rank()]]
    x = run_blocks(blocks, x, text, vec, rotations[: x.shape[1]], *others)
    return parallel.Gather.apply(x, lengths, group)


class GatheredBackwards(Gather):
    @staticmethod
    def forward(ctx, x, lengths, group):
        return torch.cat(Gather.forward(ctx, x, lengths, group).split(lengths, dim=1)[::-1], dim=1)


def map_before_exchange(attend, group, q, k, v, mask=None, nabla=None, grid=None):
    lengths = parallel.shares(q.shape[2] * group.size(), group.size())
    heads = q.shape[1] // group.size()
    tiles = q.shape[2] // 64
    own = block_map(q, k, (1, 8, 8 * tiles), nabla)[:, :heads]  # of the own tokens
    whole = own.repeat(1, 1, group.size(), group.size())
    q, k, v = (parallel.tokens_to_heads(x, lengths, group) for x in (q, k, v))
    return parallel.heads_to_tokens(kernels.block_sparse_attention(q, k, v, whole), lengths, group)


MUTATIONS = {
    "rotations not sliced": ("run_share", rotations_not_sliced),
    "shares in the wrong order": ("Gather", GatheredBackwards),
    "map before the exchange": ("attend_together", map_before_exchange),
}


def mutated_velocity(config, name):
    with mock.patch.object(parallel, *MUTATIONS[name]):
        dit = build(config)
        spread(dit, torch.distributed.group.WORLD)
        with torch.no_grad():
            return dit(**inputs(config))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_change_the_velocity(name):
    config = replace(HEADS_4, nabla=SMALL_NABLA)
    with torch.no_grad():
        alone = build(config)(**inputs(config))
    for result in on_ranks(2, mutated_velocity, config, name):
        assert relative_error(result, alone) > 1e-3


def swapped_halves():
    class Swapped(Ranks):
        def divide_passes(self, skips):
            each, skips = super().divide_passes(skips)
            return lambda compute, passes: [*each(compute, passes)][::-1], skips

    return make_videos(2, 1, ["long"], Swapped)[0]["long"]


def windows_in_another_order():
    class Backwards(Ranks):
        def map(self, dim, compute, items):
            yield from [*super().map(dim, compute, items)][::-1]

    return make_videos(2, 1, ["t2v"], Backwards)[0]["t2v"]


def test_windows_in_another_order_change_the_video(alone):
    for video in on_ranks(2, windows_in_another_order):
        assert relative_error(video, alone[0]["t2v"]) > 1e-3


def test_swapped_guidance_halves_change_the_video(alone):
    for video in on_ranks(2, swapped_halves):
        assert relative_error(video, alone[0]["long"]) > 1e-3


@torch.no_grad()
def compiled_velocities(config):
    from kandinsky5.runtime.compile import compile_models
    from kandinsky5.vae import VAE
    from random_weights import SMALL_VAE

    plain, dit, found = build(config), build(config), []
    compile_models(dit, VAE(SMALL_VAE), backend="aot_eager")
    spread(dit, torch.distributed.group.WORLD)
    for batch in (1, 2):
        for frames in (3, 2):
            given = inputs(config, batch)
            given["x"] = given["x"][:, :frames]
            found.append(relative_error(dit(**given), plain(**given)))
    torch._dynamo.reset()
    return found


@pytest.mark.compiled
@pytest.mark.parametrize("nabla", [None, SMALL_NABLA])
def test_compiled_blocks_share_tokens(nabla):
    """In one graph, with the exchanges in it, and without being compiled anew for each length."""
    for errors in on_ranks(2, compiled_velocities, replace(HEADS_4, nabla=nabla)):
        assert max(errors) < 1e-5


def expanded_by(rank_0_alone):
    """What each rank makes of a prompt, where a rank's model would write its own number behind it."""
    from kandinsky5 import sample_command
    from kandinsky5.extras import expand

    rank = torch.distributed.get_rank()
    pipe = SimpleNamespace(ranks=Ranks(2, 1, shard=not rank_0_alone), text_encoder=None)
    job = sample_command.Job({"image": None}, Request.resolve(SMALL, "лиса"), object())

    def own(encoder, request, instruction, image):
        return replace(request, prompts=(f"{request.prompts[0]} {rank}",))

    with mock.patch.object(expand, "expand_request", own):
        return sample_command.expand_once(pipe, job).prompts


def test_one_rank_expands_the_prompt_for_all():
    assert on_ranks(2, expanded_by, True) == [("лиса 0",)] * 2
    assert on_ranks(2, expanded_by, False) == [("лиса 0",), ("лиса 1",)]  # sharded, all compute, and alike
