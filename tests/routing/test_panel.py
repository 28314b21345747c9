import json
from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moetrain import grokking
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.events import as_event
from moetrain.model_input import PackedTokens
from moetrain.models.initialization import initialize_weights
from moetrain.models.router import Router
from moetrain.models.transformer import Transformer
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME, draw_panel, most_samples, read_panel, reading_steps
from moetrain.routing.panel_metrics import panel_cells, panel_metrics
from moetrain.routing.panel_monitor import PanelMonitor, memorization_summary
from moetrain.routing.store import (
    StoreError,
    TrainingContext,
    list_files,
    read_reading,
    read_readings,
    remove_unlisted,
    to_stored,
    write_reading,
)
from moetrain.train import train
from moetrain.training.initialize import initial_model
from tests.distributed.layouts import in_ranks
from tests.trainer.reading import scalars

STEPS = 40
DOMAINS = ["stories", "sums"]


@pytest.fixture
def made(make_settings):
    settings = make_settings("data.domains.sums.repeats=2", f"train.max_steps={STEPS}")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    torch.manual_seed(0)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    panel = draw_panel(corpus, stream, settings, STEPS, rows=4)
    return settings, corpus, stream, model, panel


@pytest.fixture
def ruled(make_settings):
    """As `made`, with a domain whose documents mark their answers behind the tokens that are compared."""
    facts = ("builtin=modular", "repeats=20", "panel_tokens=4", "facts.modulus=97")
    settings = make_settings(*(f"data.domains.rule.{fact}" for fact in facts), "panel.samples=24", "data.seq_len=60")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    torch.manual_seed(0)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    return settings, corpus, stream, model, draw_panel(corpus, stream, settings, STEPS, rows=4)


def ruled_reading(ruled, step=20):
    settings, _, _, model, panel = ruled
    reading = read_panel(model, panel, step, ParallelLayout())
    return to_stored(panel, reading, list(settings.data.domains), grokking.gram_blocks(router_rows(model)))


def assert_same_answers(one, other):
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def router_rows(model):
    return np.stack([m.weight.detach().numpy() for m in model.modules() if isinstance(m, Router)])


def reading_of(made, step=20):
    _, _, _, model, panel = made
    reading = read_panel(model, panel, step, ParallelLayout())
    return reading, to_stored(panel, reading, DOMAINS, grokking.gram_blocks(router_rows(model)))


def test_cells_hold_the_right_samples_counting_every_copy(made):
    settings, corpus, stream, _, panel = made
    first_steps = {}
    for step in range(stream.steps):
        for sample in stream._step_samples(step):
            key = (int(stream.samples.domain[sample]), int(stream.samples.start[sample]))
            first_steps.setdefault(key, step + 1)
    for domain in (0, 1):
        for cell in (SEEN, TO_COME, HELDOUT):
            members = panel.members(domain, cell)
            heldout = len(panel.members(domain, HELDOUT))
            most = settings.panel.samples if cell != TO_COME else max(16 - heldout, 4)
            assert (4 if cell == TO_COME else 8) <= len(members) <= most
            texts = [(domain, int(panel.samples.start[m])) for m in members]
            assert len(set(texts)) == len(texts)
            for text, member in zip(texts, members, strict=True):
                first = first_steps.get(text)
                assert panel.samples.length[member] == settings.panel.tokens
                if cell == SEEN:
                    assert first <= STEPS // 10
                    assert panel.first_step[member] == first
                elif cell == TO_COME:
                    assert STEPS - STEPS // 10 < first <= STEPS
                    assert panel.first_step[member] == first
                else:
                    assert first is None
                    assert panel.first_step[member] == 0
    again = draw_panel(corpus, stream, settings, STEPS, rows=2)
    assert np.array_equal(again.samples.start, panel.samples.start)


@pytest.mark.parametrize(("share", "few"), [(0.005, True), (0.3, False)])
def test_samples_to_come_fill_up_what_is_held_out(make_settings, share, few):
    settings = make_settings(f"data.heldout_share={share}", "panel.samples=16")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    panel = draw_panel(corpus, stream, settings, stream.steps, rows=2)
    sizes = [len(panel.members(0, cell)) for cell in (SEEN, TO_COME, HELDOUT)]
    assert (sizes[2] < 12) == few
    assert sizes == [16, 16 - sizes[2] if few else 4, sizes[2]]
    assert sum(sizes) <= most_samples(16)


