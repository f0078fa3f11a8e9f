"""LoRA: what is added next to the Linears is the formula, comes off again, and goes with every way to run a model."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import FOX
from kandinsky5 import Pipeline, video_io
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.runtime import fast, kernels
from kandinsky5.runtime.compile import compile_models
from kandinsky5.runtime.quantize import to_float, to_int8
from kandinsky5.training.modes import training_precision
from kandinsky5.vae import VAE
from random_weights import SMALL_DIT, SMALL_VAE, build_small_pipeline, randomise, relative_error, save_small_checkpoint
from weights_convert.lora import LAYOUTS, convert

EVERY = ""  # a regular expression that every Linear matches, float32 ones included


def random_lora(dit, rank=4, alpha=2.0, modules=lora.MODULES, seed=0):
    """No factor of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    made = lora.create(dit, rank, alpha, modules)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    made.name = "random"
    return made.requires_grad_(False)


def save_random(path: Path, dit=None, **options) -> Path:
    lora.save(random_lora(dit or DiT(SMALL_DIT), **options), path, {})
    return path


def updated_by_hand(dit, made, weight):
    """A copy with W + weight · alpha / rank · B A written into the weights, for all names in the LoRA's state_dict."""
    state, factors = {k: v.clone() for k, v in dit.state_dict().items()}, made.state_dict()
    for name in {key[:-2] for key in factors}:
        A, B = factors[f"{name}.A"], factors[f"{name}.B"]
        state[f"{name}.weight"] += weight * 2.0 / len(A) * torch.einsum("or,ri->oi", B, A)
    other = DiT(dit.config)
    other.load_state_dict(state)
    return other.eval()


@torch.no_grad()
def run(dit, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (
        torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((2, 4, 4, 33), (7, 16), (24,))
    )
    return dit(x, text, pooled, torch.tensor([0.3]), rope_scale=(1.0, 1.0, 1.0))


@pytest.fixture
def dit():
    return randomise(DiT(SMALL_DIT))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("native") / "small")


@pytest.mark.parametrize("modules, count", [(lora.MODULES, 2 * 6 + 2 * 10), (EVERY, 43)])
def test_beside_and_merged_are_the_formula(dit, modules, count):
    plain, made = run(dit), random_lora(dit, modules=modules)
    assert len(list(made.updates())) == count
    expected = run(updated_by_hand(dit, made, 0.7))
    lora.add(dit, made, 0.7)
    assert relative_error(run(dit), expected) < 2e-5 < 0.1 < relative_error(plain, expected)
    lora.remove(dit, made)
    assert run(dit).equal(plain)
    lora.merge(dit, made, 0.7)
    assert relative_error(run(dit), expected) < 2e-5


def test_several_add_up_and_weight_0_is_none(dit):
    one, two = random_lora(dit), random_lora(dit, seed=1)
    plain = run(dit)
    expected = run(updated_by_hand(updated_by_hand(dit, one, 0.5), two, -0.25))
    lora.add(dit, one, 0.5)
    lora.add(dit, two)
    lora.set_weights([one, two], [0.5, -0.25])
    assert relative_error(run(dit), expected) < 2e-5
    lora.set_weights([one, two], 0)
    assert run(dit).equal(plain)
    with pytest.raises(ValueError, match="3 weights for 2 LoRAs"):
        lora.set_weights([one, two], [1, 2, 3])


@pytest.mark.parametrize("weight", ["0.8", None, torch.nan, 10**400, [1.0], torch.ones(2), True])
def test_a_weight_is_one_finite_number(dit, weight):
    made = lora.add(dit, random_lora(dit), 0.5)
    for refused in (lambda: made.set_weight(weight), lambda: lora.add(dit, random_lora(dit, seed=1), weight)):
        with pytest.raises(ValueError, match="finite number"):
            refused()
    assert {update.weight for _, update in made.updates()} == {0.5}


