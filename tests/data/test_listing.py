"""What a folder or pattern holds is read, or left out with a count and a name, or refused with a remedy that helps."""

import gzip
import json
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError, DomainReport, read_documents
from moetrain.data.sources.files import list_files
from moetrain.data.stream import training_stream
from moetrain.loggers.preview import data_summary, data_table


def read(folder, path, *overrides):
    chosen = load_settings(None, [f"data.root={folder}", f"data.domains.d.path={path}", *overrides])
    report = DomainReport("d")
    return [d.text for d in read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report)], report


def lines(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def table(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), path)


def files(root, *names):
    """Files of these names; each holds its own name."""
    for name in names:
        path = root / name
        if path.name.endswith(".parquet"):
            table(path, name)
        elif path.name.endswith((".json", ".jsonl")):
            lines(path, name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)


def test_linked_files_and_folders_are_read_once(tmp_path):
    files(tmp_path, "folder/a.jsonl", "elsewhere/deep/b.jsonl", "elsewhere/c.jsonl")
    (tmp_path / "folder" / "linked").symlink_to("../elsewhere")
    (tmp_path / "folder" / "z.jsonl").symlink_to("../elsewhere/c.jsonl")
    (tmp_path / "folder" / "same").symlink_to("../elsewhere/deep")
    texts, report = read(tmp_path, "folder")
    assert sorted(texts) == ["elsewhere/c.jsonl", "elsewhere/deep/b.jsonl", "folder/a.jsonl"]
    assert report.duplicates == 1  # z.jsonl, a file of its own name


def test_of_a_folder_of_all_sorts_all_that_can_be_read_is_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for number, part in enumerate(("folder/0", "folder/1", "elsewhere/2")):
        lines(tmp_path / f"{part}.jsonl", *(f"text {number} {n}" for n in range(40)))
    (tmp_path / "folder" / "2.csv").write_text("text\n" + "row\n" * 40)
    (tmp_path / "folder" / "linked").symlink_to("../elsewhere")
    plain, packed = ((tmp_path / "folder" / f"{n}.jsonl").read_bytes() for n in (0, 1))
    (tmp_path / "folder" / "0.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "folder" / "1.jsonl.zst").write_bytes(pa.compress(packed, codec="zstd", asbytes=True))
    for name in "01":
        (tmp_path / "folder" / f"{name}.jsonl").unlink()
    texts, report = read(tmp_path, "folder")
    assert len(texts) == 120
    assert report.left_out_files == [f"1 of a kind that is not read ({tmp_path}/folder/2.csv)"]
    pytest.importorskip("zstandard")
    chosen = load_settings(None, [f"data.root={tmp_path}", "data.domains.d.hub=folder"])
    report = DomainReport("d")
    found = [d.text for d in read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report)]
    assert sorted(found) == sorted(texts[:80])
    assert report.left_out_files == [f"2 in no split of it ({tmp_path}/folder/2.csv, {tmp_path}/folder/linked)"]


def test_links_that_lead_round_in_a_circle_are_counted(tmp_path):
    files(tmp_path, "folder/a.jsonl", "folder/sub/b.jsonl")
    (tmp_path / "folder" / "sub" / "up").symlink_to("..")
    (tmp_path / "folder" / "top").symlink_to(tmp_path)
    texts, report = read(tmp_path, "folder")
    assert texts == ["folder/a.jsonl", "folder/sub/b.jsonl"]
    assert report.left_out == 2
    assert report.left_out_files[0].startswith("2 links to a folder that is read already or holds this one (")


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path):
    files(
        tmp_path,
        "d/a.jsonl",
        "d/b.csv",
        "d/c.csv",
        "d/e.csv",
        "d/f/g.csv",
        "d/.cache/x.jsonl",
        "d/.hidden",
        "d/LICENSE",
    )
    (tmp_path / "d" / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "d" / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "d" / "pipe.jsonl")
    texts, report = read(tmp_path, "d")
    assert texts == ["d/a.jsonl"]
    assert report.left_out == 10
    folder = tmp_path / "d"
    assert set(report.left_out_files) == {
        f"2 hidden ({folder}/.cache, {folder}/.hidden)",
        f"3 broken links and the like ({folder}/gone.jsonl, {folder}/itself, {folder}/pipe.jsonl)",
        f"5 of a kind that is not read ({folder}/LICENSE, {folder}/b.csv, {folder}/c.csv, ...)",
    }


