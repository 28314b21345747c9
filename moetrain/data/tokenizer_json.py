"""Tokenizers of a ``tokenizer.json``, through the `tokenizers` package (extra: hf), which is imported on first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.atomic_io import write_file
from moetrain.data.tokenizer_base import ANOTHER, SPACE_SYMBOL, Tokenizer

# Tried in this order if neither the settings nor the files beside the tokenizer name a mark.
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<BOS_TOKEN>", "[BOS]", "[CLS]")
_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<EOS_TOKEN>", "[EOS]", "[SEP]")


TEKKEN_REMEDY = (
    "convert it once with transformers and mistral-common, AutoTokenizer.from_pretrained(ITS_FOLDER, "
    "mistral_format=False).save_pretrained('converted'), and give converted/tokenizer.json"
)


class JsonTokenizer(Tokenizer):
    """A byte-level tokenizer, or one with byte fallback; others lose text. Marks in a text are plain text."""

    FILE = "tokenizer.json"

    def __init__(self, model: bytes, begin_token: str, end_token: str) -> None:
        import tokenizers

        self.model = model = _keeping_all(model, (begin_token, end_token))
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the package raises no narrower class
            raise ValueError(f"not a tokenizer.json ({error}): {ANOTHER}") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.begin_id, self.end_id = (self._mark(token, vocabulary) for token in (begin_token, end_token))
        self._marks = begin_token, end_token
        decoder = json.dumps(json.loads(model).get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._space_symbol_ids = None
        if '"ByteFallback"' in decoder:
            pieces = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
            self._space_symbol_ids = [vocabulary[piece] for piece in pieces if piece in vocabulary]
        if not self._byte_level and not self._space_symbol_ids:
            self._space_symbol_ids = None
            self.cannot_encode = "it is neither byte-level nor has byte fallback, so it cannot encode every text"

    @classmethod
    def read(cls, path: Path, begin_token: str | None, end_token: str | None) -> JsonTokenizer:
        """The tokenizer of a file; marks as named, else from the files in its folder that name them, else common ones.

        Raises:
            OSError: it cannot be read.
            ValueError: the package is missing, the file is no tokenizer, or it has no marks.
        """
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            raise ValueError("the tokenizers package is missing: pip install 'moetrain[hf]'") from None
        model = path.read_bytes()
        try:
            tree = json.loads(model)
            tree["model"]  # what every tokenizer.json has
            tokens = tree.get("added_tokens") or []
            added = [token["content"] for token in sorted(tokens, key=lambda token: not token.get("special"))]
        except (ValueError, AttributeError, KeyError, TypeError):
            if b'"token_bytes"' in model[: 2**16]:
                raise ValueError(f"it is in Mistral's tekken format: {TEKKEN_REMEDY}") from None
            raise ValueError(f"not a tokenizer.json: {ANOTHER}") from None
        configured = _configured_marks(path)
        end = end_token or configured.get("eos_token") or next((token for token in _ENDS if token in added), None)
        if end is None:
            some = ", ".join(added[:8]) or "none"
            raise ValueError(f"no end mark is known: set tokenizer.end_token (its added tokens: {some})")
        begin = begin_token or configured.get("bos_token") or next((token for token in _BEGINS if token in added), None)
        return cls(model, begin or end, end)  # GPT-2 and others have one mark for both

    def _mark(self, token: str, vocabulary: dict[str, int]) -> int:
        if token not in vocabulary:
            raise ValueError(f"it has no token {token!r} to mark documents with: set begin_token and end_token")
        return vocabulary[token]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.model + json.dumps(self._marks).encode(), digest_size=16).hexdigest()

    def _encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        # The package has threads of its own, set by TOKENIZERS_PARALLELISM.
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def piece(self, i: int) -> str:
        return str(self._tokenizer.id_to_token(i))

    def own_pieces(self) -> list[str]:
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        return list(dict.fromkeys([*added, *self._marks]))

    def save_in(self, folder: Path) -> Path:
        # The marks are written to the same folder, so that they are found without the settings that named them.
        marks = json.dumps(dict(zip(("bos_token", "eos_token"), self._marks, strict=True)), indent=1)
        write_file(folder / "tokenizer_config.json", marks.encode())
        return write_file(folder / self.FILE, self.model)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        added = self._tokenizer.get_added_tokens_decoder()
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(added[i].content.encode())
            elif self._byte_level:
                sizes[i] = len(piece)  # each character stands for a byte
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                sizes[i] = 1
            else:
                sizes[i] = len(piece.replace(SPACE_SYMBOL, " ").encode())
        sizes[[self.begin_id, self.end_id]] = 0
        return sizes


def _keeping_all(model: bytes, marks: tuple[str, str]) -> bytes:
    """The same tokenizer, but what it takes from a text without a trace is kept.

    Unicode normalization to NFC, which OLMoE's has, is left out: text in NFC, as nearly all text is, keeps its ids. An
    added token that takes the white space beside it leaves it there. A mark that counts as ordinary text becomes a
    special token, so that its letters within a text are encoded as text.
    """
    tree = json.loads(model)
    added = [
        token
        | {"lstrip": False, "rstrip": False, "special": bool(token.get("special")) or token.get("content") in marks}
        for token in tree.get("added_tokens") or []
    ]
    kept = {"normalizer": _without_nfc(tree.get("normalizer")), "added_tokens": added}
    if kept == {"normalizer": tree.get("normalizer"), "added_tokens": tree.get("added_tokens") or []}:
        return model
    return json.dumps(tree | kept, ensure_ascii=False).encode()


def _without_nfc(normalizer: Any) -> Any:
    """A normalizer without its steps of NFC; None if there is none, or nothing is left of it."""
    if not isinstance(normalizer, dict) or normalizer.get("type") == "NFC":
        return None
    steps = normalizer.get("normalizers")
    if normalizer.get("type") != "Sequence" or not steps:
        return normalizer
    kept = [step for step in map(_without_nfc, steps) if step is not None]
    return normalizer | {"normalizers": kept} if kept else None


def _configured_marks(path: Path) -> dict[str, str]:
    """The marks that tokenizer_config.json in the same folder names, or else special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            tree = json.loads((path.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in ("bos_token", "eos_token"):
            token = tree.get(key) if isinstance(tree, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found
