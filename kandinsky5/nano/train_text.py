"""The second stage: two tokenizers, and the two language models that read captions.

    python -m kandinsky5.nano.train_text --folder runs/text

The Qwen-class encoder learns to continue a conversation: a caption stands where the prompt will be, and the answer
lists its claims in a fixed form, so that the caption's tokens must come to carry meaning. In addition each of them must
predict, through one linear layer, everything it can know about its object. Next-token prediction alone does not demand
that, and a small DiT on such features gives the attributes of one object to the other: both were right in 7 % of clips.
The CLIP-class encoder learns which of 128 clips belongs to which caption. Both are frozen afterwards, as in the real
model.
"""

import json
import string
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kandinsky5 import screen
from kandinsky5.clip import CLIPText
from kandinsky5.files import make_folder, write_text
from kandinsky5.nano import presets, stages
from kandinsky5.nano.captions import LANGUAGES, Caption, write_caption
from kandinsky5.nano.clips import draw_videos
from kandinsky5.nano.world import COLOURS, MOTIONS, OPPOSITE, RADII, SHAPES, Scene, sample_scene
from kandinsky5.qwen import Qwen
from kandinsky5.tokenizer import CLIP_SPLIT, QWEN_SPLIT, Tokenizer
from kandinsky5.training.recipe import Recipe

QWEN_RECIPE = Recipe(steps=1000, learning_rate=2e-3, ema=0.998)
CLIP_RECIPE = Recipe(steps=3000, learning_rate=1e-3, ema=0.998)
QWEN_BATCH, CLIP_BATCH = 48, 128  # captions
CLIP_FRAMES = 5  # per clip, for the vision tower
ABOUT_WEIGHT = 10.0
TOKENIZER_CAPTIONS = 40_000
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def main() -> None:
    """Train tokenizers, Qwen and CLIP, each unless it is finished."""
    folder, accumulate = stages.parse("train_text", __doc__)
    with stages.first_rank_first():
        if not (folder / "clip_tokenizer" / "tokenizer.json").is_file():
            train_tokenizers(folder)
    train_qwen(folder, replace(QWEN_RECIPE, accumulate=accumulate))
    train_clip(folder, replace(CLIP_RECIPE, accumulate=accumulate))


