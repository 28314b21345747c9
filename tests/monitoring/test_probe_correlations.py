import json
from dataclasses import replace

import numpy as np
import pytest

from moetrain import grokking
from moetrain.metrics import table
from moetrain.metrics.latest import LatestMetrics
from moetrain.monitoring.probe_correlations import ProbeCorrelations
from moetrain.probes.history import ProbeHistory
from moetrain.probes.scoring import Measured, TaskScore
from moetrain.probes.tasks import Task

ITEMS, READINGS = 200, 14


def a_task(name, domain, **more):
    items = tuple({"id": n, "choices": ["a", "b", "c", "d"], "answer": 0} for n in range(ITEMS))
    return Task(name, domain, "choice", items, **more)


def filled(accuracy, predictor=None):
    """Correlations with the given accuracy in `math`; one predictor follows a series, the others are missing."""
    tasks = [a_task("quiz", "math"), a_task("quiz_trained", "math", trained=True), a_task("other", "elsewhere")]
    history = ProbeHistory(tasks)
    correlations = ProbeCorrelations(["math", "code"], history)
    for reading, share in enumerate(accuracy):
        correct = np.arange(ITEMS) < round(share * ITEMS)
        scores = {
            task.name: TaskScore(
                task,
                [],
                correct if task.name == "quiz" else np.ones(ITEMS, bool),
                {"accuracy": Measured.of(correct)},
                0,
            )
            for task in tasks
        }
        history.add(100 * reading, 1000 * reading, scores)
        value = {} if predictor is None else {"pathway/d_path": {"value": float(predictor[reading])}}
        latest = LatestMetrics(["math", "code"])
        latest.domains["math"]["metrics"] = value
        correlations.add(latest)
    return correlations


RISING = np.concatenate([[0.25, 0.25], np.linspace(0.4, 0.9, READINGS - 2)])
FALLING = np.concatenate([[50.0, 49.0], np.linspace(40, 20, READINGS - 2) + np.sin(np.arange(READINGS - 2))])


def test_correlation_begins_where_accuracy_leaves_chance():
    correlations = filled(RISING, FALLING)
    accuracy, chance, items = correlations.accuracy("math")
    assert (chance, items) == (0.25, ITEMS)
    assert np.allclose(accuracy, RISING, atol=0.003)  # of the task that is not of trained facts
    found = correlations.correlations("math")["d_path"]
    expected = grokking.correlate(FALLING[2:], accuracy[2:], 1000.0 * np.arange(2, READINGS))
    assert repr(found) == repr(expected)
    assert found["raw", "spearman"].value < -0.9
    assert found["raw", "spearman"].n == READINGS - 2


def test_a_predictor_without_values_says_that_they_are_too_few():
    found = filled(RISING, FALLING).correlations("math")
    assert set(found) == set(table.predictors())
    assert found["d_eff"]["raw", "pearson"].note == "too few"


def test_a_domain_without_tasks_or_above_chance_says_so_in_words():
    assert filled(RISING).as_dict("code") == {"note": "no task of this domain that is answered right or wrong"}
    flat = filled(np.full(READINGS, 0.25), FALLING).as_dict("math")
    assert "did not exceed chance" in flat["note"]
    assert len(flat["accuracy"]) == READINGS


def test_the_reading_before_the_first_step_is_left_out():
    found = filled(np.linspace(0.5, 0.9, READINGS), FALLING).correlations("math")
    assert found["d_path"]["raw", "pearson"].n == READINGS - 1


def test_the_table_is_json_without_nan():
    text = json.dumps(filled(RISING, FALLING).as_dict("math"), allow_nan=False)
    assert json.loads(text)["predictors"]["d_path"]["raw spearman"]["n"] == READINGS - 2


def test_state_comes_back():
    correlations = filled(RISING, FALLING)
    again = ProbeCorrelations(["math", "code"], correlations._history)
    again.load_state(correlations.state())
    assert again.as_dict("math") == correlations.as_dict("math")
    assert pytest.approx(np.nan_to_num(again.state()["math"].numpy())) == np.nan_to_num(
        correlations.state()["math"].numpy()
    )


def test_a_checkpoint_from_before_a_predictor_was_added_goes_on(monkeypatch):
    before = filled(RISING, FALLING)
    saved = list(table.predictors())
    added = replace(table.find("d_path"), name="added", predictor=1)
    moved = [replace(m, predictor=m.predictor + 1) if m.predictor else m for m in table.METRICS if m.name != "d_eff"]
    monkeypatch.setattr(table, "METRICS", (added, *moved))
    again = ProbeCorrelations(["math", "code"], before._history)
    again.load_state(before.state())
    again.reorder(saved)
    rows = np.array(again._rows["math"])
    names = list(table.predictors())
    assert rows.shape == (READINGS, len(names))
    assert np.isnan(rows[:, names.index("added")]).all()
    assert np.array_equal(rows[:, names.index("d_path")], FALLING)
    assert again.correlations("math")["d_path"]["raw", "spearman"].n == READINGS - 2
