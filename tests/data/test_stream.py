import numpy as np
import pytest
import torch

from moetrain.data.batch import IGNORED
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import DataError
from moetrain.data.stream import stream_tokens, training_stream, validation_streams


@pytest.fixture
def made(make_settings):
    settings = make_settings()
    corpus = prepare_corpus(settings)
    return settings, corpus, training_stream(corpus, settings)


def test_an_epoch_holds_every_training_document_once_and_no_other(made):
    settings, corpus, stream = made
    seen_samples = {name: [] for name in settings.data.domains}
    pieces = {}
    for step in range(stream.steps):
        batch = stream.batch(step, 0, stream.batch_rows)
        for row, slot in zip(*np.nonzero(batch.samples_BS.numpy() >= 0), strict=True):
            sample = int(batch.samples_BS[row, slot])
            tokens = batch.tokens_BT[row][batch.slots_BT[row] == slot].tolist()
            assert tokens[0] == corpus.tokenizer.begin_id
            assert tokens[-1] == corpus.tokenizer.end_id
            samples = stream.samples
            key = (int(samples.domain[sample]), int(samples.document[sample]))
            pieces.setdefault(key, {})[int(samples.piece[sample])] = tokens[1:-1]
            seen_samples[corpus.domains[key[0]].name].append(sample)
    assert sum(map(len, seen_samples.values())) == len(stream.samples)
    assert len({sample for samples in seen_samples.values() for sample in samples}) == len(stream.samples)
    for number, domain in enumerate(corpus.domains):
        for document in domain.index:
            got = pieces.get((number, int(document["id"])))
            if document["heldout"]:
                assert got is None
            else:
                joined = [token for n in range(len(got)) for token in got[n]]
                text = domain.tokens[document["start"] : document["start"] + document["length"]]
                assert joined == text.tolist()


def test_rows_do_not_depend_on_how_a_step_is_split(made):
    _, _, stream = made
    whole = stream.batch(3, 0, 8)
    for split in (1, 2, 4):
        for first in range(0, 8, split):
            part = stream.batch(3, first, split)
            for name in (
                "tokens_BT",
                "targets_BT",
                "positions_BT",
                "slots_BT",
                "recorded_BT",
                "samples_BS",
                "compared_BS",
            ):
                assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + split])


def test_targets_positions_and_spans_stay_within_samples(made):
    _, _, stream = made
    for step in (0, stream.steps - 1):
        batch = stream.batch(step, 0, stream.batch_rows)
        covered = torch.zeros(batch.tokens_BT.numel(), dtype=torch.int64)
        for start, length in batch.spans_N2.tolist():
            covered[start : start + length] += 1
            assert batch.positions_BT.flatten()[start : start + length].tolist() == list(range(length))
            slots = batch.slots_BT.flatten()[start : start + length]
            assert (slots == slots[0]).all()
            targets = batch.targets_BT.flatten()[start : start + length]
            if slots[0] < 0:
                assert (targets == IGNORED).all()
            else:
                assert torch.equal(targets[:-1], batch.tokens_BT.flatten()[start + 1 : start + length])
                assert targets[-1] == IGNORED
        assert (covered == 1).all()
        assert int((batch.targets_BT != IGNORED).sum()) == stream.predicted_tokens(step)
        assert int((batch.slots_BT >= 0).sum()) == stream.real_tokens(step)


def test_the_first_panel_tokens_of_long_enough_samples_are_recorded_and_no_mark(made):
    settings, corpus, stream = made
    batch = stream.batch(0, 0, stream.batch_rows)
    marks = torch.tensor([corpus.tokenizer.begin_id, corpus.tokenizer.end_id])
    assert not torch.isin(batch.tokens_BT[batch.recorded_BT >= 0], marks).any()
    seen = 0
    for row, slot in zip(*np.nonzero(batch.samples_BS.numpy() >= 0), strict=True):
        halves = [int((batch.recorded_BT[row] == 2 * slot + parity).sum()) for parity in (0, 1)]
        long_enough = stream.samples.length[batch.samples_BS[row, slot]] >= settings.panel.tokens
        assert bool(batch.compared_BS[row, slot]) == long_enough
        assert halves == ([8, 8] if long_enough else [0, 0])
        seen += long_enough
    assert seen > 0
    first = int(torch.nonzero(batch.recorded_BT[0] >= 0)[0, 0])
    assert batch.positions_BT[0, first] == 1
    assert batch.recorded_BT[0, first] % 2 == 0


def test_record_per_token_numbers_the_predicted_tokens_of_the_chosen_samples(made):
    _, _, stream = made
    batch = stream.batch(0, 0, stream.batch_rows)
    chosen = (batch.samples_BS % 2 == 0) & (batch.samples_BS >= 0)
    recorded, samples = batch.record_per_token(chosen)
    most = 0
    for row in range(stream.batch_rows):
        number = 0
        for place, slot in enumerate(batch.slots_BT[row].tolist()):
            is_chosen = slot >= 0 and bool(chosen[row, slot]) and int(batch.targets_BT[row, place]) != IGNORED
            assert recorded[row, place] == (number if is_chosen else -1)
            number += is_chosen
        most = max(most, number)
    assert samples % 8 == 0
    assert most <= 2 * samples < most + 16
    nothing, none = batch.record_per_token(torch.zeros_like(chosen))
    assert (nothing == -1).all()
    assert none == 0


