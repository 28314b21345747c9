"""A run goes on from a checkpoint with more steps or other data, as a run of its own."""

import json
import random
import shutil

import numpy as np
import pytest

from moetrain.checkpoint.extension import extended_settings
from moetrain.checkpoint.manager import CheckpointError, checkpoint_folder
from moetrain.checkpoint.run_folder import may_differ
from moetrain.config import SettingsError, load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import run_steps, training_stream
from moetrain.distributed.signals import STOPPED_BY_SIGNAL
from moetrain.optim.schedule import learning_rate
from moetrain.routing.panel import HELDOUT, SEEN, draw_panel
from moetrain.train import train
from tests.conftest import sentences, small_run
from tests.trainer.reading import events, scalars, states
from tests.trainer.test_resume import stop_after

KEEP = ("train.checkpoint_every=3", "train.keep_checkpoints=99", "train.log_every=1", "monitor.every=3")
WSD = ("optim.schedule=wsd", "optim.decay_share=0.25")


class Runs:
    """Runs by name, each trained when it is first needed; not to be written to."""

    def __init__(self, corpus, folder, cache):
        self.folder, self.base = folder, [*small_run(corpus, folder, cache), *KEEP]

    def settings(self, name, *more):
        return load_settings(None, [*self.base, f"run.name={name}", *more])

    def run(self, name, *more):
        path = self.folder / "runs" / name
        if not (path / "summary.json").exists():
            assert train(self.settings(name, *more)) == 0
        return path


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    made = Runs(corpus_folder, tmp_path_factory.mktemp("extension"), tmp_path_factory.getbasetemp())
    rng = random.Random(5)
    lines = [json.dumps({"text": f"New {number}. " + sentences(rng, rng.randint(2, 12))}) for number in range(150)]
    (corpus_folder / "more.jsonl").write_text("\n".join(lines) + "\n")
    return made


def resume(run, step):
    return f"train.resume={checkpoint_folder(run, step)}"


CONSTANT = ("optim.schedule=constant",)
CASES = {"constant": (CONSTANT, 12), "wsd": (WSD, 9), "muon": ((*CONSTANT, "optim.name=muon"), 6)}


@pytest.mark.parametrize("schedule", CASES)
def test_twelve_steps_and_twelve_more_are_twenty_four(runs, schedule):
    how, step = CASES[schedule]
    first = runs.run(f"{schedule}-first", *how)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    longer = runs.run(f"{schedule}-longer", *how, "train.max_steps=24", resume(first, step))
    once = runs.run(f"{schedule}-once", *how, "train.max_steps=24")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    for at in (15, 24):
        actual, expected = (states(checkpoint_folder(run, at)) for run in (longer, once))
        same = [
            key for key in expected if key.startswith(("model/", "optimizer/", "balancing/", "monitor/", "exposures/"))
        ]
        assert len(same) > 100
        assert [key for key in same if actual[key].numpy().tobytes() != expected[key].numpy().tobytes()] == []
    actual, expected = scalars(longer), scalars(once)
    assert actual.keys() == expected.keys()
    # The panel was drawn for twelve steps. All else is the same, from the first step on.
    follows = (
        "Verdict/",
        "loss/panel",
        "pathway",
        "memorized/",
        "kernel",
        "phase",
        "correlation",
        "delay",
        "experts/rank",
    )
    for tag in actual:
        if not tag.startswith(follows) or tag.startswith("memorized/excess"):
            assert actual[tag] == expected[tag], tag
    assert [point[0] for point in actual["optim/learning_rate"]] == list(range(1, 25))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (longer, once)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert summaries[0]["data"] == summaries[1]["data"]


def test_panel_and_its_curves_go_on(runs):
    first = runs.run("constant-first", *CONSTANT)
    longer = runs.run("constant-longer", *CONSTANT, "train.max_steps=24", resume(first, 12))
    before, after = scalars(first), scalars(longer)
    for tag in ("loss/panel_seen/sums", "loss/panel_heldout/sums", "pathway/d_path/sums", "memorized/gap_heldout/sums"):
        steps = [step for step, _ in after[tag]]
        assert after[tag][: len(before[tag])] == before[tag]
        assert [step for step in steps if step > 12] == [16, 24], tag
    own, its = (states(checkpoint_folder(run, step))["panel/losses"] for run, step in ((first, 12), (longer, 24)))
    assert its[: len(own)].equal(own)
    assert len(its) == len(own) + 2
    assert [event["step"] for event in events(longer) if event["type"] == "resume"] == [12]


