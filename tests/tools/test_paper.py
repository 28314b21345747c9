"""The paper's figures and tables on a tiny run, against numbers computed from its files by slow references."""

import csv
import json
import math
import random
import re

import numpy as np
import paper
import pytest
import torch
from scipy import stats

from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.data.instructions import Example
from moetrain.grokking.paper import CORRELATIONS
from moetrain.paper import correlations, instructed, learning, norms, pathways, robustness
from moetrain.paper.catalogue import ENTRIES
from moetrain.paper.groups import DomainSamples
from moetrain.probes.fine_tuning import LoraSettings
from moetrain.probes.membership import membership_scores, without_members
from moetrain.probes.tasks import read_entries, tasks_of
from moetrain.report.open_run import open_run
from moetrain.routing.store import read_reading
from moetrain.train import train
from tests.conftest import small_run
from tests.grokking import references as ref
from tests.grokking.test_membership import reference
from tests.report.recorded import Recorded
from tools.common import ROOT

DELTA = 0.6  # nats: the losses of a run of 12 steps still fall


@pytest.fixture(scope="module")
def folder(corpus_folder, tmp_path_factory):
    """A run of 12 steps with a reading of panel and probes at each of them, and a checkpoint at every third."""
    out = tmp_path_factory.mktemp("paper")
    base = small_run(corpus_folder, out, tmp_path_factory.getbasetemp())
    more = ["panel.readings=13", f"panel.delta={DELTA}", "probes.tasks=[quiz.jsonl]", "probes.readings=13"]
    kept = ["train.checkpoint_every=3", "train.keep_every=3", "panel.repeat_every=0", "panel.claim_every=0"]
    assert train(load_settings(None, [*base, *more, *kept])) == 0
    return out / "runs" / "run"


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """All figures and tables that need no fine-tuning, as JSON by name."""
    out = tmp_path_factory.mktemp("written")
    assert paper.main(["all", str(folder), "--output", str(out), "--pairs", "500", "--delta", "0.4", "0.6"]) == 0
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    for name in found:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with open(out / f"{name}.csv") as file:
            assert len(list(csv.DictReader(file))) == len(found[name]["rows"])
    return found


def slow_groups(folder, domain):
    """Onset of each seen sample by the paper's rule, tried reading by reading, and eps by trying all."""
    panel = Recorded(folder).panel
    losses = np.stack(
        [rows[(rows["domain"] == domain) & (rows["cell"] == "seen")]["loss"] for rows in panel.values()], axis=1
    ).astype(float)

    def onsets(eps):
        found = []
        for row in losses:
            first = [t for t in range(len(row)) if all(x <= eps and abs(x - row[-1]) <= DELTA for x in row[t:])]
            found.append(first[0] if first and first[0] + 3 < len(row) else -1)
        return np.array(found)

    eps = next(e / 10 for e in range(1, 100) if (onsets(e / 10) >= 0).mean() >= 0.2 - 1e-9)
    return eps, onsets(eps), losses, list(panel)


def seen_weights(folder, step, domain):
    stored = read_reading(folder, step)
    return stored.weights[(stored.domain == domain) & (stored.cell == 0)]


def test_figure1_counts_what_the_rule_counts_and_the_answers_that_are_right(folder, written):
    eps, onsets, _, steps = slow_groups(folder, "sums")
    assert written["figure1"]["facts"]["sums"]["eps"] == eps
    rows = [row for row in written["figure1"]["rows"] if row["panel"] == "sums"]
    shares = {row["step"]: row for row in rows if row["series"] == "memorized share"}
    assert len(shares) == 13
    for t, step in enumerate(steps):
        held = (onsets >= 0) & (onsets <= t)
        assert shares[step]["value"] == held.mean()
        assert shares[step]["samples"] == held.sum()
        assert shares[step]["new"] == (onsets == t).sum()
        assert shares[step]["low"] <= held.mean() <= shares[step]["high"]
    probes = Recorded(folder).probes
    for row in rows:
        if row["series"] == "accuracy":
            own = probes[row["step"]]
            own = own[own["task"] == "adding"]["correct"]
            assert (row["value"], row["n"]) == (pytest.approx(own.mean()), len(own))


