"""Step skipping: the authors' plan, the residuals of the right pass, and measured ratios."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kandinsky5 import Pipeline, cli
from kandinsky5.dit import DiT
from kandinsky5.extras import magcache
from kandinsky5.extras.magcache import StepSkipping, plan_skips
from kandinsky5.extras.magcache import __main__ as calibration
from kandinsky5.runtime.offload import rest
from kandinsky5.sampler import euler_sample
from random_weights import build_small_pipeline


class Theirs:
    """Counts as the authors' code does (kandinsky/magcache_utils.py): both passes in one counter."""

    def __init__(self, conditional, unconditional, steps, no_cfg):
        ratios = [np.array([1.0, *conditional]), np.array([1.0, *(unconditional or conditional)])]
        if len(ratios[0]) != steps:
            scale = (len(ratios[0]) - 1) / (steps - 1)
            nearest = np.round(np.arange(steps) * scale).astype(int)
            ratios = [column[nearest] for column in ratios]
        self.ratios = np.stack(ratios, axis=1).reshape(-1)
        self.count, self.num_steps, self.no_cfg = 0, 2 * steps, no_cfg
        self.product, self.error, self.in_a_row, self.computed = [1.0, 1.0], [0.0, 0.0], [0, 0], [False, False]

    def forward(self) -> bool:
        """Whether this pass skips."""
        i, skip = self.count % 2, False
        if self.count >= int(self.num_steps * 0.2):
            self.product[i] *= self.ratios[self.count]
            self.in_a_row[i] += 1
            self.error[i] += abs(1 - self.product[i])
            skip = self.error[i] < 0.12 and self.in_a_row[i] <= 2
            if not self.computed[i]:  # theirs ends in an error: there is no residual yet
                skip = False
            if not skip:
                self.product[i], self.error[i], self.in_a_row[i] = 1.0, 0.0, 0
        self.computed[i] = True
        self.count += 2 if self.no_cfg else 1
        return skip


# What their code itself skips (commit 3a6e9cd, run with a DiT that counts), one letter per step; passes agree here.
OFFICIAL = {
    ("t2v-lite-sft-10s", 50): "..........xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx..",
    ("t2v-lite-nocfg-10s", 50): "..........xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.x.x.",
    ("t2v-pro-sft-5s-sd", 50): "..........xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.x.x.",
    ("i2v-pro-sft-5s-hd", 50): "..........xx.xx.x.x.xx.xx.xx.xx.xx.xx.xx.xx.xx.x..",
    # with other numbers of steps than the ratios were measured with
    ("t2v-lite-sft-10s", 16): "...xx.xx.xx.xx..",
    ("t2v-lite-sft-10s", 37): ".......xx.xx.xx.xx.xx.xx.xx.xx.xx.xx.",
    ("t2v-lite-nocfg-10s", 8): "..xx.xx.",
    ("t2v-pro-sft-5s-hd", 30): "......xx.xx.xx.xx.xx.xx.xx.x..",
}
PROMPTS = ["a fox in the snow", "a very long description of a dog that runs"]


def draw(skips: list[tuple[bool, ...]], number: int = 0) -> str:
    """The plan of one pass."""
    return "".join(".x"[step[number]] for step in skips)


@pytest.mark.parametrize("model, steps", OFFICIAL)
def test_the_plan_is_the_authors(model, steps):
    plan = plan_skips(True, model, steps, guided="nocfg" not in model)
    assert {draw(plan, i) for i in range(len(plan[0]))} == {OFFICIAL[model, steps]}


@pytest.mark.parametrize("model", [*sorted(path.stem for path in magcache.FOLDER.glob("*.json"))])
def test_both_passes_are_planned_as_in_the_authors_code(model):
    ratios = magcache.load(magcache.FOLDER / f"{model}.json")
    guided = bool(ratios.unconditional)
    for steps in range(2, 101):
        theirs = Theirs(ratios.conditional, ratios.unconditional, steps, not guided)
        expected = [tuple(theirs.forward() for _ in range(1 + guided)) for _ in range(steps)]
        assert plan_skips(ratios, model, steps, guided) == expected, steps


def test_where_the_kept_passes_are_odd_the_passes_differ():
    plan = plan_skips(True, "t2v-lite-sft-5s", 28)
    assert draw(plan, 0).index("x") == 6 and draw(plan, 1).index("x") == 5


