import gzip
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetrain
from moetrain.config import SettingsError, load_settings
from moetrain.data import builtin
from moetrain.data.documents import DataError, DomainReport, document_id, is_heldout, read_documents
from moetrain.data.portions import fingerprint


def read(folder, *overrides, pattern="*.jsonl*"):
    base = [f"data.root={folder}", f"data.domains.d.path={pattern}", *overrides]
    settings = load_settings(None, base)
    report = DomainReport("d")
    documents = list(read_documents("d", settings.data.domains["d"], settings.data, 0, set(), report))
    return documents, report


def lines(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)


def test_plain_and_gz_files_give_the_same_documents(tmp_path):
    records = [{"text": f"document {n}"} for n in range(20)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines(tmp_path / "a" / "x.jsonl", *records)
    lines(tmp_path / "b" / "x.jsonl.gz", *records)
    assert read(tmp_path / "a")[0] == read(tmp_path / "b")[0]


def test_exact_duplicates_are_dropped_and_counted_in_any_file(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, {"text": "one"})
    lines(tmp_path / "b.jsonl", {"text": "two"}, {"text": "three"}, {"text": "  "})
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert (report.documents, report.duplicates, report.empty) == (3, 2, 1)


def test_another_field_can_hold_the_text(tmp_path):
    lines(tmp_path / "a.jsonl", {"content": "hello"})
    assert read(tmp_path, "data.domains.d.text_field=content")[0][0].text == "hello"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('{"other": "x"}', "no field 'text' (fields: other; set text_field)"),
        ('{"text": 5}', "is a int, not text"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": ["a", 5]}', "is a list, not text"),
        ('{"text": {"a": "b"}}', "is a dict, not text"),
        ('{"n": 1}', "no field 'text' (fields: n; none of them is text)"),
        ('{"data": {"body": "x"}}', "no field 'text' (fields: data.body; set text_field)"),
        ('{"text": "a\\ud800b"}', "a lone surrogate at character 1"),
    ],
)
def test_an_unreadable_line_is_counted_with_its_place_and_too_many_are_an_error(tmp_path, bad, message):
    lines(tmp_path / "a.jsonl", *({"text": f"good {n}"} for n in range(9)), bad)
    documents, report = read(tmp_path, "data.max_bad_share=0.1")
    assert len(documents) == 9
    assert report.bad == 1
    assert "a.jsonl:10: " in report.bad_places[0]
    assert message in report.bad_places[0]
    with pytest.raises(DataError, match=r"data\.domains\.d: 1 of 10 lines cannot be used, first .*a\.jsonl:10: .*"):
        read(tmp_path, "data.max_bad_share=0.05")


def test_a_truncated_gz_names_file_and_line(tmp_path):
    lines(tmp_path / "a.jsonl.gz", *({"text": f"document {n} " * 50} for n in range(2000)))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the file ends or breaks here"):
        read(tmp_path)


def test_an_empty_domain_and_a_missing_path_are_errors_of_one_line(tmp_path):
    lines(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"data\.domains\.d: no documents in \*\.jsonl\*: give one that holds text"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"data\.domains\.d\.path: no file at .*none\.jsonl: correct the path"):
        read(tmp_path, pattern="none.jsonl")
    with pytest.raises(SettingsError, match=r"data\.domains\.d\.path: environment variable NO_SUCH_ONE is not set"):
        read(tmp_path, pattern="$NO_SUCH_ONE/x")


def test_a_domain_of_which_nothing_is_left_says_why_and_the_remedy_helps(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "one", "n": 1})
    with pytest.raises(DataError, match=r"no documents in a\.jsonl, whose 1 rows the filter drops: correct the filter"):
        read(tmp_path, "data.domains.d.filter=n > 1", pattern="a.jsonl")
    assert len(read(tmp_path, "data.domains.d.filter=n > 0", pattern="a.jsonl")[0]) == 1
    settings = load_settings(None, [f"data.root={tmp_path}", "data.domains.d.path=a.jsonl"])
    with pytest.raises(DataError, match=r"as earlier domains hold all of them: leave this domain out, or give another"):
        list(read_documents("d", settings.data.domains["d"], settings.data, 0, {document_id("one")}, DomainReport("d")))


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", {"text": "one"})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moetrain.data.sources.opening._head", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\): allow reading it"):
        read(tmp_path, pattern="a.jsonl")


