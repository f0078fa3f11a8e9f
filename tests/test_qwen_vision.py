"""Qwen's vision tower, positions with images and writing, against the stored results of transformers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import vision_data
from kandinsky5.config import TextConfig
from kandinsky5.qwen import Qwen, QwenHead, generate
from kandinsky5.qwen_vision import MEAN, STD, QwenVision, build_positions, choose_size, prepare_image, resize
from kandinsky5.text_encoder import TextEncoder
from random_weights import SMALL_VISION, build_small_pipeline, relative_error
from vision_data import GRIDS, IMAGE, VISION, load_results


@pytest.fixture(scope="module")
def models() -> tuple[Qwen, QwenVision, QwenHead]:
    return tuple(vision_data.build_models().values())


@pytest.mark.parametrize("number", [0, 1])
def test_image_is_prepared_within_a_level(number):
    found = prepare_image(vision_data.random_image(*vision_data.SMALL_IMAGES[number]), VISION)
    pixels = (found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    expected = load_results()[f"pixels_{number}"].permute(2, 0, 1)
    assert pixels.shape == expected.shape and float((pixels - expected).abs().max()) <= 1.001


def test_sides_are_multiples_of_28_within_the_areas():
    config = replace(VISION, min_pixels=56 * 56, max_pixels=280 * 280)
    for height, width in [(1, 1), (1, 200), (27, 29), (1000, 333), (281, 281), (4000, 6000)]:
        sides = choose_size(height, width, config)
        assert not any(side % 28 for side in sides) and config.min_pixels <= math.prod(sides) <= config.max_pixels
    assert choose_size(280, 84, config) == (280, 84)
    with pytest.raises(ValueError, match="200"):
        choose_size(201, 1, config)


def test_an_image_of_the_right_size_is_left_alone():
    image = vision_data.random_image(56, 84)
    assert resize(image, 56, 84).equal(image)


def test_tokens_of_an_image(models):
    assert relative_error(models[1](vision_data.prepared_images()[0]), load_results()["tokens"]) <= 2e-5


@pytest.mark.parametrize("images", [0, 1, 2])
def test_positions_and_states(images, models):
    ids, positions, tokens = given(images, models)
    assert positions[0].equal(load_results()[f"positions_{images}"])
    found = models[0](ids, positions=positions, images=tokens)[0]
    assert relative_error(found, load_results()[f"states_{images}"]) <= 2e-5


def given(images: int, models: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A text with so many images: ids (1, S), positions (1, 3, S), image tokens."""
    ids = vision_data.random_text(images)
    tokens = [models[1](image) for image in vision_data.prepared_images()[:images]]
    positions = build_positions(ids, IMAGE, GRIDS[:images])
    return torch.tensor([ids]), positions[None], torch.cat(tokens) if tokens else None


@pytest.mark.parametrize("images", [0, 1, 2])
def test_writes_the_same_words(images, models):
    ids, positions, tokens = given(images, models)
    words = generate(models[0], models[2], ids, torch.ones_like(ids, dtype=torch.bool), positions, tokens)
    assert torch.cat(list(itertools.islice(words, 64))).equal(load_results()[f"words_{images}"])


def test_cache_changes_nothing(models):
    """Each word from the whole text before it, read from the beginning."""
    qwen, _, head = models
    ids, positions, tokens = given(1, models)
    words = generate(qwen, head, ids, torch.ones_like(ids, dtype=torch.bool), positions, tokens)
    for word in itertools.islice(words, 12):
        scores = head(qwen(ids, positions=positions, images=tokens)[:, -1])
        used = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
        scores = torch.where(used, torch.where(scores > 0, scores / 1.05, scores * 1.05), scores)
        assert word.equal(scores.argmax(dim=-1))
        ids = torch.cat([ids, word[:, None]], dim=1)
        positions = torch.cat([positions, positions.max() + torch.ones(1, 3, 1, dtype=torch.long)], dim=2)


def test_texts_of_unequal_length_write_what_each_writes_alone(models):
    texts = [vision_data.random_text(0), vision_data.random_text(0)[:4] + [3, 1, 4]]
    pad = len(texts[0]) - len(texts[1])
    ids = torch.tensor([texts[0], texts[1][:1] * pad + texts[1]])
    mask = torch.arange(len(texts[0])) >= torch.tensor([[0], [pad]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, None].expand(-1, 3, -1)
    together = torch.stack(list(itertools.islice(generate(models[0], models[2], ids, mask, positions), 16)), dim=1)
    for row, text in zip(together, texts, strict=True):
        one = torch.tensor([text])
        places = torch.arange(len(text)).expand(1, 3, -1)
        alone = generate(models[0], models[2], one, torch.ones_like(one, dtype=torch.bool), places)
        assert row.equal(torch.cat(list(itertools.islice(alone, 16))))


# --- images among the texts that the DiT reads

EDIT = TextConfig("<|im_start|>user\n{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>", dropped_tokens=3)
PROMPTS = ["make the fox blue", "", "Сделай лису синей, а снег красным"]
PHOTOS = [vision_data.random_image(70, 100), vision_data.random_image(90, 60), vision_data.random_image(28, 140)]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return build_small_pipeline(qwen_vision=SMALL_VISION, text=EDIT).text_encoder


def test_features_with_images_are_those_of_one_pass(encoder):
    """The template's beginning goes through once for all, a prompt has its own image, and padding is not seen."""
    features = encoder.encode(PROMPTS, images=PHOTOS)
    for i, (prompt, photo) in enumerate(zip(PROMPTS, PHOTOS, strict=True)):
        tokens, ((grid,),) = encoder.see([photo], 1)
        ids = encoder.qwen_ids(prompt, 256, grids=[grid])
        positions = build_positions(ids, encoder.image_token, [grid])[None]
        whole = encoder.qwen(torch.tensor([ids]), positions=positions, images=tokens)[0, 3:]
        assert relative_error(features.text[i][features.mask[i]], whole) < 1e-5
        assert len(whole) == len(encoder.qwen_tokenizer.encode(prompt)) + math.prod(grid) + 3


def test_a_long_prompt_is_cut_and_its_image_stays(encoder):
    ids = encoder.qwen_ids("fox " * 500, 40, grids=[(2, 3)])
    assert ids[:43] == encoder.qwen_ids("fox " * 500, 40)  # what is dropped, and 40
    end = "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|><|im_end|>"
    assert encoder.qwen_tokenizer.decode(ids[43:]) == end


def test_a_prompt_that_spells_an_image_is_refused(encoder):
    with pytest.raises(ValueError, match="image_pad"):
        encoder.encode(["a <|image_pad|> fox"], images=PHOTOS[:1])


def test_a_photo_that_goes_with_two_texts_is_seen_once(encoder, monkeypatch):
    seen = []
    forward = QwenVision.forward
    monkeypatch.setattr(QwenVision, "forward", lambda *given: seen.append(1) or forward(*given))
    features = encoder.encode(["make it red", ""], images=[PHOTOS[0]] * 2)
    assert len(seen) == 1 and features.mask.sum(1).tolist()[0] > features.mask.sum(1).tolist()[1]
