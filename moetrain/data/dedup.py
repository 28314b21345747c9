"""The set of document ids seen so far, in 8 bytes per id."""

from __future__ import annotations

import numpy as np

_RECENT_IDS = 2**16


class SeenIds:
    """A set of 64-bit ids: recent ones in a Python set, the others in sorted arrays of growing size."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []  # each less than half as long as the one before it

    def __contains__(self, identity: int) -> bool:
        if identity in self._recent:
            return True
        wanted = np.uint64(identity)
        for ids in self._sorted:
            place = int(ids.searchsorted(wanted))
            if place < len(ids) and ids[place] == wanted:
                return True
        return False

    def add(self, identity: int) -> None:
        self._recent.add(identity)
        if len(self._recent) >= _RECENT_IDS:
            recent, self._recent = self._recent, set()
            self._add_sorted(np.sort(np.fromiter(recent, np.uint64, len(recent))))

    def add_all(self, ids: np.ndarray) -> np.ndarray:
        """Add ids.

        Returns:
            for each id whether it is new, i.e. neither in the set before nor earlier in ``ids``; bool [n].
        """
        new = np.zeros(len(ids), bool)
        new[np.unique(ids, return_index=True)[1]] = True
        for known in self._sorted:
            new[new] = ~_is_member(ids[new], known)
        if self._recent:
            recent = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
            new[new] = ~_is_member(ids[new], recent)
        if new.any():
            self._add_sorted(np.sort(ids[new].astype(np.uint64)))
        return new

    def _add_sorted(self, ids: np.ndarray) -> None:
        while self._sorted and len(self._sorted[-1]) < 2 * len(ids):
            # A stable sort detects the two sorted halves and merges them.
            ids = np.sort(np.concatenate([self._sorted.pop(), ids]), kind="stable")
        self._sorted.append(ids)


def _is_member(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    places = np.minimum(known.searchsorted(ids), len(known) - 1)
    return known[places] == ids