def draw_pair(seed: list[int]) -> tuple[Scene, Caption]:
    """A training scene and a caption of it, in English or Russian; they depend only on `seed`."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    return scene, write_caption(scene, LANGUAGES[rng.integers(2)], rng)


# ---------------------------------------------------------------------------------------------- tokenizers


def train_tokenizers(folder: Path) -> None:
    """Byte-level BPE of captions for both encoders: `qwen_tokenizer/` and `clip_tokenizer/tokenizer.json`."""
    captions, bar = [], screen.bar(TOKENIZER_CAPTIONS, "drawing captions for the tokenizers", "caption")
    for i in range(TOKENIZER_CAPTIONS):
        captions.append(draw_pair([1, i])[1])
        bar.update()
    bar.close()
    corpus = [caption.text for caption in captions]
    letters = [" ".join(string.printable), " ".join(map(chr, range(ord("а"), ord("я") + 1)))]  # as separate words
    conversation = [presets.TEMPLATE.replace("{}", answer(caption)) for caption in captions[:4000]]
    qwen, clip = models.BPE(), models.BPE(end_of_word_suffix="</w>")
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    isolated = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    words = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
    for name, backend, special, texts in (
        ("qwen", _byte_level(qwen, normalizers.NFC(), isolated), QWEN_SPECIAL, corpus + conversation),
        ("clip", _byte_level(clip, lower, words), CLIP_SPECIAL, corpus + letters),
    ):
        # "Special" for the trainer, which numbers them first; only the special tokens proper are kept as such below.
        numbered_first = [*special, *(_last_letters(backend, texts) if name == "clip" else [])]
        trainer = trainers.BpeTrainer(
            vocab_size=presets.QWEN.vocab_size if name == "qwen" else presets.CLIP.vocab_size,
            special_tokens=[AddedToken(token, normalized=False) for token in numbered_first],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        if name == "clip":
            trainer.end_of_word_suffix = "</w>"
        backend.train_from_iterator(texts, trainer)
        trained = json.loads(backend.to_str())
        trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in special]
        make_folder(folder / f"{name}_tokenizer")
        write_text(folder / f"{name}_tokenizer" / "tokenizer.json", json.dumps(trained, indent=2, ensure_ascii=False))


def _last_letters(backend: Backend, texts: list[str]) -> list[str]:
    """The bytes that end some word, with CLIP's mark.

    On its own the trainer numbers them in the order in which it meets the words, which differs from run to run, and
    breaks ties between counts by these numbers.
    """
    words = (backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)) for text in texts)
    return sorted({word[-1] + "</w>" for found in words for word, _ in found})


def _byte_level(model: models.Model, normalizer: normalizers.Normalizer, split: pre_tokenizers.PreTokenizer) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


# ---------------------------------------------------------------------------------------------- next token


ATTRIBUTES = (*COLOURS, *SHAPES, *MOTIONS, *RADII, *OPPOSITE)


class LanguageModel(nn.Module):
    """Qwen with two heads, which are discarded: the next token, and the attributes of the object a token is about.

    ids (B, S) → logits (B, S, vocabulary), (B, S, attributes).
    """

    def __init__(self):
        super().__init__()
        self.qwen = Qwen(presets.QWEN)
        self.head = nn.Linear(presets.QWEN.dim, presets.QWEN.vocab_size, bias=False)
        self.describe = nn.Linear(presets.QWEN.dim, len(ATTRIBUTES))
        nn.init.normal_(self.qwen.embedding.weight, std=0.3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        features = self.qwen(ids)
        return self.head(features), self.describe(features)


def train_qwen(folder: Path, recipe: Recipe = QWEN_RECIPE) -> LanguageModel:
    """Next token in conversations of template, caption and answer; and the object that each caption token is about."""
    torch.manual_seed(recipe.seed)
    model, tokenizer = LanguageModel(), Backend.from_file(str(folder / "qwen_tokenizer" / "tokenizer.json"))

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        captions = [draw_pair([2, *seed, i])[1] for i in range(QWEN_BATCH)]
        encoded = [tokenizer.encode(conversation(caption)) for caption in captions]
        ids = pad_sequence([torch.tensor(row.ids) for row in encoded], batch_first=True, padding_value=-100)  # (B, S)
        logits, described = (x.float() for x in model(ids[:, :-1].clamp(min=0)))
        next_token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)
        where = [tokens_about(caption, row.offsets) for caption, row in zip(captions, encoded, strict=True)]
        targets = [(b, s, as_set(captions[b])[i]) for b, row in enumerate(where) for s, i in row.items()]
        rows, positions, attributes = (list(x) for x in zip(*targets, strict=True))
        about = F.binary_cross_entropy_with_logits(described[rows, positions], torch.stack(attributes))
        answers = answer_accuracy(logits.detach(), ids[:, 1:], tokenizer.get_vocab()["<|im_start|>"])
        return next_token + ABOUT_WEIGHT * about, {
            "next_token": float(next_token.detach()),
            "about": float(about.detach()),
            "answer_accuracy": answers,
            "about_accuracy": about_accuracy(described.detach(), captions, where),
        }

    return stages.train(model, loss, recipe, folder / "qwen")


def tokens_about(caption: Caption, offsets: list[tuple[int, int]]) -> dict[int, int]:
    """The tokens of `conversation(caption)` that are about an object: position → index in `caption.objects`.

    offsets: each token's first character and the one after its last.
    """
    begin = presets.TEMPLATE.index("{}")
    ends = {s: end - 1 - begin for s, (_, end) in enumerate(offsets) if begin < end <= begin + len(caption.text)}
    return {s: i for s, end in ends.items() if (i := caption.about[end]) is not None}


def about_accuracy(described: Tensor, captions: list[Caption], where: list[dict[int, int]]) -> float:
    """The share of objects whose last token knows colour, shape and motion; described (B, S, attributes)."""
    known, width = [], len(COLOURS) + len(SHAPES) + len(MOTIONS)
    for b, (caption, positions) in enumerate(zip(captions, where, strict=True)):
        last = {i: s for s, i in positions.items()}  # later ones win
        known += [torch.equal(described[b, s, :width] > 0, as_set(caption)[i, :width] > 0) for i, s in last.items()]
    return sum(known) / len(known)


def conversation(caption: Caption) -> str:
    """The template with a caption in it, followed by the answer."""
    return f"{presets.TEMPLATE.replace('{}', caption.text)}\n<|im_start|>assistant\n{answer(caption)}<|im_end|>"


def answer(caption: Caption) -> str:
    """A caption's claims in a fixed form: "red circle left small above; blue diamond still; on black"."""
    objects = zip(caption.objects, roles(caption), strict=False)
    parts = [" ".join((*obj.values(), role or "")).strip() for obj, role in objects]
    return "; ".join(parts + [f"on {caption.background}"] * (caption.background is not None))