def test_the_package_knows_the_twelve_published_ratios():
    names = {path.stem for path in magcache.FOLDER.glob("*.json")}
    assert len(names) == 13 and {"nano", "t2v-lite-sft-5s", "t2i-lite-sft"} <= names
    for name in names:
        skipping = magcache.load(magcache.FOLDER / f"{name}.json")
        assert len(skipping.conditional) == 49 and len(skipping.unconditional) == (0 if "nocfg" in name else 49)
        assert (skipping.threshold, skipping.max_skips, skipping.kept) == (0.12, 2, 0.2) and skipping.source


def test_estimated_errors_add_up_over_consecutive_skips():
    """By hand: with ratios of 1.05 the skips are off by 0.05, 0.1025, 0.157625: 0.05, 0.1525, 0.310125 in all."""
    ratios = StepSkipping((1.05,) * 9, max_skips=9)
    assert draw(plan_skips(replace(ratios, threshold=0.05), "", 10, guided=False)) == ".........."
    assert draw(plan_skips(replace(ratios, threshold=0.15), "", 10, guided=False)) == "..x.x.x.x."
    assert draw(plan_skips(replace(ratios, threshold=0.16), "", 10, guided=False)) == "..xx.xx.xx"
    assert draw(plan_skips(replace(ratios, threshold=0.32), "", 10, guided=False)) == "..xxx.xxx."
    assert draw(plan_skips(replace(ratios, threshold=0.32, max_skips=1), "", 10, guided=False)) == "..x.x.x.x."
    assert draw(plan_skips(replace(ratios, threshold=0.32, kept=0.5), "", 10, guided=False)) == ".....xxx.x"
    assert draw(plan_skips(replace(ratios, threshold=9, kept=0), "", 10, guided=False)) == ".xxxxxxxxx"
    # 1.05 and 0.9 undo each other in part: off by 0.05 and 0.055
    assert draw(plan_skips(StepSkipping((1.0, 1.05, 0.9, 1.0), threshold=0.11), "", 5, guided=False)) == ".xx.x"


def test_each_pass_has_its_own_plan():
    ratios = StepSkipping((1.0,) * 9, (1.0,) * 4 + (1.5,) * 5)
    plan = plan_skips(ratios, "", 10, guided=True)
    assert (draw(plan, 0), draw(plan, 1)) == ("..xx.xx.xx", "..xx......")


@pytest.fixture(scope="module")
def pipe():
    return build_small_pipeline()


OPTIONS = {"num_inference_steps": 6, "output_type": "latents", "progress": False}
RATIOS = StepSkipping((1.0,) * 5, (1.0,) * 5)  # . x x . x x


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("guidance_scale", [1, 5])
@pytest.mark.parametrize("unconditional", [".xx.xx", "..xx.x"])
def test_a_skip_reuses_the_last_residual_of_its_own_pass(pipe, monkeypatch, one_pass, guidance_scale, unconditional):
    """The same by other means: all blocks run, and a hook replaces the output of the last."""
    monkeypatch.setattr("kandinsky5.runtime.memory.ONE_PASS", 10**9 if one_pass else 0)
    options = OPTIONS | {"guidance_scale": guidance_scale}
    plans = [".xx.xx", unconditional] if guidance_scale > 1 else [".xx.xx"]
    plan = [tuple(letter == "x" for letter in step) for step in zip(*plans, strict=True)]
    monkeypatch.setattr(magcache, "plan_skips", lambda *_: plan)
    skipped = pipe(PROMPTS, step_skipping=RATIOS, **options)

    passes = 2 if guidance_scale > 1 and not one_pass else 1
    inputs, residuals = [], {}

    def leave(block, arguments, out):
        step, number = divmod(len(inputs) - 1, passes)
        skips = plan[step] if passes == 1 else plan[step][number : number + 1]
        parts = []
        for i, (x, y, skip) in enumerate(zip(inputs[-1].chunk(len(skips)), out.chunk(len(skips)), skips, strict=True)):
            parts.append(x + residuals[number, i] if skip else y)
            if not skip:
                residuals[number, i] = y - x
        return torch.cat(parts)

    blocks = pipe.dit.visual_blocks
    hooks = [
        blocks[0].register_forward_pre_hook(lambda block, arguments: inputs.append(arguments[0])),
        blocks[-1].register_forward_hook(leave),
    ]
    expected = pipe(PROMPTS, **options)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == 6 * passes
    assert skipped.equal(expected) and not skipped.equal(pipe(PROMPTS, **options))


