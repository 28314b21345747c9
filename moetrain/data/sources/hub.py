"""Data sets of the Hugging Face hub, or local folders of the same form, through `datasets`; no code of theirs is run.

`datasets` is imported only here, and only when a domain asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.config import DomainSettings, expand
from moetrain.data.errors import DataError
from moetrain.data.sources.parquet import check_columns
from moetrain.data.sources.rows import Row, Wanted


def local_folder(name: str, domain: DomainSettings, root: str) -> Path | None:
    """The folder that a domain's ``hub`` names; None where it is a name on the hub.

    Raises:
        DataError: it is written as a path, and there is no such folder.
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
    """The commit that the hub data set stands at, so that a change of it is seen.

    Raises:
        DataError: it cannot be reached.
    """
    import datasets

    with _named(name, domain):
        builder = datasets.load_dataset_builder(
            expand(domain.hub or "", f"data.domains.{name}.hub"), domain.hub_config, revision=domain.hub_revision
        )
        return str(builder.hash)


def read(name: str, domain: DomainSettings, root: str, start: int) -> Iterator[Row]:
    """Rows from number ``start`` (0 the first); their positions count no bytes.

    Raises:
        DataError: the data set cannot be loaded or read to its end, or has no such column.
    """
    import datasets

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


def _named(name: str, domain: DomainSettings) -> one_line:
    return one_line(f"data.domains.{name}.hub: {domain.hub}", "correct hub, hub_config, hub_revision or split")


class one_line:  # noqa: N801
    """Whatever `datasets` raises, as one line that begins with what cannot be read and ends with the remedy."""

    def __init__(self, start: str, remedy: str) -> None:
        self.start, self.remedy = start, remedy

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, DataError) or not isinstance(error, Exception):
            return
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        raise DataError(f"{self.start} cannot be read: {reason}{offline}: {self.remedy}") from None