def test_a_reading_equals_each_sample_read_alone(made):
    _, _, _, model, panel = made
    reading, _ = reading_of(made)
    for member in (0, 17, len(panel) - 1):
        tokens = torch.from_numpy(panel.stream.sequence(member)[:-1])  # the end mark is not part of a beginning
        length = len(tokens)
        targets = torch.cat([tokens[1:], torch.tensor([-100])])
        recorded = torch.full((length,), -1)
        recorded[1:] = torch.arange(length - 1) % 2
        with torch.no_grad():
            out = model(PackedTokens.one_sample_per_row(tokens[None], targets[None], recorded[None]))
        assert reading.loss[member] == pytest.approx(float(out.loss_sum) / (length - 1), rel=1e-5)
        sums = out.routing.sums_LBRE[:, 0].numpy()
        for half, mine in ((0, reading.even), (1, reading.odd)):
            assert np.allclose(mine[member], sums[:, half] / sums[:, half].sum(-1, keepdims=True), atol=1e-5)
        assert np.array_equal(reading.counts[member], out.routing.counts_LBRE[:, 0].sum(1).numpy())


def test_answers_are_read_where_each_token_is_predicted(ruled):
    """Against the routers' own inputs, one sample at a time: no packing, no summing."""
    settings, _, _, model, panel = ruled
    reading = read_panel(model, panel, 20, ParallelLayout())
    inputs = []
    hooks = [m.register_forward_hook(lambda m, args, _: inputs.append((m, args[0]))) for m in routers(model)]
    expected = []
    for member in panel.members(list(settings.data.domains).index("rule"), SEEN):
        begin, size = int(panel.samples.answer_start[member]), int(panel.samples.answer_length[member])
        assert size
        ids = torch.from_numpy(panel.stream.sequence(member)[:-1])
        inputs.clear()
        with torch.no_grad():
            model.hidden_states(PackedTokens.one_sample_per_row(ids[None]))
            probs_LNE = [torch.softmax(x.float() @ m.weight.float().T, -1) for m, x in inputs]
        for place in range(size):
            routed = np.stack([probs[begin + place].numpy() for probs in probs_LNE])
            expected.append((member, place, int(ids[begin + place + 1]), routed))
    for hook in hooks:
        hook.remove()
    answers = reading.answers
    assert len(expected) > 24
    assert answers.place.max() >= 1
    assert list(zip(answers.member, answers.place, answers.token, strict=True)) == [row[:3] for row in expected]
    assert np.allclose(answers.weights, [row[3] for row in expected], atol=1e-5)
    assert answers.weights.dtype == np.float32
    assert np.allclose(answers.weights.sum(-1), 1, atol=1e-5)


def routers(model):
    return [m for m in model.modules() if isinstance(m, Router)]


def test_text_without_marked_answers_needs_one_forward_pass(made, ruled, monkeypatch):
    passed = []
    forward = Transformer._hidden_states
    monkeypatch.setattr(Transformer, "_hidden_states", lambda *args: passed.append(1) or forward(*args))
    reading, _ = reading_of(made)
    stream = made[-1].stream
    assert len(passed) == stream.steps
    assert sum(stream.full_rows(step) for step in range(stream.steps)) == len(stream.rows)
    assert len(reading.answers) == 0
    assert reading.answers.weights.shape == (0, 3, 8)
    monkeypatch.setattr("moetrain.routing.answers.LONGEST_ANSWER", 0)
    assert len(ruled_reading(ruled).answers) == 0


