"""The phase of a domain: the monitor's verdict, from training loss and the routing of samples trained on alone (ours).

The rule rests on left-out accuracy, the one measure of many that told rules from facts that can only be memorized in a
study with planted truth: thresholds were fitted on some runs and tested on others, with other seeds and settings
(tools/results/validity.md says how often it errs). A verdict uses readings up to its own and none after it.

1. **learning**: the loss of the seen panel samples has not fallen by 80% of its highest reading, and falls: by a
   straight line through the last 5 readings by 5% or more of all it has fallen, and the fall's interval does not hold
   0. Where it has not fallen so far and does not fall now, the domain is **undecided**.
2. From then on the mean of the newest 3 readings of left-out accuracy decides. At least `generalizing`: the answers of
   other samples tell this one's, the domain is **generalizing**. At most `memorizing`: it is **memorizing**. Between
   the two: **undecided**.
3. **settled**: rule 2 has said generalizing for more than 3 readings, and the mean has risen by less than 0.05 since.
4. **undecided** also where documents mark no answers, or fewer than 96 samples have one: the measures that need no
   answers did not tell the two apart in the study.

All other curves stand beside the verdict as evidence and do not enter it. Suffixes: T readings in order of time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.stats import t as student

from ._arrays import Arrayish, Floats, Ints, to_float64
from .estimate import Estimate
from .memorization import LEAST_CELL

LEAST_READINGS = 3  # of a line: two make no scatter around it

Role: TypeAlias = Literal["loss", "deciding", "beside"]
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
    """The numbers of the rule; those of rule 2 were fitted on the fit runs of the validity study.

    Raises ValueError for numbers that make no rule.
    """

    samples: int = LEAST_CELL  # seen panel samples below which nothing is said
    trend: int = 5  # readings that the line through the loss is made of
    steep: float = 0.05  # fall over those, as a share of the fall so far, from which on the domain is learning
    learned: float = 0.8  # share of its highest reading that the loss must have fallen by before routing is judged
    window: int = 3  # readings of left-out accuracy that are averaged
    answers: int = 96  # samples with a marked answer below which left-out accuracy is not judged
    generalizing: float = 0.13  # left-out accuracy from which on a domain is generalizing
    memorizing: float = 0.11  # and up to which it is memorizing
    still: float = 0.05  # rise of left-out accuracy over a window up to which it has settled

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


def curve(points: Sequence[Estimate | float | None] | Arrayish) -> Curve:
    """A Curve of what a monitor holds: one Estimate, number or None a reading; or an array [T] of values, or [T, 3] of
    value, low and high.

    What is not finite becomes NaN. Raises ValueError for an array of another shape.
    """
    listed: Any = [_row(point) for point in points] if isinstance(points, Sequence) else points
    rows = to_float64(listed)
    if rows.ndim == 1:
        rows = np.stack([rows, np.full(len(rows), np.nan), np.full(len(rows), np.nan)], axis=1)
    if rows.ndim != 2 or rows.shape[1] != 3:
        raise ValueError(f"points have shape {rows.shape}: pass [readings], or [readings, 3] of value, low and high")
    rows = np.where(np.isfinite(rows), rows, np.nan)
    return Curve(*np.ascontiguousarray(rows.T))


def _row(point: Any) -> Any:
    if isinstance(point, Estimate):
        return point.mean, point.low, point.high
    if point is None or np.ndim(point) == 0:
        return (math.nan if point is None else point), math.nan, math.nan
    return point


@dataclass(frozen=True, slots=True)
class History:
    """The readings of one domain's panel in order of time.

    steps, tokens [T]: of the run, ascending. samples, answers [T]: panel samples already trained on at each reading,
    and those of them whose answer left-out accuracy was taken over. loss_seen in nats and left_out are over those.
    beside: other curves by name, which verdicts show and do not use.
    Raises ValueError for lengths that differ and for steps or tokens that do not ascend.
    """

    steps: Ints
    tokens: Ints
    samples: Ints
    answers: Ints
    loss_seen: Curve
    left_out: Curve
    beside: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "samples", "answers"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        lengths = {name: len(getattr(self, name)) for name in ("steps", "tokens", "samples", "answers")}
        curves = {"loss_seen": self.loss_seen, "left_out": self.left_out, **self.beside}
        lengths |= {name: len(part.value) for name, part in curves.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"curves of different length, {lengths}: pass one value a reading, NaN where there is none"
            )
        if (np.diff(self.steps) <= 0).any() or (np.diff(self.tokens) <= 0).any():
            raise ValueError("steps and tokens do not ascend: sort the readings, and take each once")

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One number that a verdict rests on, or that stands beside it.

    `unit`: "share" (of the fall of the loss so far, over the last readings) or "level" (now). `low` and `high`: 95%
    interval; `readings` and `samples`: what went in. `vote`: 1 speaks for generalization, -1 for memorization, 0 for
    neither.
    """

    name: str
    role: Role
    unit: Unit
    value: float
    low: float
    high: float
    readings: int
    samples: int
    vote: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The phase at one reading, what it rests on, and what one may do about it.

    `why` says which part of the rule spoke, `sentence` is for the reader.
    """

    phase: Phase
    step: int
    tokens: int
    why: str
    sentence: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class PhaseChange:
    """An event: the phase became another one at this verdict. Before the first reading a domain is undecided."""

    before: Phase
    after: Phase
    verdict: Verdict


ADVICE = {
    Phase.UNDECIDED: "Draw no conclusion: go on training and look at the curves themselves.",
    Phase.LEARNING: "Go on training: its texts are still being learned, and routing says little before they are.",
    Phase.MEMORIZING: (
        "Its texts are learned, and each by itself: more passes over the same texts may only be memorized; look at the "
        "gaps, and consider fewer repeats, more varied texts or more weight decay."
    ),
    Phase.GENERALIZING: (
        "What its samples have in common tells their answers: go on training, held-out text gains from it; probes may "
        "confirm it."
    ),
    Phase.SETTLED: (
        "It generalizes, and its routing has stopped changing: its share of the mixture may go to domains that still "
        "learn."
    ),
}


def phases(history: History, thresholds: PhaseThresholds | None = None) -> list[Verdict]:
    """The verdict at each reading, by the rule of this module; the one at reading t rests on readings up to t only.

    Deterministic. NaN readings are left out of windows. Phases do not change when loss, steps or tokens are measured in
    another unit.
    """
    rule = thresholds or PhaseThresholds()
    verdicts: list[Verdict] = []
    held = 0  # readings in a row that generalized
    for t in range(len(history)):
        evidence: list[Evidence] = []
        phase, why = _judge(history, rule, t, held, evidence)
        held = held + 1 if phase in (Phase.GENERALIZING, Phase.SETTLED) else 0
        evidence += [_level(history, name, part, t) for name, part in history.beside.items()]
        at = int(history.steps[t]), int(history.tokens[t])
        verdicts.append(Verdict(phase, *at, why, ADVICE[phase], tuple(evidence)))
    return verdicts


def changes(verdicts: Sequence[Verdict]) -> list[PhaseChange]:
    """The events among the verdicts of one domain: each at which the phase differs from the one before."""
    before = [Phase.UNDECIDED, *(verdict.phase for verdict in verdicts)]
    return [
        PhaseChange(phase, verdict.phase, verdict)
        for phase, verdict in zip(before, verdicts, strict=False)
        if phase != verdict.phase
    ]


def _judge(history: History, rule: PhaseThresholds, t: int, held: int, evidence: list[Evidence]) -> tuple[Phase, str]:
    """The phase at a reading and why; what it rests on is added to ``evidence``."""
    samples = int(history.samples[t])
    if samples < rule.samples:
        return Phase.UNDECIDED, f"too few samples: {samples} of {rule.samples}"
    fall, fallen = _loss(history, rule, t)
    evidence.append(fall)
    if not fallen >= rule.learned:
        if fall.readings < LEAST_READINGS:
            return Phase.UNDECIDED, f"too few readings of the loss: {fall.readings} of {LEAST_READINGS}"
        if fall.value >= rule.steep and fall.low > 0:
            return Phase.LEARNING, f"the loss falls, by {fall.value:.0%} of its fall so far in {fall.readings} readings"
        return (
            Phase.UNDECIDED,
            f"the loss has fallen by {max(fallen, 0):.0%} of {rule.learned:.0%}, and does not fall now",
        )
    return _judge_routing(history, rule, t, held, evidence)


def _judge_routing(
    history: History, rule: PhaseThresholds, t: int, held: int, evidence: list[Evidence]
) -> tuple[Phase, str]:
    """Rules 2 to 4: a domain whose texts have been learned."""
    if not history.answers[: t + 1].any():
        return Phase.UNDECIDED, "its documents mark no answers, without which routing does not tell"
    answers = int(history.answers[t])
    if answers < rule.answers:
        return Phase.UNDECIDED, f"too few samples with an answer: {answers} of {rule.answers}: raise panel.samples"
    now, low, high, readings = _mean(history.left_out, t, rule.window)
    vote = 1 if now >= rule.generalizing else -1 if now <= rule.memorizing else 0
    evidence.append(Evidence("left_out", "deciding", "level", now, low, high, readings, answers, vote))
    if not readings:
        return Phase.UNDECIDED, "left-out accuracy has no value in the newest readings"
    if vote < 0:
        return Phase.MEMORIZING, f"learned, but others tell {now:.0%} of the answers: at most {rule.memorizing:.0%}"
    if vote == 0:
        between = f"{rule.memorizing:.0%} and {rule.generalizing:.0%}"
        return Phase.UNDECIDED, f"others tell {now:.0%} of the answers: between {between}"
    why = f"others tell {now:.0%} of the answers: at least {rule.generalizing:.0%}"
    before = _mean(history.left_out, t - rule.window, rule.window)[0]
    if held >= rule.window and now - before < rule.still:
        return Phase.SETTLED, f"{why}, no more than {rule.window} readings ago"
    return Phase.GENERALIZING, why


def _loss(history: History, rule: PhaseThresholds, t: int) -> tuple[Evidence, float]:
    """The fall over the newest readings as a share of the fall so far, and the share of its highest it has fallen by.

    The interval is that of the line's slope: the samples are the same at each reading, so that how they differ from
    each other adds nothing to it.
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
    scale = span / max(highest - now, (1 - rule.learned) * highest)
    half = float(student.ppf(0.975, n - 2)) * error
    value, low, high = (-change * scale for change in (slope, slope + half, slope - half))
    return Evidence("loss_seen", "loss", "share", value, low, high, n, samples), (highest - now) / highest


def _mean(part: Curve, t: int, window: int) -> tuple[float, float, float, int]:
    """Mean of the newest readings and of their interval's ends, and how many there were; NaN of none."""
    rows = slice(max(t + 1 - window, 0), max(t + 1, 0))
    kept = np.isfinite(part.value[rows])
    if not kept.any():
        return math.nan, math.nan, math.nan, 0
    low, high = (float(ends[rows][kept].mean()) for ends in (part.low, part.high))
    return float(part.value[rows][kept].mean()), low, high, int(kept.sum())


def _level(history: History, name: str, part: Curve, t: int) -> Evidence:
    now = float(part.value[t]), float(part.low[t]), float(part.high[t])
    return Evidence(name, "beside", "level", *now, 1, int(history.samples[t]))
