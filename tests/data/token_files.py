"""Writers of token files, from the descriptions of their formats and independent of the readers; reading them."""

import json
import struct

import numpy as np

from moetrain.config import load_settings
from moetrain.data.documents import DomainReport, read_documents

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix, documents, dtype="uint16", version=1, code=None):
    """Each document is one sequence, or a list of several."""
    documents = [document if isinstance(document[0], list) else [document] for document in documents]
    sequences = [sequence for document in documents for sequence in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(each, dtype).tobytes() for each in sequences))
    lengths = [len(each) for each in sequences]
    size = np.dtype(dtype).itemsize
    places = [sum(lengths[:number]) * size for number in range(len(lengths))]
    ends = [sum(len(document) for document in documents[:number]) for number in range(len(documents) + 1)]
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", version, code or MEGATRON_CODES[dtype], len(lengths), len(ends))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(places)}q", *places)
        + struct.pack(f"<{len(ends)}q", *ends)
    )


def write_raw(path, documents, dtype="uint16", end=()):
    path.write_bytes(np.array([i for document in documents for i in (*document, *end)], dtype).tobytes())


def mds_array(ids, dtype):
    """An array whose encoding names its type: number of dimensions and width of its shape, the shape, the ids."""
    width, code = (0, "B") if len(ids) < 2**8 else (1, "H") if len(ids) < 2**16 else (2, "I")
    return bytes([1 << 2 | width]) + struct.pack(f"<{code}", len(ids)) + np.array(ids, dtype).tobytes()


def write_mds(folder, documents, encoding="ndarray:uint16", version=2, shards=2, **columns):
    """``columns``: further columns of text, a value for each document."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(["input_ids", *columns])
    kind, _, dtype = encoding.partition(":")
    described = []
    for shard, numbers in enumerate(np.array_split(np.arange(len(documents)), shards)):
        head = {
            "version": version,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": 2**26,
            "column_names": names,
            "column_encodings": [encoding if name == "input_ids" else "str" for name in names],
            "column_sizes": [None] * len(names),
        }
        samples = []
        for number in numbers:
            ids = documents[number]
            own = np.array(ids, "int64").tobytes() if kind == "bytes" else mds_array(ids, dtype)
            values = [own if name == "input_ids" else columns[name][number].encode() for name in names]
            samples.append(struct.pack(f"<{len(values)}I", *map(len, values)) + b"".join(values))
        text = json.dumps(head, sort_keys=True).encode()
        begin = 4 + 4 * (len(samples) + 1) + len(text)
        places = [begin + sum(map(len, samples[:number])) for number in range(len(samples) + 1)]
        content = struct.pack(f"<I{len(places)}I", len(samples), *places) + text + b"".join(samples)
        name = f"shard.{shard:05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        described.append(head | {"samples": len(samples), "raw_data": raw, "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"version": version, "shards": described}))


def write_litdata(folder, documents, dtype="uint16", chunks=2):
    """Chunks of TokensLoader."""
    folder.mkdir(parents=True, exist_ok=True)
    code = {"int32": "no_header_tensor:16", "uint16": "no_header_tensor:20", "int64": "no_header_numpy:3"}[dtype]
    described = []
    for chunk, numbers in enumerate(np.array_split(np.arange(len(documents)), chunks)):
        items = [np.array(documents[number], dtype).tobytes() for number in numbers]
        begin = 4 + 4 * (len(items) + 1)
        places = [begin + sum(map(len, items[:number])) for number in range(len(items) + 1)]
        content = struct.pack(f"<I{len(places)}I", len(items), *places) + b"".join(items)
        (folder / f"chunk-0-{chunk}.bin").write_bytes(content)
        tokens = sum(len(documents[number]) for number in numbers)
        described.append(
            {"chunk_bytes": len(content), "chunk_size": len(items), "dim": tokens, "filename": f"chunk-0-{chunk}.bin"}
        )
    config = {"compression": None, "data_format": [code], "data_spec": None, "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps({"chunks": described, "config": config}))


def chosen(tokenizer, tokens, *overrides):
    base = [f"tokenizer.model={tokenizer.path}", f"data.domains.d.tokens={tokens}", "data.heldout_share=0.1"]
    return load_settings(None, [*base, *overrides])


def read(tokenizer, tokens, *overrides):
    settings = chosen(tokenizer, tokens, *overrides)
    report = DomainReport("d")
    return list(read_documents("d", settings.data.domains["d"], settings.data, 0, set(), report, tokenizer)), report
