"""Token files that the libraries themselves write are read back id by id, and our writers agree with theirs.

The packages want other versions of torch, numpy and transformers than we have, so they are installed apart, without
dependencies (tests/data/token_formats.txt says how). Tests whose package is missing are skipped.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from moetrain.data.documents import DataError
from tests.data.token_files import read, write_litdata, write_mds, write_megatron


@pytest.fixture
def marked(documents, tokenizer):
    return [[*document, tokenizer.end_id] for document in documents]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_megatron(dtype, tmp_path, tokenizer, documents, marked):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for each in marked:
        builder.add_document(torch.tensor(each), [len(each) - 5, 5])
    builder.finalize(str(tmp_path / "theirs.idx"))
    found, report = read(tokenizer, tmp_path / "theirs")
    assert [each.tokens.tolist() for each in found] == documents
    assert report.rows == 300
    write_megatron(tmp_path / "ours", [[each[:-5], each[-5:]] for each in marked], dtype)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.fixture(scope="module")
def mds_writer():
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("needs mosaicml-streaming")
    with pytest.MonkeyPatch.context() as patch:
        # The package's own __init__ imports torchvision for its image data sets.
        package = types.ModuleType("streaming")
        package.__path__ = list(importlib.util.find_spec("streaming").submodule_search_locations)
        patch.setitem(sys.modules, "streaming", package)
        from streaming.base import MDSWriter

        yield MDSWriter


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2"])
@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:int32", "ndarray", "bytes"])
def test_mds(compression, encoding, mds_writer, tmp_path, tokenizer, documents, marked):
    dtype = encoding.partition(":")[2] or "int64"
    with mds_writer(
        out=str(tmp_path / "theirs"),
        columns={"tokens": encoding, "source": "str", "score": "float64"},
        compression=compression,
        size_limit=8000,
        hashes=["sha1"],
    ) as out:
        for number, each in enumerate(marked):
            ids = np.array(each, dtype)
            value = ids.tobytes() if encoding == "bytes" else ids
            out.write({"tokens": value, "source": "web" if number % 2 else "wiki", "score": number / 300})
    overrides = ["data.domains.d.dtype=int64"] if encoding == "bytes" else []
    found, report = read(tokenizer, tmp_path / "theirs", *overrides)
    assert [each.tokens.tolist() for each in found] == documents
    assert report.left_out == 0
    assert len(list((tmp_path / "theirs").glob("shard.*"))) > 3
    chosen, _ = read(
        tokenizer, tmp_path / "theirs", *overrides, "data.domains.d.filter=source == 'web' and score >= 0.5"
    )
    assert [each.tokens.tolist() for each in chosen] == documents[151::2]


def test_mds_arrays_of_fixed_length_and_unread_compression(mds_writer, tmp_path, tokenizer, documents, marked):
    stream = np.array([i for each in marked for i in each], "uint32")
    pieces = stream[: len(stream) // 128 * 128].reshape(-1, 128)
    for name, compression in (("plain", None), ("packed", "snappy")):
        columns = {"input_ids": "ndarray:uint32:128"}
        with mds_writer(out=str(tmp_path / name), columns=columns, compression=compression) as out:
            for piece in pieces:
                out.write({"input_ids": piece})
    found, _ = read(tokenizer, tmp_path / "plain", "data.domains.d.concatenated=true")
    assert [each.tokens.tolist() for each in found][:-1] == documents[: len(found) - 1]
    assert len(found) > 290
    with pytest.raises(DataError, match=r"shard.00000.mds.snappy: is compressed in a way that is not read"):
        read(tokenizer, tmp_path / "packed")


def test_our_mds_is_theirs(mds_writer, tmp_path, marked):
    with mds_writer(out=str(tmp_path / "theirs"), columns={"input_ids": "ndarray:uint16"}) as out:
        for each in marked:
            out.write({"input_ids": np.array(each, "uint16")})
    write_mds(tmp_path / "ours", marked, shards=1)
    assert (tmp_path / "ours" / "shard.00000.mds").read_bytes() == (
        tmp_path / "theirs" / "shard.00000.mds"
    ).read_bytes()


@pytest.fixture(scope="module")
def litdata_writer():
    pytest.importorskip("litdata", reason="needs litdata")
    from litdata.streaming.writer import BinaryWriter

    return BinaryWriter


def write_chunks(writer, folder, items, **options):
    cache = writer(str(folder), chunk_bytes=20_000, **options)
    for number, item in enumerate(items):
        cache[number] = item
    cache.done()
    cache.merge()
    return folder


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
def test_litdata_tokens(dtype, litdata_writer, tmp_path, tokenizer, documents, marked):
    from litdata.streaming.item_loader import TokensLoader

    items = [torch.tensor(each, dtype=dtype) for each in marked]
    folder = write_chunks(litdata_writer, tmp_path / "theirs", items, item_loader=TokensLoader())
    found, report = read(tokenizer, folder)
    assert [each.tokens.tolist() for each in found] == documents
    assert report.left_out == 0
    assert len(list(folder.glob("chunk-*"))) > 1
    first = folder / "chunk-0-0.bin"
    count = int.from_bytes(first.read_bytes()[:4], "little")
    write_litdata(tmp_path / "ours", marked[:count], str(dtype).removeprefix("torch."), chunks=1)
    assert (tmp_path / "ours" / "chunk-0-0.bin").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
@pytest.mark.parametrize("form", ["row", "dictionary"])
def test_litdata_items(kind, form, litdata_writer, tmp_path, tokenizer, documents, marked):
    def made(each):
        ids = np.array(each, "int64")
        own = torch.from_numpy(ids) if kind == "tensor" else ids
        return own if form == "row" else {"input_ids": own, "labels": own + 1, "number": 7}

    folder = write_chunks(litdata_writer, tmp_path, [made(each) for each in marked])
    found, _ = read(tokenizer, folder)
    assert [each.tokens.tolist() for each in found] == documents
    if form == "dictionary":
        with pytest.raises(DataError, match=r"no one field is a row of integers \(fields: input_ids .*number"):
            read(tokenizer, folder, "data.domains.d.column=text")


@pytest.mark.parametrize("level", ["chunk", "batch", "sample"])
def test_litdata_compression(level, litdata_writer, tmp_path, tokenizer, documents, marked):
    items = [torch.tensor(each) for each in marked]
    folder = write_chunks(litdata_writer, tmp_path, items, compression="zstd", compression_level=level)
    if level == "chunk":
        found, _ = read(tokenizer, folder)
        assert [each.tokens.tolist() for each in found] == documents
    else:
        with pytest.raises(DataError, match=rf"is compressed by {level}, which is not read: write it again"):
            read(tokenizer, folder)


def test_litdata_rows_of_plain_lists_are_refused(litdata_writer, tmp_path, tokenizer, marked):
    folder = write_chunks(litdata_writer, tmp_path, [{"input_ids": each} for each in marked])
    with pytest.raises(DataError, match=r"no one field is a row of integers .*write it again with item_loader"):
        read(tokenizer, folder)
