"""JSON that describes token files, checked against a model of its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from moetrain.data.errors import DataError

_Model = TypeVar("_Model", bound=BaseModel)


class FileEntry(BaseModel):
    """A file that the index of an MDS folder names, and its size."""

    basename: str
    bytes: int | None = None


class ShardEntry(BaseModel):
    """A shard of an MDS folder: its plain file, its compressed one, or both."""

    raw_data: FileEntry | None = None
    zip_data: FileEntry | None = None


class MdsIndex(BaseModel):
    """``index.json`` of an MDS folder."""

    version: int
    shards: list[ShardEntry]


class Columns(BaseModel):
    """The columns of an MDS shard, as it holds them itself; sizes are None where they differ between samples."""

    version: int
    format: str
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]

    @model_validator(mode="after")
    def _as_many(self) -> Columns:
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        if any(size is not None and size < 0 for size in self.column_sizes):
            raise ValueError("a size in column_sizes is negative")
        return self


class ChunkEntry(BaseModel):
    """A chunk of a litdata folder: its items, and ids if it holds nothing else."""

    filename: str
    chunk_size: int
    dim: int | None = None


class ChunkConfig(BaseModel):
    """How the items of a litdata folder are written."""

    data_format: list[str] = []
    data_spec: Any = None
    item_loader: str | None = None
    compression_level: str | None = None
    encryption: Any = None


class ChunkIndex(BaseModel):
    """``index.json`` of a litdata folder."""

    chunks: list[ChunkEntry]
    config: ChunkConfig = ChunkConfig()


def parse(model: type[_Model], content: bytes, path: Path) -> _Model:
    """The description that JSON holds.

    Raises:
        DataError: it is no JSON, or lacks or confuses fields.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: its description {where or 'as a whole'}: {first['msg']}: fetch it again") from None
