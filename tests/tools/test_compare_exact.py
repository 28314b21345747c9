import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from tests.tools.test_prepare_data import load_tool

tool = load_tool("compare")


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


@pytest.fixture
def compared(finished_run, copy, capsys):
    """Compares the run with its copy: the exit status, and what was printed."""

    def run_tool():
        status = tool.main([str(finished_run), str(copy), "--exact"])
        return status, capsys.readouterr().out

    return run_tool


def rewrite_scalars(run, change):
    """Rewrite each scalar of a run's event file as `change` returns it; None drops it."""
    (path,) = run.glob("events.out.tfevents.*")
    records = [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
    with open(path, "wb") as file:
        for event in records:
            kept = [value for value in event.summary.value if change(event.step, value) is not None]
            if event.HasField("summary"):
                del event.summary.value[:]
                event.summary.value.extend(kept)
            RecordWriter(file).write(event.SerializeToString())


def next_float32(value):
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def rewrite_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, indent=1))


def test_equal_copies(compared, copy):
    def other_speed(step, value):
        if value.tag.startswith("system/"):
            value.simple_value += 1
        return value

    rewrite_scalars(copy, other_speed)
    rewrite_json(copy / "summary.json", lambda tree: tree.update(tokens_per_second=1.0, seconds={}, version="0"))
    status, printed = compared()
    assert status == 0
    assert printed.count(": equal\n") == 5
    assert " 0 points" not in printed
    assert " 0 files" not in printed
    assert " 0 tensors" not in printed


def test_one_scalar_off_by_one_bit(compared, copy):
    def flip(step, value):
        if (step, value.tag) == (12, "loss/train/sums"):
            value.simple_value = next_float32(value.simple_value)
        return value

    rewrite_scalars(copy, flip)
    status, printed = compared()
    assert status == 1
    assert "TensorBoard scalars" in printed
    assert "1 different\n  loss/train/sums: step 12: " in printed
    assert printed.count(": equal\n") == 4


def test_a_missing_tag(compared, copy, finished_run):
    rewrite_scalars(copy, lambda step, value: None if value.tag == "optim/grad_norm" else value)
    status, printed = compared()
    assert status == 1
    assert f"  optim/grad_norm: only in {finished_run}" in printed


def test_a_missing_point(compared, copy):
    rewrite_scalars(copy, lambda step, value: None if (step, value.tag) == (12, "optim/grad_norm") else value)
    status, printed = compared()
    assert status == 1
    assert "  optim/grad_norm: 4 and 3 entries" in printed


@pytest.mark.parametrize("kind", ["panel", "probe", "router", "samples"])
def test_an_altered_parquet_value(compared, copy, kind):
    path = max((copy / "routing").glob(f"{kind}_*.parquet"))
    table = pq.read_table(path)
    name = next(n for n in ("loss", "log_probs", "own", "shares") if n in table.column_names)
    column = table[name].to_pylist()

    def nudge(value):
        return [nudge(value[0]), *value[1:]] if isinstance(value, list) else value + 1

    column[3 % len(column)] = nudge(column[3 % len(column)])
    index = table.column_names.index(name)
    pq.write_table(table.set_column(index, table.schema.field(name), pa.array(column, table[name].type)), path)
    status, printed = compared()
    assert status == 1
    assert f"  {path.name}: column {name}: " in printed
    assert printed.count(": equal\n") == 4


def test_nan_equals_nan_and_zero_differs_from_minus_zero(compared, copy, finished_run, tmp_path):
    path = max((copy / "routing").glob("panel_*.parquet"))
    table = pq.read_table(path)
    losses = {}
    for value in (np.nan, 0.0, -0.0):
        column = np.full(len(table), value, np.float32)
        losses[str(value)] = table.set_column(table.column_names.index("loss"), "loss", pa.array(column))
    original = shutil.copytree(finished_run, tmp_path / "original")
    for left, right, status in (("nan", "nan", 0), ("0.0", "-0.0", 1)):
        pq.write_table(losses[left], original / "routing" / path.name)
        pq.write_table(losses[right], path)
        assert tool.main([str(original), str(copy), "--exact"]) == status


def test_events_and_summary(compared, copy):
    lines = (copy / "events.jsonl").read_text().splitlines()
    (copy / "events.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    rewrite_json(copy / "summary.json", lambda tree: tree["domains"]["sums"].update(phase="settled"))
    status, printed = compared()
    assert status == 1
    assert "  domains: sums: phase: " in printed
    assert f"  {json.loads(lines[-1])['type']}: " in printed


def test_checkpoint_tensors(compared, copy):
    folder = max((copy / "checkpoints").iterdir())
    state = load_file(folder / "optimizer.safetensors")
    name = next(name for name in state if name.endswith(".exp_avg"))
    state[name].flatten()[0] += 1
    save_file(state, folder / "optimizer.safetensors")
    (folder / "monitor.safetensors").unlink()
    status, printed = compared()
    assert status == 1
    assert f"  optimizer.safetensors: {name}: 1 of " in printed
    assert "  monitor.safetensors: only in " in printed
    # Of checkpoints in another format only model and optimizer are compared.
    rewrite_json(folder / "manifest.json", lambda tree: tree.update(format=0))
    status, printed = compared()
    assert status == 1
    assert "of model and optimizer only (formats " in printed
    assert "monitor.safetensors" not in printed


def test_runs_that_cannot_be_compared(finished_run, copy, tmp_path, capsys):
    damaged = shutil.copytree(copy, tmp_path / "damaged")
    path = max((damaged / "routing").glob("panel_*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copy / "config.yaml", bare)
    for message, runs in {
        "--exact: 1 runs: give two": [finished_run],
        "no config.yaml there": [finished_run, tmp_path],
        "no TensorBoard scalars there": [finished_run, bare],
        f"{path}: cannot be read": [finished_run, damaged],
    }.items():
        assert tool.main([*map(str, runs), "--exact"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_resumed_run_equals_the_straight_one_and_long_values_are_clipped(compared, copy):
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    interruption = [
        {"type": "checkpoint", "step": 7, "folder": "checkpoints/step_00000007"},
        {"type": "resume", "step": 7},
    ]
    text = "".join(json.dumps(event) + "\n" for event in [*interruption, *lines])
    (copy / "events.jsonl").write_text(text)
    assert compared()[0] == 0
    lines[-1]["problem"] = "x" * 1000
    (copy / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    status, printed = compared()
    assert status == 1
    assert max(map(len, printed.splitlines())) < 400
    assert "problem" in printed
