"""Token files of Megatron, OLMo, MDS and litdata: read as they lie, with ids and held-out rule by content."""

import json
import random
import shutil

import numpy as np
import pytest

from moetrain.config import SettingsError, load_settings
from moetrain.data.contamination import all_documents
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.portions import fingerprint
from moetrain.data.sources.tokens.raw import check_type
from moetrain.data.split import split_domains
from moetrain.data.stream import training_stream, validation_streams
from tests.data.token_files import chosen, read, write_litdata, write_mds, write_megatron, write_raw
from tests.tools.test_prepare_data import load_tool

FORMATS = ("megatron", "olmo", "mds", "litdata")


def write(kind, folder, documents, end, dtype="uint16"):
    """Write documents, each with its end mark; returns what ``tokens`` is to name."""
    marked = [[*document, *end] for document in documents]
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "megatron":
        write_megatron(folder / "text", marked, dtype)
    elif kind == "olmo":
        for part in range(2):
            write_raw(folder / f"part-{part}.npy", marked[part * 150 : (part + 1) * 150], dtype)
    elif kind == "mds":
        write_mds(folder, marked, f"ndarray:{dtype}")
    else:
        write_litdata(folder, marked, dtype)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_documents_come_back_as_they_were_with_ids_by_content(kind, tmp_path, tokenizer, documents, texts):
    end = [tokenizer.end_id]
    found, report = read(tokenizer, write(kind, tmp_path / "a", documents, end))
    assert [each.tokens.tolist() for each in found] == documents
    assert [tokenizer.decode(each.tokens) for each in found] == texts
    assert [each.text_bytes for each in found] == [len(text.encode()) for text in texts]
    assert (report.documents, report.rows, report.left_out) == (300, 300, 0)
    assert 10 < report.heldout_documents < 60
    # The same ids in another format, type and order: the same documents, held out or not.
    shuffled = random.Random(1).sample(documents, len(documents))
    dtype = "int32" if kind in ("mds", "litdata") else "uint16"
    other = FORMATS[FORMATS.index(kind) - 1]
    again, _ = read(tokenizer, write(other, tmp_path / "b", shuffled, end, dtype if other != "olmo" else "uint16"))
    assert {(each.id, each.heldout) for each in again} == {(each.id, each.heldout) for each in found}


@pytest.mark.parametrize("marks", ["begin", "both", "end", "none"])
@pytest.mark.parametrize("kind", FORMATS)
def test_marks_are_left_out_wherever_they_are(kind, marks, tmp_path, tokenizer, documents):
    begin = [tokenizer.begin_id] if marks in ("begin", "both") else []
    end = [tokenizer.end_id] if marks in ("end", "both") else []
    folder = write(kind, tmp_path, [[*begin, *document] for document in documents], end)
    if kind == "olmo" and marks == "none":
        with pytest.raises(DataError, match=r"part-0.npy: no end mark 2 \('</s>'\) among its first \d+ tokens"):
            read(tokenizer, folder)
    else:
        found, report = read(tokenizer, folder)
        assert [each.tokens.tolist() for each in found] == documents
        assert report.empty == 0


def test_litdata_chunks_of_older_versions_do_not_name_their_loader(tmp_path, tokenizer, documents):
    folder = write("litdata", tmp_path, documents, [tokenizer.end_id])
    index = json.loads((folder / "index.json").read_text())
    del index["config"]["item_loader"]
    (folder / "index.json").write_text(json.dumps(index))
    found, _ = read(tokenizer, folder)
    assert [each.tokens.tolist() for each in found] == documents


