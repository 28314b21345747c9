"""Data sets of the Hugging Face hub, or local folders of the same form, read by `datasets`. Their code is not run.

`datasets` is imported only here, and only if a domain uses it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from moetrain.config import DomainSettings, expand
from moetrain.data.errors import DataError
from moetrain.data.sources import saved
from moetrain.data.sources.opening import broken, open_plain
from moetrain.data.sources.rows import Row, Wanted

_CHUNK = 2**22
_BY_PATH = "give the folder as path instead of hub, each file is then read by itself"


def local_folder(name: str, domain: DomainSettings, root: str) -> Path | None:
    """The folder that a domain's ``hub`` names; None if it is a name on the hub.

    Raises:
        DataError: it is a path, and there is no such folder.
    """
    assert domain.hub is not None
    key = f"data.domains.{name}.hub"
    path = Path(expand(root, "data.root"), expand(domain.hub, key))
    if path.is_dir():
        return path
    if domain.hub.startswith((".", "/", "~", "$")) or path.exists():
        raise DataError(f"{key}: no folder at {path}: correct the path, or data.root it starts from")
    return None


def revision(name: str, domain: DomainSettings, root: str) -> str:
    """A hash of the current version of the hub data set.

    Raises:
        DataError: the data set cannot be reached.
    """
    import datasets

    with _named(name, domain):
        builder = datasets.load_dataset_builder(
            expand(domain.hub or "", f"data.domains.{name}.hub"), domain.hub_config, revision=domain.hub_revision
        )
        return str(builder.hash)


def left_out(name: str, domain: DomainSettings, root: str) -> list[Path]:
    """What of a local folder is in no split, which `datasets` leaves out without a word; nothing on the hub.

    Raises:
        DataError: as `read`.
    """
    folder = local_folder(name, domain, root)
    if folder is None or saved.files_of_split(folder, domain.split) is not None:
        return []
    import datasets

    with _named(name, domain, folder):
        builder = datasets.load_dataset_builder(str(folder), domain.hub_config)
    read = {Path(path).resolve() for files in (builder.config.data_files or {}).values() for path in files}
    card = ("README.md", *saved.PAPERS)

    def is_left_out(path: Path) -> bool:
        inside = path.relative_to(folder)
        if inside.as_posix() in card or any(part.startswith(".") for part in inside.parts):
            return False
        if path.is_dir():  # datasets does not follow links to folders
            return path.is_symlink() and not any(file.is_relative_to(path.resolve()) for file in read)
        return path.resolve() not in read

    return [path for path in sorted(folder.rglob("*")) if is_left_out(path)]


def read(name: str, domain: DomainSettings, root: str, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first); ``position`` is always 0.

    Raises:
        DataError: the data set cannot be loaded or read to its end, or lacks a column.
    """
    wanted = Wanted.of(domain.text_field, domain.filter, domain.by, domain.value)
    folder = local_folder(name, domain, root)
    files = saved.files_of_split(folder, domain.split) if folder is not None else None
    yield from _loaded(name, domain, folder, wanted, start) if files is None else _saved(files, wanted, start)


def _saved(files: list[Path], wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows of the Arrow files that save_to_disk wrote, counted over all of them."""
    from moetrain.data.sources import arrow  # importing pyarrow is slow

    before = 0
    for path in files:
        count = 0
        for row in arrow.read(path, wanted, 0):
            count = row.number
            if before + count > start:
                yield row._replace(number=before + count, position=0)
        before += count


def _loaded(name: str, domain: DomainSettings, folder: Path | None, wanted: Wanted, start: int) -> Iterator[Row]:
    """Rows that `datasets` reads."""
    import datasets

    from moetrain.data.sources import tabular  # importing pyarrow is slow

    shown = f"{domain.hub} ({domain.split})"
    if folder is not None:
        _check_zstd(folder)
    with _named(name, domain, folder):
        rows: Any = datasets.load_dataset(
            str(folder) if folder else domain.hub,
            domain.hub_config,
            split=domain.split,
            revision=domain.hub_revision,
            streaming=domain.streaming,
        )
        if rows.features is not None:
            _check_type(f"data.domains.{name}: {shown}", rows.features, wanted, folder)
            columns = tabular.fetched(f"data.domains.{name}: {shown}", rows.features.arrow_schema, wanted)
            roots = [column if column in rows.features else column.partition(".")[0] for column in columns]
            rows = rows.select_columns(list(dict.fromkeys(roots)))
        iterator = iter(rows.skip(start) if start else rows)
    number = start
    while True:
        with _named(name, domain, folder):
            record = next(iterator, None)
        if record is None:
            return
        number += 1
        yield wanted.pick(record, f"{shown}, row {number}", number, 0)


def _check_type(place: str, features: Any, wanted: Wanted, folder: Path | None) -> None:
    """Raise DataError if `datasets` takes the text for something else, which changes it: dates, numbers, any JSON."""
    feature = features.get(wanted.text_field)
    kind = getattr(feature, "dtype", "")
    if type(feature).__name__ == "Json" or str(kind).startswith(("timestamp", "date", "time")):
        remedy = _BY_PATH if folder is not None else "download the data set and give its folder as path"
        raise DataError(f"{place}: datasets reads column {wanted.text_field!r} as {feature}, not as text: {remedy}")


def _check_zstd(folder: Path) -> None:
    """Raise DataError if a .zst file is truncated, which zstandard, through which `datasets` reads it, does not say."""
    for path in sorted(folder.rglob("*.zst")):
        try:
            with open_plain(path) as (file, _):
                while file.read(_CHUNK):
                    pass
        except broken as error:
            raise DataError(f"{path}: the file ends or breaks before its end ({error}): fetch it again") from None


def _named(name: str, domain: DomainSettings, folder: Path | None = None) -> AbstractContextManager[None]:
    remedy = "correct hub, hub_config, hub_revision or split"
    return one_line(f"data.domains.{name}.hub: {domain.hub}", remedy, folder is not None)


@contextmanager
def one_line(place: str, remedy: str, local: bool = False) -> Iterator[None]:
    """Raise a DataError of one line in place of whatever `datasets` raises; ``local``: of a folder, not of the hub."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        if "zstd" in reason and importlib.util.find_spec("zstandard") is None:
            raise DataError(
                f"{place} is compressed by zstd, for which datasets needs a package: pip install 'moetrain[zstd]'"
                + (f", or {_BY_PATH}" if local else "")
            ) from None
        if local and type(error).__name__ in ("DatasetGenerationError", "DatasetGenerationCastError", "CastError"):
            remedy = _BY_PATH
        raise DataError(f"{place} cannot be read: {reason}{offline}: {remedy}") from None
