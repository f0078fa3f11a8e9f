"""Ids against transformers' (stored) and sentencepiece's own; broken and hostile files."""

import functools
import io
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from kandinsky5.tokenizer import Tokenizer, find_files
from tokenizer_data import fingerprint, load_goldens, tokenizer_folder

QWEN, CLIP = "qwen2.5", "clip-vit-large-patch14"
TEMPLATE_PREFIX = """<|im_start|>system
You are a promt engineer. Describe the video in detail.
Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.
Describe the location of the video, main characters or objects and their action.
Describe the dynamism of the video and presented actions.
Name the visual style of the video: whether it is a professional footage, user generated content, some \
kind of animation, video game or scren content.
Describe the visual effects, postprocessing and transitions if they are presented in the video.
Pay attention to the order of key actions shown in the scene.<|im_end|>
<|im_start|>user
"""


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(name))


@pytest.mark.parametrize("title", load_goldens(QWEN))
@pytest.mark.parametrize("name", [QWEN, CLIP])
def test_ids_are_those_of_transformers(name, title):
    text, golden = load_goldens(name)[title]
    assert fingerprint(load(name).encode(text)) == golden


@pytest.mark.parametrize("name", [QWEN, CLIP])
def test_tokenizer_json_gives_the_same_ids_without_padding(name, tmp_path):
    write_tokenizer_json(tmp_path, name)
    whole_file = Tokenizer.load(tmp_path)
    for title, (text, golden) in load_goldens(name).items():
        ids = whole_file.encode(text)
        assert fingerprint(ids) == golden, title
        assert whole_file.decode(ids[:100]) == load(name).decode(ids[:100]), title
    assert whole_file.vocab_size == load(name).vocab_size


def test_tokenizer_json_comes_first_even_if_broken(tmp_path):
    folder = shutil.copytree(tokenizer_folder(QWEN), tmp_path / "qwen")
    write_tokenizer_json(folder, CLIP)
    assert Tokenizer.load(folder).vocab_size == 49408
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(folder)


def test_the_authors_spelling_gives_129_template_tokens():
    assert len(load(QWEN).encode(TEMPLATE_PREFIX)) == 129
    assert len(load(QWEN).encode(TEMPLATE_PREFIX.replace("promt", "prompt"))) == 128
    for prompt in ["A fox", " a fox", "лиса", "狐", "\u0301", "🦊", "", "12", "<|im_end|>"]:
        assert load(QWEN).encode(TEMPLATE_PREFIX + prompt)[:129] == load(QWEN).encode(TEMPLATE_PREFIX)


def test_special_tokens_have_the_released_ids():
    qwen, clip = load(QWEN), load(CLIP)
    assert (qwen.vocab_size, clip.vocab_size) == (151665, 49408)
    added = json.loads((tokenizer_folder(QWEN) / "added_tokens.json").read_text())
    assert list(added.values()) == list(range(151643, 151665))
    assert {token: qwen.token_id(token) for token in added} == added
    assert [qwen.encode(f"a{token}b") for token in added] == [[64, i, 65] for i in added.values()]
    assert (clip.token_id("<|startoftext|>"), clip.token_id("<|endoftext|>")) == (49406, 49407)
    with pytest.raises(ValueError, match="no token '<|startoftext|>'"):
        qwen.token_id("<|startoftext|>")


def test_special_tokens_do_not_need_added_tokens_json(tmp_path):
    folder = shutil.copytree(tokenizer_folder(QWEN), tmp_path / "qwen")
    (folder / "added_tokens.json").unlink()
    bare = Tokenizer.load(folder)
    added = json.loads((tokenizer_folder(QWEN) / "added_tokens.json").read_text())
    assert [bare.encode(token) for token in added] == [[i] for i in added.values()]
    assert bare.vocab_size == 151665


def test_added_tokens_may_be_fewer_or_leave_a_gap(tmp_path):
    write_tiny(tmp_path, added={"<|im_end|>": 300, "<mine>": 400})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab<mine><|im_end|>") == [256, 400, 300]
    assert len(tokenizer.encode("<|im_start|>")) == len("<|im_start|>")  # not in the file: spelled out
    assert tokenizer.vocab_size == 401