def test_records_with_several_documents_and_concatenated_records(tmp_path, tokenizer, documents):
    end = tokenizer.end_id
    stream = [i for document in documents for i in (*document, end)]
    pieces = [stream[at : at + 64] for at in range(0, len(stream), 64)]
    write_mds(tmp_path / "mds", pieces, shards=1)
    found, _ = read(tokenizer, tmp_path / "mds", "data.domains.d.concatenated=true")
    assert [each.tokens.tolist() for each in found] == documents
    cut, report = read(tokenizer, tmp_path / "mds")
    parts = [part.split() for piece in pieces for part in " ".join(map(str, piece)).split(str(f" {end} ")) if part]
    ids = [tuple(int(i) for i in part if i != str(end)) for part in parts]
    assert [tuple(each.tokens.tolist()) for each in cut] == list(dict.fromkeys(part for part in ids if part))
    assert report.rows == len(cut) + report.duplicates > len(documents)
    # Sentences of a document as sequences of their own, as Megatron's --split-sentences writes them.
    write_megatron(tmp_path / "split", [[document[:5], [*document[5:], end]] for document in documents])
    found, _ = read(tokenizer, tmp_path / "split")
    assert [each.tokens.tolist() for each in found] == documents


def test_a_document_without_an_end_at_the_end_of_a_raw_file_is_kept(tmp_path, tokenizer, documents):
    stream = [i for document in documents[:3] for i in (*document, tokenizer.end_id)]
    write_raw(tmp_path / "a.bin", [[tokenizer.end_id, *stream, *documents[3][:7]]])
    found, report = read(tokenizer, tmp_path / "a.bin")
    assert [each.tokens.tolist() for each in found] == [*documents[:3], documents[3][:7]]
    assert report.empty == 0


def test_empty_records_are_counted_and_duplicates_dropped(tmp_path, tokenizer, documents):
    end = tokenizer.end_id
    write_megatron(tmp_path / "a", [[*documents[0], end], [end], documents[0], [*documents[1], end]])
    found, report = read(tokenizer, tmp_path / "a")
    assert [each.tokens.tolist() for each in found] == documents[:2]
    assert (report.rows, report.empty, report.duplicates) == (4, 1, 1)


def test_raw_files_are_read_across_blocks_and_resumed(tmp_path, tokenizer, documents, monkeypatch):
    monkeypatch.setattr("moetrain.data.sources.tokens.raw._BLOCK", 100)
    folder = write("olmo", tmp_path, documents, [tokenizer.end_id])
    found, _ = read(tokenizer, folder)
    assert [each.tokens.tolist() for each in found] == documents


def test_numpy_files_with_a_header_name_their_type(tmp_path, tokenizer, documents):
    ids = np.array([i for document in documents for i in (*document, tokenizer.end_id)], "int64")
    np.save(tmp_path / "a.npy", ids)
    found, _ = read(tokenizer, tmp_path / "a.npy")
    assert [each.tokens.tolist() for each in found] == documents
    with pytest.raises(DataError, match="holds int64 by its header, but dtype is uint16: remove dtype"):
        read(tokenizer, tmp_path / "a.npy", "data.domains.d.dtype=uint16")
    np.save(tmp_path / "b.npy", ids.reshape(1, -1))
    with pytest.raises(DataError, match="not a row of token ids"):
        read(tokenizer, tmp_path / "b.npy")


def test_the_corpus_is_that_of_the_text(tmp_path, tokenizer, documents, texts):
    """The same documents, given as text and as tokens: the same samples, but for ids, held-out choice and order."""
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    from_text = prepare_corpus(
        load_settings(None, [f"tokenizer.model={tokenizer.path}", f"data.domains.d.path={lines}", cache])
    )
    folder = write("megatron", tmp_path / "data", documents, [tokenizer.end_id])
    settings = chosen(tokenizer, folder, cache, "data.seq_len=64")
    corpus = prepare_corpus(settings)
    made, text = corpus.domains[0], from_text.domains[0]
    assert np.array_equal(made.tokens, text.tokens)
    for name in ("start", "length", "text_bytes", "answer_start"):
        assert np.array_equal(made.index[name], text.index[name])
    assert not set(made.index["id"].tolist()) & set(text.index["id"].tolist())
    stream = training_stream(corpus, settings)
    row = stream.batch(0, 0, 1).tokens_BT[0].tolist()
    assert row[0] == tokenizer.begin_id
    assert row[stream.samples.row_lengths[stream.rows.row(0)[0]] - 1] == tokenizer.end_id
    assert "d" in validation_streams(corpus, settings, 4)


