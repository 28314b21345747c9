import json
import random
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from moetrain import grokking
from moetrain.config import load_settings
from moetrain.data.tokenizer import train_tokenizer
from moetrain.data.tokenizer_export import write_tokenizer
from moetrain.routing.panel import CELLS, HELDOUT, SEEN
from moetrain.routing.store import StoredReading, read_readings
from moetrain.train import train
from tests.conftest import MARKED_ANSWERS, sentences, small_run, sums
from tests.tools.test_prepare_data import load_tool
from tests.trainer.reading import scalars

replay = load_tool("replay")

LIVE = (
    "train.checkpoint_every=4",
    "phase.documents=4",
    "train.eval_every=4",
    "train.keep_checkpoints=9",
    "data.domains.sums.panel_tokens=12",
    "data.domains.sums.repeats=2",
    "data.domains.sums.eps=9.0",
    "panel.linear_kernel=true",
    *MARKED_ANSWERS,
    "train.micro_batch_rows=4",
    "model.balancing=bias",
)


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("replayed")
    rng = random.Random(5)
    items = [
        {"id": str(n), "task": "adding", "domain": "sums", "prompt": f"{a} plus {b} is", "sep": " ", "answer": 0}
        | {"choices": [f"{a + b}.", f"{a + b + 1}."]}
        for n, (a, b) in enumerate((rng.randint(21, 40), rng.randint(21, 40)) for _ in range(30))
    ]
    (out / "adding.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    probes = [f"probes.tasks=['{out / 'adding.jsonl'}']", "probes.readings=4"]
    assert train(load_settings(None, [*base, *LIVE, *probes])) == 0
    return out / "runs" / "run"


def same(replayed: StoredReading, trained: StoredReading) -> bool:
    pairs = [
        (getattr(replayed, f.name), getattr(trained, f.name))
        for f in fields(StoredReading)
        if f.name not in ("blocks", "answers", "training_context")
    ]
    pairs += zip(replayed.blocks, trained.blocks, strict=True)
    pairs += [(getattr(replayed.answers, f.name), getattr(trained.answers, f.name)) for f in fields(replayed.answers)]
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs if np.asarray(a).dtype != object)


def test_a_replay_of_a_run_equals_the_live_metrics_bit_for_bit(run, tmp_path, capsys):
    assert replay.main([str(run), "--output", str(tmp_path / "replay")]) == 0
    live, again = list(read_readings(run)), list(read_readings(tmp_path / "replay"))
    assert [reading.step for reading in again] == [reading.step for reading in live] == [0, 4, 8, 12]
    for replayed, trained in zip(again, live, strict=True):
        assert same(replayed, trained)
        assert replayed.domain.tolist() == trained.domain.tolist()
        assert replayed.training_context == trained.training_context
    assert not same(again[0], live[1])
    shown, expected = scalars(tmp_path / "replay"), scalars(run)
    for tag in (
        "pathway/d_path/stories",
        "memorized/gap/stories",
        "memorized/fraction/sums",
        "kernel/left_out/rule",
    ):
        assert shown[tag]
    for tag in ("loss/validation_bpb/sums", "probe/adding/accuracy", "pathway_heldout/cosine/sums"):
        assert [step for step, _ in shown[tag]] == [0, 4, 8, 12]
    for tag, points in shown.items():
        assert points == [point for point in expected[tag] if point[0] in (0, 4, 8, 12)], tag
    replayed, trained = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "replay", run))
    for domain, found in trained["domains"].items():
        for metric, value in found["metrics"].items():
            of_the_stream = (
                "stream/",
                "loss/first_exposure",
                "loss/exposure_",
                "memorized/excess_confidence",
                "repeat/",
            )
            if not metric.startswith(of_the_stream):  # a replay trains on nothing
                assert replayed["domains"][domain]["metrics"][metric] == value, metric
        assert replayed["domains"][domain]["memorized"] == found["memorized"]
        for name in ("phase", "correlations", "delay"):
            assert replayed["domains"][domain][name] == found[name]
    assert replayed["probes"] == trained["probes"]
    assert list(replayed["models"]) == ["0", "4", "8", "12"]
    events = [json.loads(line) for line in (tmp_path / "replay" / "events.jsonl").read_text().splitlines()]
    live_events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for kind in ("probe", "memorized", "phase"):
        found = [event for event in events if event["type"] == kind]
        assert found == [event for event in live_events if event["type"] == kind]
        assert found or kind == "phase"
    printed = capsys.readouterr().out
    assert "4 readings of" in printed