def test_a_skipped_step_runs_no_block(pipe):
    calls = []
    hooks = [block.register_forward_hook(lambda block, *_: calls.append(block)) for block in pipe.dit.visual_blocks]
    pipe(PROMPTS, step_skipping=RATIOS, **OPTIONS)
    for hook in hooks:
        hook.remove()
    assert calls == 2 * [*pipe.dit.visual_blocks]


def test_the_model_is_not_changed_even_by_an_error(pipe):
    state = dict(vars(pipe.dit))
    plain = pipe(PROMPTS, **OPTIONS)
    assert pipe(PROMPTS, step_skipping=replace(RATIOS, threshold=0), **OPTIONS).equal(plain)

    def fail(step, t, latents):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe(PROMPTS, step_skipping=RATIOS, callback=fail, **OPTIONS)
    assert vars(pipe.dit) == state and pipe(PROMPTS, **OPTIONS).equal(plain)


def test_runs_in_two_threads_do_not_disturb_each_other(pipe):
    """Two pipelines that share a DiT."""
    pipes = [Pipeline(pipe.config, pipe.dit, pipe.vae, pipe.text_encoder) for _ in range(2)]
    alone = [pipe("a fox", seed=seed, step_skipping=RATIOS, **OPTIONS) for seed in range(2)]
    together = {}

    def run(seed):
        for _ in range(3):
            together[seed] = pipes[seed]("a fox", seed=seed, step_skipping=RATIOS, **OPTIONS)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[seed].equal(alone[seed]) for seed in range(2))


def test_a_solver_of_two_evaluations_per_step_is_refused(pipe):
    def twice(velocity, x, times, *arguments):
        return euler_sample(lambda x, t: velocity(x, t) + velocity(x, t), x, times, *arguments)

    with pytest.raises(ValueError, match="more often than once per step"):
        pipe("a fox", step_skipping=RATIOS, solver=twice, **OPTIONS)


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_offloaded_models_skip_steps_too(pipe, offload):
    with torch.device("meta"):
        dit = DiT(pipe.config.dit)
    rest(dit, pipe.dit.state_dict(), torch.device("cpu"), offload)
    resting = Pipeline(pipe.config, dit, pipe.vae, pipe.text_encoder)
    skipped = resting("a fox", step_skipping=RATIOS, **OPTIONS)
    assert skipped.equal(pipe("a fox", step_skipping=RATIOS, **OPTIONS)) and next(dit.parameters()).is_meta
    measured = [calibration.measure_ratios(p, PROMPTS, num_inference_steps=3, progress=False) for p in (resting, pipe)]
    assert measured[0] == measured[1]


def test_missing_ratios_name_the_command_that_measures_them(pipe, tmp_path):
    for options, words in [
        ({"step_skipping": True}, "none for small: measure them with `python -m kandinsky5.extras.magcache CHECKPOINT"),
        ({"step_skipping": tmp_path / "none.json"}, "none.json"),
        ({"step_skipping": StepSkipping((1.0,))}, "hold without guidance: set guidance_scale to 1, or measure"),
    ]:
        with pytest.raises(ValueError) as error:
            pipe("a fox", **options)
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"conditional": ["a"]}', '{"conditional": [NaN]}', '{"flavour": 1}', '{"conditional": 1}'],
)
def test_a_file_without_ratios_is_refused(tmp_path, text):
    path = tmp_path / "ratios.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^cannot read ratios from .*ratios.json"):
        magcache.load(path)


# --- measuring