def test_figure4_has_the_distances_of_its_groups_and_their_slopes(folder, written):
    found = written["figure4"]
    _, onsets, losses, steps = slow_groups(folder, "sums")
    rows = [row for row in found["rows"] if row["panel"] == "sums" and row["series"].startswith("memorized at")]
    assert rows
    names = list(dict.fromkeys(row["series"] for row in rows))
    assert len(names) <= 2
    for name in names:
        t = steps.index(int(name.split()[-1]))
        members = np.flatnonzero(onsets == t)
        own = [row for row in rows if row["series"] == name]
        assert own[0]["n"] == len(members) > 1
        for place, row in enumerate(own):
            if place % 4 == 0:
                weights = seen_weights(folder, row["step"], "sums")[members]
                assert row["value"] == pytest.approx(ref.mean_distance_within(weights, 0.7, False))
            assert row["loss"] == pytest.approx(losses[members, place].mean())
        (fit,) = [each for each in found["facts"]["fits"] if (each["panel"], each["series"]) == ("sums", name)]
        values = np.array([row["value"] for row in own])
        line = stats.linregress(steps[t:], values[t:])
        assert fit["slope_per_1000_steps"] == pytest.approx(1000 * line.slope)
        assert fit["readings"] == len(steps) - t
        assert fit["from_step"] == steps[t]
    quadratic = next(each for each in found["facts"]["fits"] if each["panel"] == "all domains")
    overall = [row["value"] for row in found["rows"] if row["panel"] == "all domains"]
    assert quadratic["fit"] == pytest.approx(np.polyfit(steps, overall, 2).tolist())
    per_domain = [
        np.mean([ref.mean_distance_within(seen_weights(folder, 6, domain), 0.7, False)])
        for domain in ("stories", "sums")
    ]
    assert overall[6] == pytest.approx(np.mean(per_domain))


def test_figure4_has_its_controls(folder, written):
    rows = [row for row in written["figure4"]["rows"] if row["panel"] == "stories" and row["step"] == 8]
    by_name = {row["series"]: row for row in rows}
    stored = read_reading(folder, 8)
    heldout = stored.weights[(stored.domain == "stories") & (stored.cell == 2)]
    assert by_name["held out"]["value"] == pytest.approx(ref.mean_distance_within(heldout, 0.7, False))
    _, onsets, _, _ = slow_groups(folder, "stories")
    rest = seen_weights(folder, 8, "stories")[onsets < 0]
    if len(rest) > 1:
        expected = ref.mean_distance_within(rest, 0.7, False)
        assert by_name["trained on, not memorized"]["value"] == pytest.approx(expected)


def test_figure5_is_the_distance_within_each_layer(folder, written):
    rows = [row for row in written["figure5"]["rows"] if row["step"] == 12]
    assert [row["panel"] for row in rows] == ["layer 0", "layer 1", "layer 2"]
    facts = written["figure5"]["facts"]
    _, onsets, _, steps = slow_groups(folder, facts["domain"])
    members = np.flatnonzero(onsets == steps.index(facts["group"]))
    weights = seen_weights(folder, 12, facts["domain"])[members]
    for layer, row in enumerate(rows):
        assert row["value"] == pytest.approx(ref.mean_distance_within(weights[:, [layer]], 0.7, False))


def test_figure6_is_the_guarded_median_of_the_inconsistency(folder, written):
    run = open_run(folder)
    samples = DomainSamples(run, "sums")
    group = samples.early_groups()[0]
    rows = [row for row in written["figure6"]["rows"] if row["panel"] == "sums" and row["series"] == group.name]
    router = open_model(folder / "checkpoints" / "step_00000012").model
    rows_LED = np.stack([layer.mlp.gate.weight.detach().numpy() for layer in router.model.layers])
    values = []
    for weights_LE in seen_weights(folder, 12, "sums")[group.members]:
        cosines = ref.layer_cosines(weights_LE, rows_LED)
        if max(cosines) > 0.05:
            values.append(1 - np.mean(cosines) / (max(cosines) + 1e-8))
    assert rows[-1]["value"] == pytest.approx(np.median(values), rel=1e-4)


