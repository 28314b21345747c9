"""Fuzzing of configurations and command lines: settings, or an error of one line."""

from contextlib import suppress

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moetrain.config import Settings, SettingsError, describe_settings, load_settings
from moetrain.expression import parse_filter
from moetrain.train import main
from tests.fuzz.inputs import LEAVES, TREES, altered, check_refusal, damaged, fuzz

BASE = {
    "run": {"name": "a", "seed": 3},
    "data": {
        "domains": {
            "math": {"builtin": "math", "size": 1000, "weight": 1.5},
            "files": {"path": ["a*.jsonl", "b"], "filter": "x > 3 and len(y) < 4", "text_field": "t", "weight": 0.5},
        },
        "mixture": "weights",
        "phases": [{"from_tokens": 10, "weights": {"math": 1.0}}],
    },
    "model": {"num_experts": 8, "num_key_value_heads": None},
    "optim": {"learning_rate": 1.0e-3},
    "train": {"batch_rows": 16, "micro_batch_rows": 4},
}
YAML = yaml.safe_dump(BASE, sort_keys=False).encode()
# A billion laughs: each line is nine times the one before.
LAUGHS = b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 9 if n else b"x") for n in range(12))
KEYS = st.sampled_from([key.replace("NAME", "math") for key, *_ in describe_settings()])


def loads_or_says(path, overrides=()):
    try:
        assert isinstance(load_settings(path, overrides), Settings)
    except SettingsError as error:
        check_refusal(error, "")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("settings") / "config.yaml"


def test_the_original_configuration_is_valid(file):
    file.write_bytes(YAML)
    load_settings(file)


@given(damaged(YAML))
@fuzz
@example(b"[" * 5000)
@example(b"a: " * 1000)
@example(b"run: &a [*a]")
@example(b"run: {? [a] : b}")
@example(b"{1: 2, null: 3, [a]: 4}")
@example(LAUGHS)
@example(b"run: {name: !!python/object/apply:os.system ['true']}")
@example(b"data: {domains: {a: {path: 2020-99-99}}}")
@example("data: {domains: {a: {path: \u0085}}}".encode())
@example(b"run: {seed: 0x" + b"f" * 5000 + b"}")
@example(b"run: {seed: " + b"9" * 4400 + b"}")
def test_damaged_files(file, content):
    file.write_bytes(content)
    loads_or_says(file)


@given(altered(BASE) | TREES)
@fuzz
@example({"\n": None})
@example({"data": {"domains": {"a\nb": {"builtin": "math", "sizes": 3}, "c": {"x": "\n"}}}})
@example({"run": {"name": "a\nb"}})
def test_altered_trees(file, tree):
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    loads_or_says(file)


@given(st.lists(st.tuples(KEYS, LEAVES | st.text(max_size=30)), max_size=3), st.text(max_size=30))
@fuzz
@example([], "data.domains.a.path={")
@example([], "run=1")
@example([("run.seed", "9" * 4400)], "=")
def test_overrides(file, pairs, anything):
    file.write_bytes(YAML)
    loads_or_says(file, [f"{key}={value}" for key, value in pairs])
    loads_or_says(file, [*(f"{key}={value}" for key, value in pairs), anything])


@given(st.lists(st.text(max_size=20) | KEYS, max_size=3))
@fuzz
def test_command_lines(monkeypatch_module, arguments):
    assert main(arguments) in (0, 2)


SIGNS = st.sampled_from("()[],.:~-\\")
WORDS = st.sampled_from(
    ["x", "y", "len", "and", "or", "not", "in", "is", "if", "==", "<", ">=", "3", "'a'", "None", "f'"]
)
NAMES = st.sampled_from(["__class__", "lambda", "**", "f'"])


@given(
    st.lists(WORDS | SIGNS | NAMES, max_size=12).map(" ".join) | st.text(max_size=40),
    st.fixed_dictionaries({"x": LEAVES, "y": LEAVES}),
)
@fuzz
@example("(" * 3000 + "x" + ")" * 3000, {"x": 1, "y": 1})
@example("not " * 2400 + "x", {"x": 1, "y": 1})
def test_filters(text, row):
    try:
        keep = parse_filter(text)
    except ValueError:
        return
    with suppress(KeyError, TypeError):  # as `Filter.keeps` says
        assert keep.keeps(row) in (True, False)