def test_a_run_decays_from_any_kept_checkpoint(runs):
    first = runs.run("constant-first", *CONSTANT)
    decay = ("optim.schedule=wsd", "optim.decay_share=0.3333", "train.max_steps=9")
    decayed = runs.run("decayed", *decay, resume(first, 6))
    rates = [rate for _, rate in scalars(decayed)["optim/learning_rate"]]
    assert rates[2:6] == pytest.approx([0.01] * 4)
    assert rates[6:] == pytest.approx([0.007, 0.004, 0.001], rel=1e-4)
    assert scalars(decayed)["loss/train"][:6] == scalars(first)["loss/train"][:6]


NEW = ("data.domains.more.path=more.jsonl", "train.max_steps=24")


def test_an_added_domain_joins_and_no_document_comes_twice(runs):
    first = runs.run("constant-first", *CONSTANT)
    wider = runs.run("wider", *CONSTANT, *NEW, "run.report=true", resume(first, 9))
    settings = load_settings(wider / "config.yaml")
    corpus = prepare_corpus(settings)
    stream = training_stream(corpus, settings)
    original = load_settings(first / "config.yaml")
    old = training_stream(prepare_corpus(original), original)
    assert stream.trained(9).tolist() == old.trained(9).tolist()
    assert len(np.unique(stream.rows.samples)) == len(stream.rows.samples) == len(stream.samples)
    domains = stream.samples.domain[stream.trained(24)[len(stream.trained(9)) :]]
    assert set(domains.tolist()) == {0, 1, 2}
    panel = draw_panel(corpus, stream, settings, run_steps(stream, settings), 4)
    was = draw_panel(prepare_corpus(original), old, original, 12, 4)
    assert panel.samples.document[: len(was)].tolist() == was.samples.document.tolist()
    seen = panel.members(2, SEEN)
    assert len(seen) > 0
    assert (panel.first_step[seen] >= 10).all()
    assert (panel.first_step[seen] <= 11).all()  # the first tenth of the fifteen steps from 10 on
    assert len(panel.members(2, HELDOUT)) > 0
    points = scalars(wider)
    assert points["loss/train/more"][0][0] >= 10
    assert points["loss/panel_heldout/more"][0][0] == 16
    assert points["memorized/share/more"]
    steps = [step for step, _ in points["loss/panel_heldout/sums"]]
    assert steps == [0, 4, 8, 16, 24]
    assert points["loss/panel_heldout/sums"][:3] == scalars(first)["loss/panel_heldout/sums"][:3]
    summary = json.loads((wider / "summary.json").read_text())
    assert summary["domains"].keys() == {"stories", "sums", "more"}
    assert summary["data"]["more"]["met_tokens"] > 0
    assert (wider / "report.html").stat().st_size > 10_000


def test_an_extension_is_resumed_by_the_same_command_and_extended_again(runs, monkeypatch):
    first = runs.run("constant-first", *CONSTANT)
    wider = runs.run("wider", *CONSTANT, *NEW, resume(first, 9))
    killed = ("again", *CONSTANT, *NEW, resume(first, 9))
    for stop in (1, 4):
        stop_after(monkeypatch, stop)
        assert train(runs.settings(*killed)) == STOPPED_BY_SIGNAL
    monkeypatch.undo()
    assert train(runs.settings(*killed)) == 0
    again = runs.folder / "runs" / "again"
    assert not (runs.folder / "runs" / "again-2").exists()
    actual, expected = (states(checkpoint_folder(run, 24)) for run in (again, wider))
    assert [key for key in expected if actual[key].numpy().tobytes() != expected[key].numpy().tobytes()] == []
    assert scalars(again) == scalars(wider)
    more = runs.run("third", *CONSTANT, NEW[0], "train.max_steps=27", resume(wider, 24))
    straight = runs.run("third-once", *CONSTANT, NEW[0], "train.max_steps=27", resume(first, 9))
    actual, expected = (states(checkpoint_folder(run, 27)) for run in (more, straight))
    same = [key for key in expected if key.startswith(("model/", "optimizer/", "exposures/"))]
    assert [key for key in same if actual[key].numpy().tobytes() != expected[key].numpy().tobytes()] == []


