"""Contamination: which probe items occur in the training text.

The rule is the n-gram check of GPT-3 and its successors (Brown et al. 2020, appendix C): an item is contaminated if a
training document holds 13 consecutive words of it. Words are runs of letters and digits in lower case, so punctuation,
case and line breaks make no difference. Of an item with 4 to 12 words, all must occur. Shorter items occur naturally in
any text; they are not searched for and counted as too short. The prompt alone and the prompt with the right answer are
searched for, never a wrong choice. "Question: ... Answer:" around a prompt is not part of the item, but "Answer" may
occur between prompt and answer in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from moetrain.config import Settings
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import Document, DomainReport, read_documents
from moetrain.data.items import Item, right_answer

OVERLAP = 13  # words
SHORTEST = 4

_Part = Literal["prompt", "answer"]
_BATCH_CHARACTERS = 2**20
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd; base of the polynomial hash of a run of words
_find_words = re.compile(r"[^\W_]+").findall
_FRAME_BEFORE = re.compile(r"^\s*(?:question|problem|goal|claim|q)\s*:", re.IGNORECASE)
_FRAME_AFTER = re.compile(r"(?:^|\n)\s*(answer|solution|a)\s*:\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Contaminated:
    """A contaminated item, and where it was found first."""

    task: str
    id: str
    where: str  # the document's id in hexadecimal, or "text N", from 0
    part: _Part  # whether the prompt alone was found, or only with the right answer
    words: str  # the run of words that was found


@dataclass
class TaskCount:
    """Counts of the items of a task."""

    items: int = 0
    too_short: int = 0
    contaminated: int = 0

    @property
    def share(self) -> float:
        """Share of the items searched for that are contaminated; 0 if there are none."""
        return self.contaminated / max(1, self.items - self.too_short)


@dataclass(frozen=True)
class ContaminationReport:
    """Counts per task, and the contaminated items in their order."""

    tasks: dict[str, TaskCount] = field(default_factory=dict)
    found: list[Contaminated] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        tasks = {name: asdict(count) | {"share": count.share} for name, count in self.tasks.items()}
        return {"tasks": tasks, "contaminated": [asdict(each) for each in self.found]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ContaminationReport:
        """The inverse of `as_dict`."""
        tasks = {
            name: TaskCount(count["items"], count["too_short"], count["contaminated"])
            for name, count in record["tasks"].items()
        }
        return cls(tasks, [Contaminated(**each) for each in record["contaminated"]])


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared: runs of letters and digits in lower case."""
    return _find_words(text.lower())