def test_a_corpus_of_tokens_is_resumed_and_prepared_by_workers(tmp_path, tokenizer, documents, monkeypatch):
    monkeypatch.setattr("moetrain.data.token_shards.SHARD_BYTES", 5000)
    monkeypatch.setattr("moetrain.data.token_shards._BATCH_DOCUMENTS", 8)
    folder = write("olmo", tmp_path / "data", documents, [tokenizer.end_id])
    corpus = prepare_corpus(chosen(tokenizer, folder, f"data.cache_dir={tmp_path / 'a'}"))
    from moetrain.data import token_shards

    whole, calls = token_shards._write_shard, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(token_shards, "_write_shard", killed)
    settings = chosen(tokenizer, folder, f"data.cache_dir={tmp_path / 'b'}")
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(settings)
    again = prepare_corpus(settings)
    assert np.array_equal(again.domains[0].tokens, corpus.domains[0].tokens)
    assert np.array_equal(again.domains[0].index, corpus.domains[0].index)
    monkeypatch.undo()
    monkeypatch.setattr("moetrain.data.portions.PORTION_BYTES", 1)
    settings = chosen(tokenizer, folder, f"data.cache_dir={tmp_path / 'c'}", "data.workers=2")
    by_two = prepare_corpus(settings)
    assert np.array_equal(by_two.domains[0].tokens, corpus.domains[0].tokens)
    assert np.array_equal(by_two.domains[0].index, corpus.domains[0].index)


def test_probe_items_are_searched_in_the_decoded_text(tmp_path, tokenizer, documents, texts):
    settings = chosen(tokenizer, write("litdata", tmp_path, documents, [tokenizer.end_id]))
    assert [each.text for each in all_documents(settings)] == texts


def test_columns_of_mds_choose_and_split_documents(tmp_path, tokenizer, documents):
    kinds = ["web" if number % 3 else "wiki" for number in range(300)]
    write_mds(tmp_path / "a", documents, source=kinds)
    found, report = read(tokenizer, tmp_path / "a", "data.domains.d.filter=source == 'wiki'")
    assert [each.tokens.tolist() for each in found] == documents[::3]
    assert report.filtered == 200
    settings = chosen(tokenizer, tmp_path / "a", "data.domains.d.by=source", f"data.cache_dir={tmp_path / 'cache'}")
    corpus = prepare_corpus(split_domains(settings))
    assert [(each.name, each.report.documents) for each in corpus.domains] == [("d_web", 200), ("d_wiki", 100)]
    with pytest.raises(DataError, match=r"no column 'kind' \(columns: input_ids, source\): correct the filter"):
        read(tokenizer, tmp_path / "a", "data.domains.d.filter=kind == 'wiki'")
    found, _ = read(tokenizer, tmp_path / "a", "data.domains.d.filter=len(input_ids) > 100")
    assert [each.tokens.tolist() for each in found] == [each for each in documents if len(each) > 100]
    with pytest.raises(
        DataError, match=r"300 of 300 lines cannot be used, first .*sample 0: the filter cannot be applied"
    ):
        read(tokenizer, tmp_path / "a", "data.domains.d.filter=input_ids > 100")
    with pytest.raises(DataError, match="column 'source' holds no token ids"):
        read(tokenizer, tmp_path / "a", "data.domains.d.column=source")


def test_mds_columns_of_bytes_need_their_type(tmp_path, tokenizer, documents):
    write_mds(tmp_path / "a", documents, "bytes")
    with pytest.raises(DataError, match="sample 0: its ids are plain bytes: set dtype"):
        read(tokenizer, tmp_path / "a")
    found, _ = read(tokenizer, tmp_path / "a", "data.domains.d.dtype=int64")
    assert [each.tokens.tolist() for each in found] == documents
    with pytest.raises(DataError, match=r"sample 0: read as uint16, .* set dtype: (uint32|int32|int64)"):
        read(tokenizer, tmp_path / "a", "data.domains.d.dtype=uint16")


