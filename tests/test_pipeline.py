"""The pipeline: what a user may ask for, what comes out, and what each mistake is answered with."""

import copy
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky5 import Pipeline, sampler
from kandinsky5 import pipeline as pipeline_module
from kandinsky5.config import PRESETS, PipelineConfig
from kandinsky5.extras.preview import fit_colours
from kandinsky5.request import Request
from kandinsky5.runtime import free, memory
from kandinsky5.sampler import flow_schedule
from random_weights import SMALL_DIT, SMALL_NABLA, build_meta_pipeline, build_small_pipeline, relative_error


@pytest.fixture(scope="module")
def pipe():
    return build_small_pipeline()


def run(pipe, prompt="a fox", **arguments):
    return pipe(prompt, progress=False, **arguments)


def test_output_types(pipe):
    frames, floats, latents = (run(pipe, output_type=kind) for kind in ("uint8", "float", "latents"))
    assert frames.shape == floats.shape == (1, 5, 32, 48, 3) and latents.shape == (1, 2, 4, 6, 16)
    assert (frames.dtype, floats.dtype, latents.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert floats.min() >= 0 and floats.max() <= 1 and (floats * 255).round().equal(frames.float())
    assert pipe.decode(latents).equal(frames)


def test_same_seed_same_video_and_another_seed_another(pipe):
    assert run(pipe, seed=3).equal(run(pipe, seed=3))
    assert not run(pipe, seed=3).equal(run(pipe, seed=4))


def test_noise_is_drawn_on_the_cpu_in_float32(pipe):
    expected = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(9))
    assert Request.resolve(pipe.config, "a fox", seed=9).noise()[0][0].equal(expected)
    seen = []
    half = build_small_pipeline()
    half.dit.bfloat16()
    run(half, seed=9, num_inference_steps=1, solver=lambda velocity, x, *rest: seen.append(x) or x)
    assert seen[0][0].equal(expected)


