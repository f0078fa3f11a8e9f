"""Text ↔ token ids for both text encoders, from whichever files a checkpoint ships.

Byte-level BPE itself is the `tokenizers` library, SentencePiece the `sentencepiece` library. What stands here
is how the files are found, and the two recipes that `vocab.json` + `merges.txt` leave unsaid: those of
transformers 5.23.0, tokenization_qwen2.py and tokenization_clip.py.
"""

import codecs
import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from kandinsky5.files import parse_json, read_bytes, read_json, read_text
from kandinsky5.screen import listed, printable

REMEDY = "tokenizers are part of a checkpoint: convert or copy it again (python -m weights_convert --help)"
LARGEST_FILE = 50_000_000  # bytes; Qwen's tokenizer.json has 11 MB
LARGEST_ID = 2**24  # an embedding of so many rows would be larger than the models
LONGEST_TEXT = 100_000  # characters; the models read 256 tokens of a prompt, and the library slows down with the square
LONGEST_REPLACEMENT = 64  # bytes of one character, normalised; of one in Unicode 33
STEPS = 8  # of a normaliser, CLIP's has three; and of what splits text and joins it again


class Tokenizer:
    """A vocabulary with the way in and the way out. `Tokenizer.load(folder)` builds it."""

    def __init__(self, encode: Callable, decode: Callable, vocabulary: dict[str, int]):
        self._encode, self._decode = encode, decode
        self._vocabulary = vocabulary  # token → id, special tokens included
        self.vocab_size = max(vocabulary.values(), default=0) + 1  # an embedding table needs at least as many rows

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Read what `find_files` finds in `folder`; ValueError if that is no tokenizer."""
        folder = Path(folder)
        files = find_files(folder)
        if not files:
            found = listed(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
            kinds = "tokenizer.json, vocab.json with merges.txt, or one SentencePiece *.model"
            raise ValueError(f"no tokenizer in {folder}: looked for {kinds}; found {found or 'nothing'}; {REMEDY}")
        if files[0].suffix == ".model":
            return load_sentencepiece(files[0])
        return load_vocabulary_and_merges(folder) if len(files) > 1 else load_tokenizer_json(files[0])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added around it. A special token written in `text` becomes its one id.

        ValueError for more than LONGEST_TEXT characters, and for half of a surrogate pair, which no encoding can write.
        """
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text):,} characters: at most {LONGEST_TEXT:,} are tokenized; shorten it")
        if half := re.search("[\ud800-\udfff]", text):
            near = text[max(0, half.start() - 40) : half.end() + 40]
            raise ValueError(f"{near!r} holds half of a surrogate pair, which is no text: remove it")
        with library_errors("this text cannot be tokenized"):
            return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens too (SentencePiece leaves its control tokens out). What CLIP's
        encode lower-cased and spaced apart stays so."""
        with library_errors("these ids cannot be decoded"):
            return self._decode(ids)

    def token_id(self, token: str) -> int:
        """The id of one token as the vocabulary spells it, such as `<|im_end|>`; ValueError if unknown."""
        if token not in self._vocabulary:
            raise ValueError(f"this vocabulary has no token {token!r}: it may be another model's; {REMEDY}")
        return self._vocabulary[token]


def find_files(folder: Path) -> list[Path]:
    """The files in `folder` that make its tokenizer, of the first of these kinds: `tokenizer.json`; Qwen's or CLIP's
    `vocab.json` and `merges.txt` (with `added_tokens.json`); one SentencePiece `*.model`. Others do not count.
    """
    whole, vocabulary, merges, added = (folder / name for name in FILES)
    if whole.is_file():
        return [whole]
    if vocabulary.is_file() and merges.is_file():
        return [path for path in (vocabulary, merges, added) if path.is_file()]
    models = [path for path in folder.glob("*.model") if path.is_file() and not path.name.startswith(".")]
    return models if len(models) == 1 else []


FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever `tokenizers` and `sentencepiece` raise into a ValueError of one line.

    A panic of Rust, such as for a regular expression that backtracks for ever, is no Exception, and prints a page on
    stderr before it can be caught: so nothing is printed meanwhile.
    """
    with _one_at_a_time:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            stderr = -1
        try:
            if stderr >= 0:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 2)
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            raise ValueError(f"{what} ({printable(error, 300)}); {REMEDY}") from error
        finally:
            if stderr >= 0:
                os.dup2(stderr, 2)
                os.close(stderr)