def test_repeats_have_their_own_ids_and_are_spread_over_the_stream(make_settings):
    settings = make_settings("data.domains.sums.repeats=3")
    corpus = prepare_corpus(settings)
    plain = prepare_corpus(make_settings())
    index = corpus.domains[1].index
    train = index[~index["heldout"]]
    assert len(train) == 3 * (~plain.domains[1].index["heldout"]).sum()
    assert len(np.unique(train["id"])) == len(train)
    assert index["heldout"].sum() == plain.domains[1].index["heldout"].sum()
    stream = training_stream(corpus, settings)
    half = stream_tokens(stream, 2, 0, stream.steps // 2) / stream_tokens(stream, 2, 0, stream.steps)
    assert half == pytest.approx([0.5, 0.5], abs=0.06)


def test_the_cache_is_reused_by_content(make_settings, monkeypatch):
    first = prepare_corpus(make_settings())
    monkeypatch.setattr("moetrain.data.corpus._tokenize", None)  # a second preparation would fail
    assert prepare_corpus(make_settings("train.batch_rows=4")).fingerprint == first.fingerprint


def test_a_domain_smaller_than_a_step_and_one_without_held_out_text_are_errors(make_settings):
    settings = make_settings("train.batch_rows=4096")
    corpus = prepare_corpus(settings)
    with pytest.raises(DataError, match=r"data.domains.stories: \d+ training tokens are less than one step takes"):
        training_stream(corpus, settings)
    settings = make_settings("data.heldout_share=1e-9")
    with pytest.raises(DataError, match=r"data.domains.stories: none of its 400 documents is held out"):
        validation_streams(prepare_corpus(settings), settings, 4)


def test_token_ids_outside_the_vocabulary_are_an_error(made):
    _, _, stream = made
    stream._vocab_size = 50
    with pytest.raises(DataError, match=r"domain (stories|sums): token id \d+ is outside the vocabulary of 50"):
        stream.batch(0, 0, 1)


def test_validation_text_is_held_out_and_of_the_set_size(made):
    settings, corpus, _ = made
    for number, (name, stream) in enumerate(validation_streams(corpus, settings, 4).items()):
        heldout = corpus.domains[number].index
        ids = set(heldout["id"][heldout["heldout"]].tolist())
        used = stream.samples.document[stream.rows.samples]
        assert corpus.domains[number].name == name
        assert set(used.tolist()) <= ids
        assert 0 < stream.samples.row_lengths[stream.rows.samples].sum() <= settings.train.eval_tokens


def test_stopped_repeats_leave_the_rest(make_settings):
    settings = make_settings("data.domains.sums.repeats=6", "data.domains.sums.limit=60")
    corpus = prepare_corpus(settings)
    stream, whole = training_stream(corpus, settings), training_stream(corpus, settings)
    step, text, domain = 3, whole.text_of_sample, whole.samples.domain
    stream.stop_repeats([1], step)
    rows = step * stream.batch_rows
    assert [stream.rows.row(n).tolist() for n in range(rows)] == [whole.rows.row(n).tolist() for n in range(rows)]
    before = whole.rows.samples[: whole.rows.starts[rows]]
    old, new = (each.rows.samples[each.rows.starts[rows] :] for each in (whole, stream))
    assert sorted(new[domain[new] == 0]) == sorted(old[domain[old] == 0])  # no story is lost
    missing = sorted(set(text[old[domain[old] == 1]]) - set(text[before]))
    assert sorted(text[new[domain[new] == 1]]) == missing  # texts not met before: once each
    assert 0 < len(missing) < len(set(text[domain == 1]))
    assert stream.steps < whole.steps
    assert (stream.exposures[new] == 0).all()
    assert max(len(stream.rows.row(n)) for n in range(len(stream.rows))) <= stream.most_samples
    assert all(stream.samples.row_lengths[stream.rows.row(n)].sum() <= 64 for n in range(len(stream.rows)))
    again = training_stream(corpus, settings)
    again.stop_repeats([1], step)
    assert np.array_equal(again.rows.samples, stream.rows.samples)
    assert np.array_equal(again.rows.starts, stream.rows.starts)


def test_a_stop_at_the_end_or_of_nothing_changes_nothing(make_settings):
    settings = make_settings()
    stream = training_stream(prepare_corpus(settings), settings)
    samples = stream.rows.samples.copy()
    stream.stop_repeats([1], stream.steps + 5)
    assert np.array_equal(stream.rows.samples, samples)
    stream.stop_repeats([0, 1], 2)  # nothing is repeated
    assert sorted(stream.rows.samples) == sorted(samples)