def test_the_callers_default_dtype_makes_no_other_lora(dit):
    torch.set_default_dtype(torch.float64)
    try:
        made = lora.create(dit, 2, 2.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


def test_what_is_no_lora_or_loaded_already_is_refused(dit):
    made = lora.add(dit, random_lora(dit))
    with pytest.raises(ValueError, match="loaded already"):
        lora.add(dit, made)
    for path in (3, None, b"x", ["a.safetensors"]):
        with pytest.raises(ValueError, match="path of its file"):
            lora.load(path)


def test_the_models_own_state_stays_as_it_is(dit):
    before = {name: x.clone() for name, x in dit.state_dict().items()}
    lora.add(dit, random_lora(dit))
    assert before.keys() == dit.state_dict().keys() and len(list(dit.parameters())) == len(before)
    assert all(x.equal(before[name]) for name, x in dit.state_dict().items())


def test_fast_forms_and_kernels_go_with_it(dit):
    made = lora.add(dit, random_lora(dit, modules=EVERY))
    expected = run(dit)
    fast.install(dit)
    kernels.install(dit, "auto")
    assert relative_error(run(dit), expected) < 2e-5
    lora.remove(dit, made)


def test_float32_layers_are_updated_in_float32(dit):
    """Next to a modulation the factors are not rounded, also under autocast; next to a bf16 Linear all is bf16."""
    linear, name = dit.visual_blocks[0].modulation.linear, "visual_blocks.0.modulation.linear"
    made = random_lora(dit, modules=r"visual_blocks\.0\.(modulation|self_attention)")
    A, B = (made.state_dict()[f"{name}.{half}"].clone() for half in "AB")
    x = torch.randn(2, 32)
    expected = linear(x) + 0.5 * x @ A.T @ B.T
    dit.to(torch.bfloat16)
    lora.add(dit, made)
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    with training_precision(dit), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert dit.visual_blocks[0].self_attention.to_q(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_linears_are_updated_too(dit, dtype):
    """The same as next to the weights that int8 stands for, which are not merged into."""
    to_int8(dit)
    rounded = to_float(copy.deepcopy(dit), torch.float32)
    made = random_lora(dit)
    expected = run(updated_by_hand(rounded, made, 1))
    dit.to(dtype)
    lora.add(dit, made)
    assert relative_error(run(dit, dtype).float(), expected) < {torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    with pytest.raises(ValueError, match="offloaded or quantised"):
        lora.merge(dit, made)


@pytest.mark.compiled
def test_a_compiled_model_sees_what_is_added_and_removed(dit):
    plain, vae = run(dit), randomise(VAE(SMALL_VAE))
    made = random_lora(dit)
    expected = run(updated_by_hand(dit, made, 1))
    torch._dynamo.reset()
    kernels.install(dit, "auto")
    compile_models(dit, vae, backend="eager")
    assert relative_error(run(dit), plain) < 2e-5
    lora.add(dit, made)
    assert relative_error(run(dit), expected) < 2e-5
    lora.remove(dit, made)
    assert relative_error(run(dit), plain) < 2e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["model", "blocks"])
def test_offloaded_models_compute_the_same(saved, tmp_path, mode):
    file = save_random(tmp_path / "random.safetensors")
    options = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1, "progress": False}
    frames = []
    for offload in (None, mode):
        pipe = Pipeline.load(saved, dtype="float32", offload=offload)
        plain = pipe("a fox", **options)
        pipe.load_lora(file, 0.5)
        frames.append(pipe("a fox", output_type="latents", **options))
        pipe.unload_lora()
        assert pipe("a fox", **options).equal(plain)
    assert frames[0].equal(frames[1])


def test_weights_that_rest_are_not_merged(saved):
    pipe = Pipeline.load(saved, offload="model")
    with pytest.raises(ValueError, match="offloaded or quantised.*merge-lora"):
        lora.merge(pipe.dit, random_lora(DiT(SMALL_DIT)))


# --- files


def test_every_layout_is_read_as_the_same(dit, tmp_path):
    made, prints = random_lora(dit), set()
    made.trigger = "Foxy:"
    lora.save(made, tmp_path / "native.safetensors", {"base": "small"})
    for layout in LAYOUTS:
        place = tmp_path / f"as_{layout}{'' if layout == 'official' else '.safetensors'}"
        convert(tmp_path / "native.safetensors", place, layout)
        found = lora.load(place)
        prints.add(found.fingerprint)
        assert found.trigger == "Foxy:"
        assert all(x.equal(found.state_dict()[name]) for name, x in made.state_dict().items())
    assert prints == {lora.fingerprint(made)}


def test_loading_says_what_does_not_fit(dit, tmp_path):
    wide = DiT(replace(SMALL_DIT, dim=96, num_visual_blocks=3))
    for name, other, words in (
        ("wide", wide, "wide is for another model.*visual_blocks.2.*is not here"),
        ("same", DiT(replace(SMALL_DIT, ff_dim=64)), "linear_in is 64 → 96 here and 64 → 64 there"),
    ):
        file = save_random(tmp_path / f"{name}.safetensors", other)
        with pytest.raises(ValueError, match=words) as error:
            lora.add(dit, lora.load(file))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def break_file(path: Path, **changes):
    """Rewrite a native file; None removes a tensor."""
    state = load_file(path) | {name.replace("__", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in state.items() if x is not None}, path, {"alpha": "2.0"})


Q = "visual_blocks__0__self_attention__to_q"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({f"{Q}__B": None}, "to_q has no B"),
        ({f"{Q}__A": torch.ones(3, 64)}, r"to_q has rank 3 in A \(3, 64\) and 4 in B"),
        ({f"{Q}__A": torch.ones(4, 64, dtype=torch.int8)}, "not two matrices of floats"),
        ({f"{Q}__A": torch.ones(0, 64), f"{Q}__B": torch.ones(64, 0)}, "rank 0"),
        ({"visual_blocks__0__other__A": torch.ones(4, 64)}, "no Kandinsky 5 DiT has.*visual_blocks.0.other.A"),
        ({f"{Q}__magnitude": torch.ones(4)}, "or in another way: .*magnitude"),
        ({"lora_unet_out_layer_out_layer__alpha": torch.ones(())}, "mixes the layouts kohya, native"),
    ],
)
def test_halves_that_do_not_belong_together(tmp_path, changes, words):
    file = save_random(tmp_path / "a.safetensors")
    break_file(file, **changes)
    with pytest.raises(ValueError, match=words):
        lora.load(file)


