"""The report of a run: a single self-contained HTML page.

It can be written at any time, of a finished run or of one that is still training. All its numbers come from `open_run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from moetrain.atomic_io import write_file
from moetrain.grokking import PhaseThresholds
from moetrain.grokking.paper import CORRELATIONS
from moetrain.loggers.terminal import Terminal
from moetrain.metrics import table
from moetrain.probes.tasks import ENOUGH
from moetrain.report import findings, learning_figures, limitations, routing_figures
from moetrain.report.charts import map_colors, short
from moetrain.report.evidence import phase_changes
from moetrain.report.open_run import MissingPackageError, OpenedRun, Progress, open_run
from moetrain.report.page import (
    PHASES,
    Group,
    Number,
    color,
    counts_tokens,
    in_yaml,
    render,
    unit,
)
from moetrain.version import __version__

FILE = "report.html"

_FIGURES: dict[str, Callable[[OpenedRun], Group]] = {
    "memorization": learning_figures.memorization,
    "losses": learning_figures.losses,
    "shares": learning_figures.shares,
    "repeats": learning_figures.repeats,
    "gaps": learning_figures.gaps,
    "pairs": learning_figures.pairs,
    "distance": routing_figures.distance_and_loss,
    "routing": routing_figures.routing,
    "layers": routing_figures.by_layer,
    "consistency": routing_figures.consistency,
    "accuracy": learning_figures.accuracy,
    "controls": routing_figures.control,
    "training": routing_figures.training,
}
_COSTS = {
    "train": "training",
    "validate": "held-out loss",
    "panel": "panel",
    "probes": "probes",
    "stream": "recording and streaming metrics",
    "record": "recording and streaming metrics",
    "checkpoint": "checkpoints",
}
_PATHS = ("run.name", "run.output_dir", "data.root", "data.cache_dir")  # settings that are not part of what was trained


def write_report(
    path: str | Path, output: Path | None = None, progress: Progress = lambda what, done, total: None
) -> Path:
    """Write the report of a run; returns its file, ``report.html`` in the run's folder where none is given.

    Raises:
        RunError, StoreError: the folder is no run, or one of its files is corrupt.
        MissingPackageError: pandas, matplotlib or jinja2 is not installed.
        OSError: it could not be written.
    """
    run = open_run(path, progress)
    return write_file(output or run.path / FILE, report(run))


def report_or_say_why(folder: Path, terminal: Terminal) -> Path | None:
    """Write the report of a run that has just ended, or print a line with the reason why there is none."""
    try:
        written = write_report(folder, progress=terminal.preparing)
    except MissingPackageError as missing:
        terminal.note(f"no report: {missing}")
    # The run itself is complete, so no error may give it a failing exit status: a job queue would restart it.
    except Exception as error:
        terminal.note(f"no report ({type(error).__name__}: {error}): run tools/report.py {folder} for details")
    else:
        terminal.note(f"report: {written}")
        return written
    return None


def report(run: OpenedRun) -> str:
    """The report of an opened run as HTML."""
    groups = {}
    for number, (key, make) in enumerate(_FIGURES.items()):
        run.progress("drawing figures", number, len(_FIGURES))
        groups[key] = make(run)
    related = correlation_table(run)
    return render(
        "report.html.j2",
        run=run,
        version=__version__,
        reached=reached(run),
        facts=facts(run),
        unit=unit(run),
        verdicts=findings.verdicts(run),
        colors={domain: color(run, domain) for domain in run.domains},
        stretches=routing_figures.phase_stretches(run, unit(run)),
        phases=PHASES,
        warnings=limitations.limitations(run),
        groups=groups,
        map_colors=map_colors(),
        correlations=related,
        related=list(dict.fromkeys(name for by_domain in related.values() for name in by_domain)),
        paper=CORRELATIONS,
        titles={metric.name: metric.title for metric in table.METRICS},
        controls=findings.controls(run),
        changes=phase_changes(run),
        rule={each.name: run.setting(f"phase.{each.name}") for each in fields(PhaseThresholds)},
        data=run.outcome.get("data", {}),
        tasks=task_table(run),
        enough=ENOUGH,
        settings=changed_settings(run),
        costs=costs(run),
        costs_in_words=costs_in_words(run),
        problems=run.events_of("guard"),
        resumes=run.events_of("resume"),
    )


def reached(run: OpenedRun) -> dict[str, Any]:
    """The newest logged step, the text tokens by then, and when it was logged."""
    scalars = run.scalars
    if not len(scalars):
        return {"step": 0, "tokens": math.nan, "time": ""}
    step = int(scalars["step"].max())
    return {
        "step": step,
        "tokens": float(run.tokens([step])[0]),
        "time": scalars["time"].max().strftime("%Y-%m-%d %H:%M UTC"),
    }


def facts(run: OpenedRun) -> list[tuple[str, str]]:
    """What was trained: pairs of a number and its meaning."""
    found = []
    parameters = run.outcome.get("parameters")
    if parameters:
        found.append((short(parameters["all"]), f"parameters, {short(parameters['active'])} active"))
    if run.setting("model.experts") == "dense":
        blocks = run.setting("model.dense_experts")
        monitored = f", monitored as {blocks} blocks of hidden units each" if blocks else ""
        found.append((str(run.setting("model.num_hidden_layers")), f"layers without experts{monitored}"))
    else:
        experts, top = run.setting("model.num_experts"), run.setting("model.num_experts_per_tok")
        found.append((f"{experts}", f"experts, top {top}, in {run.setting('model.num_hidden_layers')} layers"))
    now = reached(run)
    # In another trainer's rows begin and end tokens cannot be told from text.
    text, marks = ("text ", ", with begin and end tokens") if _is_ours(run) else ("", "")
    if counts_tokens(run):
        found.append((short(now["tokens"]), f"{text}tokens in {now['step']:,} steps"))
    else:
        found.append((f"{now['step']:,}", "steps"))
    speed = run.curve("system/tokens_per_second")["value"]
    if len(speed):
        average = run.outcome.get("tokens_per_second")
        when = "" if average else ", newest"
        found.append((short(average or speed.iloc[-1]), f"tokens per second{marks}{when}"))
    if (share := monitor_share(run)) is not None:
        found.append((f"{share:.1%}", f"{_of_the_time(run)} spent on monitoring"))
    return found


def _is_ours(run: OpenedRun) -> bool:
    """Whether moetrain trained the run, and did not watch another trainer, whose settings it does not know."""
    return bool(run.settings["setting"].str.startswith("train.").any())


def monitor_share(run: OpenedRun) -> float | None:
    """The share of the time spent on monitoring: of the whole run at its end, else at the newest point."""
    share = run.curve("system/monitor_share")["value"]
    return float(run.outcome.get("monitor_share", share.iloc[-1])) if len(share) else None


def _of_the_time(run: OpenedRun) -> str:
    """The time that shares of it are of: a resumed run measures that of its newest process."""
    resumes = run.events_of("resume")
    if resumes:
        return f"of the time since step {resumes[-1]['step']:,}, where it was resumed,"
    return "of the run's time" if run.finished else "of the time so far"


def correlation_table(run: OpenedRun) -> dict[str, dict[str, dict[tuple[str, str], dict[str, Any]]]]:
    """Correlations by predictor and domain, each by (series, method); only those that exist."""
    found: dict[str, dict[str, dict[tuple[str, str], dict[str, Any]]]] = {}
    for row in run.correlations.to_dict("records"):
        if row["predictor"]:
            by_domain = found.setdefault(row["predictor"], {})
            number = Number(row["value"], row["low"], row["high"], row["n"])
            kind = row["series"], row["method"]
            by_domain.setdefault(row["domain"], {})[kind] = {"number": number, "p": row["p"], "note": row["note"]}
    return {name: found[name] for name in table.predictors() if name in found}


def task_table(run: OpenedRun) -> list[dict[str, Any]]:
    """Each probe with its newest metrics."""
    rows = []
    for task in run.tasks.to_dict("records"):
        own = run.summary[run.summary["task"] == task["task"]]
        metrics = {
            row["metric"]: Number(row["value"], row["low"], row["high"], row["n"]) for row in own.to_dict("records")
        }
        rows.append({**task, "metrics": metrics})
    return rows


def changed_settings(run: OpenedRun) -> list[tuple[str, str, str]]:
    """Settings that are not the default, except names and paths: (name, value, default)."""
    return [
        (name, in_yaml(value), in_yaml(default))
        for name, value, default in run.settings.itertuples(index=False)
        if value != default and name not in _PATHS
    ]


def costs(run: OpenedRun) -> list[tuple[str, float]]:
    """Shares of the run's time by purpose; for an unfinished run those of monitoring only."""
    seconds = run.outcome.get("seconds")
    if not seconds:
        parts = {"panel": "panel", "probes": "probes", "stream": "recording and streaming metrics"}
        curves = {title: run.curve(f"system/monitor_{name}")["value"] for name, title in parts.items()}
        return [(title, float(curve.iloc[-1])) for title, curve in curves.items() if len(curve)]
    found: dict[str, float] = {}
    for name, spent in seconds.items():
        title = _COSTS.get(name, name)
        found[title] = found.get(title, 0.0) + spent / sum(seconds.values())
    return sorted(found.items(), key=lambda item: -item[1])


def costs_in_words(run: OpenedRun) -> str:
    """What the shares of `costs` are of, and which of them are the share of monitoring."""
    share = monitor_share(run)
    if share is None:
        return ""
    shares = f"Shares {_of_the_time(run).rstrip(',')}"
    return f"{shares}. Panel, probes, and recording and streaming metrics are monitoring: {share:.1%} in all."
