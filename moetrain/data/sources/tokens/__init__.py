"""Files that hold token ids already: Megatron's, OLMo's, MosaicML's (MDS) and litdata's, read as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moetrain.config import DomainSettings
from moetrain.data.errors import DataError, cannot_read
from moetrain.data.sources.rows import Row, Wanted
from moetrain.data.sources.tokens import litdata, mds, megatron, raw
from moetrain.data.sources.tokens.documents import split_documents
from moetrain.data.sources.tokens.files import token_format
from moetrain.data.tokenizer_base import Tokenizer


def read_tokens(path: Path, domain: DomainSettings, tokenizer: Tokenizer, start: int = 0) -> Iterator[Row]:
    """Documents of a token file from number ``start``, each with its ids without marks.

    Args:
        tokenizer: the one that made the ids.

    Raises:
        DataError: the file cannot be read to its end, its index disagrees with its data, ids are outside of the
            vocabulary, or no end mark is found where only marks end documents.
    """
    wanted = Wanted.of(domain.column or "", domain.filter, domain.by, domain.value)
    concatenated = domain.concatenated
    try:
        match token_format(path, domain.format):
            case "megatron":
                records = megatron.read(path, _without_fields(wanted, path, "Megatron"))
            case "mds":
                records = mds.read(path, wanted, domain.dtype, tokenizer.vocab_size)
            case "litdata":
                records = litdata.read(path, wanted)
            case "olmo":
                records = raw.read(path, _without_fields(wanted, path, "raw"), domain.dtype, tokenizer.vocab_size)
                concatenated = True
            case None:
                raise DataError(f"{path}: no token file: give .bin with .idx, .npy, MDS or litdata, or set format")
        yield from split_documents(records, path, tokenizer, concatenated, start)
    except OSError as error:
        raise cannot_read(path, error) from None


def _without_fields(wanted: Wanted, path: Path, kind: str) -> Wanted:
    """The same, for files whose records have no field but the ids."""
    others = [column for column in wanted.columns if column != wanted.text_field]
    if others or wanted.text_field:
        name = (others or [wanted.text_field])[0]
        raise DataError(f"{path}: a {kind} token file has no column {name!r}, but ids alone: remove column, filter, by")
    return replace(wanted, text_field="ids")
