"""The rows of a data set that another trainer reads: their first tokens, their domains, and when they are trained on.

A row is known by its first tokens, which both the data set and a batch hold, so that no extra column has to pass
through the trainer's collator. Rows with equal first tokens count as copies of one text.

Shapes: n rows, K first tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler

NO_TOKEN = -1
"""Stands after the end of rows of fewer than K tokens."""
MOST_DOMAINS = 16
_AT_A_TIME = 1000
_HASHED_AT_A_TIME = 2**16
_MASKS = ("completion_mask", "assistant_masks")  # of TRL: the tokens that are trained on


class MonitorError(ValueError):
    """Data, a model or a way of training that cannot be monitored; one line with the remedy."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set in its order."""

    tokens_nK: np.ndarray  # int32, the first tokens; NO_TOKEN after the end of shorter rows
    predicted_nK: np.ndarray  # bool, whether a token is predicted from those before it
    domain: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.domain)

    @cached_property
    def keys(self) -> np.ndarray:
        """What rows are known by, uint64 [n]."""
        return row_keys(self.tokens_nK)

    @property
    def long_enough(self) -> np.ndarray:
        """Whether all first tokens are there and one of them is predicted, bool [n]."""
        return (self.tokens_nK[:, -1] != NO_TOKEN) & self.predicted_nK.any(1)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """The rows of several data sets, one after the other."""
        return cls(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )

    def check_same(self, dataset: Any) -> None:
        """Raise MonitorError where another data set has other tokens in its first or last rows."""
        count = self.tokens_nK.shape[1]
        for number in sorted({0, len(self) // 2, len(self) - 1} if len(self) else ()):
            found = np.asarray(dataset[number]["input_ids"])[:count]
            if not np.array_equal(found, self.tokens_nK[number][: len(found)]):
                raise MonitorError(
                    f"train_dataset, row {number}: other tokens than the row that Trainer trains on: give the data set "
                    "that Trainer was given, in its order"
                )

    def first_steps(self, order: np.ndarray, rows_per_step: int, steps: int, never: int) -> np.ndarray:
        """The step (from 1) that first trains on each row or a copy of it, int64 [n]; ``never`` where none does.

        Args:
            order: the rows as they are read in the first epoch.
        """
        own = np.empty(len(self), np.int64)
        own[order] = np.arange(len(order)) // rows_per_step + 1
        _, text = np.unique(self.keys, return_inverse=True)
        earliest = np.full(int(text.max(initial=-1)) + 1, never, np.int64)
        np.minimum.at(earliest, text, own)
        first = earliest[text]
        return np.where(first <= steps, first, never)


def row_keys(tokens_nK: np.ndarray) -> np.ndarray:
    """A hash of the first tokens of rows, uint64 [n]."""
    factors = np.random.default_rng(0).integers(2**63, size=tokens_nK.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = np.empty(len(tokens_nK), np.uint64)
    for start in range(0, len(keys), _HASHED_AT_A_TIME):
        mixed = (tokens_nK[start : start + _HASHED_AT_A_TIME].astype(np.int64) + 1).astype(np.uint64) * factors
        mixed ^= mixed >> np.uint64(29)  # a plain sum of products would be 0 for too many differences
        keys[start : start + len(mixed)] = (mixed * np.uint64(0x9E3779B97F4A7C15)).sum(1, dtype=np.uint64)
    return keys


def read_rows(dataset: Any, domains: np.ndarray, count: int, what: str) -> Rows:
    """The rows of a map-style data set with a column ``input_ids``, and maybe one that says what is predicted.

    That is ``labels`` (negative where nothing is), or a mask of TRL's.

    Args:
        domains: int64 [n].
        count: first tokens that are read.
        what: name of the data set in messages.

    Raises:
        MonitorError: it has no such column, or holds something else.
    """
    columns = column_names(dataset)
    tokens_nK = _first(dataset, "input_ids", count, what)
    predicted_nK = tokens_nK != NO_TOKEN
    predicted_nK[:, 0] = False
    if "labels" in columns:
        predicted_nK &= _first(dataset, "labels", count, what) >= 0
    for name in filter(columns.__contains__, _MASKS):
        predicted_nK &= _first(dataset, name, count, what) == 1
    return Rows(tokens_nK, predicted_nK, domains)


def column_names(dataset: Any) -> list[str]:
    """The columns of a data set of `datasets`, or the keys of the first row of another."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return names
    row = dataset[0] if hasattr(dataset, "__getitem__") and len(dataset) else {}
    return list(row) if isinstance(row, Mapping) else []


def domains_of(dataset: Any, column: str, what: str) -> list[str]:
    """The value of the domain column of each row, as text.

    Raises:
        MonitorError: there is no such column, or a row has no value.
    """
    columns = column_names(dataset)
    if column not in columns:
        raise MonitorError(
            f"{what} has no column {column!r}, only {', '.join(columns) or 'rows without names'}. Trainer removes "
            "columns that the model does not take, so the data set itself has to be given: "
            f"MonitorCallback({column!r}, train_dataset=...)"
        )
    only = dataset.select_columns([column]) if hasattr(dataset, "select_columns") else dataset
    values = [row[column] for row in only]
    for number, value in enumerate(values):
        if value is None or value == "":
            raise MonitorError(f"{what}, row {number}: no value of {column!r}: fill it in, or filter such rows out")
    return [str(value) for value in values]


def number_domains(values: list[str]) -> dict[str, str]:
    """By value of the domain column, the name of its domain: the value with '_' for what cannot be part of a tag.

    Raises:
        MonitorError: two values of one name, or too many values.
    """
    found = sorted(set(values))
    if len(found) > MOST_DOMAINS:
        shown = ", ".join(found[:5])
        raise MonitorError(
            f"the domain column has {len(found)} values ({shown}, ...), at most {MOST_DOMAINS} can be watched: name a "
            "column of fewer, or map it to fewer"
        )
    names = {value: re.sub(r"[^A-Za-z0-9_-]", "_", value) for value in found}
    names = {value: name if re.match(r"[A-Za-z0-9]", name) else f"d{name}" for value, name in names.items()}
    by_name: dict[str, str] = {}
    for value, name in names.items():
        if name in by_name:
            raise MonitorError(f"the domains {by_name[name]!r} and {value!r} are both named {name}: rename one of them")
        by_name[name] = value
    return names


def reading_order(dataloader: Any) -> np.ndarray | None:
    """The rows of a data loader's first epoch in the order in which they are read, int64; None where it is unknown.

    Known are a sequential sampler and accelerate's, which shuffles by a seed of its own.
    """
    from accelerate.data_loader import SeedableRandomSampler

    batches = getattr(dataloader, "batch_sampler", None)
    while (of_all_processes := getattr(batches, "batch_sampler", None)) is not None:
        batches = of_all_processes
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SequentialSampler):
        return np.arange(len(sampler))
    if isinstance(sampler, SeedableRandomSampler):
        own = copy.copy(sampler)
        own.generator = torch.Generator()  # not the sampler's, whose state it would change
        own.generator.manual_seed(own.initial_seed)
        own.epoch = 0
        return np.fromiter(own, np.int64, len(own))
    return None


def _first(dataset: Any, column: str, count: int, what: str) -> np.ndarray:
    """The first values of a column of lists, int32 [n, count]; NO_TOKEN after the end of shorter lists."""
    if column not in column_names(dataset):
        raise MonitorError(
            f"{what} has no column {column!r}, only {', '.join(column_names(dataset))}: give the tokenized data set"
        )
    found = np.full((len(dataset), count), NO_TOKEN, np.int32)
    place = 0
    for lists in _lists(dataset, column):
        for values in lists:
            values = np.asarray(values)
            if values.ndim != 1 or (len(values) and values.dtype.kind not in "iub"):  # an empty list has another dtype
                holds = f"holds {values.dtype}" if values.ndim == 1 else f"is {_shown(values)}"
                raise MonitorError(f"{what}, row {place}: {column} {holds}, not a list of token numbers: tokenize it")
            found[place, : len(values[:count])] = values[:count]
            place += 1
    return found


def _shown(values: np.ndarray) -> str:
    """What stands in the place of a list."""
    return repr(values.item()) if values.ndim == 0 else f"a table of shape {values.shape}"


def _lists(dataset: Any, column: str) -> Iterator[Any]:
    if hasattr(dataset, "with_format") and hasattr(dataset, "iter"):  # a data set of `datasets`
        only = dataset.select_columns([column]).with_format("numpy")
        yield from (batch[column] for batch in only.iter(_AT_A_TIME))
    else:
        yield from ([row[column]] for row in (dataset[number] for number in range(len(dataset))))
