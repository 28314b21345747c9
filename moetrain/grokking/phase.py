"""The phase of a domain: the monitor's verdict, from losses of texts trained on and of texts not trained on (ours).

Two questions are answered apart. *Memorized?* `memorized_share`: how much of what the model has learned of texts it was
trained on does not carry over to texts of the same domain that it was not trained on. *Generalizing?* whether the loss
of texts not trained on still falls. Both are taken over panel samples; the verdict at a reading uses that reading and
earlier ones only. The rule, with the default thresholds:

1. **Undecided** with fewer than 8 documents trained on, or fewer than 8 not trained on.
2. **Not learned yet**: the loss of the seen samples has not fallen by 10% of its value before the training (where the
   documents mark answers: by 60% of its value under the frequencies of tokens, because an answer can be learned
   completely, and to know the form of answers is not to know one). The domain is **learning** if the
   loss still falls, and **undecided** if not.
3. **Memorizing**: the memorized share is at least 9% (where the documents mark answers: 21%), and the lower end of its
   interval at least four fifths of that.
4. **Generalizing**: the share is less. **Settled** replaces generalizing where the domain was generalizing or settled
   at each of the previous 3 readings, and the loss of the unseen samples no longer falls.
5. **Undecided** where the share is at least 9%, but the lower end of its interval below four fifths of that; and
   where the interval reaches from below half of the threshold to above twice of it.

A loss falls if a straight line through the last 5 readings falls by 5% or more of the total fall so far, and the 95%
interval of that fall is above 0. Routing does not enter the verdict: on natural text none of its metrics told
memorized from generalizing domains (tools/results/validity_text.md), and on planted facts the losses do so better than
leave-one-out accuracy (tools/results/validity.md). Routing metrics are recorded with a verdict. The thresholds were
fitted on some runs and tested on others with other seeds and settings. Suffix: T readings in order of time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import t as student

from ._arrays import Arrayish, Floats, Ints, to_float64
from .wording import decimals, exact_percent, percent

LEAST_READINGS = 3  # a line through two readings has no residuals

Role: TypeAlias = Literal["loss", "deciding", "beside"]  # as recorded in events.jsonl; "beside": not used by the rule
Unit: TypeAlias = Literal["share", "level"]


class Phase(IntEnum):
    """The phases, numbered as `phase/DOMAIN` in TensorBoard."""

    UNDECIDED = 0
    LEARNING = 1
    MEMORIZING = 2
    GENERALIZING = 3
    SETTLED = 4


@dataclass(frozen=True, slots=True)
class PhaseThresholds:
    """The numbers of the rule.

    Raises:
        ValueError: numbers out of their range.
    """

    documents: int = 8  # trained on, and not trained on, that a verdict needs of each
    trend: int = 5  # readings of the line through a loss
    steep: float = 0.05  # fall over them, as a share of the fall so far, from which on a loss falls
    learned: float = 0.1  # fall of the loss, as a share of its value before the training: plain text is learned
    learned_answers: float = 0.6  # fall below the loss under token frequencies, where documents mark answers
    memorized: float = 0.09  # memorized share from which on plain text is memorizing
    memorized_answers: float = 0.21  # likewise where documents mark answers
    sure: float = 0.8  # lower end of the share's interval, relative to the threshold, that memorizing needs
    window: int = 3  # readings of generalizing before a domain can be settled

    def __post_init__(self) -> None:
        if self.trend < LEAST_READINGS or self.window < 1 or self.documents < 2:
            raise ValueError(
                f"trend is {self.trend}, window {self.window}, documents {self.documents}: at least {LEAST_READINGS} "
                "readings for the trend, 1 for the window, and 2 documents"
            )
        for name in ("steep", "learned", "learned_answers", "memorized", "memorized_answers", "sure"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share between 0 and 1")


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over time: value and 95% interval at each reading, [T] each; NaN where there is none."""

    value: Floats
    low: Floats
    high: Floats