def test_what_is_no_lora(tmp_path, saved):
    with pytest.raises(ValueError, match="dit.safetensors is no LoRA"):
        lora.load(saved / "dit.safetensors")
    with pytest.raises(ValueError, match="holds several sets of weights|no weights"):
        lora.load(saved)
    with pytest.raises(ValueError, match="is missing"):
        lora.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("rank", [0, 65, -1])
def test_ranks_that_no_linear_has(dit, rank):
    with pytest.raises(ValueError, match=f"rank {rank}: give 1 to 64"):
        lora.create(dit, rank, 1.0)


@pytest.mark.parametrize("modules", ["(", "nothing"])
def test_modules_that_match_nothing(dit, modules):
    with pytest.raises(ValueError, match="modules"):
        lora.create(dit, 4, 1.0, modules)


# --- the pipeline and the command


def test_the_trigger_goes_before_the_prompt_alone(saved, tmp_path):
    made = random_lora(DiT(SMALL_DIT))
    made.trigger = "Foxy,"
    pipe = build_small_pipeline()
    heard = []
    encode = pipe.text_encoder.encode
    pipe.text_encoder.encode = lambda texts, *rest: heard.append(texts) or encode(texts, *rest)
    for trigger, expected in ((True, "Foxy, a dog"), (False, "a dog")):
        pipe.load_lora(made, trigger=trigger)
        pipe("a dog", negative_prompt="bad", num_frames=1, num_inference_steps=1, progress=False)
        assert heard.pop() == [expected, "bad"]
        pipe.unload_lora()


def test_a_video_carries_its_loras_and_replays_with_them(cli, here):
    for name, seed in (("a", 0), ("b", 1)):
        made = random_lora(DiT(SMALL_DIT), seed=seed)
        made.trigger = "Foxy," if name == "a" else ""
        lora.save(made, here / f"{name}.safetensors", {})
    code, _, lines = cli(*FOX, "--lora", "a.safetensors:0.5", "--lora", "b.safetensors", "--steps", "1", "-o", "x.mp4")
    assert code == 0 and [line for line in lines if "Foxy" in line and "--no-trigger" in line]
    recorded = video_io.read_metadata("x.mp4")
    assert [(one["file"], one["weight"]) for one in recorded["loras"]] == [
        ("a.safetensors", 0.5),
        ("b.safetensors", 1.0),
    ]
    assert cli("--replay", "x.mp4", "-o", "y.mp4")[0] == 0
    assert Path("x.mp4").read_bytes() == Path("y.mp4").read_bytes()
    written = set()
    for options in (["--lora", "a.safetensors:0.5"], ["--no-trigger"]):
        assert cli("--replay", "x.mp4", *options, "-o", "z.mp4")[0] == 0
        written.add(Path("z.mp4").read_bytes())
    assert len(written) == 2 and Path("x.mp4").read_bytes() not in written


def test_a_replay_wants_the_same_lora(cli, refused, here):
    save_random(here / "a.safetensors")
    assert cli(*FOX, "--lora", "a.safetensors", "-o", "x.mp4")[0] == 0
    save_random(here / "a.safetensors", seed=1)
    refused(["--replay", "x.mp4", "-o", "y.mp4"], "a.safetensors", "has changed", "--lora")
    Path("a.safetensors").unlink()
    refused(["--replay", "x.mp4", "-o", "y.mp4"], "a.safetensors", "next to it", "--lora")


def test_wrong_loras_are_refused_before_anything_loads(refused, here, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", None)
    save_random(here / "wide.safetensors", DiT(replace(SMALL_DIT, dim=96)))
    refused([*FOX, "--lora", "wide.safetensors"], "another model", "inspect")
    refused([*FOX, "--lora", "none.safetensors"], "none.safetensors")
    refused([*FOX, "--lora", "small/dit.safetensors"], "is no LoRA")
    refused([*FOX, "--lora", "wide.safetensors:much"], "weight")
    refused([*FOX, "--lora", "wide.safetensors:nan"], "weight")
    refused([*FOX, "--lora", "wide.safetensors", "-o", "wide.safetensors"], "wide.safetensors")