def test_figures_9_to_11_repeat_figure_4_under_other_thresholds(folder, written):
    nine, ten, eleven = (written[f"figure{number}"] for number in (9, 10, 11))
    domain = nine["facts"]["domain"]
    _, onsets, losses, steps = slow_groups(folder, domain)
    assert [*dict.fromkeys(row["panel"] for row in nine["rows"])] == [f"tau = {tau}" for tau in robustness.TAUS]
    for row in nine["rows"]:
        if row["step"] == 9:
            members = np.flatnonzero(onsets == steps.index(int(row["series"].split()[-1])))
            weights = seen_weights(folder, 9, domain)[members]
            tau = float(row["panel"].split()[-1])
            assert row["value"] == pytest.approx(ref.mean_distance_within(weights, tau, False))
    for found, of_panel in (
        (ten, lambda value: (value, DELTA)),
        (eleven, lambda value: (eleven["facts"]["eps"], value)),
    ):
        for row in found["rows"]:
            eps, delta = of_panel(float(row["panel"].split()[-1]))
            t = steps.index(int(row["series"].split()[-1]))
            tail = losses[:, t:]
            holds = (tail <= eps) & (abs(tail - losses[:, -1:]) <= delta)
            before = losses[:, t - 1] if t else np.full(len(losses), np.inf)
            earlier = (before <= eps) & (abs(before - losses[:, -1]) <= delta)
            assert row["n"] == (holds.all(1) & ~earlier).sum()
    assert ten["facts"]["delta"] == DELTA
    assert eleven["facts"]["eps"] == max(ten["facts"]["eps"])


def test_figure12_is_the_distance_across_domains(folder, written):
    (row,) = [row for row in written["figure12"]["rows"] if row["series"] == "between" and row["step"] == 5]
    a, b = (seen_weights(folder, 5, domain) for domain in ("stories", "sums"))
    each = [ref.levenshtein(ref.pathway(x, 0.7), ref.pathway(y, 0.7)) for x in a for y in b]
    assert row["value"] == pytest.approx(np.mean(each))
    assert row["pairs"] == len(a) * len(b)
    assert row["low"] < row["value"] < row["high"]


def test_a_slope_over_too_few_readings_is_not_told():
    none = {"slope": np.nan, "low": np.nan, "high": np.nan, "n": 2}
    assert robustness.slope_in_words("a", none) == "a: too few readings for a slope: 2 readings after the first step"
    three = {"slope": 2.0, "low": 1.0, "high": 3.0, "n": 3}
    assert robustness.slope_in_words("a", three).startswith("a: +2 (+1 to +3) edits per 1,000 steps")


def test_figure13_correlates_entropy_and_distance_of_pairs(folder):
    found = pathways.entropy_and_distance(open_run(folder), pairs=10**6)  # all pairs
    entropy, distance = [], []
    for step in (4, 5):
        weights = np.concatenate([seen_weights(folder, step, domain) for domain in ("stories", "sums")])
        own = [-sum(p * math.log(p) for p in layers.ravel() if p > 0) / len(layers) for layers in weights]
        paths = [ref.pathway(each, 0.8) for each in weights]
        pairs = [(i, j) for j in range(len(paths)) for i in range(j)]
        entropy.append([(own[i] + own[j]) / 2 for i, j in pairs])
        distance.append([ref.levenshtein(paths[i], paths[j]) for i, j in pairs])
        expected = np.corrcoef(entropy[-1], distance[-1])[0, 1]
        assert found.rows[step]["value"] == pytest.approx(expected)
        assert found.rows[step]["pairs"] == len(pairs)
    assert found.rows[-1]["series"] == "all readings"
    assert found.rows[-1]["pairs"] == 13 * len(pairs)
    few = pathways.entropy_and_distance(open_run(folder), pairs=130)
    assert few.facts["pairs"] == 130