def test_in_a_batch_each_prompt_gets_what_it_gets_alone(pipe):
    prompts = ["a fox", "a very long description of a red fox that runs through deep snow", ""]
    together = run(pipe, prompts, num_videos_per_prompt=2, seed=5, output_type="latents")
    assert together.shape[0] == 6
    for i in range(6):
        alone = run(pipe, prompts[i // 2], seed=5 + i, output_type="latents")
        assert relative_error(together[i : i + 1], alone) < 1e-4


def test_given_latents_take_the_place_of_the_seed(pipe):
    latents = torch.randn(1, 2, 4, 6, 16, generator=torch.Generator().manual_seed(2))
    given = run(pipe, latents=latents.transpose(1, 2).contiguous().transpose(1, 2), output_type="latents")
    assert given.equal(run(pipe, latents=latents, seed=8, output_type="latents"))
    assert not given.equal(run(pipe, seed=8, output_type="latents"))


def test_guidance_of_one_is_one_pass_without_the_negative_prompt(pipe, monkeypatch):
    passes = []
    monkeypatch.setattr(pipe.dit, "forward", lambda *a, f=pipe.dit.forward, **k: passes.append(1) or f(*a, **k))
    one = run(pipe, guidance_scale=1.0, negative_prompt="rain")
    assert len(passes) == 2
    assert one.equal(run(pipe, guidance_scale=1.0 + 5e-7)) and len(passes) == 4
    run(pipe, guidance_scale=1.1)
    assert len(passes) == 6, "a short pass is not doubled"


def test_guidance_in_one_pass_and_in_two_is_the_same(pipe, monkeypatch):
    options = dict(prompt=["a fox in deep snow", "a dog"], guidance_scale=3.0, output_type="latents")
    one = run(pipe, **options)
    monkeypatch.setattr(memory, "ONE_PASS", 0)
    passes = []
    monkeypatch.setattr(pipe.dit, "forward", lambda *a, f=pipe.dit.forward, **k: passes.append(1) or f(*a, **k))
    assert relative_error(run(pipe, **options), one) < 1e-5
    assert len(passes) == 4


def test_loading_installs_the_kernel_that_is_named():
    for kernel in ("auto", "dense"):
        block = Pipeline.load("nano", device="meta", attention=kernel).dit.visual_blocks[0]
        assert block.self_attention.attend.args == block.cross_attention.attend.args == (kernel,)


def test_negative_prompt_steers(pipe):
    assert not run(pipe, negative_prompt="rain").equal(run(pipe, negative_prompt="snow"))
    assert run(pipe).equal(run(pipe, negative_prompt=pipe.config.sampling.negative_prompt))


def test_long_prompts_are_cut(pipe):
    long = "fox " * 400
    assert run(pipe, long, max_sequence_length=8).equal(run(pipe, long + "in the rain", max_sequence_length=8))
    assert not run(pipe, long, max_sequence_length=8).equal(run(pipe, long, max_sequence_length=9))


def test_callback_sees_steps_and_can_stop_and_replace(pipe):
    seen = []
    run(pipe, num_inference_steps=4, callback=lambda *step: seen.append(step))
    assert [s[0] for s in seen] == [0, 1, 2, 3] and seen[-1][1] == 0
    first = run(pipe, num_inference_steps=4, output_type="latents", callback=lambda step, t, x: False)
    assert first.equal(seen[0][2])
    zeros = run(pipe, output_type="latents", callback=lambda step, t, x: torch.zeros_like(x) if t == 0 else None)
    assert not zeros.any()


LATENTS = torch.zeros(1, 2, 4, 6, 16)


@pytest.mark.parametrize("odd", [LATENTS.to("meta"), LATENTS.to_sparse(), LATENTS[:, 1:], LATENTS[0]])
def test_odd_latents_are_refused_wherever_they_come_in(pipe, odd):
    for how in ({"callback": lambda *_: odd}, {"solver": lambda *_: odd}):
        with pytest.raises(ValueError, match="returned latents"):
            run(pipe, **how)
    if odd.shape != LATENTS[:, 1:].shape:
        with pytest.raises(ValueError, match="decoding takes"):
            pipe.decode(odd)


@pytest.mark.parametrize("odd", [3, "x", LATENTS.numpy(), LATENTS[..., :3], None])
def test_what_is_no_latents_is_not_decoded(pipe, odd):
    with pytest.raises(ValueError, match="decoding takes"):
        pipe.decode(odd)


@pytest.mark.parametrize("folder", [3, None, b"nano", ["nano"]])
def test_a_checkpoint_is_a_path_or_a_name(folder):
    with pytest.raises(ValueError, match="give the path"):
        Pipeline.load(folder, "cpu")


def test_image_is_the_first_frame_and_keeps_its_shape(pipe):
    image = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8)
    latents = run(pipe, image=image, output_type="latents")
    assert latents.shape == (1, 2, 4, 8, 16)  # 40×90 at 1536 pixels is 26×59, in steps of 16: 32×64
    assert run(pipe, image=image, height=32, width=48, output_type="latents").shape == (1, 2, 4, 6, 16)
    request = Request.resolve(pipe.config, ["a fox", "a dog"], image)
    generators = request.noise()[1]  # have drawn the videos' noise before the images'
    expected = pipe.encode_image(request, generators)
    assert expected.shape == (2, 1, 4, 8, 16) and latents[:, :1].equal(expected[:1])


def test_mask_marks_the_given_frame_and_conditioning_is_zero(pipe):
    latents = torch.randn(1, 3, 4, 6, 16)
    without, given = (sampler.build_condition(latents, frame, 17, False) for frame in (None, latents[:, :1]))
    assert without.shape == (1, 3, 4, 6, 17) and not without.any()
    assert (given[:, 0, ..., 16] == 1).all() and given.sum() == 4 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    exact, half = build_small_pipeline(), build_small_pipeline()
    for model in (half.dit, half.vae, half.text_encoder):
        model.to(dtype)
    a, b = (run(p, guidance_scale=1.0, output_type="latents") for p in (exact, half))
    assert b.dtype == torch.float32 and relative_error(b, a) < 2e-2
    assert run(half, image=torch.zeros(32, 48, 3, dtype=torch.uint8)).shape == (1, 5, 32, 48, 3)


def test_nabla_pipeline():
    pipe = build_small_pipeline(dit=replace(SMALL_DIT, nabla=SMALL_NABLA))
    assert run(pipe, height=128, width=256, output_type="latents").isfinite().all()
    with pytest.raises(ValueError, match="height 32.*NABLA.*128.*256"):
        run(pipe)


@pytest.mark.parametrize("answer", [lambda x: x[:, :1], lambda x: x.numpy(), lambda x: 3, lambda x: [x]])
def test_a_callback_may_return_latents_a_bool_or_nothing(pipe, answer):
    with pytest.raises(ValueError, match="step 1 of 2.*callback") as caught:
        run(pipe, callback=lambda step, t, x: answer(x))
    assert "\n" not in str(caught.value)


def test_numpy_is_as_good_as_torch(pipe):
    image, latents = torch.randint(0, 256, (40, 70, 3), dtype=torch.uint8), torch.randn(1, 2, 4, 8, 16)
    upside_down = image.flip(0).numpy()[::-1]  # a view, as arrays from cameras and mirrored ones are
    same = run(pipe, image=upside_down, latents=latents.numpy(), seed=np.int64(3), width=64)
    assert same.equal(run(pipe, image=image, latents=latents, seed=3, width=64))


def test_nan_is_named_with_its_step(pipe):
    def damage(step, t, x):
        return torch.full_like(x, torch.nan) if step == 1 else None

    with pytest.raises(ValueError, match="step 2 of 4.*callback.*NaN"):
        run(pipe, num_inference_steps=4, callback=damage)


def test_nan_from_the_decoder_is_named_and_not_drawn_black():
    pipe = build_small_pipeline()
    pipe.vae.decoder.conv_in.weight.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="decoded.*NaN"):
        run(pipe)


