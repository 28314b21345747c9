"""Tasks: frozen choices of benchmark items, the same ones in the same order all through a run."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from moetrain.atomic_io import write_file
from moetrain.config import Settings, expand
from moetrain.data.contamination import ContaminationReport, TaskCount, all_documents, clean, contaminated
from moetrain.data.corpus import Corpus, Progress
from moetrain.data.documents import Document
from moetrain.data.errors import DataError
from moetrain.data.items import Item, right_answer
from moetrain.probes.items import builtin_items, read_task_items

ENOUGH = 100
"""Items below which a task's curves carry "too few"."""

Kind = Literal["choice", "open", "likelihood"]
"""choice: among given answers. open: a short answer. likelihood: a text too long to be hit, such as a program."""

_FORMAT = 1  # of a kept contamination report
_SHORT_ANSWER = 64  # characters: the longest median of what counts as an open answer


@dataclass(frozen=True)
class Task:
    """A benchmark as a run reads it."""

    name: str  # part of its tags
    domain: str  # one of the run's where it has it, else what the items say
    kind: Kind
    items: tuple[Item, ...]
    trained: bool = False  # whether it asks for what the training text states
    available: int = 0  # items that there are
    contaminated: int = 0  # of these, found in training text; left out unless probes.contaminated=keep

    @property
    def chance(self) -> float:
        """Accuracy without knowledge: of any choice, or of the open answer that most items have."""
        if self.kind == "choice":
            return sum(1 / len(item["choices"]) for item in self.items) / len(self.items)
        return max(Counter(map(right_answer, self.items)).values()) / len(self.items)

    @property
    def too_few(self) -> bool:
        return len(self.items) < ENOUGH


@dataclass(frozen=True)
class Tasks:
    """All tasks of a run, and which of the items that were looked for stand in its training text."""

    tasks: list[Task]
    contamination: ContaminationReport


def load_tasks(settings: Settings, corpus: Corpus, progress: Progress = lambda what, done, total: None) -> Tasks:
    """The tasks of a run: those of ``probes.tasks``, then those of its built-in domains.

    Items are chosen by a hash of the seed and their ids, so neither the order of files nor that of lines matters. A
    task is left out where all its items stand in training text; the report then says so.

    Raises:
        DataError: a file, hub task or item that cannot be used.
        SettingsError: a path with an unset environment variable.
    """
    given = _by_task(read_task_items(settings))
    own = builtin_items(settings, corpus) if settings.probes.builtin else {}
    if double := sorted(given.keys() & own.keys()):
        raise DataError(f"probes.tasks: a built-in domain brings a task {double[0]} too: rename one of them")
    _check_domains(settings, [*given, *own])
    # What a generator holds out stands in no text by its making; what is cut from a held-out file may be elsewhere too.
    looked_for = [*given.values(), *(task.items for task in own.values() if task.quoted)]
    report = _contamination(settings, corpus, [item for items in looked_for for item in items], progress)
    tasks = []
    for name, items in (given | {name: task.items for name, task in own.items()}).items():
        trained = name in own and own[name].trained
        kept = items if settings.probes.contaminated == "keep" else clean(items, report)
        if name in given:
            kept = sorted(kept, key=lambda item: _draw(settings.run.seed, item))
        if kept:
            task = Task(
                name=name,
                domain=settings.probes.task_domains.get(name) or _one_domain(name, items),
                kind=_kind(name, items),
                items=tuple(kept[: settings.probes.most_trained if trained else settings.probes.items]),
                trained=trained,
                available=len(items),
                contaminated=report.tasks.get(name, TaskCount()).contaminated,
            )
            tasks.append(task)
    return Tasks(tasks, report)


def tasks_of(items: Iterable[Item], limit: int | None = None, seed: int = 0) -> list[Task]:
    """The tasks that items belong to, each with at most ``limit`` of them, without a run: nothing is looked for."""
    tasks = []
    for name, members in _by_task(items).items():
        chosen = sorted(members, key=lambda item: _draw(seed, item))[:limit] if limit else members
        tasks.append(
            Task(name, _one_domain(name, members), _kind(name, members), tuple(chosen), available=len(members))
        )
    return tasks


def _by_task(items: Iterable[Item]) -> dict[str, list[Item]]:
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)
    return by_task


def _draw(seed: int, item: Item) -> bytes:
    """What orders a task's items: as good as random, and a function of seed, task and id alone."""
    return hashlib.blake2b(json.dumps([seed, item["task"], item["id"]]).encode(), digest_size=8).digest()


def _kind(name: str, items: Sequence[Item]) -> Kind:
    form = _one(name, "form", {"choices" if "choices" in item else "target" for item in items})
    if form == "choices":
        return "choice"
    return "open" if median(len(item["target"]) for item in items) <= _SHORT_ANSWER else "likelihood"


def _one_domain(name: str, items: Sequence[Item]) -> str:
    return _one(name, "domain", {item["domain"] for item in items})


def _one(name: str, what: str, found: set[str]) -> str:
    if len(found) > 1:
        raise DataError(
            f"probes.tasks: items of {name} differ in {what} ({', '.join(sorted(found))}): give them different tasks"
        )
    return next(iter(found))


def _check_domains(settings: Settings, tasks: Sequence[str]) -> None:
    """Raise DataError where ``probes.task_domains`` names a task or a domain that there is not."""
    for task, domain in settings.probes.task_domains.items():
        for what, name, known in (("task", task, tasks), ("domain", domain, list(settings.data.domains))):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ": there is none"
                raise DataError(f"probes.task_domains: no {what} {name!r}{hint}")


def _contamination(
    settings: Settings, corpus: Corpus, items: Sequence[Item], progress: Progress
) -> ContaminationReport:
    """Which items stand in the training text; kept beside the corpus, so that the next run need not read it all."""
    if not items:
        return ContaminationReport()
    content = json.dumps([_FORMAT, corpus.fingerprint, items], sort_keys=True)
    key = hashlib.blake2b(content.encode(), digest_size=10).hexdigest()
    path = Path(expand(settings.data.cache_dir, "data.cache_dir")) / f"contamination-{key}.json"
    try:
        return ContaminationReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not looked for yet, or not written to its end
    documents = sum(domain.report.documents for domain in corpus.domains)
    told = _told(all_documents(settings), documents, progress)
    report = contaminated(items, told)
    with contextlib.suppress(OSError):  # a cache that can only be read: the text is read again next time
        write_file(path, json.dumps(report.as_dict()))
    return report


def _told(documents: Iterable[Document], total: int, progress: Progress) -> Iterator[Document]:
    """The documents, with word of how many have been read now and then."""
    for number, document in enumerate(documents):
        if number % 1000 == 0:
            progress("looking for probe items in the training text", number, total)
        yield document
    progress("looking for probe items in the training text", total, total)
