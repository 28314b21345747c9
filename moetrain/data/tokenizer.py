"""The run's tokenizer: a SentencePiece model, given or trained on the corpus, or a given ``tokenizer.json``."""

from __future__ import annotations

import re
from pathlib import Path

from moetrain.config import TokenizerSettings, expand
from moetrain.data.errors import DataError
from moetrain.data.tokenizer_base import SAMPLE_TEXTS, Tokenizer, check_lossless
from moetrain.data.tokenizer_json import JsonTokenizer
from moetrain.data.tokenizer_sentencepiece import SentencePieceTokenizer, train_tokenizer

__all__ = [
    "SAMPLE_TEXTS",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_lossless",
    "given_tokenizer",
    "load_from_folder",
    "load_tokenizer",
    "tokenizer_file",
    "train_tokenizer",
]


TIKTOKEN_REMEDY = (
    "give the tokenizer.json of the same model, or convert it once with transformers and tiktoken: "
    "transformers.convert_slow_tokenizer.TikTokenConverter(FILE, PATTERN, extra_special_tokens=MARKS).converted()"
    ".save('tokenizer.json'), with PATTERN of tiktoken.Encoding, and MARKS its special tokens in the order of their "
    "ids, which have to follow the others without a gap"
)


def load_tokenizer(path: Path, begin_token: str | None = None, end_token: str | None = None) -> Tokenizer:
    """The tokenizer of a file: ``tokenizer.json``, with its marks named or found, or a SentencePiece model.

    Raises:
        OSError, RuntimeError: it cannot be read.
        ValueError: it has no marks, or cannot encode every text.
    """
    if path.suffix == ".json":
        return JsonTokenizer.read(path, begin_token, end_token)
    model = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", model):
        raise ValueError(f"it is a tiktoken vocabulary: {TIKTOKEN_REMEDY}")
    return SentencePieceTokenizer(model)


def given_tokenizer(chosen: TokenizerSettings) -> tuple[Tokenizer, Path]:
    """The tokenizer that ``tokenizer.model`` names, and its file.

    Raises:
        DataError: it cannot be read or used.
    """
    assert chosen.model is not None
    path = Path(expand(chosen.model, "tokenizer.model"))
    try:
        tokenizer = load_tokenizer(path, chosen.begin_token, chosen.end_token)
        check_lossless(tokenizer, chosen.lossy)
    except ValueError as error:
        raise DataError(f"tokenizer.model: {path} cannot be used: {error}") from None
    except (OSError, RuntimeError) as error:
        remedy = "give a SentencePiece .model or a tokenizer.json" + (" in it" if path.is_dir() else "")
        raise DataError(f"tokenizer.model: {path} cannot be used ({error}): {remedy}") from None
    return tokenizer, path


def load_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save_in` wrote into a folder.

    Raises:
        FileNotFoundError: the folder holds none.
        OSError, RuntimeError, ValueError: as `load_tokenizer`.
    """
    return load_tokenizer(tokenizer_file(folder))


def tokenizer_file(folder: Path) -> Path:
    """The file that `Tokenizer.save_in` writes into a folder, which need not be there."""
    path = folder / SentencePieceTokenizer.FILE
    return path if path.is_file() else folder / JsonTokenizer.FILE
