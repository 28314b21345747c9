"""Domains that need no network: the Python standard library's source (`code`), the others generated.

`math` is arithmetic, `commonsense` a small world of people and things, `chemistry` the names of organic compounds.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from moetrain.data.builtin import (
    arithmetic,
    arithmetic_items,
    nomenclature_items,
    nomenclature_text,
    python_code,
    small_world_items,
    small_world_text,
)

NAMES: tuple[str, ...] = ("chemistry", "code", "commonsense", "math")


def documents(name: str, *, size: int, seed: int) -> Iterator[str]:
    """Return the texts of a built-in domain, one by one, until about `size` bytes of UTF-8 have been given.

    The last text is given whole, so the total is `size` or a little more; `code` ends earlier where the standard
    library does (about 10 MB). One name and seed give the same texts, the first of them for a smaller size: `code` with
    one Python version, the others on every machine. Raises ValueError for an unknown name or a negative size.
    """
    _check(name, "size", size)
    makers = {
        "chemistry": nomenclature_text.documents,
        "code": python_code.documents,
        "commonsense": small_world_text.documents,
        "math": arithmetic.documents,
    }
    return makers[name](size, seed)


def probe_items(name: str, *, items: int, seed: int, held_out: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return held-out probe items in the form of the benchmark files, the same ones for the same arguments.

    `code`: at most `items`, the bodies of functions in the texts of `held_out`, which should be documents that the run
    does not train on; the other domains do not look at it. They ask by turns with multiple choice and open answer.
    `math`: exactly `items`, over facts that no seed's documents state. `chemistry`: at most `items` (there are some
    thousand), over compounds that no seed's documents name. `commonsense`: at most `items`, over facts of the world of
    this seed that its documents do not state, so the seed must be theirs. Raises ValueError for an unknown name or a
    negative count.
    """
    _check(name, "items", items)
    if name == "code":
        return python_code.items(items, seed, held_out)
    makers = {
        "chemistry": nomenclature_items.items,
        "commonsense": small_world_items.items,
        "math": arithmetic_items.items,
    }
    return makers[name](items, seed)


def _check(name: str, what: str, count: int) -> None:
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"no built-in domain {name!r}: did you mean {nearest!r}? There are {', '.join(NAMES)}")
    if count < 0:
        raise ValueError(f"{what} must not be negative, got {count}")
