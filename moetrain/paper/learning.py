"""Figures 1 and 2: samples memorized and accuracy over time, and pairs of memorized and generalized groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.paper.dynamics import numbers
from moetrain.paper.groups import DomainSamples, samples_of
from moetrain.paper.results import COLORS, PaperError, Result, Row, band, grid, titled
from moetrain.report.open_run import OpenedRun

MOST_PAIRS = 4


def memorized_and_accuracy(run: OpenedRun, domains: Sequence[str] | None = None) -> Result:
    """Figure 1: samples memorized by each reading, by onset, beside the accuracy of the domain's probes."""
    each = samples_of(run, domains)
    rows: list[Row] = []
    for samples in each:
        rows += _memorized_rows(samples)
        own = run.accuracy[(run.accuracy["domain"] == samples.domain) & ~run.accuracy["trained"]]
        for one in own.to_dict("records"):
            found = Estimate(one["accuracy"], one["low"], one["high"], int(one["items"]), 0)
            rows.append({"panel": samples.domain, "series": "accuracy", "step": one["step"], **numbers(found)})
    facts = {
        samples.domain: {"eps": samples.eps, "delta": samples.delta, "samples": len(samples)}
        | _onset_facts(run, samples)
        for samples in each
    }
    notes = [_first_words(samples, facts[samples.domain]) for samples in each]

    def picture(plt: Any) -> Any:
        figure, axes = grid(plt, len(each))
        for axis, samples in zip(axes, each, strict=True):
            titled(axis, samples.domain, y="memorized samples (bars)")
            _bars(axis, samples)
            right = axis.twinx()
            right.set_ylim(-0.03, 1.03)
            right.set_ylabel("accuracy", fontsize=6)
            right.tick_params(labelsize=6)
            own = [row for row in rows if row["panel"] == samples.domain and row["series"] == "accuracy"]
            if own:
                band(right, [row["step"] for row in own], own, COLORS[1], "accuracy")
        return figure

    return Result("figure1", "Figure 1: memorized samples and accuracy", rows, picture, facts, notes)


def _memorized_rows(samples: DomainSamples) -> list[Row]:
    """The share of samples memorized by each reading, with an interval over documents."""
    onsets_S = samples.onsets()
    found = []
    for t, step in enumerate(samples.steps):
        held_S = (onsets_S >= 0) & (onsets_S <= t)
        share = grokking.memorized_fraction(held_S, samples.documents)
        new = int((onsets_S == t).sum())
        found.append(
            {"panel": samples.domain, "series": "memorized share", "step": int(step)}
            | numbers(share)
            | {"samples": int(held_S.sum()), "new": new}
        )
    return found


def _onset_facts(run: OpenedRun, samples: DomainSamples) -> Row:
    """When a fifth of the samples is memorized, and when accuracy exceeds chance for good."""
    onsets_S = samples.onsets()
    count = int(np.ceil(0.2 * len(samples)))
    sorted_S = np.sort(onsets_S[onsets_S >= 0])
    own = run.accuracy[(run.accuracy["domain"] == samples.domain) & ~run.accuracy["trained"]]
    first = None
    if len(own):
        first = grokking.first_above_chance(own["accuracy"], own["chance"].iloc[0], int(own["items"].iloc[0]))
    return {
        "step_of_first_memorized": int(samples.steps[sorted_S[0]]) if len(sorted_S) else None,
        "step_of_a_fifth_memorized": int(samples.steps[sorted_S[count - 1]]) if len(sorted_S) >= count else None,
        "step_of_accuracy_above_chance": None if first is None else int(own["step"].iloc[first]),
    }


def _first_words(samples: DomainSamples, facts: Row) -> str:
    fifth, above = facts["step_of_a_fifth_memorized"], facts["step_of_accuracy_above_chance"]
    if fifth is None:
        return f"{samples.domain}: fewer than a fifth of {len(samples)} samples count as memorized, whatever eps"
    accuracy = f"accuracy exceeds chance from step {above:,} on" if above is not None else "accuracy stays at chance"
    return (
        f"{samples.domain} (n={len(samples)}, eps={samples.eps:g}): a fifth is memorized by step {fifth:,}; {accuracy}"
    )


def _bars(axis: Any, samples: DomainSamples) -> None:
    """Stacked bars: how many samples of each onset are memorized by each reading."""
    onsets_S = samples.onsets()
    width = 0.7 * (samples.steps[1] - samples.steps[0])
    below = np.zeros(len(samples.steps))
    known = np.unique(onsets_S[onsets_S >= 0])
    for number, onset in enumerate(known):
        height = (onsets_S == onset).sum() * (np.arange(len(samples.steps)) >= onset)
        shade = 0.25 + 0.65 * number / max(1, len(known) - 1)
        axis.bar(samples.steps, height, width, below, color=COLORS[0], alpha=shade, linewidth=0)
        below += height


