"""Our ids against transformers' fast tokenizers, on the golden texts and on random Unicode."""

import random

import pytest

pytest.importorskip("transformers")

from kandinsky5.tokenizer import Tokenizer  # noqa: E402
from make_tokenizer_goldens import load_reference  # noqa: E402
from tokenizer_data import load_goldens, tokenizer_folder  # noqa: E402


@pytest.mark.parametrize("name", ["qwen2.5", "clip-vit-large-patch14"])
def test_vocabularies_of_both_forms_give_the_ids_of_transformers(name, tmp_path):
    reference = load_reference(name)
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    from_pieces, from_json = Tokenizer.load(tokenizer_folder(name)), Tokenizer.load(tmp_path)
    assert len(reference) == from_pieces.vocab_size == from_json.vocab_size
    texts = [text for text, _ in load_goldens(name).values()]
    for text in [*texts, *random_texts(1000, special_tokens=reference.all_special_tokens)]:
        expected = reference.encode(text, add_special_tokens=False)
        assert from_pieces.encode(text) == expected, ascii(text)
        assert from_json.encode(text) == expected, ascii(text)
        assert from_json.decode(expected) == from_pieces.decode(expected), ascii(text)


def random_texts(count: int, special_tokens: list[str]) -> list[str]:
    """Strings of 1 to 60 parts: letters of many scripts, white space, contractions, marks, any code point."""
    choose = random.Random(5)
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xE7F), (0x2000, 0x2BFF)]
    blocks += [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x300, 0x36F)]
    pieces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u0085", "\u200d", "\ufe0f"]
    pieces += ["\u0301", "\u0338", "'s", "'T", "'ll", "'ſ", "İ", "ẞ", "</w>"]
    pieces += [*special_tokens, *map(str.upper, special_tokens)]

    def random_part() -> str:
        kind = choose.random()
        if kind < 0.3:
            return choose.choice(pieces)
        if kind < 0.35:
            return chr(choose.choice([choose.randrange(0xD800), choose.randrange(0xE000, 0x110000)]))
        first, last = choose.choice(blocks)
        return "".join(chr(choose.randint(first, last)) for _ in range(choose.randint(1, 6)))

    return ["".join(random_part() for _ in range(choose.randint(1, 60))) for _ in range(count)]