@pytest.mark.parametrize(("held", "given"), [("uint32", "uint16"), ("uint16", "uint32"), ("int64", "uint16")])
def test_a_wrong_type_of_raw_ids_is_named_with_one_that_fits(held, given, tmp_path, tokenizer, documents):
    write_raw(tmp_path / "a.bin", documents, held, [tokenizer.end_id])
    with pytest.raises(DataError, match=rf"a.bin: read as {given}, .*: set dtype: u?int\d+, which its first ids fit"):
        read(tokenizer, tmp_path / "a.bin", f"data.domains.d.dtype={given}")
    found, _ = read(tokenizer, tmp_path / "a.bin", f"data.domains.d.dtype={held}")
    assert [each.tokens.tolist() for each in found] == documents


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "wider"),
    [("uint8", 257, "uint16"), ("uint8", 70_000, "uint32"), ("uint16", 65_537, "uint32")],
)
def test_a_type_that_cannot_hold_the_vocabulary_is_refused(dtype, vocab_size, wider):
    head = np.arange(1, 200, dtype="<u4").tobytes()  # also read as halves, all ids are within the vocabulary
    with pytest.raises(
        DataError, match=rf"a.bin: dtype {dtype} holds ids up to \d+, .* set dtype: {wider}, or set tok"
    ):
        check_type(head, dtype, vocab_size, "a.bin")
    check_type(bytes(range(1, 200)), "uint8", 256, "a.bin")


def damaged(kind, folder, path, change):
    path = folder / path
    path.write_bytes(change(path.read_bytes()))


BROKEN = [
    ("megatron", "text.bin", lambda b: b[:-2], r"text.bin: \d+ bytes, but text.idx describes \d+"),
    ("megatron", "text.idx", lambda b: b[:-8], r"text.idx: \d+ bytes, but 300 sequences and 301 document boundaries"),
    ("megatron", "text.idx", lambda b: b[:20], "text.idx: ends within its header, after 20 bytes: fetch both"),
    ("megatron", "text.idx", lambda b: b"x" + b[1:], "text.idx: is no Megatron index"),
    ("megatron", "text.idx", lambda b: b[:9] + b"\x02" + b[10:], "version 2 of the index is not known, 1 is"),
    ("megatron", "text.idx", lambda b: b[:17] + b"\x07" + b[18:], "holds float32, not token ids"),
    ("megatron", "text.idx", lambda b: b[:17] + b"\x63" + b[18:], "has an unknown type code 99"),
    (
        "megatron",
        "text.idx",
        lambda b: b[:34] + b"\x03" + b[35:],
        r"sequence 1 lies at byte \d+ of the data instead of",
    ),
    ("megatron", "text.idx", lambda b: b[:-8] + bytes(8), "its 300 documents do not cover its 300 sequences"),
    ("olmo", "part-1.npy", lambda b: b[:-1], r"part-1.npy: \d+ bytes are no whole number of uint16 ids"),
    ("olmo", "part-0.npy", lambda b: b"\x93NUMPY" + b[6:], "part-0.npy: cannot be read as a NumPy file"),
    ("olmo", "part-0.npy", lambda b: b"\x88\xd8\x34\x01" + b[4:], "part-0.npy: begins with the header of llm.c's"),
    ("mds", "shard.00001.mds", lambda b: b[:-3], r"shard.00001.mds: \d+ bytes, but index.json says \d+"),
    ("mds", "index.json", lambda b: b.replace(b'"version": 2', b'"version": 3'), "version 3 of MDS is not known, 2 is"),
    ("litdata", "chunk-0-1.bin", lambda b: b[:-2], r"chunk-0-1.bin: \d+ bytes, but by its head its 150 items end at"),
    ("litdata", "index.json", lambda b: b.replace(b'"chunk_size": 150', b'"chunk_size": 9'), "index.json says 9 items"),
    (
        "litdata",
        "index.json",
        lambda b: b.replace(b"tensor:20", b"tensor:0"),
        "no_header_tensor:0, no rows of integers",
    ),
]


@pytest.mark.parametrize(("kind", "name", "change", "message"), BROKEN)
def test_damage_is_one_line_with_the_file_and_the_remedy(kind, name, change, message, tmp_path, tokenizer, documents):
    folder = write(kind, tmp_path, documents, [tokenizer.end_id])
    damaged(kind, folder, name, change)
    with pytest.raises(DataError, match=message) as raised:
        read(tokenizer, folder)
    assert "\n" not in str(raised.value)


