"""nano's second stage: reproducible tokenizers, and what its text encoders learn from a caption."""

import functools
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from torch import nn

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.nano import presets, stages, train_text
from kandinsky5.nano.captions import Caption, write_caption
from kandinsky5.nano.train_text import conversation, same_claims, tokens_about
from kandinsky5.nano.world import sample_scene
from kandinsky5.training.curves import read_rows
from tiny_training import train


def test_captions_with_the_same_claims_share_their_clips():
    red, blue = {"colour": "red", "shape": "circle", "motion": "left"}, {"colour": "blue", "shape": "square"}
    crossed = {**red, "shape": "square"}, {**blue, "shape": "circle"}
    captions = [
        Caption("red is above blue", None, (red, blue), "above"),
        Caption("blue is below red", None, (blue, red), "below"),
        Caption("red is below blue", None, (red, blue), "below"),
        Caption("on black", "black", (red, blue), "above"),
        Caption("the other way round", None, crossed, "above"),
    ]
    same = torch.eye(5)
    same[:2, :2] = 0.5
    assert same_claims(captions).equal(same)


def test_tokenizers_are_reproducible(monkeypatch, tmp_path):
    """The library's trainer takes words in an order that differs from run to run."""
    monkeypatch.setattr(train_text, "TOKENIZER_CAPTIONS", 400)
    for folder in (tmp_path / "a", tmp_path / "b"):
        train_text.train_tokenizers(folder)
    for name, special in (("qwen", train_text.QWEN_SPECIAL), ("clip", train_text.CLIP_SPECIAL)):
        a, b = (tmp_path / folder / f"{name}_tokenizer" / "tokenizer.json" for folder in "ab")
        assert a.read_bytes() == b.read_bytes()
        tokenizer = Backend.from_file(str(a))
        assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(special)


@pytest.mark.parametrize("language", ["english", "russian"])
def test_tokens_are_about_the_object_they_describe(language):
    """Each object's tokens put together are its noun and its motion, and nothing of the other's."""
    tokenizer = Backend.from_file(str(SHIPPED / "nano" / "qwen_tokenizer" / "tokenizer.json"))
    for i in range(25):
        caption = write_caption(sample_scene([i], num_objects=2), language, np.random.default_rng(i))
        text = conversation(caption)
        encoded = tokenizer.encode(text)
        where = tokens_about(caption, encoded.offsets)
        begin = text.index(caption.text)
        for index in (0, 1):
            words = [text[slice(*encoded.offsets[s])].strip() for s in where if where[s] == index]
            expected = [c for c, about in zip(caption.text, caption.about, strict=True) if about == index]
            assert "".join(words).replace(" ", "") == "".join(expected).replace(" ", "")
        assert all(begin <= encoded.offsets[s][0] for s in where)


def test_qwen_predicts_the_next_token_not_the_current_one(monkeypatch, tmp_path):
    class Repeats(nn.Module):
        """Sure that the next token is the one that it sees."""

        def __init__(self):
            super().__init__()
            self.sure = nn.Parameter(torch.tensor(30.0))

        def forward(self, ids):
            logits = self.sure * nn.functional.one_hot(ids, presets.QWEN.vocab_size)
            return logits, torch.zeros(*ids.shape, len(train_text.ATTRIBUTES))

    folder = SHIPPED / "nano" / "qwen_tokenizer"
    shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(train_text, "LanguageModel", Repeats)
    monkeypatch.setattr(stages, "train", functools.partial(train, stop_after=1, progress=False))
    train_text.train_qwen(tmp_path)
    (row,) = read_rows(tmp_path / "qwen" / "loss.csv")
    assert float(row["next_token"]) > 20 and float(row["answer_accuracy"]) < 0.1
