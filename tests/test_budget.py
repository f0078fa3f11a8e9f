"""What fits where: computed sizes are those of models that are built, and every option does what it says."""

import re
from dataclasses import replace

import pytest
import torch

from kandinsky5 import cli
from kandinsky5.checkpoint import save_checkpoint
from kandinsky5.config import PRESETS, QwenConfig
from kandinsky5.runtime import budget
from kandinsky5.runtime.budget import Choice, moments, peak, weigh
from kandinsky5.runtime.loading import build_models
from kandinsky5.runtime.memory import AROUND, dit_memory, text_memory, vae_memory
from kandinsky5.runtime.pieces import PIECE
from kandinsky5.runtime.quantize import to_int8
from random_weights import SMALL, build_small_models
from tokenizer_data import tokenizer_folder

CONFIG = replace(
    SMALL,
    dit=replace(SMALL.dit, num_visual_blocks=5),
    qwen=QwenConfig(vocab_size=64, dim=64, num_layers=4, num_heads=2, num_kv_heads=1, ff_dim=96),
)
GB = re.compile(r"(\d+\.\d) GB")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_sizes_are_those_of_the_models(quantize):
    sizes = weigh(CONFIG, quantize, torch.bfloat16)
    for name, model in build_models(CONFIG).items():
        model = to_int8(model) if quantize else model
        state = {n: x if x.dtype == torch.int8 else x.bfloat16() for n, x in model.state_dict().items()}
        assert sizes[name].whole == sum(x.nbytes for x in state.values())
        blocks = re.compile(r"(text_|visual_)?blocks\.(\d+)\.")
        stays = [x.nbytes for n, x in state.items() if not (found := blocks.match(n)) or int(found[2]) < 2]
        assert sizes[name].streamed == sum(stays)
    assert (sizes["dit"].streamed < sizes["dit"].whole) and (sizes["vae"].streamed == sizes["vae"].whole)
    assert sizes["dit"].widened == (2 * 64 * 96 if quantize else 0)


def test_moments_are_the_estimates_of_the_first_check():
    config, grid = PRESETS["t2v-lite-sft-5s"], (31, 64, 96)
    encoding, sampling, decoding = moments(config, Choice())
    latents = 32 * 31 * 64 * 96 * 16
    assert sampling.computed == dit_memory(config.dit, (1, *grid), torch.bfloat16, PIECE) + latents
    assert budget.all_at_once(config, Choice()) == dit_memory(config.dit, (1, *grid), torch.bfloat16) + latents
    assert encoding.computed == text_memory(config, 2, 256 + AROUND, [], torch.bfloat16)
    assert decoding.computed == vae_memory(config.vae, grid, torch.bfloat16, config.tiling)
    assert encoding.weights == sampling.weights == decoding.weights
    resting = moments(config, Choice("model"))
    assert encoding.weights == sum(moment.weights for moment in resting)


def test_each_option_needs_less():
    for name in ("t2v-lite-sft-10s", "t2v-pro-sft-5s-hd", "t2i-lite-sft"):
        sizes = [peak(PRESETS[name], choice) for choice in budget.choices()]
        assert sizes[0] > sizes[1] >= sizes[2] and sizes[1] >= sizes[3] >= sizes[4]
        for choice in budget.choices():
            whole, int8 = (moments(PRESETS[name], replace(choice, quantize=kind)) for kind in (None, "int8"))
            assert all(b.weights <= a.weights for a, b in zip(whole, int8, strict=True))


def test_a_card_gets_the_fastest_choice_that_fits():
    config = PRESETS["t2v-lite-sft-5s"]
    for card, quantize, expected in ((80, None, Choice()), (12, "int8", Choice("model", "int8")), (2, "int8", None)):
        found = budget.first_that_fits(config, card * 10**9, budget.choices(quantize=quantize))
        assert found == expected
        if found:
            assert peak(config, found) + budget.CONTEXT <= card * 10**9


def test_editing_counts_an_image_that_qwen_sees():
    config = PRESETS["i2i-lite-sft"]
    large = replace(config, sampling=replace(config.sampling, height=2048, width=2048))
    smaller, larger = (moments(one, Choice("model"))[0].computed for one in (config, large))
    assert larger > 1.5 * smaller


def run(capsys, command: str) -> tuple[int, str, str]:
    code = cli.run(lambda: cli.dispatch(["memory", *command.split()]))
    return code, *capsys.readouterr()


def test_the_command_says_the_peak_and_what_helps(capsys):
    code, out, _ = run(capsys, "t2v-pro-sft-5s-sd --quantize int8 --offload blocks")
    expected = peak(PRESETS["t2v-pro-sft-5s-sd"], Choice("blocks", "int8"))
    assert code == 0 and float(GB.search(out)[1]) == round(expected / 1e9, 1) and "--tile-space" in out
    assert "--offload" not in out.split("less:")[1]
    large, small = (run(capsys, f"t2v-lite-sft-5s {size}")[1] for size in ("", "--num-frames 25 --height 256"))
    assert float(GB.search(small)[1]) < float(GB.search(large)[1])
    assert "--quantize int8 --offload model" in run(capsys, "t2v-lite-sft-5s --card 12")[1]


@pytest.mark.parametrize("name", ["t2i-lite-sft", "i2i-lite-sft", "i2v-lite-5s"])
def test_every_task_has_a_peak_that_grows_with_the_size(capsys, name):
    peaks = [float(GB.search(run(capsys, f"{name} --offload blocks {size}")[1])[1]) for size in ("", "--height 2048")]
    assert peaks[0] == round(peak(PRESETS[name], Choice("blocks")) / 1e9, 1) < peaks[1]


@pytest.mark.parametrize("int8", [("dit", "qwen"), ("dit",), ()])
def test_a_checkpoint_in_int8_is_weighed_as_such(capsys, tmp_path, int8):
    """One of which only a part is in int8 is on the safe side."""
    models = build_small_models(CONFIG)
    for name in int8:
        to_int8(models[name])
    folder = tmp_path / "small"
    tokenizers = {"qwen": tokenizer_folder("qwen2.5"), "clip": tokenizer_folder("clip-vit-large-patch14")}
    save_checkpoint(folder, CONFIG, models, tokenizers)
    first, *_, last = run(capsys, f"{folder} --card 8")[1].splitlines()
    assert first.endswith("--quantize int8") == (len(int8) == 2) and "int8" in last
    assert ("with --quantize" in run(capsys, str(folder))[1]) == (len(int8) < 2)


@pytest.mark.parametrize(
    "command, word",
    [
        ("t2v-lite", "t2v-lite"),
        ("nano --height 100", "height 100"),
        ("nano --quantize int4", "int4"),
        ("nano --card -3", "-3"),
        ("nano --card nan", "nan"),
        ("", "PRESET"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, command, word):
    code, out, err = run(capsys, command)
    assert (code, out, err.count("\n")) == (2, "", 1) and word in err