_one_at_a_time = threading.RLock()


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A whole tokenizer in one file of the `tokenizers` library; ValueError if it is none."""
    data = read_bytes(path, LARGEST_FILE)
    document = parse_json(data, path)
    if not isinstance(document, dict):
        raise ValueError(f"{path} cannot be read as a tokenizer: it holds no JSON object; {REMEDY}")
    check_normalizer(document.get("normalizer"), path)
    for part, inner in (("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        check_steps(document.get(part), part, inner, path)
    with library_errors(f"{path} cannot be read as a tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(data.removeprefix(codecs.BOM_UTF8))
        backend.no_truncation()  # the file remembers how its saver cut and padded: the text encoder's business
        backend.no_padding()
    return build_bpe(backend)


NORMALIZERS = "NFC NFD NFKC NFKD Nmt Lowercase Strip StripAccents BertNormalizer Replace Prepend Sequence".split()


def check_normalizer(normalizer: Any, path: Path) -> None:
    """ValueError for one that could make a text grow without bound: long replacements, or many steps."""
    steps = [normalizer] if normalizer else []
    for step in steps:  # which grows meanwhile
        inner = step.get("normalizers", []) if isinstance(step, dict) else None
        if not isinstance(inner, list) or step.get("type") not in NORMALIZERS or len(steps) + len(inner) > STEPS:
            raise ValueError(f"{path} normalises text in a way that is not known here: {step!r:.200}; {REMEDY}")
        if any(len(str(step.get(key, ""))) > 1 for key in ("content", "prepend")):
            raise ValueError(f"{path} replaces text by more than one character: {step!r:.200}; {REMEDY}")
        steps += inner


def check_steps(part: Any, name: str, inner: str, path: Path) -> None:
    """ValueError for a sequence of more than STEPS, as each passes over the whole text."""
    steps = [part]
    for step in steps:  # which grows meanwhile
        more = step.get(inner) if isinstance(step, dict) else None
        steps += more if isinstance(more, list) else []
        if len(steps) > STEPS:
            raise ValueError(f"{path} has a {name} of more than {STEPS} steps; {REMEDY}")


# Text is split by these first, and no token crosses a split. Qwen takes the space before a word along and one
# digit at a time; CLIP drops white space and marks the ends of words with </w> instead.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# In the order of their ids, which follow those of the vocabulary: from 151643, and 49406 and 49407.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|>"
).split()
CLIP_SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]


def load_vocabulary_and_merges(folder: Path) -> Tokenizer:
    """Byte-level BPE as Qwen or CLIP applies it; CLIP's vocabulary is known by its `</w>`.

    ValueError for files that contradict each other, or are not byte-level.
    """
    vocabulary = load_vocabulary(folder / "vocab.json")
    is_clip = "!</w>" in vocabulary
    special_tokens = CLIP_SPECIAL_TOKENS if is_clip else QWEN_SPECIAL_TOKENS
    if (folder / "added_tokens.json").is_file():
        added_tokens = load_vocabulary(folder / "added_tokens.json")
        vocabulary |= added_tokens
        special_tokens = [*special_tokens, *added_tokens]
    else:
        for token in special_tokens:
            vocabulary.setdefault(token, len(vocabulary))
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{folder}: two tokens of vocab.json and added_tokens.json share an id; {REMEDY}")
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys():  # BPE would just drop them
        raise ValueError(f"{folder}/vocab.json is not byte-level: {len(missing)} bytes are missing; {REMEDY}")

    merges = load_merges(folder / "merges.txt", vocabulary)
    with library_errors(f"{folder} cannot be read as a tokenizer"):
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>" if is_clip else ""))
        if is_clip:
            backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
            split = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
        else:
            backend.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
        # use_regex, GPT-2's own split, comes on top for CLIP: felt only where <|ENDOFTEXT|> stands in capitals
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_clip)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        backend.decoder = decoders.ByteLevel()
        # not normalized: special tokens are found in the text as typed, before NFC and lower-casing
        known = [AddedToken(token, normalized=False) for token in special_tokens if token in vocabulary]
        backend.add_special_tokens(known)
    return build_bpe(backend)


def load_sentencepiece(path: Path) -> Tokenizer:
    """A SentencePiece model. The library finds user-defined pieces in a text by itself but spells control
    pieces (`<s>`, `</s>`, …) out: the text is split at those first. ValueError for a file that is none."""
    data = read_bytes(path, LARGEST_FILE)
    with library_errors(f"{path} is not a SentencePiece model"):
        specs = [spec for number, spec in read_fields(data) if number == 3]  # of the normaliser
        for charsmap in [inner for spec in specs for number, inner in read_fields(spec) if number == 2]:
            trie = int.from_bytes(charsmap[:4], "little")  # its size; behind it the replacements, one after the other
            if any(len(text) > LONGEST_REPLACEMENT for text in charsmap[4 + trie :].split(b"\0")):
                raise ValueError("its normaliser replaces a character by a long text")
        model = SentencePieceProcessor(model_proto=data)
        vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        control = sorted((piece for piece, i in vocabulary.items() if model.is_control(i)), key=len, reverse=True)
    at_control = re.compile(f"({'|'.join(map(re.escape, control))})" if control else r"(?!)")  # longest first

    encode = functools.partial(_encode_pieces, model, vocabulary, set(control), at_control)
    return Tokenizer(encode, model.decode, vocabulary)


def read_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the texts and messages in a message of protobuf."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if shift > 63:  # ten bytes; without a limit, numbers of millions of them
                raise ValueError("it holds a number of more than 64 bits")
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 2:
            size = varint()
            yield key >> 3, data[at : at + size]
            at += size
        elif key & 7 == 0:
            varint()
        else:
            at += 8 if key & 7 == 1 else 4


def _encode_pieces(
    model: SentencePieceProcessor, vocabulary: dict[str, int], control: set[str], at_control: re.Pattern, text: str
) -> list[int]:
    ids: list[int] = []
    for part in at_control.split(text):
        ids += [vocabulary[part]] if part in control else model.encode(part)
    return ids


def build_bpe(backend: tokenizers.Tokenizer) -> Tokenizer:
    """Ours around a tokenizer of the `tokenizers` library."""
    word_end = getattr(backend.model, "end_of_word_suffix", None)  # CLIP's </w>

    encode, decode = functools.partial(_encode_bpe, backend), functools.partial(_decode_bpe, backend, word_end)
    return Tokenizer(encode, decode, backend.get_vocab(with_added_tokens=True))


def _encode_bpe(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _decode_bpe(backend: tokenizers.Tokenizer, word_end: str | None, ids: list[int]) -> str:
    text = backend.decode(ids, skip_special_tokens=False)
    return text.replace(word_end, " ").removesuffix(" ") if word_end else text


def load_vocabulary(path: Path) -> dict[str, int]:
    """Token → id from a JSON file; ValueError if it holds anything else."""
    vocabulary = read_json(path, LARGEST_FILE)
    if not all(type(i) is int and 0 <= i < LARGEST_ID for i in vocabulary.values()):
        raise ValueError(f"{path} does not map tokens to ids; {REMEDY}")
    return vocabulary


def load_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that BPE joins, first come first joined; ValueError for a line that is no such pair."""
    merges = []
    lines = read_text(path, LARGEST_FILE).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"{path} line {number}, {line[:100]!r}, does not fit vocab.json; {REMEDY}")
        merges.append(pair)
    return merges