def curve(points: Arrayish) -> Curve:
    """A Curve from values [T], or from values with intervals [T, 3]: value, low, high. Values not finite become NaN.

    Raises:
        ValueError: an array of another shape.
    """
    rows = to_float64(points)
    if rows.ndim == 1:
        rows = np.stack([rows, np.full(len(rows), np.nan), np.full(len(rows), np.nan)], axis=1)
    if rows.ndim != 2 or rows.shape[1] != 3:
        raise ValueError(f"points have shape {rows.shape}: pass [readings], or [readings, 3] of value, low and high")
    rows = np.where(np.isfinite(rows), rows, np.nan)
    return Curve(*np.ascontiguousarray(rows.T))


@dataclass(frozen=True, slots=True)
class History:
    """The readings of one domain's panel in order of time.

    Raises:
        ValueError: unequal lengths, or steps or tokens that do not ascend.
    """

    steps: Ints  # [T]
    tokens: Ints  # [T] trained on by the run
    seen: Ints  # [T] documents of the panel samples trained on
    unseen: Ints  # [T] documents of those not trained on
    answers: Ints  # [T] samples with a marked answer, 0 where the domain marks none
    loss_seen: Curve  # mean loss of the samples trained on, nats per predicted token
    loss_unseen: Curve  # of those not trained on
    share: Curve  # memorized share
    loss_frequencies: Curve | None = None  # of the samples trained on, under the frequencies of tokens in the domain
    context: Mapping[str, Curve] = field(
        default_factory=dict
    )  # other curves: recorded in verdicts, not used by the rule

    def __post_init__(self) -> None:
        counts = ("steps", "tokens", "seen", "unseen", "answers")
        for name in counts:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        curves = {name: getattr(self, name) for name in ("loss_seen", "loss_unseen", "share")} | dict(self.context)
        if self.loss_frequencies is not None:
            curves["loss_frequencies"] = self.loss_frequencies
        lengths = {name: len(getattr(self, name)) for name in counts}
        lengths |= {name: len(part.value) for name, part in curves.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"curves of different length, {lengths}: pass one value per reading, NaN where there is none"
            )
        if (np.diff(self.steps) <= 0).any() or (np.diff(self.tokens) <= 0).any():
            raise ValueError("steps and tokens do not ascend: sort the readings, and take each once")

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One number that a verdict rests on or is recorded with."""

    name: str
    role: Role
    unit: Unit  # "share": fall over the last readings, as a share of the fall so far; "level": the value itself
    value: float
    low: float  # 95% interval
    high: float
    readings: int  # that the value was computed from
    samples: int  # documents
    vote: int = 0  # 1 for generalizing, -1 for memorizing, 0 for neither


@dataclass(frozen=True, slots=True)
class Verdict:
    """The phase at one reading."""

    phase: Phase
    step: int
    tokens: int
    why: str  # the part of the rule that applied, with its numbers
    sentence: str  # what the user may do about it
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class PhaseChange:
    """An event: this verdict's phase differs from the one before. Before the first reading a domain is undecided."""

    before: Phase
    after: Phase
    verdict: Verdict


ADVICE = {
    Phase.UNDECIDED: "The rule cannot tell: look at the reason, and at the curves of the losses.",
    Phase.LEARNING: "Continue training: too little has been learned to say what carries over to other texts.",
    Phase.MEMORIZING: (
        "What the model learns of these texts carries over to other texts of the domain only in part: consider fewer "
        "repeats, more varied texts or more weight decay."
    ),
    Phase.GENERALIZING: (
        "What the model learns of these texts carries over to other texts of the domain, and they still improve: "
        "continue training."
    ),
    Phase.SETTLED: (
        "What the model has learned of these texts carries over, but the loss of other texts of the domain hardly "
        "falls. Accuracy may still rise: look at probes of the domain before its tokens go to another."
    ),
}
_NOT_SURE = (
    "What the model learns of these texts carries over to other texts of the domain. Whether they still improve is not "
    "sure by now: continue training, and look at the next readings."
)
"""The advice for a generalizing domain whose unseen texts do not measurably improve."""


