"""The study of dense pathways: its plan, blocks of other units, and its tables on values made up beforehand."""

import json

import dense_pathways
import numpy as np
import pytest
from validity import dense_blocks, dense_tables, plan

from moetrain.config import load_settings
from moetrain.routing.answers import no_answers
from moetrain.routing.store import StoredReading

UNITS, SAMPLES = 12, 60


def reading(weights_SLF):
    """A stored reading of held-out samples with this routing in both halves."""
    samples, layers, width = weights_SLF.shape
    losses = np.zeros(samples, np.float32)
    return StoredReading(
        step=8,
        domain=np.array(["add"] * samples, object),
        cell=np.full(samples, dense_blocks.CELLS.index("heldout"), np.int8),
        document=np.arange(samples, dtype=np.uint64),
        piece=np.zeros(samples, np.int32),
        first_step=np.zeros(samples, np.int64),
        tokens=np.full(samples, 10, np.int32),
        loss=losses,
        initial=losses,
        difficulty=losses,
        claim_gain=losses,
        claim=losses,
        even=weights_SLF,
        odd=weights_SLF,
        counts=np.zeros(weights_SLF.shape, np.uint16),
        inputs=np.zeros((samples, layers, 0), np.float16),
        blocks=(np.zeros((layers, width, width)), np.zeros((layers - 1, width, width))),
        answers=no_answers(layers, width),
    )


def planted(seed=0):
    """Shares of units that are active together in groups of three, in a shuffled order, and the group of each."""
    rng = np.random.default_rng(seed)
    groups = np.stack([rng.permutation(np.repeat(np.arange(4), 3)) for _ in range(2)])
    together = rng.gamma(2.0, size=(SAMPLES, 2, 4)) + 0.2
    noise = 1 + 0.05 * rng.normal(size=(SAMPLES, 2, UNITS))
    shares = np.stack([together[:, layer][:, groups[layer]] for layer in range(2)], 1) * noise
    return (shares / shares.sum(-1, keepdims=True)).astype(np.float32), groups


def test_the_plan_has_a_twin_for_each_mixture_and_its_settings_load(tmp_path):
    runs = plan.read_plan("dense")
    seeds = {variant: [run.seed for run in runs if run.variant == variant] for variant in ("moe", "dense")}
    assert seeds["moe"] == seeds["dense"]
    base = plan.STUDIES["dense"] / "base.yaml"
    for run in runs:
        settings = load_settings(base, [*run.overrides, f"run.output_dir={tmp_path}"])
        assert settings.watches_routing
        assert settings.model.recorded_experts == 16
        assert set(settings.data.domains) == {*dense_tables.RULES, dense_tables.NOISE}


def test_shares_of_blocks_are_sums_of_those_of_their_units():
    shares, groups = planted()
    found = dense_blocks.regrouped(reading(shares), groups)
    for layer in range(2):
        for group in range(4):
            expected = shares[:, layer, groups[layer] == group].sum(-1)
            np.testing.assert_allclose(found.even[:, layer, group], expected, rtol=1e-5)
    np.testing.assert_allclose(found.weights.sum(-1), 1)
    assert dense_blocks.consecutive(2, 12, 3).tolist() == 2 * [[0] * 4 + [1] * 4 + [2] * 4]


def test_units_that_are_active_together_come_into_one_cluster_and_clusters_have_one_size():
    shares, groups = planted()
    found = dense_blocks.co_activation(reading(shares), 4)
    for layer in range(2):
        assert np.bincount(found[layer]).tolist() == [3, 3, 3, 3]
        pairs = {(int(a), int(b)) for a, b in zip(found[layer], groups[layer], strict=True)}
        assert len(pairs) == 4  # the same partition under other numbers


def made_up(difference):
    """Values of three runs in which the rules lie above the random answers by so much, in units of the noise."""
    rng = np.random.default_rng(1)
    seeds = {}
    for seed in range(3):
        values = {domain: rng.normal(size=2).tolist() for domain in (*dense_tables.RULES, dense_tables.NOISE)}
        for domain in dense_tables.RULES:
            values[domain][-1] += difference
        accuracy = {domain: [0.0, 1.0] for domain in values}
        seeds[str(seed)] = {"pathway/spread": values, "trained_accuracy": accuracy, "heldout_accuracy": accuracy}
    return seeds


@pytest.mark.parametrize(("difference", "auc", "pairs"), [(20, "1.00", "6 of 6"), (-20, "0.00", "0 of 6")])
def test_a_measure_that_separates_has_an_auc_of_one_or_zero_and_an_interval_without_zero(difference, auc, pairs):
    (row,) = dense_tables.measures(made_up(difference), 1).to_dict("records")
    assert (row["measure"], row["runs"], row["AUC"], row["pairs"]) == ("spread", 3, auc, pairs)
    mean, low, high = (
        float(x) for x in row["rules - random"].replace("(", "").replace(")", "").replace("to ", "").split()
    )
    assert mean == pytest.approx(difference, abs=3)
    assert low < mean < high
    assert (low > 0) == (difference > 0)
    null = float(row["rule - rule"].split()[0])
    assert abs(null) < 3


def test_the_tables_are_made_from_the_file_of_numbers_alone(tmp_path, capsys):
    values = {"moe": made_up(20), "dense": made_up(0)}
    others = {
        "8 blocks": {
            seed: {m: {d: v[-1:] for d, v in of.items()} for m, of in found.items()}
            for seed, found in made_up(-20).items()
        }
    }
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"steps": [0, 8], "values": values, "last reading with other blocks": others}))
    assert dense_pathways.main(["tables", "--json", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mixture of experts, step 8" in said
    assert "dense twin, AUC by blocks, step 8" in said
    assert "1.00 / 1.00" in said
    assert "the runs of validate_monitor.py" in said
    shown = dense_tables.tables(json.loads(file.read_text()))["dense twin, AUC by blocks, step 8"]
    assert shown["8 blocks"].tolist() == ["0.00"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tables", "--json", "none.json"], "write it with `dense_pathways.py measure`"),
        (["measure", "--output", "none"], "no finished run"),
        (["run", "--only", "7_moe"], "--only: 7_moe is not in the plan"),
    ],
)
def test_what_is_missing_is_one_line_with_the_remedy(arguments, said, capsys):
    assert dense_pathways.main(arguments) == 2
    complaint = capsys.readouterr().err
    assert said in " ".join(complaint.split())
