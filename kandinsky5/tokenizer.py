"""Text ↔ token ids for both text encoders, from whichever files a checkpoint ships.

Byte-level BPE itself is the `tokenizers` library, SentencePiece the `sentencepiece` library. What stands here
is how the files are found, and the two recipes that `vocab.json` + `merges.txt` leave unsaid: those of
transformers 5.23.0, tokenization_qwen2.py and tokenization_clip.py.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

REMEDY = "tokenizers come with the checkpoint: convert or copy it again (python -m weights_convert --help)"


class Tokenizer:
    """A vocabulary with the way in and the way out. `Tokenizer.load(folder)` builds it."""

    def __init__(self, encode: Callable, decode: Callable, vocabulary: dict[str, int]):
        self._encode, self._decode = encode, decode
        self._vocabulary = vocabulary  # token → id, special tokens included
        self.vocab_size = max(vocabulary.values()) + 1  # an embedding table needs at least as many rows

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Read the first of these that `folder` holds: `tokenizer.json`; Qwen's or CLIP's `vocab.json` and
        `merges.txt` (with `added_tokens.json`); a SentencePiece `*.model`. ValueError if none, or a bad one.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"there is no tokenizer folder {folder}; {REMEDY}")
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer_json(folder / "tokenizer.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return load_vocabulary_and_merges(folder)
        if len(model_files := list(folder.glob("*.model"))) == 1:
            return load_sentencepiece(model_files[0])
        looked_for = "tokenizer.json, vocab.json with merges.txt, or one SentencePiece *.model"
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(f"no tokenizer in {folder}: looked for {looked_for}; found {found}; {REMEDY}")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added around it. A special token written in `text` becomes its one id.

        ValueError for half of a surrogate pair, which no encoding can write.
        """
        if half := re.search("[\ud800-\udfff]", text):
            near = text[max(0, half.start() - 40) : half.end() + 40]
            raise ValueError(f"{near!r} holds half of a surrogate pair, which is no text: remove it")
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens too (SentencePiece leaves its control tokens out). What CLIP's
        encode lower-cased and spaced apart stays so."""
        return self._decode(ids)

    def token_id(self, token: str) -> int:
        """The id of one token as the vocabulary spells it, such as `<|im_end|>`; ValueError if unknown."""
        if token not in self._vocabulary:
            raise ValueError(f"this vocabulary has no token {token!r}: it may be another model's; {REMEDY}")
        return self._vocabulary[token]


def load_tokenizer_json(path: Path) -> Tokenizer:
    """A whole tokenizer in one file of the `tokenizers` library; ValueError if it is none."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer ({one_line(error)}); {REMEDY}") from error
    backend.no_truncation()  # the file remembers how its saver cut and padded: the text encoder's business
    backend.no_padding()
    return build_bpe(backend)


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
    model = models.BPE(vocabulary, merges, end_of_word_suffix="</w>" if is_clip else "")
    backend = tokenizers.Tokenizer(model)
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
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({one_line(error)}); {REMEDY}") from error
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    control = sorted((piece for piece, i in vocabulary.items() if model.is_control(i)), key=len, reverse=True)
    at_control = re.compile(f"({'|'.join(map(re.escape, control))})" if control else r"(?!)")  # longest first

    encode = functools.partial(_encode_pieces, model, vocabulary, set(control), at_control)
    return Tokenizer(encode, model.decode, vocabulary)


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
    try:
        vocabulary = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not valid JSON ({one_line(error)}); {REMEDY}") from error
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ValueError(f"{path} does not map tokens to ids; {REMEDY}")
    return vocabulary


def load_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that BPE joins, first come first joined; ValueError for a line that is no such pair."""
    merges = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"{path} line {number}, {line!r}, does not fit vocab.json; {REMEDY}")
        merges.append(pair)
    return merges


def one_line(error: Exception) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())
