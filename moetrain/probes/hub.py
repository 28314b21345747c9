"""Items of benchmarks on the Hugging Face hub, or of local copies, through `datasets`; no code of theirs is run.

`datasets` is imported only here, and only when a task asks for it.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from moetrain.config import expand
from moetrain.data.errors import DataError
from moetrain.data.items import Item, check_item
from moetrain.data.sources.files import kind_of
from moetrain.data.sources.hub import one_line
from moetrain.probes.hub_tasks import HUB_TASKS, HubTask

PREFIX = "hub:"

_MOST_BAD = 0.01


def hub_task(entry: str, key: str) -> tuple[str, HubTask, str]:
    """(name, task, path of a local copy or nothing) of an entry ``hub:NAME`` or ``hub:NAME=PATH``.

    Raises:
        DataError: an unknown name.
    """
    name, _, local = entry.removeprefix(PREFIX).partition("=")
    if name not in HUB_TASKS:
        nearest = difflib.get_close_matches(name, HUB_TASKS, n=1, cutoff=0.0)[0]
        known = ", ".join(HUB_TASKS)
        raise DataError(f"{key}: no hub task {name!r}: did you mean {PREFIX}{nearest}? There are {known}")
    return name, HUB_TASKS[name], local


def read_hub_items(entry: str, root: str, key: str) -> list[Item]:
    """The items of an entry ``hub:NAME``, from the hub, or ``hub:NAME=PATH``, from a local copy of it.

    One row in a hundred may be of no use (an empty choice, say) and is passed over: nobody here can mend it.

    Args:
        root: the folder that a relative path starts from.
        key: the setting that the entry stands in, for messages.

    Raises:
        DataError: an unknown name, a data set that cannot be loaded, or rows of another form.
        SettingsError: an environment variable that is not set.
    """
    name, task, local = hub_task(entry, key)
    place = f"{key}: {PREFIX}{name} ({local or f'{task.path}, {task.split}'})"
    with one_line(place, f"correct the entry, or give a local copy as {PREFIX}{name}=PATH"):
        rows = _rows(task, Path(expand(root, "data.root"), expand(local, key)) if local else None, place)
    items: list[Item] = []
    errors: list[DataError] = []
    for number, row in enumerate(rows):
        try:
            item = _item(name, number, row, f"{place}, row {number}")
        except DataError as error:
            errors.append(error)
        else:
            items += [item] if item is not None else []
    if len(errors) > _MOST_BAD * len(rows):
        raise errors[0]
    if not items:
        raise DataError(f"{place} has no rows of this task: give another copy")
    return items


def _rows(task: HubTask, local: Path | None, place: str) -> Any:
    """The rows of the task's split; a local file is all of them, a folder is read as a data set of the hub is."""
    import datasets

    if local is None:
        return datasets.load_dataset(task.path, task.config, split=task.split)
    if local.is_dir():
        config = task.config if task.config in datasets.get_dataset_config_names(str(local)) else None
        return datasets.load_dataset(str(local), config, split=task.split)
    if not local.is_file():
        raise DataError(f"{place}: no file or folder at {local}: correct the path, or data.root it starts from")
    kind = {"jsonl": "json", "parquet": "parquet"}.get(kind_of(local) or "")
    if kind is None:
        raise DataError(f"{place}: {local} is neither .jsonl, .json nor .parquet: convert it")
    return datasets.load_dataset(kind, data_files=str(local), split="train")


def _item(name: str, number: int, row: dict[str, Any], place: str) -> Item | None:
    """A row as an item; None where it is not part of the task."""
    task = HUB_TASKS[name]
    try:
        made = task.convert(row)
    except KeyError as error:
        raise DataError(f"{place}: no column {error} (there are {', '.join(row)}): give a copy that has it") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{place}: of another form than {task.path} ({error}): give a copy of the same form") from None
    if made is None:
        return None
    return check_item({"domain": task.domain, "task": name, "id": f"{name}-{number}", "sep": " "} | made, place)
