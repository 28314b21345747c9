"""One source becomes a domain for each value of a field."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.config import SettingsError, load_settings
from moetrain.data import portions, split
from moetrain.data.corpus import prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.split import split_domains
from moetrain.data.stream import training_stream
from moetrain.train import main

SOURCES = ("wiki", "books", "Stack Exchange")
RECORDS = [
    {
        "text": f"Text {n} of {SOURCES[n % 3]}, long enough to be a sample of some tokens.",
        "meta": {"source": SOURCES[n % 3], "year": 2000 + n % 2, "good": n % 2 == 0},
        "answer": [0, 4],
    }
    for n in range(90)
]


def write(folder):
    (folder / "lines").mkdir()
    for part in range(3):
        records = RECORDS[part * 30 : (part + 1) * 30]
        (folder / "lines" / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "tables" / "a.parquet", row_group_size=16)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def settings(folder, *overrides):
    base = [f"data.root={folder}", f"data.cache_dir={folder / 'cache'}", "tokenizer.vocab_size=320"]
    base += ["data.heldout_share=0.2", "data.seq_len=64", "panel.tokens=16"]
    return load_settings(None, [*base, *overrides])


BY = "data.domains.web.by=meta.source"
NAMES = ["web_Stack_Exchange", "web_books", "web_wiki"]


@pytest.mark.parametrize("source", ["path=lines", "path=tables", "hub=tables"])
def test_each_value_is_a_domain_of_its_own_rows(folder, source, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(portions, "PORTION_BYTES", 2000)  # several portions
    chosen = split_domains(settings(folder, f"data.domains.web.{source}", BY, "data.domains.web.repeats=2"))
    assert list(chosen.data.domains) == NAMES
    assert {domain.repeats for domain in chosen.data.domains.values()} == {2}
    corpus = prepare_corpus(chosen)
    for domain, value in zip(corpus.domains, sorted(SOURCES), strict=True):
        report, index = domain.report, domain.index[~domain.index["repeated"]]
        assert (report.rows, report.documents, report.filtered, report.bad) == (90, 30, 0, 0)
        found = {
            corpus.tokenizer.decode(domain.tokens[row["start"] : row["start"] + row["length"]].tolist())
            for row in index
        }
        assert found == {record["text"] for record in RECORDS if record["meta"]["source"] == value}
        assert (index["answer_start"] == 0).all()
    assert len(training_stream(corpus, chosen).samples) > 0


def test_the_split_settings_are_saved_and_load_unchanged(folder):
    chosen = split_domains(settings(folder, "data.domains.web.path=lines", BY))
    (folder / "saved.yaml").write_text(chosen.to_yaml())
    again = load_settings(folder / "saved.yaml", ["run.name=run"])
    assert again == chosen
    assert split_domains(again) == again
    plain = settings(folder, "data.domains.web.path=lines")
    assert split_domains(plain) is plain


@pytest.mark.parametrize(
    ("field", "names"),
    [("meta.year", ["web_2000", "web_2001"]), ("meta.good", ["web_false", "web_true"])],
)
def test_whole_numbers_and_truth_values_name_domains_too(folder, field, names):
    for source in ("lines", "tables"):
        chosen = settings(folder, f"data.domains.web.path={source}", f"data.domains.web.by={field}")
        assert list(split_domains(chosen).data.domains) == names


def test_values_that_give_the_same_name_are_numbered(tmp_path):
    records = [{"text": f"text {n}", "source": value} for n, value in enumerate(["a b", "a_b", "a/b", "\u6f22", "-"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chosen = split_domains(settings(tmp_path, "data.domains.d.path=a.jsonl", "data.domains.d.by=source"))
    assert {name: domain.value for name, domain in chosen.data.domains.items()} == {
        "d_-": "-",
        "d_a_b": "a b",
        "d_a_b-2": "a/b",
        "d_a_b-3": "a_b",
        "d_other": "\u6f22",
    }


def test_too_many_values_are_an_error_and_both_remedies_help(folder):
    base = ["data.domains.web.path=lines", BY]
    with pytest.raises(
        DataError, match=r"data\.domains\.web\.by: 'meta\.source' has 3 values, but most_domains is 2"
    ) as e:
        split_domains(settings(folder, *base, "data.domains.web.most_domains=2"))
    remedy = str(e.value).partition("by filter: ")[2].partition(" (the most frequent)")[0]
    chosen = [*base, "data.domains.web.most_domains=2", f"data.domains.web.filter={remedy}"]
    assert len(split_domains(settings(folder, *chosen)).data.domains) == 2
    assert list(split_domains(settings(folder, *base, "data.domains.web.most_domains=3")).data.domains) == NAMES
    with pytest.raises(DataError, match="most_domains is 2"):  # also where the values are in the cache
        split_domains(settings(folder, *base, "data.domains.web.most_domains=2"))


def test_counting_ends_where_a_field_has_a_value_for_each_row(folder, monkeypatch):
    monkeypatch.setattr(split, "_COUNTED", 20)
    with pytest.raises(DataError, match=r"'text' has more than 20 values, but most_domains is 16: raise it"):
        split_domains(settings(folder, "data.domains.web.path=tables", "data.domains.web.by=text"))


def test_the_values_are_found_once_and_again_when_the_source_changes(folder, monkeypatch):
    read = []
    real = split.count_values
    monkeypatch.setattr(split, "count_values", lambda *given: (read.append(1), real(*given))[1])
    chosen = settings(folder, "data.domains.web.path=tables", BY)
    for _ in range(2):
        assert list(split_domains(chosen).data.domains) == NAMES
    assert len(read) == 1
    with open(folder / "tables" / "more.jsonl", "w") as file:
        file.write(json.dumps(RECORDS[0] | {"meta": {"source": "new"}}) + "\n")
    assert "web_new" in split_domains(chosen).data.domains
    assert len(read) == 2


def test_rows_without_a_value_are_bad_rows_and_the_remedy_helps(folder):
    with open(folder / "lines" / "0.jsonl", "a") as file:
        file.write('{"text": "no source", "meta": {"source": null}}\n{"text": "none"}\n')
    base = ["data.domains.web.path=lines", BY]
    chosen = split_domains(settings(folder, *base))
    with pytest.raises(DataError, match=r"2 of 92 lines .*: field 'meta\.source', which by names, is null: leave such"):
        prepare_corpus(chosen)
    kept = settings(folder, *base, "data.max_bad_share=0.1")
    assert [domain.report.bad for domain in prepare_corpus(split_domains(kept)).domains] == [2, 2, 2]
    filtered = settings(folder, *base, "data.max_bad_share=0.02", "data.domains.web.filter=meta.source != None")
    places = prepare_corpus(split_domains(filtered)).domains[0].report.bad_places
    assert len(places) == 1
    assert "no field 'meta.source' for the filter" in places[0]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("meta.origin", r"no column 'meta\.origin' .*: correct by"),
        ("answer", r"no row has text and a value of 'answer', first .*is a list: leave such rows out"),
    ],
)
def test_a_field_that_cannot_split_is_an_error(folder, field, message):
    with pytest.raises(DataError, match=message):
        split_domains(settings(folder, "data.domains.web.path=tables", f"data.domains.web.by={field}"))


def test_names_that_are_taken_are_an_error(folder):
    with pytest.raises(DataError, match=r"data\.domains\.web\.by makes a domain web_wiki, as there is already"):
        split_domains(settings(folder, "data.domains.web.path=lines", BY, "data.domains.web_wiki.builtin=code"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.domains.web.builtin=code", BY], "by cannot be used on a built-in domain"),
        (["data.domains.web.hub=x", "data.domains.web.streaming=true", BY], "by cannot be used with streaming"),
        (["data.domains.web.path=x", "data.domains.web.value=a"], "value and most_domains have no effect without by"),
        (
            [
                *("data.domains.web.path=x", BY, "data.domains.web.weight=1", "data.mixture=weights"),
                "data.phases=[{from_tokens: 5, weights: {web: 1}}]",
            ],
            r"phases cannot weigh the domains that data\.domains\.web\.by makes",
        ),
    ],
)
def test_settings_that_do_not_go_with_by_are_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(None, overrides)


def test_settings_that_are_not_split_are_refused_by_the_preparation(folder):
    with pytest.raises(DataError, match=r"data\.domains\.web\.by: not split yet"):
        prepare_corpus(settings(folder, "data.domains.web.path=lines", BY))


def test_a_run_trains_on_the_domains_and_says_so(folder, monkeypatch):
    trained = {}

    def start_ranks(settings):
        trained.update(settings.data.domains)
        raise SettingsError("enough")

    monkeypatch.setattr("moetrain.training_run.start_ranks", start_ranks)
    overrides = [f"data.root={folder}", "data.domains.web.path=lines", BY, f"data.cache_dir={folder / 'cache'}"]
    (folder / "run.yaml").write_text("{}")
    assert main([str(folder / "run.yaml"), *overrides]) == 2
    assert list(trained) == NAMES