def test_progress_of_every_stage_is_shown_and_optional(pipe, capsys):
    pipe("a fox", num_frames=29)
    shown = capsys.readouterr().err
    assert all(bar in shown for bar in ("encoding: 100%", "sampling: 100%", "decoding: 100%", "29/29", "2/2"))
    run(pipe)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["banana", "cuda:99", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device {device}:.*cpu") as caught:
        Pipeline.load("anything", device=device)
    assert "\n" not in str(caught.value)


def size_of(config: PipelineConfig) -> tuple[int, int, int]:
    """Frames, height and width; of an image at an area of 1024², in steps of 128, those of the video's shape."""
    if config.name == "i2v-pro-sft-5s-hd":
        return 121, 768, 1280
    return config.sampling.num_frames, config.sampling.height, config.sampling.width


def with_two_blocks(config: PipelineConfig) -> PipelineConfig:
    two = {"num_layers": 2}
    dit, qwen, clip = replace(config.dit, num_visual_blocks=2), replace(config.qwen, **two), replace(config.clip, **two)
    return replace(config, dit=dit, qwen=qwen, clip=clip)


# Presets that differ in steps, guidance and shift alone run the same operations.
DIFFERENT = {(repr(p.dit), p.tasks, size_of(p), p.sampling.rope_scale): name for name, p in PRESETS.items()}


@pytest.mark.parametrize("name", DIFFERENT.values())
def test_every_preset_runs_at_its_size_on_the_meta_device(name):
    """From token ids to latents; an operation that meets a tensor left on the CPU fails there.

    Blocks are all alike, so two stand for up to sixty.
    """
    config = PRESETS[name]
    pipe = build_meta_pipeline(with_two_blocks(config))
    F, H, W = size_of(config)
    drawn = torch.zeros(config.sampling.height, config.sampling.width, 3, dtype=torch.uint8)
    image = drawn if config.tasks[0].startswith("i2") else None
    guidance = None if name == "i2v-lite-5s" else 1.0  # the second pass is of the same size
    latents = run(pipe, image=image, num_inference_steps=1, guidance_scale=guidance, output_type="latents")
    assert latents.device.type == "meta" and latents.shape == (1, (F - 1) // 4 + 1, H // 8, W // 8, 16)


VIDEOS = [config for config in PRESETS.values() if not config.makes_images]


@pytest.mark.parametrize("F, H, W", sorted({size_of(config) for config in VIDEOS}))
def test_every_size_decodes_on_the_meta_device(F, H, W, monkeypatch):
    """Of a window's tiles, where nothing but the shape is known, one of each shape is computed."""
    assert len({(config.vae, config.tiling) for config in VIDEOS}) == 1  # presets differ in size alone
    pipe = build_meta_pipeline(replace(with_two_blocks(PRESETS["t2v-lite-sft-5s"]), dit=SMALL_DIT))
    decode, videos = pipe.vae.decode, {}

    def decode_once(z):
        if z.shape not in videos:
            videos[z.shape] = decode(z)
        return videos[z.shape].clone()

    monkeypatch.setattr(pipe.vae, "decode", decode_once)
    frames = pipe.decode(torch.empty(1, (F - 1) // 4 + 1, H // 8, W // 8, 16, device="meta", dtype=torch.bfloat16))
    assert frames.device.type == "meta" and frames.dtype == torch.uint8 and frames.shape == (1, F, H, W, 3)


def test_videos_are_decoded_one_after_the_other(pipe, monkeypatch):
    decode, seen = pipe.vae.decode, []
    monkeypatch.setattr(pipe.vae, "decode", lambda z: seen.append(len(z)) or decode(z))
    latents = torch.randn(3, 2, 4, 6, 16)
    together = pipe.decode(latents)
    assert seen == [1, 1, 1]
    assert together.equal(torch.cat([pipe.decode(one) for one in latents.split(1)]))


def test_what_will_not_fit_is_refused_with_a_remedy(pipe, monkeypatch):
    video, needed = 2 * 5 * 32 * 48 * 3, pipe._check_decoding((1, 2, 4, 6, 16), "uint8")
    whole = pipe._check_decoding((1, 2, 64, 64, 16), "uint8")
    assert pipe._check_decoding((3, 2, 4, 6, 16), "uint8") == needed + 2 * video  # two more, in bytes
    assert pipe._check_decoding((3, 2, 4, 6, 16), "float") == needed + 11 * video  # twelve instead of one
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: needed)
    frames = run(pipe)
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"5 frames of 32x48.* GB"):
        pipe(prompt="a fox", progress=False, callback=lambda *step: pytest.fail("not before the first step"))
    with pytest.raises(ValueError, match=r"2 × 5 frames of 32x48.* GB"):
        pipe.decode(torch.zeros(2, 2, 4, 6, 16))
    with pytest.raises(ValueError, match="512x512") as caught:
        pipe.decode(torch.zeros(1, 2, 64, 64, 16))
    assert "--tile-space" not in str(caught.value)  # it would not fit in tiles either
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: whole - 1)
    with pytest.raises(ValueError, match=r"512x512.*--tile-space: 0.\d GB"):
        pipe.decode(torch.zeros(1, 2, 64, 64, 16))
    assert run(pipe, output_type="latents").shape == (1, 2, 4, 6, 16) and len(frames) == 1  # nothing to decode


def test_on_a_gpu_finished_videos_are_the_cpus_memory(pipe, monkeypatch):
    """As if it were on one: neither more videos nor floats need more of it, but the CPU must hold them."""
    left = {"cuda": 10**12, "cpu": 10**12}
    monkeypatch.setattr(memory, "free_memory", lambda device: left[device.type])

    def check(batch: int, output_type: str) -> int:
        place = torch.device("cuda"), torch.float32
        return memory.check_decoding(pipe.config, (batch, 2, 4, 6, 16), [], *place, output_type, offloaded=False)

    needed = check(1, "uint8")
    assert check(3, "float") == needed
    left["cpu"] = 3 * 2 * 5 * 32 * 48 * 3 * 4 - 1
    with pytest.raises(ValueError, match="3 × 5 frames of 32x48.*CPU"):
        check(3, "float")
    check(3, "uint8")
    left["cuda"] = needed - 1
    with pytest.raises(ValueError, match="--offload model"):
        check(3, "uint8")


def test_free_memory_is_known_on_linux():
    assert not Path("/proc/meminfo").exists() or 0 < free.free_memory(torch.device("cpu")) < 2**50
    assert free.free_memory(torch.device("meta")) is None


def test_processes_of_one_machine_share_its_free_memory(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n", encoding="utf-8")
    monkeypatch.setattr(free, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "left_in_container", lambda: [1200])
    for processes, share in ((None, 1200), ("1", 1200), ("4", 300), ("0", 1200), ("many", 1200)):
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert free.free_memory(torch.device("cpu")) == share


def test_a_containers_limit_counts(tmp_path):
    assert free.left_in_container(tmp_path) == []
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 180\nfile 120\nactive_file 70\ninactive_file 50\n")
    for limit, left in (("max\n", []), ("1000\n", [820])):
        (tmp_path / "memory.max").write_text(limit)
        assert free.left_in_container(tmp_path) == left


def test_what_decoding_takes_is_shown(pipe, capsys):
    pipe.decode(torch.zeros(1, 2, 4, 6, 16), progress=True)
    assert re.search(r"decoding: .*5/5 .*, takes 0\.\d GB\]", capsys.readouterr().err)


def test_a_tensor_left_on_the_cpu_is_noticed():
    pipe = build_meta_pipeline(with_two_blocks(PRESETS["t2v-lite-nocfg-5s"]))
    pipe.dit.patch_embedder.bias = torch.nn.Parameter(torch.zeros(pipe.config.dit.dim, dtype=torch.bfloat16))
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(pipe, num_inference_steps=1)


def test_presets_are_the_rows_of_spec():
    rows = {name: (p.sampling, p.dit.nabla and p.dit.nabla.P, p.sampling.rope_scale[1]) for name, p in PRESETS.items()}
    assert len(rows) == 27
    found = {n: (s.num_inference_steps, s.guidance_scale, s.shift, s.height, s.width, s.num_frames, scale, P)
             for n, (s, P, scale) in rows.items()}  # fmt: skip
    assert found["t2v-lite-sft-5s"] == (50, 5, 5, 512, 768, 121, 2, None)
    assert found["t2v-lite-pretrain-5s"] == found["t2v-lite-sft-5s"]
    assert found["t2v-lite-nocfg-5s"] == (50, 1, 5, 512, 768, 121, 2, None)
    assert found["t2v-lite-distilled16steps-5s"] == (16, 1, 5, 512, 768, 121, 2, None)
    assert found["t2v-lite-sft-10s"] == found["t2v-lite-pretrain-10s"] == (50, 5, 10, 512, 768, 241, 2, 0.9)
    assert found["t2v-lite-nocfg-10s"] == (50, 1, 10, 512, 768, 241, 2, 0.9)
    assert found["t2v-lite-distilled16steps-10s"] == (16, 1, 10, 512, 768, 241, 2, 0.9)
    assert found["i2v-lite-5s"] == (50, 5, 10, 512, 768, 121, 2, None)
    assert found["t2v-pro-sft-5s-sd"] == found["i2v-pro-sft-5s-sd"] == (50, 5, 5, 512, 768, 121, 2, None)
    assert found["t2v-pro-sft-5s-hd"] == (50, 5, 5, 768, 1280, 121, 3.16, 0.8)
    assert found["t2v-pro-sft-10s-sd"] == (50, 5, 10, 512, 768, 241, 2, 0.9)
    assert found["t2v-pro-sft-10s-hd"] == (50, 5, 10, 768, 1280, 241, 3.16, 0.7)
    assert found["i2v-pro-sft-5s-hd"] == (50, 5, 5, 768, 1280, 121, 3.16, 0.8)
    for name in ("t2i-lite-sft", "t2i-lite-pretrain", "i2i-lite-sft", "i2i-lite-pretrain"):
        assert found[name] == (50, 3.5, 3, 1024, 1024, 1, 1, None)
    for length in ("5s-sd", "5s-hd", "10s-sd", "10s-hd"):
        assert found[f"t2v-pro-pretrain-{length}"] == found[f"t2v-pro-sft-{length}"]
    for task in ("t2v", "i2v"):
        assert found[f"{task}-pro-distilled-5s-sd"] == (16, 1, 5, 512, 768, 121, 2, None)
        assert found[f"{task}-pro-distilled-5s-hd"] == (16, 1, 5, 768, 1280, 121, 3.16, 0.8)


@pytest.mark.parametrize("dtype", ["int8", torch.int8, 3])
def test_a_precision_that_no_model_has_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        Pipeline.load("nano", dtype=dtype)


def test_lists_give_each_prompt_its_own_settings(pipe):
    images = [torch.full((32, 48, 3), level, dtype=torch.uint8) for level in (0, 255)]
    lists = dict(image=images, negative_prompt=["rain", "snow"], seed=[5, 90], num_videos_per_prompt=2)
    together = run(pipe, ["a fox", "a dog"], output_type="latents", **lists)
    assert together.shape[0] == 4
    for i, (prompt, image, negative, seed) in enumerate(
        [("a fox", images[0], "rain", 5), ("a fox", images[0], "rain", 6), ("a dog", images[1], "snow", 90)]
    ):
        alone = run(pipe, prompt, image=image, negative_prompt=negative, seed=seed, output_type="latents")
        assert relative_error(together[i : i + 1], alone) < 1e-4


def test_another_solver_gets_what_euler_gets(pipe):
    def one_step(velocity, x, schedule, first_frame=None, callback=None):
        return x - velocity(x, schedule[0])

    expected = run(pipe, num_inference_steps=1, output_type="latents")
    assert run(pipe, num_inference_steps=7, output_type="latents", solver=one_step).allclose(expected)


def test_results_can_be_changed_and_trained_on(pipe):
    frames = run(pipe)
    frames[:, :, :4] = 0
    run(pipe, output_type="latents").requires_grad_().square().sum().backward()


def test_a_callback_can_use_gradients(pipe):
    def callback(step, t, x):
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            y.square().sum().backward()
        return x - 0.01 * y.grad

    assert run(pipe, callback=callback).shape == (1, 5, 32, 48, 3)


def test_a_second_call_is_refused_while_one_runs(pipe):
    expected = run(pipe)

    def again(step, t, x):
        with pytest.raises(ValueError, match="pipeline"):
            run(pipe)
        with ThreadPoolExecutor() as threads:
            for call in (run, Pipeline.unload_lora):
                with pytest.raises(ValueError, match="pipeline"):
                    threads.submit(call, pipe).result()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback=again)
    assert run(pipe).equal(expected)


def test_pipelines_in_two_threads_keep_their_kernels():
    pipes = [Pipeline.load("nano", "cpu", torch.float32, attention=kernel) for kernel in ("dense", "sdpa")]
    few = {"num_inference_steps": 2, "num_frames": 1, "output_type": "latents"}
    alone = [run(pipe, **few) for pipe in pipes]
    assert not alone[0].equal(alone[1]), "the kernels round differently, or nothing is tested"
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda i: [run(pipes[i], **few) for _ in range(3)], range(2)))
    assert all(latents.equal(alone[i]) for i in range(2) for latents in together[i])


