"""Folders that ``datasets.save_to_disk`` writes: Arrow files, with their order in ``state.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moetrain.data.errors import DataError

PAPERS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files beside the data that describe it."""


def data_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a saved data set, in the order of its rows; None if the folder is not one.

    Raises:
        DataError: a file is missing, or the rows are chosen by indices that older versions of datasets wrote.
    """
    state = _tree(folder / "state.json")
    names = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(names, list):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: its rows are chosen by indices in another file: load it with datasets.load_from_disk and save "
            "it again with to_parquet"
        )
    files = [folder / str(entry.get("filename")) for entry in names if isinstance(entry, dict)]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: is missing, although state.json beside it names it: fetch it again")
    return files


def splits(folder: Path) -> list[str] | None:
    """The splits of a saved ``DatasetDict``, each a folder below; None if the folder is not one."""
    tree = _tree(folder / "dataset_dict.json")
    names = tree.get("splits") if isinstance(tree, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else None


def files_of_split(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a split; None if the folder is not one that save_to_disk wrote.

    Raises:
        DataError: there is no such split, or as `data_files`.
    """
    names = splits(folder)
    if names is None:
        files = data_files(folder)
        own = None if files is None else _tree(folder / "state.json").get("_split") or "train"
        if own not in (None, split):
            raise DataError(f"{folder}: holds the split {own} alone: set split to it")
        return files
    files = data_files(folder / split) if split in names else None
    if files is None:
        raise DataError(f"{folder}: no split {split!r} (splits: {', '.join(names)}): set split to one of them")
    return files


def _tree(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
