import pytest
import torch
import yaml

from moetrain import calibration
from moetrain.calibration import measure_costs, step_seconds
from moetrain.distributed.mesh import ParallelLayout
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.monitoring import monitor
from moetrain.monitoring.budget import LEAST, MOST, Cost
from moetrain.train import train
from moetrain.trainer import Trainer
from tests.trainer.reading import scalars
from tests.trainer.test_resume import StopAt

ONE = ParallelLayout()


def test_a_high_cost_is_reported_with_a_remedy():
    assert Cost("panel", 1.0, 7200.0).line(20) == "panel: 20 readings of 1.0 s, about 0.3% of the run's time"
    assert Cost("panel", 10.0, 7200.0).line(20).endswith("the target is 1%: lower panel.samples, or train for longer")
    assert Cost("probes", 10.0, 7200.0).line(20) == "probes: 20 readings of 10.0 s, about 2.7% of the run's time"
    line = Cost("panel", 0.6, 120.0).line(20)
    assert line.endswith("about 9.1% of the run's time; the target is 5%: set panel.readings=10")
    assert "target" not in Cost("panel", 0.3, 120.0).line(20)
    near = Cost("panel", 0.3161, 120.0).line(20)  # 6.322 of 126.322 s
    assert near.endswith("about 5.005% of the run's time; the target is 5%: set panel.readings=19")


@pytest.mark.parametrize("what", ["panel", "probes"])
@pytest.mark.parametrize("training", [60.0, 3599.0, 3600.0, 1e6])
@pytest.mark.parametrize("reading", [0.001, 0.3, 7.0])
def test_the_affordable_number_stays_within_the_target_and_one_more_does_not(what, training, reading):
    cost = Cost(what, reading, training)
    assert cost.share(cost.affordable) <= cost.target
    assert cost.affordable == MOST or cost.share(cost.affordable + 1) > cost.target


def test_measuring_leaves_no_trace(make_settings):
    run = Trainer.build(make_settings())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    generator = torch.get_rng_state()
    (cost,) = measure_costs(run, step_seconds(run))
    assert cost.what == "panel"
    assert cost.reading > 0
    assert cost.training > 0
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not run.optimizer.state
    assert torch.equal(torch.get_rng_state(), generator)
    assert run.clock.seconds == {}
    assert run.state.monitor.panel.losses(0)[0].size == 0


def test_a_reading_counts_what_only_some_readings_measure(make_settings, monkeypatch):
    words = ("data.domains.sums.repeats=4", "data.heldout_share=0.3", "panel.claim_every=4", "panel.repeat_every=2")
    run = Trainer.build(make_settings(*words))
    monkeypatch.setattr(monitor, "panel_claims", slow(monitor.panel_claims, 0.8))
    panel, repeats = run.state.monitor.panel.panel, run.state.monitor.repeats
    plain = make_settings(*words[:2], "panel.claim_every=0", "panel.repeat_every=0")
    monkeypatch.setattr(monitor, "read_panel", slow(monitor.read_panel, 0.2))
    whole = run.monitor.time_panel(run.model, run.steps)
    run.monitor.settings = plain
    reading = run.monitor.time_panel(run.model, run.steps)
    seen, unseen = (int(((panel.samples.domain == 1) & which).sum()) for which in (panel.cell == 0, panel.cell > 0))
    assert repeats.cost(ONE) == pytest.approx((4 * seen + 5 * unseen) / len(panel))  # of equal lengths
    assert whole == pytest.approx(reading + 0.8 / 4 + reading * repeats.cost(ONE) / 2, rel=0.2)


class Together(ParallelLayout):
    """Ranks that share a model."""

    passes_together = True


def test_repeats_cost_what_the_rank_with_the_most_tokens_measures(make_settings):
    run = Trainer.build(make_settings("data.domains.sums.repeats=4", "data.domains.stories.repeats=2"))
    panel, repeats = run.state.monitor.panel.panel, run.state.monitor.repeats
    passed = [0, 0]
    for domain, cell, length in zip(panel.samples.domain, panel.cell, panel.samples.length, strict=True):
        passed[domain] += int(length) * (4 if cell == 0 else 5)
    assert min(passed) > 0
    read = panel.samples.length.sum()
    assert repeats.cost(ONE) == pytest.approx(sum(passed) / read)
    # Four ranks read the panel in a quarter of the time. Only two have a domain to measure.
    assert repeats.cost(ParallelLayout(world_size=2)) == pytest.approx(2 * max(passed) / read)
    assert repeats.cost(ParallelLayout(world_size=4)) == pytest.approx(4 * max(passed) / read)
    assert repeats.cost(Together(world_size=4)) == pytest.approx(4 * sum(passed) / read)


def test_auto_chooses_by_time_and_a_resumed_run_keeps_the_choice(make_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "step_seconds", lambda trainer: 3.0)  # 12 steps: 36 s, of which 1.9 s may be spent
    monkeypatch.setattr(monitor, "read_panel", slow(monitor.read_panel, 0.15))
    settings = make_settings("monitor.budget=auto", "panel.readings=3")
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(6))
    assert train(settings) == STOPPED_BY_SIGNAL
    place = tmp_path / "runs" / "run" / "config.yaml"
    chosen = yaml.safe_load(place.read_text())["panel"]["readings"]
    assert LEAST <= chosen <= 12
    monkeypatch.setattr(calibration, "measure_costs", lambda *_: pytest.fail("a resumed run measures nothing"))
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    assert yaml.safe_load(place.read_text())["panel"]["readings"] == chosen
    steps = [step for step, _ in scalars(place.parent)["loss/panel_heldout/stories"]]
    assert len(steps) == min(chosen, 13)
    assert [path.name for path in place.parent.parent.iterdir()] == ["run"]


def slow(read, seconds):
    import time

    def slowed(*arguments):
        time.sleep(seconds)
        return read(*arguments)

    return slowed