def test_leave_one_out_accuracy_is_over_seen_samples_with_a_marked_answer(ruled):
    settings, _, _, _, panel = ruled
    domains = list(settings.data.domains)
    stored = ruled_reading(ruled, step=20)
    found = panel_metrics(stored, domains, 0.7, STEPS)
    assert [tag for tag in found if tag.startswith("kernel/left_out")] == ["kernel/left_out/rule"]
    seen = panel.members(domains.index("rule"), SEEN, seen_by=20)
    rows = [n for n, member in enumerate(stored.answers.member) if member in seen]
    assert len(rows) == len(stored.answers) > 0
    weights = stored.answers.weights[rows].astype(float)
    rest = (getattr(stored.answers, name)[rows] for name in ("member", "place", "token"))
    expected = grokking.left_out(weights / weights.sum(-1, keepdims=True), *rest)
    assert found["kernel/left_out/rule"] == expected
    assert expected.samples == len(seen) == 24
    # A domain whose routing tells the answer, and a sample that cannot count.
    predictable = np.eye(8)[stored.answers.token % 8][:, None].repeat(3, 1).astype(np.float16)
    predictable[rows[0]] = np.nan
    planted = replace(stored, answers=replace(stored.answers, weights=predictable))
    planted = panel_metrics(planted, domains, 0.7, STEPS)["kernel/left_out/rule"]
    assert planted.samples == 23
    first = panel_metrics(replace(stored, step=0), domains, 0.7, STEPS)
    assert not any(tag.startswith("kernel/left_out") for tag in first)


def test_answers_are_stored_in_their_own_file(ruled, made, tmp_path):
    stored = ruled_reading(ruled)
    paths = write_reading(tmp_path, stored)
    assert [path.name for path in paths] == [f"{name}_00000020.parquet" for name in ("panel", "router", "answers")]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in paths) == list_files(tmp_path)
    back = read_reading(tmp_path, 20)
    assert_same_answers(back.answers, stored.answers)
    assert back.answers.weights.dtype == np.float16
    remove_unlisted(tmp_path, [])
    assert list_files(tmp_path) == []
    write_reading(tmp_path, reading_of(made)[1])
    assert not (tmp_path / "routing" / "answers_00000020.parquet").exists()
    assert read_reading(tmp_path, 20).answers.weights.shape == (0, 3, 8)


@pytest.mark.parametrize("damage", ["cut", "missing", "of another panel", "without a column", "flipped"])
def test_a_corrupt_file_of_answers_is_named(ruled, tmp_path, damage):
    path = write_reading(tmp_path, ruled_reading(ruled))[-1]
    if damage == "missing":
        path.unlink()
    elif damage == "of another panel":
        pq.write_table(pq.read_table(path).slice(1), path)
    elif damage == "without a column":
        pq.write_table(pq.read_table(path).drop_columns("weights"), path)
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match=r"answers_00000020\.parquet: (missing|truncated or corrupt)"):
        read_reading(tmp_path, 20)


def test_a_reading_without_a_file_of_answers_has_none(ruled, tmp_path):
    panel, _, answers = write_reading(tmp_path, ruled_reading(ruled))
    answers.unlink()
    table = pq.read_table(panel)
    older = {key: value for key, value in table.schema.metadata.items() if key != b"answers"}
    pq.write_table(table.replace_schema_metadata(older), panel)
    assert len(read_reading(tmp_path, 20).answers) == 0


@pytest.mark.parametrize("written", [1, 2])
def test_a_reading_that_cannot_be_written_leaves_no_partial_files(ruled, tmp_path, monkeypatch, written):
    write, tables = pq.write_table, []

    def full(table, *args, **options):
        tables.append(table)
        if len(tables) > written:
            raise OSError(28, "No space left on device")
        write(table, *args, **options)

    monkeypatch.setattr("moetrain.routing.store.pq.write_table", full)
    with pytest.raises(OSError, match="No space"):
        write_reading(tmp_path, ruled_reading(ruled))
    assert list_files(tmp_path) == []