@pytest.mark.parametrize(
    ("names", "read_ones"),
    [
        (["a.jsonl", "b.parquet", "README.md", "load.py"], ["a.jsonl", "b.parquet"]),
        (["b.parquet", "dataset_info.json", "meta.json", "README.md"], ["b.parquet"]),
        (["a.jsonl", "b.json", "dataset_infos.json"], ["a.jsonl", "b.json"]),
        (["b.json", "README.md", "LICENSE.txt"], ["b.json"]),
        (["README.md"], ["README.md"]),
        (["main.py", "package.json", "README.md"], ["README.md", "main.py"]),
        (["large.py", "package.json", "README.md", "fixture.parquet", "some.jsonl"], ["README.md", "large.py"]),
        (["README.md", "dataset_info.json"], ["README.md"]),
    ],
)
def test_a_data_set_s_own_papers_are_not_read_as_data(tmp_path, names, read_ones):
    files(tmp_path / "d", *names)
    if "large.py" in names:
        (tmp_path / "d" / "large.py").write_text("large.py".ljust(100_000))
    for path in ("d", "d/*", "d/**/*"):
        texts, report = read(tmp_path, path)
        assert [text.strip() for text in texts] == read_ones
        assert report.left_out == len(names) - len(read_ones)
    for name in names:
        if "dataset_info" not in name:
            assert [text.strip() for text in read(tmp_path, f"d/{name}")[0]] == [name]


def test_a_folder_of_both_rows_and_text_is_refused_and_the_patterns_help(tmp_path):
    files(tmp_path, "d/a.jsonl", "d/sub/b.jsonl", "d/notes.txt", "d/more.txt")
    with pytest.raises(
        DataError, match=r"d holds rows \(.*a\.jsonl, .*\) and text \(.*more\.txt.*: give a pattern"
    ) as e:
        read(tmp_path, "d")
    assert str(e.value).endswith("such as FOLDER/**/*.jsonl or FOLDER/**/*.txt")
    assert read(tmp_path, "d/**/*.jsonl")[0] == ["d/a.jsonl", "d/sub/b.jsonl"]
    assert read(tmp_path, "d/**/*.txt")[0] == ["d/more.txt", "d/notes.txt"]
    assert len(read(tmp_path, "[d/**/*.txt, d/**/*.jsonl]")[0]) == 4


def test_folders_that_a_pattern_matches_are_read_like_named_ones(tmp_path):
    files(tmp_path, "p/part-0.jsonl", "p/part-1/x.jsonl", "p/part-1/deep/y.jsonl", "p/other/z.jsonl", "p/part-2/q.csv")
    texts, report = read(tmp_path, "p/part-*")
    assert texts == ["p/part-0.jsonl", "p/part-1/deep/y.jsonl", "p/part-1/x.jsonl"]
    assert report.left_out == 1
    assert read(tmp_path, "p/part-1*")[0] == ["p/part-1/deep/y.jsonl", "p/part-1/x.jsonl"]
    assert len(read(tmp_path, "p/**")[0]) == 4
    table(tmp_path / "CC-2024-10" / "000.parquet", "one")
    table(tmp_path / "CC-2024-18" / "000.parquet", "two")
    assert read(tmp_path, "CC-2024-*")[0] == ["one", "two"]
    with pytest.raises(
        DataError, match=r"no file at .*part-2\* can be read: 1 of a kind that is not read .*q\.csv is a"
    ):
        read(tmp_path, "p/part-2*")


def test_a_name_with_signs_of_patterns_is_taken_as_it_is_where_there_is_such_a_file(tmp_path):
    files(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert read(tmp_path, "a[1].jsonl")[0] == ["a[1].jsonl"]
    (tmp_path / "a[1].jsonl").unlink()
    assert read(tmp_path, "a[1].jsonl")[0] == ["a1.jsonl"]


def test_what_one_path_reads_another_does_not_leave_out(tmp_path):
    files(tmp_path, "d/a.jsonl", "d/README.txt", "d/LICENSE.txt")
    chosen = load_settings(None, [f"data.root={tmp_path}", "data.domains.d.path=[d, d/README.txt]"])
    report = DomainReport("d")
    list(read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report))
    assert (report.documents, report.left_out) == (2, 1)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    files(tmp_path, "d/a.jsonl", "d/locked/b.jsonl")
    real = os.scandir

    def scandir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked cannot be listed \(Permission denied\)"):
        read(tmp_path, "d")


# Files of unknown kinds that are given by name: each remedy is followed