def test_figure3_shows_the_closest_and_the_farthest_pair(folder, written):
    paths = [ref.pathway(each, 0.7) for each in seen_weights(folder, 12, "stories")]
    every = [ref.levenshtein(paths[i], paths[j]) for j in range(len(paths)) for i in range(j)]
    rows = written["figure3"]["rows"]
    assert [row["distance"] for row in rows] == [min(every)] * 2 + [max(every)] * 2
    assert all(row["pathway"].count("-") == 2 for row in rows)


def test_table2_lists_the_data(folder, written):
    rows = {row["panel"]: row for row in written["table2"]["rows"]}
    assert rows["sums"]["source"] == "sums.jsonl"
    assert rows["sums"]["test"] == "adding (60)"
    panel = Recorded(folder).panel[12]
    for cell in ("seen", "to_come", "heldout"):
        expected = ((panel["domain"] == "stories") & (panel["cell"] == cell)).sum()
        assert rows["stories"][f"panel_{cell}"] == expected > 0


def test_table3_follows_the_norms_of_the_checkpoints(folder, written):
    assert written["table3"]["facts"]["steps"] == [3, 6, 9, 12]
    by_kind = {row["kind"]: row for row in written["table3"]["rows"]}
    series = []
    for step in (3, 6, 9, 12):
        model = open_model(folder / "checkpoints" / f"step_{step:08d}").model
        series.append([float(layer.mlp.gate.weight.detach().double().norm()) for layer in model.model.layers])
    changes = np.abs(np.diff(series, axis=0)).mean(1) / np.mean(series)
    assert by_kind["router"]["speed"] == pytest.approx(changes[0] - changes[2])
    assert by_kind["router"]["stability"] == pytest.approx(1 / changes.std())
    assert by_kind["router"]["n"] == 3
    assert by_kind["expert"]["n"] == 3 * 8 * 2  # two projections of each expert
    assert by_kind["attention"]["n"] == 3 * 4
    assert by_kind["router"]["paper_speed"] == 0.151
    state = {"model.layers.0.mlp.experts.down_proj": torch.arange(8.0).view(2, 2, 2)}
    assert norms.matrix_norms(state)["expert"] == pytest.approx([math.sqrt(14), math.sqrt(126)])


def test_table5_correlates_each_tasks_answers(folder, written):
    rows = written["table5"]["rows"]
    probes = Recorded(folder).probes
    accuracy = {
        row["step"]: row["value"] for row in rows if row["predictor"] == "accuracy" and row["panel"] == "adding"
    }
    assert accuracy == {
        step: pytest.approx(own[own["task"] == "adding"]["correct"].mean()) for step, own in probes.items()
    }


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_a_correlation_is_scipys_with_fishers_interval(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=7)
    y = x + rng.normal(size=7)
    y[2] = np.nan
    found = correlations.correlation(x, y, method)
    known = np.isfinite(y)
    expected = (stats.pearsonr if method == "pearson" else stats.spearmanr)(x[known], y[known])
    assert (found["value"], found["p"], found["n"]) == (expected.statistic, expected.pvalue, 6)
    assert found["low"] < found["value"] < found["high"]
    if method == "pearson":
        low, high = expected.confidence_interval()
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    assert correlations.correlation(x[:3], y[:3], method)["note"] == "2 checkpoints: fewer than 4"
    assert correlations.correlation(np.ones(5), x[:5], method)["note"] == "constant"