def test_a_pipeline_can_be_pickled_and_copied():
    pipe, few = Pipeline.load("nano", "cpu", torch.float32), {"num_inference_steps": 1, "num_frames": 1}
    expected = run(pipe, **few)
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert run(other, **few).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_changes_nothing(pipe, dtype):
    expected = run(pipe, output_type="latents")
    torch.set_default_dtype(dtype)
    try:
        assert run(pipe, output_type="latents").equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_callers_default_device_changes_nothing(pipe):
    expected = run(pipe, image=torch.zeros(32, 48, 3, dtype=torch.uint8))
    with torch.device("meta"):
        assert run(pipe, image=torch.zeros(32, 48, 3, dtype=torch.uint8, device="cpu")).equal(expected)
        loaded = Pipeline.load("nano", "cpu", torch.float32)
    assert not any(weight.is_meta for weight in loaded.dit.parameters())


def test_each_part_alone_works_on_its_own_device_in_float32(pipe):
    """Where the calling program has another default device and precision."""
    request = Request.resolve(pipe.config, "a fox", image=torch.zeros(32, 48, 3, dtype=torch.uint8))
    latents = torch.zeros(1, *request.latent_shape)
    parts = {
        "text": lambda: pipe.encode_text(request).text,
        "mask": lambda: pipe.text_encoder.encode(["a fox", "two words"]).mask,
        "noise": lambda: request.noise()[0],
        "first frame": lambda: pipe.encode_image(request, request.noise()[1]),
        "times": lambda: flow_schedule(4, 5.0, "diffusers"),
        "frames": lambda: pipe.decode(latents, "float"),
        "colours": lambda: fit_colours(pipe.vae),
    }
    plain = {name: part() for name, part in parts.items()}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            for name, part in parts.items():
                found = part()
                assert found.dtype == plain[name].dtype and torch.allclose(found, plain[name], atol=1e-4), name
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_vae_may_have_another_precision(pipe):
    other = build_small_pipeline()
    other.vae.double()
    image = torch.zeros(32, 48, 3, dtype=torch.uint8)
    assert (run(other, image=image).int() - run(pipe, image=image).int()).abs().max() <= 1