def test_a_dense_run_is_replayed_with_any_number_of_blocks(corpus_folder, tmp_path, tmp_path_factory, capsys):
    dense = ("model.experts=dense", "train.max_steps=4", "train.eval_every=4", "probes.builtin=false")
    base = [*small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()), *dense]
    assert train(load_settings(None, [*base, "panel.readings=2", "model.dense_experts=4"])) == 0
    run = tmp_path / "runs" / "run"
    assert replay.main([str(run), "--output", str(tmp_path / "same")]) == 0
    (first, last), live = read_readings(tmp_path / "same"), list(read_readings(run))
    assert same(first, live[0])
    assert same(last, live[1])
    assert replay.main([str(run), "model.dense_experts=8", "--output", str(tmp_path / "finer")]) == 0
    finer = list(read_readings(tmp_path / "finer"))[-1]
    assert finer.weights.shape[-1] == 8
    np.testing.assert_allclose(finer.weights.reshape(*last.weights.shape, 2).sum(-1), last.weights, atol=2e-3)
    assert replay.main([str(run), "model.dense_experts=0", "--output", str(tmp_path / "none")]) == 2
    assert "a dense model without model.dense_experts" in capsys.readouterr().err


def test_a_run_that_kept_two_checkpoints_is_told_what_keeps_more(corpus_folder, tmp_path, tmp_path_factory, capsys):
    cache = tmp_path_factory.getbasetemp()
    assert train(load_settings(None, small_run(corpus_folder, tmp_path, cache))) == 0  # checkpoints of steps 5, 10, 12
    assert replay.main([str(tmp_path / "runs" / "run"), "--output", str(tmp_path / "few")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of the run's 3 checkpoints are kept, so the panel is read 3 times: fewer than 10 are too few" in said
    assert len(list(read_readings(tmp_path / "few"))) == 3
    remedy = re.search(r"with (train\.checkpoint_every=\d+) (train\.keep_every=\d+)", said).groups()
    again = [*small_run(corpus_folder, tmp_path / "again", cache), *remedy]
    assert train(load_settings(None, again)) == 0
    assert replay.main([str(tmp_path / "again" / "runs" / "run"), "--output", str(tmp_path / "enough")]) == 0
    assert "too few for onsets" not in " ".join(capsys.readouterr().out.split())
    assert len(list(read_readings(tmp_path / "enough"))) >= 10


def test_one_checkpoint_can_be_read_on_another_panel(run, tmp_path):
    chosen = run / "checkpoints" / "step_00000008"
    assert replay.main([str(chosen), "panel.samples=4", "--output", str(tmp_path / "few")]) == 0
    (few,) = read_readings(tmp_path / "few")
    assert few.step == 8
    assert [(few.domain[few.cell == cell] == "sums").sum() for cell in range(len(CELLS))] == [4, 1, 4]
    (live,) = (reading for reading in read_readings(run) if reading.step == 8)
    losses = dict(zip(zip(live.document, live.piece, strict=True), live.loss, strict=True))
    again = dict(zip(zip(few.document, few.piece, strict=True), few.loss, strict=True))
    shared = again.keys() & losses.keys()
    assert len(shared) >= 8
    assert all(again[member] == pytest.approx(losses[member], abs=1e-5) for member in shared)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Three models of transformers with a tokenizer, documents that count as trained on, and others."""
    pytest.importorskip("transformers")
    from tests.models.test_hf import random_olmoe

    folder = tmp_path_factory.mktemp("documents")
    rng = random.Random(9)
    written = {name: [write(rng, 12) for _ in range(80)] for name, write in (("stories", sentences), ("sums", sums))}
    tokenizer = train_tokenizer([text for texts in written.values() for text in texts], 320)
    models = {}
    for number, name in enumerate(("step5-tokens2B", "step10-tokens4B", "step20-tokens8B")):
        models[name] = random_olmoe(folder / name, seed=number, vocab_size=320 + 32)
        write_tokenizer(tokenizer, folder / name, 64)
    write_documents(folder, written, samples=8)
    return folder, models, tokenizer, written


def write_documents(folder, written, samples):
    """Settings for --data with half of each domain's texts, and for --unseen with the others."""
    half = len(next(iter(written.values()))) // 2
    for file, part in (("met", slice(0, half)), ("unseen", slice(half, None))):
        lines = [f"data:\n  seq_len: 64\n  cache_dir: {folder / 'cache'}\n  domains:\n"]
        for name, texts in written.items():
            path = folder / f"{file}_{name}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part]))
            lines.append(f"    {name}: {{path: {path}}}\n")
        lines.append(f"panel: {{tokens: 16, samples: {samples}}}\ntrain: {{precision: fp32, threads: 1}}\n")
        (folder / f"{file}.yaml").write_text("".join(lines))


def test_transformers_models_have_their_own_routing_and_loss(documents, tmp_path):
    folder, models, tokenizer, written = documents
    given = [str(folder / name) for name in reversed(models)]
    data = ["--data", str(folder / "met.yaml"), "--unseen", str(folder / "unseen.yaml")]
    assert replay.main([*given, *data, "--output", str(tmp_path / "replay")]) == 0
    readings = list(read_readings(tmp_path / "replay"))
    assert [reading.step for reading in readings] == [5, 10, 20]
    for reading, model in zip(readings, models.values(), strict=True):
        for cell in (SEEN, HELDOUT):
            for domain in written:
                assert ((reading.cell == cell) & (reading.domain == domain)).sum() == 8
        _compare(reading, model, tokenizer, written)
    points = scalars(tmp_path / "replay")
    last = readings[-1]
    seen = (last.cell == SEEN) & (last.domain == "sums")
    assert points["pathway/d_path/sums"][-1] == (20, pytest.approx(grokking.d_path(last.weights[seen]).mean, rel=1e-6))
    assert [step for step, _ in points["memorized/gap_heldout/stories"]] == [5, 10, 20]
    summary = json.loads((tmp_path / "replay" / "summary.json").read_text())
    assert summary["domains"]["sums"]["memorized"]["readings"] == 3
    assert load_settings(tmp_path / "replay" / "config.yaml").model.num_experts == 8


def pieces_of(tokenizer, written):
    """Domain and first tokens of each sample that is long enough for the panel."""
    pieces = []
    for domain, texts in written.items():
        for ids in map(tokenizer.encode, texts):
            samples = (ids[start : start + 62] for start in range(0, len(ids), 62))
            pieces += [(domain, [tokenizer.begin_id, *sample[:16]]) for sample in samples if len(sample) >= 16]
    return pieces


def _compare(reading, model, tokenizer, written):
    """Compare a reading with transformers' own router logits and loss, per sample."""
    pieces = pieces_of(tokenizer, written)
    tokens = torch.tensor([ids for _, ids in pieces])
    with torch.no_grad():
        output = model(tokens, output_router_logits=True)
    text_LBTE = torch.stack(output.router_logits).softmax(-1).view(3, len(tokens), 17, 8)[:, :, 1:]
    even, odd = (text_LBTE[:, :, half::2].mean(2).transpose(0, 1).numpy() for half in (0, 1))
    log = output.logits.log_softmax(-1)[:, :-1]
    loss = -log.gather(2, tokens[:, 1:, None])[..., 0].mean(1).numpy()
    for place in range(len(reading.cell)):
        nearest = int(np.abs(loss - reading.loss[place]).argmin())
        assert loss[nearest] == pytest.approx(reading.loss[place], abs=1e-5)
        assert pieces[nearest][0] == reading.domain[place]
        assert np.abs(even[nearest] - reading.even[place]).max() < 1e-3  # float16 on disk
        assert np.abs(odd[nearest] - reading.odd[place]).max() < 1e-3


def test_our_checkpoints_on_given_documents(run, documents, tmp_path):
    folder, *_ = documents
    more = ["--data", str(folder / "met.yaml"), "--output", str(tmp_path / "replay")]
    assert (
        replay.main([str(run / "checkpoints" / "step_00000004"), str(run / "checkpoints" / "step_00000012"), *more])
        == 0
    )
    first, last = read_readings(tmp_path / "replay")
    assert (first.step, last.step) == (4, 12)
    assert last.loss.mean() < first.loss.mean() - 0.1
    assert set(first.cell) == {SEEN}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--output", "{run}"], "nothing is overwritten"),
        (["{run}", "--unseen", "x.yaml"], "--unseen needs --data"),
        (["{met}/step5-tokens2B"], "transformers models need --data"),
        (["{run}/checkpoints/step_00000099"], "step_00000099: not a run or checkpoint"),
        (["./nowhere", "--data", "{met}/met.yaml"], "no step in its name, as in step5000-tokens20B: give --steps"),
        (["./nowhere-step3", "--data", "{met}/met.yaml"], "./nowhere-step3: no such folder"),
        (["{met}/step5-tokens2B", "--data", "{met}/none.yaml"], "no such configuration"),
        (
            ["{met}/step5-tokens2B", "--data", "{met}/met.yaml", "--steps", "1", "2"],
            "2 steps for 1 transformers models",
        ),
        (
            ["{met}/step5-tokens2B", "--data", "{met}/met.yaml", "data.seq_len=4096", "panel.tokens=4000"],
            "no document has panel.tokens=4000",
        ),
        (["{met}/step5-tokens2B", "{run}", "--data", "{met}/met.yaml"], "another tokenizer than"),
        (
            ["{met}/step5-tokens2B", "{met}/step10-tokens4B", "--data", "{met}/met.yaml", "--steps", "7", "7"],
            "a second model of step 7",
        ),
        (["{run}", "data.heldout_share=0.2"], "trained on other data or another tokenizer than"),
        (["{run}", "monitor.enabled=false"], "the run has no panel"),
        (["{run}", "{other}"], "two runs: replay one at a time"),
    ],
)
def test_errors_are_one_line(run, documents, tmp_path, capsys, arguments, message):
    if "{other}" in arguments:
        shutil.copytree(run, tmp_path / "other")
    places = {"run": run, "met": documents[0], "other": tmp_path / "other"}
    words = [argument.format(**places) for argument in arguments]
    if "--output" not in words:
        words += ["--output", str(tmp_path / "replay")]
    assert replay.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture
def others(documents, tmp_path):
    """A series of three: another shape at the second, truncated weights at the third."""
    from tests.models.test_hf import random_olmoe

    folder, *_ = documents
    random_olmoe(tmp_path / "step30", num_experts=4, vocab_size=352)
    shutil.copytree(folder / "step10-tokens4B", tmp_path / "step40")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "step5-tokens2B" / name, tmp_path / "step30")
    next((tmp_path / "step40").glob("*.safetensors")).write_bytes(b"cut off")
    return [str(path) for path in (folder / "step5-tokens2B", tmp_path / "step30", tmp_path / "step40")]


def test_models_of_different_shapes_are_an_error(documents, others, tmp_path, capsys):
    words = [*others[:2], "--data", str(documents[0] / "met.yaml"), "--output", str(tmp_path / "replay")]
    assert replay.main(words) == 2
    assert f"3 layers of 4 experts, {others[0]} 3 layers of 8 experts" in capsys.readouterr().err
    assert not (tmp_path / "replay").exists()


def test_readings_before_a_corrupt_model_are_kept(documents, others, tmp_path, capsys):
    words = ["--data", str(documents[0] / "met.yaml"), "--output", str(tmp_path / "replay")]
    assert replay.main([others[0], others[2], *words]) == 2
    assert "its weights cannot be read" in capsys.readouterr().err
    assert [reading.step for reading in read_readings(tmp_path / "replay")] == [5]
    assert list(json.loads((tmp_path / "replay" / "summary.json").read_text())["models"]) == ["5"]
    words[-1] = str(tmp_path / "nothing")
    assert replay.main([others[2], *words]) == 2
    assert not (tmp_path / "nothing").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        replay.main(["--help"])
    assert "python tools/replay.py runs/four_domains --output" in capsys.readouterr().out
