import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain.config import GuardSettings
from moetrain.data.batch import IGNORED, Batch
from moetrain.data.packing import Samples
from moetrain.models.transformer import Output, Routing
from moetrain.training import guards as module
from moetrain.training.guards import Guards, Incident
from moetrain.training.incident_samples import incident_samples, worst_samples

LOAD = torch.ones(2, 3)


def take(guards, step, loss, load_LE=LOAD):
    """Incidents of a step; a loss that is NaN stands for a skipped update."""
    heard = guards.check(step, torch.tensor(math.isfinite(loss)), torch.tensor(loss).double(), load_LE, ["rows"])
    assert all(recorded == ["rows"] for _, recorded in heard)
    return [incident for incident, _ in heard]


def check(guards, losses, load_LE=LOAD):
    """Steps, from 1, and kinds of the incidents that a row of losses comes to."""
    found = [incident for step, loss in enumerate(losses, 1) for incident in take(guards, step, loss, load_LE)]
    return [(incident.step, incident.kind) for incident in found]


def test_skipped_updates_are_counted_and_many_in_a_row_end_it():
    guards = Guards(GuardSettings(skipped=3))
    assert check(guards, [math.nan, math.nan, 1.0, math.nan, math.nan]) == [
        (step, "not_finite") for step in (1, 2, 4, 5)
    ]
    assert guards.skipped == 4
    assert not guards.diverged
    take(guards, 6, math.nan)
    assert guards.diverged
    assert guards.last_skipped == 6


def test_on_a_device_they_hear_of_a_step_during_the_next_and_of_all_when_asked(monkeypatch):
    class Coming:
        device = SimpleNamespace(type="cuda")

        def __init__(self, made):
            self.made = torch.tensor(made)

    monkeypatch.setattr(
        module, "HostCopy", lambda tensors: SimpleNamespace(wait=lambda: [tensors[0].made, *tensors[1:]])
    )
    monkeypatch.setattr(torch, "where", lambda *_: torch.zeros(0, 0))
    guards = Guards(GuardSettings(skipped=2))

    def steps_told(heard):
        return [(incident.step, recorded) for incident, recorded in heard]

    def told(step, made):
        return steps_told(guards.check(step, Coming(made), torch.tensor(1.0), torch.zeros(0, 0), [step]))

    assert [told(1, True), told(2, False), told(3, True)] == [[], [], [(2, [2])]]
    assert told(4, False) == []
    assert guards.skipped == 1
    assert steps_told(guards.settle()) == [(4, [4])]
    assert (guards.skipped, guards.diverged) == (2, False)
    told(5, False)
    assert told(6, True) == [(5, [5])]
    assert (guards.diverged, guards.last_skipped) == (True, 5)


