"""Exact comparison of two runs: whether everything that they recorded is equal, bit for bit.

Compared are TensorBoard scalars, events, ``summary.json``, the Parquet files of panel and probes, and the tensors of
the newest checkpoints. Speed, times, memory and versions are not: they differ between any two runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain.report.open_run import RunError
from moetrain.routing.store import FOLDER

IGNORED_TAGS = "system/"
IGNORED_KEYS = (
    "tokens_per_second",
    "monitor_share",
    "peak_memory_bytes",
    "seconds",
    "measured_tokens",  # since the run was resumed
    "version",
    "time",
)
"""Keys of ``summary.json`` and of events, at any depth, that depend on the machine or on the release."""

_SHARED_FILES = ("model.safetensors", "optimizer.safetensors")  # in checkpoints of every format


@dataclass
class Section:
    """One kind of record, compared.

    Attributes:
        compared: what was compared, with counts.
        differences: one line each, in the order of the records; empty where they are equal.
    """

    name: str
    compared: str = ""
    differences: list[str] = field(default_factory=list)


def compare_exactly(first: Path, second: Path) -> list[Section]:
    """Compare all records of two runs; they are equal when no section has differences.

    Raises:
        RunError: a folder is no run, has no scalars yet, or holds a file that cannot be read.
    """
    for run in (first, second):
        if not (run / "config.yaml").is_file():
            raise RunError(f"{run}: no config.yaml there: give the folder of a run, such as runs/quickstart")
    return [section(first, second) for section in (_scalars, _events, _summary, _parquet, _checkpoints)]


def _scalars(first: Path, second: Path) -> Section:
    a, b = _read_scalars(first), _read_scalars(second)
    found = Section("TensorBoard scalars", f"{sum(map(len, a.values())):,} points of {len(a)} tags")
    found.differences += _missing(a, b, first, second)
    for tag in a.keys() & b.keys():
        if different := _first_difference(
            a[tag], b[tag], lambda point: f"step {point[0]}: {np.uint32(point[1]).view('f4')}"
        ):
            found.differences.append(f"{tag}: {different}")
    found.differences.sort()
    return found


def _read_scalars(run: Path) -> dict[str, list[tuple[int, int]]]:
    """The points of each tag: step, and the bits of its float32 value."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1, "histograms": 1, "tensors": 1})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(IGNORED_TAGS)]
    if not tags:
        raise RunError(f"{run}: no TensorBoard scalars there: wait until the run has logged some")
    return {tag: [(e.step, int(np.float32(e.value).view("u4"))) for e in events.Scalars(tag)] for tag in tags}


def _events(first: Path, second: Path) -> Section:
    """Events per type, without those of an interruption: ``resume``, and the checkpoint that a signal asked for."""
    a, b = _read_events(first), _read_events(second)
    if [a.pop("resume", None), b.pop("resume", None)] != [None, None]:
        steps = [{event["step"] for event in each.get("checkpoint", [])} for each in (a, b)]
        for each in (a, b):
            each["checkpoint"] = [e for e in each.get("checkpoint", []) if e["step"] in steps[0] & steps[1]]
    found = Section("events", f"{sum(map(len, a.values())):,} of {len(a)} types")
    for type_ in sorted(a.keys() | b.keys()):
        if different := _first_difference(a.get(type_, []), b.get(type_, []), str):
            found.differences.append(f"{type_}: {different}")
    return found