def phases(history: History, thresholds: PhaseThresholds | None = None) -> list[Verdict]:
    """The verdict at each reading, by the rule of this module; the verdict at reading t uses readings up to t only.

    Deterministic. NaN readings are excluded from windows. Phases do not depend on the units of loss, steps and tokens.
    """
    rule = thresholds or PhaseThresholds()
    verdicts: list[Verdict] = []
    generalizing_for = 0  # consecutive readings, up to the previous one
    for t in range(len(history)):
        evidence: list[Evidence] = []
        phase, why = _decide(history, rule, t, generalizing_for, evidence)
        generalizing_for = generalizing_for + 1 if phase in (Phase.GENERALIZING, Phase.SETTLED) else 0
        for name, part in history.context.items():
            value, low, high = float(part.value[t]), float(part.low[t]), float(part.high[t])
            evidence.append(Evidence(name, "beside", "level", value, low, high, 1, int(history.seen[t])))
        step, tokens = int(history.steps[t]), int(history.tokens[t])
        improving = any(item.vote > 0 for item in evidence if item.name == "loss_unseen")
        sentence = _NOT_SURE if phase == Phase.GENERALIZING and not improving else ADVICE[phase]
        verdicts.append(Verdict(phase, step, tokens, why, sentence, tuple(evidence)))
    return verdicts


def changes(verdicts: Sequence[Verdict]) -> list[PhaseChange]:
    """The changes of phase among the verdicts of one domain."""
    before = [Phase.UNDECIDED, *(verdict.phase for verdict in verdicts)]
    return [
        PhaseChange(phase, verdict.phase, verdict)
        for phase, verdict in zip(before, verdicts, strict=False)
        if phase != verdict.phase
    ]


def _decide(
    history: History, rule: PhaseThresholds, t: int, generalizing_for: int, evidence: list[Evidence]
) -> tuple[Phase, str]:
    """The phase at a reading and the reason; appends the numbers it rests on to ``evidence``."""
    seen, unseen = int(history.seen[t]), int(history.unseen[t])
    if seen < rule.documents:
        return Phase.UNDECIDED, f"too few documents in the panel that were trained on: {seen} of {rule.documents}"
    if unseen < rule.documents:
        return Phase.UNDECIDED, (
            f"too few documents in the panel that were not trained on: {unseen} of {rule.documents}; raise "
            "data.heldout_share"
        )
    initial = _initial(history, t)
    recent = _recent_fall(history.loss_seen, history, rule, t, initial, seen, "loss_seen")
    evidence.append(recent)
    marked = bool(history.answers[: t + 1].any())
    start, what = _start(history, t, initial) if marked else (initial, "its value before the training")
    needed = rule.learned_answers if marked else rule.learned
    if not start > 0:
        return Phase.UNDECIDED, "the loss has no reading above 0"
    fallen = (start - _newest(history.loss_seen, t)) / start
    if not fallen >= needed:
        return _decide_unlearned(recent, rule, fallen, needed, what)
    return _decide_learned(history, rule, t, generalizing_for, initial, evidence)


def _decide_unlearned(
    recent: Evidence, rule: PhaseThresholds, fallen: float, needed: float, what: str
) -> tuple[Phase, str]:
    """Part 2 of the rule."""
    if recent.readings < LEAST_READINGS:
        return Phase.UNDECIDED, f"too few readings of the loss: {recent.readings} of {LEAST_READINGS}"
    shown = percent(fallen, decimals(100 * fallen, 100 * needed))
    so_far = f"the loss has fallen by {shown} of {what}, less than {exact_percent(needed)}"
    phase = Phase.LEARNING if recent.vote else Phase.UNDECIDED
    return phase, f"{so_far}, and {_course(recent, rule)}"