def test_decode_gives_text_back_in_clip_lower_cased():
    for title, (text, _) in load_goldens(QWEN).items():
        if title != "special token and a mark":  # decoded, ">" and the mark stand side by side and compose
            decoded = load(QWEN).decode(load(QWEN).encode(text))
            assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text), title
    assert load(CLIP).decode(load(CLIP).encode("A red  FOX,\nit's 24 fps ❄")) == "a red fox , it 's 2 4 fps ❄"


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="surrogate"):
        load(CLIP).encode("fox \ud83e")


def test_sentencepiece_ids_are_the_librarys_and_control_ids(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    ours = Tokenizer.load(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for title, (text, _) in load_goldens(QWEN).items():
        assert ours.encode(text) == library.encode(text), title
    assert ours.decode(ours.encode("the red fox")) == "the red fox"
    assert ours.vocab_size == library.get_piece_size() == 360
    user, control, longer = (ours.token_id(piece) for piece in ("<image>", "<turn>", "<turn>>"))
    assert ours.encode("red<image>fox").count(user) == 1
    red, fox = library.encode("red"), library.encode("fox")
    assert ours.encode("<s>red<turn>fox<turn>></s>") == [1, *red, control, *fox, longer, 2]
    assert control not in library.encode("<turn>")  # so the library alone would not do
    with pytest.raises(ValueError, match="no token 'vulpes'"):
        ours.token_id("vulpes")


def test_sentencepiece_without_control_pieces(tmp_path):
    train_sentencepiece(tmp_path / "any.model", bos_id=-1, eos_id=-1, control_symbols=[])
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "any.model"))
    assert Tokenizer.load(tmp_path).encode("<s>the fox") == library.encode("<s>the fox")


NO_TOKENIZER = {  # files, and what the message names
    "nothing there": ({}, "nothing"),
    "no merges": ({"vocab.json": "{}", "notes": ""}, "notes, vocab.json"),
    "two models": ({"a.model": "", "b.model": ""}, "a.model, b.model"),
    "model of another kind": ({"tokenizer.model": "x"}, "tokenizer.model"),
}
BROKEN = {  # the same for files put over those of a small valid tokenizer
    "tokenizer.json cut off": ({"tokenizer.json": '{"model":\n {'}, "tokenizer.json"),
    "tokenizer.json a list": ({"tokenizer.json": "[]"}, "tokenizer.json"),
    "tokenizer.json of lone surrogates": ({"tokenizer.json": '{"\\ud800": 1}'}, "tokenizer.json"),
    "git-lfs pointer": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
    "vocab.json cut off": ({"vocab.json": '{"a": 0,\n'}, "vocab.json"),
    "vocab.json not UTF-8": ({"vocab.json": b'{"\xff": 0}'}, "vocab.json"),
    "vocab.json a list": ({"vocab.json": "[1]"}, "vocab.json"),
    "vocab.json with other ids": ({"vocab.json": '{"a": "0"}'}, "vocab.json"),
    "vocab.json of huge ids": ({"vocab.json": '{"a": 18446744073709551616}'}, "vocab.json"),
    "vocab.json of words": ({"vocab.json": '{"a": 0}'}, "vocab.json is not byte-level: 255"),
    "a token twice": ({"vocab.json": '{"a": 0, "a": 1}'}, "'a'"),
    "added_tokens.json cut off": ({"added_tokens.json": "{"}, "added_tokens.json"),
    "added_tokens.json deep": ({"added_tokens.json": "[" * 100_000 + "]" * 100_000}, "added_tokens.json"),
    "one id twice": ({"added_tokens.json": '{"<mine>": 7}'}, "added_tokens.json"),
    "merge of unknown tokens": ({"merges.txt": "#version: 0.2\na b\nab c\n"}, "line 3, 'ab c'"),
    "merge of one": ({"merges.txt": "a b\nab\n"}, "merges.txt line 2, 'ab'"),
    "merge of three": ({"merges.txt": "a b c\n"}, "merges.txt line 1, 'a b c'"),
    "merges.txt not UTF-8": ({"merges.txt": b"\xff \xfe\n"}, "merges.txt line 1"),
    "merges.txt in one line": ({"merges.txt": "a" * 10**6}, "merges.txt line 1"),
}


