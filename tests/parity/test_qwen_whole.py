"""All of Qwen2.5-VL against transformers: image processor, vision tower, positions, states with images, writing.

The weights are small and random, and go through our converter.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the parity suite needs the extra: pip install .[parity] -c constraints.txt")

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from kandinsky5 import checkpoint  # noqa: E402
from kandinsky5.config import PipelineConfig, QwenVisionConfig  # noqa: E402
from kandinsky5.config_file import load_config  # noqa: E402
from kandinsky5.qwen import Qwen, QwenHead, generate  # noqa: E402
from kandinsky5.qwen_vision import QwenVision, build_positions, prepare_image  # noqa: E402
from random_weights import randomise, relative_error  # noqa: E402
from small_diffusers import build_qwen  # noqa: E402
from tokenizer_data import tokenizer_folder  # noqa: E402
from weights_convert import from_official, to_diffusers  # noqa: E402

SIZES = [(128, 192), (300, 200), (113, 113), (20, 500), (10, 12), (512, 448)]
VISION = {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "fullatt_block_indexes": [1, 3]}
IMAGE, START = 151655, 151652


@pytest.fixture(scope="module")
def theirs() -> Qwen2_5_VLForConditionalGeneration:
    return randomise(build_qwen(vision=VISION), seed=3)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> tuple[PipelineConfig, Qwen, QwenVision, QwenHead, Path]:
    folder = tmp_path_factory.mktemp("qwen")
    theirs.save_pretrained(folder / "theirs")
    words = tokenizer_folder("qwen2.5")
    made = folder / "native"
    from_official(made, qwen=folder / "theirs", only="qwen", qwen_tokenizer=words, with_vision=True, progress=False)
    config = load_config(made / "config.json")
    with checkpoint.without_weights():
        models = {"qwen": Qwen(config.qwen), "qwen_vision": QwenVision(config.qwen_vision)}
        models["qwen_head"] = QwenHead(config.qwen)
    for name, model in models.items():
        checkpoint.load_weights(model, checkpoint.find_weights(Path(made), name), "cpu", torch.float32)
    return config, *models.values(), made


def test_round_trip_is_what_transformers_wrote(ours, theirs, tmp_path):
    """Native, back to their layout, and loaded by transformers: the same tensors, and the same configuration."""
    folder, native = tmp_path / "back", ours[4]
    to_diffusers(native, folder, only="qwen", progress=False)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in found)
    for part in ("vision_config", "text_config"):
        a, b = (getattr(model.config, part).to_dict() for model in (theirs, again))
        keys = {"num_heads", "depth", "fullatt_block_indexes", "rope_parameters", "hidden_size", "intermediate_size"}
        assert [a.get(key) for key in sorted(keys)] == [b.get(key) for key in sorted(keys)]
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "tokenizer")
    pixels = processor(images=[random_image(300, 200).numpy()], return_tensors="pt")["pixel_values"]
    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
    assert limits == (ours[0].qwen_vision.min_pixels, ours[0].qwen_vision.max_pixels)
    assert pixels.equal(process(random_image(300, 200))["pixel_values"])


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (H, W, 3), of full contrast: what overshoots 0 and 255 is clipped between rows and columns."""
    generator = np.random.RandomState(seed)
    return torch.from_numpy(generator.randint(0, 256, (height, width, 3), dtype=np.uint8))


