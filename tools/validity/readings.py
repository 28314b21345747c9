"""The committed tables of the study, from which every reported number is computed.

``readings``: run, domain, step, metric, value, low, high, n: every panel metric of every domain at every reading; the
accuracy of probes on trained and on held-out facts (``trained_accuracy``, ``heldout_accuracy``); and, with an empty
domain, router entropy and load of the whole model.
``correlations``, ``delays``, ``onsets``, ``layers``: the frames of `open_run`, with the run's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import moetrain
from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import run_steps, training_stream
from moetrain.grokking import share
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel import SEEN, draw_panel
from moetrain.routing.panel_metrics import panel_metrics
from validity.plan import FINISHED, STUDIES, Planned, StudyError

TABLES = ("readings", "correlations", "delays", "onsets", "layers")
_OPEN = ("_open", "_open_trained")  # tasks with free answers, not multiple choice
_WHOLE_MODEL = {"experts/entropy": "entropy", "experts/load_cv": "load_cv"}


def measure(
    runs: Sequence[Planned], output: Path, progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, pd.DataFrame]:
    """The study's tables from the folders of its finished runs.

    Raises:
        StudyError: no run is finished.
    """
    finished = [run for run in runs if (output / run.name / FINISHED).is_file()]
    if not finished:
        raise StudyError(f"{output}: no finished run of the study: train them with `validate_monitor.py run`")
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for number, planned in enumerate(finished):
        progress(planned.name, number, len(finished))
        run = moetrain.open_run(output / planned.name)
        frames = {
            "readings": pd.concat([panel_values(run), answer_accuracies(run), _model(run)], ignore_index=True),
            "correlations": run.correlations,
            "delays": run.delays,
            "onsets": run.onsets[["domain", "step"]],
            "layers": run.by_layer,
        }
        for name, frame in frames.items():
            parts[name].append(frame.assign(run=planned.name))
    return {name: pd.concat(listed, ignore_index=True) for name, listed in parts.items()}


def renew(tables: dict[str, pd.DataFrame], folder: Path) -> dict[str, pd.DataFrame]:
    """A folder's tables with the rows of these runs replaced; rows of other runs are kept."""
    if not all((folder / f"{name}.parquet").is_file() for name in TABLES):
        return tables
    measured = set(tables["readings"]["run"])
    kept = {name: frame[~frame["run"].isin(measured)] for name, frame in load(folder).items()}
    return {name: pd.concat([kept[name], frame], ignore_index=True) for name, frame in tables.items()}


