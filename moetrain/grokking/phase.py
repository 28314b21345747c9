"""The phase of a domain: the monitor's verdict, from training loss and leave-one-out accuracy (ours).

Both are taken over panel samples that the run has trained on. The verdict at a reading uses that reading and earlier
ones only. The rule, with the default thresholds:

1. **Not learned yet**: the loss of the seen samples has not fallen by 80% of its highest reading. The domain is
   **learning** if the loss still falls, and **undecided** if not. It falls if a straight line through the last 5
   readings falls by 5% or more of the total fall so far, and the 95% interval of that fall is above 0.
2. **Learned**: the mean of the newest 3 readings of leave-one-out accuracy decides. At least 0.13: **generalizing**.
   At most 0.11: **memorizing**. In between: **undecided**.
3. **settled** replaces generalizing where the domain was generalizing or settled at each of the previous 3 readings,
   and the mean is less than 0.05 above the mean of the 3 readings before its own.
4. **undecided** also with fewer than 64 seen samples, where the documents mark no answers, and where fewer than 96
   samples have a marked answer.

Leave-one-out accuracy was the only measure of routing that separated learned rules from facts that can only be
memorized, in a study with planted ground truth; measures that need no marked answers did not. The thresholds were
fitted on some runs and tested on others with other seeds and settings: tools/results/validity.md gives the error rates.
Other curves are recorded with a verdict and do not affect it. Suffix: T readings in order of time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import t as student

from ._arrays import Arrayish, Floats, Ints, to_float64
from .memorization import LEAST_CELL

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
    """The numbers of the rule. Those of part 2 were fitted on runs of the validity study.

    Raises:
        ValueError: numbers out of their range.
    """

    samples: int = LEAST_CELL  # seen panel samples that a verdict needs
    trend: int = 5  # readings of the line through the loss
    steep: float = 0.05  # fall over them, as a share of the fall so far, from which on the domain is learning
    learned: float = 0.8  # fall of the loss, as a share of its highest reading, from which on the domain is learned
    window: int = 3  # readings of leave-one-out accuracy that are averaged
    answers: int = 96  # samples with a marked answer that leave-one-out accuracy needs
    generalizing: float = 0.13  # least leave-one-out accuracy of a generalizing domain
    memorizing: float = 0.11  # largest leave-one-out accuracy of a memorizing domain
    still: float = 0.05  # rise of leave-one-out accuracy below which a generalizing domain is settled

    def __post_init__(self) -> None:
        if self.trend < LEAST_READINGS or self.window < 1 or min(self.samples, self.answers) < 1:
            raise ValueError(
                f"trend is {self.trend}, window {self.window}, samples {self.samples}, answers {self.answers}: "
                f"at least {LEAST_READINGS} readings for the trend, and 1 of each other"
            )
        for name in ("steep", "learned", "still"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share between 0 and 1")
        if not 0 <= self.memorizing <= self.generalizing <= 1:
            raise ValueError(
                f"memorizing is {self.memorizing} and generalizing {self.generalizing}: shares, the first no larger"
            )


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
    samples: Ints  # [T] panel samples trained on
    answers: Ints  # [T] of these, samples that leave-one-out accuracy was taken over
    loss_seen: Curve  # mean loss of the samples, nats per predicted token
    left_out: Curve  # leave-one-out accuracy
    context: Mapping[str, Curve] = field(
        default_factory=dict
    )  # other curves: recorded in verdicts, not used by the rule

    def __post_init__(self) -> None:
        counts = ("steps", "tokens", "samples", "answers")
        for name in counts:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        curves = {"loss_seen": self.loss_seen, "left_out": self.left_out, **self.context}
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
    samples: int
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
    Phase.UNDECIDED: "The rule cannot tell: continue training and look at the curves.",
    Phase.LEARNING: "Continue training: the texts are still being learned, and routing is not informative before that.",
    Phase.MEMORIZING: (
        "The texts are learned, but each one separately: further passes over them may only be memorized. Look at the "
        "loss gaps, and consider fewer repeats, more varied texts or more weight decay."
    ),
    Phase.GENERALIZING: (
        "What the samples have in common determines their answers: continue training, because held-out text benefits; "
        "probes can confirm it."
    ),
    Phase.SETTLED: (
        "The domain generalizes and its routing no longer changes: its share of the mixture can go to domains that are "
        "still learning."
    ),
}


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
            evidence.append(Evidence(name, "beside", "level", value, low, high, 1, int(history.samples[t])))
        step, tokens = int(history.steps[t]), int(history.tokens[t])
        verdicts.append(Verdict(phase, step, tokens, why, ADVICE[phase], tuple(evidence)))
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
    samples = int(history.samples[t])
    if samples < rule.samples:
        return Phase.UNDECIDED, f"too few samples: {samples} of {rule.samples}"
    recent_fall, total_fall = _loss(history, rule, t)
    evidence.append(recent_fall)
    if total_fall >= rule.learned:
        return _decide_learned(history, rule, t, generalizing_for, evidence)
    if recent_fall.readings < LEAST_READINGS:
        return Phase.UNDECIDED, f"too few readings of the loss: {recent_fall.readings} of {LEAST_READINGS}"
    if recent_fall.value >= rule.steep and recent_fall.low > 0:
        share = f"{recent_fall.value:.0%} of its total fall"
        return Phase.LEARNING, f"the loss still falls: by {share} over the last {recent_fall.readings} readings"
    fallen = f"{max(total_fall, 0):.0%} of its highest reading, less than {rule.learned:.0%}"
    return Phase.UNDECIDED, f"the loss has fallen by {fallen}, and no longer falls"


def _decide_learned(
    history: History, rule: PhaseThresholds, t: int, generalizing_for: int, evidence: list[Evidence]
) -> tuple[Phase, str]:
    """Parts 2 to 4 of the rule."""
    if not history.answers[: t + 1].any():
        return Phase.UNDECIDED, "learned, but the documents mark no answers, which leave-one-out accuracy needs"
    answers = int(history.answers[t])
    if answers < rule.answers:
        return Phase.UNDECIDED, f"too few samples with an answer: {answers} of {rule.answers}: raise panel.samples"
    now, low, high, readings = _mean(history.left_out, t, rule.window)
    vote = 1 if now >= rule.generalizing else -1 if now <= rule.memorizing else 0
    evidence.append(Evidence("left_out", "deciding", "level", now, low, high, readings, answers, vote))
    if not readings:
        return Phase.UNDECIDED, "leave-one-out accuracy has no value in the newest readings"
    why = f"learned; leave-one-out accuracy is {now:.0%}, "
    if vote < 0:
        return Phase.MEMORIZING, f"{why}at most {rule.memorizing:.0%}"
    if vote == 0:
        return Phase.UNDECIDED, f"{why}between {rule.memorizing:.0%} and {rule.generalizing:.0%}"
    why += f"at least {rule.generalizing:.0%}"
    before = _mean(history.left_out, t - rule.window, rule.window)[0]
    if generalizing_for >= rule.window and now - before < rule.still:
        return Phase.SETTLED, f"{why}, and has risen by less than {rule.still:.0%} in {rule.window} readings"
    return Phase.GENERALIZING, why


def _loss(history: History, rule: PhaseThresholds, t: int) -> tuple[Evidence, float]:
    """The fall of the loss over the last readings, as a share of the fall so far; and the fall so far, relative.

    The first is the fall of a least-squares line. Its interval is that of the slope: the samples are the same at every
    reading, so their differences from each other do not enter. The second is a share of the highest reading.
    """
    rows, loss_T = slice(max(t + 1 - rule.trend, 0), t + 1), history.loss_seen.value
    y_T, x_T = loss_T[rows], history.steps[rows].astype(np.float64)
    span = float(x_T[-1] - x_T[0])
    x_T, y_T = x_T[np.isfinite(y_T)], y_T[np.isfinite(y_T)]
    n, samples = len(y_T), int(history.samples[t])
    highest = float(np.nanmax(loss_T[: t + 1])) if n else math.nan
    if n < LEAST_READINGS or not highest > 0:
        return Evidence("loss_seen", "loss", "share", math.nan, math.nan, math.nan, n, samples), math.nan
    centred_T = x_T - x_T.mean()
    slope = float(centred_T @ y_T / (centred_T @ centred_T))
    residual_T = y_T - y_T.mean() - slope * centred_T
    error = math.sqrt(residual_T @ residual_T / (n - 2) / (centred_T @ centred_T))
    now = float(np.median(y_T[-LEAST_READINGS:]))
    # A fall so far below (1 - learned) of the highest reading counts as that much, so that early noise is no trend.
    scale = span / max(highest - now, (1 - rule.learned) * highest)
    half_width = float(student.ppf(0.975, n - 2)) * error
    value, low, high = (-change * scale for change in (slope, slope + half_width, slope - half_width))
    return Evidence("loss_seen", "loss", "share", value, low, high, n, samples), (highest - now) / highest


def _mean(part: Curve, t: int, window: int) -> tuple[float, float, float, int]:
    """Means of value, low and high over the finite readings of a window that ends at t, and their number."""
    rows = slice(max(t + 1 - window, 0), max(t + 1, 0))
    finite_T = np.isfinite(part.value[rows])
    if not finite_T.any():
        return math.nan, math.nan, math.nan, 0
    low, high = (float(ends[rows][finite_T].mean()) for ends in (part.low, part.high))
    return float(part.value[rows][finite_T].mean()), low, high, int(finite_T.sum())
