"""The verdict on synthetic histories of each phase; that it knows no later reading and no unit."""

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
START = 12  # the reading about which the loss has become flat
CURVES = [f.name for f in dataclasses.fields(g.History) if f.name not in ("steps", "tokens", "samples")]


def ramp(count, before, after, start=START + 2, length=12):
    """From one value to another in a straight line of `length` readings."""
    share = np.clip((np.arange(count) - start) / length, 0, 1)
    return before + (after - before) * share


def history(count=40, samples=64, width=0.02, noise=0.0, seed=0, **changed):
    """A domain that memorizes: its loss falls to a floor and its routing stays; `changed` replaces curves."""
    rng = np.random.default_rng(seed)
    steps = 100 * np.arange(1, count + 1)
    values = {
        "loss_seen": 0.3 + 4 * np.exp(-np.arange(count) / 3),
        "cosine": np.full(count, 0.2),
        "spread": np.full(count, 0.045),
        "effective_rank": np.full(count, 28.0),
        "layer_cka": np.full(count, 0.17),
        "d_path_norm": np.full(count, 0.6),
        "individuality": np.full(count, 0.1),
        "router_entropy": np.full(count, 2.0),
        "load_cv": np.full(count, 0.5),
        "left_out": np.full(count, 0.3),
        "gap": np.full(count, 0.4),
        "gap_heldout": np.full(count, 0.5),
        **changed,
    }
    curves = {}
    for name, value in values.items():
        value = value * (1 + noise * rng.normal(size=count))
        curves[name] = g.curve(np.stack([value, value * (1 - width), value * (1 + width)], axis=1))
    return g.History(steps=steps, tokens=steps * 1000, samples=np.full(count, samples), **curves)


def generalizing(count=40, **changed):
    """As METRICS.md, section 8, seed 2, has it for the rule."""
    moved = {
        "spread": np.exp(ramp(count, math.log(0.042), math.log(0.009))),
        "effective_rank": ramp(count, 28.0, 17.4),
        "layer_cka": ramp(count, 0.164, 0.233),
        "cosine": ramp(count, 0.21, 0.36),
    }
    return {**moved, **changed}


def names(verdicts):
    return [verdict.phase for verdict in verdicts]


def by_name(verdict):
    return {evidence.name: evidence for evidence in verdict.evidence}


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_memorizing(noise):
    verdicts = g.phases(history(noise=noise))
    assert [change.after for change in g.changes(verdicts)] == [LEARNING, UNDECIDED, MEMORIZING]
    assert names(verdicts)[:2] == [UNDECIDED] * 2
    assert verdicts[0].why.startswith("too few readings")
    last = verdicts[-1]
    assert (last.phase, last.step, last.tokens, last.controls) == (MEMORIZING, 4000, 4_000_000, ())
    assert "more passes" in last.sentence


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_generalizing_and_then_settled(noise):
    verdicts = g.phases(history(noise=noise, **generalizing()))
    assert [change.after for change in g.changes(verdicts)][-2:] == [GENERALIZING, SETTLED]
    assert names(verdicts).index(GENERALIZING) < START + 14
    assert names(verdicts).index(SETTLED) > START + 14
    evidence = by_name(verdicts[-1])
    assert [evidence[n].vote for n in ("effective_rank", "layer_cka", "spread", "cosine")] == [1] * 4
    rank = evidence["effective_rank"]
    assert (rank.unit, rank.role, rank.readings, rank.samples) == ("ratio", "deciding", 10, 64)
    assert rank.value == pytest.approx(17.4 / 28, rel=0.02)
    assert rank.low < rank.value < rank.high < 0.85
    assert evidence["layer_cka"].value == pytest.approx(0.069, abs=0.01)
    assert (evidence["layer_cka"].unit, evidence["gap"].unit) == ("difference", "level")


def test_noise_of_the_planted_runs_is_not_generalizing():
    """Spread falls and cosine rises in noise too; layer CKA falls. Seed 5: so does rank, a contradiction."""
    moved = generalizing(
        spread=np.exp(ramp(40, math.log(0.047), math.log(0.014))),
        effective_rank=ramp(40, 28.1, 24.2),
        layer_cka=ramp(40, 0.174, 0.111),
    )
    verdict = g.phases(history(**moved))[-1]
    assert verdict.phase == MEMORIZING
    assert by_name(verdict)["layer_cka"].vote == -1
    moved["effective_rank"] = ramp(40, 42.6, 29.9)
    verdict = g.phases(history(**moved))[-1]
    assert verdict.phase == UNDECIDED
    assert "contradict" in verdict.why


def test_two_measures_are_too_few_to_agree():
    still = {"cosine": np.full(40, 0.2), "spread": np.full(40, 0.045)}
    verdict = g.phases(history(**generalizing(**still)))[-1]
    assert (verdict.phase, verdict.why) == (
        UNDECIDED,
        "only effective_rank, layer_cka moved towards generalization",
    )


