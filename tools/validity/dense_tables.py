"""The tables of tools/dense_pathways.py: how well each measure tells the rules from the random answers.

The rules are the domains ``add`` and ``subtract``, the control ``random_answers``. In each run a measure's difference
is its mean over the rules minus its value for the random answers. The null beside it is ``add`` minus ``subtract``: two
domains of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from validity.separation import auc
from validity.units import BASELINES, METRICS

RULES, NOISE = ("add", "subtract"), "random_answers"
_SHOWN = METRICS | {name: BASELINES[name] for name in ("loss/panel_seen", "memorized/gap_heldout")}
_SHOWN |= {"pathway_heldout/d_path_norm": "D_path, normalised, of held-out samples"}
_SHOWN |= {"pathway_heldout/spread": "spread of held-out samples"}
_KINDS = {"moe": "mixture of experts", "dense": "dense twin in 16 blocks"}

OfSeeds = Mapping[str, Mapping[str, Mapping[str, list[float | None]]]]
"""By seed, metric and domain, the values over the readings."""


def tables(found: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """By title: accuracies, and per kind of model and moment a row per measure."""
    steps = found["steps"]
    shown = {"accuracy on trained and held-out facts": accuracies(found["values"], steps)}
    for kind, of_seeds in found["values"].items():
        for number in (len(steps) - 1, len(steps) // 2, 0):
            shown[f"{_KINDS[kind]}, step {steps[number]:,}"] = measures(of_seeds, number)
    own = {seed: _last(metrics) for seed, metrics in found["values"].get("dense", {}).items()}
    if own:
        others = found["last reading with other blocks"]
        shown[f"dense twin, AUC by blocks, step {steps[-1]:,}"] = by_blocks({"16 blocks": own, **others})
    return shown


def of_study(readings: pd.DataFrame) -> pd.DataFrame:
    """The same table of the mixtures of experts of the study with planted truth: its rule and its random answers.

    Args:
        readings: the study's table of that name.
    """
    rule, noise = "modular", "random"
    last = readings[readings["step"] == readings.groupby("run")["step"].transform("max")]
    of_seeds: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for row in last[last["domain"].isin([rule, noise])].itertuples():
        of_seeds.setdefault(row.run, {}).setdefault(row.metric, {})[row.domain] = [row.value]
    return measures(of_seeds, 0, (rule,), noise)


def by_blocks(found: Mapping[str, OfSeeds]) -> pd.DataFrame:
    """A row per measure of routing that other blocks have too, and the AUC with each kind of blocks."""
    columns = {name: measures(of_seeds, 0).set_index("measure")["AUC"] for name, of_seeds in found.items()}
    table = pd.DataFrame(columns)
    own_rows = [title for title in table.index[table.notna().all(axis=1)] if "loss" not in title]
    return table.loc[own_rows].reset_index(names="measure")


def _last(metrics: Mapping[str, Mapping[str, list[float | None]]]) -> dict[str, dict[str, list[float | None]]]:
    return {metric: {domain: row[-1:] for domain, row in of.items()} for metric, of in metrics.items()}


def accuracies(values: Mapping[str, OfSeeds], steps: list[int]) -> pd.DataFrame:
    """Accuracy of free answers by model, seed and domain, at some of the readings."""
    rows = []
    for kind, of_seeds in values.items():
        for seed, metrics in sorted(of_seeds.items()):
            for domain in (*RULES, NOISE):
                row: dict[str, object] = {"model": kind, "seed": seed, "domain": domain}
                for number in sorted({*range(0, len(steps), 2), len(steps) - 1}):
                    pair = (metrics[name][domain][number] for name in ("trained_accuracy", "heldout_accuracy"))
                    row[f"step {steps[number]:,}"] = " / ".join(f"{value:.2f}" for value in pair if value is not None)
                rows.append(row)
    return pd.DataFrame(rows)


def measures(of_seeds: OfSeeds, number: int, rules: tuple[str, ...] = RULES, noise: str = NOISE) -> pd.DataFrame:
    """A row per measure at one reading: values, difference with interval, null, AUC.

    The intervals are Student's over runs. AUC above 0.5: larger for the rules. ``pairs`` counts the pairs of a rule and
    the random answers of the same run in which the rule has the larger value. With one rule there is no null.
    """
    rows = []
    for metric, title in _SHOWN.items():
        units = [of[metric] for _, of in sorted(of_seeds.items()) if metric in of]
        units = [of for of in units if all(of.get(d, [None])[number] is not None for d in (*rules, noise))]
        if not units:
            continue
        rule_RS = np.array([[of[domain][number] for of in units] for domain in rules], float)
        noise_S = np.array([of[noise][number] for of in units], float)
        rows.append(
            {
                "measure": title,
                "runs": len(units),
                "rules": f"{rule_RS.mean():.4g}",
                "random": f"{noise_S.mean():.4g}",
                "rules - random": _interval(rule_RS.mean(0) - noise_S),
                "rule - rule": _interval(rule_RS[0] - rule_RS[1]) if len(rules) == 2 else "-",
                "AUC": f"{auc(rule_RS.ravel(), noise_S):.2f}",
                "pairs": f"{int((rule_RS > noise_S).sum())} of {rule_RS.size}",
            }
        )
    return pd.DataFrame(rows)


def _interval(values: np.ndarray) -> str:
    mean, runs = values.mean(), len(values)
    if runs < 2:
        return f"{mean:+.3g}"
    half = t.ppf(0.975, runs - 1) * values.std(ddof=1) / runs**0.5
    return f"{mean:+.3g} ({mean - half:+.3g} to {mean + half:+.3g})"
