"""Prompts to features: template, crop, truncation, masks; and properties of both language models."""

from dataclasses import replace

import pytest
import torch

from kandinsky5.config import IMAGE_TEMPLATE, TEMPLATE, TextConfig
from kandinsky5.qwen import Qwen
from kandinsky5.text_encoder import TextEncoder
from random_weights import SMALL_QWEN, build_small_pipeline, randomise, relative_error

PROMPTS = ["a fox", "Рыжая лиса бежит по глубокому снегу, камера следует за ней", "", "一只红色的狐狸 🦊"]


@pytest.fixture(scope="module")
def encoder():
    return build_small_pipeline().text_encoder


def test_template_is_that_of_spec_with_its_mistakes():
    lines = TEMPLATE.split("\n")
    assert len(lines) == 10
    assert lines[:2] == ["<|im_start|>system", "You are a promt engineer. Describe the video in detail."]
    assert lines[5].endswith("some kind of animation, video game or scren content.")
    assert lines[7] == "Pay attention to the order of key actions shown in the scene.<|im_end|>"
    assert lines[8:] == ["<|im_start|>user", "{}<|im_end|>"]


def test_one_frame_is_read_with_the_image_template(encoder):
    assert IMAGE_TEMPLATE.split("\n")[1].startswith(
        "You are a promt engineer. Describe the image by detailing the color,"
    )
    other = TextEncoder(
        TextConfig(IMAGE_TEMPLATE, dropped_tokens=41),
        encoder.qwen,
        encoder.clip,
        encoder.qwen_tokenizer,
        encoder.clip_tokenizer,
    )
    for ours, expected in zip(encoder.encode(PROMPTS, one_frame=True), other.encode(PROMPTS), strict=True):
        assert ours.equal(expected)
    assert not encoder.encode(PROMPTS).text.equal(other.encode(PROMPTS).text)
    assert other.encode(PROMPTS, one_frame=True).text.equal(other.encode(PROMPTS).text)  # a model with one template


@pytest.mark.parametrize("prompt", PROMPTS)
def test_crop_leaves_the_prompt_and_the_end_of_its_turn(encoder, prompt):
    ids = encoder.qwen_ids(prompt, 256)
    assert encoder.qwen_tokenizer.decode(ids[encoder.config.dropped_tokens :]) == prompt + "<|im_end|>"


def test_batch_is_what_each_prompt_gets_alone(encoder):
    together = encoder.encode(PROMPTS)
    assert together.text.shape[:2] == together.mask.shape and together.pooled.shape[0] == len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert alone.mask.all()
        assert relative_error(together.text[i][together.mask[i]], alone.text[0]) < 1e-5
        assert relative_error(together.pooled[i], alone.pooled[0]) < 1e-5


@pytest.mark.parametrize("prompts", [["a fox"], ["\na fox", "a dog"], PROMPTS])
def test_features_are_those_of_one_pass_over_template_and_prompt(encoder, prompts):
    """A line break at the start of a prompt becomes one token with that at the end of the template."""
    features = encoder.encode(prompts)
    for i, prompt in enumerate(prompts):
        whole = encoder.qwen(torch.tensor([encoder.qwen_ids(prompt, 256)]))[0, encoder.config.dropped_tokens :]
        assert relative_error(features.text[i][features.mask[i]], whole) < 1e-5


def test_selected_prompts_are_padded_to_the_longest_of_them(encoder):
    features = encoder.encode(PROMPTS).select(2, 4)
    expected = encoder.encode(PROMPTS[2:])
    assert features.mask.equal(expected.mask) and relative_error(features.text, expected.text) < 1e-5
    assert relative_error(features.pooled, expected.pooled) < 1e-5


def test_long_prompts_are_cut_to_the_length_after_the_crop(encoder):
    features = encoder.encode(["fox " * 1000], max_sequence_length=40)
    assert features.text.shape[1] == 40
    assert relative_error(features.text, encoder.encode(["fox " * 100], max_sequence_length=40).text) < 1e-6


def test_clip_ids_end_with_the_end_token_and_are_padded_with_it(encoder):
    short, long = encoder.clip_ids("a fox"), encoder.clip_ids("fox " * 100)
    assert len(short) == len(long) == 77
    assert short[0] == long[0] == 49406 and short[3:] == [49407] * 74 and long[-1] == 49407 and long[-2] != 49407


def test_repeat_keeps_text_and_pooled_in_the_same_order(encoder):
    features = encoder.encode(PROMPTS[:2])
    repeated = features.repeat(3)
    for i in range(6):
        assert repeated.text[i].equal(features.text[i // 3]) and repeated.pooled[i].equal(features.pooled[i // 3])


def test_a_crop_that_does_not_fit_the_template_is_refused(encoder):
    config = replace(encoder.config, template=TEMPLATE.replace("promt", "prompt"))
    with pytest.raises(ValueError, match="128 tokens.*129"):
        TextEncoder(config, encoder.qwen, encoder.clip, encoder.qwen_tokenizer, encoder.clip_tokenizer)


def test_qwen_padding_changes_nothing_on_either_side():
    qwen = randomise(Qwen(replace(SMALL_QWEN, vocab_size=100)))
    ids = torch.randint(0, 100, (1, 9))
    expected = qwen(ids)
    right, left = torch.cat([ids, ids + 0], dim=1), torch.cat([ids[:, :4], ids], dim=1)
    assert relative_error(qwen(right)[:, :9], expected) < 1e-6
    mask = torch.arange(13)[None] >= 4
    assert relative_error(qwen(left, mask)[:, 4:], expected) < 1e-6
    assert relative_error(qwen(left)[:, 4:], expected) > 1e-2
