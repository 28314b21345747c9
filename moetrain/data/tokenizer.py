"""Tokenizers: any Unicode text in, token ids out, and the same text back.

The corpus's own is SentencePiece BPE with byte fallback; a given one is such a model, or a ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece as spm

from moetrain.atomic_io import write_file
from moetrain.data.errors import DataError

_SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space as this; the character itself must not become one
_LONGEST_SENTENCE = 4000  # bytes; SentencePiece leaves out longer ones without a word


class Tokenizer(ABC):
    """Text to ids and back, lossless. Marks are not part of text: ``begin_id`` and ``end_id`` stand apart."""

    vocab_size: int
    begin_id: int
    end_id: int
    model: bytes  # the file it was made from

    @property
    def fingerprint(self) -> str:
        """Changes whenever ids could."""
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the text holds a lone surrogate, which no UTF-8 can carry.
        """
        return self.encode_all([text])[0]

    @abstractmethod
    def encode_all(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, on ``threads`` threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; marks are left out."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [V]; marks stand for none."""

    def span(self, text: str, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """The tokens (first, one past the last) of ``ids``, a text's own, that hold ``text[start:end]``.

        A token that holds characters on both sides of a boundary counts as inside.

        Raises:
            ValueError: the tokens do not spell out the text byte for byte.
        """
        ends = np.cumsum(self._bytes_by_id[np.asarray(ids, np.int64)])
        first, last = len(text[:start].encode()), len(text[:end].encode())
        if len(text.encode()) != (ends[-1] if len(ends) else 0):
            raise ValueError("the tokens are not those of the text")
        return int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1

    @cached_property
    def _bytes_by_id(self) -> np.ndarray:
        return self.token_bytes()

    def save(self, path: Path) -> None:
        path.write_bytes(self.model)

    @abstractmethod
    def save_in(self, folder: Path) -> Path:
        """Write it into a folder under the name that `load_from` looks for; returns the file. Whole or not at all."""

    @staticmethod
    def load_from(folder: Path) -> Tokenizer:
        """The tokenizer that `save_in` wrote into a folder.

        Raises:
            FileNotFoundError: there is none.
            OSError, RuntimeError, ValueError: as `load`.
        """
        path = folder / SentencePieceTokenizer.FILE
        return Tokenizer.load(path if path.is_file() else folder / "tokenizer.json")

    @staticmethod
    def load(path: Path, begin_token: str | None = None, end_token: str | None = None) -> Tokenizer:
        """The tokenizer of a file: a ``tokenizer.json``, with the marks named or found, or a SentencePiece model.

        Raises:
            OSError, RuntimeError: it cannot be read.
            ValueError: it has no marks, or cannot encode every text.
        """
        if path.suffix == ".json":
            from moetrain.data.tokenizer_json import JsonTokenizer  # needs a package that is installed apart

            return JsonTokenizer.read(path, begin_token, end_token)
        return SentencePieceTokenizer(path.read_bytes())


TRIALS = (
    "Two  spaces, a\ttab\nand a line.\r\n\r\n    indented = {'x': [1, 23, 4567]}\n",
    " begins and ends with a space ",
    "\n\nBegins with lines",
    "UPPER lower Ünïcödé e\u0301 \u00e9 \ufb01 \u2126 ½ ² Ａ",  # a normalization would change some of these
    "漢字 かな 한국어 עברית العربية हिन्दी \U0001f389\U0001f469\u200d\U0001f469",
    "\u2581a \u2581 b\u2581\u2581",
    "\x00\x01\x7f\u3000\xa0\u200b\ufeff\ufffd",
    "<s></s><unk><pad><0x41><|endoftext|>[CLS] [MASK]",
)


def check_lossless(tokenizer: Tokenizer) -> None:
    """Raise ValueError where a text does not come back from its ids, or a mark comes from a text."""
    for text in TRIALS:
        ids = tokenizer.encode(text)
        if tokenizer.begin_id in ids or tokenizer.end_id in ids:
            raise ValueError(f"it writes its marks as part of the text {text!r}")
        back = tokenizer.decode(ids)
        if back != text:
            raise ValueError(f"it is not lossless: {text!r} comes back as {back!r}")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        if self._processor.normalize(" a") != _SPACE_SYMBOL + "a" or self._processor.normalize("a") != "a":
            self._processor = spm.SentencePieceProcessor(model_proto=_with_plain_spaces(model))
        self.vocab_size: int = self._processor.vocab_size()
        self.begin_id: int = self._processor.bos_id()
        self.end_id: int = self._processor.eos_id()
        if self.begin_id < 0 or self.end_id < 0:
            raise ValueError("the tokenizer has no begin and end marks: train it with bos_id and eos_id")
        if not self._processor.is_byte(self._processor.piece_to_id("<0x00>")):
            raise ValueError("the tokenizer has no byte fallback, so it cannot encode every text: train with it")
        if self._processor.is_unknown(self._processor.piece_to_id(_SPACE_SYMBOL)):
            raise ValueError("the tokenizer has no piece for a space, so it cannot tell it from U+2581: train another")
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]

    def encode_all(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        for text in texts:
            refuse_surrogates(text)
        plain = [_SPACE_SYMBOL not in text for text in texts]
        encoded = iter(self._processor.encode([t for t, p in zip(texts, plain, strict=True) if p], num_threads=threads))
        return [next(encoded) if p else self._encode_around(t) for t, p in zip(texts, plain, strict=True)]

    def _encode_around(self, text: str) -> list[int]:
        """Encode a text that holds U+2581: that character by its bytes, what lies between as usual."""
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE_SYMBOL)):
            ids += (self._space_ids if number else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i not in (self.begin_id, self.end_id)])

    def save_in(self, folder: Path) -> Path:
        return write_file(folder / self.FILE, self.model)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                sizes[i] = 1
            elif not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                sizes[i] = len(self._processor.id_to_piece(i).replace(_SPACE_SYMBOL, " ").encode())
        return sizes


