"""The trial of Muon: how curves are compared, how the rate is tuned, and what is read of a run."""

import math

import muon_trial
import numpy as np
import pytest
from muon_trial import (
    RATES,
    TrialError,
    accuracy_steps,
    compare,
    geometric_mean,
    loss_curve,
    mean_with_interval,
    step_ratios,
    tokens_to,
    tune,
)

SLOW = (np.array([0.0, 100.0, 200.0, 300.0]), np.array([8.0, 6.0, 5.0, 4.5]))
FAST = (np.array([0.0, 100.0, 200.0, 300.0]), np.array([8.0, 5.0, 4.0, 3.5]))


def test_tokens_to_a_loss_lie_between_two_points():
    assert tokens_to(SLOW, 5.5) == 150
    assert tokens_to(SLOW, 4.5) == 300
    assert tokens_to(SLOW, 9.0) == 0


def test_both_are_compared_at_the_higher_of_their_last_losses():
    found = compare(SLOW, FAST)
    assert found == {"adamw": 4.5, "muon": 3.5, "target": 4.5, "token_ratio": 150 / 300}
    assert compare(FAST, SLOW)["token_ratio"] == 300 / 150


def test_the_grid_grows_while_an_end_of_it_is_best():
    tried = []

    def loss(best):
        return lambda rate: tried.append(rate) or abs(math.log(rate / best))

    assert sorted(tune(RATES, loss(3e-3))) == [1e-3, 3e-3, 1e-2]
    assert sorted(tune(RATES, loss(4e-2))) == [1e-3, 3e-3, 1e-2, 3.2e-2, 1e-1]
    assert min(tune(RATES, loss(1e-9))) == pytest.approx(3.2e-5)  # six rates at most
    assert list(tune([2.0], loss(1.0))) == [2.0]
    assert len(tried) == 3 + 5 + 6 + 1


def test_intervals_over_seeds():
    found = mean_with_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert mean_with_interval([1.0])["low"] is None
    assert geometric_mean([0.5, 2.0])["mean"] == pytest.approx(1.0)


def test_steps_are_compared_where_both_optimizers_get_there():
    def row(optimizer, seed, step):
        return {"optimizer": optimizer, "seed": seed, "step": step, "domain": "add", "trained": False}

    rows = [row("adamw", 0, 100), row("muon", 0, 200), row("adamw", 1, 100), row("muon", 1, 50)]
    (found,) = step_ratios([*rows, row("adamw", 2, 100), row("muon", 2, None)])
    assert found["steps"] == [[100, 200], [100, 50], [100, None]]
    assert found["ratio"]["mean"] == pytest.approx(1.0)
    assert found["ratio"]["n"] == 2
    (never,) = step_ratios([row("adamw", 0, None), row("muon", 0, 10)])
    assert never["ratio"] is None


def test_what_is_read_of_a_run(finished_run):
    tokens, losses = loss_curve(finished_run)
    assert (np.diff(tokens) > 0).all()
    assert losses[-1] < losses[0]
    assert accuracy_steps(finished_run, "sums", trained=False)["last"] <= 1


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(TrialError, match=r"broken ended with status 2: see .*broken\.log"):
        muon_trial.train("grokking_demo", "broken", ["optim.eps=-1"], tmp_path)
    assert "optim.eps" in (tmp_path / "broken.log").read_text()
