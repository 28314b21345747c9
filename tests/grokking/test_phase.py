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
from moetrain.grokking.wording import decimals, exact_percent, percent

UNDECIDED, LEARNING, MEMORIZING, GENERALIZING, SETTLED = Phase
RULE = g.PhaseThresholds()
COUNTS, CURVES = ("steps", "tokens", "seen", "unseen", "answers"), ("loss_seen", "loss_unseen", "share")
INITIAL = 6.0


def banded(value, width=0.05):
    value = np.asarray(value, float)
    return g.curve(np.stack([value, value - width, value + width], axis=1))


def decay(count=30, floor=3.0, time=6):
    """A loss that falls from `INITIAL` to a floor."""
    return floor + (INITIAL - floor) * np.exp(-np.arange(count) / time)


def history(count=30, seen=64, unseen=100, answers=0, loss=None, unseen_loss=None, width=0.01, **context):
    """A domain of plain text that generalizes: the losses fall together."""
    steps = 100 * np.arange(1, count + 1)
    loss = decay(count) if loss is None else np.asarray(loss, float)
    unseen_loss = loss + 0.02 if unseen_loss is None else np.asarray(unseen_loss, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(INITIAL - loss > 0.05 * INITIAL, (unseen_loss - loss) / (INITIAL - loss), np.nan)
    return g.History(
        steps=steps,
        tokens=steps * 1000,
        seen=np.full(count, seen),
        unseen=np.full(count, unseen),
        answers=np.full(count, answers),
        loss_seen=banded(loss),
        loss_unseen=banded(unseen_loss),
        share=banded(share, width),
        context={name: banded(value) for name, value in context.items()},
    )


def names(verdicts):
    return [verdict.phase for verdict in verdicts]


def order(verdicts):
    """The sequence of phases, without repetitions."""
    return [phase for phase, _ in itertools.groupby(names(verdicts))]


def repeated(count=30):
    """A domain whose repeated texts are learned by heart: seen texts go on, unseen ones stop early."""
    return history(count, loss=decay(count, 1.0, 8), unseen_loss=decay(count, 4.0, 3))


def test_plain_text_that_carries_over_generalizes_and_is_settled_once_it_stops():
    verdicts = g.phases(history())
    assert order(verdicts) == [UNDECIDED, LEARNING, GENERALIZING, SETTLED]
    deciding = [item for item in verdicts[-1].evidence if item.role == "deciding"]
    assert [(item.name, item.vote, item.samples) for item in deciding] == [("share", 1, 164)]
    assert deciding[0].value == pytest.approx(0.02 / (INITIAL - history().loss_seen.value[-1]))
    assert "is memory, below the threshold of" in verdicts[-1].why
    assert verdicts[-1].why.endswith(
        "the loss of unseen texts falls by less than 5% of its fall so far in the last 5 readings"
    )
    assert "Accuracy may still rise" in verdicts[-1].sentence


def test_text_that_still_improves_is_not_settled():
    falling = decay(30, 3.0, 30)
    assert order(g.phases(history(loss=falling)))[-1] == GENERALIZING
    assert "the loss of unseen texts still falls" in g.phases(history(loss=falling))[-1].why


def test_what_is_said_of_a_loss_is_what_its_evidence_says():
    """The loss of the unseen texts after a fall: on, level, up and down, or hardly; and after too few readings."""
    level = np.concatenate([decay(25, 3.0, 4)[:25], np.full(5, 3.0)])
    for last, said in (
        ([3.0, 2.8, 2.6, 2.4, 2.2], "still falls"),
        ([3.0] * 5, "no longer falls"),
        ([3.0, 3.1, 3.2, 3.3, 3.4], "no longer falls"),
        ([3.0, 2.4, 3.0, 2.3, 2.6], "does not measurably fall"),
        ([3.0, 2.99, 2.98, 2.97, 2.96], "falls by less than 5% of its fall so far in the last 5 readings"),
    ):
        unseen = np.concatenate([level[:25], last])
        seen = np.concatenate([level[:25], np.array(last) - 0.01])
        verdict = g.phases(history(loss=seen, unseen_loss=unseen))[-1]
        assert verdict.why.endswith(f"the loss of unseen texts {said}")
        (item,) = [item for item in verdict.evidence if item.name == "loss_unseen"]
        assert (item.vote == 1) == (said == "still falls")
        if verdict.phase == GENERALIZING:
            assert ("they still improve:" in verdict.sentence) == (said == "still falls")
    early = g.phases(history(2, loss=np.array([8.0, 3.0])))[-1]
    assert early.why.endswith("has too few readings to say whether it falls, 2 of 3")
    assert "Whether they still improve is not sure" in early.sentence


def test_shares_in_words_are_shares():
    for share, said in ((-0.01, "0% (0% to 4%,"), (1.2, "100% (95% to 100%,")):
        band = g.curve(np.tile([share, share - 0.25 if share > 1 else -0.06, 0.04 if share < 1 else 1.45], (30, 1)))
        assert said in g.phases(dataclasses.replace(history(), share=band))[-1].why
    alone = g.curve(np.tile([0.02, math.nan, math.nan], (30, 1)))
    assert "2% (no interval, n=" in g.phases(dataclasses.replace(history(), share=alone))[-1].why


@pytest.mark.parametrize(
    ("share", "threshold", "said"),
    [
        (0.0896, 0.09, "8.96% (7.96% to 9.96%, n=164 documents) is memory, below the threshold of 9%"),
        (0.0852, 0.09, "8.5% (7.5% to 9.5%, n=164 documents) is memory, below the threshold of 9%"),
        (0.0904, 0.09, "9.04% (8.04% to 10.04%, n=164 documents) is memory, above the threshold of 9%"),
        (0.09, 0.09, "9% (8% to 10%, n=164 documents) is memory, at the threshold of 9%"),
        (0.1248, 0.125, "12.48% (11.48% to 13.48%, n=164 documents) is memory, below the threshold of 12.5%"),
        (0.12, 0.125, "12.0% (11.0% to 13.0%, n=164 documents) is memory, below the threshold of 12.5%"),
        (0.04, 0.09, "4% (3% to 5%, n=164 documents) is memory, below the threshold of 9%"),
    ],
)
def test_a_share_near_the_threshold_is_written_on_its_side_of_it(share, threshold, said):
    band = g.curve(np.tile([share, share - 0.01, share + 0.01], (30, 1)))
    verdict = g.phases(dataclasses.replace(history(), share=band), g.PhaseThresholds(memorized=threshold))[-1]
    assert said in verdict.why
    assert (verdict.phase == MEMORIZING) == (share >= threshold)


@pytest.mark.parametrize(
    ("value", "bound", "least", "places"),
    [
        (8.9, 9.0, 0, 1),
        (8.4, 9.0, 0, 0),
        (8.9996, 9.0, 0, 4),
        (9.0, 9.0, 0, 0),
        (0.07 * 100, 7.0, 1, 1),  # 7.000000000000001
        (5.04, 5.0, 1, 2),
        (2.3006, 2.3011, 3, 4),
        (-0.004, 0.0, 1, 3),
    ],
)
def test_numbers_that_are_compared_are_written_with_decimals_enough(value, bound, least, places):
    assert decimals(value, bound, least) == places
    if not math.isclose(value, bound):
        shown, other = (float(f"{each:.{places}f}") for each in (value, bound))
        assert (shown > other) == (value > bound)
        assert (shown < other) == (value < bound)


def test_shares_in_percent():
    assert [exact_percent(share) for share in (0.09, 0.125, 0.07, 0.29)] == ["9%", "12.5%", "7%", "29%"]
    assert [percent(share, 1) for share in (-0.2, 0.123, 1.4)] == ["0.0%", "12.3%", "100.0%"]


def test_repeated_text_is_memorizing():
    verdicts = g.phases(repeated())
    assert order(verdicts)[-1] == MEMORIZING
    assert verdicts[-1].evidence[1].vote == -1
    assert "above the threshold of 9%" in verdicts[-1].why


def test_memorizing_is_said_even_while_unseen_texts_improve():
    loss = decay(30, 1.0, 20)
    verdict = g.phases(history(loss=loss, unseen_loss=INITIAL - 0.7 * (INITIAL - loss)))[-1]
    assert verdict.phase == MEMORIZING
    assert verdict.evidence[1].value == pytest.approx(0.3)
    assert "the loss of unseen texts still falls" in verdict.why


def test_facts_are_memorized_first_and_generalize_later():
    """Grokking: the loss of trained facts falls to 0 at once, that of the others much later."""
    unseen = np.concatenate([np.full(15, 5.5), decay(15, 0.2, 3)])
    verdicts = g.phases(history(answers=128, loss=decay(30, 0.01, 4), unseen_loss=unseen))
    assert order(verdicts) == [UNDECIDED, LEARNING, MEMORIZING, GENERALIZING, SETTLED]
    first = names(verdicts).index(GENERALIZING)
    share = verdicts[first].evidence[1].value
    assert share < RULE.memorized_answers <= verdicts[first - 1].evidence[1].value


def test_marked_answers_have_thresholds_of_their_own():
    share = (RULE.memorized + RULE.memorized_answers) / 2
    loss = decay(30, 0.05, 4)
    unseen = loss + share * (INITIAL - loss)
    assert g.phases(history(loss=loss, unseen_loss=unseen))[-1].phase == MEMORIZING
    assert g.phases(history(loss=loss, unseen_loss=unseen, answers=128))[-1].phase in (GENERALIZING, SETTLED)
    half = decay(30, 3.0, 4)  # half of the loss is not enough for answers
    verdict = g.phases(history(loss=half, answers=128))[-1]
    assert verdict.phase == UNDECIDED
    assert "has fallen by 50% of its value before the training, less than 60%, and falls by less than 5%" in verdict.why


def test_to_know_the_form_of_answers_is_not_to_know_them():
    """A vocabulary of any size: the loss before the training is its logarithm, and falls to the form's at once."""
    form = decay(30, 1.3, 3)
    frequencies = banded(np.full(30, 2.0))
    for known, phase in ((None, SETTLED), (frequencies, UNDECIDED)):
        verdict = g.phases(dataclasses.replace(history(answers=128, loss=form), loss_frequencies=known))[-1]
        assert verdict.phase == phase
    assert "has fallen by 35% of its value under the frequencies of tokens, less than 60%" in verdict.why
    answered = dataclasses.replace(history(answers=128, loss=decay(30, 0.5, 3)), loss_frequencies=frequencies)
    assert g.phases(answered)[-1].phase == SETTLED
    # What no training could lower, and text without marks, of which the loss before the training decides.
    constant = dataclasses.replace(history(answers=128), loss_frequencies=banded(np.zeros(30)))
    assert (g.phases(constant)[-1].phase, g.phases(constant)[-1].why) == (UNDECIDED, "the loss has no reading above 0")
    plain = dataclasses.replace(history(loss=decay(30, 3.0, 3)), loss_frequencies=banded(np.full(30, 2.0)))
    assert g.phases(plain)[-1].phase == SETTLED


def test_a_share_that_is_too_uncertain_is_no_verdict():
    verdict = g.phases(history(width=0.5))[-1]
    assert verdict.phase == UNDECIDED
    assert "too uncertain" in verdict.why
    assert verdict.evidence[1].vote == 0
    assert "or a further rise" not in verdict.why
    one_document = dataclasses.replace(history(), share=banded(np.full(30, 0.02), math.nan))
    assert g.phases(one_document)[-1].phase == SETTLED  # the count of documents, not the interval, decides then


def test_a_share_above_the_threshold_is_memory_once_its_interval_is_clear_of_chance():
    share = RULE.memorized * 1.1
    least = RULE.sure * RULE.memorized
    for low, phase in ((least + 0.001, MEMORIZING), (least - 0.001, UNDECIDED)):
        band = g.curve(np.tile([share, low, 2 * share - low], (30, 1)))
        verdict = g.phases(dataclasses.replace(history(), share=band))[-1]
        assert verdict.phase == phase
        assert ("or a further rise" in verdict.why) == (phase == UNDECIDED)


def test_before_anything_is_learned_only_the_loss_decides():
    rises = np.linspace(5, 6, 30)
    assert set(names(g.phases(history(loss=rises)))) == {UNDECIDED}
    flat = g.phases(history(loss=np.full(30, 5.9)))[-1]
    assert (flat.phase, "no longer falls" in flat.why) == (UNDECIDED, True)
    assert g.phases(history(loss=decay(30, 3.0, 60)))[6].phase == LEARNING


def test_a_fall_just_below_the_threshold_is_not_rounded_to_it():
    start = INITIAL + 0.02  # of the unseen texts, the higher of the two
    for share, shown in ((0.09756, "9.8%"), (0.09998, "9.998%"), (0.09, "9%")):
        verdict = g.phases(history(loss=decay(floor=start * (1 - share), time=1)))[-1]
        assert f"the loss has fallen by {shown} of its value before the training, less than 10%" in verdict.why


def test_too_few_documents_or_readings():
    few = g.phases(history(seen=7))
    expected = "too few documents in the panel that were trained on: 7 of 8"
    assert {(v.phase, v.why) for v in few} == {(UNDECIDED, expected)}
    heldout = g.phases(history(unseen=7))[-1]
    assert "that were not trained on: 7 of 8; raise data.heldout_share" in heldout.why
    assert names(g.phases(history(2))) == [UNDECIDED] * 2
    assert g.phases(history(0)) == []
    assert g.changes([]) == []


def test_readings_without_a_number_are_excluded():
    loss = decay()
    loss[2::7] = math.nan
    whole = history(loss=loss, unseen_loss=decay() + 0.02)
    assert g.phases(whole)[-1].phase == SETTLED
    nothing = dataclasses.replace(history(), share=banded(np.full(30, math.nan)))
    verdict = g.phases(nothing)[-1]
    assert (verdict.phase, verdict.why) == (UNDECIDED, "the memorized share has no value at this reading")
    assert set(names(g.phases(history(loss=np.full(30, math.nan))))) == {UNDECIDED}


def test_other_curves_are_recorded_and_do_not_affect_the_verdict():
    plain = history()
    with_context = history(gap_heldout=np.linspace(0, 5, 30), cosine=np.linspace(1, 0, 30))
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
    unseen = decay() * (1 + noise * rng.normal(size=30))
    whole = history(unseen_loss=unseen, answers=draw(st.sampled_from([0, 128])))
    curves = {}
    for name in CURVES:
        rows = np.stack(dataclasses.astuple(getattr(whole, name)), axis=1)[:count]
        for t, value in draw(st.lists(st.tuples(st.integers(0, count - 1), finite_or_not), max_size=3)):
            rows[t] = value
        curves[name] = g.curve(rows)
    return g.History(**{name: getattr(whole, name)[:count] for name in COUNTS}, **curves)


def prefix(whole, count):
    curves = {name: g.Curve(*(a[:count] for a in dataclasses.astuple(getattr(whole, name)))) for name in CURVES}
    return g.History(**{name: getattr(whole, name)[:count] for name in COUNTS}, **curves)


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
    losses = {name: g.Curve(*(factor * a for a in dataclasses.astuple(getattr(whole, name)))) for name in CURVES[:2]}
    times = {"steps": whole.steps * 1024, "tokens": whole.tokens * 7}
    assert names(g.phases(dataclasses.replace(whole, **losses, **times))) == names(g.phases(whole))


def test_changes_are_the_steps_between_verdicts():
    verdicts = g.phases(repeated())
    events = g.changes(verdicts)
    assert events[0].before == UNDECIDED
    assert all(a.after == b.before for a, b in itertools.pairwise(events))
    assert all(event.after == event.verdict.phase != event.before for event in events)
    assert sum(a.phase != b.phase for a, b in itertools.pairwise(verdicts)) == len(events)


def test_the_readme_states_the_default_thresholds():
    text = " ".join(g.describe("phase").split())
    for words in (
        f"fewer than {RULE.documents} documents",
        f"not fallen by {RULE.learned:.0%} of its value before the training",
        f"where the documents mark answers: by {RULE.learned_answers:.0%} of its value under the frequencies of tokens",
        f"at least {RULE.memorized:.0%} ({RULE.memorized_answers:.0%} where the documents mark answers)",
        f"the previous {RULE.window} readings",
        f"the last {RULE.trend} readings",
        f"by {RULE.steep:.0%} or more of all it has fallen",
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
        (lambda: g.PhaseThresholds(documents=1), "documents 1"),
        (lambda: g.PhaseThresholds(learned=1), "learned is 1"),
        (lambda: g.PhaseThresholds(steep=0), "steep is 0"),
        (lambda: g.PhaseThresholds(sure=1.5), "sure is 1.5"),
        (lambda: g.PhaseThresholds(memorized=0), "memorized is 0"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
