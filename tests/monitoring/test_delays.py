"""Delays of a finished run: groups by both rules, paired by text, against the functions they are made of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from moetrain.monitoring import delays as module
from moetrain.monitoring.delays import delays
from moetrain.monitoring.probe_correlations import ProbeCorrelations
from moetrain.probes.history import ProbeHistory
from moetrain.probes.scoring import Measured, TaskScore
from moetrain.probes.tasks import Task
from moetrain.routing.panel import SEEN, draw_panel
from moetrain.routing.panel_monitor import PanelMonitor

READINGS = 12
STEPS = 10 * np.arange(READINGS)


def a_run(make_settings, losses, correct):
    """A finished run of which only what delays look at is there: losses [S, T] in `stories`, answers [I, T]."""
    settings = make_settings()
    corpus = prepare_corpus(settings)
    panel = draw_panel(corpus, training_stream(corpus, settings), settings, 12, rows=4)
    monitor = PanelMonitor(panel, ["stories", "sums"], 0.7, 120, dict.fromkeys(["stories", "sums"]))
    whole = np.full((len(panel), READINGS), 9.0, np.float32) + np.arange(READINGS, dtype=np.float32)
    whole[panel.members(0, SEEN)] = losses
    monitor._losses = list(whole.T)
    monitor._read_at, monitor._tokens = STEPS.tolist(), (1000 * STEPS).tolist()
    items = tuple(
        {
            "id": n,
            "task": "quiz",
            "prompt": f"Item {n}, Ada has a",
            "sep": " ",
            "choices": ["drum", "bread"],
            "answer": n % 2,
        }
        for n in range(len(correct))
    )
    task = Task("quiz", "stories", "choice", items)
    history = ProbeHistory([task])
    for reading in range(READINGS):
        right = correct[:, reading]
        score = TaskScore(task, [], right, {"accuracy": Measured.of(right)}, 0)
        history.add(int(STEPS[reading]), int(1000 * STEPS[reading]), {"quiz": score})
    torch.manual_seed(0)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    return SimpleNamespace(
        settings=settings,
        corpus=corpus,
        panel=monitor,
        probes=SimpleNamespace(history=history),
        correlations=ProbeCorrelations(["stories", "sums"], history),
        model=model,
    )


def delays_of(run):
    return delays(run.model, run, run.settings, run.corpus, ParallelLayout())


def from_then_on(onsets):
    return np.arange(READINGS) >= np.asarray(onsets)[:, None]


def test_delays_are_those_of_the_groups_they_pair(make_settings):
    memorized = from_then_on([2] * 7 + [4] * 7)
    right = from_then_on([5] * 10 + [7] * 10)
    run = a_run(make_settings, np.where(memorized, 0.05, 5.0), right)
    found = delays_of(run)
    stories = found["stories"]
    assert stories.note == ""
    assert sorted(pair.memorized_at for pair, _ in stories.pairs) == [2, 4]
    assert sorted(pair.generalized_at for pair, _ in stories.pairs) == [5, 7]
    for pair, delay in stories.pairs:
        assert delay.steps == 10 * (pair.generalized_at - pair.memorized_at)
        assert delay.tokens == 1000 * delay.steps
        assert (delay.steps_resolution, pair.items, pair.samples) == (10, 10, 7)
    assert stories.mean.steps == 30  # (5 + 7 - 2 - 4) / 2 readings, however they are paired
    assert found["sums"].note.startswith("no task of this domain that is")
    assert found["stories"].as_dict()["mean"]["steps"] == 30


@pytest.mark.parametrize(
    ("losses", "right", "note"),
    [
        (np.full((14, READINGS), 5.0) - np.arange(READINGS) / 5, from_then_on([5] * 20), "fewer than a fifth"),
        (np.where(from_then_on([2] * 14), 0.05, 5.0), from_then_on([READINGS - 3] * 20), "no item was answered right"),
        (
            np.where(from_then_on([2] * 14), 0.05, 5.0),
            from_then_on([0] * 10 + [99] * 10),
            "accuracy did not exceed chance",
        ),
    ],
)
def test_without_groups_there_is_a_reason(make_settings, losses, right, note):
    found = delays_of(a_run(make_settings, losses, right))["stories"]
    assert found.mean is None
    assert note in found.note
    assert found.as_dict() == {"pairs": [], "mean": None, "note": found.note}


def test_an_encoder_of_sentences_is_given_all_texts(make_settings, monkeypatch):
    run = a_run(make_settings, np.where(from_then_on([2] * 14), 0.05, 5.0), from_then_on([5] * 20))
    given = []

    def encode(texts):
        given.extend(texts)
        return np.random.default_rng(0).normal(size=(len(texts), 4))

    monkeypatch.setattr(module, "sentence_encoder", lambda name: encode)
    probes = run.settings.probes.model_copy(update={"embeddings": "a/model"})
    run.settings = run.settings.model_copy(update={"probes": probes})
    assert delays_of(run)["stories"].mean.steps == 30
    assert len(given) == 14 + 20
    assert given[14] == "Item 0, Ada has a drum"
    assert isinstance(given[0], str)


def test_a_run_without_panel_or_probes_has_no_delays():
    assert delays(None, SimpleNamespace(panel=None, probes=None, correlations=None), None, None, None) == {}
    assert grokking.mean_delay([], None, None) is None
