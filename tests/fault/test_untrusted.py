"""What comes from elsewhere is data: it is never run, and nothing outside the run's folder is written."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

import moetrain
from moetrain.atomic_io import file_hash
from moetrain.checkpoint.manager import CheckpointError, load_checkpoint, save_checkpoint
from moetrain.checkpoint.manifest import content_hash
from moetrain.config import DomainSettings, SettingsError, load_settings
from moetrain.data.errors import DataError
from moetrain.data.sources import hub
from moetrain.loggers.tensorboard import cut_run_files

SOURCE = Path(moetrain.__file__).parent


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trace(tmp_path):
    """The file that is there once something was run."""
    path = tmp_path / "was run"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()
    path.unlink()
    return path


def test_settings_run_no_code(tmp_path, trace):
    for tag in ("python/object/apply:os.mknod", "python/name:os.system", "python/object/new:os.mknod"):
        (tmp_path / "evil.yaml").write_text(f"run: {{name: !!{tag} ['{trace}']}}\n")
        with pytest.raises(SettingsError, match="not valid YAML"):
            load_settings(tmp_path / "evil.yaml")
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(f"!!python/object/apply:os.mknod ['{trace}']")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "record.json", "manifest.json"])
def test_checkpoints_run_no_code_even_where_their_hashes_are_right(tmp_path, trace, name):
    folder = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {}, {})
    (folder / name).write_bytes(pickle.dumps(Evil(trace)))
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["hash"]
        manifest["files"][name] = file_hash(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest | {"hash": content_hash(manifest)}))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder).states["model"]
    assert not trace.exists()


def test_a_data_set_with_a_script_is_refused_and_the_script_not_run(tmp_path, trace):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    for domain in (
        DomainSettings(hub=str(folder)),
        DomainSettings(hub=str(folder), streaming=True),
        DomainSettings(hub=str(folder / "evil.py")),
    ):
        with pytest.raises(DataError):
            list(hub.read("evil", domain, ".", 0))
    assert not trace.exists()


def test_nothing_in_the_package_can_run_what_it_reads():
    """No unpickling but between a run's own processes, no torch.load, no eval, no YAML with objects, no remote code."""
    forbidden = {"load": {"torch", "pickle", "yaml", "dill"}, "loads": {"pickle", "marshal", "dill"}}
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if isinstance(node.value, ast.Constant) and node.value.value is False:
                    continue
                found.append((path.name, node.arg))
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                found.append((path.name, node.func.id))
            called = node.func
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                loaders = forbidden.get(called.attr, set()) & {called.value.id}
                found += [(path.name, f"{loader}.{called.attr}") for loader in loaders]
    assert sorted(set(found)) == [("workers.py", "pickle.load")]  # answers of processes that it started itself


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", "", ".hidden", "a\nb"])
def test_a_runs_name_is_no_path(make_settings, name):
    with pytest.raises(SettingsError, match=r"run\.name"):
        make_settings(f"run.name={json.dumps(name)}")


def test_files_of_a_run_are_not_cut_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("0123456789")
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(precious, run / "events.jsonl")
    with pytest.raises(OSError, match=r"events\.jsonl: a link to outside"):
        cut_run_files(run, {"events.jsonl": 3})
    assert precious.read_text() == "0123456789"
