"""Where the items of a run's tasks come from: files, the hub, and the built-in domains."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config import Settings, expand
from moetrain.data import builtin
from moetrain.data.corpus import Corpus
from moetrain.data.documents import BUILTIN_SIZE
from moetrain.data.errors import DataError
from moetrain.data.items import Item, read_all_items
from moetrain.data.sources.files import named_files
from moetrain.probes.hub import PREFIX, hub_task, read_hub_items
from moetrain.probes.hub_tasks import HUB_TASKS


def check_tasks(settings: Settings) -> None:
    """Whether ``probes.tasks`` names files that are there and hub tasks that are known; none is read.

    Raises:
        DataError, SettingsError: as `read_entries`.
    """
    start = expand(settings.data.root, "data.root")
    for entry in settings.probes.tasks:
        if entry.startswith(PREFIX):
            hub_task(entry, "probes.tasks")
        else:
            _files(entry, start, "probes.tasks")


def read_task_items(settings: Settings) -> list[Item]:
    """The items that ``probes.tasks`` names, all of them; raises as `read_entries`."""
    return read_entries(settings.probes.tasks, settings.data.root, "probes.tasks")


def read_entries(entries: Sequence[str], root: str, key: str) -> list[Item]:
    """The items of entries: files or patterns, or ``hub:NAME``; see `moetrain.probes.hub`.

    Args:
        root: the folder that relative paths start from.
        key: what the entries were given as, for messages.

    Raises:
        DataError: a path or pattern without files, an unknown hub task, or an item that cannot be used.
        SettingsError: an environment variable that is not set.
    """
    start = expand(root, "data.root")
    paths: list[Path] = []
    items: list[Item] = []
    for entry in dict.fromkeys(entries):
        if entry.startswith(PREFIX):
            items += read_hub_items(entry, root, key)
            continue
        paths += _files(entry, start, key)
    items = read_all_items(paths) + items
    double = [key for key, count in Counter((item["task"], item["id"]) for item in items).items() if count > 1]
    if double:
        raise DataError(f"{key}: item {double[0][1]!r} of {double[0][0]} is given twice: leave one of the entries out")
    return items


def _files(entry: str, start: str, key: str) -> list[Path]:
    pattern = os.path.join(start, expand(entry, key))
    if entry in HUB_TASKS and not os.path.exists(pattern):
        raise DataError(f"{key}: no file at {pattern}: correct the path, or write {PREFIX}{entry} for the hub's")
    return named_files(pattern, key)


@dataclass
class BuiltinTask:
    """A task that a built-in domain brings: its items in a seeded order."""

    trained: bool  # whether it asks for what the training text states
    quoted: bool  # whether its items are cut from held-out text, which other text may repeat
    items: list[Item] = field(default_factory=list)


def builtin_items(settings: Settings, corpus: Corpus) -> dict[str, BuiltinTask]:
    """The tasks that the run's built-in domains bring, by name, under the run's own names of the domains.

    Built-in code asks for functions of its held-out documents, taken from the corpus. A domain whose tokens are
    shuffled states nothing, and brings none.
    """
    tasks: dict[str, BuiltinTask] = {}
    for name, domain in settings.data.domains.items():
        if domain.builtin is None or domain.shuffled:
            continue
        for trained, item in _items_of(name, settings, corpus):
            task = item["task"].replace(f"builtin_{domain.builtin}", f"builtin_{name}", 1)
            found = tasks.setdefault(task, BuiltinTask(trained, quoted=domain.builtin == "code"))
            found.items.append({**item, "domain": name, "task": task})
    return tasks


def _items_of(name: str, settings: Settings, corpus: Corpus) -> Iterator[tuple[bool, Item]]:
    """A domain's items, each with whether it asks for a trained fact, as many as its tasks may need."""
    domain, probes = settings.data.domains[name], settings.probes
    kind, seed = domain.builtin, settings.run.seed
    assert kind is not None
    options = domain.facts.given() if domain.facts is not None else {}
    # Choices and open answers come by turns, each a task of its own.
    for item in builtin.probe_items(
        kind, items=2 * probes.items, seed=seed, held_out=_held_out(name, corpus), **options
    ):
        yield False, item
    if kind in builtin.PLANTED:
        stated = sum(1 for _ in builtin.documents(kind, size=domain.size or BUILTIN_SIZE, seed=seed, **options))
        wanted = 2 * min(probes.most_trained, stated, domain.limit or stated)
        for item in builtin.trained_items(kind, items=wanted, seed=seed, **options):
            yield True, item


def _held_out(name: str, corpus: Corpus) -> Iterator[str]:
    """The held-out texts of a domain."""
    domain = next(domain for domain in corpus.domains if domain.name == name)
    for row in domain.index[domain.index["heldout"]]:
        yield corpus.tokenizer.decode(domain.tokens[row["start"] : row["start"] + row["length"]].tolist())
