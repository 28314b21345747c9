"""Data sets of the Hugging Face hub, or local folders of the same form, read by `datasets`. Their code is not run.

`datasets` is imported only here, and only if a domain uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from moetrain.config import DomainSettings, expand
from moetrain.data.errors import DataError
from moetrain.data.sources.rows import Row, Wanted


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


def read(name: str, domain: DomainSettings, root: str, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first); ``position`` is always 0.

    Raises:
        DataError: the data set cannot be loaded or read to its end, or lacks a column.
    """
    import datasets

    from moetrain.data.sources.parquet import check_columns  # importing pyarrow is slow

    wanted = Wanted.of(domain.text_field, domain.filter)
    folder = local_folder(name, domain, root)
    shown = f"{domain.hub} ({domain.split})"
    with _named(name, domain):
        rows: Any = datasets.load_dataset(
            str(folder) if folder else domain.hub,
            domain.hub_config,
            split=domain.split,
            revision=domain.hub_revision,
            streaming=domain.streaming,
        )
        if rows.features is not None:
            check_columns(f"data.domains.{name}: {shown}", rows.features.arrow_schema, wanted)
            rows = rows.select_columns(wanted.columns)
        iterator = iter(rows.skip(start) if start else rows)
    number = start
    while True:
        with _named(name, domain):
            record = next(iterator, None)
        if record is None:
            return
        number += 1
        yield wanted.pick(record, f"{shown}, row {number}", number, 0)


def _named(name: str, domain: DomainSettings) -> AbstractContextManager[None]:
    return one_line(f"data.domains.{name}.hub: {domain.hub}", "correct hub, hub_config, hub_revision or split")


@contextmanager
def one_line(place: str, remedy: str) -> Iterator[None]:
    """Raise a DataError of one line in place of whatever `datasets` raises."""
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
        raise DataError(f"{place} cannot be read: {reason}{offline}: {remedy}") from None
