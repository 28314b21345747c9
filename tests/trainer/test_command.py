"""The command as a user meets it: its help, its complaints, its check, and what a run leaves behind."""

import json
import math

import numpy as np
import pytest
import yaml

from moetrain.config import describe_settings, load_settings
from moetrain.metrics import table
from moetrain.routing.store import read_readings
from moetrain.train import main
from tests.conftest import small_run
from tests.trainer.reading import assert_types_of_events, scalars


@pytest.fixture
def run_main(corpus_folder, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "run.yaml").write_text("")
    base = [str(tmp_path / "run.yaml"), *small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())]
    return lambda *more: main([*base, *more])


def test_help_lists_every_setting(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for key, _, _, meaning in describe_settings():
        assert f"  {key} (" in said
        assert meaning in said


def test_without_arguments_it_is_the_quickstart(monkeypatch):
    asked = []
    monkeypatch.setattr("moetrain.train.train", lambda settings, check: asked.append(settings) or 0)
    assert main([]) == 0
    assert asked[0].run.name == "quickstart"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.maxsteps=1"], "did you mean train.max_steps?"),
        (["--chek"], "unknown option: --check or --help"),
        (["other.yaml"], "a second configuration"),
        (["data.domains.sums.path=none.jsonl"], "no file at"),
        (["tokenizer.model=/no/such.model"], "tokenizer.model: /no/such.model cannot be used"),
        (["train.batch_rows=100000"], "are less than one step takes"),
        (["data.root=$NOT_SET_AT_ALL"], "environment variable NOT_SET_AT_ALL is not set"),
        (["train.resume=/no/such/checkpoint"], "is in no run"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_status_two(run_main, capsys, arguments, said):
    assert run_main(*arguments) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert said in complaint


def test_check_prints_what_will_happen_and_leaves_nothing(run_main, capsys, tmp_path):
    assert run_main("--check") == 0
    said = capsys.readouterr().out
    for part in (
        "0.1M parameters",
        "stories",
        "sums",
        "12 steps of 16 rows of 64 tokens",
        "one step:",
        "recording",
        "GiB",
    ):
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_expert_widths_without_a_grouped_matmul_train_with_the_loop_and_say_so(run_main, capsys, tmp_path):
    narrow = ("model.intermediate_size=18", "train.max_steps=2", "run.report=false")
    assert run_main("--check", *narrow) == 0
    assert run_main(*narrow) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("experts: loop; grouped_mm not taken: model.intermediate_size=18 is no multiple of") == 2
    assert (tmp_path / "runs" / "run" / "summary.json").exists()


@pytest.fixture
def finished(run_main, tmp_path):
    assert run_main() == 0
    return tmp_path / "runs" / "run"


def test_a_run_leaves_its_settings_points_events_and_summary(finished):
    saved = load_settings(finished / "config.yaml")
    assert saved.train.max_steps == 12
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["num_experts"] == 8
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["parameters"]["all"] > summary["parameters"]["active"] > 0
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["monitor_share"] < 1
    points = scalars(finished)
    for name in ("stories", "sums"):
        data = summary["data"][name]
        assert data["met_tokens"] == points[f"data/tokens/{name}"][-1][1]
        assert data["unused_share"] == pytest.approx(1 - data["met_tokens"] / data["train_tokens"])
        assert (data["copies"], data["duplicates_dropped"]) == (1, 0)
        metrics = summary["domains"][name]["metrics"]
        assert metrics["validation_loss"]["value"] == pytest.approx(points[f"loss/validation/{name}"][-1][1], rel=1e-6)
        assert metrics["stream/d_path"]["low"] <= metrics["stream/d_path"]["value"] <= metrics["stream/d_path"]["high"]
        assert metrics["stream/d_path"]["n"] == 8
        bpb, loss = metrics["bits_per_byte"]["value"], metrics["validation_loss"]["value"]
        assert 0.2 < bpb / (loss / math.log(2)) < 1  # a token is between one and five bytes
    assert_types_of_events(finished, [*["checkpoint"] * 3, *["memorized"] * 2])
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step_00000010", "step_00000012"]


FIXED = {
    "loss/train",
    "loss/balance",
    "loss/z",
    "optim/learning_rate",
    "optim/grad_norm",
    *(f"experts/{kind}{which}" for kind in ("load_cv", "entropy", "dead") for which in ("", "/worst")),
    *(
        f"{stem}/{domain}"
        for domain in ("stories", "sums")
        for stem in (
            "Verdict/memorized_share",
            "loss/train",
            "loss/validation",
            "loss/validation_bpb",
            "data/tokens",
            "stream/d_path",
            "stream/d_path_norm",
            "stream/cosine",
            "stream/inconsistency",
            "stream/spread",
            "loss/first_exposure",
            "memorized/excess_confidence_unseen",
            "loss/panel_seen",
            "loss/panel_to_come",
            "loss/panel_heldout",
            "loss/panel_unseen",
            "loss/panel_frequencies",
            "phase",
            "memorized/share",
            "memorized/fraction",
            "memorized/gap",
            "memorized/gap_heldout",
            "pathway/d_path",
            "pathway/d_path_norm",
            "pathway/sharing",
            "pathway/individuality",
            "pathway/spread",
            "pathway/layer_cka",
            "pathway/cosine",
            "pathway/consistency",
            "pathway/inconsistency",
            "kernel/effective_rank",
            *(
                f"pathway_{cell}/{name}"
                for cell in ("to_come", "heldout")
                for name in ("d_path_norm", "cosine", "spread")
            ),
        )
    ),
}


def test_every_tag_is_a_fixed_name_and_describes_itself(finished):
    assert set(scalars(finished)) == FIXED
    for tag in [
        *(tag for tag in FIXED if not tag.startswith("Verdict/")),  # copies of other curves, described as these
        "system/tokens_per_second",
        "system/mfu",
        "system/monitor_share",
        "system/monitor_stream",
        "system/monitor_panel",
    ]:
        assert len(table.describe(tag)) > 20


def test_the_dense_twin_and_a_run_without_monitor_train_too(run_main, tmp_path):
    assert run_main("model.experts=dense", "run.name=dense") == 0
    assert run_main("monitor.enabled=false", "run.name=silent") == 0
    assert "loss/balance" not in scalars(tmp_path / "runs" / "dense")
    assert run_main("model.experts=dense", "--check") == 0
    silent = scalars(tmp_path / "runs" / "silent")
    assert not any(tag.startswith("stream/") for tag in silent)


def test_a_dense_model_in_blocks_has_every_metric_that_needs_no_router_and_trains_as_without(
    run_main, finished, tmp_path, capsys
):
    blocks = ("model.experts=dense", "model.dense_experts=8")
    assert run_main(*blocks, "run.name=blocks") == 0
    assert "dense, monitored as 8 blocks of units" in capsys.readouterr().out
    assert run_main("model.experts=dense", "run.name=dense") == 0
    found, silent, routed = (scalars(tmp_path / "runs" / name) for name in ("blocks", "dense", finished.name))
    of_routers = ("loss/balance", "loss/z", "experts/")
    expected = {tag for tag in routed if not tag.startswith(of_routers)}
    # Consistency divides by the largest cosine, which is too small for that in so short a run.
    assert {tag for tag in expected if "consistency" not in tag} <= found.keys() <= expected
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert all(found[tag] == points for tag, points in silent.items())
    run = tmp_path / "runs" / "blocks"
    for reading in read_readings(run):
        assert reading.weights.shape[1:] == (3, 8)
        np.testing.assert_allclose(reading.weights.sum(-1), 1, rtol=1e-6)
        assert (reading.counts.sum(-1) == reading.tokens[:, None]).all()
        assert reading.training_context.router_entropy is reading.training_context.load_cv is None


def test_tied_embeddings_are_saved_and_go_on(run_main, tmp_path):
    tied = ("model.tie_word_embeddings=true", "run.name=tied")
    assert run_main(*tied) == 0
    run = tmp_path / "runs" / "tied"
    (run / "summary.json").unlink()
    straight = scalars(run)
    assert run_main(*tied, f"train.resume={run / 'checkpoints' / 'step_00000010'}") == 0
    assert scalars(run) == straight


def test_a_panel_without_members_is_left_out(run_main, tmp_path):
    long = ("data.seq_len=2048", "panel.tokens=2000", "train.batch_rows=2", "train.max_steps=2")  # longer than any text
    assert run_main(*long) == 0
    assert not any(tag.startswith(("pathway", "loss/panel")) for tag in scalars(tmp_path / "runs" / "run"))


def test_monitoring_leaves_the_training_bit_for_bit_as_it_was(run_main, finished, tmp_path):
    assert run_main("monitor.enabled=false", "run.name=silent") == 0
    watched, silent = scalars(finished), scalars(tmp_path / "runs" / "silent")
    routing = ("Verdict/", "stream/", "pathway", "kernel/", "memorized/", "loss/panel", "loss/first_exposure", "phase/")
    assert silent == {tag: points for tag, points in watched.items() if not tag.startswith(routing)}