@dataclass(frozen=True)
class Answers:
    """Whether each item of a domain was answered right at each reading of the probes."""

    steps: np.ndarray  # [T]
    correct: np.ndarray  # bool [I, T]


def answers_of(run: OpenedRun, tasks: Sequence[str]) -> Answers | None:
    """The answers to all items of some tasks; None where none of them was answered right or wrong."""
    own = run.probes[run.probes["task"].isin(tasks) & run.probes["correct"].notna()]
    if not len(own):
        return None
    table: pd.DataFrame = own.pivot(index=["task", "item"], columns="step", values="correct")
    return Answers(table.columns.to_numpy(), table.to_numpy(bool))


def untrained_tasks(run: OpenedRun, domain: str) -> list[str]:
    """Names of a domain's tasks that do not ask trained facts."""
    trained = run.tasks["trained"].astype("boolean").fillna(True)
    return list(run.tasks.loc[(run.tasks["domain"] == domain) & ~trained, "task"])


def paired_groups(run: OpenedRun, domain: str | None = None) -> Result:
    """Figure 2: loss of memorized groups and accuracy of the groups of items they are paired with.

    The pairs are those of the finished run's summary: Hungarian matching of text embeddings.

    Raises:
        PaperError: the run has no pairs.
    """
    if not run.outcome:
        raise PaperError(
            f"{run.path}: figure2 needs the pairs of a finished run or replay, and there is no summary.json"
        )
    pairs = run.delays[run.delays["memorized_step"] >= 0] if len(run.delays) else run.delays
    if domain:
        pairs = pairs[pairs["domain"] == domain]
    if not len(pairs):
        said = "; ".join(f"{one['domain']}: {one['note']}" for one in run.delays.to_dict("records") if one["note"])
        raise PaperError(f"{run.path}: figure2: no groups are paired{f' ({said})' if said else ''}")
    name = str(domain or pairs["domain"].iloc[0])
    chosen = pairs[pairs["domain"] == name].sort_values("memorized_step")
    samples, answers = DomainSamples(run, name), answers_of(run, untrained_tasks(run, name))
    assert answers is not None  # the pairs come from these
    onsets_S = samples.onsets()
    onsets_I = grokking.generalized_onsets(answers.correct, min_tail=MIN_TAIL_IN_RUNS)
    rows: list[Row] = []
    shown = chosen.head(MOST_PAIRS).to_dict("records")
    for pair in shown:
        panel = f"Pretrain@{pair['memorized_step']:,} → Test@{pair['generalized_step']:,}"
        members = np.flatnonzero(onsets_S == np.searchsorted(samples.steps, pair["memorized_step"]))
        items = np.flatnonzero(onsets_I == np.searchsorted(answers.steps, pair["generalized_step"]))
        for step, losses in zip(samples.steps, samples.losses_ST[members].T, strict=True):
            found = grokking.mean_over_documents(losses, samples.documents[members])
            rows.append({"panel": panel, "series": "loss", "step": int(step), **numbers(found)})
        for step, right in zip(answers.steps, answers.correct[items].T, strict=True):
            found = grokking.share(int(right.sum()), len(right))
            rows.append({"panel": panel, "series": "accuracy", "step": int(step), **numbers(found)})
    notes = [
        f"{name}, memorized at {pair['memorized_step']:,} (n={pair['samples']}), generalized at "
        f"{pair['generalized_step']:,} (n={pair['items']}): delay {pair['delay_steps']:+,.0f} steps, "
        f"to within {pair['resolution_steps']:,.0f}"
        for pair in chosen.to_dict("records")
    ]
    facts = {"domain": name, "eps": samples.eps, "pairs": chosen.drop(columns="note").to_dict("records")}
    facts["delay_by_onset"] = _trend_of_delays(chosen)

    def picture(plt: Any) -> Any:
        figure, axes = grid(plt, len(shown))
        for axis, panel in zip(axes, dict.fromkeys(row["panel"] for row in rows), strict=True):
            titled(axis, panel, y="loss, nats")
            right = axis.twinx()
            right.set_ylim(-0.03, 1.03)
            right.tick_params(labelsize=6)
            right.set_ylabel("accuracy", fontsize=6)
            for target, series, color in ((axis, "loss", COLORS[0]), (right, "accuracy", COLORS[1])):
                own = [row for row in rows if row["panel"] == panel and row["series"] == series]
                band(target, [row["step"] for row in own], own, color, series)
        return figure

    return Result(
        "figure2",
        f"Figure 2: memorized groups and the test groups paired with them, {name}",
        rows,
        picture,
        facts,
        notes,
    )


def _trend_of_delays(pairs: pd.DataFrame) -> Row:
    """Rank correlation of delay with onset over the pairs: the paper finds longer delays for later groups."""
    if len(pairs) < 3:
        return {"note": "fewer than 3 pairs", "n": len(pairs)}
    from scipy.stats import spearmanr

    found = spearmanr(pairs["memorized_step"], pairs["delay_steps"])
    return {"spearman": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}
