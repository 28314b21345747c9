"""The phase of a domain: the monitor's verdict, from training loss and the routing of samples trained on alone (ours).

**Provisional**: the thresholds below fit the few planted runs that suggested the rule and no study has calibrated them
yet; a verdict says so. Each verdict uses readings up to its own and none after it. The rule, `window` = 5 readings:

1. *A change counts* if it is at least its threshold and its 95% interval does not hold 0.
2. **learning**: the loss of the seen panel samples falls, by a straight line through the last 5 readings, by 5% or more
   of all it has fallen from its highest reading on, and the fall counts. Where the line is as steep but does not
   count, where the loss rises so, or has not yet fallen by 10% of its highest, the domain is **undecided**.
3. Otherwise the loss is *flat*. The 5 readings up to the first flat one after learning are the *reference*: there
   memorization began. Until 5 readings later the domain is **undecided**; from then on the mean of the last 5 readings
   is compared with the reference. Four measures speak for generalization if the change counts: effective rank lower by
   15% and layer CKA higher by 0.02 (the *deciding* two), spread lower by 50% and cosine higher by 0.05 (the
   *supporting* two: in the planted runs they moved in domains of pure noise as well). A deciding measure that moves as
   far the other way speaks against.
4. A *control* explains a measure that speaks for it, where its own change counts and is, in units of its threshold, no
   smaller than the measure's: router entropy higher by 10% (a flatter router) explains spread and cosine; the model's
   load variation higher by 30% (all samples on the same experts) explains all four; individuality whose interval at
   the reference is not above 0 (the samples' routing differs by no more than finite tokens make it) explains all four.
5. **generalizing**: at least 3 of the four speak for it, none of the deciding two against, with every control at hand
   and 3 still left after what the controls explain.
6. **settled**: rule 5 has held for more than 5 readings, and no measure that speaks for it changed by more than 20% of
   its total change from the 5 readings before to the last 5.
7. **memorizing**: neither deciding measure speaks for generalization.
8. Everything else is **undecided**: measures that contradict each other, controls that moved alike or are missing,
   fewer than 64 samples, fewer than 3 of the 5 readings. When the loss falls steeply again, learning begins anew.

Distances (`d_path_norm`), left-out accuracy and the gaps of seen samples to others stand beside the verdict and do not
enter it.
Suffixes: T readings in order of time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.stats import t as student

from ._arrays import Arrayish, Floats, Ints, to_float64
from .estimate import Estimate
from .memorization import LEAST_CELL

LEAST_READINGS = 3  # of a window: two make no scatter around a line
LARGEST_LOG = 700.0  # exp of more overflows

Role: TypeAlias = Literal["loss", "deciding", "supporting", "control", "beside"]
Unit: TypeAlias = Literal["share", "ratio", "difference", "level"]


class Phase(IntEnum):
    """The phases, numbered as `phase/DOMAIN` in TensorBoard."""

    UNDECIDED = 0
    LEARNING = 1
    MEMORIZING = 2
    GENERALIZING = 3
    SETTLED = 4


@dataclass(frozen=True, slots=True)
class PhaseThresholds:
    """The numbers of the rule, all of them provisional until a validity study sets them.

    Raises ValueError for numbers that make no rule.
    """

    window: int = 5  # readings that a trend, a mean and a wait are made of
    samples: int = LEAST_CELL  # seen panel samples below which nothing is said
    learned: float = 0.1  # share of its highest reading by which the loss must have fallen before it can be flat
    steep: float = 0.05  # fall over a window, as a share of the fall so far, from which on the domain is learning
    rank_fall: float = 0.15  # relative fall of effective rank; in the planted runs .19 to .38, noise .01 to .30
    cka_rise: float = 0.02  # rise of layer CKA; in the planted runs .03 to .11, noise -.06 to -.03
    spread_fall: float = 0.5  # relative fall of spread; in the planted runs .79 to .93, noise .67 to .71
    cosine_rise: float = 0.05  # rise of the mean cosine of consecutive layers
    agree: int = 3  # of the four measures that have to speak for generalization
    entropy_rise: float = 0.1  # relative rise of router entropy that can explain spread and cosine
    load_rise: float = 0.3  # relative rise of the load's coefficient of variation that can explain all
    flat: float = 0.2  # change over a window, as a share of the total, up to which a measure has settled
    provisional: bool = True  # whether the texts say that no study has calibrated these numbers

    def __post_init__(self) -> None:
        if self.window < LEAST_READINGS or self.samples < 1:
            raise ValueError(
                f"window is {self.window} and samples {self.samples}: at least {LEAST_READINGS} readings and 1 sample"
            )
        if not 2 <= self.agree <= len(_MEASURES):
            raise ValueError(f"agree is {self.agree}: 2 to {len(_MEASURES)} of the measures")
        for name in ("learned", "rank_fall", "spread_fall"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share between 0 and 1")
        for name in ("steep", "cka_rise", "cosine_rise", "entropy_rise", "load_rise", "flat"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")


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

    steps, tokens [T]: of the run, ascending. samples [T]: seen panel samples at each reading. Curves, all over the seen
    samples: loss_seen in nats; the measures; the controls individuality and router_entropy (mean entropy of the
    router's probabilities, nats). load_cv is that of the whole model: a domain's own load concentrates when its samples
    come to be routed alike, which is no control for that. left_out (see `left_out`) and the gaps may be missing.
    Raises ValueError for lengths that differ and for steps or tokens that do not ascend.
    """

    steps: Ints
    tokens: Ints
    samples: Ints
    loss_seen: Curve
    cosine: Curve
    spread: Curve
    effective_rank: Curve
    layer_cka: Curve
    d_path_norm: Curve
    individuality: Curve
    router_entropy: Curve
    load_cv: Curve
    left_out: Curve | None = None
    gap: Curve | None = None
    gap_heldout: Curve | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "samples"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        lengths = {
            field.name: len(part.value if isinstance(part, Curve) else part)
            for field in fields(self)
            if (part := getattr(self, field.name)) is not None
        }
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

    `unit`: "share" (of the fall of the loss so far, over the last window), "ratio" (to the reference), "difference"
    (from the reference) or "level" (now). `low` and `high`: 95% interval; `readings` and `samples`: what went in.
    `vote`: 1 speaks for generalization, -1 against, 0 neither (too small, within its interval, or no number).
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

    `why` says which part of the rule spoke, `controls` names controls that moved alike, `sentence` is for the reader.
    """

    phase: Phase
    step: int
    tokens: int
    why: str
    sentence: str
    evidence: tuple[Evidence, ...]
    controls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PhaseChange:
    """An event: the phase became another one at this verdict. Before the first reading a domain is undecided."""

    before: Phase
    after: Phase
    verdict: Verdict


ADVICE = {
    Phase.UNDECIDED: "Draw no conclusion yet: go on training and look at the curves themselves.",
    Phase.LEARNING: "Go on training: its texts are still being learned, and routing says little before that slows.",
    Phase.MEMORIZING: (
        "Its texts are learned but still routed one by one: more passes over the same texts may only be memorized; "
        "look at memorized/gap, and consider fewer repeats, more varied texts or more weight decay."
    ),
    Phase.GENERALIZING: (
        "Go on training although its loss is flat: what the samples have in common is still taking over their routing; "
        "probes may confirm it."
    ),
    Phase.SETTLED: (
        "Little more is to be expected from this domain in this run: its share of the mixture may go to domains that "
        "still learn."
    ),
}
PROVISIONAL = "Provisional, by thresholds that no study has calibrated. "


def phases(history: History, thresholds: PhaseThresholds | None = None) -> list[Verdict]:
    """The verdict at each reading, by the rule of this module; the one at reading t rests on readings up to t only.

    Deterministic. NaN readings are left out of windows; what too few are left for has no vote. Phases do not change
    when loss, spread, effective rank, entropy, load, steps or tokens are measured in another unit.
    """
    judge = _Judge(history, thresholds or PhaseThresholds())
    return [judge.at(t) for t in range(len(history))]


def changes(verdicts: Sequence[Verdict]) -> list[PhaseChange]:
    """The events among the verdicts of one domain: each at which the phase differs from the one before."""
    before = [Phase.UNDECIDED, *(verdict.phase for verdict in verdicts)]
    return [
        PhaseChange(phase, verdict.phase, verdict)
        for phase, verdict in zip(before, verdicts, strict=False)
        if phase != verdict.phase
    ]


@dataclass(frozen=True, slots=True)
class _Measure:
    """How a quantity is compared: logarithms where only ratios have a meaning; the direction that speaks."""

    name: str
    role: Role
    logarithmic: bool
    direction: int


_MEASURES = (
    _Measure("effective_rank", "deciding", True, -1),
    _Measure("layer_cka", "deciding", False, 1),
    _Measure("spread", "supporting", True, -1),
    _Measure("cosine", "supporting", False, 1),
)
_DISTANCE = _Measure("d_path_norm", "beside", True, 0)
_CONTROLS = (_Measure("router_entropy", "control", True, 1), _Measure("load_cv", "control", True, 1))
_EXPLAINS = {
    "router_entropy": ("spread", "cosine"),
    "load_cv": tuple(m.name for m in _MEASURES),
    "individuality": tuple(m.name for m in _MEASURES),
}


@dataclass(frozen=True, slots=True)
class _Change:
    """A change with its interval, in logarithms or not, over `readings` readings."""

    value: float
    low: float
    high: float
    readings: int

    def counts(self, threshold: float) -> int:
        """1 or -1, the sign of a change of at least the threshold whose interval does not hold 0; else 0."""
        if self.value >= threshold and self.low > 0:
            return 1
        return -1 if self.value <= -threshold and self.high < 0 else 0


_NOTHING = _Change(math.nan, math.nan, math.nan, 0)


class _Judge:
    """Goes through the readings once, in order; holds since when the loss is flat and for how long rule 5 held."""

    def __init__(self, history: History, thresholds: PhaseThresholds) -> None:
        self.history = history
        self.rule = thresholds
        self.flat_since: int | None = None
        self.held = 0
        # Log changes for ratios, so that a fall and the rise that undoes it are the same size.
        self.threshold = {
            "effective_rank": -math.log1p(-thresholds.rank_fall),
            "layer_cka": thresholds.cka_rise,
            "spread": -math.log1p(-thresholds.spread_fall),
            "cosine": thresholds.cosine_rise,
            "router_entropy": math.log1p(thresholds.entropy_rise),
            "load_cv": math.log1p(thresholds.load_rise),
        }

    def at(self, t: int) -> Verdict:
        """The verdict at reading t; to be called for each reading in order."""
        evidence: list[Evidence] = []
        phase, why, controls = self._judge(t, evidence)
        self.held = self.held + 1 if phase in (Phase.GENERALIZING, Phase.SETTLED) else 0
        for name in ("left_out", "gap", "gap_heldout"):
            part: Curve | None = getattr(self.history, name)
            if part is not None:
                now = _Change(float(part.value[t]), float(part.low[t]), float(part.high[t]), 1)
                evidence.append(self._evidence(t, name, "beside", "level", now))
        return Verdict(
            phase=phase,
            step=int(self.history.steps[t]),
            tokens=int(self.history.tokens[t]),
            why=why,
            sentence=(PROVISIONAL if self.rule.provisional else "") + ADVICE[phase],
            evidence=tuple(evidence),
            controls=controls,
        )

    def _judge(self, t: int, evidence: list[Evidence]) -> tuple[Phase, str, tuple[str, ...]]:
        """Rules 2 and 3: learning, or flat, or too little to tell."""
        rule, samples = self.rule, int(self.history.samples[t])
        fall, learned = self._loss(t)
        evidence.append(self._evidence(t, "loss_seen", "loss", "share", fall))
        if samples < rule.samples:
            return Phase.UNDECIDED, f"too few samples: {samples} of {rule.samples}", ()
        if math.isnan(fall.value):
            return Phase.UNDECIDED, f"too few readings of the loss: {fall.readings} in the last {rule.window}", ()
        if fall.counts(rule.steep) == 1:
            self.flat_since = None
            return Phase.LEARNING, "the loss of seen samples is still falling steeply", ()
        if fall.counts(rule.steep) == -1:
            return Phase.UNDECIDED, "the loss of seen samples is rising", ()
        if abs(fall.value) >= rule.steep:
            return Phase.UNDECIDED, "the loss of seen samples moves, without a clear direction", ()
        if not learned:
            return Phase.UNDECIDED, "the loss of seen samples has hardly fallen yet: nothing is learned", ()
        if self.flat_since is None:
            self.flat_since = t
        if t - self.flat_since < rule.window:
            missing = rule.window - (t - self.flat_since)
            return (
                Phase.UNDECIDED,
                f"the loss has become flat: {missing} more readings until routing can be compared",
                (),
            )
        return self._judge_routing(t, self.flat_since, evidence)

    def _judge_routing(self, t: int, flat_since: int, evidence: list[Evidence]) -> tuple[Phase, str, tuple[str, ...]]:
        """Rules 3 to 8: what routing says of a domain whose loss is flat."""
        rule = self.rule
        reference, now = self._window(flat_since), self._window(t)
        moved = {m.name: self._change(m, reference, now) for m in (*_MEASURES, _DISTANCE, *_CONTROLS)}
        votes = {m.name: m.direction * moved[m.name].counts(self.threshold[m.name]) for m in _MEASURES}
        for m in (*_MEASURES, _DISTANCE, *_CONTROLS):
            unit: Unit = "ratio" if m.logarithmic else "difference"
            change = _ratio(moved[m.name]) if m.logarithmic else moved[m.name]
            evidence.append(self._evidence(t, m.name, m.role, unit, change, votes.get(m.name, 0)))
        individuality = self._level(reference)
        evidence.append(self._evidence(t, "individuality", "control", "level", individuality))

        speaking = [name for name, vote in votes.items() if vote == 1]
        deciding = [votes[m.name] for m in _MEASURES if m.role == "deciding"]
        available = sum(not math.isnan(moved[m.name].value) for m in _MEASURES)
        if available < rule.agree:
            return Phase.UNDECIDED, f"too few measures: {available} of {len(_MEASURES)} have a value", ()
        if 1 not in deciding:
            if all(math.isnan(moved[m.name].value) for m in _MEASURES if m.role == "deciding"):
                return Phase.UNDECIDED, "neither effective rank nor layer CKA has a value", ()
            return (
                Phase.MEMORIZING,
                "the loss is flat, and neither effective rank nor layer CKA moved towards generalization",
                (),
            )
        if -1 in deciding:
            return Phase.UNDECIDED, "effective rank and layer CKA contradict each other", ()
        if len(speaking) < rule.agree:
            return Phase.UNDECIDED, f"only {', '.join(speaking)} moved towards generalization", ()

        missing = [c.name for c in _CONTROLS if math.isnan(moved[c.name].value)]
        missing += ["individuality"] if math.isnan(individuality.value) else []
        if missing:
            return Phase.UNDECIDED, f"measures moved, but without a control: {', '.join(missing)} missing", ()
        explained, controls = self._explained(speaking, moved, individuality)
        left = [name for name in speaking if name not in explained]
        if len(left) < rule.agree:
            why = f"measures moved, but no more than {' and '.join(controls)} explains"
            return Phase.UNDECIDED, why, controls
        why = f"the loss is flat, and {', '.join(left)} moved towards generalization"
        if self.held >= rule.window and all(self._has_settled(m, t, moved) for m in _MEASURES if m.name in speaking):
            return Phase.SETTLED, f"{why}; they have stopped moving", controls
        return Phase.GENERALIZING, why, controls

    def _explained(
        self, speaking: list[str], moved: dict[str, _Change], individuality: _Change
    ) -> tuple[set[str], tuple[str, ...]]:
        """Rule 4: measures that a control explains, and the controls that do."""
        size = {name: abs(moved[name].value) / self.threshold[name] for name in self.threshold}
        explains = {c.name: moved[c.name].counts(self.threshold[c.name]) == c.direction for c in _CONTROLS}
        size["individuality"] = math.inf
        explains["individuality"] = not individuality.low > 0
        found = {
            control: {name for name in speaking if name in _EXPLAINS[control] and size[control] >= size[name]}
            for control, alike in explains.items()
            if alike
        }
        return set().union(*found.values()), tuple(control for control, names in found.items() if names)

    def _has_settled(self, measure: _Measure, t: int, moved: dict[str, _Change]) -> bool:
        """Rule 6, for one measure that speaks for generalization."""
        recent = self._change(measure, self._window(t - self.rule.window), self._window(t))
        return abs(recent.value) <= self.rule.flat * abs(moved[measure.name].value)

    def _window(self, t: int) -> slice:
        return slice(max(t + 1 - self.rule.window, 0), t + 1)

    def _loss(self, t: int) -> tuple[_Change, bool]:
        """The fall over the window as a share of the fall so far, and whether the loss has fallen by `learned`.

        The interval is that of the line's slope: the samples are the same at each reading, so that how they differ
        from each other adds nothing to it.
        """
        rows, loss_T = self._window(t), self.history.loss_seen.value
        y_T, x_T = loss_T[rows], self.history.steps[rows].astype(np.float64)
        span = float(x_T[-1] - x_T[0])
        x_T, y_T = x_T[np.isfinite(y_T)], y_T[np.isfinite(y_T)]
        n = len(y_T)
        highest = float(np.nanmax(loss_T[: t + 1])) if n else math.nan
        if n < LEAST_READINGS or not highest > 0:
            return _Change(math.nan, math.nan, math.nan, n), False
        centred_T = x_T - x_T.mean()
        slope = float(centred_T @ y_T / (centred_T @ centred_T))
        residual_T = y_T - y_T.mean() - slope * centred_T
        error = math.sqrt(residual_T @ residual_T / (n - 2) / (centred_T @ centred_T))
        fallen = highest - float(y_T.mean() + slope * centred_T[-1])
        scale = span / max(fallen, self.rule.learned * highest)
        half = float(student.ppf(0.975, n - 2)) * error
        change = _Change(-slope * scale, (-slope - half) * scale, (-slope + half) * scale, n)
        return change, fallen >= self.rule.learned * highest

    def _change(self, measure: _Measure, before: slice, after: slice) -> _Change:
        """Mean of one window minus that of another, of logarithms or not.

        The interval adds up, as independent: the scatter of the readings within the windows, and the mean interval of a
        reading in each. The second is too wide where the same samples are read twice: the rule waits rather than errs.
        """
        (y0, w0), (y1, w1) = (self._points(measure.name, rows, measure.logarithmic) for rows in (before, after))
        n0, n1 = len(y0), len(y1)
        if min(n0, n1) < LEAST_READINGS:
            return _NOTHING
        value = float(y1.mean() - y0.mean())
        squares = float(((y0 - y0.mean()) ** 2).sum() + ((y1 - y1.mean()) ** 2).sum())
        scatter = math.sqrt(squares / (n0 + n1 - 2) * (1 / n0 + 1 / n1)) * float(student.ppf(0.975, n0 + n1 - 2))
        half = math.sqrt(scatter**2 + w0**2 + w1**2)
        return _Change(value, value - half, value + half, n0 + n1)

    def _level(self, rows: slice) -> _Change:
        """Mean individuality of a window, with the wider of its scatter and its mean interval."""
        y_T, width = self._points("individuality", rows, logarithmic=False)
        n = len(y_T)
        if n < LEAST_READINGS:
            return _NOTHING
        half = max(width, float(student.ppf(0.975, n - 1)) * float(y_T.std(ddof=1)) / math.sqrt(n))
        return _Change(float(y_T.mean()), float(y_T.mean()) - half, float(y_T.mean()) + half, n)

    def _points(self, name: str, rows: slice, logarithmic: bool) -> tuple[Floats, float]:
        """The finite values of a window, and the mean half-width of their intervals, 0 where there are none."""
        part: Curve = getattr(self.history, name)
        value_T, low_T, high_T = part.value[rows], part.low[rows], part.high[rows]
        if logarithmic:
            value_T, low_T, high_T = _log(value_T), _log(low_T), _log(high_T)
        kept_T = np.isfinite(value_T)
        half_T = (high_T - low_T)[kept_T] / 2
        half_T = half_T[np.isfinite(half_T)]
        return value_T[kept_T], float(half_T.mean()) if len(half_T) else 0.0

    def _evidence(self, t: int, name: str, role: Role, unit: Unit, change: _Change, vote: int = 0) -> Evidence:
        samples = int(self.history.samples[t])
        return Evidence(name, role, unit, change.value, change.low, change.high, change.readings, samples, vote)


def _log(values_T: Floats) -> Floats:
    """Logarithms, NaN where there is none."""
    return np.log(values_T, out=np.full(len(values_T), np.nan), where=values_T > 0)


def _ratio(change: _Change) -> _Change:
    value, low, high = (math.exp(min(v, LARGEST_LOG)) for v in (change.value, change.low, change.high))
    return _Change(value, low, high, change.readings)