class Grows(nn.Module):
    """Adds to its input, at its n-th call, a residual of length `lengths[n]` for every token."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = iter(lengths)

    def forward(self, x, *arguments):
        direction = torch.randn_like(x)
        return x + next(self.lengths) * direction / direction.norm(dim=-1, keepdim=True)


class Still(nn.Module):
    def forward(self, x, *arguments):
        return x


def test_ratios_are_those_of_the_lengths_of_residuals(monkeypatch):
    """Two prompts; lengths of steps 0, 1, 2, conditional and unconditional alternating."""
    monkeypatch.setattr("kandinsky5.runtime.memory.ONE_PASS", 0)
    pipe = build_small_pipeline()
    lengths = [2, 10, 4, 15, 6, 30] + [1, 1, 4, 1.7, 4, 3.4]
    pipe.dit.visual_blocks = nn.ModuleList([Grows(lengths), Still()])
    measured = calibration.measure_ratios(pipe, PROMPTS, num_inference_steps=3, progress=False)
    assert measured.conditional == pytest.approx([(2 + 4) / 2, (1.5 + 1) / 2], rel=1e-4)
    assert measured.unconditional == pytest.approx([(1.5 + 1.7) / 2, (2 + 2) / 2], rel=1e-4)
    pipe.dit.visual_blocks = nn.ModuleList([Grows([2, 4, 6])])
    measured = calibration.measure_ratios(pipe, PROMPTS[:1], num_inference_steps=3, guidance_scale=1, progress=False)
    assert measured.conditional == pytest.approx([2, 1.5], rel=1e-4) and measured.unconditional == ()


def test_ratios_do_not_depend_on_batching_the_passes(pipe, monkeypatch):
    measured = []
    for limit in (0, 10**9):
        monkeypatch.setattr("kandinsky5.runtime.memory.ONE_PASS", limit)
        measured.append(calibration.measure_ratios(pipe, PROMPTS, num_inference_steps=4, progress=False))
    for name in ("conditional", "unconditional"):
        assert getattr(measured[0], name) == pytest.approx(getattr(measured[1], name), abs=2e-5)


def test_the_command_writes_what_the_pipeline_takes(tmp_path, capsys, monkeypatch, pipe):
    monkeypatch.setattr(calibration.Pipeline, "load", lambda *_, **__: pipe)
    (tmp_path / "prompts.txt").write_text("a fox\n\na dog\n")
    (tmp_path / "cp1251.txt").write_text("лиса", encoding="cp1251")
    (tmp_path / "many.txt").write_text("a fox\n" * 1001)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").touch()
    arguments = [tmp_path / "small", "--prompts", tmp_path / "prompts.txt", "--steps", "3", "--device", "cpu"]

    def run(*more):
        return cli.run(lambda: calibration.main([str(argument) for argument in (*arguments, *more)]))

    assert run("-o", tmp_path / "ratios.json") == 0
    assert "measured with small, 3 steps, guidance 5, prompts: 2" in capsys.readouterr().out
    skipping = magcache.load(tmp_path / "ratios.json")
    assert len(skipping.conditional) == len(skipping.unconditional) == 2
    assert json.loads((tmp_path / "ratios.json").read_text())["threshold"] == 0.12
    pipe("a fox", step_skipping=tmp_path / "ratios.json", **OPTIONS)

    before = sorted(tmp_path.iterdir())
    for more, words in [
        (["-o", tmp_path / "missing" / "ratios.json"], "choose a folder you can write to"),
        (["-o", tmp_path / "b.json", "--steps", "1"], "1 step: a ratio compares a step with the one before"),
        (["-o", tmp_path / "b.json", "--prompts", tmp_path / "none.txt"], "none.txt is missing"),
        (["-o", tmp_path / "b.json", "--prompts", tmp_path / "cp1251.txt"], "cp1251.txt is not UTF-8"),
        (["-o", tmp_path / "b.json", "--prompts", "/dev/zero"], "/dev/zero is "),
        (["-o", tmp_path / "b.json", "--prompts", tmp_path / "many.txt"], "1,001 prompts"),
        (["-o", tmp_path / "small" / "config.json"], "would replace the file of CHECKPOINT"),
        (["-o", tmp_path / "b.json", "--height", "40"], "height 40: a side is a multiple of 16"),
    ]:
        assert run(*more) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert words in line
    monkeypatch.setattr(calibration, "measure_ratios", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("-o", tmp_path / "b.json") == 130 and "interrupted: nothing was written" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "text, prompts",
    [
        ("a red circle\n", ["a red circle"]),
        ("красный круг\r\n\r\na dog", ["красный круг", "a dog"]),
        ("\n  a fox  \n", ["a fox"]),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, monkeypatch, text, prompts):
    """As Notepad and PowerShell write one."""
    seen: list[str] = []
    monkeypatch.setattr(calibration.Pipeline, "load", lambda *_, **__: None)
    monkeypatch.setattr(
        calibration, "measure_ratios", lambda _, found, **__: seen.extend(found) or StepSkipping((1.0,))
    )
    (tmp_path / "p.txt").write_bytes(text.encode("utf-8-sig"))
    calibration.main(["nano", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "ratios.json")])
    assert seen == prompts


@pytest.mark.parametrize(
    ("skipping", "words"),
    [
        (7, "step_skipping 7: give True, a file of"),
        ({"conditional": [1.0], "speed": 2}, "step_skipping: StepSkipping has no field speed"),
        ({"conditional": "1.0"}, "step_skipping: conditional is '1.0' and should be a list"),
    ],
)
def test_ratios_of_another_kind_are_refused_in_one_line(skipping, words):
    with pytest.raises(ValueError, match=words):
        magcache.plan_skips(skipping, "nano", 10)
