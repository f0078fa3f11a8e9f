"""Evaluation with the judge: every set prompts for what it should, and honest clips get full marks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kandinsky5.dit import DiT
from kandinsky5.nano import evaluate, judge, world
from random_weights import SMALL_DIT, SMALL_NABLA, randomise


@pytest.mark.parametrize(("right", "total"), [(95, 100), (1, 3), (150, 300)])
def test_wilsons_interval_ends_where_the_rate_is_not_rejected(right, total):
    for rate in evaluate.wilson(right, total):  # the definition: |measured - rate| is 1.96 standard errors of that rate
        assert abs(right / total - rate) == pytest.approx(1.96 * np.sqrt(rate * (1 - rate) / total))
    assert evaluate.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)  # as published calculators have it
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == 1 and evaluate.wilson(0, 0) == (0, 1)


class IdentityVAE(torch.nn.Module):
    """Keeps everything, and can add noise."""

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.noise = torch.nn.Parameter(torch.tensor(noise))

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mean=video)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        assert z.ndim == 5 and z.shape[1] == 3
        return z + self.noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


class FakePipeline:
    """Draws what the prompt says (it knows the prompts by heart), or noise."""

    def __init__(self, honest: bool, clip_noise: float = 0.0, vae_noise: float = 0.0):
        steps = {"num_inference_steps": 50, "guidance_scale": 2.0, "shift": 3.0}
        sampling = SimpleNamespace(num_frames=17, height=64, width=64, fps=10, **steps)
        self.config, self.vae = SimpleNamespace(sampling=sampling), IdentityVAE(vae_noise)
        self.honest, self.clip_noise = honest, clip_noise
        self.scenes, self.calls, self.frames = {}, [], set()
        for name in evaluate.SETS:
            for index in range(8):
                scene, caption = evaluate.sample_prompt(name, index)
                self.scenes[caption.text, index] = scene

    def __call__(self, prompt, image=None, seed=0, num_frames=None, height=None, width=None, progress=True, **options):
        assert isinstance(prompt, list) and not progress
        self.calls.append((prompt, image, seed, options))
        self.frames.add(num_frames)
        if not self.honest:
            noise = np.random.default_rng(seed).integers(0, 256, (len(prompt), num_frames, height, width, 3))
            return torch.from_numpy(noise.astype(np.uint8))
        scenes = [self.scenes[text, seed + i] for i, text in enumerate(prompt)]
        clips = np.stack([world.draw_scene(scene, num_frames, height, width) for scene in scenes])
        if image is not None:
            np.testing.assert_array_equal(clips[0, 0], image)
        noise = np.random.default_rng(seed).normal(0, self.clip_noise * 127.5, clips.shape)
        return torch.from_numpy(np.clip(clips + noise, 0, 255).round().astype(np.uint8))


def run_command(tmp_path, pipe: FakePipeline, *arguments: str) -> dict:
    def load(name, device, dtype):
        assert (name, device, dtype) == ("some/nano", torch.device("cpu"), torch.float32)
        return pipe

    output = tmp_path / "scores.json"
    evaluate.main(
        ["some/nano", "--prompts", "8", "--device", "cpu", "--dtype", "float32", "--output", str(output), *arguments],
        load,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "scores.md"]
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_pipeline_that_draws_its_prompts_scores_all(tmp_path, capsys):
    pipe = FakePipeline(honest=True)
    document = run_command(tmp_path, pipe, "--batch-size", "3", "--steps", "9", "--guidance", "2")
    assert list(document["sets"]) == evaluate.DEFAULT_SETS
    assert document["sampling"] == {"num_inference_steps": 9, "guidance_scale": 2, "shift": 3}
    for name, summary in document["sets"].items():
        assert summary["clips"] == 8 and document["mistakes"][name] == [], name
        assert summary["answers"]["all"] == {
            "right": 8,
            "asked": 8,
            "rate": 1,
            "interval": list(evaluate.wilson(8, 8)),
        }
    assert document["sets"]["image to video"]["answers"]["first frame"]["rate"] == 1
    assert document["sets"]["VAE"]["psnr"] > 60
    assert all(options == {"num_inference_steps": 9, "guidance_scale": 2} for *_, options in pipe.calls)
    assert [seed for _, image, seed, _ in pipe.calls if image is None][:3] == [0, 3, 6]

    printed = capsys.readouterr().out
    assert printed == (tmp_path / "scores.md").read_text(encoding="utf-8")
    lines = printed.splitlines()
    assert len(lines) == 2 + len(evaluate.DEFAULT_SETS) and len({line.count("|") for line in lines}) == 1
    assert "| seen, Russian | 8 | 100.0 | 67.6 to 100.0 |" in printed


def test_a_pipeline_that_draws_noise_scores_nothing(tmp_path):
    sets = ("seen, English", "held out, Russian", "two objects", "image to video")
    document = run_command(tmp_path, FakePipeline(honest=False), "--sets", *sets)
    for name in sets:
        answers = document["sets"][name]["answers"]
        assert answers["all"]["right"] == answers["motion"]["right"] == answers["objects"]["right"] == 0
        assert len(document["mistakes"][name]) == 8 and document["mistakes"][name][0]["text"]
        assert all(mistake["unexplained"] > judge.MAX_UNEXPLAINED for mistake in document["mistakes"][name])
    assert document["sets"]["image to video"]["answers"]["first frame"]["right"] == 0


@pytest.mark.parametrize("honest", [True, False])
def test_single_frames_are_judged_without_motion(honest, tmp_path):
    pipe = FakePipeline(honest)
    answers = run_command(tmp_path, pipe, "--sets", "one frame")["sets"]["one frame"]["answers"]
    assert "motion" not in answers and answers["all"]["right"] == 8 * honest and pipe.frames == {1}


@pytest.mark.parametrize(("noise", "good"), [(0.06, True), (0.08, True), (0.105, False)])
def test_the_first_frame_is_compared_with_its_reconstruction(noise, good):
    """The same clips with noise, where the VAE's is 0.08: 2.5 dB better, as good, and 2.4 dB worse."""
    pipe = FakePipeline(honest=True, clip_noise=noise, vae_noise=0.08)
    results = list(evaluate.evaluate(pipe, "image to video", 4))
    assert [result["answers"]["first frame"] for result in results] == [good] * 4