def test_correlations_begin_where_accuracy_exceeds_chance_and_stand_beside_the_papers():
    values = np.array([0.25, 0.25, 0.6, 0.7, 0.72, 0.8, 0.85, 0.9, 0.91, 0.94, 0.95, 0.97])
    accuracy = correlations.Accuracy("math", "math", np.arange(12) * 10, values, 200, 0.25)
    assert accuracy.first == 2
    falling = np.linspace(9, 3, 12)
    rows = correlations.correlation_rows(accuracy, {"d_path_memorized": falling})
    pearson = rows[0]
    assert pearson["value"] == pytest.approx(np.corrcoef(falling[2:], values[2:])[0, 1])
    assert pearson["n"] == 10
    assert pearson["paper"] == CORRELATIONS["d_path"]["math"]["raw pearson"]
    assert math.isnan(pearson["differences_value"])  # a straight line has constant differences
    flat = correlations.Accuracy("math", "math", np.arange(12) * 10, np.full(12, 0.25), 200, 0.25)
    assert correlations.correlation_rows(flat, {"d_path": falling})[0]["n"] == 0


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    rng = random.Random(3)
    lines = []
    for _ in range(24):
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        lines.append(json.dumps({"prompt": f"{a} plus {b} is", "answer": f"{a + b}."}))
    path = tmp_path_factory.mktemp("instructions") / "sums.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_table1_tunes_each_checkpoint_and_table4_shares_its_scores(folder, corpus_folder, instructions, tmp_path):
    pytest.importorskip("peft", reason="the extra 'instruct' is not installed")
    given = ["--task", str(corpus_folder / "quiz.jsonl"), "--instructions", f"sums={instructions}", str(instructions)]
    given += ["--epochs", "3", "--learning-rate", "0.05", "--output", str(tmp_path), "--removed", "0.25"]
    assert paper.main(["table1", str(folder), "--rank", "2", *given]) == 0
    found = json.loads((tmp_path / "table1.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("rank2_step_*.json"))
    assert files == [f"rank2_step_{step:08d}.json" for step in (3, 6, 9, 12)]
    facts = found["facts"]
    assert facts["lora"]["rank"] == 2
    assert (facts["tasks"]["adding"]["items"], facts["tasks"]["adding"]["removed"]) == (45, 15)
    scores = json.loads((tmp_path / files[-1]).read_text())
    assert facts["tasks"]["adding"]["accuracy_after"][-1] == pytest.approx(np.mean(scores["after"]["adding"]))
    assert scores["after"] != scores["before"]
    accuracy = [row for row in found["rows"] if row["predictor"] == "accuracy" and row["panel"] == "sums"]
    assert [row["step"] for row in accuracy] == [3, 6, 9, 12]
    assert accuracy[-1]["value"] == pytest.approx(np.mean(scores["after"]["adding"]))
    assert set(facts["delays"]) == {"sums", "stories"}
    changed = (tmp_path / files[0]).stat().st_mtime_ns
    assert paper.main(["table4", str(folder), "--rank", "2", "3", "--domain", "sums", *given]) == 0
    assert (tmp_path / files[0]).stat().st_mtime_ns == changed
    assert len(list(tmp_path.glob("rank3_step_*.json"))) == 4
    assert {row["panel"] for row in json.loads((tmp_path / "table4.json").read_text())["rows"]} == {"rank 2", "rank 3"}


def test_membership_scores_of_items_are_those_of_whole_predictions(folder, corpus_folder):
    trained = open_model(folder)
    task = tasks_of(read_entries([str(corpus_folder / "quiz.jsonl")], ".", "x"))[0]
    items = task.items[:6]
    scores = membership_scores(trained.model, items, trained.tokenizer, 62)
    for item, found in zip(items[:2], scores[:2], strict=True):
        text = trained.tokenizer.encode_all([f"{item['prompt']} {item['choices'][item['answer']]}"])[0]
        tokens = [trained.tokenizer.begin_id, *text]
        predictions = [next_token(trained, tokens[: place + 1]) for place in range(len(text))]
        assert found == pytest.approx(reference(predictions, text, 0.2), rel=1e-4)
    kept, removed = without_members(trained.model, [task], trained.tokenizer, 62, 0.1)
    whole = membership_scores(trained.model, task.items, trained.tokenizer, 62)
    highest = {task.items[i]["id"] for i in np.argsort(-whole)[: len(task.items) // 10]}
    assert set(removed[task.name]) == highest
    assert {item["id"] for item in kept[0].items} == {item["id"] for item in task.items} - highest


def next_token(trained, tokens):
    """The prediction after some tokens, from one forward pass over them alone."""
    from moetrain.probes.requests import Request, pack_requests, scored_hidden_states

    request = Request(np.array([*tokens, 0], np.int32), first=len(tokens))
    (batch,) = pack_requests([request], trained.tokenizer.end_id, 64)
    with torch.no_grad():
        hidden = scored_hidden_states(trained.model, batch)
        return (hidden @ trained.model.lm_head.weight.T).double().softmax(-1)[0].tolist()


def test_figure2_shows_the_pairs_of_the_summary(folder, tmp_path):
    """A pair is put into a copy's summary: the run is too short to have any."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    summary = json.loads((copy / "summary.json").read_text())
    run = open_run(folder)
    samples = DomainSamples(run, "sums")
    group = samples.early_groups()[0]
    answers = learning.answers_of(run, ["adding"])
    from moetrain import grokking

    onsets = grokking.generalized_onsets(answers.correct, min_tail=3)
    reading = int(onsets[onsets >= 0].min())
    step = int(answers.steps[reading])
    delay = {"steps": step - group.step, "tokens": 1.0, "steps_resolution": 1.0, "tokens_resolution": 1.0}
    pair = {"memorized_at": group.reading, "generalized_at": reading, "similarity": 0.5, "delay": delay}
    sizes = {"samples": len(group.members), "items": int((onsets == reading).sum())}
    summary["domains"]["sums"]["delay"] = {"pairs": [pair | sizes], "mean": delay, "note": ""}
    (copy / "summary.json").write_text(json.dumps(summary))
    found = learning.paired_groups(open_run(copy))
    loss = [row for row in found.rows if row["series"] == "loss"]
    assert [row["value"] for row in loss] == pytest.approx(samples.losses_ST[group.members].mean(0).tolist(), rel=1e-5)
    right = [row for row in found.rows if row["series"] == "accuracy"]
    assert [row["value"] for row in right] == answers.correct[onsets == reading].mean(0).tolist()
    assert {row["n"] for row in right} == {sizes["items"]}


def test_every_figure_and_table_is_listed_with_its_command(capsys):
    assert paper.main(["list"]) == 0
    printed = capsys.readouterr().out
    names = [f"figure{number}" for number in range(1, 16)] + [f"table{number}" for number in range(1, 6)]
    assert [entry.name for entry in ENTRIES] == names
    for name in names:
        assert f"python tools/paper.py {name}" in printed
    assert {*paper.COMPUTE, "figure8"} == set(names)


def test_the_page_of_results_has_every_command_and_small_pictures():
    page = ROOT / "tools" / "results" / "paper.md"
    text = page.read_text()
    for entry in ENTRIES:
        kind, number = re.fullmatch(r"(\D+)(\d+)", entry.name).groups()
        assert entry.name in text or f"{kind} {number}" in text, entry.name
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 15
    assert all((page.parent / picture).stat().st_size < 80_000 for picture in pictures)


def test_figure7_has_the_r2_of_a_line(folder, written):
    rows = [row for row in written["figure7"]["rows"] if row["panel"] == "train_loss"]
    x, y = (np.array([row[name] for row in rows], float) for name in ("x", "accuracy"))
    known = np.isfinite(x)
    assert known.sum() >= 4
    assert y.std() > 0
    assert rows[0]["r2"] == pytest.approx(np.corrcoef(x[known], y[known])[0, 1] ** 2)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    for words, said in (
        (["figure16", str(folder)], "no such figure or table"),
        (["figure4"], "give RUN"),
        (["figure4", str(tmp_path)], "no config.yaml"),
        (["figure4", str(folder), "--domain", "chess"], "the domains are stories, sums"),
        (["figure5", str(folder), "--domain", "sums", "stories"], "of one domain"),
        (
            ["table5", str(folder), "--task", "chess"],
            "no task of this run that is answered right or wrong; the tasks that are: ",
        ),
    ):
        assert paper.main(words) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_protocol_needs_instructions_for_each_domain():
    protocol = instructed.Protocol([], {"math": [Example("a", " ", "b")]}, LoraSettings(), 0.1)
    assert protocol.examples("math")[0].answer == "b"
    with pytest.raises(instructed.PaperError, match="none for domain code"):
        protocol.examples("code")