def roles(caption: Caption) -> tuple[str | None, str | None]:
    """The relation of the first object to the second, and of the second to the first, if the caption states it."""
    return caption.relation, OPPOSITE[caption.relation] if caption.relation else None


def answer_accuracy(logits: Tensor, targets: Tensor, start: int) -> float:
    """The share of the answers' tokens predicted correctly; logits (B, S, V), targets (B, S)."""
    in_answer = ((targets == start).cumsum(dim=1) == 2) & (targets >= 0)  # the third <|im_start|> begins the answer
    return float((logits.argmax(-1) == targets)[in_answer].float().mean())


# ---------------------------------------------------------------------------------------------- contrast


class CaptionContrast(nn.Module):
    """CLIP's text tower, and a vision tower, which is discarded."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.clip = CLIPText(presets.CLIP)
        self.project = nn.Linear(presets.CLIP.dim, width)
        channels = (3 * CLIP_FRAMES, 32, 64, 128, 128)  # all frames at once: a motion is an edge across them
        self.look = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(c_in, c_out, 5, stride=2, padding=2), nn.GroupNorm(8, c_out), nn.SiLU())
                for c_in, c_out in pairwise(channels)
            ),
            nn.Flatten(),
            nn.Linear(channels[-1] * 4 * 4, width),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        for table in (self.clip.token_embedding, self.clip.position_embedding):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor, clips: Tensor) -> Tensor:
        """ids (B, S), clips (B, 3, F, 64, 64) → scores (B captions, B clips)."""
        captions = F.normalize(self.project(self.clip(ids)).float(), dim=-1)
        seen = F.normalize(self.look(clips.flatten(1, 2)).float(), dim=-1)
        return self.log_scale.clamp(max=4.6).exp() * captions @ seen.T


def train_clip(folder: Path, recipe: Recipe = CLIP_RECIPE) -> CaptionContrast:
    """Which caption belongs to which clip, within a batch."""
    torch.manual_seed(recipe.seed)
    model, tokenizer = CaptionContrast(), Tokenizer.load(folder / "clip_tokenizer")
    start, end = presets.CLIP.start_token, presets.CLIP.end_token
    assert (tokenizer.token_id(CLIP_SPECIAL[0]), tokenizer.token_id(CLIP_SPECIAL[1])) == (start, end)

    def loss(seed: list[int]) -> tuple[Tensor, dict[str, float]]:
        scenes, captions = zip(*(draw_pair([3, *seed, i]) for i in range(CLIP_BATCH)), strict=True)
        ids = [torch.tensor([start, *tokenizer.encode(caption.text), end]) for caption in captions]
        clips = draw_videos(list(scenes), CLIP_FRAMES)
        scores = model(pad_sequence(ids, batch_first=True, padding_value=end), clips)
        target = same_claims(captions)
        value = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        return value, {"accuracy": float((target.gather(1, scores.argmax(1, keepdim=True)) > 0).float().mean())}

    return stages.train(model, loss, recipe, folder / "clip")


def same_claims(captions: Sequence[Caption]) -> Tensor:
    """Target (B, B), rows sum to 1: captions with the same claims are right for each other's clips."""
    claims = [sorted(answer(caption).split("; ")) for caption in captions]  # the order of objects does not matter
    same = torch.tensor([[a == b for b in claims] for a in claims]).float()
    return same / same.sum(dim=1, keepdim=True)


def as_set(caption: Caption) -> Tensor:
    """A caption's claims about its objects as ones and zeros, (2, attributes)."""
    objects = torch.zeros(2, len(ATTRIBUTES))
    for i, (obj, role) in enumerate(zip(caption.objects, roles(caption), strict=False)):
        for word in (*obj.values(), *([role] if role else [])):
            objects[i, ATTRIBUTES.index(word)] = 1
    return objects


if __name__ == "__main__":
    sys.exit(stages.run(main, stages.RESUMES))
