"""Likely mistakes in LoRA and fine-tuning, built in one at a time: the test that must notice each of them does."""

import pytest
import torch

import test_finetune
import test_lora
import test_weights_convert_lora as converting
from kandinsky5.dit import DiT
from kandinsky5.extras import lora
from kandinsky5.training import clip_loss, flow
from random_weights import SMALL_DIT, randomise
from test_finetune import cache, clips, encoded  # noqa: F401  (fixtures)
from test_mutations import replace_code
from weights_convert import lora as files
from weights_convert import merge


def formula(_):
    test_lora.test_beside_and_merged_are_the_formula(randomise(DiT(SMALL_DIT)), lora.MODULES, 32)


def several(_):
    test_lora.test_several_add_up_and_weight_0_is_none(randomise(DiT(SMALL_DIT)))


def read(kind):
    return lambda request: converting.test_a_file_means_what_its_layout_says(kind, request.getfixturevalue("tmp_path"))


def loss(request):
    test_finetune.test_the_loss_is_the_formula(
        request.getfixturevalue("encoded"), request.getfixturevalue("monkeypatch")
    )


def told(request):
    test_finetune.test_captions_and_first_frames_are_dropped_and_given(
        request.getfixturevalue("encoded"), request.getfixturevalue("monkeypatch")
    )


def islands(_):
    test_lora.test_float32_layers_are_updated_in_float32(randomise(DiT(SMALL_DIT)))


# fmt: off
MUTATIONS = {  # name: test, function, right, wrong
    "alpha forgotten": (formula, lora.Update.scale, "self.weight * self.alpha / len(self.A)", "self.weight"),
    "rank forgotten": (formula, lora.Update.scale, " / len(self.A)", ""),
    "weight forgotten": (formula, lora.Update.scale, "self.weight * ", ""),
    "scale applied twice": (formula, lora.Update.forward, "self.scale * ", "self.scale**2 * "),
    "text blocks left out": (formula, lora.create, "pattern.search(name)}", "pattern.search(name) and name[0] == 'v'}"),
    "merged without the weight": (formula, lora.merge, "lora.set_weight(weight)", "lora.set_weight(1)"),
    "all LoRAs with the first weight": (several, lora.set_weights, "set_weight(its_weight)", "set_weight(weights[0])"),
    "not taken off": (formula, lora.remove, "handle.remove()", "pass"),
    "float32 layers updated in bf16": (islands, lora.add, "torch.float32 if isinstance(linear, Float32Linear) else own",
                                       "own"),
    "float32 layers under autocast": (islands, lora.Update.forward, "enabled=False",
                                      "enabled=torch.is_autocast_enabled('cpu')"),
    "A and B swapped in a file": (read("native"), files.read, 'values(found[m, "A"]), values(found[m, "B"])',
                                  'values(found[m, "B"]).mT, values(found[m, "A"]).mT'),
    "kohya's alpha forgotten": (read("kohya"), files.read_alphas, "float(values(stored))", "2.0"),
    "the authors' config forgotten": (read("official"), files.read_alphas, "if config is None", "if True"),
    "alpha pattern forgotten": (read("peft"), files.alphas_by_config,
                                'by_pattern(config.get("alpha_pattern")', "by_pattern(None"),
    "shift missing": (loss, flow.FlowTimes.sample, "self.shift * t / (1 + (self.shift - 1) * t)", "t"),
    "clean latents for noisy ones": (loss, clip_loss.clip_loss, "noise[own].to(device), *first",
                                     "drawn.latents.to(device), *first"),
    "captions never dropped": (told, clip_loss.clip_loss, "drop_condition(drawn.features, dropped[own], empty)",
                               "drawn.features"),
    "first frames never given": (told, clip_loss.clip_loss, "some = shape[1] > 1 and bool(given.any())",
                                "some = False"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_test_notices(name, request, monkeypatch):
    test, function, right, wrong = MUTATIONS[name]
    test(request)
    replace_code(monkeypatch, function, right, wrong)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test(request)


@pytest.mark.parametrize("dtype", ["float32"])
def test_rows_of_another_part_are_noticed(tmp_path, monkeypatch, dtype):
    replace_code(monkeypatch, merge.Merged.chunks, "update.B[first:last]", "update.B[: last - first]")

    with pytest.raises(AssertionError):
        converting.test_a_merged_checkpoint_holds_the_sum(tmp_path, monkeypatch, getattr(torch, dtype))
