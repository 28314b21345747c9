"""The numbers of each kind of problem: operands are drawn, intermediate results computed.

A pattern returns by name all numbers that its wording shows or rests on; `c` is the answer if there is one. `low` is
the smallest number of things in a story, so that "1 apples" is never written.
"""

from collections.abc import Callable

from moetrain.data.builtin.arithmetic_facts import show_held_out
from moetrain.data.builtin.draws import Random, between

Numbers = dict[str, int]
Pattern = Callable[[Random, int], Numbers]

LIMITS = (10, 20, 50, 100, 100, 100, 100, 1000)  # uniform: small numbers are likely, and so is every pair below 100
LARGEST_FACTOR = 12


def draw(random: Random, pattern: Pattern, low: int) -> Numbers:
    """Draw numbers of the pattern that show no held-out fact. All numbers of the training text are drawn here."""
    while True:
        numbers = pattern(random, low)
        if not show_held_out(numbers.values()):
            return numbers


def number(random: Random, low: int) -> int:
    """Draw an operand from low to 999; small ones are more likely."""
    return between(random, low, LIMITS[int(random() * len(LIMITS))] - 1)


# Single facts


def total(random: Random, low: int) -> Numbers:
    """a + b = c."""
    a, b = number(random, low), number(random, low)
    return {"a": a, "b": b, "c": a + b}


def difference(random: Random, low: int) -> Numbers:
    """a - b = c."""
    b, c = number(random, low), number(random, low)
    return {"a": b + c, "b": b, "c": c}


def product(random: Random, low: int) -> Numbers:
    """a * b = c, where either may be the small factor."""
    low = max(low, 1)  # 0 * b = 0 does not determine b, which a text may ask for
    a, b = between(random, low, LARGEST_FACTOR), number(random, low)
    if random() < 0.5:
        a, b = b, a
    return {"a": a, "b": b, "c": a * b}


def quotient(random: Random, low: int) -> Numbers:
    """a / b = c without remainder."""
    low = max(low, 1)
    b, c = between(random, low, LARGEST_FACTOR), number(random, low)
    if random() < 0.5:
        b, c = c, b
    return {"a": b * c, "b": b, "c": c}


# Two steps and more


def total_total(random: Random, low: int) -> Numbers:
    """a + b = s, s + d = c."""
    a, b, d = number(random, low), number(random, low), number(random, low)
    return {"a": a, "b": b, "s": a + b, "d": d, "c": a + b + d}


def total_difference(random: Random, low: int) -> Numbers:
    """a + b = s, s - d = c."""
    a, b = number(random, low), number(random, low)
    d = between(random, low, a + b - low)
    return {"a": a, "b": b, "s": a + b, "d": d, "c": a + b - d}


def difference_total(random: Random, low: int) -> Numbers:
    """a - b = s, s + d = c."""
    b, s, d = number(random, low), number(random, low), number(random, low)
    return {"a": b + s, "b": b, "s": s, "d": d, "c": s + d}


def product_total(random: Random, low: int) -> Numbers:
    """a * b = s, s + d = c."""
    a, b, d = between(random, low, LARGEST_FACTOR), number(random, low), number(random, low)
    return {"a": a, "b": b, "s": a * b, "d": d, "c": a * b + d}


def product_difference(random: Random, low: int) -> Numbers:
    """a * b = s, s - d = c."""
    a, b = between(random, low, LARGEST_FACTOR), number(random, low)
    d = between(random, low, a * b - low)
    return {"a": a, "b": b, "s": a * b, "d": d, "c": a * b - d}


def two_products(random: Random, low: int) -> Numbers:
    """a * b = s, d * e = t, s + t = c."""
    a, d = between(random, low, LARGEST_FACTOR), between(random, low, LARGEST_FACTOR)
    b, e = between(random, low, 30), between(random, low, 30)
    return {"a": a, "b": b, "s": a * b, "d": d, "e": e, "t": d * e, "c": a * b + d * e}