def test_the_copy_that_an_extension_began_with_is_refused_and_the_remedy_works(runs):
    first = runs.run("constant-first", *CONSTANT)
    longer = runs.run("constant-longer", *CONSTANT, "train.max_steps=24", resume(first, 12))
    settings = runs.settings("again", *CONSTANT, "train.max_steps=30", resume(longer, 12))
    with pytest.raises(
        SettingsError, match=r"is a copy of the checkpoint that .* went on from: set train.resume="
    ) as e:
        extended_settings(settings, may_differ(settings))
    remedy = str(e.value).partition(": set ")[2].partition(",")[0]
    assert remedy == resume(first, 12)
    settings = runs.settings("again", *CONSTANT, "train.max_steps=30", remedy)
    assert [stage.steps for stage in extended_settings(settings, may_differ(settings)).data.earlier] == [12]


def test_a_tokenizer_that_went_with_a_deleted_run_is_told_and_the_remedy_works(runs, tmp_path):
    folder = tmp_path / "later"
    shutil.copytree(runs.run("constant-first", *CONSTANT), folder)
    gone = tmp_path / "deleted" / "tokenizer.model"
    settings = runs.settings("later", *CONSTANT, f"tokenizer.model={gone}", "train.max_steps=30", resume(folder, 12))
    (folder / "config.yaml").write_text(runs.settings("later", *CONSTANT, f"tokenizer.model={gone}").to_yaml())
    with pytest.raises(SettingsError, match=r"is not at .* any more: copy .* to that place") as error:
        extended_settings(settings, may_differ(settings))
    gone.parent.mkdir()
    shutil.copyfile(str(error.value).partition(": copy ")[2].removesuffix(" to that place"), gone)
    assert extended_settings(settings, may_differ(settings)).data.earlier[-1].steps == 12


def test_a_changed_mixture_weighs_what_is_left(runs):
    first = runs.run("constant-first", *CONSTANT)
    weights = ("data.mixture=weights", "data.domains.stories.weight=1", "data.domains.sums.weight=9")
    run = runs.run("weighed", *CONSTANT, *weights, "train.max_steps=18", resume(first, 6))
    settings = load_settings(run / "config.yaml")
    stream = training_stream(prepare_corpus(settings), settings)
    later = stream.trained(18)[len(stream.trained(6)) :]
    tokens = np.bincount(stream.samples.domain[later], weights=stream.samples.row_lengths[later])
    assert tokens[1] / tokens.sum() == pytest.approx(0.9, abs=0.03)
    assert len(np.unique(stream.rows.samples)) == len(stream.rows.samples)


