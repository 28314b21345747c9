"""Tasks: the benchmark items that a run is probed with, from files, the hub and the built-in domains.

A run chooses its items once: every reading asks the same items in the same order.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from moetrain.atomic_io import write_file
from moetrain.config import Settings, expand
from moetrain.data import builtin
from moetrain.data.contamination import ContaminationReport, TaskCount, all_documents, clean, contaminated
from moetrain.data.corpus import Corpus, Progress
from moetrain.data.documents import BUILTIN_SIZE, Document
from moetrain.data.errors import DataError
from moetrain.data.items import Item, read_all_items, right_answer
from moetrain.data.sources.files import named_files
from moetrain.probes.hub import HUB_TASKS, PREFIX, HubEntry, read_hub_items

ENOUGH = 100
"""Tasks with fewer items are marked "too few"."""

Kind = Literal["choice", "open", "likelihood"]
"""choice: among given answers. open: a short answer. likelihood: a text too long to be generated, such as a program."""

_FORMAT = 1  # of a cached contamination report
_SHORT_ANSWER = 64  # characters: largest median length of an open answer


@dataclass(frozen=True)
class Task:
    """A benchmark with the items that the run asks."""

    name: str  # part of its tags
    domain: str  # a domain of the run if it has one of that name, otherwise the one that the items give
    kind: Kind
    items: tuple[Item, ...]
    trained: bool = False  # whether it asks for facts that the training text states
    available: int = 0  # items that exist
    contaminated: int = 0  # of these, found in training text; excluded unless probes.contaminated=keep

    @property
    def chance(self) -> float:
        """Accuracy without knowledge: of a uniform choice, or of always giving the most frequent open answer."""
        if self.kind == "choice":
            return sum(1 / len(item["choices"]) for item in self.items) / len(self.items)
        return max(Counter(map(right_answer, self.items)).values()) / len(self.items)

    @property
    def too_few(self) -> bool:
        """Whether there are too few items for a meaningful curve."""
        return len(self.items) < ENOUGH


@dataclass(frozen=True)
class Tasks:
    """All tasks of a run, and which items occur in its training text."""

    tasks: list[Task]
    contamination: ContaminationReport


def load_tasks(settings: Settings, corpus: Corpus, progress: Progress = lambda what, done, total: None) -> Tasks:
    """The tasks of a run: those of ``probes.tasks``, then those of its built-in domains.

    Items are chosen by a hash of the seed and their ids, so the order of files and lines does not matter. A task whose
    items all occur in training text is excluded; the report names it.

    Raises:
        DataError: a file, hub task or item that cannot be used.
        SettingsError: a path with an unset environment variable.
    """
    from_entries = _by_task(read_task_items(settings))
    from_domains = builtin_tasks(settings, corpus) if settings.probes.builtin else {}
    if double := sorted(from_entries.keys() & from_domains.keys()):
        raise DataError(f"probes.tasks: a built-in domain has a task {double[0]} too: rename one of them")
    _check_task_domains(settings, [*from_entries, *from_domains])
    # Held-out facts of a generator occur in no training text. Quotations from held-out files may occur in other files.
    may_occur = [*from_entries.values(), *(task.items for task in from_domains.values() if task.quoted)]
    report = _contamination(settings, corpus, [item for items in may_occur for item in items], progress)
    tasks = []
    for name, items in (from_entries | {name: task.items for name, task in from_domains.items()}).items():
        trained = name in from_domains and from_domains[name].trained
        kept = items if settings.probes.contaminated == "keep" else clean(items, report)
        if name in from_entries:
            kept = _shuffled(kept, settings.run.seed)
        if kept:
            task = Task(
                name=name,
                domain=settings.probes.task_domains.get(name) or _domain(name, items),
                kind=_kind(name, items),
                items=tuple(kept[: settings.probes.most_trained if trained else settings.probes.items]),
                trained=trained,
                available=len(items),
                contaminated=report.tasks.get(name, TaskCount()).contaminated,
            )
            tasks.append(task)
    return Tasks(tasks, report)


def tasks_of(items: Iterable[Item], limit: int | None = None, seed: int = 0) -> list[Task]:
    """The tasks that items belong to, with at most ``limit`` items each; without a run and its contamination check."""
    tasks = []
    for name, members in _by_task(items).items():
        chosen = _shuffled(members, seed)[:limit] if limit else members
        tasks.append(Task(name, _domain(name, members), _kind(name, members), tuple(chosen), available=len(members)))
    return tasks


def check_tasks(settings: Settings) -> None:
    """Check that the files of ``probes.tasks`` exist and its hub tasks are known, without reading them.

    Raises:
        DataError, SettingsError: as `read_entries`.
    """
    start = expand(settings.data.root, "data.root")
    for entry in settings.probes.tasks:
        if entry.startswith(PREFIX):
            HubEntry.parse(entry, "probes.tasks")
        else:
            _files(entry, start, "probes.tasks")


def read_task_items(settings: Settings) -> list[Item]:
    """All items of ``probes.tasks``. Raises as `read_entries`."""
    return read_entries(settings.probes.tasks, settings.data.root, "probes.tasks")


def read_entries(entries: Sequence[str], root: str, key: str) -> list[Item]:
    """The items of entries: files or patterns of files, or ``hub:NAME`` (see `moetrain.probes.hub`).

    Args:
        root: the folder that relative paths start from.
        key: the setting or argument that holds the entries, for messages.

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
        else:
            paths += _files(entry, start, key)
    items = read_all_items(paths) + items
    for (task, name), count in Counter((item["task"], item["id"]) for item in items).items():
        if count > 1:
            raise DataError(f"{key}: item {name!r} of {task} is given twice: leave one of the entries out")
    return items