def total_quotient(random: Random, low: int) -> Numbers:
    """a + d = s, s / b = c."""
    b, c = between(random, max(low, 2), LARGEST_FACTOR), number(random, max(low, 2))
    a = between(random, low, b * c - low)
    return {"a": a, "d": b * c - a, "s": b * c, "b": b, "c": c}


def remainder(random: Random, low: int) -> Numbers:
    """a = b * c + r, with s = b * c and r under b."""
    b, c = between(random, max(low, 3), LARGEST_FACTOR), number(random, max(low, 2))
    r = between(random, max(low, 1), b - 1)
    return {"a": b * c + r, "b": b, "c": c, "s": b * c, "r": r}


def running(random: Random, low: int) -> Numbers:
    """a + b = s, s - d = t, t + e = c."""
    a, b, e = number(random, low), number(random, low), number(random, low)
    d = between(random, low, a + b - low)
    return {"a": a, "b": b, "s": a + b, "d": d, "t": a + b - d, "e": e, "c": a + b - d + e}


def sequence(random: Random, low: int) -> Numbers:
    """Steps of d from t: t, u, v, w, x, c."""
    d, t = between(random, max(low, 1), 30), number(random, low)
    return {"d": d, "t": t, "u": t + d, "v": t + 2 * d, "w": t + 3 * d, "x": t + 4 * d, "c": t + 5 * d}


def average(random: Random, low: int) -> Numbers:
    """a + b = s, s / k = c, where k = 2."""
    a, c = number(random, low), number(random, low)
    a, c = min(a, c), max(a, c)
    return {"a": a, "b": 2 * c - a, "s": 2 * c, "k": 2, "c": c}


def perimeter(random: Random, low: int) -> Numbers:
    """a + b = s, k * s = c, where k = 2."""
    a, b = number(random, low), number(random, low)
    return {"a": a, "b": b, "s": a + b, "k": 2, "c": 2 * (a + b)}


def times(factor: int) -> Pattern:
    """Return the pattern a * k = c with k the factor: units, doubles, sides of a square."""

    def pattern(random: Random, low: int) -> Numbers:
        a = number(random, low)
        return {"a": a, "k": factor, "c": a * factor}

    return pattern


double, quadruple = times(2), times(4)


# Digits


def carry(random: Random, low: int) -> Numbers:
    """tp + uq with a carry: p + q = r (written k), t + u = v, v + 1 = w, sum c."""
    p = between(random, 1, 9)
    q, t, u = between(random, 10 - p, 9), between(random, 1, 9), between(random, 1, 9)
    numbers = {"a": 10 * t + p, "b": 10 * u + q, "p": p, "q": q, "r": p + q, "k": p + q - 10}
    return numbers | {"t": t, "u": u, "v": t + u, "w": t + u + 1, "n": 1, "c": 10 * (t + u) + p + q}


def borrow(random: Random, low: int) -> Numbers:
    """tp - uq with a borrow: p + 10 = m, m - q = k, t - 1 = w, w - u = v, difference c."""
    p, t = between(random, 0, 8), between(random, 2, 9)
    q, u = between(random, p + 1, 9), between(random, 1, t - 1)
    numbers = {"a": 10 * t + p, "b": 10 * u + q, "p": p, "q": q, "ten": 10, "m": p + 10, "k": p + 10 - q}
    return numbers | {"t": t, "u": u, "w": t - 1, "v": t - 1 - u, "n": 1, "c": 10 * (t - u) + p - q}


def split_total(random: Random, low: int) -> Numbers:
    """Tens and ones apart: t + u = v, p + q = r, v + r = c."""
    t, u, p, q = (between(random, 1, 9) for _ in range(4))
    numbers = {"a": 10 * t + p, "b": 10 * u + q, "t": 10 * t, "u": 10 * u, "v": 10 * (t + u)}
    return numbers | {"p": p, "q": q, "r": p + q, "c": 10 * (t + u) + p + q}


