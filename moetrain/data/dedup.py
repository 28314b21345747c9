"""The ids met so far, in 8 bytes each."""

from __future__ import annotations

import numpy as np

_NEWEST = 2**16


class SeenIds:
    """A set of 64-bit ids: the newest ones as a Python set, the others as sorted arrays of growing size."""

    def __init__(self) -> None:
        self._newest: set[int] = set()
        self._sorted: list[np.ndarray] = []  # each less than half as long as the one before it

    def __contains__(self, identity: int) -> bool:
        if identity in self._newest:
            return True
        wanted = np.uint64(identity)
        for ids in self._sorted:
            place = int(ids.searchsorted(wanted))
            if place < len(ids) and ids[place] == wanted:
                return True
        return False

    def add(self, identity: int) -> None:
        self._newest.add(identity)
        if len(self._newest) >= _NEWEST:
            newest, self._newest = self._newest, set()
            self._keep(np.sort(np.fromiter(newest, np.uint64, len(newest))))

    def first(self, ids: np.ndarray) -> np.ndarray:
        """Which of these ids, in order, are met for the first time, bool [n]; from now on they all are seen."""
        new = np.zeros(len(ids), bool)
        new[np.unique(ids, return_index=True)[1]] = True
        for known in self._sorted:
            new[new] = ~_member(ids[new], known)
        if self._newest:
            newest = np.sort(np.fromiter(self._newest, np.uint64, len(self._newest)))
            new[new] = ~_member(ids[new], newest)
        if new.any():
            self._keep(np.sort(ids[new].astype(np.uint64)))
        return new

    def _keep(self, ids: np.ndarray) -> None:
        while self._sorted and len(self._sorted[-1]) < 2 * len(ids):
            # A stable sort finds the two sorted halves and merges them.
            ids = np.sort(np.concatenate([self._sorted.pop(), ids]), kind="stable")
        self._sorted.append(ids)


def _member(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    places = np.minimum(known.searchsorted(ids), len(known) - 1)
    return known[places] == ids
