"""Tables 1, 2, 4 and 5: correlations by the paper's protocol, data sets, LoRA ranks, zero-shot tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.loggers.terminal import Terminal
from moetrain.paper.correlations import LEAST, TITLES, Accuracy, predictor_values, table_of
from moetrain.paper.delays import paired_after_tuning
from moetrain.paper.instructed import Protocol, Scored, score_checkpoints
from moetrain.paper.learning import answers_of, untrained_tasks
from moetrain.paper.results import PaperError, Result, Row, table_picture
from moetrain.probes.tasks import Task, load_tasks
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel import CELLS

ZERO_SHOT = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa")
"""The tasks of table 5."""


def own_tasks(folder: Path, terminal: Terminal) -> list[Task]:
    """The tasks that a run probes itself with, those of trained facts among them.

    Raises:
        SettingsError, DataError: its data cannot be had.
    """
    settings = load_settings(folder / "config.yaml")
    return load_tasks(settings, prepare_corpus(settings, terminal.preparing), terminal.preparing).tasks


def _accuracies(scored: Scored, run: OpenedRun) -> list[Accuracy]:
    found = []
    for domain in scored.domains:
        correct_IT = scored.of_domain(domain)
        if len(correct_IT) and domain in run.domains:
            values_T = correct_IT.mean(0)
            found.append(Accuracy(domain, domain, scored.steps, values_T, len(correct_IT), scored.chance(domain)))
    if not found:
        raise PaperError(
            f"no task is of a domain of the run: the tasks are of {', '.join(scored.domains) or 'none'}, the run has "
            f"{', '.join(run.domains)}"
        )
    return found


def _facts(scored: Scored, protocol: Protocol) -> dict[str, Any]:
    gained = {
        task.name: {
            "items": len(task.items),
            "removed": len(scored.removed[task.name]),
            "accuracy_before": scored.before[task.name].mean(0),
            "accuracy_after": scored.after[task.name].mean(0),
        }
        for task in scored.tasks
    }
    examples = {domain: len(found) for domain, found in protocol.instructions.items()}
    return {"lora": asdict(protocol.lora), "instructions": examples, "removed_share": protocol.removed, "tasks": gained}


def after_tuning(
    run: OpenedRun, folder: Path, protocol: Protocol, cache: Path, terminal: Terminal, name: str = "table1"
) -> Result:
    """Table 1: LoRA at each checkpoint, accuracy of the tuned models, correlations with the metrics, and delays.

    Args:
        run: with readings of the panel at the checkpoints: the run, or its replay.
        folder: of the run, which has the checkpoints.
        cache: folder of the scores.
    """
    scored = score_checkpoints(folder, protocol, cache, terminal.preparing)
    each = _accuracies(scored, run)
    delays, words = paired_after_tuning(run, folder, scored, terminal)
    title = (
        f"Table 1: correlation with accuracy after LoRA (rank {protocol.lora.rank}), {len(scored.steps)} checkpoints"
    )
    measured = [(one, predictor_values(run, one.domain, one.steps.tolist())) for one in each]
    result = table_of(name, title, measured, _facts(scored, protocol) | {"delays": delays})
    return replace(result, notes=[*result.notes, *words])


def by_rank(
    run: OpenedRun,
    folder: Path,
    protocol: Protocol,
    cache: Path,
    terminal: Terminal,
    ranks: Sequence[int],
    domain: str | None = None,
) -> Result:
    """Table 4: the correlations of one domain with LoRA of several ranks; the adapters' scale stays alpha / rank."""
    each, facts = [], {}
    scale = protocol.lora.alpha / protocol.lora.rank
    for rank in ranks:
        own = replace(protocol, lora=replace(protocol.lora, rank=rank, alpha=scale * rank))
        scored = score_checkpoints(folder, own, cache, terminal.preparing)
        found = {one.domain: one for one in _accuracies(scored, run)}
        chosen = domain or next(iter(found))
        if chosen not in found:
            raise PaperError(f"--domain {chosen}: tasks are of {', '.join(found)}")
        each.append(replace(found[chosen], name=f"rank {rank}"))
        facts[f"rank {rank}"] = _facts(scored, own)
    title = f"Table 4: correlations by LoRA rank, {each[0].domain}, {len(each[0].steps)} checkpoints"
    predictors = predictor_values(run, each[0].domain, each[0].steps.tolist())
    return table_of("table4", title, [(one, predictors) for one in each], facts)


