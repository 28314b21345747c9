"""What the next pass over a domain is worth: derivatives against autograd, nothing changed, resumed, on ranks."""

import json
import math

import numpy as np
import pytest
import torch

from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import Estimate
from moetrain.model_input import PackedTokens
from moetrain.monitoring import repeats
from moetrain.monitoring.repeats import RepeatMonitor
from moetrain.optim.schedule import learning_rate
from moetrain.routing.panel import HELDOUT, SEEN, draw_panel, read_panel
from moetrain.train import train
from moetrain.trainer import Trainer
from tests.conftest import small_run
from tests.distributed.ranks import launch
from tests.trainer.reading import events, scalars
from tests.trainer.test_resume import StopAt

REPEATED = (
    "data.domains.sums.repeats=4",
    "data.domains.sums.limit=200",
    "data.domains.stories.limit=200",
    "data.heldout_share=0.3",
    "panel.samples=32",
    "panel.readings=5",
    "panel.repeat_every=2",
    "train.max_steps=40",
    "train.checkpoint_every=10",
    "monitor.every=20",
    "optim.learning_rate=0.003",
)
LAYOUT = ParallelLayout()


@pytest.fixture
def trainer(make_settings):
    trainer = Trainer.build(make_settings(*REPEATED))
    for step in range(1, 21):
        trainer.train_step(step)
    yield trainer
    trainer.close()


def tensors(trainer):
    state, _ = trainer.state_dict()
    return {f"{part}.{name}": value.clone() for part in ("model", "optimizer") for name, value in state[part].items()}


def test_only_repeated_domains_are_measured_and_nothing_is_changed(trainer):
    monitor = trainer.state.monitor.repeats
    before = tensors(trainer)
    found = monitor.measure(trainer.model, trainer.optimizer, 20, LAYOUT)
    after = tensors(trainer)
    assert list(found) == ["sums"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    worth = found["sums"].worth
    assert worth.low < worth.mean < worth.high
    again = RepeatMonitor(trainer.state.monitor.panel.panel, trainer.stream, ["stories", "sums"])
    assert again.measure(trainer.model, trainer.optimizer, 20, LAYOUT)["sums"].worth == worth


def test_passes_are_tokens_trained_on_over_distinct_tokens(trainer):
    stream, monitor = trainer.stream, trainer.state.monitor.repeats
    trained = [s for step in range(20) for s in stream._step_samples(step) if stream.samples.domain[s] == 1]
    texts = {}
    for sample in np.flatnonzero(stream.samples.domain == 1):
        texts[int(stream.samples.start[sample])] = int(stream.samples.length[sample])
    expected = sum(int(stream.samples.length[s]) for s in trained) / sum(texts.values())
    assert monitor.measure(trainer.model, trainer.optimizer, 20, LAYOUT)["sums"].passes == pytest.approx(expected)


def one_sample(panel, member):
    tokens = torch.from_numpy(panel.stream.sequence(member)[:-1])[None]
    return tokens, torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)


def mean_loss(model, panel, member):
    output = model(PackedTokens.one_sample_per_row(*one_sample(panel, member)))
    return output.loss_sum / (one_sample(panel, member)[1] >= 0).sum()


def test_falls_are_the_gradients_of_each_sample_along_the_optimizers_direction(trainer, monkeypatch):
    monkeypatch.setattr(repeats, "_MOVE", 0.005)  # larger moves have more of the third derivative
    model, optimizer, panel = trainer.model, trainer.optimizer, trainer.state.monitor.panel.panel
    half, group = panel.members(1, HELDOUT)[:9], panel.members(1, SEEN, seen_by=20)[:6]
    (falls,) = repeats._falls(model, optimizer, panel, half, [group], LAYOUT)
    parameters = list(model.parameters())

    def gradients(loss):
        return [
            g if g is not None else torch.zeros_like(p)
            for g, p in zip(torch.autograd.grad(loss, parameters, allow_unused=True), parameters, strict=True)
        ]

    lengths = [int((one_sample(panel, member)[1] >= 0).sum()) for member in half]
    total = sum(mean_loss(model, panel, member) * n for member, n in zip(half, lengths, strict=True)) / sum(lengths)
    along = gradients(total)
    directions = [optimizer.direction(p, g) for p, g in zip(parameters, along, strict=True)]
    own = sum(float((g * d).sum()) for g, d in zip(along, directions, strict=True))
    expected = [
        sum(float((g * d).sum()) for g, d in zip(gradients(mean_loss(model, panel, member)), directions, strict=True))
        / own
        for member in group
    ]
    assert falls == pytest.approx(expected, rel=0.1, abs=0.02)
    assert np.corrcoef(falls, expected)[0, 1] > 0.95


def test_losses_are_those_of_the_panel(trainer):
    panel = trainer.state.monitor.panel.panel
    reading = read_panel(trainer.model, panel, 20, LAYOUT)
    members = panel.members(1, HELDOUT)[::-2]
    assert repeats._losses(trainer.model, panel, members, LAYOUT) == pytest.approx(reading.loss[members], rel=1e-5)


def test_too_few_documents_give_no_worth(make_settings):
    settings = make_settings(*REPEATED, "panel.samples=7")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    panel = draw_panel(corpus, stream, settings, 40, 4)
    monitor = RepeatMonitor(panel, stream, ["stories", "sums"])
    found = monitor.measure(torch.nn.Module(), None, 20, LAYOUT)["sums"]  # no model is read
    assert math.isnan(found.worth.mean)
    assert found.passes > 0
    assert RepeatMonitor(panel, panel.stream, ["stories", "sums"]).repeated == []