def _with_plain_spaces(model: bytes) -> bytes:
    """The same vocabulary without the space that some models put before a text, and with all spaces of a text."""
    from sentencepiece import sentencepiece_model_pb2

    parsed = sentencepiece_model_pb2.ModelProto.FromString(model)
    parsed.normalizer_spec.add_dummy_prefix = False
    parsed.normalizer_spec.remove_extra_whitespaces = False
    return parsed.SerializeToString()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a BPE vocabulary with byte fallback, the same one each time for the same texts.

    A text too small for ``vocab_size`` gives a smaller vocabulary. Digits stand alone, so that numbers are read by
    place; runs of spaces are pieces, so that code's indentation is short.

    Raises:
        DataError: a vocabulary too small for the texts' characters.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_LONGEST_SENTENCE + 1000,
            character_coverage=0.9999,
            required_chars=_SPACE_SYMBOL,  # else a text without spaces gives a vocabulary that confuses the two
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if least is None:
            raise
        raise DataError(
            f"tokenizer.vocab_size {vocab_size} is too small: bytes and the characters of these texts alone are "
            f"{least[1]} pieces: raise it"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of text short enough for training, cut at line ends where there are any."""
    for text in texts:
        refuse_surrogates(text)
        piece: list[str] = []
        size = 0
        for line in text.replace(_SPACE_SYMBOL, " ").splitlines(keepends=True):
            for start in range(0, len(line), _LONGEST_SENTENCE // 4):
                part = line[start : start + _LONGEST_SENTENCE // 4]  # a character has at most 4 bytes
                bytes_ = len(part.encode())
                if size + bytes_ > _LONGEST_SENTENCE:
                    yield "".join(piece)
                    piece, size = [], 0
                piece.append(part)
                size += bytes_
        if piece:
            yield "".join(piece)


def refuse_surrogates(text: str) -> None:
    """Raise ValueError where a text cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is not valid Unicode; replace or remove it"
        ) from None
