"""The claim ratio's forward passes, against predictions of one sample at a time."""

import numpy as np
import pytest
import torch

from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.model_input import PackedTokens
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from moetrain.routing import claims
from moetrain.routing.claims import panel_claims, read_claims, swap_first_halves
from moetrain.routing.panel import SEEN, draw_panel


def test_first_halves_come_from_other_documents():
    tokens = torch.arange(60).view(4, 15)  # a begin mark and 14 text tokens
    swapped, has = swap_first_halves(tokens, np.array([1, 1, 2, 3]))
    assert has.all()
    assert swapped[:, 0].tolist() == tokens[:, 0].tolist()
    assert swapped[0, 1:7].tolist() == tokens[2, 1:7].tolist()  # not of sample 1, which is of the same document
    assert swapped[2, 1:7].tolist() == tokens[3, 1:7].tolist()
    assert swapped[3, 1:7].tolist() == tokens[0, 1:7].tolist()
    assert torch.equal(swapped[:, 7:], tokens[:, 7:])  # the last token of the first half is the sample's own
    same, has = swap_first_halves(tokens, np.ones(4))
    assert torch.equal(same, tokens)
    assert not has.any()


@pytest.fixture
def made(make_settings):
    rule = ("builtin=modular", "repeats=20", "panel_tokens=4", "facts.modulus=97")
    settings = make_settings(
        *(f"data.domains.rule.{each}" for each in rule), "data.domains.sums.panel_tokens=20", "panel.samples=12"
    )
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    torch.manual_seed(0)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # predictions that depend on the context
    return model, draw_panel(corpus, stream, settings, 40, rows=4)


def log_probabilities(model, tokens):
    """Of each text token given those before, one sample alone: [tokens, vocabulary]."""
    hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(tokens[None]))
    return (hidden @ model.lm_head.weight.T).log_softmax(-1)[:-1].detach()


def test_gain_and_claim_of_each_sample_alone(made):
    model, panel = made
    members = panel.members(1, SEEN)
    tokens = torch.from_numpy(np.stack([panel.stream.sequence(m)[:21] for m in members]))
    swapped, _ = swap_first_halves(tokens, panel.samples.document[members])
    gain, claim = read_claims(model, tokens, swapped)
    for row in range(len(members)):
        own, foreign = log_probabilities(model, tokens[row]), log_probabilities(model, swapped[row])
        compared = range(10 + 4, 20 - 2)  # text tokens, from 0
        expected = sum(float(own[j, tokens[row, j + 1]] - foreign[j, tokens[row, j + 1]]) for j in compared)
        believed = sum(float((own[j].exp() * (own[j] - foreign[j])).sum()) for j in compared)
        assert gain[row] == pytest.approx(expected, abs=1e-4)
        assert claim[row] == pytest.approx(believed, abs=1e-4)
        assert claim[row] > 0


def test_the_panel_is_read_where_it_can_be_and_in_any_chunks(made, monkeypatch):
    model, panel = made
    step = 3
    gain, claim = panel_claims(model, panel, step, ParallelLayout())
    seen = (panel.cell == SEEN) & (panel.first_step > 0) & (panel.first_step <= step)
    plain = panel.samples.domain != 2  # `rule` marks its answers
    assert np.array_equal(np.isfinite(gain), seen & plain)
    assert np.array_equal(np.isfinite(claim), seen & plain)
    assert np.isfinite(gain).sum() >= 12
    monkeypatch.setattr(claims, "_CHUNK_LOGITS", 1)
    for whole, single in zip((gain, claim), panel_claims(model, panel, step, ParallelLayout()), strict=True):
        assert single == pytest.approx(whole, abs=1e-4, nan_ok=True)


def test_short_samples_and_an_untrained_panel_are_not_read(made, monkeypatch):
    model, panel = made
    assert np.isnan(panel_claims(model, panel, 0, ParallelLayout())[0]).all()
    monkeypatch.setattr(claims, "LEAST_TOKENS", 17)
    gain, _ = panel_claims(model, panel, 3, ParallelLayout())
    assert set(panel.samples.domain[np.isfinite(gain)]) == {1}