def zero_shot(run: OpenedRun, tasks: Sequence[str] | None = None) -> Result:
    """Table 5: correlations of each task's zero-shot accuracy, as the run's probes recorded it.

    Metrics are those of the task's domain; where the run has no domain of that name, means over all domains.

    Raises:
        PaperError: no such task, or fewer than four readings of it.
    """
    known = list(run.tasks.loc[run.tasks["chance"].notna(), "task"])
    untrained = [task for domain in dict.fromkeys(run.tasks["domain"]) for task in untrained_tasks(run, domain)]
    wanted = list(
        tasks or [task for task in ZERO_SHOT if task in known] or [each for each in known if each in untrained]
    )
    measured, used = [], {}
    for task in wanted:
        answers = answers_of(run, [task])
        if answers is None:
            remedy = f"the tasks that are: {', '.join(known)}" if known else "nor is any other: set probes.tasks"
            raise PaperError(f"--task {task}: no task of this run that is answered right or wrong; {remedy}")
        both = np.isin(answers.steps, run.reading_steps)
        if both.sum() < LEAST:
            raise PaperError(f"{run.path}: {task} and the panel have {both.sum()} common readings, {LEAST} are needed")
        about = run.tasks.set_index("task").loc[task]
        items, chance, domain = len(answers.correct), float(about["chance"]), str(about["domain"])
        steps = answers.steps[both]
        used[task] = [domain] if domain in run.domains else run.domains
        values = [predictor_values(run, own, steps.tolist()) for own in used[task]]
        predictors = {name: np.mean([each[name] for each in values], axis=0) for name in TITLES}
        measured.append((Accuracy(task, domain, steps, answers.correct[:, both].mean(0), items, chance), predictors))
    if not measured:
        raise PaperError(f"{run.path}: table5: no task that is answered right or wrong was read: set probes.tasks")
    title = f"Table 5: correlation with zero-shot accuracy by task, {run.name}"
    return table_of("table5", title, measured, {"metrics_of_domains": used})


def data_sets(run: OpenedRun) -> Result:
    """Table 2: the text that a run trains on, what it holds out, and the benchmarks it is asked.

    Raises:
        PaperError: the run has not ended.
    """
    data = run.outcome.get("data")
    if not data:
        raise PaperError(f"{run.path}: table2 needs summary.json of a finished run")
    rows: list[Row] = []
    for domain in run.domains:
        given = [f"data.domains.{domain}.{name}" for name in ("path", "hub", "builtin")]
        source = next(str(run.setting(name)) for name in given if run.setting(name) is not None)
        items = run.probes.groupby("task")["item"].nunique() if len(run.probes) else {}
        tests = [f"{task} ({items[task]})" for task in untrained_tasks(run, domain) if task in items]
        panel = run.panel[(run.panel["domain"] == domain) & (run.panel["step"] == run.panel["step"].max())]
        cells = panel["cell"].value_counts()
        rows.append(
            {"panel": domain, "source": source, "test": ", ".join(tests)}
            | {f"panel_{cell}": int(cells.get(cell, 0)) for cell in CELLS}
            | {name: value for name, value in data[domain].items() if isinstance(value, int | float | str)}
        )
    columns = ["domain", "pretraining source", "panel: seen, to come, held out", "test items"]
    cells_of = [
        [row["panel"], row["source"], ", ".join(str(row[f"panel_{cell}"]) for cell in CELLS), row["test"]]
        for row in rows
    ]
    return Result("table2", f"Table 2: data of {run.name}", rows, table_picture(columns, cells_of))