def noise(count, seed=0):
    return (2 + 0.1 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_loss_far_above_the_last_ones_is_a_spike_told_once():
    guards = Guards(GuardSettings(spike=6, spike_window=40))
    losses = noise(100)
    losses[60:63] = [3.0, 3.2, 3.1]
    losses[80] = 1.0  # low is no spike
    assert check(guards, losses) == [(61, "loss_spike")]
    before = noise(100)[20:60]
    spike = Guards(GuardSettings(spike=6, spike_window=40))
    check(spike, noise(100)[:60])
    (incident,) = take(spike, 61, 3.0)
    assert incident.details["mean"] == pytest.approx(np.mean(before))
    assert incident.details["deviations"] == pytest.approx((3.0 - np.mean(before)) / np.std(before, ddof=1))


def test_a_small_spike_is_written_with_decimals_enough():
    spike = Guards(GuardSettings(spike=6, spike_window=40))
    check(spike, [2.3 + 1e-6 * (step % 2) for step in range(40)])
    (incident,) = take(spike, 41, 2.30002)
    assert incident.problem == "the loss rose to 2.30002 from 2.30000, the mean of the last 40 steps"


def test_no_spike_in_noise_in_a_falling_loss_or_before_half_a_window():
    guards = Guards(GuardSettings(spike=6, spike_window=40))
    assert check(guards, noise(2000, seed=1)) == []
    falling = (10 * np.exp(-np.arange(500) / 50)).tolist()
    assert check(Guards(GuardSettings(spike_window=40)), falling) == []
    assert check(Guards(GuardSettings(spike_window=40)), [*noise(19), 100.0]) == []
    assert check(Guards(GuardSettings(spike_window=40)), [*noise(20), 100.0]) == [(21, "loss_spike")]


def test_an_expert_dies_after_so_many_steps_without_a_token_and_may_die_again():
    guards = Guards(GuardSettings(dead_steps=3))
    idle = torch.tensor([[5.0, 0.0, 5.0], [5.0, 5.0, 5.0]])
    found = []
    for step, load in enumerate([LOAD, idle, idle, idle, idle, LOAD, idle, idle, idle], 1):
        found += take(guards, step, 1.0, load)
    assert [incident.step for incident in found] == [4, 9]
    details = found[0].details
    assert details == {"experts": [[0, 1]], "dead_by_layer": [1, 0], "last_fed": 1}
    assert "1 of 3 in layer 0" in found[0].problem


def test_a_dense_model_has_no_experts_to_die():
    guards, resumed = Guards(GuardSettings(dead_steps=1)), Guards(GuardSettings(dead_steps=1))
    no_layers = torch.zeros(0, 8)
    assert check(guards, [1.0, 1.0], no_layers) == []
    resumed.load_state(json.loads(json.dumps(guards.state())), torch.device("cpu"))
    assert take(resumed, 3, 1.0, no_layers) == []
    assert resumed.state()["losses"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("stop", [1, 30, 61, 62, 79])
def test_guards_that_were_saved_and_loaded_tell_the_same(stop):
    settings = GuardSettings(spike=6, spike_window=40, dead_steps=20)
    losses = noise(80)
    losses[60:63], losses[70] = [3.0, 3.2, 3.1], math.nan
    loads = [torch.tensor([[1.0, float(step < 50)]]) for step in range(80)]
    straight = Guards(settings)
    told = [take(straight, step, losses[step], loads[step]) for step in range(80)]
    assert [incident.kind for step in told for incident in step] == ["loss_spike", "dead_experts", "not_finite"]
    first, second = Guards(settings), Guards(settings)
    for step in range(stop):
        take(first, step, losses[step], loads[step])
    second.load_state(first.state(), torch.device("cpu"))
    again = [take(second, step, losses[step], loads[step]) for step in range(stop, 80)]
    assert again == told[stop:]
    assert second.state() == straight.state()


def step_of_three_samples(losses, counts):
    """A micro-batch of two rows with three samples: of 2 tokens, of 1, of 3."""
    slots = torch.tensor([[0, 0, 1, -1], [0, 0, 0, -1]])
    values = torch.tensor([[losses[0], losses[0], losses[1], 0.0], [losses[2], losses[2], losses[2], 0.0]])
    targets = torch.where(slots >= 0, 5, IGNORED)
    nothing = torch.zeros(2, 4, dtype=torch.long)
    samples = torch.tensor([[2, 0], [1, -1]])
    batch = Batch(nothing, targets, nothing, slots, nothing, nothing, torch.zeros(0, 2), samples, nothing, samples >= 0)
    counts_LBRE = torch.zeros(2, 2, 4, 2)
    for (row, slot), by_layer in zip([(0, 0), (0, 1), (1, 0)], counts, strict=True):
        counts_LBRE[:, row, 2 * slot] = torch.tensor(by_layer)
        counts_LBRE[:, row, 2 * slot + 1] = torch.tensor(by_layer)
    none = torch.zeros(0)
    return batch, Output(none, values, values, Routing(none, counts_LBRE, none, none, none, none, none))


SAMPLES = Samples(
    np.array([0, 1, 0], np.int16),
    np.array([10, 11, 2**63 + 12], np.uint64),
    np.array([0, 0, 7], np.int32),
    *(np.zeros(3, np.int64) for _ in range(4)),
)
EVEN = [[4.0, 4.0], [4.0, 4.0]]


def named(sample, **value):
    domain, document, piece = [("a", 10, 0), ("b", 11, 0), ("a", 2**63 + 12, 7)][sample]
    return {"domain": domain, "document": document, "piece": piece, **value}


def test_a_loss_incident_names_the_samples_with_the_largest_loss_not_finite_ones_first():
    recorded = [step_of_three_samples([1.5, math.nan, 3.0], [EVEN] * 3)]
    spike = Incident(1, "loss_spike", "")
    expected = [named(0, loss=None), named(1, loss=3.0), named(2, loss=1.5)]
    assert incident_samples(spike, recorded, SAMPLES, ["a", "b"], 8) == expected
    assert incident_samples(spike, recorded, SAMPLES, ["a", "b"], 2) == expected[:2]


def test_dead_experts_name_the_samples_that_crowd_on_other_experts_in_their_layers():
    crowded = [[4.0, 4.0], [7.0, 1.0]]
    recorded = [step_of_three_samples([1.0, 1.0, 1.0], [EVEN, crowded, [[8.0, 0.0], [4.0, 4.0]]])]
    found = incident_samples(Incident(1, "dead_experts", "", {"experts": [[1, 0]]}), recorded, SAMPLES, ["a", "b"], 1)
    assert found == [named(0, share=7 / 8)]
    batch, output = recorded[0]
    unwatched = Output(
        output.loss_sum,
        output.loss_BT,
        output.entropy_BT,
        Routing(*[torch.zeros(2, 2, 0, 2)] * 2, *[torch.zeros(0)] * 5),
    )
    nobody = incident_samples(
        Incident(1, "dead_experts", "", {"experts": [[1, 0]]}), [(batch, unwatched)], SAMPLES, ["a", "b"], 1
    )
    assert nobody == []


def test_the_worst_of_several_processes():
    parts = [[named(0, loss=3.0), named(1, loss=1.0)], [named(2, loss=None)], []]
    assert worst_samples(parts, 2) == [named(2, loss=None), named(0, loss=3.0)]