def refusal(tmp_path, name):
    with pytest.raises(DataError) as caught:
        read(tmp_path, name)
    assert str(caught.value).startswith("data.domains.d.path: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_under_an_unknown_name_is_read_once_it_is_renamed(tmp_path):
    lines(tmp_path / "corpus.part1", "a text")
    assert "but holds text: rename it to end in .jsonl (one object a line) or .txt" in refusal(tmp_path, "corpus.part1")
    (tmp_path / "corpus.part1").rename(tmp_path / "corpus.part1.jsonl")
    assert read(tmp_path, "corpus.part1.jsonl")[0] == ["a text"]
    files(tmp_path, "LICENSE")
    assert "holds text: rename it" in refusal(tmp_path, "LICENSE")
    (tmp_path / "LICENSE").rename(tmp_path / "LICENSE.txt")
    assert read(tmp_path, "LICENSE.txt")[0] == ["LICENSE"]


def test_a_known_kind_under_an_unknown_name_is_read_once_it_is_renamed(tmp_path):
    table(tmp_path / "data.pq", "a text")
    assert "holds Parquet data: rename it to end in .parquet" in refusal(tmp_path, "data.pq")
    (tmp_path / "data.pq").rename(tmp_path / "data.parquet")
    assert read(tmp_path, "data.parquet")[0] == ["a text"]
    lines(tmp_path / "whole", "a text")
    (tmp_path / "corpus.zst").write_bytes(pa.compress((tmp_path / "whole").read_bytes(), codec="zstd", asbytes=True))
    assert "does not say what it holds: rename it, for instance to NAME.jsonl.zst" in refusal(tmp_path, "corpus.zst")
    (tmp_path / "corpus.zst").rename(tmp_path / "corpus.jsonl.zst")
    assert read(tmp_path, "corpus.jsonl.zst")[0] == ["a text"]


def test_packed_files_and_other_tables_say_what_to_do(tmp_path):
    lines(tmp_path / "a.jsonl", "a text")
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as packed:
        packed.write(tmp_path / "a.jsonl", "b.jsonl")
    assert "is packed in a way that is not read: unpack it" in refusal(tmp_path, "a.jsonl.zip")
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip") as packed:
        packed.extractall(tmp_path)
    assert read(tmp_path, "b.jsonl")[0] == ["a text"]
    files(tmp_path, "a.csv", "a.tar.gz", "a.parquet.gz")
    assert "is a table that is not read: write it as Parquet or JSON Lines" in refusal(tmp_path, "a.csv")
    assert "unpack it" in refusal(tmp_path, "a.tar.gz")
    assert "not read if compressed as a whole: decompress it" in refusal(tmp_path, "a.parquet.gz")
    (tmp_path / "a.bin").write_bytes(bytes(100))
    assert "convert it to JSON Lines or Parquet" in refusal(tmp_path, "a.bin")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert "gone.jsonl is a broken link or no file" in refusal(tmp_path, "gone.jsonl")


def test_lines_of_another_kind_are_not_told_to_allow_more(tmp_path):
    (tmp_path / "a.jsonl").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"2 of 2 lines cannot be used, .*: correct them, or leave out files that hold"):
        read(tmp_path, "a.jsonl")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "three"}\n')
    with pytest.raises(DataError, match=r"2 of 3 lines cannot be used, .* allow more by data\.max_bad_share"):
        read(tmp_path, "a.jsonl")
    assert read(tmp_path, "a.jsonl", "data.max_bad_share=0.7")[0] == ["three"]


# In the table and the summary


def test_the_summary_counts_and_names_what_is_left_out_as_it_is_now(tmp_path):
    lines(tmp_path / "d" / "a.jsonl", *(f"{n} words and more of them, as many as a sample needs" for n in range(60)))
    files(tmp_path, "d/b.csv")
    overrides = [f"data.root={tmp_path}", "data.domains.d.path=d", f"data.cache_dir={tmp_path / 'cache'}"]
    overrides += ["tokenizer.vocab_size=300", "data.heldout_share=0.2", "data.seq_len=64", "panel.tokens=16"]
    chosen = load_settings(None, overrides)

    def summary():
        corpus = prepare_corpus(chosen)
        stream = training_stream(corpus, chosen)
        return corpus.fingerprint, data_summary(corpus, stream, 1, chosen)

    first, found = summary()
    assert found["d"]["left_out"] == 1
    assert found["d"]["left_out_files"] == [f"1 of a kind that is not read ({tmp_path}/d/b.csv)"]
    headings, (cells,) = data_table(found)
    assert dict(zip(headings, cells, strict=True))["left out"] == "1"
    files(tmp_path, "d/c.csv")
    second, found = summary()
    assert second == first  # nothing that is read has changed
    assert found["d"]["left_out"] == 2
    for name in "bc":
        (tmp_path / "d" / f"{name}.csv").unlink()
    assert "left out" not in data_table(summary()[1])[0]


def test_a_local_data_set_names_the_files_that_datasets_leaves_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    lines(tmp_path / "hub" / "a.jsonl", "one", "two")
    files(tmp_path, "hub/b.csv", "hub/README.md", "hub/.gitattributes")
    chosen = load_settings(None, [f"data.root={tmp_path}", "data.domains.d.hub=hub"])
    report = DomainReport("d")
    assert len(list(read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report))) == 2
    assert report.left_out_files == [f"1 in no split of it ({tmp_path}/hub/b.csv)"]


def test_files_come_in_the_order_of_their_paths(tmp_path):
    files(tmp_path, "b/z.txt", "a.txt", "b/a/c.txt", "b.txt", "B.txt")
    listing = list_files(str(tmp_path), "key")
    assert listing.files == sorted(tmp_path.rglob("*.txt"))