def test_a_change_within_its_interval_does_not_count():
    verdict = g.phases(history(width=0.6, **generalizing()))[-1]
    assert verdict.phase != GENERALIZING
    assert by_name(verdict)["effective_rank"].vote == 0


@pytest.mark.parametrize(
    ("control", "values"),
    [
        ("router_entropy", ramp(40, 2.0, 2.7)),
        ("load_cv", ramp(40, 0.3, 1.5)),
        ("individuality", np.zeros(40)),
    ],
)
def test_controls_that_move_alike_give_undecided(control, values):
    verdicts = g.phases(history(**generalizing(**{control: values})))
    assert not {GENERALIZING, SETTLED} & set(names(verdicts))
    assert verdicts[-1].phase == UNDECIDED
    assert verdicts[-1].controls == (control,)
    assert control in verdicts[-1].why


@pytest.mark.parametrize(
    ("control", "values"),
    [
        ("router_entropy", ramp(40, 2.0, 1.5)),  # a sharper router would raise spread
        ("router_entropy", ramp(40, 2.0, 2.22)),  # smaller than what it would explain
        ("load_cv", ramp(40, 1.5, 0.3)),  # balance drives pathways apart
    ],
)
def test_controls_that_explain_nothing_leave_the_verdict(control, values):
    verdict = g.phases(history(**generalizing(**{control: values})))[-1]
    assert (verdict.phase, verdict.controls) == (SETTLED, ())


@pytest.mark.parametrize("control", ["router_entropy", "load_cv", "individuality"])
def test_no_verdict_without_its_controls(control):
    verdict = g.phases(history(**generalizing(**{control: np.full(40, math.nan)})))[-1]
    assert verdict.phase == UNDECIDED
    assert f"{control} missing" in verdict.why


def test_left_out_accuracy_gaps_and_distances_do_not_enter():
    expected = names(g.phases(history(**generalizing())))
    rng = np.random.default_rng(0)
    beside = {name: rng.normal(size=40) for name in ("left_out", "gap", "gap_heldout", "d_path_norm")}
    assert names(g.phases(history(**generalizing(**beside)))) == expected
    without = dataclasses.replace(history(**generalizing()), left_out=None, gap=None, gap_heldout=None)
    assert names(g.phases(without)) == expected
    assert "gap" not in by_name(g.phases(without)[-1])


def test_loss_that_does_not_fall_rises_or_jumps_is_undecided():
    rng = np.random.default_rng(1)
    assert set(names(g.phases(history(loss_seen=np.full(40, 4.0))))) == {UNDECIDED}
    rising = history().loss_seen.value.copy()
    rising[30:] += 0.2 * np.arange(10)
    assert g.phases(history(loss_seen=rising))[-1].why == "the loss of seen samples is rising"
    jumping = history().loss_seen.value + np.where(np.arange(40) > 15, rng.normal(0, 0.6, size=40), 0)
    assert "without a clear direction" in {v.why.split(", ")[-1] for v in g.phases(history(loss_seen=jumping))}


def test_learning_begins_anew_when_the_loss_falls_again():
    """The plateau of guessing among all answers, then the fall to knowing them."""
    t = np.arange(60)
    loss = 4 + 5 * np.exp(-t / 3) - 3.9 / (1 + np.exp(-(t - 32) / 1.5))
    verdicts = g.phases(history(60, loss_seen=loss))
    after = [change.after for change in g.changes(verdicts)]
    assert after.count(LEARNING) == 2
    assert after[-1] == MEMORIZING
    assert names(verdicts)[32:34] == [LEARNING] * 2


def test_too_few_samples_or_readings():
    few = g.phases(history(samples=63, **generalizing()))
    assert {(v.phase, v.why) for v in few} == {(UNDECIDED, "too few samples: 63 of 64")}
    assert names(g.phases(history(2))) == [UNDECIDED] * 2
    assert g.phases(history(0)) == []
    assert g.changes([]) == []


def test_readings_without_a_number_are_left_out():
    whole = history(**generalizing())
    holes = {name: getattr(whole, name).value.copy() for name in CURVES}
    for number, values in enumerate(holes.values()):
        values[(np.arange(40) + number) % 5 == 4] = math.nan
    assert g.phases(history(**holes))[-1].phase == SETTLED
    only = {**holes, "layer_cka": np.full(40, math.nan), "cosine": np.full(40, math.inf)}
    verdict = g.phases(history(**only))[-1]
    assert (verdict.phase, verdict.why) == (UNDECIDED, "too few measures: 2 of 4 have a value")
    only = {**holes, "loss_seen": np.full(40, math.nan)}
    assert set(names(g.phases(history(**only)))) == {UNDECIDED}
    no_deciding = generalizing(layer_cka=np.full(40, math.nan), effective_rank=np.full(40, math.nan))
    rule = g.PhaseThresholds(agree=2)
    assert g.phases(history(**no_deciding), rule)[-1].why == "neither effective rank nor layer CKA has a value"
    assert g.phases(history(**generalizing(layer_cka=np.full(40, math.nan))))[-1].phase == SETTLED  # 3 of 3


