"""Losses by earlier exposures: what the training step gave, sorted by how often the text was met before."""

from collections import Counter

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.monitoring.exposures import LEAST_DOCUMENTS, MOST
from moetrain.train import train
from moetrain.trainer import Trainer
from tests.conftest import small_run
from tests.distributed.test_ranks import launch
from tests.trainer.reading import scalars
from tests.trainer.test_resume import StopAt

REPEATED = ("data.domains.sums.repeats=5", "data.domains.sums.limit=40", "train.max_steps=null")


@pytest.fixture
def repeated(make_settings):
    return make_settings(*REPEATED, "train.max_steps=30", "monitor.exposure_window=48")


def test_exposures_count_the_copies_that_the_stream_holds_before(repeated):
    stream = training_stream(prepare_corpus(repeated), repeated)
    met: Counter = Counter()
    for sample in stream.rows.samples.tolist():
        text = (int(stream.samples.domain[sample]), int(stream.samples.start[sample]))
        assert stream.exposures[sample] == met[text]
        met[text] += 1
    assert max(met.values()) == 5
    # All pieces and copies of a document share a number; documents do not.
    copies = {}
    for sample in range(len(stream.samples)):
        key = int(stream.text_of_document[sample])
        start = int(stream.samples.start[sample]) - 62 * int(stream.samples.piece[sample])
        assert copies.setdefault(key, (int(stream.samples.domain[sample]), start)) == (
            int(stream.samples.domain[sample]),
            start,
        )
    assert len(set(copies.values())) == len(copies)


def test_the_windows_hold_the_newest_losses_of_the_steps_themselves(repeated, monkeypatch):
    monkeypatch.setattr("moetrain.training.step.ENTROPY_EVERY", 2)
    trainer = Trainer.build(repeated)
    losses = {}
    try:
        for step in range(1, 31):
            with torch.no_grad():
                batch = trainer.stream.batch(step - 1, 0, repeated.train.batch_rows)
                sums, tokens = batch.sum_by_sample(trainer.model(batch.model_input()).loss_BT.numpy())
            for (row, slot), sample in np.ndenumerate(batch.samples_BS.numpy()):
                if sample >= 0:
                    losses[int(sample)] = (sums[row, slot], tokens[row, slot])
            trainer.train_step(step)
        exposures = trainer.state.monitor.exposures
        held = exposures.windows()
        metrics = exposures.metrics()
        assert exposures.metrics(after_step=30) == {}
    finally:
        trainer.close()
    stream, trained = trainer.stream, list(losses)
    for domain, name in enumerate(("stories", "sums")):
        for count in (0, 1, 2, 4):
            bucket = np.minimum(grokking.exposure_bucket(stream.exposures[trained]), MOST)
            chosen = [
                s for s, b in zip(trained, bucket, strict=True) if b == count and stream.samples.domain[s] == domain
            ]
            newest = chosen[-48:]
            mine = held.take((held.domain == domain) & (held.exposures == count))
            assert mine.loss == pytest.approx([losses[s][0] for s in newest], rel=1e-5)
            assert mine.tokens.tolist() == [losses[s][1] for s in newest]
            tag = f"loss/exposure_{count}/{name}" if count else f"loss/first_exposure/{name}"
            documents = stream.text_of_document[newest]
            if len(set(documents.tolist())) < LEAST_DOCUMENTS:
                assert tag not in metrics
                continue
            expected = grokking.mean_per_token(
                [losses[s][0] for s in newest], [losses[s][1] for s in newest], documents
            )
            assert metrics[tag].mean == pytest.approx(expected.mean, rel=1e-5)
            assert metrics[tag].low == pytest.approx(expected.low, rel=1e-4)
    assert {"loss/first_exposure/stories", "loss/first_exposure/sums", "loss/exposure_1/sums"} <= metrics.keys()
    measured = held.take(np.isfinite(held.entropy) & (held.domain == 1) & (held.exposures > 0))
    assert 8 < len(measured) < len(held)
    measured = measured.take(np.arange(len(measured))[-48:])
    excess = (measured.entropy - measured.loss).sum() / measured.tokens.sum()
    assert metrics["memorized/excess_confidence/sums"].mean == pytest.approx(excess)
    assert {"memorized/excess_confidence_unseen/sums", "memorized/excess_confidence_unseen/stories"} <= metrics.keys()
    assert "memorized/excess_confidence/stories" not in metrics
    assert not any("exposure_1/stories" in tag for tag in metrics)  # every story is met once


def test_a_run_logs_them_and_a_resumed_one_goes_on(make_settings, tmp_path, monkeypatch):
    settings = make_settings(*REPEATED, "train.max_steps=30", "monitor.every=5", "train.checkpoint_every=10")
    assert train(settings) == 0
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(12))
    other = make_settings(*REPEATED, "train.max_steps=30", "monitor.every=5", "train.checkpoint_every=10", "run.name=b")
    train(other)
    monkeypatch.setattr("moetrain.training_loop.StopSignals", StopAt(10**9))
    assert train(other) == 0
    straight, resumed = scalars(tmp_path / "runs" / "run"), scalars(tmp_path / "runs" / "b")
    tags = [tag for tag in straight if "exposure" in tag]
    assert {"loss/first_exposure/stories", "loss/exposure_1/sums"} <= set(tags)
    assert {tag: resumed[tag] for tag in tags} == {tag: straight[tag] for tag in tags}


@pytest.mark.slow
def test_two_ranks_hold_together_what_one_holds(corpus_folder, tmp_path, tmp_path_factory):
    (tmp_path / "empty.yaml").write_text("")
    base = [*small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()), *REPEATED, "train.max_steps=20"]
    launch(2, [str(tmp_path / "empty.yaml"), *base, "run.name=two"])
    assert train(load_settings(None, [*base, "run.name=one"])) == 0
    one, two = (scalars(tmp_path / "runs" / name) for name in ("one", "two"))
    tags = [tag for tag in one if "exposure" in tag]
    assert tags
    for tag in tags:
        assert [step for step, _ in two[tag]] == [step for step, _ in one[tag]]
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]], rel=1e-3)