def test_ranks_share_a_reading(ruled):
    _, _, _, model, panel = ruled
    whole = read_panel(model, panel, 3, ParallelLayout(), inputs=True)
    joined, *others = in_ranks(3, lambda layout: read_panel(model, panel, 3, layout, inputs=True))
    assert others == [None, None]
    for name in ("loss", "even", "odd", "counts", "inputs"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
    assert len(whole.answers)
    assert_same_answers(joined.answers, whole.answers)


def test_a_stored_reading_is_read_back_bit_for_bit(made, tmp_path):
    stored = replace(reading_of(made)[1], training_context=TrainingContext(12345, 1.25, 1 / 3))
    write_reading(tmp_path, stored)
    back = read_reading(tmp_path, 20)
    assert back.training_context == stored.training_context
    for name in ("domain", "cell", "document", "piece", "first_step", "tokens", "loss", "even", "odd", "counts"):
        mine, theirs = getattr(back, name), getattr(stored, name)
        assert np.array_equal(mine, theirs), name
        assert mine.dtype == theirs.dtype, name
    assert all(np.array_equal(a, b) for a, b in zip(back.blocks, stored.blocks, strict=True))
    # As text, in which no number equals none; few samples to come have no interval.
    assert str(panel_metrics(back, DOMAINS, 0.7, STEPS)) == str(panel_metrics(stored, DOMAINS, 0.7, STEPS))
    frame = pq.read_table(tmp_path / "routing" / "panel_00000020.parquet").to_pandas()
    assert set(frame.domain) == set(DOMAINS)
    assert len(frame.even[0]) == 3 * 8


def test_stored_weights_are_the_mean_over_tokens(made):
    reading, stored = reading_of(made)
    exact = (reading.even.astype(float) + reading.odd) / 2  # 16 tokens: as many even ones as odd
    assert np.allclose(stored.weights, exact, atol=2e-3)
    assert np.allclose(stored.weights.sum(-1), 1, atol=1e-12)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_corrupt_file_is_named(made, tmp_path, damage):
    _, stored = reading_of(made)
    path = write_reading(tmp_path, stored)[0]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 1000 if damage == "cut" else 0])
    with pytest.raises(StoreError, match=r"panel_00000020\.parquet: (missing|truncated or corrupt)"):
        read_reading(tmp_path, 20)


def test_files_not_listed_in_a_checkpoint_are_removed(made, tmp_path):
    _, stored = reading_of(made)
    write_reading(tmp_path, stored)
    listed = list_files(tmp_path)
    assert listed == ["routing/panel_00000020.parquet", "routing/router_00000020.parquet"]
    (tmp_path / "routing" / "panel_00000030.parquet").write_bytes(b"x")
    remove_unlisted(tmp_path, listed)
    assert list_files(tmp_path) == listed


def test_metrics_take_the_right_samples(made):
    _, _, _, model, panel = made
    _, stored = reading_of(made, step=2)
    found = panel_metrics(stored, DOMAINS, 0.7, STEPS)
    seen = panel.members(0, SEEN, seen_by=2)
    assert 0 < len(seen) < len(panel.members(0, SEEN))
    weights = stored.weights
    assert found["pathway/d_path/stories"] == grokking.d_path(weights[seen])
    assert found["pathway/cosine/stories"].mean == pytest.approx(
        float(np.nanmean(grokking.cosine(weights[seen], router_rows(model)))), abs=1e-6
    )
    assert found["loss/panel_seen/stories"].mean == pytest.approx(stored.loss[seen].mean(), rel=1e-6)
    others = panel.members(1, SEEN, seen_by=2)
    assert found["pathway/sharing/stories"] == grokking.sharing(weights[seen], weights[others])
    heldout = panel.members(0, HELDOUT)
    gap = stored.loss[heldout].mean() - stored.loss[seen].mean()
    assert found["memorized/gap_heldout/stories"].mean == pytest.approx(gap, abs=1e-5)
    # The gap to samples to come is taken between the tenths alone.
    assert not any(tag.startswith("memorized/gap/") for tag in found)
    _, middle = reading_of(made, step=20)
    assert "memorized/gap/stories" in panel_metrics(middle, DOMAINS, 0.7, STEPS)
    _, first = reading_of(made, step=0)
    assert not any(tag.startswith("pathway/") for tag in panel_metrics(first, DOMAINS, 0.7, STEPS))


def test_domains_of_different_panel_tokens_are_not_compared(make_settings):
    settings = make_settings("data.domains.sums.panel_tokens=12", "train.max_steps=40")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    panel = draw_panel(corpus, stream, settings, 40, rows=4)
    reading = read_panel(model, panel, 8, ParallelLayout())
    found = panel_metrics(
        to_stored(panel, reading, DOMAINS, grokking.gram_blocks(router_rows(model))), DOMAINS, 0.7, 12
    )
    assert "pathway/d_path/sums" in found
    assert not any(tag.startswith("pathway/sharing") for tag in found)