def _files(entry: str, start: str, key: str) -> list[Path]:
    pattern = os.path.join(start, expand(entry, key))
    if entry in HUB_TASKS and not os.path.exists(pattern):
        raise DataError(f"{key}: no file at {pattern}: correct the path, or write {PREFIX}{entry} for the hub's")
    return named_files(pattern, key)


@dataclass
class BuiltinTask:
    """A task of a built-in domain: its items in a seeded order."""

    trained: bool  # whether it asks for facts that the training text states
    quoted: bool  # whether its items quote held-out text, which other text may repeat
    items: list[Item] = field(default_factory=list)


def builtin_tasks(settings: Settings, corpus: Corpus) -> dict[str, BuiltinTask]:
    """The tasks of the run's built-in domains, by name, named after the domains of the run.

    Tasks of built-in code quote held-out documents of the corpus. A domain with shuffled tokens states nothing and has
    no tasks.
    """
    tasks: dict[str, BuiltinTask] = {}
    for name, domain in settings.data.domains.items():
        if domain.builtin is None or domain.shuffled:
            continue
        for trained, items in _builtin_items(name, settings, corpus):
            for item in items:
                task_name = item["task"].replace(f"builtin_{domain.builtin}", f"builtin_{name}", 1)
                task = tasks.setdefault(task_name, BuiltinTask(trained, quoted=domain.builtin == "code"))
                task.items.append({**item, "domain": name, "task": task_name})
    return tasks


def _builtin_items(name: str, settings: Settings, corpus: Corpus) -> Iterator[tuple[bool, Iterable[Item]]]:
    """Whether they ask for trained facts, and the items of a domain: as many as its tasks may need."""
    domain, probes, seed = settings.data.domains[name], settings.probes, settings.run.seed
    kind = domain.builtin
    assert kind is not None
    options = domain.facts.given() if domain.facts is not None else {}
    held_out = _held_out(name, corpus)
    # Twice as many: multiple choice and open answers alternate, each kind a task of its own.
    yield False, builtin.probe_items(kind, items=2 * probes.items, seed=seed, held_out=held_out, **options)
    if kind in builtin.PLANTED:
        stated = sum(1 for _ in builtin.documents(kind, size=domain.size or BUILTIN_SIZE, seed=seed, **options))
        wanted = 2 * min(probes.most_trained, stated, domain.limit or stated)
        yield True, builtin.trained_items(kind, items=wanted, seed=seed, **options)


def _held_out(name: str, corpus: Corpus) -> Iterator[str]:
    """The held-out texts of a domain."""
    domain = next(domain for domain in corpus.domains if domain.name == name)
    for row in domain.index[domain.index["heldout"]]:
        yield corpus.tokenizer.decode(domain.tokens[row["start"] : row["start"] + row["length"]].tolist())


def _by_task(items: Iterable[Item]) -> dict[str, list[Item]]:
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)
    return by_task


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """A task's items in an order that depends on seed, task and ids alone."""

    def key(item: Item) -> bytes:
        return hashlib.blake2b(json.dumps([seed, item["task"], item["id"]]).encode(), digest_size=8).digest()

    return sorted(items, key=key)


def _kind(name: str, items: Sequence[Item]) -> Kind:
    form = _common(name, "form", {"choices" if "choices" in item else "target" for item in items})
    if form == "choices":
        return "choice"
    return "open" if median(len(item["target"]) for item in items) <= _SHORT_ANSWER else "likelihood"


def _domain(name: str, items: Sequence[Item]) -> str:
    return _common(name, "domain", {item["domain"] for item in items})


def _common(name: str, what: str, found: set[str]) -> str:
    if len(found) > 1:
        raise DataError(
            f"probes.tasks: items of {name} differ in {what} ({', '.join(sorted(found))}): give them different tasks"
        )
    return next(iter(found))


def _check_task_domains(settings: Settings, tasks: Sequence[str]) -> None:
    """Raise DataError where ``probes.task_domains`` names an unknown task or domain."""
    for task, domain in settings.probes.task_domains.items():
        for what, name, known in (("task", task, tasks), ("domain", domain, list(settings.data.domains))):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ": there is none"
                raise DataError(f"probes.task_domains: no {what} {name!r}{hint}")


def _contamination(
    settings: Settings, corpus: Corpus, items: Sequence[Item], progress: Progress
) -> ContaminationReport:
    """Which items occur in the training text; cached with the corpus, because it reads all of the text."""
    if not items:
        return ContaminationReport()
    content = json.dumps([_FORMAT, corpus.fingerprint, items], sort_keys=True)
    key = hashlib.blake2b(content.encode(), digest_size=10).hexdigest()
    path = Path(expand(settings.data.cache_dir, "data.cache_dir")) / f"contamination-{key}.json"
    try:
        return ContaminationReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cached report, or a partial file
    documents = sum(domain.report.documents for domain in corpus.domains)
    report = contaminated(items, _with_progress(all_documents(settings), documents, progress))
    with contextlib.suppress(OSError):  # a read-only cache: the next run reads the text again
        write_file(path, json.dumps(report.as_dict()))
    return report


def _with_progress(documents: Iterable[Document], total: int, progress: Progress) -> Iterator[Document]:
    """The documents; reports progress every 1000."""
    for number, document in enumerate(documents):
        if number % 1000 == 0:
            progress("looking for probe items in the training text", number, total)
        yield document
    progress("looking for probe items in the training text", total, total)
