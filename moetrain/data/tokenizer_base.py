"""What every tokenizer does: any Unicode text to token ids, and the same text back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

SPACE_SYMBOL = "\u2581"
"""SentencePiece writes a space as this character. The character itself must not come back as a space."""

ANOTHER = "give another, or leave tokenizer.model out: one is then trained"
"""What helps if a tokenizer cannot be used."""


_ACCEPT = "or accept changed text by tokenizer.lossy=true"


class Tokenizer(ABC):
    """Lossless conversion between text and token ids.

    ``begin_id`` and ``end_id`` mark the ends of a document. No text encodes to them.
    """

    vocab_size: int
    begin_id: int
    end_id: int
    model: bytes  # content of the file it was read from
    cannot_encode: str | None = None  # why some characters have no ids
    _space_symbol_ids: list[int] | None  # the byte tokens of U+2581; None if the model itself keeps U+2581

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever token ids could."""
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot represent.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, on ``threads`` threads.

        Raises:
            ValueError: as `encode`.
        """
        for text in texts:
            refuse_surrogates(text)
        if self._space_symbol_ids is None:
            return self._encode_batch(texts, threads)
        # The text between two U+2581 is encoded as usual, U+2581 itself as its bytes.
        pieces = [text.split(SPACE_SYMBOL) for text in texts]
        encoded = iter(self._encode_batch([piece for each in pieces for piece in each], threads))
        result = []
        for each in pieces:
            ids = next(encoded)
            for _ in each[1:]:
                ids = ids + self._space_symbol_ids + next(encoded)
            result.append(ids)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; begin and end marks are skipped."""
        return self._decode([int(i) for i in ids if i not in (self.begin_id, self.end_id)])

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Token ids of texts as the underlying library gives them."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of token ids without marks."""

    def own_pieces(self) -> list[str]:
        """Pieces that are found in a text as a whole, before anything else: added tokens, user-defined symbols."""
        return []

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [V]; 0 for marks."""

    @abstractmethod
    def piece(self, i: int) -> str:
        """The name of an id, for messages."""

    def is_special(self, i: int) -> bool:
        """Whether an id stands for no text."""
        return not self._bytes_per_id[i]

    def special_ids(self, ids: np.ndarray) -> dict[int, int]:
        """How often ids that stand for no text occur."""
        found, counts = np.unique(ids[self._bytes_per_id[ids] == 0], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

    def text_bytes(self, ids: np.ndarray) -> int:
        """Bytes of the text that ids stand for."""
        return int(self._bytes_per_id[ids].sum())

    def span(self, text: str, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """The tokens (first, one past the last) that hold ``text[start:end]``, where ``ids`` encode ``text``.

        A token that holds characters on both sides of a boundary counts as inside.

        Raises:
            ValueError: the bytes of the tokens do not add up to the text.
        """
        ends = np.cumsum(self._bytes_per_id[np.asarray(ids, np.int64)])
        first, last = len(text[:start].encode()), len(text[:end].encode())
        if len(text.encode()) != (ends[-1] if len(ends) else 0):
            raise ValueError("the tokens are not those of the text")
        return int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1

    @cached_property
    def _bytes_per_id(self) -> np.ndarray:
        return self.token_bytes()

    def save(self, path: Path) -> None:
        path.write_bytes(self.model)

    @abstractmethod
    def save_in(self, folder: Path) -> Path:
        """Write it atomically into a folder, where `moetrain.data.tokenizer.load_from_folder` finds it.

        Returns:
            the file.
        """


SAMPLE_TEXTS = (
    "Two  spaces, a\ttab\nand a line.\r\n\r\n    indented = {'x': [1, 23, 4567]}\n",
    " begins and ends with a space ",
    "\n\nBegins with lines",
    "UPPER lower Ünïcödé e\u0301 \u00e9 \ufb01 \u2126 ½ ² Ａ",  # a normalization would change some of these
    "漢字 かな 한국어 עברית العربية हिन्दी \U0001f389\U0001f469\u200d\U0001f469",
    "\u2581a \u2581 b\u2581\u2581",
    "\x00\x01\x7f\u3000\xa0\u200b\ufeff\ufffd",
    "<s></s><unk><pad><0x41><|endoftext|>[CLS] [MASK]",
)


def check_lossless(tokenizer: Tokenizer, lossy: bool = False) -> None:
    """Encode and decode a few texts that tokenizers often change, and each of its own pieces within text and spaces.

    Args:
        lossy: texts may come back changed; only that none encodes to a mark is checked.

    Raises:
        ValueError: a text does not come back from its ids, or a text encodes to a mark.
    """
    if not lossy and (problem := tokenizer.cannot_encode) is not None:
        raise ValueError(f"{problem}: {ANOTHER}, {_ACCEPT}")
    texts = [*SAMPLE_TEXTS, *(f"in{piece}text  {piece} \n{piece}\t\n {piece}" for piece in tokenizer.own_pieces())]
    for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
        if tokenizer.begin_id in ids or tokenizer.end_id in ids:
            raise ValueError(f"it writes its marks as part of the text {text!r}: {ANOTHER}")
        decoded = tokenizer.decode(ids)
        if decoded != text and not lossy:
            raise ValueError(f"it is not lossless: {text!r} comes back as {decoded!r}: {ANOTHER}, {_ACCEPT}")


def refuse_surrogates(text: str) -> None:
    """Raise ValueError if a text cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is not valid Unicode; replace or remove it"
        ) from None