def test_state_restores_the_readings(made):
    _, _, _, _, panel = made
    monitor = PanelMonitor(panel, DOMAINS, 0.7, STEPS, {"stories": 10.0, "sums": None})
    steps = (0, 10, 20, 30)
    points = [
        monitor.take(replace(reading_of(made, step)[1], training_context=TrainingContext(step * 100))) for step in steps
    ]
    assert [p.step for p in points] == [0, 10, 20, 30]
    assert points[-1].metrics["memorized/fraction/stories"].mean == 1.0  # nothing moved, and 10 nats are easily seen
    # Without eps: below the 5% quantile of the losses of samples not trained on. Nothing moved here.
    _, stored = reading_of(made, 30)
    losses = {
        cell: stored.loss[panel.members(1, cell)].tolist() for cell in (SEEN, TO_COME, HELDOUT)
    }  # none of "to come" has come by step 30 of 40
    eps = np.percentile([*losses[TO_COME], *losses[HELDOUT]], 5)
    expected = np.mean([loss <= eps for loss in losses[SEEN]])
    assert points[-1].metrics["memorized/fraction/sums"].mean == pytest.approx(expected)
    assert not any("fraction/sums" in tag for p in points[:2] for tag in p.metrics)  # three readings are needed
    again = PanelMonitor(panel, DOMAINS, 0.7, STEPS, {"stories": 10.0, "sums": None})
    again.load_state(monitor.state())
    assert again.state().keys() == monitor.state().keys()
    assert all(torch.equal(again.state()[k].nan_to_num(), v.nan_to_num()) for k, v in monitor.state().items())
    for domain in (0, 1):
        for mine, theirs in zip(again.losses(domain), monitor.losses(domain), strict=True):
            assert np.array_equal(mine, theirs)
    changes = [point.memorized for point in points]
    assert [[name for name in change if name == "stories"] for change in changes] == [[], [], ["stories"], []]
    seen = panel.members(0, SEEN)
    assert changes[2]["stories"].newly == panel.names(seen)
    assert changes[2]["stories"].undone == []


def test_without_eps_memorized_is_what_lies_below_19_of_20_unseen_samples(made):
    """Losses that fall on the seen samples alone: all become memorized; where all fall alike, hardly any does."""
    _, _, _, _, panel = made
    monitor = PanelMonitor(panel, DOMAINS, 0.7, 1000, dict.fromkeys(DOMAINS))
    stored = reading_of(made, 0)[1]
    first_step = np.where(stored.cell == SEEN, 1, 0)
    panel.first_step[:] = first_step
    points = []
    for number in range(6):
        fall = np.where((stored.domain == "stories") & (stored.cell != SEEN), 0.0, 0.01 * number)
        loss = stored.loss - fall - np.where((stored.domain == "stories") & (stored.cell == SEEN), 2.0, 0.0)
        reading = replace(stored, step=40 + number, loss=loss.astype(np.float32), first_step=first_step)
        points.append(monitor.take(replace(reading, training_context=TrainingContext(1000 * number + 1, 1.5, 0.2))))
    newest = points[-1].metrics
    assert newest["memorized/fraction/stories"].mean == 1.0
    assert newest["memorized/fraction/sums"].mean < 0.2
    documents = len(np.unique(stored.document[(stored.domain == "stories") & (stored.cell == SEEN)]))
    assert newest["memorized/fraction/stories"].samples == documents
    (step,) = [point.step for point in points if "stories" in point.memorized]
    assert step == 42  # the third reading


def test_distances_are_taken_over_no_more_pairs_than_set(made):
    _, _, _, _, panel = made
    monitor = PanelMonitor(panel, DOMAINS, 0.7, STEPS, dict.fromkeys(DOMAINS), max_pairs=5)
    stored = reading_of(made, 30)[1]
    found, whole = monitor.take(stored).metrics, panel_metrics(stored, DOMAINS, 0.7, STEPS)
    for tag in ("pathway/d_path", "pathway/d_path_norm", "pathway/sharing", "pathway/individuality"):
        assert found[f"{tag}/stories"].pairs == 5 < whole[f"{tag}/stories"].pairs
    seen = panel_cells(stored, "stories", 0.7, STEPS)["seen"]
    assert found["pathway/d_path/stories"] == grokking.d_path(seen.weights, 0.7, max_pairs=5)
    assert found["pathway/spread/stories"] == whole["pathway/spread/stories"]