def test_a_shard_that_disagrees_with_its_own_head(tmp_path, tokenizer, documents):
    folder = write("mds", tmp_path, documents, [])
    shard = folder / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"shard.00001.mds: \d+ bytes, but by its head its 150 samples end at byte"):
        read(tokenizer, shard)
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(DataError, match="too few for the places of its 150 samples"):
        read(tokenizer, shard)


@pytest.mark.parametrize("kind", FORMATS)
def test_ids_beyond_the_vocabulary(kind, tmp_path, tokenizer, documents):
    changed = [list(each) for each in documents]
    changed[200][3] = tokenizer.vocab_size
    folder = write(kind, tmp_path, changed, [tokenizer.end_id])
    place = {
        "megatron": r"text.bin, document 200, token 3",
        "mds": r"shard.00001.mds, sample 50, token 3",
        "litdata": r"chunk-0-1.bin, item 50, token 3",
        "olmo": rf"part-1.npy, token {sum(len(each) + 1 for each in documents[150:200]) + 3}",
    }[kind]
    remedy = "set tokenizer.model to the tokenizer that made them"
    with pytest.raises(DataError, match=rf"{place}: id 320 is outside of the vocabulary of 320 ids: {remedy}"):
        read(tokenizer, folder)


def test_another_end_mark_is_noticed(tmp_path, tokenizer, documents):
    write_megatron(tmp_path / "a", [[*document, 0] for document in documents])
    with pytest.raises(DataError, match=r"its documents end with 0 \('<unk>'\), but the end mark is 2 \('</s>'\)"):
        read(tokenizer, tmp_path / "a")
    # Within the documents too, it ends turns of a conversation.
    write_megatron(tmp_path / "c", [[*document[:3], 0, *document[3:], 0] for document in documents])
    found, _ = read(tokenizer, tmp_path / "c")
    assert [each.tokens.tolist()[-1] for each in found] == [0] * 300
    write_megatron(tmp_path / "d", [[*document, 0, 0, 0] for document in documents])
    with pytest.raises(DataError, match="if it pads them, write them without padding"):
        read(tokenizer, tmp_path / "d")
    write_raw(tmp_path / "b.npy", [[*document, 0] for document in documents])
    with pytest.raises(DataError, match=r"no end mark 2 .*special tokens in it: 0 \('<unk>'\) 300 times\)"):
        read(tokenizer, tmp_path / "b.npy")


