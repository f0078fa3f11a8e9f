"""Notes on prompts that the bundled models cannot follow. The oracles are captions, which they were trained on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kandinsky5.checkpoint import SHIPPED
from kandinsky5.config_file import load_config
from kandinsky5.extras import notes
from kandinsky5.nano import captions
from kandinsky5.nano.world import COLOURS, SHAPES, sample_scene
from kandinsky5.request import Request


@pytest.fixture
def noted(capsys):
    """What is printed of a prompt."""

    def note(prompt: str) -> str:
        notes.note_unknown_words(prompt, "nano")
        return capsys.readouterr().err

    return note


@pytest.mark.parametrize("language", captions.LANGUAGES)
def test_captions_have_no_unknown_words(noted, language):
    rng = np.random.default_rng(9)
    for _ in range(300):
        caption = captions.write_caption(sample_scene(rng, "all"), language, rng)
        assert noted(caption.text) == noted(caption.text.upper()) == ""


def test_every_form_in_the_tables_is_known():
    tables = (captions.RUSSIAN_COLOUR, captions.RUSSIAN_SHAPE, captions.RUSSIAN_SIZE, captions.RUSSIAN_VERB)
    forms = [str(list(table.values())) for table in (*tables, captions.ENGLISH_VERB, captions.ENGLISH_SIZE)]
    words = set(captions.split_words(" ".join([*COLOURS, *SHAPES, *forms])))
    assert len(words) > 100 and words <= captions.vocabulary()


@pytest.mark.parametrize(
    "prompt, unknown, nearest",
    [
        ("a red circle jumps", "jumps", "moves up"),
        ("a STAR", "star", "diamond"),
        ("a sqare moves left", "sqare", "square"),
        ("красная звезда", "красная", "красн"),
        ("красная звезда", "звезда", "ромб"),
        ("a big orange triangle", "orange", "yellow"),
    ],
)
def test_unknown_words_are_named_with_the_nearest_known(noted, prompt, unknown, nearest):
    assert f" {unknown} (nearest: {nearest}" in noted(prompt)


def test_what_has_no_near_word_is_named_alone(noted):
    assert "not know fox, beach, and" in noted("a fox on a beach")


@pytest.mark.parametrize("words, cut", [(40, ""), (74, ""), (85, "CLIP reads 75"), (300, "are read")])
def test_a_prompt_that_clip_or_qwen_cuts_is_noted(capsys, words, cut):
    """Of a stand-in that has a token for each word, and reads 100 of them by Qwen and 77 by CLIP."""
    encode = SimpleNamespace(encode=str.split)
    encoder = SimpleNamespace(
        qwen_ids=lambda text, most: text.split(), config=SimpleNamespace(max_tokens=100), clip_tokenizer=encode,
        clip=SimpleNamespace(config=SimpleNamespace(max_positions=77)),
    )  # fmt: skip
    notes.note_long_prompt("fox " * words, encoder)
    shown = capsys.readouterr().err
    assert shown.count("note:") == bool(cut) and cut in shown


@pytest.mark.parametrize("prompt", [" ".join(map(str, range(20_000))), "x" * 100_000, "\x1b]0;title\x07 a fox\nb"])
def test_the_note_is_one_short_line(noted, prompt):
    line = noted(prompt)
    assert len(line) < 500 and line.endswith("\n") and line[:-1].isprintable()


def test_a_prompt_that_names_a_file_is_noticed(tmp_path, capsys):
    (tmp_path / "fox.jpg").touch()
    for prompt, noticed in [(str(tmp_path / "fox.jpg"), True), ("a fox", False), ("x" * 100_000, False), ("\0", False)]:
        notes.note_file_as_prompt(prompt)
        assert ("--image" in capsys.readouterr().err) == noticed


LORA = SimpleNamespace(before_prompt="")


@pytest.mark.parametrize(
    "folder, loras, count", [(SHIPPED / "nano", [], 1), (SHIPPED / "nano", [LORA], 0), (SHIPPED / "x" / "nano", [], 0)]
)
def test_only_bundled_models_without_a_lora_are_held_to_nanos_words(monkeypatch, capsys, folder, loras, count):
    monkeypatch.setattr(notes, "note_long_prompt", lambda *a: None)
    config, dit = load_config(SHIPPED / "nano" / "config.json"), torch.nn.Identity()
    pipe = SimpleNamespace(
        config=config, text_encoder=None, dit=dit, loras=loras, device=torch.device("cpu"), dtype=torch.float32
    )
    notes.show(Request.resolve(pipe.config, "a fox"), pipe, folder)
    assert capsys.readouterr().err.count("not know fox") == count