def test_a_run_with_top_k_weights_records_only_experts_that_tokens_are_sent_to(make_settings):
    settings = make_settings("monitor.weights=top_k", "train.max_steps=40")
    corpus = prepare_corpus(settings)
    model = initial_model(settings, corpus.tokenizer, torch.float32)
    panel = draw_panel(corpus, training_stream(corpus, settings), settings, 40, rows=4)
    reading = read_panel(model, panel, 0, ParallelLayout())
    assert np.array_equal(reading.even + reading.odd > 0, reading.counts > 0)
    assert (reading.counts == 0).any()
    np.testing.assert_allclose(reading.even.sum(-1), 1, rtol=1e-5)


def test_delta_decides_what_counts_as_memorized_online_and_at_the_end(made):
    _, _, _, _, panel = made
    counts = {}
    for delta in (0.05, 0.5):
        monitor = PanelMonitor(panel, DOMAINS, 0.7, STEPS, {"stories": 10.0, "sums": None}, delta=delta)
        stored = reading_of(made, 10)[1]
        for number in range(6):  # losses fall by 0.2 from reading to reading, until they stay
            loss = stored.loss - 0.2 * min(number, 3)
            context = TrainingContext(number + 1)
            given = replace(stored, step=10 + number, loss=loss.astype(np.float32), training_context=context)
            points = monitor.take(given)
            if number == 3:
                counts[delta] = points.metrics["memorized/fraction/stories"].mean
        summary = memorization_summary(monitor)["stories"]
        assert summary["delta"] == delta
        counts[f"eps {delta}"] = summary["eps"]
    assert counts[0.05] == 0.0
    assert counts[0.5] == 1.0
    assert counts["eps 0.05"] is None  # settled at the fourth reading, which two follow: three are needed
    assert counts["eps 0.5"] is not None


def test_the_thresholds_of_the_phase_rule_are_settings():
    from dataclasses import asdict

    from moetrain.config import PhaseSettings

    assert PhaseSettings().model_dump() == asdict(grokking.PhaseThresholds())


def test_a_change_of_phase_is_reported_once(made):
    """The loss of the seen samples falls and that of the others does not: learning at first, then memorizing."""
    _, _, _, _, panel = made
    monitor = PanelMonitor(panel, DOMAINS, 0.7, 1000, dict.fromkeys(DOMAINS))
    stored = reading_of(made, 40)[1]
    points = []
    for number in range(24):
        loss = stored.loss * np.where(stored.cell == SEEN, max(0.3, 1 - 0.05 * number), 1.0)
        reading = replace(stored, step=40 + number, loss=loss.astype(np.float32), initial=stored.loss)
        points.append(monitor.take(replace(reading, training_context=TrainingContext(1000 * number, 1.5, 0.2))))
    for domain in DOMAINS:
        reported = [p.changes[domain] for p in points if domain in p.changes]
        assert [change.after.name for change in reported] == ["LEARNING", "MEMORIZING"]
        assert "the loss of unseen texts no longer falls" in points[-1].phases[domain].why
        share = points[-1].metrics[f"memorized/share/{domain}"]
        assert share.mean == pytest.approx(1, abs=0.1)
        assert all(as_event(change)["sentence"] for change in reported)


def test_reading_steps_are_evenly_spaced():
    assert sorted(reading_steps(100, 5)) == [0, 25, 50, 75, 100]
    assert sorted(reading_steps(3, 12)) == [0, 1, 2, 3]


def test_every_logged_panel_metric_can_be_computed_from_the_files(make_settings, tmp_path):
    assert train(make_settings()) == 0
    run = tmp_path / "runs" / "run"
    points = scalars(run)
    recomputed = {}
    for stored in read_readings(run):
        for tag, estimate in panel_metrics(stored, DOMAINS, 0.7, 12).items():
            recomputed.setdefault(tag, []).append((stored.step, float(np.float32(estimate.mean))))
    assert len(recomputed) > 30
    for tag, series in recomputed.items():
        assert points[tag] == series, tag
    logged = {
        tag
        for tag in points
        if tag.startswith(
            (
                "pathway",
                "kernel/",
                "memorized/gap",
                "memorized/share",
                "memorized/claim",
                "loss/panel",
            )
        )
    }
    assert logged == set(recomputed)


