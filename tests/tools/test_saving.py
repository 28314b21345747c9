"""The benchmark of checkpoints: both kinds on one rank and on several, and its errors."""

import bench
import pytest
import torch
from benchmarks import saving

from moetrain.distributed.mesh import ParallelLayout
from tests.tools.benchmark import run

SAVED = ("model.num_hidden_layers=1", "model.hidden_size=32", "tokenizer.vocab_size=300")


def test_saving_by_a_thread_is_compared_with_saving_at_once(tmp_path, capsys):
    result = run(tmp_path, "saving", "--turns", "2", *SAVED)
    sides = result["sides"]
    assert {name: len(side["pause"]) for name, side in sides.items()} == {"at once": 2, "thread": 2}
    for pause, written in zip(sides["at once"]["pause"], sides["at once"]["written"], strict=True):
        assert pause <= written < pause + 0.1
    assert all(a <= b for a, b in zip(sides["thread"]["pause"], sides["thread"]["written"], strict=True))
    assert result["bytes"] > 3 * 4 * 300 * 32  # weights and two moments of the embeddings alone
    assert result["bytes_of_rank_0"] == result["bytes"]
    assert "the thread's pause is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_several_ranks_save_their_shards(tmp_path):
    result = run(tmp_path, "saving", "--turns", "2", "--ranks", "2", *SAVED, "train.sharding=fsdp")
    assert (result["ranks"], result["sharding"]) == (2, "fsdp")
    assert result["bytes_of_rank_0"] == pytest.approx(result["bytes"] / 2, rel=0.01)
    pauses, ratios = ([side["pause"] for side in result["sides"].values()], result["pause_ratio"]["each"])
    assert ratios == [thread / at_once for at_once, thread in zip(*pauses, strict=True)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "0"), "--ranks 0: give at least 1"),
        (("tokenizer.model=ours.json",), "give tokenizer.vocab_size"),
        pytest.param(
            ("train.batch_rows=3", "--ranks", "2"),
            "train.batch_rows 3 does not split over 2 processes",
            marks=pytest.mark.slow,  # starts ranks
        ),
    ],
)
def test_ranks_that_cannot_save_are_one_line(words, message, capfd):
    assert bench.main(["saving", *SAVED, *words]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_slower_rank_decides_the_pause(tmp_path, monkeypatch):
    layout = ParallelLayout()
    monkeypatch.setattr(ParallelLayout, "all_gather_objects", _with_a_slower_rank)
    states = {"model": {"weight": torch.zeros(3)}}
    pause, written = saving._save(saving.CheckpointWriter(layout, False), states, tmp_path, layout)
    assert 100 < pause < 101
    assert 200 < written < 201


def _with_a_slower_rank(layout, value, over="all"):
    if not isinstance(value, tuple):
        return [value]
    pause, written, outcome = value
    return [value, (pause + 100, written + 200, outcome)]