def _decide_learned(
    history: History, rule: PhaseThresholds, t: int, generalizing_for: int, initial: float, evidence: list[Evidence]
) -> tuple[Phase, str]:
    """Parts 3 to 5 of the rule."""
    share, low, high = (float(ends[t]) for ends in (history.share.value, history.share.low, history.share.high))
    marked = bool(history.answers[: t + 1].any())
    threshold = rule.memorized_answers if marked else rule.memorized
    documents = int(history.seen[t] + history.unseen[t])
    vote = 0 if not math.isfinite(share) else -1 if share >= threshold else 1
    unsure = vote < 0 and low < rule.sure * threshold
    unclear = unsure or (low < threshold / 2 and high > 2 * threshold)
    evidence.append(Evidence("share", "deciding", "level", share, low, high, 1, documents, 0 if unclear else vote))
    unseen = _recent_fall(history.loss_unseen, history, rule, t, initial, int(history.unseen[t]), "loss_unseen")
    evidence.append(unseen)
    if not vote:
        return Phase.UNDECIDED, "the memorized share has no value at this reading"
    places = decimals(100 * share, 100 * threshold)
    ends = f"{percent(low, places)} to {percent(high, places)}" if math.isfinite(low) else "no interval"
    number = f"{percent(share, places)} ({ends}, n={documents} documents)"
    if unclear:
        return Phase.UNDECIDED, (
            f"the memorized share, {number}, is too uncertain to compare with {exact_percent(threshold)}: more "
            "documents are needed, trained on or held out" + (", or a further rise" if unsure else "")
        )
    course = _course(unseen, rule)
    compared = f"of what was learned, {number} is memory, {{}} the threshold of {exact_percent(threshold)}"
    why = f"{compared}; the loss of unseen texts {course}"
    if vote < 0:
        return Phase.MEMORIZING, why.format("above" if share > threshold else "at")
    if generalizing_for >= rule.window and not unseen.vote:
        return Phase.SETTLED, why.format("below")
    return Phase.GENERALIZING, why.format("below")


def _course(fall: Evidence, rule: PhaseThresholds) -> str:
    """Whether a loss falls, as its evidence says; the rule takes only the first as falling."""
    if fall.vote:
        return "still falls"
    if fall.readings < LEAST_READINGS:
        return f"has too few readings to say whether it falls, {fall.readings} of {LEAST_READINGS}"
    if fall.low > 0:
        return f"falls by less than {exact_percent(rule.steep)} of its fall so far in the last {fall.readings} readings"
    return "no longer falls" if fall.value <= 0 else "does not measurably fall"


def _initial(history: History, t: int) -> float:
    """The loss before the training: the highest reading of the seen samples, or the first of the unseen, if higher."""
    readings = [*history.loss_seen.value[: t + 1], *history.loss_unseen.value[:1]]
    finite = [float(value) for value in readings if math.isfinite(value)]
    return max(finite, default=math.nan)


def _start(history: History, t: int, initial: float) -> tuple[float, str]:
    """The loss of answers of which nothing is known but how often each token occurs, and its name.

    It does not depend on the size of the vocabulary, as the loss before the training does.
    """
    known = math.nan if history.loss_frequencies is None else float(history.loss_frequencies.value[t])
    if math.isfinite(known) and known < initial:
        return known, "its value under the frequencies of tokens"
    return initial, "its value before the training"


def _newest(part: Curve, t: int) -> float:
    """The median of the newest readings, for one outlier not to count; NaN without any."""
    finite_T = part.value[: t + 1][np.isfinite(part.value[: t + 1])]
    return float(np.median(finite_T[-LEAST_READINGS:])) if len(finite_T) else math.nan


def _recent_fall(
    part: Curve, history: History, rule: PhaseThresholds, t: int, initial: float, documents: int, name: str
) -> Evidence:
    """The fall of a loss over the last readings, as a share of its fall so far; the vote is 1 where it falls.

    The fall is that of a least-squares line. Its interval is that of the slope: the samples are the same at every
    reading, so their differences from each other do not enter.
    """
    rows = slice(max(t + 1 - rule.trend, 0), t + 1)
    y_T, x_T = part.value[rows], history.steps[rows].astype(np.float64)
    span = float(x_T[-1] - x_T[0])
    x_T, y_T = x_T[np.isfinite(y_T)], y_T[np.isfinite(y_T)]
    n = len(y_T)
    if n < LEAST_READINGS or not initial > 0:
        return Evidence(name, "loss", "share", math.nan, math.nan, math.nan, n, documents)
    centred_T = x_T - x_T.mean()
    slope = float(centred_T @ y_T / (centred_T @ centred_T))
    residual_T = y_T - y_T.mean() - slope * centred_T
    error = math.sqrt(residual_T @ residual_T / (n - 2) / (centred_T @ centred_T))
    # A fall so far below a fifth of the initial loss counts as that much, so that early noise is no trend.
    scale = span / max(initial - _newest(part, t), initial / 5)
    half_width = float(student.ppf(0.975, n - 2)) * error
    value, low, high = (-change * scale for change in (slope, slope + half_width, slope - half_width))
    return Evidence(name, "loss", "share", value, low, high, n, documents, int(value >= rule.steep and low > 0))