def test_files_are_found_and_what_is_left_out_is_named(tmp_path, tokenizer, documents):
    end = [tokenizer.end_id]
    folder = write("megatron", tmp_path / "one", documents, end)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").write_text("x")
    counts = {}
    for given in ("one", "one/text", "one/text.bin", "one/text.idx", "one/*.bin", "one/*", "o*"):
        found, counts[given] = read(tokenizer, given, f"data.root={tmp_path}")
        assert len(found) == 300, given
    assert [counts[given].left_out for given in ("one/text", "one", "one/*")] == [0, 2, 1]
    assert counts["one/*"].left_out_files == [f"1 of no token format ({folder / 'notes.txt'})"]
    write("mds", tmp_path / "mds", documents, end)
    shutil.copy(tmp_path / "mds" / "shard.00000.mds", tmp_path / "mds" / "shard.00009.mds")
    found, report = read(tokenizer, tmp_path / "mds")
    assert (len(found), report.left_out) == (300, 1)
    assert "not named by index.json" in report.left_out_files[0]
    (tmp_path / "mds" / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"tokens: .*shard.00001.mds is missing, although index.json"):
        read(tokenizer, tmp_path / "mds")
    with pytest.raises(DataError, match="no file at"):
        read(tokenizer, tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no token file at .*notes.txt \(1 of no token format .*set format: olmo"):
        read(tokenizer, folder / "notes.txt")
    (folder / "text.bin").unlink()
    with pytest.raises(DataError, match=r"text.bin is missing beside text.idx"):
        read(tokenizer, folder)
    with pytest.raises(DataError, match="token files are read from disk only"):
        read(tokenizer, "s3://bucket/a.npy")


def test_raw_files_of_any_name_and_an_index_that_is_missing(tmp_path, tokenizer, documents):
    write_raw(tmp_path / "ids.u16", documents, end=[tokenizer.end_id])
    found, _ = read(tokenizer, tmp_path / "ids.u16", "data.domains.d.format=olmo")
    assert len(found) == 300
    shutil.copy(tmp_path / "ids.u16", tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a.idx: is missing beside a.bin: fetch it, or set format: olmo"):
        read(tokenizer, tmp_path / "a.bin", "data.domains.d.format=megatron")


def test_the_tools_measure_and_search_them(tmp_path, tokenizer, documents, texts):
    write("megatron", tmp_path / "data", documents, [tokenizer.end_id])
    is_heldout = [each.heldout for each in read(tokenizer, tmp_path / "data")[0]]
    held = [text for text, out in zip(texts, is_heldout, strict=True) if out]
    data = {"root": str(tmp_path), "heldout_share": 0.1, "domains": {"d": {"tokens": "data"}}}
    data["cache_dir"] = str(tmp_path / "cache")
    config, measured, found = (tmp_path / name for name in ("c.yaml", "measured.json", "found.json"))
    config.write_text(json.dumps({"data": data, "tokenizer": {"model": str(tokenizer.path)}}))
    assert load_tool("train_tokenizer").main([str(config), "--json", str(measured)]) == 0
    row = json.loads(measured.read_text())["domains"]["d"]
    assert (row["documents"], row["bytes"]) == (len(held), sum(len(text.encode()) for text in held))
    assert row["tokens"] == sum(map(len, tokenizer.encode_all(held)))
    item = {"domain": "d", "task": "t", "sep": " ", "choices": ["a", "b"], "answer": 0}
    prompts = {"trained": texts[is_heldout.index(False)], "held-out": held[0], "new": "these words are in no document"}
    lines = [json.dumps(item | {"id": name, "prompt": prompt}) for name, prompt in prompts.items()]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    probes = ["--probes", str(tmp_path / "items.jsonl"), "--contaminated-json", str(found)]
    assert load_tool("prepare_data").main([str(config), *probes]) == 0
    assert "trained" in [each["id"] for each in json.loads(found.read_text())["contaminated"]]
    assert "new" not in [each["id"] for each in json.loads(found.read_text())["contaminated"]]


def test_the_fingerprint_follows_content_index_and_settings(tmp_path, tokenizer, documents):
    folder = write("megatron", tmp_path / "a", documents, [tokenizer.end_id])

    def of(place, *overrides):
        settings = chosen(tokenizer, place, *overrides)
        return fingerprint("d", settings.data.domains["d"], settings.data, 0)

    first = of(folder)
    shutil.copytree(folder, tmp_path / "b")
    assert of(tmp_path / "b") == first
    assert of(folder, "data.domains.d.concatenated=true") != first
    index = (folder / "text.idx").read_bytes()
    (folder / "text.idx").write_bytes(index[:-1] + b"\x01")
    assert of(folder) != first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data.domains.d.tokens: set tokenizer.model to the tokenizer that made these token ids"),
        (["tokenizer.model=t", "data.domains.d.path=b"], "give exactly one of path, tokens, builtin and hub"),
        (["tokenizer.model=t", "data.domains.d.text_field=b"], "text_field has no effect with tokens"),
        (["tokenizer.model=t", "data.domains.d.concatenated=true", "data.domains.d.by=b"], "which concatenated joins"),
        (["tokenizer.model=t", "data.domains.e.path=b", "data.domains.e.dtype=uint16"], "dtype has no effect without"),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(None, ["data.domains.d.tokens=a", *overrides])


def test_files_without_columns_refuse_filter_and_column(tmp_path, tokenizer, documents):
    folder = write("olmo", tmp_path, documents, [tokenizer.end_id])
    for override in ("filter=source == 'a'", "by=source", "column=text"):
        with pytest.raises(DataError, match=r"a raw token file has no column '(source|text)', but ids alone"):
            read(
                tokenizer,
                folder,
                f"data.domains.d.{override}",
                "data.domains.d.value=a" if "by" in override else "run.seed=0",
            )