def refused(runs, *overrides):
    with pytest.raises((SettingsError, CheckpointError)) as caught:
        train(runs.settings("refused", *overrides))
    assert not (runs.folder / "runs" / "refused").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_go_on_is_told_in_one_line_and_its_remedy_works(runs, corpus_folder, tmp_path):
    first = runs.run("constant-first", *CONSTANT)
    longer = (*CONSTANT, "train.max_steps=24", resume(first, 12))
    assert "is finished: to go on from step_00000012, set a larger train.max_steps" in refused(
        runs, *longer[:1], longer[2]
    )
    said = refused(runs, *longer, "optim.eps=1e-6")
    assert "another optim.eps" in said
    assert "set optim.eps=1e-08" in said
    assert "set data.domains.sums.path=" in refused(runs, *longer, "data.domains.sums.path=more.jsonl")
    assert "set train.max_steps above" not in refused(runs, *longer, "train.max_steps=11")
    assert "has trained 12 steps: set a number above that" in refused(runs, *longer, "train.max_steps=11")
    assert "another tokenizer.vocab_size" in refused(runs, *longer, "tokenizer.vocab_size=330")
    # Domain files that changed in their place.
    data = shutil.copytree(corpus_folder, tmp_path / "data")
    moved = runs.run("moved", *CONSTANT, f"data.root={data}")
    with (data / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document " * 5}) + "\n")
    said = refused(runs, *CONSTANT, f"data.root={data}", "train.max_steps=24", resume(moved, 12))
    assert "trained with other documents of its domains: restore their files" in said
    cosine = runs.run("cosine")
    said = refused(runs, "train.max_steps=24", resume(cosine, 12))
    assert "the learning rate would jump from 0.001 to 0.00" in said
    remedy = said.partition(": set ")[2].split()
    assert remedy == ["optim.schedule=wsd", "optim.learning_rate=0.001"]
    goes_on = runs.run("cosine-longer", "train.max_steps=24", resume(cosine, 12), *remedy)
    rates = [rate for step, rate in scalars(goes_on)["optim/learning_rate"] if step > 12]
    assert max(rates) == pytest.approx(0.001)
    decayed = runs.run("wsd-first", *WSD)
    said = refused(runs, *WSD, "train.max_steps=24", resume(decayed, 12))
    assert said.endswith(f", or {resume(decayed, 9)}, where the rate was at its peak")


def test_a_learning_rate_that_drops_at_once_is_told_with_both_rates(runs, capsys):
    first = runs.run("constant-first", *CONSTANT)
    longer = ("train.max_steps=16", resume(first, 12))

    def told(*words):
        assert train(runs.settings("dropping", *longer, *words), check=True) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]

    (line,) = told("optim.schedule=cosine")
    rate = learning_rate(13, 16, runs.settings("dropping", *longer, "optim.schedule=cosine").optim)
    assert line == (
        f"optim.schedule=cosine: the learning rate drops from 0.01 to {rate:g} at step 13, where the run goes on: to "
        "keep it, set optim.schedule=constant optim.learning_rate=0.01"
    )
    assert rate < 0.005
    assert len(told("optim.schedule=constant", "optim.learning_rate=0.002")) == 1
    assert told("optim.schedule=constant", "optim.learning_rate=0.01") == []  # the remedy
    assert told("optim.schedule=wsd", "optim.decay_share=0.25") == []  # which decays from there


def test_changed_documents_are_named_where_the_tokenizer_is_given_and_the_remedy_works(runs, corpus_folder, tmp_path):
    first = runs.run("constant-first", *CONSTANT)
    data = shutil.copytree(corpus_folder, tmp_path / "data")
    given = (*CONSTANT, f"data.root={data}", f"tokenizer.model={first / 'tokenizer.model'}")
    run = runs.run("given", *given)
    with (data / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document " * 5}) + "\n")
    said = refused(runs, *given, "train.max_steps=24", resume(run, 12))
    assert "trained with other documents of data.domains.sums: restore its files" in said
    shutil.copyfile(corpus_folder / "sums.jsonl", data / "sums.jsonl")
    added = ("data.domains.more.path=more.jsonl", "train.max_steps=15")
    runs.run("given-wider", *given, *added, resume(run, 12))


def test_a_stream_that_was_trained_to_its_end_needs_new_text(runs):
    short = (
        *CONSTANT,
        "data.domains.stories.limit=60",
        "data.domains.sums.limit=60",
        "train.max_steps=null",
    )
    run = runs.run("short", *short)
    last = sorted((run / "checkpoints").iterdir())[-1]
    said = refused(runs, *short[:-1], "train.max_steps=500", f"train.resume={last}")
    assert "has trained on all of its stream: add text as a new domain" in said


def test_settings_of_any_other_run_stay(runs, tmp_path):
    settings = runs.settings("plain")
    assert extended_settings(settings, may_differ(settings)) is settings
    # A calibrated number of readings is no change.
    first = shutil.copytree(runs.run("constant-first", *CONSTANT), tmp_path / "runs" / "calibrated")
    (first / "summary.json").unlink()
    auto = runs.settings("calibrated", *CONSTANT, "monitor.budget=auto", resume(first, 12))
    readings = auto.panel.model_copy(update={"readings": 99})
    (first / "config.yaml").write_text(auto.model_copy(update={"panel": readings}).to_yaml())
    assert extended_settings(auto, may_differ(auto)) == auto
    record = checkpoint_folder(first, 12) / "record.json"
    record.write_text(record.read_text().replace("planned_steps", "unplanned_steps"))
    longer = runs.settings("calibrated", *CONSTANT, "monitor.budget=auto", "train.max_steps=24", resume(first, 12))
    with pytest.raises(CheckpointError, match=r"an earlier version wrote it.*export_hf\.py"):
        extended_settings(longer, may_differ(longer))