def with_other_runs(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A table, and the rows of a file that are of other runs; the file need not exist."""
    if not path.is_file():
        return table
    before = pd.read_parquet(path)
    return pd.concat([before[~before["run"].isin(set(table["run"]))], table], ignore_index=True)


def save(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write the tables, with numbers in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        small = frame.astype({column: np.float32 for column in frame.columns if frame[column].dtype == np.float64})
        table = pa.Table.from_pandas(small, preserve_index=False).replace_schema_metadata(None)
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", compression_level=19)


def load(folder: Path) -> dict[str, pd.DataFrame]:
    """Read the saved tables.

    Raises:
        StudyError: one is missing.
    """
    if missing := [name for name in TABLES if not (folder / f"{name}.parquet").is_file()]:
        raise StudyError(f"{folder / missing[0]}.parquet: missing: write it with `validate_monitor.py measure`")
    return {name: pq.read_table(folder / f"{name}.parquet").to_pandas() for name in TABLES}


SHARE = "memorized/share"
FREQUENCIES = "loss/panel_frequencies"


def with_share(readings: pd.DataFrame) -> pd.DataFrame:
    """The readings with the memorized share, for runs from before it was measured.

    It follows from the gap to held-out samples, whose interval becomes that of the share, and from the loss of held-out
    samples before the first step.
    """
    if (readings["metric"] == SHARE).any():
        return readings
    keys = ["run", "domain", "step"]
    gap, heldout, seen = (
        readings[readings["metric"] == metric].set_index(keys)
        for metric in ("memorized/gap_heldout", "loss/panel_heldout", "loss/panel_seen")
    )
    if not len(gap) or not len(heldout):
        return readings
    initial = heldout.loc[heldout.index.get_level_values("step") == 0, "value"].droplevel("step")
    learned = gap.droplevel("step").index.map(initial).to_numpy() - seen["value"].reindex(gap.index).to_numpy()
    share = gap.assign(metric=SHARE)
    for column in ("value", "low", "high"):
        share[column] = share[column] / np.where(learned > 0, learned, np.nan)
    return pd.concat([readings, share.reset_index()[readings.columns]], ignore_index=True)


def with_frequencies(
    readings: pd.DataFrame, runs: Sequence[Planned], progress: Callable[[str, int, int], None] = lambda *_: None
) -> pd.DataFrame:
    """The readings with the loss of the seen samples under token frequencies, for runs from before it was recorded.

    The panel is drawn again from the plan; nothing is trained.
    """
    missing = set(readings["run"]) - set(readings.loc[readings["metric"] == FREQUENCIES, "run"])
    parts = [readings]
    for number, planned in enumerate(run for run in runs if run.name in missing):
        progress(planned.name, number, len(missing))
        settings = load_settings(STUDIES[planned.study] / "base.yaml", planned.overrides)
        corpus = prepare_corpus(settings)
        stream = training_stream(corpus, settings)
        panel = draw_panel(corpus, stream, settings, run_steps(stream, settings), settings.train.batch_rows)
        for domain, name in enumerate(settings.data.domains):
            own = readings[(readings["run"] == planned.name) & (readings["domain"] == name)]
            added = own[own["metric"] == "loss/panel_seen"].assign(metric=FREQUENCIES, low=np.nan, high=np.nan)
            parts.append(added.assign(value=panel.difficulty[panel.members(domain, SEEN)].mean()))
    return pd.concat(parts, ignore_index=True)


def panel_values(run: OpenedRun) -> pd.DataFrame:
    """Rows of ``readings``: every panel metric, and the number of tokens that routing is compared over."""
    rows = []
    for step in run.reading_steps:
        for tag, each in panel_metrics(run.reading(step), run.domains, run.setting("monitor.tau"), 2 * step).items():
            metric, _, domain = tag.rpartition("/")
            rows.append((domain, step, metric, each.mean, each.low, each.high, each.samples))
        lengths = run.panel.loc[run.panel["step"] == step].groupby("domain", observed=True)["tokens"].first()
        rows += [(str(domain), step, "length", tokens, np.nan, np.nan, 1) for domain, tokens in lengths.items()]
    return _frame(rows)


def answer_accuracies(run: OpenedRun) -> pd.DataFrame:
    """Accuracy of free answers, with Wilson's interval."""
    asked = run.tasks[run.tasks["task"].str.endswith(_OPEN)]
    answers = run.probes.merge(asked[["task", "trained"]], on="task")
    rows = []
    for (domain, trained, step), own in answers.groupby(["domain", "trained", "step"], observed=True):
        found = share(int(own["correct"].sum()), len(own))
        name = "trained_accuracy" if trained else "heldout_accuracy"
        rows.append((domain, int(step), name, found.mean, found.low, found.high, found.samples))
    return _frame(rows)


def _model(run: OpenedRun) -> pd.DataFrame:
    """Routing metrics of the whole model, at the logged step nearest to each reading."""
    rows = []
    for tag, metric in _WHOLE_MODEL.items():
        curve = run.curve(tag)
        for step in run.reading_steps:
            nearest = (curve["step"] - step).abs().argmin()
            rows.append(("", step, metric, curve["value"].iloc[nearest], np.nan, np.nan, 1))
    return _frame(rows)


def _frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["domain", "step", "metric", "value", "low", "high", "n"])
