import math

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.data.errors import DataError
from moetrain.distributed.mesh import ParallelLayout
from moetrain.probes.history import ProbeHistory
from moetrain.probes.scoring import prepare, score
from moetrain.probes.tasks import tasks_of
from tests.probes.conftest import item, small_model, some_items


@pytest.fixture(scope="module")
def readings(tokenizer):
    """Six readings of three tasks, each of another model."""
    tasks = tasks_of(some_items())
    prepared = prepare(tasks, tokenizer, 10_000, 512)
    return tasks, [score(small_model(tokenizer.vocab_size, seed), prepared, ParallelLayout()) for seed in range(6)]


def filled(readings, count):
    tasks, scores = readings
    history = ProbeHistory(tasks)
    for number in range(count):
        history.add(10 * number, 1000 * number, scores[number])
    return history


def test_it_stores_the_metrics_of_each_reading(readings):
    tasks, scores = readings
    history = filled(readings, 6)
    assert history.times == grokking.ReadingTimes((0, 10, 20, 30, 40, 50), (0, 1000, 2000, 3000, 4000, 5000))
    for task in tasks:
        values, errors = history.metric(task.name, "bpb")
        assert values.tolist() == [each[task.name].metrics["bpb"].value for each in scores]
        assert errors.tolist() == [each[task.name].metrics["bpb"].error for each in scores]
    assert np.isnan(history.metric("open", "soft")[0]).all()
    assert np.array_equal(history.correct("mc"), np.stack([each["mc"].correct for each in scores], axis=1))
    assert history.correct("mc").shape == (12, 6)
    assert history.correct("text").shape == (12, 0)
    assert history.metric("mc", "accuracy")[0].tolist() == history.correct("mc").mean(0).tolist()
    assert np.ptp(history.correct("mc").sum(0)) > 0


def test_onsets_and_groups_are_those_of_grokking(readings):
    _, scores = readings
    always, late, never = np.array([True, False, False]), np.array([True, True, False]), np.zeros(3, bool)
    history = ProbeHistory(tasks_of([item(str(n), task="mc", choices=["a", "b"]) for n in range(3)]))
    one = scores[0]["mc"]
    for number, correct in enumerate([never, always, always, late, late, late, late]):
        history.add(number, number, {"mc": type(one)(one.task, one.log_probs, correct, one.metrics, 0)})
    assert history.generalized("mc").tolist() == [1, 3, -1]
    assert {at: group.tolist() for at, group in history.groups("mc").items()} == {1: [0], 3: [1]}
    assert history.groups("mc").keys() == grokking.generalized_groups(history.correct("mc"), min_tail=3).keys()
    text = filled(readings, 6)
    assert text.groups("text") == {}
    assert text.generalized("text").tolist() == [-1] * 12
    assert ProbeHistory(readings[0]).groups("mc") == {}


def test_a_resumed_history_equals_an_uninterrupted_one(readings):
    _, scores = readings
    straight, left = filled(readings, 6), filled(readings, 4)
    again = ProbeHistory(readings[0])
    again.load_state({key: value.clone() for key, value in left.state().items()})
    for number in (4, 5):
        again.add(10 * number, 1000 * number, scores[number])
    one, other = straight.state(), again.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].nan_to_num(-7.0), other[key].nan_to_num(-7.0)) for key in one)
    assert all(value.dtype == other[key].dtype for key, value in one.items())
    empty = ProbeHistory(readings[0])
    empty.load_state(ProbeHistory(readings[0]).state())
    assert empty.times.steps == ()
    assert math.isnan(one["values.open"][0, 2, 0])


def test_items_other_than_those_of_the_checkpoint_are_refused(readings):
    state = filled(readings, 2).state()
    items = some_items()
    changed = [{**items[0], "prompt": "another"}, *items[1:]]
    for others, name in ((changed, "mc"), (items[1:], "mc"), ([x for x in items if x["task"] != "open"], "open")):
        with pytest.raises(DataError, match=f"the items of {name} are not those"):
            ProbeHistory(tasks_of(others)).load_state(state)
    ProbeHistory(tasks_of(items)).load_state(state)
