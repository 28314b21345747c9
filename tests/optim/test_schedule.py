import pytest

from moetrain.config import OptimSettings
from moetrain.optim.schedule import learning_rate, rate_after_jump, warmup_warning


def rates(steps=100, **changes):
    settings = OptimSettings(**({"learning_rate": 1.0, "warmup_steps": 10, "min_learning_rate_ratio": 0.1} | changes))
    return [learning_rate(step, steps, settings) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_the_peak_is_reached_once_it_is_over(schedule):
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert max(values) <= 1.0
    assert values[10] == pytest.approx(1.0, abs=0.01)


def test_schedules_end_at_the_final_rate():
    assert rates(schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(schedule="cosine")[54] == pytest.approx(0.55, abs=0.01)
    wsd = rates(schedule="wsd", decay_share=0.2)
    assert wsd[10:80] == pytest.approx([1.0] * 70)
    assert wsd[89] == pytest.approx(0.55)
    assert wsd[-1] == pytest.approx(0.1)
    assert rates(schedule="constant")[-1] == 1.0


def test_a_run_shorter_than_its_warm_up_still_ends_at_the_final_rate():
    assert rates(steps=5, schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(steps=1, schedule="cosine") == pytest.approx([0.1])


def test_a_warm_up_that_takes_the_whole_run_is_noted():
    assert warmup_warning(101, OptimSettings(warmup_steps=100)) is None
    for steps in (100, 5):
        assert f"optim.warmup_steps=100, but the run has {steps} steps" in warmup_warning(
            steps, OptimSettings(warmup_steps=100)
        )


@pytest.mark.parametrize(
    ("before", "step", "schedule", "after"),
    [
        (1.0, 50, "constant", None),
        (0.5, 50, "constant", 1.0),
        (2.0, 50, "constant", 1.0),
        (1.0, 50, "wsd", None),
        (1.0, 80, "wsd", None),  # the decay begins there
        (1.0, 90, "wsd", 0.505),  # as if it had begun long before
        (0.55, 90, "wsd", None),
        (0.56, 90, "wsd", 0.505),
        (5 / 11, 5, "constant", None),  # in the warm-up
        (5 / 11, 6, "constant", 7 / 11),
    ],
)
def test_a_jump_is_more_than_the_schedule_changes_in_a_step(before, step, schedule, after):
    settings = OptimSettings(learning_rate=1.0, warmup_steps=10, min_learning_rate_ratio=0.1, schedule=schedule)
    found = rate_after_jump(before, step, 100, settings)
    assert found is None if after is None else found == pytest.approx(after)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_schedule_jumps_by_itself(schedule):
    settings = OptimSettings(learning_rate=1.0, warmup_steps=10, schedule=schedule)
    rates = [learning_rate(step, 100, settings) for step in range(1, 101)]
    assert not any(rate_after_jump(rates[step - 1], step, 100, settings) for step in range(1, 100))