def _read_events(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of each type in the order of writing: threads may interleave those of different types."""
    events: dict[str, list[dict[str, Any]]] = {}
    path = run / "events.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        event = _parse(path, line)
        kept = {key: value for key, value in event.items() if key not in IGNORED_KEYS}
        events.setdefault(event["type"], []).append(kept)
    return events


def _summary(first: Path, second: Path) -> Section:
    a, b = _read_summary(first), _read_summary(second)
    found = Section("summary.json", f"{len(a):,} values", _missing(a, b, first, second))
    found.differences += [f"{key}: {a[key]} and {b[key]}" for key in a if key in b and a[key] != b[key]]
    return found


def _read_summary(run: Path) -> dict[str, str]:
    path = run / "summary.json"
    return dict(_flatten(_parse(path, path.read_text(encoding="utf-8")))) if path.is_file() else {}


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each leaf of a JSON tree by its path; numbers with all their digits."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, json.dumps(tree)
        return
    for key, value in tree.items():
        if key not in IGNORED_KEYS and not key.startswith(IGNORED_TAGS):
            yield from _flatten(value, f"{prefix}: {key}" if prefix else key)


def _parquet(first: Path, second: Path) -> Section:
    a, b = ({path.name: path for path in sorted((run / FOLDER).glob("*.parquet"))} for run in (first, second))
    differences, rows = _missing(a, b, first, second), 0
    for name in (name for name in a if name in b):
        tables = _read_table(a[name]), _read_table(b[name])
        rows += len(tables[0])
        differences += [f"{name}: {different}" for different in _table_differences(*tables)]
    return Section(f"{FOLDER}/*.parquet", f"{len(a):,} files, {rows:,} rows", differences)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}): copy it again") from None


def _table_differences(a: pa.Table, b: pa.Table) -> Iterator[str]:
    if not a.schema.equals(b.schema, check_metadata=True):
        names = [table.column_names for table in (a, b)]
        keys = [table.schema.metadata or {} for table in (a, b)]
        other = sorted(key.decode() for key in keys[0].keys() | keys[1].keys() if keys[0].get(key) != keys[1].get(key))
        yield f"other metadata: {', '.join(other)}" if other else f"columns {names[0]} and {names[1]}, or their types"
        return
    for name in a.column_names:
        left, right = a[name], b[name]
        if len(left) != len(right) or not all(x.equals(y) for x, y in zip(_bits(left), _bits(right), strict=True)):
            different = _first_difference(left.to_pylist(), right.to_pylist(), str)
            yield f"column {name}: {different or 'NaNs of other bits'}"


def _bits(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """A column as arrays in which equal values are equal bits: NaN equals itself, 0 does not equal -0."""
    array = column.combine_chunks()
    while isinstance(array.type, pa.ListType | pa.FixedSizeListType):
        yield array.value_lengths() if isinstance(array.type, pa.ListType) else array.is_valid()
        array = array.flatten()
    if isinstance(array.type, pa.DictionaryType):
        array = array.dictionary_decode()
    integers = {pa.float16(): pa.uint16(), pa.float32(): pa.uint32(), pa.float64(): pa.uint64()}
    yield array.view(integers[array.type]) if array.type in integers else array


def _checkpoints(first: Path, second: Path) -> Section:
    newest = [max((run / "checkpoints").glob("step_????????/manifest.json"), default=None) for run in (first, second)]
    name = "newest checkpoint"
    if newest[0] is None or newest[1] is None:
        missing = [f"none in {run}" for run, manifest in zip((first, second), newest, strict=True) if manifest is None]
        return Section(name, "none", missing if len(missing) == 1 else [])
    folders = [manifest.parent for manifest in newest if manifest is not None]
    if folders[0].name != folders[1].name:
        return Section(name, "no tensors", [f"{folders[0].name} and {folders[1].name}"])
    formats = [_parse(folder / "manifest.json", (folder / "manifest.json").read_text())["format"] for folder in folders]
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")} for folder in folders]
    note = ""
    if formats[0] != formats[1]:
        files = [names & set(_SHARED_FILES) for names in files]
        note = f" of model and optimizer only (formats {formats[0]} and {formats[1]})"
    differences, tensors = _missing(dict.fromkeys(files[0]), dict.fromkeys(files[1]), first, second), 0
    for file in sorted(files[0] & files[1]):
        paths = [folder / file for folder in folders]
        try:
            with safe_open(paths[0], framework="pt") as a, safe_open(paths[1], framework="pt") as b:
                in_a, in_b = dict.fromkeys(a.keys()), dict.fromkeys(b.keys())
                tensors += len(in_a)
                differences += [f"{file}: {each}" for each in _missing(in_a, in_b, first, second)]
                for tensor in sorted(in_a.keys() & in_b.keys()):
                    if different := _tensor_difference(a.get_tensor(tensor), b.get_tensor(tensor)):
                        differences.append(f"{file}: {tensor}: {different}")
        except (SafetensorError, OSError) as error:
            raise RunError(f"{paths[0]} or {paths[1]}: cannot be read ({error}): copy it again") from None
    return Section(name, f"{tensors:,} tensors{note}", differences)


def _tensor_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    bits_a, bits_b = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    if torch.equal(bits_a, bits_b):
        return ""
    elements = (bits_a != bits_b).view(a.numel(), -1).any(1)
    return f"{int(elements.sum()):,} of {a.numel():,} elements differ"


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: cannot be read ({error}): copy it again") from None


def _missing(a: Mapping[str, Any], b: Mapping[str, Any], first: Path, second: Path) -> list[str]:
    """Names that only one of two runs has."""
    return [f"{name}: only in {first if name in a else second}" for name in sorted(a.keys() ^ b.keys())]


def _first_difference(a: list[Any], b: list[Any], show: Callable[[Any], str]) -> str:
    """The first difference of two lists and the number of all; empty where they are equal."""
    different = [(x, y) for x, y in zip(a, b, strict=False) if repr(x) != repr(y)]
    lengths = f"{len(a):,} and {len(b):,} entries" if len(a) != len(b) else ""
    if not different:
        return lengths
    x, y = _innermost(*different[0])
    return ", ".join(filter(None, (f"{_clip(show(x))} and {_clip(show(y))}", f"{len(different):,} differ", lengths)))


def _innermost(x: Any, y: Any) -> tuple[Any, Any]:
    """The first part in which two values differ: of records the entries that do, of lists the first element."""
    if isinstance(x, dict) and isinstance(y, dict):
        keys = [key for key in x.keys() | y.keys() if repr(x.get(key)) != repr(y.get(key))]
        return {key: x.get(key) for key in sorted(keys)}, {key: y.get(key) for key in sorted(keys)}
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        return next(_innermost(i, j) for i, j in zip(x, y, strict=True) if repr(i) != repr(j))
    return x, y


def _clip(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
