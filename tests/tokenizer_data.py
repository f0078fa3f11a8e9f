"""The real vocabularies of Qwen2.5 and CLIP for every test that needs them, and ids to compare with.

Where they come from and their licences: data/tokenizers/README.md.
"""

import functools
import hashlib
import json
import tarfile
import tempfile
from pathlib import Path

DATA = Path(__file__).parent / "data" / "tokenizers"


def tokenizer_folder(name: str) -> Path:
    """Folder with the vocab.json and merges.txt of "qwen2.5" (and its added_tokens.json) or
    "clip-vit-large-patch14". Read only: copy what a test wants to change."""
    if name not in ("qwen2.5", "clip-vit-large-patch14"):
        raise ValueError(f"no vocabulary {name!r}; there are 'qwen2.5' and 'clip-vit-large-patch14'")
    return Path(unpack().name) / name


@functools.cache  # once per process (0.1 s), into a folder of its own: parallel runs never meet
def unpack() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="kandinsky5-tokenizers-")  # removed when the process ends
    with tarfile.open(DATA / "tokenizers.tar.xz") as archive:
        archive.extractall(folder.name, filter="data")
    return folder


def load_goldens(name: str) -> dict[str, tuple[str, list[int] | str]]:
    """title → (text, fingerprint of the ids that transformers gives it with the vocabulary `name`)."""
    goldens = json.loads((DATA / "golden_ids.json").read_text(encoding="utf-8"))
    return {title: (golden["text"] * golden["times"], golden[name]) for title, golden in goldens.items()}


def fingerprint(ids: list[int]) -> list[int] | str:
    """The ids themselves; of more than a thousand the SHA-256, so that the file stays small."""
    return ids if len(ids) <= 1000 else hashlib.sha256(json.dumps(ids).encode()).hexdigest()
