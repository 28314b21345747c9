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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moetrain.config import Settings
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import Document, DomainReport, read_documents
from moetrain.data.items import Item, right_answer
from moetrain.data.tokenizer import given_tokenizer

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
            place, text = f"{each.id:016x}", each.text or ""
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


class _Runs:
    """The runs of ``length`` words of all items: distinct hashes, sorted, and for each the items with it."""

    def __init__(self, length: int, parts: Sequence[tuple[np.ndarray, int]]) -> None:
        hashes = np.concatenate([each for each, _ in parts])
        items = np.repeat(np.array([item for _, item in parts], np.int32), [len(each) for each, _ in parts])
        order = np.lexsort((items, hashes))
        self.length = length
        self._hashes, starts = np.unique(hashes[order], return_index=True)
        self._items, self._starts = items[order], np.append(starts, len(items))
        self.is_open = np.ones(len(self._hashes), bool)  # whether items of the run have not been found yet
        # A table of the first bits of the hashes rejects nearly all runs of a text, faster than a binary search.
        bits = min(28, max(16, (16 * len(self._hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        self._table[self._hashes >> self._shift] = True

    def find(self, word_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the first words, numbers of the runs) where a text has open runs, by equal hash."""
        if len(word_hashes) < self.length:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        hashes = run_hashes(word_hashes, self.length)
        at = np.flatnonzero(self._table[hashes >> self._shift])
        numbers = np.minimum(self._hashes.searchsorted(hashes[at]), len(self._hashes) - 1)
        hit = (self._hashes[numbers] == hashes[at]) & self.is_open[numbers]
        return at[hit], numbers[hit]

    def items(self, number: int) -> list[int]:
        """The items that have a run."""
        return self._items[self._starts[number] : self._starts[number + 1]].tolist()


class _Index:
    """The items, indexed for searching batches of text."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._names: list[tuple[str, str]] = []
        self._phrases: list[list[tuple[str, int, _Part]]] = []  # of each item; words are joined by spaces
        self._found: dict[int, Contaminated] = {}
        self._tasks: dict[str, TaskCount] = {}
        parts: dict[int, list[tuple[np.ndarray, int]]] = {}
        for number, item in enumerate(items):
            count = self._tasks.setdefault(item["task"], TaskCount())
            count.items += 1
            phrases = _phrases(item)
            count.too_short += not phrases
            self._names.append((item["task"], item["id"]))
            self._phrases.append([(" ".join(words), length, part) for words, length, part in phrases])
            for words, length, _ in phrases:
                parts.setdefault(length, []).append((run_hashes(_word_hashes(words), length), number))
        self._runs = [_Runs(length, parts[length]) for length in sorted(parts)]

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
        hits: list[tuple[int, int, _Runs, int]] = []
        for runs in self._runs:
            at, numbers = runs.find(hashes)
            text = firsts.searchsorted(at, side="right") - 1
            within = at + runs.length <= ends[text]  # not from one text into the next
            hits += [
                (first, runs.length, runs, number)
                for first, number in zip(at[within].tolist(), numbers[within].tolist(), strict=True)
            ]
        hits.sort(key=lambda hit: hit[:2])  # so that what is found first does not depend on the batches
        for first, length, runs, number in hits:
            if runs.is_open[number]:
                place = places[int(firsts.searchsorted(first, side="right")) - 1]
                self._note(runs, number, " ".join(words[first : first + length]), place)

    def _note(self, runs: _Runs, number: int, words: str, place: str) -> None:
        """Note the items whose run was found, unless only its hash is that of the words."""
        for item in runs.items(number):
            for phrase, length, part in self._phrases[item]:
                if item not in self._found and length == runs.length and f" {words} " in f" {phrase} ":
                    task, identity = self._names[item]
                    self._found[item] = Contaminated(task, identity, place, part, words)
        runs.is_open[number] = any(item not in self._found for item in runs.items(number))

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


def _word_hashes(words: list[str]) -> np.ndarray:
    """Python's hash of each word, uint64 [n]. It differs between processes, which changes no result."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def run_hashes(hashes: np.ndarray, length: int) -> np.ndarray:
    """The hash of each run of ``length`` words or tokens, uint64 [n - length + 1], from the hash of each.

    It is the sum of hash[i+k] M^(length-1-k), modulo 2^64.
    """
    if length == 1:
        return hashes
    half = length // 2
    runs = run_hashes(hashes, half)
    runs = runs[: len(runs) - half] * np.uint64(pow(_MULTIPLIER, half, 2**64)) + runs[half:]
    if length % 2:
        runs = runs[:-1] * np.uint64(_MULTIPLIER) + hashes[length - 1 :]
    return runs


def all_documents(settings: Settings) -> Iterator[Document]:
    """Every document of a run, with held-out ones, read from the sources in the order of the domains.

    Documents of token files have the text that their ids stand for.

    Raises:
        DataError: the data cannot be used.
    """
    seen = SeenIds()
    for name, domain in settings.data.domains.items():
        tokenizer = given_tokenizer(settings.tokenizer)[0] if domain.tokens is not None else None
        report = DomainReport(name)
        for document in read_documents(name, domain, settings.data, settings.run.seed, seen, report, tokenizer):
            if document.tokens is None or tokenizer is None:
                yield document
            else:
                yield replace(document, text=tokenizer.decode(document.tokens.tolist()))
