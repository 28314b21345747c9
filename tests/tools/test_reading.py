"""The benchmark of reading data: a simulated GPU does not wait, and a consumer that is too fast does."""

import time

import bench
import pytest

from moetrain.data.stream import Stream
from tests.tools.benchmark import run

STEPS = ("train.batch_rows=16", "train.micro_batch_rows=2")


def test_a_simulated_gpu_hardly_waits_for_data(config, tmp_path, capsys):
    # 128 tokens in 0.1 s: building a micro-batch takes about a hundredth of that.
    words = ("--gpus", "2", "--tokens-per-second", "1280", "--seconds", "1.6")
    result = run(tmp_path, "reading", *words, *config, *STEPS)
    assert (result["steps"], result["micro_batches"], result["tokens_a_micro_batch"]) == (4, 16, 128)
    assert result["seconds_a_micro_batch"] == pytest.approx(0.1)
    assert result["consumers"].keys() == {"sleeping", "computing"}
    for found in result["consumers"].values():
        assert found["seconds"] > 1.6
        assert found["first"] > 0
        waited = found["waited"] + found["counted"]
        assert found["share_with_first"] == pytest.approx((found["first"] + waited) / found["seconds"])
        assert 0 < found["share"] == waited / (found["seconds"] - found["first"]) < 0.1
    assert "16 micro-batches of 128 tokens" in " ".join(capsys.readouterr().out.split())


def test_a_consumer_faster_than_the_data_waits(config, tmp_path, monkeypatch):
    batch = Stream.batch

    def slow_batch(stream, *place):
        time.sleep(0.04)
        return batch(stream, *place)

    monkeypatch.setattr(Stream, "batch", slow_batch)
    words = ("--tokens-per-second", "12800", "--seconds", "0.08")  # 128 tokens in 0.01 s
    found = run(tmp_path, "reading", *words, *config, *STEPS)
    assert found["building"]["seconds"] > 0.04
    for consumer in found["consumers"].values():
        assert consumer["first"] > 0.04
        assert 0.5 < consumer["share"] < consumer["share_with_first"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "0"), "must be positive"),
        (("--gpus", "3"), "train.batch_rows 16 does not split over 3 GPUs into micro-batches of 2 rows"),
        (("--seconds", "1e5"), "the data suffices for"),
    ],
)
def test_what_cannot_be_read_is_one_line(config, words, message, capsys):
    assert bench.main(["reading", *words, *config, *STEPS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
