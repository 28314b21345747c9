"""Held-out panel texts of which the training text holds a copy."""

import json
import random

import numpy as np
import pytest

from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import is_heldout
from moetrain.data.stream import training_stream
from moetrain.routing import near_duplicates as searched
from moetrain.routing.near_duplicates import RUN, NearDuplicates, near_duplicates
from moetrain.routing.panel import HELDOUT, draw_panel
from moetrain.train import main
from tests.conftest import sentences

SHARE = 0.3


@pytest.fixture
def folder(tmp_path):
    """Texts of which ten held-out ones stand in longer training documents too."""
    rng = random.Random(5)
    texts = [sentences(rng, 14) for _ in range(400)]
    heldout = [text for text in texts if is_heldout(text, SHARE)]
    longer = []
    for text in heldout[:10]:
        number = 0
        while is_heldout(copy := f"Version {number}. {text} The end.", SHARE):
            number += 1
        longer.append(copy)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *longer]))
    return tmp_path


def words(folder, *more):
    return [
        f"data.root={folder}",
        f"data.cache_dir={folder / 'cache'}",
        "data.domains.d.path=d.jsonl",
        f"data.heldout_share={SHARE}",
        "data.seq_len=128",
        "tokenizer.vocab_size=400",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.num_experts=4",
        "model.intermediate_size=16",
        "train.batch_rows=4",
        "train.max_steps=10",
        "train.threads=1",
        "panel.samples=200",
        "panel.tokens=40",
        "panel.readings=2",
        f"run.output_dir={folder / 'runs'}",
        "run.report=false",
        *more,
    ]


def slow(panel, corpus, trained):
    """Which held-out samples share a run with a training sample, by comparing tuples."""
    tokens, met = corpus.domains[0].tokens, set()
    for start, length in zip(trained.start.tolist(), trained.length.tolist(), strict=True):
        piece = tokens[start : start + length].tolist()
        met |= {tuple(piece[k : k + RUN]) for k in range(len(piece) - RUN + 1)}
    found = 0
    for member in panel.members(0, HELDOUT):
        text = panel.stream.sequence(member)[1:-1].tolist()
        found += any(tuple(text[k : k + RUN]) in met for k in range(len(text) - RUN + 1))
    return found


@pytest.mark.parametrize("chunk", [2**20, 100])
def test_copies_within_other_training_documents_are_found(folder, monkeypatch, chunk):
    from moetrain.config import load_settings

    monkeypatch.setattr(searched, "_CHUNK", chunk)
    settings = load_settings(None, words(folder))
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    panel = draw_panel(corpus, stream, settings, 10, rows=4)
    found = near_duplicates(panel, corpus, stream.samples)["d"]
    assert found.searched == len(panel.members(0, HELDOUT)) > 50
    assert found.found == slow(panel, corpus, stream.samples) >= 8
    # Text that the run does not train on is not searched.
    nothing = stream.samples.take(np.zeros(0, np.int64))
    assert near_duplicates(panel, corpus, nothing)["d"] == NearDuplicates(found.searched, 0)


def test_a_run_says_so_and_short_samples_are_not_searched(folder, capsys):
    said = "held-out texts of the panel share 32 consecutive tokens with the training text"
    (folder / "run.yaml").write_text("{}")
    assert main([str(folder / "run.yaml"), *words(folder)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    copies = json.loads((folder / "runs" / "run" / "summary.json").read_text())["data"]["d"]["near_duplicates"]
    assert copies["found"] >= 8
    assert main([str(folder / "run.yaml"), *words(folder, "panel.tokens=10", "run.name=short")]) == 0
    assert said not in " ".join(capsys.readouterr().out.split())
    assert "near_duplicates" not in json.loads((folder / "runs" / "short" / "summary.json").read_text())["data"]["d"]
