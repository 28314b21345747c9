"""The verdict on synthetic histories of each phase; it depends on no later reading and on no unit."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import grokking as g
from moetrain.grokking import Phase

UNDECIDED, LEARNING, MEMORIZING, GENERALIZING, SETTLED = Phase
RULE = g.PhaseThresholds()
LOW, HIGH = RULE.memorizing - 0.06, RULE.generalizing + 0.1


def banded(value, width=0.05):
    value = np.asarray(value, float)
    return g.curve(np.stack([value, value * (1 - width), value * (1 + width)], axis=1))


def history(count=30, samples=128, answers=128, loss=None, left_out=None, **context):
    """A domain that memorizes: its loss falls to a floor, and leave-one-out accuracy stays low."""
    steps = 100 * np.arange(1, count + 1)
    loss = 0.2 + 4 * np.exp(-np.arange(count) / 3) if loss is None else loss
    left_out = np.full(count, LOW) if left_out is None else left_out
    return g.History(
        steps=steps,
        tokens=steps * 1000,
        samples=np.full(count, samples),
        answers=np.full(count, answers),
        loss_seen=banded(loss),
        left_out=banded(left_out),
        context={name: banded(value) for name, value in context.items()},
    )


def rising(count=30, start=12, length=8):
    """Leave-one-out accuracy of a domain that comes to use a rule."""
    return LOW + (HIGH - LOW) * np.clip((np.arange(count) - start) / length, 0, 1)


def names(verdicts):
    return [verdict.phase for verdict in verdicts]


def order(verdicts):
    """The sequence of phases, without repetitions."""
    return [phase for phase, _ in itertools.groupby(names(verdicts))]


def test_memorizing():
    verdicts = g.phases(history())
    assert order(verdicts) == [UNDECIDED, LEARNING, MEMORIZING]
    deciding = [item for item in verdicts[-1].evidence if item.role == "deciding"]
    assert [(item.name, item.vote, item.samples, item.readings) for item in deciding] == [("left_out", -1, 128, 3)]
    assert deciding[0].value == pytest.approx(LOW)
    assert "leave-one-out accuracy is 5%, at most 11%" in verdicts[-1].why


def test_generalizing_and_then_settled():
    verdicts = g.phases(history(left_out=rising()))
    assert order(verdicts) == [UNDECIDED, LEARNING, MEMORIZING, UNDECIDED, GENERALIZING, SETTLED]
    first = names(verdicts).index(GENERALIZING)
    mean = rising()[first - 2 : first + 1].mean()
    assert mean >= RULE.generalizing > rising()[first - 3 : first].mean()


def test_a_domain_with_high_accuracy_from_the_start_generalizes_as_soon_as_it_is_learned():
    verdicts = g.phases(history(left_out=np.full(30, 0.9)))
    assert order(verdicts) == [UNDECIDED, LEARNING, GENERALIZING, SETTLED]


def test_between_the_thresholds_the_phase_is_undecided():
    middle = (RULE.memorizing + RULE.generalizing) / 2
    verdict = g.phases(history(left_out=np.full(30, middle)))[-1]
    assert verdict.phase == UNDECIDED
    assert "between 11% and 13%" in verdict.why
    assert verdict.evidence[1].vote == 0


def test_one_reading_does_not_decide():
    spike = np.full(30, LOW)
    spike[-1] = RULE.generalizing + 0.02
    assert g.phases(history(left_out=spike))[-1].phase == MEMORIZING


def test_before_it_is_learned_only_the_loss_decides():
    half = 2 + 2 * np.exp(-np.arange(30) / 3)  # falls by half, then stays
    verdicts = g.phases(history(loss=half, left_out=np.full(30, 0.9)))
    assert order(verdicts) == [UNDECIDED, LEARNING, UNDECIDED]
    assert "has fallen by 50% of its highest reading, less than 80%, and no longer falls" in verdicts[-1].why
    rises = np.linspace(1, 3, 30)
    assert set(names(g.phases(history(loss=rises)))) == {UNDECIDED}


def test_learning_starts_again_when_the_loss_rises_and_falls_again():
    loss = np.concatenate([0.2 + 4 * np.exp(-np.arange(15) / 2), 3 * np.exp(-np.arange(15) / 6) + 0.2])
    phases = names(g.phases(history(loss=loss)))
    assert MEMORIZING in phases[:15]
    assert LEARNING in phases[15:]
    assert phases[-1] == MEMORIZING


def test_without_marked_answers_a_learned_domain_is_undecided():
    verdict = g.phases(history(answers=0, left_out=np.full(30, math.nan)))[-1]
    assert (verdict.phase, verdict.why) == (
        UNDECIDED,
        "learned, but the documents mark no answers, which leave-one-out accuracy needs",
    )


def test_too_few_samples_answers_or_readings():
    few = g.phases(history(samples=63))
    assert {(v.phase, v.why) for v in few} == {(UNDECIDED, "too few samples: 63 of 64")}
    answers = g.phases(history(answers=95))[-1]
    assert answers.why == "too few samples with an answer: 95 of 96: raise panel.samples"
    assert names(g.phases(history(2))) == [UNDECIDED] * 2
    assert g.phases(history(0)) == []
    assert g.changes([]) == []


def test_readings_without_a_number_are_excluded():
    left_out, loss = rising(), 0.2 + 4 * np.exp(-np.arange(30) / 3)
    left_out[4::5] = math.nan
    loss[2::7] = math.nan
    assert g.phases(history(left_out=left_out, loss=loss))[-1].phase == SETTLED
    nothing = g.phases(history(left_out=np.full(30, math.nan)))[-1]
    assert (nothing.phase, nothing.why) == (UNDECIDED, "leave-one-out accuracy has no value in the newest readings")
    assert set(names(g.phases(history(loss=np.full(30, math.nan))))) == {UNDECIDED}


def test_other_curves_are_recorded_and_do_not_affect_the_verdict():
    plain = history(left_out=rising())
    with_context = history(left_out=rising(), gap_heldout=np.linspace(0, 5, 30), cosine=np.linspace(1, 0, 30))
    assert names(g.phases(with_context)) == names(g.phases(plain))
    shown = {item.name: item for item in g.phases(with_context)[-1].evidence}
    assert shown["gap_heldout"].role == "beside"
    assert shown["gap_heldout"].value == 5
    assert shown["gap_heldout"].vote == 0


finite_or_not = st.one_of(st.floats(0, 1), st.sampled_from([math.nan, math.inf, 0.0]))


@st.composite
def any_history(draw):
    """The histories above with noise and some arbitrary points."""
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    noise = draw(st.sampled_from([0.0, 0.1, 0.5]))
    whole = history(left_out=rising() * (1 + noise * rng.normal(size=30)))
    curves = {}
    for name in ("loss_seen", "left_out"):
        rows = np.stack(dataclasses.astuple(getattr(whole, name)), axis=1)[:count]
        for t, value in draw(st.lists(st.tuples(st.integers(0, count - 1), finite_or_not), max_size=3)):
            rows[t] = value
        curves[name] = g.curve(rows)
    counts = {name: getattr(whole, name)[:count] for name in ("steps", "tokens", "samples", "answers")}
    return g.History(**counts, **curves)


def prefix(whole, count):
    counts = {name: getattr(whole, name)[:count] for name in ("steps", "tokens", "samples", "answers")}
    curves = {
        name: g.Curve(*(a[:count] for a in dataclasses.astuple(getattr(whole, name))))
        for name in ("loss_seen", "left_out")
    }
    return g.History(**counts, **curves)


@settings(max_examples=60, deadline=None)
@given(any_history(), st.data())
def test_no_verdict_depends_on_later_readings(whole, data):
    count = data.draw(st.integers(0, len(whole)))
    # repr, because NaN equals NaN there
    assert repr(g.phases(prefix(whole, count))) == repr(g.phases(whole)[:count])


@settings(max_examples=60, deadline=None)
@given(any_history(), st.sampled_from([2.0**-7, 0.5, 4.0, 1024.0]))
def test_units_of_loss_and_time_do_not_matter(whole, factor):
    """Powers of two, which do not round."""
    loss = g.Curve(*(factor * a for a in dataclasses.astuple(whole.loss_seen)))
    times = {"steps": whole.steps * 1024, "tokens": whole.tokens * 7}
    assert names(g.phases(dataclasses.replace(whole, loss_seen=loss, **times))) == names(g.phases(whole))


def test_changes_are_the_steps_between_verdicts():
    verdicts = g.phases(history(left_out=rising()))
    events = g.changes(verdicts)
    assert events[0].before == UNDECIDED
    assert all(a.after == b.before for a, b in itertools.pairwise(events))
    assert all(event.after == event.verdict.phase != event.before for event in events)
    assert sum(a.phase != b.phase for a, b in itertools.pairwise(verdicts)) == len(events)


def test_the_readme_states_the_default_thresholds():
    text = " ".join(g.describe("phase").split())
    for words in (
        f"not fallen by {RULE.learned:.0%} of its highest reading",
        f"the last {RULE.trend} readings",
        f"by {RULE.steep:.0%} or more of all it has fallen",
        f"the newest {RULE.window} readings of `left_out`",
        f"at least {RULE.generalizing:.0%}",
        f"at most {RULE.memorizing:.0%}",
        f"by less than {RULE.still:.0%}",
        f"fewer than {RULE.answers} samples",
        f"fewer than {RULE.samples} panel samples",
    ):
        assert words in text, words


def test_curves_from_arrays():
    nan = math.nan
    made = g.curve([[1.0, 0.5, 1.5], [nan, nan, nan], [2.0, nan, nan], [math.inf, nan, nan]])
    np.testing.assert_array_equal(made.value, [1, np.nan, 2, np.nan])
    np.testing.assert_array_equal(made.low, [0.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(made.high, [1.5, np.nan, np.nan, np.nan])
    assert len(g.curve([]).value) == 0
    np.testing.assert_array_equal(g.curve(np.ones(3)).value, np.ones(3))
    np.testing.assert_array_equal(g.curve([[1, 0, 2]]).high, [2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: g.curve(np.ones((3, 2))), "points have shape"),
        (lambda: dataclasses.replace(history(5), steps=[1, 2, 3]), "different length"),
        (lambda: dataclasses.replace(history(3), steps=[1, 1, 2]), "do not ascend"),
        (lambda: g.PhaseThresholds(trend=2), "trend is 2"),
        (lambda: g.PhaseThresholds(answers=0), "answers 0"),
        (lambda: g.PhaseThresholds(learned=1), "learned is 1"),
        (lambda: g.PhaseThresholds(steep=0), "steep is 0"),
        (lambda: g.PhaseThresholds(memorizing=0.6, generalizing=0.5), "memorizing is 0.6"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
