import math

import pytest
import torch

from moetrain.training.step import StepStatistics
from moetrain.training.train_metrics import TrainMetrics, expert_load, rank_load

APPLIED = torch.tensor(True)


def test_expert_load_by_hand():
    load = expert_load(torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0]]).double())
    assert load["experts/load_cv"] == pytest.approx(math.sqrt(3) / 2)
    assert load["experts/load_cv/worst"] == pytest.approx(math.sqrt(3))
    assert load["experts/entropy"] == pytest.approx(0.5)
    assert load["experts/entropy/worst"] == pytest.approx(0.0)
    assert (load["experts/dead"], load["experts/dead/worst"]) == (1.5, 3)


def statistics(losses, tokens):
    double = torch.float64
    return StepStatistics(
        torch.tensor(losses, dtype=double),
        torch.tensor(tokens, dtype=double),
        torch.tensor(1.5, dtype=double),
        torch.tensor(2.0, dtype=double),
        torch.tensor([[1.0, 3.0]], dtype=double),
        torch.tensor([0.5], dtype=double),
    )


def test_a_point_is_the_mean_per_token_over_the_steps_since_the_last():
    interval = TrainMetrics(["a", "b"])
    interval.add(statistics([math.nan, 1.0], [5.0, 1.0]), torch.tensor(0.0), ~APPLIED)
    assert interval.points() == {}
    interval.add(statistics([math.nan, 1.0], [5.0, 1.0]), torch.tensor(0.0), ~APPLIED)
    interval.add(statistics([10.0, 4.0], [5.0, 1.0]), torch.tensor(1.0), APPLIED)
    interval.add(statistics([30.0, 0.0], [5.0, 0.0]), torch.tensor(3.0), APPLIED)
    again = TrainMetrics(["a", "b"])
    again.load_state(interval.state(), torch.device("cpu"))
    for points in (interval.points(), again.points()):
        assert points["loss/train"] == 4.0
        assert points["loss/train/a"] == 4.0
        assert points["loss/train/b"] == 4.0
        assert points["optim/grad_norm"] == 2.0
        assert points["loss/balance"] == 1.5
    interval.add(statistics([10.0, 0.0], [5.0, 0.0]), torch.tensor(1.0), APPLIED)
    assert "loss/train/b" not in interval.points()


def test_the_load_of_ranks_is_that_of_their_experts_together():
    even = [1.0, 3.0, 3.0, 1.0]  # experts 0 and 1 on one rank, 2 and 3 on the other
    uneven = [3.0, 3.0, 1.0, 1.0]
    load = rank_load(torch.tensor([even, uneven]), ranks=2)
    assert load == {"experts/rank_load_cv": pytest.approx(0.25), "experts/rank_load_cv/worst": pytest.approx(0.5)}
    assert rank_load(torch.tensor([uneven]), ranks=4)["experts/rank_load_cv"] == pytest.approx(0.5)


@pytest.mark.parametrize(("ranks", "logged"), [(1, None), (2, 0.5)])
def test_the_load_of_ranks_is_logged_where_experts_are_split(ranks, logged):
    metrics = TrainMetrics(["a"], expert_ranks=ranks)
    metrics.add(statistics([2.0], [1.0]), torch.tensor(1.0), APPLIED)
    assert metrics.points().get("experts/rank_load_cv") == logged
