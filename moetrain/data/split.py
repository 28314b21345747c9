"""Domains that are made of one source: one for each value of the field that ``data.domains.NAME.by`` names."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from moetrain.config import DataSettings, DomainSettings, Settings
from moetrain.data.corpus import Preparation, Progress
from moetrain.data.documents import DomainReport, PortionReader
from moetrain.data.errors import DataError
from moetrain.data.portions import Portion
from moetrain.data.tokenizer import given_tokenizer
from moetrain.data.workers import OnProgress

_COUNTED = 1000  # values after which counting stops; fewer if most_domains allows more
_SHOWN = 5
_ROWS_PER_PROGRESS = 256


def split_domains(settings: Settings, progress: Progress = lambda what, done, total: None) -> Settings:
    """Settings in which each domain with ``by`` is replaced by domains of one ``value`` each, sorted by it.

    The values are found by reading the source once, and cached under its content.

    Raises:
        DataError: the data cannot be used, or has more values than ``most_domains``.
        SettingsError: a path holds an environment variable that is not set.
    """
    data = settings.data
    split = {name: domain for name, domain in data.domains.items() if domain.by is not None and domain.value is None}
    if not split:
        return settings
    only = settings.model_copy(update={"data": data.model_copy(update={"domains": split})})
    preparation = Preparation(only, progress)
    with preparation.lock():
        values = _values(preparation, only.data)
    domains: dict[str, DomainSettings] = {}
    for name, domain in data.domains.items():
        made = {name: domain}
        if name in split:
            made = {
                new: domain.model_copy(update={"value": value}) for new, value in _named(name, values[name]).items()
            }
        for new, its in made.items():
            if new in domains or (new != name and new in data.domains):
                raise DataError(f"data.domains.{name}.by makes a domain {new}, as there is already: rename one of them")
            domains[new] = its
    tree = settings.model_dump()
    tree["data"]["domains"] = {name: domain.model_dump() for name, domain in domains.items()}
    return Settings.model_validate(tree)


def _values(preparation: Preparation, data: DataSettings) -> dict[str, list[str]]:
    """The values of each domain, sorted."""
    path = preparation.cache / f"values-{preparation.key()}.json"
    first_problem: dict[str, str] = {}
    if path.is_file():
        counts: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8"))
    else:
        counts, first_problem = _counted(preparation, data)
        if all(counts.values()):
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(counts), encoding="utf-8")
            partial.replace(path)
    for name, domain in data.domains.items():
        _check(name, domain, Counter(counts[name]), first_problem.get(name))
    return {name: sorted(counted) for name, counted in counts.items()}


def _counted(preparation: Preparation, data: DataSettings) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Per domain the rows of each value, and the first problem with a row where there is one."""
    results: dict[int, tuple[dict[str, int], str | None]] = {}
    tasks: list[Any] = [(portion, preparation.settings) for portion in preparation.portions]
    preparation.run("finding the domains", count_values, tasks, results.__setitem__)
    counts: dict[str, Counter[str]] = {name: Counter() for name in data.domains}
    problems: dict[str, str] = {}
    for number, portion in enumerate(preparation.portions):
        counted, problem = results[number]
        counts[portion.domain].update(counted)
        if problem is not None:
            problems.setdefault(portion.domain, problem)
    return {name: dict(counted) for name, counted in counts.items()}, problems


def count_values(portion: Portion, settings: Settings, on_progress: OnProgress) -> tuple[dict[str, int], str | None]:
    """How many rows with text have each value, and the first problem with a row. Ends early if there are very many."""
    domain = settings.data.domains[portion.domain]
    tokenizer = given_tokenizer(settings.tokenizer)[0] if domain.tokens is not None else None
    report = DomainReport(portion.domain)
    reader = PortionReader(portion, domain, settings.data, settings.run.seed, set(), report, tokenizer=tokenizer)
    counted: Counter[str] = Counter()
    problem = None
    for number, row in enumerate(reader.rows()):
        if row.problem is not None:
            problem = problem or f"{row.place}: {row.problem}"
        elif row.group is not None and row.content is not None and not row.is_empty:
            counted[row.group] += 1
            if len(counted) > max(_COUNTED, domain.most_domains):
                break
        if number % _ROWS_PER_PROGRESS == 0:
            on_progress(reader.bytes_read)
    on_progress(portion.size)
    return dict(counted), problem


def _check(name: str, domain: DomainSettings, counted: Counter[str], problem: str | None) -> None:
    """Raise DataError if there are no values or too many."""
    key = f"data.domains.{name}"
    if not counted:
        why = f", first {problem}" if problem else ""
        raise DataError(f"{key}: no row has text and a value of {domain.by!r}{why}: correct by, text_field or filter")
    if len(counted) > domain.most_domains:
        common = [value for value, _ in counted.most_common(_SHOWN)]
        many = f"more than {_COUNTED}" if len(counted) > _COUNTED else str(len(counted))
        raise DataError(
            f"{key}.by: {domain.by!r} has {many} values, but most_domains is {domain.most_domains}: raise it, or keep "
            f"some by filter: {domain.by} in {common[: domain.most_domains]} (the most frequent)"
        )


def _named(name: str, values: list[str]) -> dict[str, str]:
    """The value of each domain by its name, which holds letters, digits, '_' and '-' of the value only."""
    named: dict[str, str] = {}
    for value in values:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", value).strip("_") or "other"
        new, count = f"{name}_{plain}", 1
        while new in named:
            count += 1
            new = f"{name}_{plain}-{count}"
        named[new] = value
    return named