def test_a_wrapped_dit_says_where_it_is(pipe):
    other = build_small_pipeline()
    other.dit = torch.nn.DataParallel(other.dit)
    assert (other.device, other.dtype) == (torch.device("cpu"), torch.float32)
    assert run(other).equal(run(pipe))


def test_a_pipeline_says_what_it_is(pipe):
    for word in ("small", "t2v and i2v", "5 frames of 32x48", "float32", "cpu", "DiT 0.2 M"):
        assert word in repr(pipe), repr(pipe)


def test_progress_without_a_terminal_costs_nothing(pipe, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert pipe("a fox").shape == (1, 5, 32, 48, 3)


def test_what_does_not_fit_is_refused_before_noise_is_drawn(pipe, monkeypatch):
    monkeypatch.setattr(Request, "noise", lambda self: pytest.fail("noise was drawn"))
    monkeypatch.setattr("kandinsky5.runtime.memory.free_memory", lambda device: 2**40)  # not each system tells
    with pytest.raises(ValueError, match="memory"):
        run(pipe, num_frames=4 * 10**9 + 1, output_type="latents")
    with pytest.raises(ValueError, match="memory"):
        run(pipe, num_frames=4 * 10**15 + 1)


@pytest.mark.parametrize("place, phase", [
    ("kandinsky5.runtime.loading.checkpoint.load_weights", "loading the weights"),
    ("kandinsky5.text_encoder.TextEncoder.encode", "encoding text"),
    ("kandinsky5.pipeline.video_io.from_uint8", "encoding the image"),
    ("kandinsky5.pipeline.vae_tiling.encode", "encoding the image"),
    ("kandinsky5.pipeline.Posterior", "encoding the image"),
    ("kandinsky5.pipeline.sampler.build_condition", "sampling"),
    ("kandinsky5.pipeline.Pipeline.predict", "sampling"),
    ("kandinsky5.pipeline.check_sampled", "decoding"),
    ("kandinsky5.pipeline.vae_tiling.decode_pieces", "decoding"),
])  # fmt: skip
def test_memory_that_runs_out_says_in_which_phase(place, phase, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    pipe = build_small_pipeline()
    monkeypatch.setattr(place, full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        Pipeline.load("nano") if phase.startswith("load") else run(
            pipe, image=torch.zeros(32, 48, 3, dtype=torch.uint8)
        )
    assert error.value.__notes__ == [phase]
    assert pipe._turns == [True]  # it can be called again


@pytest.mark.parametrize("name, phase", [("Qwen", "encoding text"), ("DiT", "sampling"), ("VAE", "decoding")])
def test_memory_that_runs_out_for_weights_says_in_which_phase(name, phase, monkeypatch):
    """Resting models come to their device inside of the phase that needs them."""
    awake = pipeline_module.awake

    def full(*models):
        if any(type(model).__name__.endswith(name) for model in models):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return awake(*models)

    pipe = build_small_pipeline()
    monkeypatch.setattr(pipeline_module, "awake", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(pipe)
    assert error.value.__notes__ == [phase]
