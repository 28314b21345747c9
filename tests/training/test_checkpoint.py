import json
import shutil

import pytest
import torch

from moetrain.training import checkpoint as module
from moetrain.training.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    set_aside_later,
)


def save(run, step, keep=9):
    states = {"model": {"w": torch.full((3,), float(step))}, "empty": {}}
    return save_checkpoint(run, step, states, {"note": "é", "step": step}, {"events.jsonl": 5}, keep)


def test_what_is_saved_comes_back(tmp_path):
    folder = save(tmp_path, 7)
    loaded = load_checkpoint(folder)
    assert loaded.step == 7
    assert torch.equal(loaded.states["model"]["w"], torch.full((3,), 7.0))
    assert loaded.states["empty"] == {}
    assert loaded.record == {"note": "é", "step": 7}
    assert loaded.run_files == {"events.jsonl": 5}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "record.json"])
def test_a_flipped_bit_or_a_missing_file_is_named_and_the_one_before_taken(tmp_path, name):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((newest / name).read_bytes())
    content[-1] ^= 1
    (newest / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name}: its content is altered"):
        load_checkpoint(newest)
    folder, complaints = newest_whole(tmp_path)
    assert folder == before
    assert len(complaints) == 1
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: missing"):
        load_checkpoint(newest)
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match="missing"):
        newest_whole(tmp_path)


def test_a_write_that_fails_leaves_nothing_and_what_stood_before(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real, calls = module._sync, []

    def full_disk(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(module, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert load_checkpoint(save(tmp_path, 2)).step == 2


def test_a_folder_that_was_never_renamed_is_no_checkpoint(tmp_path):
    folder = save(tmp_path, 3)
    folder.rename(folder.with_name("step_00000003.partial"))
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_checkpoint(checkpoint_folder(tmp_path, 3))


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load_checkpoint(folder)


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    set_aside_later(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    aside = tmp_path / "checkpoints" / "superseded"
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000002", "step_00000003"]


def test_two_names_of_one_tensor_are_both_saved(tmp_path):
    tensor = torch.randn(4, 3)
    folder = save_checkpoint(tmp_path, 1, {"model": {"a": tensor, "b": tensor}}, {}, {}, 2)
    loaded = load_checkpoint(folder).states["model"]
    assert torch.equal(loaded["a"], tensor)
    assert torch.equal(loaded["b"], tensor)


def test_what_safetensors_says_of_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*_):
        raise module.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*No space left"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []
