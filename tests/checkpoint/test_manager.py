import json
import shutil

import pytest
import torch

from moetrain import fault_injection as faults
from moetrain.checkpoint import manager as module
from moetrain.checkpoint.manager import (
    CheckpointError,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    move_superseded,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
)
from moetrain.checkpoint.manifest import content_hash


def save(run, step):
    states = {"model": {"w": torch.full((3,), float(step))}, "empty": {}}
    return save_checkpoint(run, step, states, {"note": "é", "step": step}, {"events.jsonl": 5})


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path, 7)
    loaded = load_checkpoint(folder)
    assert loaded.step == 7
    assert torch.equal(loaded.states["model"]["w"], torch.full((3,), 7.0))
    assert list(loaded.states) == ["empty", "model"]
    assert loaded.states["empty"] == {}
    assert loaded.record == {"note": "é", "step": 7}
    assert loaded.run_files == {"events.jsonl": 5}


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(2, None, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6]), (9, 2, [1, 2, 3, 4, 5, 6])],
)
def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path, keep, keep_every, kept):
    for step in range(1, 7):
        save(tmp_path, step)
        prune_checkpoints(tmp_path, keep, keep_every)
    assert [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)] == kept
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(kept)


@pytest.mark.parametrize("name", ["model.safetensors", "record.json"])
def test_a_corrupt_or_missing_file_is_named_and_the_checkpoint_before_is_taken(tmp_path, name):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((newest / name).read_bytes())
    content[-1] ^= 1
    (newest / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name}: corrupt"):
        load_checkpoint(newest)
    folder, problems = newest_valid(tmp_path)
    assert folder == before
    assert len(problems) == 1
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: missing"):
        load_checkpoint(newest)
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match="missing"):
        newest_valid(tmp_path)


def test_a_corrupt_manifest_is_found(tmp_path):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    manifest = newest / "manifest.json"
    valid = manifest.read_bytes()
    for place in range(len(valid)):
        for bit in (1, 32):
            manifest.write_bytes(valid[:place] + bytes([valid[place] ^ bit]) + valid[place + 1 :])
            try:
                same = json.loads(manifest.read_text()) == json.loads(valid)
            except ValueError:
                same = False
            if not same:  # a space that became a line break changes nothing
                assert newest_valid(tmp_path)[0] == before, (place, bit)


def test_a_manifest_that_names_files_outside_its_run_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    for names in ({"files": {"../../config.yaml": "0"}}, {"run_files": {"/etc/hosts": 0}}):
        manifest = json.loads((folder / "manifest.json").read_text()) | names
        del manifest["hash"]
        manifest["hash"] = content_hash(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="lists files that no run writes"):
            load_checkpoint(folder)


def test_tensors_are_filled_in_place_and_other_names_are_refused(tmp_path):
    states = load_checkpoint(save(tmp_path, 3)).states
    wide = torch.zeros(3, dtype=torch.float64)
    states.fill("model", {"w": wide})
    assert wide.tolist() == [3.0] * 3
    assert states.names("model") == {"w"}
    assert states.names("empty") == set()
    for tensors, said in (({}, "has a w"), ({"w": wide, "v": wide}, "has no v")):
        with pytest.raises(CheckpointError, match=said):
            states.fill("model", tensors)


def points_of(save_once, monkeypatch, tmp_path):
    """Names of the fault points that a save comes to."""
    monkeypatch.setenv("MOETRAIN_FAULT", f"trace:{tmp_path / 'points'}")
    save_once()
    monkeypatch.delenv("MOETRAIN_FAULT")
    return (tmp_path / "points").read_text().splitlines()


def test_a_full_disk_anywhere_in_a_save_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    points = points_of(lambda: save(tmp_path / "other", 2), monkeypatch, tmp_path)
    assert len(points) == len(set(points)) == 11
    save(tmp_path, 1)
    for number in range(1, len(points) + 1):
        monkeypatch.setenv("MOETRAIN_FAULT", f"full:{number}:1")
        faults._passed.clear()
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"], points[number - 1]
    monkeypatch.delenv("MOETRAIN_FAULT")
    assert load_checkpoint(save(tmp_path, 2)).step == 2


def test_the_partial_folder_of_a_killed_save_is_removed_by_the_next(tmp_path):
    (tmp_path / "checkpoints" / "step_00000004.partial").mkdir(parents=True)
    save(tmp_path, 5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_a_partial_folder_is_no_checkpoint(tmp_path):
    folder = save(tmp_path, 3)
    folder.rename(folder.with_name("step_00000003.partial"))
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_checkpoint(checkpoint_folder(tmp_path, 3))


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        load_checkpoint(folder)


def test_superseded_checkpoints_are_moved_not_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    move_superseded(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    superseded = tmp_path / "checkpoints" / "superseded"
    assert sorted(path.name for path in superseded.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_tensor_with_two_names_is_saved_twice(tmp_path):
    tensor = torch.randn(4, 3)
    folder = save_checkpoint(tmp_path, 1, {"model": {"a": tensor, "b": tensor}}, {}, {})
    loaded = load_checkpoint(folder).states["model"]
    assert torch.equal(loaded["a"], tensor)
    assert torch.equal(loaded["b"], tensor)


def test_safetensors_error_on_a_full_disk_becomes_an_os_error(tmp_path, monkeypatch):
    def full(*_):
        raise module.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*No space left"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []
