"""Numbers in sentences that compare them: written with decimals enough for the sentence to hold as it is read."""

import math

_MOST = 12  # decimals; numbers closer than that count as equal


def decimals(value: float, bound: float, least: int = 0) -> int:
    """The fewest decimals, from ``least`` on, with which two numbers differ as written; ``least`` for equal ones.

    Rounding keeps the order of numbers, so as written they compare as they do.
    """
    value, bound = float(value), float(bound)
    if math.isclose(value, bound, rel_tol=1e-12):
        return least
    shown = ((n, round(value, n), round(bound, n)) for n in range(least, _MOST))
    return next((n for n, a, b in shown if a != b), _MOST)


def percent(share: float, places: int = 0) -> str:
    """A share in percent, within 0% and 100%."""
    return f"{100 * min(max(share, 0.0), 1.0):.{places}f}%"


def exact_percent(share: float) -> str:
    """A share that somebody has set, in percent, with the decimals that it has."""
    return f"{100 * share:.{_MOST}g}%"
