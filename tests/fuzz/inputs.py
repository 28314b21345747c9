"""Malformed bytes and trees, made from valid ones.

    MOETRAIN_FUZZ=1500 pytest tests/fuzz

tries that many random inputs per test; plain ``pytest`` tries a few, always the same.
"""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_ASKED = os.environ.get("MOETRAIN_FUZZ")

fuzz = settings(
    max_examples=int(_ASKED or 25),
    derandomize=_ASKED is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check_refusal(error: Exception, place: object) -> None:
    """An error must be one line of reasonable length that names its place."""
    message = str(error)
    assert str(place) in message
    assert "\n" not in message
    assert 0 < len(message) < 3000


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few bytes flipped, removed, inserted, repeated or truncated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("flip", "take", "put", "repeat", "cut"))):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "take":
                del data[at : at + draw(st.integers(1, 64))]
            case "put":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                data[at:at] = data[at : at + 64] * draw(st.integers(1, 50))
            case "cut":
                del data[at:]
    return bytes(data)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "/etc/passwd", "$HOME", "~", "\x00", "\ud800", "1e999", "-0", "null", "!!python/none"])
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def altered(draw: st.DrawFn, tree: object) -> object:
    """A tree of dicts and lists with one or two of its parts replaced, removed or added."""
    copy = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        node, path = copy, []
        while isinstance(node, dict | list) and node and (not path or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            path.append((node, key))
            node = node[key]
        if not path:
            return draw(TREES)
        parent, key = path[-1]
        match draw(st.sampled_from(("replace", "remove", "add"))):
            case "replace":
                parent[key] = draw(TREES)
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(TREES)
            case _:
                parent.append(draw(TREES)) if isinstance(parent, list) else parent.clear()
    return copy