def split_product(random: Random, low: int) -> Numbers:
    """a * (t + p) as a * t = v and a * p = r, v + r = c."""
    a, t, p = between(random, 2, LARGEST_FACTOR), 10 * between(random, 1, 9), between(random, 1, 9)
    return {"a": a, "b": t + p, "t": t, "p": p, "v": a * t, "r": a * p, "c": a * (t + p)}


def through_ten(random: Random, low: int) -> Numbers:
    """a + b over ten: b = d + e with a + d = 10, 10 + e = c."""
    a = between(random, 2, 9)
    b = between(random, 11 - a, 9)
    return {"a": a, "b": b, "d": 10 - a, "e": a + b - 10, "ten": 10, "c": a + b}


def digits(random: Random, low: int) -> Numbers:
    """A three-digit number a = h + t + p with digits i, j, p."""
    i, j, p = between(random, 1, 9), between(random, 1, 9), between(random, 1, 9)
    return {"a": 100 * i + 10 * j + p, "h": 100 * i, "t": 10 * j, "p": p, "i": i, "j": j}


def rounding(random: Random, low: int) -> Numbers:
    """a lies between the tens t and u; c is the nearer (the upper where a ends in 5); p its last digit."""
    a = number(random, 1)
    a += a % 10 == 0
    t = a - a % 10
    return {"a": a, "p": a % 10, "t": t, "u": t + 10, "c": t if a % 10 < 5 else t + 10}


# Order


def pair(random: Random, low: int) -> Numbers:
    """Two different numbers: a and b as drawn, c the larger, d the smaller."""
    a, b = number(random, low), number(random, low)
    b += a == b
    return {"a": a, "b": b, "c": max(a, b), "d": min(a, b)}


def triplet(random: Random, low: int) -> Numbers:
    """Three different numbers: a, b, e as drawn; d < m < c in order."""
    chosen: list[int] = []
    while len(chosen) < 3:
        value = number(random, low)
        if value not in chosen:
            chosen.append(value)
    d, m, c = sorted(chosen)
    return {"a": chosen[0], "b": chosen[1], "e": chosen[2], "d": d, "m": m, "c": c}


# Money and time


def money(random: Random, low: int) -> Numbers:
    """Prices a + b = c in cents, each also as dollars and cents: ad and ac, bd and bc, cd and cc."""
    a, b = 5 * between(random, 1, 399), 5 * between(random, 1, 399)
    return _dollars({"a": a, "b": b, "c": a + b})


def change(random: Random, low: int) -> Numbers:
    """A note a less a price b leaves c, in cents and as dollars and cents."""
    a = (100, 500, 1000, 2000)[int(random() * 4)]
    b = 5 * between(random, 1, a // 5 - 1)
    return _dollars({"a": a, "b": b, "c": a - b})


def _dollars(cents: Numbers) -> Numbers:
    parts = dict(cents)
    for name, value in cents.items():
        parts[name + "d"], parts[name + "c"] = divmod(value, 100)
    return parts


def same_hour(random: Random, low: int) -> Numbers:
    """From h:a, b minutes on, it is h:c."""
    c = between(random, 12, 59)
    a = between(random, 1, c - 3)
    return {"h": between(random, 1, 12), "a": a, "b": c - a, "c": c}


def next_hour(random: Random, low: int) -> Numbers:
    """From h:a, b minutes on: a + b = s = 60 + c, so it is i:c."""
    a = between(random, 20, 59)
    b = between(random, 62 - a, 59)
    h = between(random, 1, 11)
    return {"h": h, "i": h + 1, "n": 1, "a": a, "b": b, "s": a + b, "hour": 60, "c": a + b - 60}


def hours_minutes(random: Random, low: int) -> Numbers:
    """a hours and b minutes: a * 60 = s, s + b = c."""
    a, b = between(random, 2, 12), between(random, 2, 59)
    return {"a": a, "b": b, "hour": 60, "s": 60 * a, "c": 60 * a + b}
