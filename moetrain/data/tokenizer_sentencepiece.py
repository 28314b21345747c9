"""SentencePiece BPE models with byte fallback: used as given, or trained on the run's corpus."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

from moetrain.atomic_io import write_file
from moetrain.data.errors import DataError
from moetrain.data.tokenizer_base import SPACE_SYMBOL, Tokenizer, refuse_surrogates

_LONGEST_SENTENCE = 4000  # bytes; SentencePiece silently skips longer ones


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback.

    Raises:
        ValueError: the model has no marks, no byte fallback, or no piece for a space.
        RuntimeError: the bytes are no SentencePiece model.
    """

    FILE = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        if self._processor.normalize(" a") != SPACE_SYMBOL + "a" or self._processor.normalize("a") != "a":
            self._processor = spm.SentencePieceProcessor(model_proto=_with_plain_spaces(model))
        self.vocab_size: int = self._processor.vocab_size()
        self.begin_id: int = self._processor.bos_id()
        self.end_id: int = self._processor.eos_id()
        if self.begin_id < 0 or self.end_id < 0:
            raise ValueError("the tokenizer has no begin and end marks: train it with bos_id and eos_id")
        if not self._processor.is_byte(self._processor.piece_to_id("<0x00>")):
            raise ValueError("the tokenizer has no byte fallback, so it cannot encode every text: train with it")
        if self._processor.is_unknown(self._processor.piece_to_id(SPACE_SYMBOL)):
            raise ValueError("the tokenizer has no piece for a space, so it cannot tell it from U+2581: train another")
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    def _encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        return encoded

    def _decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def piece(self, i: int) -> str:
        return str(self._processor.id_to_piece(i))

    def own_pieces(self) -> list[str]:
        from sentencepiece import sentencepiece_model_pb2

        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        own = (kinds.USER_DEFINED, kinds.CONTROL)
        pieces = sentencepiece_model_pb2.ModelProto.FromString(self.model).pieces
        return [piece.piece.replace(SPACE_SYMBOL, " ") for piece in pieces if piece.type in own]

    def save_in(self, folder: Path) -> Path:
        return write_file(folder / self.FILE, self.model)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                sizes[i] = 1
            elif not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                sizes[i] = len(self._processor.id_to_piece(i).replace(SPACE_SYMBOL, " ").encode())
        return sizes


def _with_plain_spaces(model: bytes) -> bytes:
    """The same vocabulary, but no space is added before a text and no space of a text is removed."""
    from sentencepiece import sentencepiece_model_pb2

    parsed = sentencepiece_model_pb2.ModelProto.FromString(model)
    parsed.normalizer_spec.add_dummy_prefix = False
    parsed.normalizer_spec.remove_extra_whitespaces = False
    return parsed.SerializeToString()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a BPE vocabulary with byte fallback. The same texts always give the same vocabulary.

    Texts too small for ``vocab_size`` give a smaller vocabulary. Each digit is a token. Runs of spaces are tokens, so
    that indentation takes few of them.

    Raises:
        DataError: ``vocab_size`` is smaller than the number of bytes and characters of the texts.
        BaseException: what reading the texts raised, an interrupt included.
    """
    model, raised = io.BytesIO(), list[BaseException]()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_noting(_sentences(texts), raised),
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
            required_chars=SPACE_SYMBOL,  # without it, texts without spaces give a vocabulary that confuses the two
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if raised:  # which SentencePiece made an error of its own
            raise raised[0] from None
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if least is None:
            raise
        raise DataError(
            f"tokenizer.vocab_size {vocab_size} is too small: bytes and the characters of these texts alone are "
            f"{least[1]} pieces: raise it"
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def _noting(sentences: Iterable[str], raised: list[BaseException]) -> Iterator[str]:
    """The same sentences; what reading them raises is noted too."""
    try:
        yield from sentences
    except BaseException as error:
        raised.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of texts short enough for SentencePiece, cut at line ends if possible."""
    for text in texts:
        refuse_surrogates(text)
        piece: list[str] = []
        size = 0
        for line in text.replace(SPACE_SYMBOL, " ").splitlines(keepends=True):
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