@pytest.fixture(scope="module")
def straight(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("repeats")
    base = [*small_run(corpus_folder, out, tmp_path_factory.getbasetemp()), *REPEATED]
    assert train(load_settings(None, [*base, "run.name=straight"])) == 0
    return base, out / "runs"


def points(folder):
    return {tag: series for tag, series in scalars(folder).items() if tag.startswith("repeat/")}


def test_a_run_logs_them_and_says_so(straight):
    _, runs = straight
    found = points(runs / "straight")
    assert {"repeat/passes/sums", "repeat/worth/sums"} <= found.keys()  # the worth of a few passes may be 1
    assert [step for step, _ in found["repeat/worth/sums"]] == [20, 40]
    said = told(runs / "straight")
    assert [step for step, _ in said] == [20, 40]
    assert all("passes; the next is worth" in sentence for _, sentence in said)


def test_training_with_it_is_training_without_bit_for_bit(straight):
    base, runs = straight
    assert train(load_settings(None, [*base, "run.name=without", "panel.repeat_every=0"])) == 0
    mine, other = (scalars(runs / name) for name in ("straight", "without"))
    assert points(runs / "without") == {}
    assert mine["loss/train"] == other["loss/train"]
    assert mine["loss/panel_seen/sums"] == other["loss/panel_seen/sums"]


def test_a_resumed_run_goes_on(straight, monkeypatch):
    base, runs = straight
    settings = load_settings(None, [*base, "run.name=resumed"])
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(22))
    train(settings)
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    assert points(runs / "resumed") == points(runs / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", ["train.sharding=none"]),
        ("fsdp", ["train.sharding=fsdp"]),
        ("experts", ["train.expert_parallel=2"]),
        ("both", ["train.sharding=fsdp", "train.expert_parallel=2"]),
    ],
)
def test_ranks_measure_what_one_measures(straight, name, settings, tmp_path):
    base, runs = straight
    (tmp_path / "empty.yaml").write_text("")
    launch(2, [str(tmp_path / "empty.yaml"), *base, f"run.name={name}", *settings], 1)
    one, two = points(runs / "straight"), points(runs / name)
    assert one.keys() == two.keys()
    for tag, series in one.items():
        assert [step for step, _ in two[tag]] == [step for step, _ in series]
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in series], rel=0.02, abs=0.02), tag


AUTO = ("data.domains.sums.repeats=auto", "data.domains.sums.most_repeats=8", "train.max_steps=null")
AUTO += ("data.domains.stories.limit=100", "data.domains.sums.limit=120", "panel.readings=9", "data.least_worth=0.4")


@pytest.fixture(scope="module")
def stopped(corpus_folder, tmp_path_factory):
    """A run in which repeats are worth 0.3 of fresh text: its texts follow rules, of which repeats teach as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats.grokking, "repeat_worth", lambda *_: Estimate(0.3, 0.2, 0.4, 40, 0))
        yield _stopped(corpus_folder, tmp_path_factory)


def _stopped(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto")
    base = [*small_run(corpus_folder, out, tmp_path_factory.getbasetemp()), *REPEATED, *AUTO]
    assert train(load_settings(None, [*base, "run.name=straight"])) == 0
    return base, out / "runs"


def told(folder):
    return [(event["step"], event["sentence"]) for event in events(folder) if event["type"] == "repeat"]


def test_a_domain_whose_repeats_are_not_worth_it_is_no_longer_drawn(stopped):
    base, runs = stopped
    settings = load_settings(None, base)
    whole = training_stream(prepare_corpus(settings), settings)
    ends = [(step, sentence) for step, sentence in told(runs / "straight") if "not repeated any more" in sentence]
    assert len(ends) == 1
    step, summary = ends[0][0], json.loads((runs / "straight" / "summary.json").read_text())
    assert summary["steps"] < whole.steps
    before, after = (
        learning_rate(step, whole.steps, settings.optim),
        learning_rate(step + 1, summary["steps"], settings.optim),
    )
    assert ends[0][1].endswith(
        f"the run has {summary['steps']} steps instead of {whole.steps}, and its learning rate goes from {before:.3g} "
        f"to {after:.3g}"
    )
    assert after < 0.6 * before
    rates = scalars(runs / "straight")["optim/learning_rate"]
    assert (
        max(rate for at, rate in rates if at > step)
        <= after
        < before
        <= min(rate for at, rate in rates if 2 < at <= step)
    )
    worth = dict(points(runs / "straight")["repeat/worth/sums"])
    assert worth[step] == pytest.approx(0.3)
    passes = dict(points(runs / "straight")["repeat/passes/sums"])
    assert passes[summary["steps"]] < 7.9
    assert summary["data"]["stories"]["unused_share"] == 0
    assert scalars(runs / "straight")["loss/train"][-1][0] == summary["steps"]


@pytest.mark.parametrize("after", [-3, 4])
def test_a_run_resumed_around_the_stop_is_the_same(stopped, after, monkeypatch):
    base, runs = stopped
    step = next(step for step, sentence in told(runs / "straight") if "not repeated any more" in sentence)
    settings = load_settings(None, [*base, f"run.name=resumed{after}"])
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(step + after))
    train(settings)
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(settings) == 0
    mine, other = (scalars(runs / name) for name in (f"resumed{after}", "straight"))
    system = [tag for tag in mine if tag.startswith("system/")]
    assert {tag: mine[tag] for tag in mine if tag not in system} == {
        tag: other[tag] for tag in other if tag not in system
    }
    assert told(runs / f"resumed{after}") == told(runs / "straight")