def process(*images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their pixel values (patches, 3 · 2 · 14 · 14) and grids (images, 3)."""
    limits = {"min_pixels": QwenVisionConfig.min_pixels, "max_pixels": QwenVisionConfig.max_pixels}
    return dict(Qwen2VLImageProcessorPil(**limits)(images=[i.numpy() for i in images], return_tensors="pt"))


def random_text(generator: np.random.RandomState, images: int, grids: list[tuple[int, int]]) -> list[int]:
    """Random words, with each image's tokens between random words."""
    ids = []
    for rows, columns in grids[:images]:
        ids += generator.randint(0, 151643, generator.randint(1, 9)).tolist()
        ids += [START, *[IMAGE] * (rows * columns), START + 1]
    return ids + generator.randint(0, 151643, generator.randint(2, 30)).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_image_processor(size, ours):
    image = random_image(*size)
    found, expected = prepare_image(image, ours[0].qwen_vision), process(image)
    assert [1, found.shape[1] // 14, found.shape[2] // 14] == expected["image_grid_thw"][0].tolist()
    assert levels(as_patches(found), expected["pixel_values"]) <= 1e-3


def test_images_beyond_the_limits_are_brought_within_them(ours):
    config = QwenVisionConfig(min_pixels=30_000, max_pixels=60_000)
    for size in [(20, 30), (700, 500), (300, 900)]:
        image = random_image(*size)
        processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        grid = processor(images=[image.numpy()], return_tensors="pt")["image_grid_thw"][0].tolist()
        found = prepare_image(image, config)
        assert [1, found.shape[1] // 14, found.shape[2] // 14] == grid


def as_patches(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) → (patches, 3 · 2 · 14 · 14) in their order: by groups of 2 × 2, each patch twice in time."""
    C, H, W = image.shape
    x = image.reshape(C, H // 28, 2, 14, W // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    return x[:, :, :, :, :, None].expand(*x.shape[:5], 2, 14, 14).reshape(H * W // 196, -1)


def levels(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference before normalisation, in 1/255."""
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).repeat_interleave(2 * 14 * 14)
    return float(((ours - theirs) * std).abs().max() * 255)


@pytest.mark.parametrize("size", SIZES)
def test_vision_tower(size, ours, theirs):
    image = prepare_image(random_image(*size), ours[0].qwen_vision)
    grid = torch.tensor([[1, image.shape[1] // 14, image.shape[2] // 14]])
    expected = see(theirs, as_patches(image), grid)[0]
    assert expected.std() > 1e-2
    assert relative_error(ours[2](image), expected) <= 2e-5


def see(theirs, pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return theirs.model.get_image_features(pixels, grids).pooler_output


@pytest.mark.parametrize("images", [0, 1, 2])
def test_positions_and_states_with_images(images, ours, theirs):
    config, qwen, vision, *_ = ours
    pixels = [prepare_image(random_image(*size), config.qwen_vision) for size in [(112, 168), (84, 56)][:images]]
    grids = [(image.shape[1] // 28, image.shape[2] // 28) for image in pixels]
    ids = random_text(np.random.RandomState(5), images, grids)
    batch = their_batch(ids, pixels)
    positions = build_positions(ids, IMAGE, grids)
    if images:
        kinds = (batch["input_ids"] == IMAGE).int()
        expected, _ = theirs.model.get_rope_index(batch["input_ids"], kinds, batch["image_grid_thw"])
        assert positions.equal(expected[:, 0])
    with torch.no_grad():
        expected = theirs(**batch, output_hidden_states=True).hidden_states[-1]
    tokens = torch.cat([vision(image) for image in pixels]) if images else None
    found = qwen(torch.tensor([ids]), positions=positions[None], images=tokens)
    assert relative_error(found, expected) <= 2e-5


def their_batch(ids: list[int], pixels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One text with its images, as the arguments of their model."""
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if pixels:
        batch["pixel_values"] = torch.cat([as_patches(image) for image in pixels])
        batch["image_grid_thw"] = torch.tensor([[1, x.shape[1] // 14, x.shape[2] // 14] for x in pixels])
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


@pytest.mark.parametrize("prompt", range(30))
def test_writes_what_transformers_writes(prompt, ours, theirs):
    """Greedy, repetition penalty 1.05, 64 words; every other prompt has an image, every sixth two."""
    config, qwen, vision, head, _ = ours
    sizes = [(56 + 28 * (prompt % 5), 84), (84, 56)][: (prompt % 2) + (prompt % 6 == 5)]
    pixels = [prepare_image(random_image(*size, seed=prompt), config.qwen_vision) for size in sizes]
    grids = [(image.shape[1] // 28, image.shape[2] // 28) for image in pixels]
    ids = random_text(np.random.RandomState(prompt), len(pixels), grids)
    with torch.no_grad():
        expected = theirs.generate(
            **their_batch(ids, pixels), do_sample=False, repetition_penalty=1.05, max_new_tokens=64, min_new_tokens=64,
            eos_token_id=None, pad_token_id=151643,
        )[0, len(ids) :]  # fmt: skip
        tokens = torch.cat([vision(image) for image in pixels]) if pixels else None
        positions, row = build_positions(ids, IMAGE, grids)[None], torch.tensor([ids])
        words = generate(qwen, head, row, torch.ones_like(row, dtype=torch.bool), positions, tokens)
        found = torch.cat(list(itertools.islice(words, 64)))
    assert len(expected.unique()) > 8  # words vary, or the penalty would not matter
    assert found.tolist() == expected.tolist()