def test_the_linear_kernel_takes_mean_inputs_of_each_layer(made, tmp_path):
    _, _, _, model, panel = made
    reading = read_panel(model, panel, 20, ParallelLayout(), inputs=True)
    seen = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    member = 5
    tokens = torch.from_numpy(panel.stream.sequence(member)[:-1])
    with torch.no_grad():
        model.hidden_states(PackedTokens.one_sample_per_row(tokens[None]))
    for hook in hooks:
        hook.remove()
    for layer, x_ND in enumerate(seen):  # the begin mark does not count
        assert np.allclose(reading.inputs[member, layer], x_ND[1:].mean(0), atol=1e-5)
    stored = to_stored(panel, reading, DOMAINS, grokking.gram_blocks(router_rows(model)))
    write_reading(tmp_path, stored)
    back = read_reading(tmp_path, 20)
    assert np.array_equal(back.inputs, stored.inputs)
    wide = replace(back, **{name: np.concatenate([getattr(back, name)] * 5) for name in ARRAYS})
    found = panel_metrics(wide, DOMAINS, 0.7, STEPS)
    members = np.flatnonzero((wide.domain == "stories") & (wide.cell == SEEN))
    weights, features = wide.weights[members], wide.inputs[members].astype(float)
    assert found["kernel/d_eff_linear/stories"].mean == grokking.d_eff(weights, features)
    assert found["kernel/d_eff/stories"].mean == grokking.d_eff(weights)


ARRAYS = ["domain", "cell", "document", "piece", "first_step", "tokens", "loss", "initial", "difficulty"]
ARRAYS += ["claim_gain", "claim", "even", "odd", "counts", "inputs"]


def test_a_full_disk_loses_the_reading_and_not_the_run(make_settings, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moetrain.routing.store.pq.write_table", full)
    assert train(make_settings()) == 0
    run = tmp_path / "runs" / "run"
    assert list_files(run) == []
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert sum("the panel reading was not stored" in event.get("problem", "") for event in events) == 4
    assert scalars(run)["pathway/d_path/stories"]


def test_the_loss_is_over_an_answer_after_the_compared_tokens(make_settings):
    facts = ("data.domains.rule.builtin=modular", "data.domains.rule.repeats=20", "data.domains.rule.panel_tokens=4")
    settings = make_settings(*facts)
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    torch.manual_seed(0)
    model = initialize_weights(Transformer(settings.model, corpus.tokenizer.vocab_size, torch.float32))
    panel = draw_panel(corpus, stream, settings, 12, rows=4)
    reading = read_panel(model, panel, 1, ParallelLayout())
    names = list(settings.data.domains)
    stored = to_stored(panel, reading, names, grokking.gram_blocks(router_rows(model)))
    members = np.flatnonzero(stored.domain == "rule")
    assert len(members)
    assert set(stored.tokens[members].tolist()) == {4}
    for member in members[:3]:
        begin, size = int(panel.samples.answer_start[member]), int(panel.samples.answer_length[member])
        assert begin + size > 4
        tokens = torch.from_numpy(panel.stream.sequence(member)[:-1])
        length = len(tokens)
        assert length == 1 + begin + size
        targets = torch.full((length,), -100)
        targets[begin : begin + size] = tokens[begin + 1 : begin + size + 1]
        recorded = torch.full((length,), -1)
        recorded[1:5] = torch.arange(4) % 2
        with torch.no_grad():
            out = model(PackedTokens.one_sample_per_row(tokens[None], targets[None], recorded[None]))
        assert stored.loss[member] == pytest.approx(float(out.loss_sum) / size, rel=1e-5)
        sums = out.routing.sums_LBRE[:, 0].numpy().sum(1)
        assert np.allclose(stored.weights[member], sums / sums.sum(-1, keepdims=True), atol=2e-3)
