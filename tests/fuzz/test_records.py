"""Fuzzing of the files of a run: they are read back unchanged, or there is one error that names the file."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moetrain.atomic_io import file_hash
from moetrain.checkpoint.manager import CheckpointError, load_checkpoint, save_checkpoint
from moetrain.checkpoint.manifest import content_hash
from moetrain.checkpoint.run_folder import open_run_folder
from moetrain.config import SettingsError
from moetrain.routing.panel import HELDOUT, SEEN
from moetrain.routing.store import StoreError, read_reading, write_reading
from tests.fuzz.inputs import TREES, altered, check_refusal, damaged, fuzz
from tests.routing.test_bad_input import a_reading

STATES = {"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}, "interval": {}}
RECORD = {"corpus": "abc", "domains": {"math": {"metrics": {}}}, "pieces": ["routing/a.parquet"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A valid checkpoint, which no test changes."""
    return save_checkpoint(tmp_path_factory.mktemp("good"), 7, STATES, RECORD, {"events.jsonl": 12})


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "step_00000007"


def loads_or_says(folder):
    try:
        loaded = load_checkpoint(folder)
        states = {owner: dict(state) for owner, state in loaded.states.items()}
    except CheckpointError as error:
        check_refusal(error, folder)
        return None
    return loaded, states


def write_again(checkpoint, copy, name, content):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    (copy / name).write_bytes(content)


FILES = ("manifest.json", "record.json", "model.safetensors", "interval.safetensors")


@given(st.data(), st.sampled_from(FILES))
@fuzz
def test_damaged_checkpoints(checkpoint, copy, data, name):
    content = (checkpoint / name).read_bytes()
    write_again(checkpoint, copy, name, data.draw(damaged(content)))
    found = loads_or_says(copy)
    if found is not None:  # only if nothing relevant was changed
        loaded, states = found
        assert (loaded.step, loaded.record, loaded.run_files) == (7, RECORD, {"events.jsonl": 12})
        assert torch.equal(states["model"]["w"], STATES["model"]["w"])


@given(st.data(), st.sampled_from(FILES))
@fuzz
def test_malicious_checkpoints(checkpoint, copy, data, name):
    """With valid hashes: nothing outside the folder is touched, and no code is run."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if name == "manifest.json":
        manifest = data.draw(altered(manifest))
        content = b""
    else:
        content = data.draw(damaged((checkpoint / name).read_bytes()))
    write_again(checkpoint, copy, name, content)
    if isinstance(manifest, dict):
        if name != "manifest.json":
            manifest["files"][name] = file_hash(copy / name)
        manifest.pop("hash", None)
        manifest["hash"] = content_hash(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = loads_or_says(copy)
    if found is not None:
        assert all("/" not in file and file not in ("", ".", "..") for file in found[0].run_files)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    run = tmp_path_factory.mktemp("reading")
    stored = a_reading(np.random.default_rng(0), 2, 4, [(0, SEEN, 3), (1, HELDOUT, 2)], ())
    write_reading(run, stored)
    return run, stored


def reads_or_says(run, path):
    try:
        return read_reading(run, 5)
    except StoreError as error:
        check_refusal(error, path.parent)
        return None


@given(st.data(), st.sampled_from(["panel", "router"]))
@fuzz
def test_damaged_pieces(reading, tmp_path_factory, data, which):
    run, stored = reading
    other = tmp_path_factory.getbasetemp() / "damaged_pieces"
    shutil.copytree(run, other, dirs_exist_ok=True)
    path = other / "routing" / f"{which}_00000005.parquet"
    path.write_bytes(data.draw(damaged((run / "routing" / path.name).read_bytes())))
    found = reads_or_says(other, path)
    if found is not None:
        assert np.array_equal(found.even, stored.even)
        assert np.array_equal(found.loss, stored.loss)
        assert found.domain.tolist() == stored.domain.tolist()
        assert np.array_equal(found.blocks[0], stored.blocks[0])
    path.write_bytes((run / "routing" / path.name).read_bytes())


VALUES = st.sampled_from([["x"] * 5, [1] * 5, [None] * 5, [[1.0]] * 5, [b"\xff"] * 5, [1.5] * 5])


@given(st.data(), st.sampled_from(["panel", "router"]))
@fuzz
def test_pieces_of_other_columns(reading, tmp_path_factory, data, which):
    run, _ = reading
    other = tmp_path_factory.getbasetemp() / "other_pieces"
    shutil.copytree(run, other, dirs_exist_ok=True)
    path = other / "routing" / f"{which}_00000005.parquet"
    table = pq.read_table(path)
    name = data.draw(st.sampled_from(table.column_names))
    at = table.column_names.index(name)
    match data.draw(st.sampled_from(["drop", "replace", "rows", "metadata"])):
        case "drop":
            table = table.drop_columns([name])
        case "replace" if which == "panel":
            table = table.set_column(at, name, pa.array(data.draw(VALUES)))
        case "rows":
            table = table.slice(0, data.draw(st.integers(0, 1)))
        case _:
            numbers = st.sampled_from(["-1", "0", "3", "9" * 30, "x", ""])
            table = table.replace_schema_metadata({"layers": data.draw(numbers), "experts": data.draw(numbers)})
    pq.write_table(table, path)
    reads_or_says(other, path)
    path.write_bytes((run / "routing" / path.name).read_bytes())


@given(st.data())
@fuzz
@example(None)
def test_damaged_settings_of_a_run(make_settings, data):
    """A run whose config.yaml cannot be read is not touched, and a new one is started."""
    settings = make_settings("train.resume=auto")
    shutil.rmtree(settings.run.output_dir, ignore_errors=True)  # of an example that was abandoned halfway
    opened = open_run_folder(settings)
    opened.release()
    content = (opened.path / "config.yaml").read_bytes()
    save_checkpoint(opened.path, 4, {}, {}, {})
    (opened.path / "config.yaml").write_bytes(data.draw(damaged(content)) if data is not None else b"")
    try:
        again = open_run_folder(settings)
        again.release()
    except (SettingsError, CheckpointError) as error:
        check_refusal(error, opened.path)
    shutil.rmtree(opened.path.parent)


@given(TREES)
@fuzz
def test_manifests_of_other_json(checkpoint, copy, tree):
    write_again(checkpoint, copy, "manifest.json", json.dumps(tree).encode())
    assert loads_or_says(copy) is None
