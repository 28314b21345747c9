"""What a run survives is told with the samples involved; what it cannot survive leaves a dump to replay."""

import math

import pytest
import torch

from moetrain.checkpoint.manager import list_checkpoints
from moetrain.checkpoint.run_folder import claim_run_folder
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.train import main, train
from moetrain.trainer import Trainer
from moetrain.training.errors import TrainingDivergedError
from moetrain.training.guards import Guards
from moetrain.training.step import update
from moetrain.training_loop import fit
from tests.conftest import small_run
from tests.trainer.reading import events, scalars
from tests.trainer.test_resume import stop_after
from tools import replay_step


def guard_events(run):
    return [event for event in events(run) if event["type"] == "guard"]


def test_a_run_that_diverges_skips_stops_and_leaves_a_dump_that_shows_why(
    corpus_folder, tmp_path, tmp_path_factory, capsys
):
    (tmp_path / "run.yaml").write_text("")
    base = [str(tmp_path / "run.yaml"), *small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())]
    diverging = [*base, "optim.learning_rate=1e30", "optim.warmup_steps=0", "guard.skipped=4", "guard.samples=3"]
    diverging += ["train.log_every=1", "train.checkpoint_every=2"]
    assert main(diverging) == 1
    run = tmp_path / "runs" / "run"
    dump = run / "dumps" / "step_00000005"
    said = capsys.readouterr().err
    assert (
        "step 5: the loss or the gradient was not finite in 4 steps in a row; see why with python tools/replay_step.py"
        in said
    )
    told = [event for event in guard_events(run) if "samples" in event]
    assert [event["step"] for event in told] == [2, 3, 4, 5]
    assert any("too large to compare" in event["problem"] for event in guard_events(run))
    assert all(len(event["samples"]) == 3 for event in told)
    assert all(sample["domain"] in ("stories", "sums") for event in told for sample in event["samples"])
    assert [step for step, _ in scalars(run)["loss/train"]] == [1]  # a skipped step draws no curve
    found = replay_step.replay(dump, torch.device("cpu"))
    assert found["step"] == 5
    assert not math.isfinite(found["gradients"][0][1])
    documents = {(domain, document) for domain, document, _, _ in found["samples"]}
    assert {(sample["domain"], sample["document"]) for sample in told[-1]["samples"]} <= documents
    # The same command goes on from the last checkpoint and comes to the same end; the dump is there already.
    assert list_checkpoints(run)
    before = (dump / "manifest.json").stat().st_mtime_ns
    assert main(diverging) == 1
    assert (dump / "manifest.json").stat().st_mtime_ns == before


def test_other_ranks_are_patient_while_a_checkpoint_or_a_dump_is_written(make_settings, monkeypatch):
    at_once = "train.background_checkpoints=false"  # a thread lets no rank wait
    settings = make_settings("optim.learning_rate=1e30", "optim.warmup_steps=0", "guard.skipped=2", at_once)
    run = Trainer.build(settings)
    folder = claim_run_folder(settings, run.layout)
    written = []

    def note(point):
        written.append((point, run.layout.progress.finished_steps > 0, run.layout.progress.excused))

    monkeypatch.setattr("moetrain.checkpoint.manager.fault_point", note)
    try:
        with pytest.raises(TrainingDivergedError):
            fit(run, folder)
        run.save(folder.path)
    finally:
        run.close()
        folder.release()
    assert [point for point, _, _ in written].count("write model.safetensors") == 2
    assert all(training and excused for _, training, excused in written)
    assert not run.layout.progress.excused


def test_a_dump_shows_where_the_first_number_breaks_and_in_which_samples(make_settings, tmp_path, monkeypatch, capsys):
    def poisoned(layout, model, *arguments):
        done = update(layout, model, *arguments)
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.inf
        return done

    monkeypatch.setattr("moetrain.trainer.update", poisoned)
    (tmp_path / "run.yaml").write_text(make_settings("guard.skipped=2").to_yaml())
    assert main([str(tmp_path / "run.yaml")]) == 1
    (dump,) = (tmp_path / "runs" / "run" / "dumps").iterdir()
    found = replay_step.replay(dump, torch.device("cpu"))
    assert found["first"].startswith("the first non-finite output is that of model.layers.1.self_attn.q_proj")
    broken = [(domain, document) for domain, document, _, loss in found["samples"] if not math.isfinite(loss)]
    told = next(event["samples"] for event in reversed(guard_events(tmp_path / "runs" / "run")) if "samples" in event)
    assert {(sample["domain"], sample["document"]) for sample in told if sample["loss"] is None} <= set(broken)
    assert broken
    capsys.readouterr()
    assert replay_step.main([str(dump)]) == 0
    assert "model.layers.1.self_attn.q_proj" in capsys.readouterr().out.replace("\n", "")
    assert replay_step.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_spikes_and_dead_experts_are_events_with_their_samples(make_settings, tmp_path):
    alarmed = ("guard.spike=0.5", "guard.spike_window=4", "guard.dead_steps=1", "guard.samples=2")
    noise = ("optim.learning_rate=1e-6", "train.batch_rows=2")  # a loss that goes up and down, and few tokens a step
    assert train(make_settings(*alarmed, *noise, "model.num_experts=32", "model.num_experts_per_tok=1")) == 0
    told = {kind: [e for e in guard_events(tmp_path / "runs" / "run") if e.get("kind") == kind] for kind in _KINDS}
    spike, dead = told["loss_spike"][0], told["dead_experts"][0]
    assert spike["loss"] > spike["mean"] + 0.5 * (spike["loss"] - spike["mean"]) / spike["deviations"] - 1e-9
    assert spike["samples"][0]["loss"] >= spike["samples"][1]["loss"] > 0
    assert dead["dead_by_layer"][dead["experts"][0][0]] >= 1
    assert 1 >= dead["samples"][0]["share"] >= dead["samples"][1]["share"] > 0


_KINDS = ("loss_spike", "dead_experts")


def test_what_a_device_tells_a_step_late_is_told_before_a_checkpoint_and_once(make_settings, tmp_path, monkeypatch):
    alarmed = ("guard.dead_steps=1", "guard.samples=1", "train.batch_rows=2", "train.max_steps=6")
    alarmed += ("model.num_experts=32", "model.num_experts_per_tok=1", "train.checkpoint_every=2")
    settings = make_settings(*alarmed)
    assert train(settings) == 0
    hear = Guards._evaluate
    monkeypatch.setattr(
        Guards, "_evaluate", lambda self, keep_pending: hear(self, 1)
    )  # as on CUDA: of a step during the next
    monkeypatch.setattr(Guards, "settle", lambda self: hear(self, 0))
    stop_after(monkeypatch, 4)
    assert train(settings) == STOPPED_BY_SIGNAL
    stop_after(monkeypatch, 10**9)
    assert train(settings) == 0
    at_once, late = (guard_events(tmp_path / "runs" / name) for name in ("run", "run-2"))
    assert {4, 6} <= {event["step"] for event in at_once}  # a checkpoint's step, and the last
    assert late == at_once