def contaminated(items: Iterable[Item], texts: Iterable[str | Document]) -> ContaminationReport:
    """Find the items that occur in training texts, by the rule at the head of this file.

    Args:
        texts: read once, in batches; held-out documents are skipped.
    """
    index = _Index(items)
    words: list[str] = []
    places: list[str] = []
    starts: list[int] = []
    characters = 0
    for number, each in enumerate(texts):
        if isinstance(each, Document):
            if each.heldout:
                continue
            place, text = f"{each.id:016x}", each.text
        else:
            place, text = f"text {number}", each
        places.append(place)
        starts.append(len(words))
        words += words_of(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            index.search(words, starts, places)
            words, places, starts, characters = [], [], [], 0
    index.search(words, starts, places)
    return index.report()


def clean(items: Iterable[Item], report: ContaminationReport) -> list[Item]:
    """The items that are not contaminated by the report."""
    found = {(each.task, each.id) for each in report.found}
    return [item for item in items if (item["task"], item["id"]) not in found]


class _Filter:
    """A set of hashes with fast lookup and false positives."""

    def __init__(self, hashes: np.ndarray) -> None:
        bits = min(28, max(16, (16 * len(hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        self._table[hashes >> self._shift] = True

    def candidates(self, hashes: np.ndarray) -> np.ndarray:
        """Indices of the hashes that may be in the set."""
        return np.flatnonzero(self._table[hashes >> self._shift])


class _Grams:
    """The runs of ``length`` words of all items: distinct hashes, sorted, and for each the items with it."""

    def __init__(self, length: int, hashes: np.ndarray, owners: np.ndarray) -> None:
        order = np.lexsort((owners, hashes))
        hashes, self._owners = hashes[order], owners[order]
        self.length = length
        self.hashes, self._starts = np.unique(hashes, return_index=True)
        self._open = np.ones(len(self.hashes), bool)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices into ``hashes``, numbers of the runs there) of runs that have items not found yet."""
        if not len(self.hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        numbers = np.minimum(self.hashes.searchsorted(hashes), len(self.hashes) - 1)
        hit = np.flatnonzero((self.hashes[numbers] == hashes) & self._open[numbers])
        return hit, numbers[hit]

    def is_open(self, number: int) -> bool:
        return bool(self._open[number])

    def close(self, number: int) -> None:
        """Ignore this run from now on: all its items have been found."""
        self._open[number] = False

    def owners(self, number: int) -> list[int]:
        end = self._starts[number + 1] if number + 1 < len(self._starts) else len(self._owners)
        return self._owners[self._starts[number] : end].tolist()


class _Index:
    """The items, indexed for searching batches of text."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._names: list[tuple[str, str]] = []
        self._phrases: list[list[tuple[str, int, _Part]]] = []  # of each item; words are joined by spaces
        self._found: dict[int, Contaminated] = {}
        self._tasks: dict[str, TaskCount] = {}
        parts: dict[int, list[tuple[np.ndarray, int]]] = {}
        beginnings: list[np.ndarray] = []
        for number, item in enumerate(items):
            count = self._tasks.setdefault(item["task"], TaskCount())
            count.items += 1
            phrases = _phrases(item)
            count.too_short += not phrases
            self._names.append((item["task"], item["id"]))
            self._phrases.append([(" ".join(words), length, part) for words, length, part in phrases])
            for words, length, _ in phrases:
                hashes = _word_hashes(words)
                parts.setdefault(length, []).append((_run_hashes(hashes, length), number))
                if length < OVERLAP:
                    beginnings.append(_run_hashes(hashes[:SHORTEST], SHORTEST))
        grams = [_join_grams(length, parts[length]) for length in sorted(parts)]
        self._short = [each for each in grams if each.length < OVERLAP]
        self._beginnings = _Filter(np.unique(np.concatenate(beginnings))) if beginnings else None
        self._long = [(each, _Filter(each.hashes)) for each in grams if each.length >= OVERLAP]

    def search(self, words: list[str], starts: list[int], places: list[str]) -> None:
        """Note the items that occur in a batch of texts.

        Args:
            words: of all texts.
            starts: index of the first word of each text.
            places: of the texts, for the report.
        """
        if not words:
            return
        hashes = _word_hashes(words)
        firsts = np.array(starts)
        ends = np.append(firsts[1:], len(words))
        hits: list[tuple[int, int, _Grams, int]] = []
        for grams, at, numbers in self._hits(hashes):
            text = firsts.searchsorted(at, side="right") - 1
            within = at + grams.length <= ends[text]  # not from one text into the next
            hits += [
                (place, grams.length, grams, number)
                for place, number in zip(at[within].tolist(), numbers[within].tolist(), strict=True)
            ]
        hits.sort(key=lambda hit: hit[:2])  # so that what is found first does not depend on the batches
        for place, length, grams, number in hits:
            if grams.is_open(number):
                run = " ".join(words[place : place + length])
                self._note(grams, number, run, places[int(firsts.searchsorted(place, side="right")) - 1])

    def _hits(self, hashes: np.ndarray) -> Iterator[tuple[_Grams, np.ndarray, np.ndarray]]:
        """(runs, indices of their first words, their numbers) with equal hashes."""
        for grams, filter_ in self._long:
            if len(hashes) >= grams.length:
                runs = _run_hashes(hashes, grams.length)
                at = filter_.candidates(runs)
                hit, numbers = grams.find(runs[at])
                yield grams, at[hit], numbers
        if self._beginnings is not None and len(hashes) >= SHORTEST:
            runs = _run_hashes(hashes, SHORTEST)
            at = self._beginnings.candidates(runs)
            found, length = runs[at], SHORTEST
            for grams in self._short:
                while length < grams.length:
                    found = found * np.uint64(_MULTIPLIER) + hashes[np.minimum(at + length, len(hashes) - 1)]
                    length += 1
                hit, numbers = grams.find(found)
                yield grams, at[hit], numbers

    def _note(self, grams: _Grams, number: int, run: str, where: str) -> None:
        has_open_items = False
        for item in grams.owners(number):
            if item in self._found:
                continue
            parts = [
                part for words, length, part in self._phrases[item] if length == grams.length and _holds(words, run)
            ]
            if parts:
                task, identity = self._names[item]
                self._found[item] = Contaminated(task, identity, where, parts[0], run)
            else:  # another run with the same hash
                has_open_items = True
        if not has_open_items:
            grams.close(number)

    def report(self) -> ContaminationReport:
        found = [self._found[item] for item in sorted(self._found)]
        for each in found:
            self._tasks[each.task].contaminated += 1
        return ContaminationReport(self._tasks, found)


def _phrases(item: Item) -> list[tuple[list[str], int, _Part]]:
    """What is searched for: (words, length of the runs of which one is enough, part of the item)."""
    prompt = _FRAME_BEFORE.sub("", item["prompt"], count=1)
    after = _FRAME_AFTER.search(prompt)
    answer = item["sep"] + right_answer(item)
    text = prompt[: after.start()] + "\n" if after else prompt
    asked, answered = words_of(text), words_of(text + answer)
    phrases: list[tuple[list[str], int, _Part]] = []
    if len(asked) >= SHORTEST:
        phrases.append((asked, min(OVERLAP, len(asked)), "prompt"))
    if len(answered) >= SHORTEST:
        phrases.append((answered, min(OVERLAP, len(answered)), "answer"))
        if after and 0 < len(asked) < len(answered):
            # Equally many words of the item, with the word of the frame between them.
            framed = [*asked, *words_of(after[1]), *answered[len(asked) :]]
            framed = framed[max(0, len(asked) - OVERLAP + 1) : len(asked) + OVERLAP]
            phrases.append((framed, min(OVERLAP + 1, len(framed)), "answer"))
    return phrases


def _holds(phrase: str, run: str) -> bool:
    return f" {run} " in f" {phrase} "


def _join_grams(length: int, parts: list[tuple[np.ndarray, int]]) -> _Grams:
    hashes = np.concatenate([each for each, _ in parts])
    owners = np.repeat(np.array([number for _, number in parts], np.int32), [len(each) for each, _ in parts])
    return _Grams(length, hashes, owners)


def _word_hashes(words: list[str]) -> np.ndarray:
    """Python's hash of each word, uint64 [n]. It differs between processes, which changes no result."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _run_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """The hash of each run of ``length`` words, uint64 [n - length + 1]: sum of hash[i+k] M^(length-1-k), mod 2^64."""
    if length == 1:
        return hashes
    half = length // 2
    runs = _run_hashes(hashes, half)
    runs = runs[: len(runs) - half] * np.uint64(pow(_MULTIPLIER, half, 2**64)) + runs[half:]
    if length % 2:
        runs = runs[:-1] * np.uint64(_MULTIPLIER) + hashes[length - 1 :]
    return runs


def all_documents(settings: Settings) -> Iterator[Document]:
    """Every document of a run, with held-out ones, read from the sources in the order of the domains.

    Raises:
        DataError: the data cannot be used.
    """
    seen = SeenIds()
    for name, domain in settings.data.domains.items():
        yield from read_documents(name, domain, settings.data, settings.run.seed, seen, DomainReport(name))
