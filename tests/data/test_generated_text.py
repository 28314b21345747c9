"""The generated domains' text, byte for byte: runs are compared with earlier ones, so the text must not change.

If a change of the text is intended, raise the generator's number in `moetrain.data.builtin.VERSIONS` and replace the
hashes here.
"""

import hashlib

import pytest

from moetrain.data import builtin

SIZE = 400_000
HASHES = [
    ("math", {}, ("57798e6441017b70", "937e2dc0d2b3b283")),
    ("commonsense", {}, ("f417653811470464", "a332aa591b44bb38")),
    ("formal", {}, ("8d29137590272a76", "f2947e342c853458")),
    ("formal", {"rule": "copy"}, ("294d01f460113853", "39c766528106b4bc")),
    ("formal", {"rule": "brackets", "length": 9}, ("4991ccee7ba76810", "8fd0693f2483ea9f")),
    ("modular", {}, ("e567d5b3e4969eb2", "6c54004924e114ee")),
    ("modular", {"operation": "subtract", "modulus": 97}, ("49f8c0aea64c52cd", "9b8d7ab2d527cd68")),
    ("modular", {"operation": "multiply"}, ("57dd685a94cfd3d9", "686998265fb5e678")),
    ("modular", {"operation": "divide", "sign": "%", "trained_share": 0.4}, ("2b03b270a5e811fa", "6f0bf8342b55d1d6")),
    ("random_answers", {}, ("5c6b81c755dd68e4", "28b82be84600ba5f")),
    ("random_answers", {"operation": "divide"}, ("353b83a0e3c8fd59", "0f5a1c4f973393e2")),
    ("random_answers", {"like": "math"}, ("4480211d4f617992", "e8f9bb26c0f283c8")),
]


def as_plain(text):
    return text if isinstance(text, str) else (text.text, text.answer, text.heldout)


def digest(name: str, seed: int, **options: object) -> str:
    """A hash of a domain's documents, held-out documents and probe items."""
    texts = [*builtin.documents(name, size=SIZE, seed=seed, **options)]
    texts += builtin.held_out_documents(name, seed=seed, **options)
    items = builtin.probe_items(name, items=400, seed=seed, **options)
    if name in builtin.PLANTED:
        items += builtin.trained_items(name, items=400, seed=seed, **options)
    made = ([as_plain(text) for text in texts], [sorted(item.items()) for item in items])
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "options", "expected"), HASHES, ids=[f"{n}-{o}" for n, o, _ in HASHES])
def test_text_and_items_are_those_of_earlier_versions(name, options, expected):
    assert tuple(digest(name, seed, **dict(options)) for seed in (0, 1)) == expected