finite_or_not = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([math.nan, math.inf, 0.0]))


@st.composite
def any_history(draw):
    """From plain to absurd: pieces of the histories above, with arbitrary points put in."""
    count = draw(st.integers(1, 40))
    base = history(40, noise=draw(st.sampled_from([0.0, 0.02, 0.3])), seed=draw(st.integers(0, 9)), **generalizing())
    curves = {}
    for name in CURVES:
        rows = np.stack(dataclasses.astuple(getattr(base, name)), axis=1)[:count]
        for t, value in draw(st.lists(st.tuples(st.integers(0, count - 1), finite_or_not), max_size=3)):
            rows[t] = value
        curves[name] = g.curve(rows)
    return g.History(base.steps[:count], base.tokens[:count], base.samples[:count], **curves)


def prefix(whole, count):
    parts = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    cut = {
        name: g.Curve(*(a[:count] for a in dataclasses.astuple(part))) if isinstance(part, g.Curve) else part[:count]
        for name, part in parts.items()
    }
    return g.History(**cut)


@settings(max_examples=60, deadline=None)
@given(any_history(), st.data())
def test_no_verdict_knows_a_later_reading(whole, data):
    count = data.draw(st.integers(0, len(whole)))
    # repr, because NaN equals NaN there
    assert repr(g.phases(prefix(whole, count))) == repr(g.phases(whole)[:count])


@settings(max_examples=60, deadline=None)
@given(any_history(), st.sampled_from([2.0**-7, 0.5, 4.0, 1024.0]))
def test_units_do_not_matter(whole, factor):
    """Powers of two, which do not round."""
    scaled = {
        name: g.Curve(*(factor * a for a in dataclasses.astuple(getattr(whole, name))))
        for name in ("loss_seen", "spread", "effective_rank", "router_entropy", "load_cv", "d_path_norm")
    }
    times = {"steps": whole.steps * 1024, "tokens": whole.tokens * 7}
    # Logarithms do round: a change exactly at its threshold may fall on either side, so they are moved off it.
    rule = g.PhaseThresholds(rank_fall=0.1500001, spread_fall=0.5000001)
    assert names(g.phases(dataclasses.replace(whole, **scaled, **times), rule)) == names(g.phases(whole, rule))


def test_changes_are_the_steps_between_verdicts():
    verdicts = g.phases(history(**generalizing()))
    events = g.changes(verdicts)
    assert events[0].before == UNDECIDED
    assert all(a.after == b.before for a, b in itertools.pairwise(events))
    assert all(event.after == event.verdict.phase != event.before for event in events)
    assert sum(a.phase != b.phase for a, b in itertools.pairwise(verdicts)) == len(events)


def test_it_calls_itself_provisional_until_calibrated():
    assert all("Provisional" in verdict.sentence for verdict in g.phases(history()))
    calibrated = g.phases(history(), g.PhaseThresholds(provisional=False))
    assert not any("rovisional" in verdict.sentence for verdict in calibrated)
    assert "provisional" in g.describe("phase/math")


def test_the_page_states_the_thresholds_that_the_code_has():
    rule, text = g.PhaseThresholds(), " ".join(g.describe("phase").split())
    for words in (
        f"Windows are {rule.window} readings",
        f"by {rule.steep:.0%} or more of all it has fallen",
        f"{rule.learned:.0%} below the highest",
        f"`effective_rank` lower by {rule.rank_fall:.0%}",
        f"`layer_cka` higher by {rule.cka_rise}",
        f"`spread` lower by {rule.spread_fall:.0%}",
        f"`cosine` higher by {rule.cosine_rise}",
        f"router entropy higher by {rule.entropy_rise:.0%}",
        f"load variation higher by {rule.load_rise:.0%}",
        f"at least {rule.agree} of the four",
        f"more than {rule.flat:.0%} of its total change",
        f"fewer than {rule.samples} samples",
    ):
        assert words in text, words


def test_curves_from_what_a_monitor_holds():
    made = g.curve([g.Estimate(1.0, 0.5, 1.5, 64, 0), None, 2.0, math.inf])
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
        (lambda: g.PhaseThresholds(window=2), "window is 2"),
        (lambda: g.PhaseThresholds(samples=0), "samples 0"),
        (lambda: g.PhaseThresholds(agree=5), "agree is 5"),
        (lambda: g.PhaseThresholds(rank_fall=1), "rank_fall is 1"),
        (lambda: g.PhaseThresholds(steep=0), "steep is 0"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
