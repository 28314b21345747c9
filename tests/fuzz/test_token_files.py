"""Fuzzing of token files: damaged ones give documents of valid ids, or one error."""

import json
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.errors import DataError
from moetrain.data.tokenizer import train_tokenizer
from tests.conftest import sentences
from tests.data.token_files import read, write_litdata, write_mds, write_megatron, write_raw
from tests.fuzz.inputs import altered, check_refusal, damaged, fuzz

FORMATS = ("megatron", "olmo", "mds", "litdata")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of token files by format, and their tokenizer."""
    folder = tmp_path_factory.mktemp("fuzz")
    texts = [f"{number}. {sentences(random.Random(number), 2)}" for number in range(40)]
    tokenizer = train_tokenizer(texts, 320)
    tokenizer.path = folder / "tokenizer.model"
    tokenizer.save(tokenizer.path)
    documents = [[*ids, tokenizer.end_id] for ids in tokenizer.encode_all(texts)]
    for kind in FORMATS:
        (folder / kind).mkdir()
    write_megatron(folder / "megatron" / "a", documents)
    write_raw(folder / "olmo" / "a.npy", documents)
    write_mds(folder / "mds", documents, "ndarray:uint16", source=["web"] * 40)
    write_litdata(folder / "litdata", documents)
    return folder, tokenizer


def read_damaged(made, kind, name, content):
    """Read a copy of the files of a format, one of them with other content."""
    folder, tokenizer = made
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / kind, copy)
    (copy / name).write_bytes(content)
    overrides = ["data.domains.d.filter=source == 'web'"] if kind == "mds" else []
    try:
        found, _ = read(tokenizer, copy, *overrides)
    except DataError as error:
        check_refusal(error, "data.domains.d" if "data.domains.d" in str(error) else copy)
    else:
        assert all(len(each.tokens) > 0 and int(each.tokens.max()) < tokenizer.vocab_size for each in found)


@pytest.mark.parametrize("kind", FORMATS)
@fuzz
@given(st.data())
def test_damaged_bytes(made, kind, data):
    paths = sorted((made[0] / kind).iterdir())
    path = data.draw(st.sampled_from([path for path in paths if path.suffix != ".json"]))
    content = path.read_bytes()
    if data.draw(st.booleans()):  # the heads are short, and where most can go wrong
        changed = data.draw(damaged(content[:64])) + content[64:]
    else:
        changed = data.draw(damaged(content))
    read_damaged(made, kind, path.name, changed)


@pytest.mark.parametrize("kind", ["mds", "litdata"])
@fuzz
@given(st.data())
def test_altered_indexes(made, kind, data):
    tree = data.draw(altered(json.loads((made[0] / kind / "index.json").read_bytes())))
    read_damaged(made, kind, "index.json", json.dumps(tree).encode())


@fuzz
@given(st.data())
def test_altered_heads_of_mds_shards(made, data):
    content = (made[0] / "mds" / "shard.00000.mds").read_bytes()
    count = int.from_bytes(content[:4], "little")
    head, begin = 4 + 4 * (count + 1), int.from_bytes(content[4:8], "little")
    text = json.dumps(data.draw(altered(json.loads(content[head:begin])))).encode()
    shift = len(text) - (begin - head)
    places = b"".join(
        (int.from_bytes(content[at : at + 4], "little") + shift).to_bytes(4, "little") for at in range(4, head, 4)
    )
    index = json.loads((made[0] / "mds" / "index.json").read_bytes())
    index["shards"][0]["raw_data"]["bytes"] = len(content) + shift
    folder = made[0] / "mds-2"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made[0] / "mds", folder)
    (folder / "shard.00000.mds").write_bytes(content[:4] + places + text + content[begin:])
    read_damaged(made, "mds-2", "index.json", json.dumps(index).encode())