def test_size_takes_documents_up_to_that_many_bytes(tmp_path):
    lines(tmp_path / "a.jsonl", *({"text": f"{n:010d}"} for n in range(10)))
    documents, report = read(tmp_path, "data.domains.d.size=35")
    assert len(documents) == 3
    assert report.text_bytes == 30


def test_the_fingerprint_follows_content_and_not_time_or_place(tmp_path):
    def of(folder, seed=0):
        settings = load_settings(None, [f"data.root={folder}", "data.domains.d.path=x.jsonl"])
        return fingerprint("d", settings.data.domains["d"], settings.data, seed)

    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "x.jsonl", {"text": text})
    assert of(tmp_path / "a") == of(tmp_path / "b") != of(tmp_path / "c")


@pytest.fixture
def generators(tmp_path):
    """A copy of the package, whose source a test may change."""
    shutil.copytree(Path(moetrain.__file__).parent, tmp_path / "moetrain", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "moetrain" / "data" / "builtin"


def fingerprints(folder, *names):
    """The fingerprints of built-in domains as the package below ``folder`` gives them."""
    code = (
        "import sys; from moetrain.config import load_settings; from moetrain.data.portions import fingerprint\n"
        "for name in sys.argv[1:]:\n"
        "    data = load_settings(None, [f'data.domains.d.builtin={name}']).data\n"
        "    print(*(fingerprint('d', data.domains['d'], data, seed) for seed in (0, 1)))"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, *names]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=True)
    return [tuple(line.split()) for line in run.stdout.decode().splitlines()]


def test_the_fingerprint_of_a_built_in_domain_follows_its_version_and_seed_and_not_its_source(generators):
    folder = generators.parents[2]
    before = fingerprints(folder, *builtin.NAMES)
    assert len({each for pair in before for each in pair}) == 2 * len(builtin.NAMES)
    for path in generators.glob("*.py"):
        path.write_text(path.read_text() + "# A comment.\n")
    assert fingerprints(folder, *builtin.NAMES) == before
    raised = builtin.VERSIONS | {"math": builtin.VERSIONS["math"] + 1}
    with open(generators / "__init__.py", "a") as file:
        file.write(f"VERSIONS = {raised}\n")
    after = fingerprints(folder, *builtin.NAMES)
    changed = {name for name, old, new in zip(builtin.NAMES, before, after, strict=True) if old != new}
    assert changed == {"math"}


def test_the_fingerprint_of_code_follows_the_library(tmp_path, monkeypatch):
    def of(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(text)
        (tmp_path / name / "test").mkdir()
        (tmp_path / name / "test" / "not_read.py").write_text(name)
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / name)})
        data = load_settings(None, ["data.domains.d.builtin=code"]).data
        return fingerprint("d", data.domains["d"], data, 0)

    assert of("a", "x = 1\n") == of("b", "x = 1\n") != of("c", "x = 2\n")


@given(st.text(), st.integers(1, 9))
def test_ids_are_64_bits_of_content_and_copies_differ(text, copy):
    assert 0 <= document_id(text) < 2**64
    assert document_id(text) == document_id(text) != document_id(text, copy)


def test_ids_do_not_change_between_versions():
    # Records of earlier runs are joined by these ids.
    assert document_id("hello") == 9022087748821825191
    assert document_id("hello", 1) == 17712156616301609419
    assert is_heldout("hello", 0.5) is True


def test_the_held_out_share_is_as_set_and_smaller_shares_are_subsets():
    texts = [f"text {n}" for n in range(20_000)]
    small, large = ({t for t in texts if is_heldout(t, share)} for share in (0.05, 0.1))
    assert small < large
    assert abs(len(large) / len(texts) - 0.1) < 0.01
