"""Prompt expansion: Qwen, which reads the prompts for the DiT, first writes them out as the captions of its training.

    python sample.py "a fox" --checkpoint weights/t2v-lite-sft-5s --expand
    python sample.py "a fox" --checkpoint weights/t2v-lite-sft-5s --expand my_instruction.txt

The DiT was trained on long captions: subject, action, setting, camera, light, style. The authors' pipelines expand
every prompt unless they are told not to. Their instruction is no part of the weights; those in instructions/ are ours.
One of your own is a text file with {} where the prompt goes.

The chat has one message and one answer, which is the likeliest one: no seed changes it.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5.config import PipelineConfig
from kandinsky5.files import read_utf8
from kandinsky5.qwen import generate
from kandinsky5.qwen_vision import build_positions, resize
from kandinsky5.request import Image, Request, check_texts, read_images
from kandinsky5.runtime.memory import during
from kandinsky5.runtime.offload import awake
from kandinsky5.screen import bar, printable
from kandinsky5.text_encoder import TextEncoder

OURS = Path(__file__).parent / "instructions"
LONGEST = 20_000  # bytes of an instruction
MOST_WORDS = 256  # tokens of an answer
# The chat as Qwen2.5-VL was trained on it, with its usual first line.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
MOST_PIXELS = 1280 * 28 * 28  # of a first frame; more pixels cost time, and tell little more about it


@dataclass(frozen=True)
class Instruction:
    """What Qwen is asked to do, with {} for the prompt; editing: the image comes after it, and small."""

    text: str
    editing: bool = False

    @property
    def sha256(self) -> str:
        """The hash that a video's metadata hold."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def choose_instruction(
    config: PipelineConfig, has_image: bool, one_frame: bool = False, file: str | Path | None = None
) -> Instruction:
    """Ours for what this checkpoint makes, or the one in a text file.

    Raises ValueError for a file that is no instruction, and for a checkpoint that cannot expand.
    """
    if config.qwen_vision is None:
        raise ValueError(
            f"{config.name} has neither Qwen's vision tower nor its head, which writes: convert a released checkpoint "
            "with --with-vision, or leave --expand out"
        )
    editing = has_image and config.edits
    without_image = "image" if one_frame or config.makes_images else "video"
    kind = "editing" if editing else "image-to-video" if has_image else without_image
    path = Path(file) if file else OURS / f"{kind}.txt"
    text = read_utf8(path, LONGEST).strip()
    if (count := text.count("{}")) != 1:
        raise ValueError(f"{path} holds {{}} {count} times: write it once, where the prompt goes")
    return Instruction(text, editing)


def expand_request(
    text_encoder: TextEncoder, request: Request, instruction: Instruction, image: Image | None
) -> Request:
    """The request with expanded prompts, of which the first is printed. image: as given, of any size."""
    images = None if image is None else read_images(image, len(request.prompts))
    prompts = tuple(expand(text_encoder, request.prompts, images, instruction))
    print(f"prompt: {printable(prompts[0], LONGEST)}")
    return replace(request, prompts=prompts)


def expand_all(
    text_encoder: TextEncoder, config: PipelineConfig, prompt: str | list[str], image: Image | list | None = None,
    instruction: str | Path | None = None, progress: bool = True,
) -> str | list[str]:  # fmt: skip
    """What `Pipeline.expand` does. prompt: one, or a list; image: one for all, or a list of one for each.

    instruction: a text file with {} for the prompt; else ours for what the checkpoint makes. Raises ValueError for what
    is none of these, and where the checkpoint was converted without --with-vision.
    """
    prompts = check_texts("prompt", prompt, None)
    images = read_images(image, len(prompts))
    found = choose_instruction(config, images is not None, file=instruction)
    expanded = expand(text_encoder, prompts, images, found, progress)
    return expanded[0] if isinstance(prompt, str) else expanded


@during("expanding the prompt")
@torch.no_grad()
def expand(
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    images: Sequence[Tensor] | None,  # uint8 (H, W, 3), one for all or one for each
    instruction: Instruction,
    progress: bool = True,
) -> list[str]:
    """The answers to the instruction with each prompt in it; the prompt itself, where an answer has no words.

    Each is what the prompt gets alone, up to rounding: shorter ones are padded on the left, where a mask hides it.
    """
    qwen, head, vision = text_encoder.qwen, text_encoder.head, text_encoder.vision
    assert head is not None and vision is not None, "choose_instruction looks for them"
    tokenizer = text_encoder.qwen_tokenizer
    stop = [tokenizer.token_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    texts = [instruction.text.replace("{}", prompt) for prompt in prompts]
    if images is not None:
        texts = [text + IMAGE if instruction.editing else IMAGE + text for text in texts]
        images = [shrink(image, instruction.editing) for image in images]
        images = [*images] * len(prompts) if len(images) == 1 else images
    models, rows = [qwen, head, *([vision] if images else [])], [list[int]() for _ in prompts]
    with bar(MOST_WORDS, "expanding", "token", show=progress) as shown, awake(*models):
        start = read_chats(text_encoder, [BEFORE + text + AFTER for text in texts], images or [])
        if start[0].is_meta:
            raise ValueError("device meta: it has shapes and no words, so it cannot expand; choose cpu or cuda")
        for word in itertools.islice(generate(qwen, head, *start), MOST_WORDS):
            for row, token in zip(rows, word.tolist(), strict=True):
                row.append(token)
            shown.update()
            if all({*row} & {*stop} for row in rows):
                break
    answers = [list(itertools.takewhile(lambda token: token not in stop, row)) for row in rows]
    first_special = min(stop)  # the ids from here on are no words
    expanded = [tokenizer.decode([token for token in answer if token < first_special]).strip() for answer in answers]
    return [text or prompt for text, prompt in zip(expanded, prompts, strict=True)]


def read_chats(
    text_encoder: TextEncoder, texts: list[str], images: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Chats, each with its image uint8 (H, W, 3) if there are any, as `qwen.generate` takes them, padded on the left:
    ids (B, S), mask (B, S), positions (B, 3, S), image tokens (M, dim)."""
    tokens, grids = text_encoder.see(images, len(texts))
    rows = [
        text_encoder.place_images(text_encoder.qwen_tokenizer.encode(text), grid)
        for text, grid in zip(texts, grids, strict=True)
    ]
    places = [build_positions(row, text_encoder.image_token, grid) for row, grid in zip(rows, grids, strict=True)]
    pads = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([row[:1] * pad + row for row, pad in zip(rows, pads, strict=True)])
    mask = torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]
    positions = torch.stack([F.pad(place, (pad, 0)) for place, pad in zip(places, pads, strict=True)])
    device = text_encoder.qwen.embedding.weight.device
    return ids.to(device), mask.to(device), positions.to(device), tokens


def shrink(image: Tensor, editing: bool) -> Tensor:
    """uint8 (H, W, 3) at the size that Qwen sees: for editing a quarter of its sides, else MOST_PIXELS at most."""
    height, width, _ = image.shape
    factor = 1 / 4 if editing else min(1, math.sqrt(MOST_PIXELS / (height * width)))
    return resize(image, max(1, round(height * factor)), max(1, round(width * factor)))
