"""Domains that need no network: the Python standard library's source (`code`; `functions`), and generated text.

`math` is arithmetic, `commonsense` a small world of people and things. The planted domains are for studies, since it is
known what can be learned from them: `modular` and `formal` have a rule, with a share of the facts held out;
`random_answers` has none. They take options (see `moetrain.config.facts.FactSettings`). Which facts are trained depends
on options and seed, so all functions here must be given the same ones.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from moetrain.data.builtin import (
    arithmetic,
    formal,
    modular,
    planted,
    python_code,
    python_functions,
    random_answers,
    small_world_text,
)
from moetrain.data.builtin.planted import MarkedText
from moetrain.data.builtin.probe import Item
from moetrain.data.builtin.python_library import library_digest

__all__ = [
    "NAMES",
    "PLANTED",
    "VERSIONS",
    "MarkedText",
    "documents",
    "generator_fingerprint",
    "held_out_documents",
    "probe_items",
    "trained_items",
]

TABLES: dict[str, Callable[..., planted.Table]] = {
    "formal": formal.table,
    "modular": modular.table,
    "random_answers": random_answers.table,
}
PLANTED = tuple(TABLES)

VERSIONS = {
    "code": 1,
    "commonsense": 1,
    "formal": 1,
    "functions": 1,
    "math": 1,
    "modular": 1,
    "random_answers": 1,
}
"""Version of each generator. Raise it with every change of the generated text: cached data is found by it."""

NAMES: tuple[str, ...] = ("code", "commonsense", "functions", "math", *PLANTED)
OF_THE_LIBRARY = ("code", "functions")


def documents(name: str, *, size: int, seed: int, **options: Any) -> Iterator[str | MarkedText]:
    """Yield the texts of a built-in domain until about `size` bytes of UTF-8 have been yielded.

    The last text is complete, so the total is `size` or a little more. `code` and `functions` end earlier if the
    standard library does (about 10 and 5 MB), a planted domain with its table: it states each trained fact once and
    marks the answer. The texts depend on name, seed and options only (those of the library: also on the installed
    Python); a smaller size gives the first of them.

    Raises ValueError for an unknown name, a negative size, or options that the domain does not take.
    """
    _check(name, "size", size, options)
    if name in PLANTED:
        return planted.documents(TABLES[name](seed, **options), size)
    makers = {
        "code": python_code.documents,
        "commonsense": small_world_text.documents,
        "functions": python_functions.documents,
        "math": arithmetic.documents,
    }
    return makers[name](size, seed)


def generator_fingerprint(name: str) -> str:
    """Return a text that changes whenever the documents of a built-in domain do for the same seed and options.

    It is the version of the generator; for `code` and `functions`, which read the standard library, also a hash of the
    library's files.
    """
    version = f"{name} {VERSIONS.get(name)}"
    return f"{version} {library_digest()}" if name in OF_THE_LIBRARY else version


def held_out_documents(name: str, *, seed: int, **options: Any) -> Iterator[MarkedText]:
    """Yield the held-out facts of a planted domain as documents marked as held out; nothing for other domains."""
    _check(name, "size", 0, options)
    facts = TABLES[name](seed, **options).held_out if name in PLANTED else ()
    return (fact.marked(heldout=True) for fact in facts)


def probe_items(name: str, *, items: int, seed: int, held_out: Iterable[str] = (), **options: Any) -> list[Item]:
    """Return held-out probe items in the form of the benchmark files; none for `functions`.

    `code`: at most `items`, the bodies of functions in `held_out`, which should be documents that the run does not
    train on. `math`: exactly `items`, over facts that are held out for every seed. `commonsense`: at most `items`, over
    facts that the documents of the same seed do not state. These two alternate between multiple choice and open answer.
    Planted domains: at most `items`, two for each held-out fact; the seed must be that of the documents.

    Raises ValueError as `documents` does.
    """
    _check(name, "items", items, options)
    if name in PLANTED:
        return _planted_items(name, items, seed, options, trained=False)
    if name == "functions":
        return []
    if name == "code":
        return python_code.items(items, seed, held_out)
    return (small_world_text if name == "commonsense" else arithmetic).items(items, seed)


def trained_items(name: str, *, items: int, seed: int, **options: Any) -> list[Item]:
    """Return at most `items` items about trained facts of a planted domain, in the form of `probe_items`.

    Their tasks end in `_trained`. Raises ValueError as `documents` does, and for a domain that is not planted.
    """
    _check(name, "items", items, options)
    if name not in PLANTED:
        raise ValueError(f"built-in domain {name!r} has no table of trained facts; {', '.join(PLANTED)} have")
    return _planted_items(name, items, seed, options, trained=True)


def _planted_items(name: str, items: int, seed: int, options: dict[str, Any], trained: bool) -> list[Item]:
    random = Random(f"{name} items {seed} {trained}").random
    return planted.items(TABLES[name](seed, **options), items, domain=name, trained=trained, random=random)


def _check(name: str, what: str, count: int, options: dict[str, Any]) -> None:
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"no built-in domain {name!r}: did you mean {nearest!r}? There are {', '.join(NAMES)}")
    if count < 0:
        raise ValueError(f"{what} must not be negative, got {count}")
    names = list(inspect.signature(TABLES[name]).parameters)[1:] if name in TABLES else []
    if unknown := [option for option in options if option not in names]:
        raise ValueError(f"built-in domain {name!r} takes no option {unknown[0]!r}: {', '.join(names) or 'none'}")
