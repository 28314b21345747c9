"""The text that a tokenizer is trained on: in one pass over each domain, the documents of lowest hash."""

from __future__ import annotations

import heapq
from hashlib import blake2b

from moetrain.config import Settings
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import DomainReport, Portion, PortionReader
from moetrain.data.workers import Tell

_EVERY = 256  # documents between two words about how far it is


class Sample:
    """Documents of lowest hash up to ``budget`` bytes, whatever the order in which they come."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._bytes = 0
        self._heap: list[tuple[int, int, str]] = []  # (-hash, id, text): the highest hash comes first
        self._ids: set[int] = set()

    def wants(self, order: int, identity: int) -> bool:
        return identity not in self._ids and (self._bytes < self._budget or order < -self._heap[0][0])

    def add(self, order: int, identity: int, text: str) -> None:
        if not self.wants(order, identity):
            return
        heapq.heappush(self._heap, (-order, identity, text))
        self._ids.add(identity)
        self._bytes += len(text.encode())
        while self._bytes - (size := len(self._heap[0][2].encode())) >= self._budget:
            self._ids.remove(heapq.heappop(self._heap)[1])
            self._bytes -= size

    def items(self) -> list[tuple[int, int, str]]:
        """(hash, id, text) of each, lowest hash first."""
        return sorted((-negative, identity, text) for negative, identity, text in self._heap)


def sample_portion(
    portion: Portion, settings: Settings, budget: float, tell: Tell
) -> tuple[DomainReport, list[tuple[int, int, str]]]:
    """What a portion holds, and its training documents of lowest hash, up to ``budget`` bytes of text."""
    report, sample = DomainReport(portion.domain), Sample(budget)
    salt = settings.run.seed.to_bytes(8, "little")
    domain = settings.data.domains[portion.domain]
    reader = PortionReader(portion, domain, settings.data, settings.run.seed, SeenIds(), report)
    for document in reader:
        if not document.heldout:
            digest = blake2b(document.id.to_bytes(8, "little"), digest_size=8, salt=salt).digest()
            order = int.from_bytes(digest, "big")
            if sample.wants(order, document.id):
                sample.add(order, document.id, document.text)
        if report.documents % _EVERY == 0:
            tell(reader.bytes_read or report.text_bytes)
    tell(portion.size)
    return report, sample.items()
