"""From prompts to what the DiT reads: Qwen's hidden states of each token, and CLIP's one vector.

Qwen reads a template that asks for a description, with the prompt inside. The template's part before the prompt is
the same for all prompts, and its features are dropped. CLIP reads the bare prompt. The prompt goes in as it is, as
in the official code; diffusers unescapes HTML and collapses white space first.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kandinsky5.clip import CLIPText
from kandinsky5.config import TextConfig
from kandinsky5.qwen import Cache, Qwen, QwenHead
from kandinsky5.qwen_vision import TOKEN, QwenVision, build_positions, prepare_image
from kandinsky5.tokenizer import Tokenizer


class TextFeatures(NamedTuple):
    """What the DiT reads of B prompts."""

    text: Tensor  # (B, S, 3584), padded on the right to the longest prompt
    lengths: Tensor  # (B,) on the CPU: how many tokens of each are real
    pooled: Tensor  # (B, 768)

    @property
    def mask(self) -> Tensor:
        """(B, S) bool, True for real tokens."""
        positions = torch.arange(self.text.shape[1], device=self.lengths.device)
        return (positions < self.lengths[:, None]).to(self.text.device)

    def repeat(self, count: int) -> "TextFeatures":
        """Each prompt `count` times in a row: (B, …) → (B·count, …), all three in the same order."""
        return TextFeatures(*(x.repeat_interleave(count, dim=0) for x in self))

    def select(self, start: int, stop: int) -> "TextFeatures":
        """The prompts start … stop − 1, padded only to the longest of them."""
        text, lengths, pooled = (x[start:stop] for x in self)
        return TextFeatures(text[:, : int(lengths.max())], lengths, pooled)


class TextEncoder(nn.Module):
    """Both language models with their tokenizers. Qwen's vision tower and head are optional."""

    def __init__(
        self, config: TextConfig, qwen: Qwen, clip: CLIPText, qwen_tokenizer: Tokenizer, clip_tokenizer: Tokenizer,
        vision: QwenVision | None = None, head: QwenHead | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.qwen, self.clip = qwen, clip
        self.vision, self.head = vision, head
        self.qwen_tokenizer, self.clip_tokenizer = qwen_tokenizer, clip_tokenizer
        for name, tokenizer, model in (("qwen", qwen_tokenizer, qwen), ("clip", clip_tokenizer, clip)):
            if tokenizer.vocab_size > model.config.vocab_size:
                raise ValueError(
                    f"{name}_tokenizer/ knows {tokenizer.vocab_size} tokens, {name}.safetensors only "
                    f"{model.config.vocab_size}: these two do not belong together"
                )
        for template, dropped in (self.template(), self.template(one_frame=True)):
            prefix = len(qwen_tokenizer.encode(template.split("{}")[0])) + config.dropped_from_prompt
            if prefix != dropped:
                # A wrong crop would eat the prompt's first words or leak the template's last, without any other sign.
                raise ValueError(
                    f"the template has {prefix} tokens before the prompt, but {dropped} are dropped: the tokenizer in "
                    "qwen_tokenizer/, or text in config.json, is not what this checkpoint was made with"
                )

    def encode(
        self,
        prompts: list[str],
        max_sequence_length: int | None = None,
        one_frame: bool = False,
        images: list[Tensor] | None = None,
    ) -> TextFeatures:
        """Features of B prompts; each is cut after `max_sequence_length` Qwen tokens (and 77 of CLIP).

        one_frame: the prompts are for videos of a single frame, which have a template of their own.
        images: one uint8 (H, W, 3) for each prompt, at the size that Qwen is to see; the template has a place for it.

        A prompt in a batch gets what it gets alone: Qwen is causal and padding stands on the right, where the mask
        hides it from the DiT. The template's part before the prompt goes through Qwen once for all of them.
        """
        device, dropped = self.qwen.embedding.weight.device, self.template(one_frame)[1]
        most = max_sequence_length or self.config.max_tokens
        tokens, grids = self.see(images or [], len(prompts))  # (M, 3584)
        ids = [self.qwen_ids(prompt, most, one_frame, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        lengths = torch.tensor([len(i) for i in ids], device="cpu") - dropped
        # A prompt that begins with a line break changes the template's last token, so its prefix is a bit shorter.
        common = min(len(os.path.commonprefix(ids)), dropped - self.config.dropped_from_prompt)
        cache: Cache = {}
        if common:
            self.qwen(torch.tensor([ids[0][:common]], device=device), cache=cache)
        rest = pad_sequence([torch.tensor(i[common:], device=device) for i in ids], batch_first=True)
        places = [build_positions(i, self.image_token, grid).T[common:] for i, grid in zip(ids, grids, strict=True)]
        positions = pad_sequence(places, batch_first=True).mT.to(device)  # (B, 3, S)
        text = self.qwen(rest, cache=cache, positions=positions, images=tokens)[:, dropped - common :]  # (B, S, 3584)
        pooled = self.clip(torch.tensor([self.clip_ids(prompt) for prompt in prompts], device=device))
        return TextFeatures(text, lengths, pooled)

    @property
    def image_token(self) -> int:
        """The id that stands for a token of an image."""
        return self.qwen.config.image_token

    def see(self, images: Sequence[Tensor], count: int) -> tuple[Tensor | None, list[list[tuple[int, int]]]]:
        """The images of `count` texts, uint8 (H, W, 3), one each or none, as the tokens that Qwen reads, (M, 3584), and
        for each text the rows and columns of its own. Raises ValueError where the checkpoint has no vision tower.
        """
        seen: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        for image in images:
            if self.vision is None:
                raise ValueError("this checkpoint has no vision tower: convert it again with --with-vision")
            if id(image) not in seen:  # an image often goes with several texts
                pixels = prepare_image(image, self.vision.config).to(self.vision.patch_embedder.weight)  # (3, H', W')
                seen[id(image)] = self.vision(pixels), (pixels.shape[1] // TOKEN, pixels.shape[2] // TOKEN)
        found = [seen[id(image)] for image in images]
        tokens = torch.cat([tokens for tokens, _ in found]) if found else None
        return tokens, [[grid] for _, grid in found] or [[] for _ in range(count)]

    def template(self, one_frame: bool = False) -> tuple[str, int]:
        """What Qwen reads, with the prompt at {}, and how many of its tokens precede the prompt."""
        config = self.config
        if one_frame and config.image_template is not None:
            return config.image_template, config.image_dropped_tokens
        return config.template, config.dropped_tokens

    def qwen_ids(
        self, prompt: str, max_sequence_length: int, one_frame: bool = False, grids: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Token ids of the template with the prompt in it, cut to `max_sequence_length` after the dropped ones.

        grids: rows and columns of the template's images, which stand behind the prompt: it is cut, and they stay.
        """
        template, dropped = self.template(one_frame)
        ids = self.place_images(self.qwen_tokenizer.encode(template.replace("{}", prompt)), grids)
        if not grids:
            return ids[: dropped + max_sequence_length]
        end = ids.index(self.image_token) - 1  # <|vision_start|>
        return ids[: min(end, dropped + max_sequence_length)] + ids[end:]

    def place_images(self, ids: list[int], grids: Sequence[tuple[int, int]]) -> list[int]:
        """`ids` with each image token as often as its image has tokens.

        Raises ValueError where the text has more or fewer of them than images: a prompt may spell one.
        """
        if grids and ids.count(self.image_token) != len(grids):
            raise ValueError("the text contains <|image_pad|>, the place of an image: leave that word out")
        counts = iter(grids)
        return [i for i in ids for _ in range(math.prod(next(counts)) if grids and i == self.image_token else 1)]

    def clip_ids(self, prompt: str) -> list[int]:
        """Start token, prompt, end token, and end tokens as padding: always 77 (CLIP's number of positions)."""
        start, end, length = self.clip.config.start_token, self.clip.config.end_token, self.clip.config.max_positions
        ids = [start, *self.clip_tokenizer.encode(prompt)[: length - 2], end]
        return ids + [end] * (length - len(ids))