@pytest.mark.parametrize("case", [*NO_TOKENIZER, *BROKEN])
def test_what_is_no_tokenizer_is_refused_by_name(case, tmp_path):
    if case in BROKEN:
        write_tiny(tmp_path)
        assert Tokenizer.load(tmp_path).encode("cab") == [66, 256]
    files, words = {**NO_TOKENIZER, **BROKEN}[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and str(tmp_path) in message and words in message, message


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


def regex(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": split}


def replacing(*contents: str) -> dict:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]
    return {"normalizer": {"type": "Sequence", "normalizers": steps}}


HOSTILE = {  # what is changed in a valid tokenizer.json
    "catastrophic": regex("(a+)+$"),
    "catastrophic 2": regex("(a|aa)+$"),
    "catastrophic 3": regex("a*a*a*a*a*a*a*a*$"),
    "no regular expression": regex("("),
    "many splits": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [regex("a")["pre_tokenizer"]] * 3000}},
    "many decoders": {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 3000}},
    "words without [UNK]": {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}},
    "a piece without id": {"model": {"type": "Unigram", "vocab": [["b", 0.0]], "unk_id": None}},
    "long replacement": replacing("a" * 1000),
    "many replacements": replacing(*"bcdefghijk"),
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "b" * 10**6}},
    "a table of replacements": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "deep normaliser": {"normalizer": {"type": "Sequence", "normalizers": [[]]}},
    "a model of another kind": {"model": {"type": "Markov"}},
    "huge ids": {"added_tokens": [{"id": 10**19, "content": "x"}]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_json_is_one_line(case, tmp_path, capfd):
    """The library panics, prints and hangs: when it is loaded, or at the first text."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model} | HOSTILE[case]))
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path).encode("a" * 60 + "b")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert capfd.readouterr() == ("", "")


def test_a_long_text_is_refused():
    with pytest.raises(ValueError, match="1,000,000 characters"):
        load(CLIP).encode("a " * 500_000)


def test_line_ends_and_byte_order_marks_change_nothing(tmp_path):
    folder = Path(shutil.copytree(tokenizer_folder(CLIP), tmp_path / "clip"))
    for name in ("vocab.json", "merges.txt"):
        content = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert Tokenizer.load(folder).encode("a red fox") == load(CLIP).encode("a red fox")


def test_only_the_files_that_are_read_count(tmp_path):
    write_tiny(tmp_path)
    before = find_files(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "._tokenizer.json", ".x.model", "desktop.ini", "tokenizer_config.json"):
        (tmp_path / name).write_text("x")
    for name in (".ipynb_checkpoints", "tokenizer.json", "x.model"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "added_tokens.json")
    assert before == find_files(tmp_path) == [tmp_path / "vocab.json", tmp_path / "merges.txt"]


def test_a_number_of_a_million_bytes_is_refused(tmp_path):
    (tmp_path / "a.model").write_bytes(b"\xff" * 10**6)
    with pytest.raises(ValueError, match="a.model"):
        Tokenizer.load(tmp_path)


def test_a_sentencepiece_model_that_inflates_is_refused(tmp_path):
    (tmp_path / "rules.tsv").write_text("61\t" + " ".join(["62"] * 5000) + "\n")  # a becomes 5,000 times b
    train_sentencepiece(tmp_path / "a.model", normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    with pytest.raises(ValueError, match="a.model"):
        Tokenizer.load(tmp_path)


def write_tiny(folder: Path, added: dict[str, int] | None = None) -> None:
    """A byte-level vocabulary of 256 bytes and "ab" in Qwen's two files."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))


def write_tokenizer_json(folder: Path, name: str) -> None:
    """One of our vocabularies as a tokenizer.json, spelled out by hand, whose defaults cut, pad and add."""
    source = tokenizer_folder(name)
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = (source / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if name == QWEN:
        special = json.loads((source / "added_tokens.json").read_text())
        normalizer = {"type": "NFC"}
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    else:
        special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
        spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]}
        byte_level["use_regex"] = True
        pattern = (
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
            r"|[^\s\p{L}\p{N}]+"
        )
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = special["<|endoftext|>"]
    document = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 77}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": end, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        },
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": ["<|endoftext|>", end], "cls": ["<|endoftext|>", end],
            "trim_offsets": False, "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>" if name == CLIP else "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocabulary, "merges": [line for line in merges if line],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


def train_sentencepiece(path: Path, **options) -> None:
    """360 pieces, bytes among them, from a few sentences."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the red fox runs through the snow", "рыжая лиса бежит по снегу"] * 50),
        model_writer=written,
        model_type="bpe",
        vocab_size=360,
        hard_vocab_limit=True,
        byte_fallback=True,
        user_defined_symbols=["<image>"],
        minloglevel=2,
        **{"control_symbols": ["<turn>", "<turn>>"], **options},
    )
    path.write_bytes(written.getvalue())