def test_full_attention_needs_a_checkpoint_with_nabla(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = FakePipeline(honest=True)
    pipe.dit = randomise(DiT(replace(SMALL_DIT, nabla=SMALL_NABLA)))
    dense = DiT(SMALL_DIT)
    dense.load_state_dict(pipe.dit.state_dict())
    inputs = (torch.randn(1, 2, 32, 32, 33), torch.randn(1, 5, 16), torch.randn(1, 24), torch.tensor([0.5]))
    command = ["nano-10s", "--prompts", "1", "--sets", "seen, English"]
    for more, equal in (([], False), (["--full-attention"], True)):
        evaluate.main([*command, *more], lambda *_, **__: pipe)
        with torch.no_grad():
            outputs = [dit(*inputs, rope_scale=(1.0, 1.0, 1.0)) for dit in (pipe.dit, dense)]
        assert outputs[0].equal(outputs[1]) == equal
    names = ("judge_nano-10s", "judge_nano-10s-full-attention")
    assert {path.name for path in tmp_path.iterdir()} == {name + end for name in names for end in (".json", ".md")}
    with pytest.raises(ValueError, match="--full-attention: nano-10s has no NABLA"):
        evaluate.main([*command, "--full-attention"], lambda *_, **__: pipe)


def test_a_run_that_was_not_exported_is_not_judged(tmp_path):
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="is a run"):
        evaluate.main([str(tmp_path)])


def test_prompts_are_the_same_in_every_run():
    scene, caption = evaluate.sample_prompt("two objects", 5)
    assert (scene, caption) == evaluate.sample_prompt("two objects", 5) != evaluate.sample_prompt("two objects", 6)
    assert evaluate.sample_prompt("two objects", 5, seed=1) != (scene, caption)
    held_out = [evaluate.sample_prompt("held out, English", i)[0].objects[0] for i in range(20)]
    assert {(obj.colour, obj.shape, obj.motion) for obj in held_out} <= world.HELD_OUT


@pytest.mark.parametrize(
    "arguments",
    [["nano", "--prompts", "0"], ["nano", "--steps", "0"], ["nano", "--seed", "-1"], ["nano", "--sets", "all"], []],
)
def test_a_wrong_command_ends_with_a_message(arguments):
    with pytest.raises(ValueError, match="--help lists the options"):
        evaluate.main(arguments)


def test_a_lora_is_judged_with_its_checkpoint(tmp_path):
    pipe, loaded = FakePipeline(honest=True), []
    pipe.load_lora = lambda file, weight: loaded.append((file, weight))
    document = run_command(tmp_path, pipe, "--sets", "bounce", "--lora", "bounce.safetensors:0.5")
    assert loaded == [("bounce.safetensors", 0.5)] and document["settings"]["loras"][0]["weight"] == 0.5
