"""Write tests/data/golden_vision.safetensors: what transformers computes of tests/vision_data.py.

PYTHONPATH=.:tests python tests/parity/make_vision_goldens.py
"""

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vision_data
from vision_data import GRIDS, IMAGE, QWEN, VISION
from weights_convert import tables
from weights_convert.sizes import to_their_config


def main() -> None:
    torch.set_num_threads(1)
    theirs, results = build_reference(), {}
    for i, size in enumerate(vision_data.SMALL_IMAGES):
        results[f"pixels_{i}"] = process(vision_data.random_image(*size))
    images = vision_data.prepared_images()
    for count in range(3):
        ids = torch.tensor([vision_data.random_text(count)])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        positions = torch.arange(ids.shape[1]).expand(3, -1)
        if count:
            batch["mm_token_type_ids"] = (ids == IMAGE).int()
            batch["pixel_values"] = torch.cat([as_patches(image) for image in images[:count]])
            batch["image_grid_thw"] = torch.tensor([[1, 2 * h, 2 * w] for h, w in GRIDS[:count]])
            positions = theirs.model.get_rope_index(ids, batch["mm_token_type_ids"], batch["image_grid_thw"])[0][:, 0]
        with torch.no_grad():
            states = theirs(**batch, output_hidden_states=True).hidden_states[-1][0]
            words = theirs.generate(
                **batch, do_sample=False, repetition_penalty=1.05, max_new_tokens=64, min_new_tokens=64,
                eos_token_id=None, pad_token_id=0,
            )[0, ids.shape[1] :]  # fmt: skip
        assert len(words.unique()) > 8, words
        results |= {f"positions_{count}": positions, f"states_{count}": states, f"words_{count}": words}
    with torch.no_grad():
        grid = torch.tensor([[1, 2 * GRIDS[0][0], 2 * GRIDS[0][1]]])
        results["tokens"] = theirs.model.get_image_features(as_patches(images[0]), grid).pooler_output[0]
    save_file({name: value.contiguous() for name, value in results.items()}, vision_data.GOLDEN)
    vision_data.GOLDEN.chmod(0o644)
    print(vision_data.GOLDEN, vision_data.GOLDEN.stat().st_size)


def build_reference() -> Qwen2_5_VLForConditionalGeneration:
    """Their model with our weights, under their names."""
    sizes = to_their_config("qwen", QWEN, VISION)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**sizes)).eval()
    state = {
        tables.theirs(name, ours): weight
        for name, own in vision_data.build_models().items()
        for ours, weight in own.state_dict().items()
    }
    at_top = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, weight in state.items():
        start = next((start for start in at_top if name.startswith(start)), "")
        renamed[at_top.get(start, "") + name.removeprefix(start)] = weight
    model.load_state_dict(renamed, strict=True)
    return model


def as_patches(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) → (patches, 3 · 2 · 14 · 14) in their order: by groups of 2 × 2, each patch twice in time."""
    C, H, W = image.shape
    x = image.reshape(C, H // 28, 2, 14, W // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    return x[:, :, :, :, :, None].expand(*x.shape[:5], 2, 14, 14).reshape(H * W // 196, -1)


def process(image: torch.Tensor) -> torch.Tensor:
    """Their image processor's pixels before normalisation, uint8 (H, W, 3)."""
    limits = {"min_pixels": VISION.min_pixels, "max_pixels": VISION.max_pixels}
    processor = Qwen2VLImageProcessorPil(**limits, do_normalize=False, do_rescale=False)
    found = processor(images=[image.numpy()], return_tensors="pt")
    _, h, w = found["image_grid_thw"][0].tolist()
    patches = found["pixel_values"].reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(14 * h, 14 * w, 3).to(torch.uint8)


if __name__ == "__main__":
    main()
