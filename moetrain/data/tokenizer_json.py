"""Tokenizers of a ``tokenizer.json``, through the `tokenizers` package (extra: hf), imported only when one is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.atomic_io import write_file
from moetrain.data.tokenizer import Tokenizer, refuse_surrogates

_SPACE_SYMBOL = "\u2581"

# Tried in this order where neither the settings nor a tokenizer_config.json beside the file name a mark.
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<BOS_TOKEN>", "[BOS]", "[CLS]")
_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<EOS_TOKEN>", "[EOS]", "[SEP]")


class JsonTokenizer(Tokenizer):
    """A byte-level tokenizer, or one with byte fallback; marks that stand in a text are read as plain text."""

    def __init__(self, model: bytes, begin_token: str, end_token: str) -> None:
        import tokenizers

        self.model = model = _without_nfc(model)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the package raises nothing more exact
            raise ValueError(f"not a tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.begin_id, self.end_id = (self._mark(token, vocabulary) for token in (begin_token, end_token))
        self._marks = begin_token, end_token
        decoder = json.dumps(json.loads(model).get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._space_ids: list[int] | None = None
        if '"ByteFallback"' in decoder:
            pieces = [f"<0x{byte:02X}>" for byte in _SPACE_SYMBOL.encode()]
            self._space_ids = [vocabulary[piece] for piece in pieces if piece in vocabulary]
        if not self._byte_level and not self._space_ids:
            raise ValueError("it is neither byte-level nor has byte fallback, so it cannot encode every text")

    @classmethod
    def read(cls, path: Path, begin_token: str | None, end_token: str | None) -> JsonTokenizer:
        """The tokenizer of a file, with marks as named, else as ``tokenizer_config.json`` beside it says, else common.

        Raises:
            OSError: it cannot be read.
            ValueError: the package is missing, the file is no tokenizer, or has no marks.
        """
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            raise ValueError("the tokenizers package is missing: pip install 'moetrain[hf]'") from None
        model = path.read_bytes()
        try:
            tree = json.loads(model)
            tree["model"]  # what every tokenizer.json has
            added = [token["content"] for token in tree.get("added_tokens") or [] if token.get("special")]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError("not a tokenizer.json") from None
        said = _said_beside(path)
        end = end_token or said.get("eos_token") or next((token for token in _ENDS if token in added), None)
        if end is None:
            some = ", ".join(added[:8]) or "none"
            raise ValueError(f"no end mark is known: set tokenizer.end_token (its special tokens: {some})")
        begin = begin_token or said.get("bos_token") or next((token for token in _BEGINS if token in added), None)
        return cls(model, begin or end, end)  # GPT-2 and its like have one mark for both

    def _mark(self, token: str, vocabulary: dict[str, int]) -> int:
        if token not in vocabulary:
            raise ValueError(f"it has no token {token!r} to mark documents with: set begin_token and end_token")
        return vocabulary[token]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.model + json.dumps(self._marks).encode(), digest_size=16).hexdigest()

    def encode_all(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text; the package has threads of its own, set by TOKENIZERS_PARALLELISM."""
        for text in texts:
            refuse_surrogates(text)
        if self._space_ids is None:
            return [encoding.ids for encoding in self._encode_batch(texts)]
        encoded = []
        for text in texts:  # U+2581 would come back as a space: write it by its bytes
            ids: list[int] = []
            for number, encoding in enumerate(self._encode_batch(text.split(_SPACE_SYMBOL))):
                ids += (self._space_ids if number else []) + encoding.ids
            encoded.append(ids)
        return encoded

    def _encode_batch(self, texts: Sequence[str]) -> list[Any]:
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        marks = (self.begin_id, self.end_id)
        return self._tokenizer.decode([int(i) for i in ids if i not in marks], skip_special_tokens=False)

    def save_in(self, folder: Path) -> Path:
        # Its marks stand beside it, so that they are found again without the settings that may have named them.
        marks = json.dumps(dict(zip(("bos_token", "eos_token"), self._marks, strict=True)), indent=1)
        write_file(folder / "tokenizer_config.json", marks.encode())
        return write_file(folder / "tokenizer.json", self.model)

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
                sizes[i] = len(piece.replace(_SPACE_SYMBOL, " ").encode())
        sizes[[self.begin_id, self.end_id]] = 0
        return sizes


def _without_nfc(model: bytes) -> bytes:
    """The same tokenizer for text as it is, where it would bring text into Unicode's composed form (NFC) first.

    Text that is in that form, as nearly all is, keeps its ids; any other comes back as it was. (OLMoE's has it.)
    """
    tree = json.loads(model)
    if tree.get("normalizer") != {"type": "NFC"}:
        return model
    return json.dumps(tree | {"normalizer": None}, ensure_ascii=False).encode()


def _said_beside(path: Path) -> dict[str, str]:
    """The marks that a tokenizer_config.json in the same folder names."""
    try:
        tree = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for key in ("bos_token", "eos_token"):
        token = tree.get(key) if isinstance(tree, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[key] = token
    return found
