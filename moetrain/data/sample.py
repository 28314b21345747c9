"""The sample of text that a tokenizer is trained on: the documents of lowest hash, from one pass over each domain."""

from __future__ import annotations

import heapq
from hashlib import blake2b

from moetrain.config import Settings
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import DomainReport, PortionReader
from moetrain.data.portions import Portion
from moetrain.data.workers import OnProgress

_DOCUMENTS_PER_PROGRESS = 256


class Sample:
    """The documents of lowest hash up to ``budget`` bytes, in whatever order they are added."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._bytes = 0
        self._heap: list[tuple[int, int, str]] = []  # (-hash, id, text): the highest hash comes first
        self._ids: set[int] = set()

    def accepts(self, order: int, identity: int) -> bool:
        """Whether `add` would add a document of hash ``order``."""
        return identity not in self._ids and (self._bytes < self._budget or order < -self._heap[0][0])

    def add(self, order: int, identity: int, text: str) -> None:
        if not self.accepts(order, identity):
            return
        heapq.heappush(self._heap, (-order, identity, text))
        self._ids.add(identity)
        self._bytes += len(text.encode())
        while self._bytes - (size := len(self._heap[0][2].encode())) >= self._budget:
            self._ids.remove(heapq.heappop(self._heap)[1])
            self._bytes -= size

    def items(self) -> list[tuple[int, int, str]]:
        """(hash, id, text) of each document, lowest hash first."""
        return sorted((-negative, identity, text) for negative, identity, text in self._heap)


def sample_portion(
    portion: Portion, settings: Settings, budget: float, on_progress: OnProgress
) -> tuple[DomainReport, list[tuple[int, int, str]]]:
    """The report of a portion, and its training documents of lowest hash, up to ``budget`` bytes of text."""
    report, sample = DomainReport(portion.domain), Sample(budget)
    salt = settings.run.seed.to_bytes(8, "little")
    domain = settings.data.domains[portion.domain]
    reader = PortionReader(portion, domain, settings.data, settings.run.seed, SeenIds(), report)
    for document in reader:
        assert document.text is not None  # token ids come with a tokenizer
        if not document.heldout:
            digest = blake2b(document.id.to_bytes(8, "little"), digest_size=8, salt=salt).digest()
            sample.add(int.from_bytes(digest, "big"), document.id, document.text)
        if report.documents % _DOCUMENTS_PER_PROGRESS == 0:
            on_progress(reader.bytes_read or report.text_bytes)
    on_progress(portion.size)
    return report, sample.items()
