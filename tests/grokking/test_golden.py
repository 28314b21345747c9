"""Every key of the golden file, whose expected values come from another implementation."""

import json
from pathlib import Path

import numpy as np
import pytest

from moetrain import grokking as g

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
CASES = GOLDEN["cases"]
ROWS = GOLDEN["timelines"]["rows"]

CHECKED = {
    "d_path_floor_same",
    "d_path_floor_other",
    "effective_dimension",
    "pathways",
    "d_path_between_halves_of_list",
}
INPUTS = {"seed", "tau", "weights", "router_rows", "even", "odd"}
SINGLE = {
    "d_path": lambda c: g.d_path(c["weights"], c["tau"]).mean,
    "d_path_norm": lambda c: g.d_path(c["weights"], c["tau"], normalized=True).mean,
    "d_path_by_layer": lambda c: g.d_path_by_layer(c["weights"], c["tau"]),
    "routing_kernel": lambda c: g.routing_kernel(c["weights"]),
    "spread": lambda c: g.spread(c["weights"]),
    "effective_rank": lambda c: g.effective_rank(c["weights"]),
    "layer_cka": lambda c: g.layer_cka(c["weights"]),
}
# Through float32 Gram blocks, as the specification asks.
SINGLE_FLOAT32 = {
    "inconsistency": lambda c: g.inconsistency(c["weights"], c["router_rows"]),
    "cosine": lambda c: g.cosine(c["weights"], c["router_rows"]),
}
cases = pytest.mark.parametrize("case", CASES, ids=[f"seed{c['seed']}" for c in CASES])


@cases
def test_every_key_of_a_case_is_compared(case):
    assert set(case) == CHECKED | INPUTS | set(SINGLE) | set(SINGLE_FLOAT32)


@cases
@pytest.mark.parametrize("key", SINGLE)
def test_value(case, key):
    np.testing.assert_allclose(SINGLE[key](case), case[key], rtol=1e-10, atol=0)


@cases
@pytest.mark.parametrize("key", SINGLE_FLOAT32)
def test_value_through_blocks(case, key):
    np.testing.assert_allclose(SINGLE_FLOAT32[key](case), case[key], rtol=1e-6, atol=1e-7)


@cases
def test_pathways(case):
    assert [p.tolist() for p in g.pathways(case["weights"], case["tau"])] == case["pathways"]


@cases
def test_between_halves_of_the_list(case):
    half = len(case["weights"]) // 2
    estimate = g.d_path_between(case["weights"][:half], case["weights"][half:], case["tau"])
    assert estimate.mean == pytest.approx(case["d_path_between_halves_of_list"], rel=1e-12)
    assert estimate.pairs == half * (len(case["weights"]) - half)


@cases
def test_floor(case):
    same, across = g.d_path_floor(case["even"], case["odd"], case["tau"])
    assert same.mean == pytest.approx(case["d_path_floor_same"], rel=1e-12)
    assert across.mean == pytest.approx(case["d_path_floor_other"], rel=1e-12)


@cases
def test_effective_dimension(case):
    kernel = g.routing_kernel(case["weights"])
    for lam, expected in case["effective_dimension"].items():
        assert g.effective_dimension(kernel, float(lam)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize(("suffix", "min_tail"), [("", 0), ("_min_tail_3", 3)])
def test_timeline(row, suffix, min_tail):
    limits = GOLDEN["timelines"]
    assert set(limits) == {"eps", "delta", "rows"}
    assert len(row) == 6
    memorized = g.memorized_at(row["losses"], limits["eps"], limits["delta"], min_tail)
    assert memorized == row["memorized_at" + suffix]
    assert g.generalized_at(row["correct"], min_tail=min_tail) == row["generalized_at" + suffix]
