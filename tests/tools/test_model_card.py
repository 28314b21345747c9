"""The card of an exported checkpoint says what the run recorded, no more, and nothing of the machine it ran on."""

import json
import re

import pytest
import torch
import yaml

from moetrain.checkpoint.manager import checkpoint_folder, list_checkpoints
from moetrain.checkpoint.restore import open_model
from moetrain.models.hf import olmoe_config
from moetrain.models.serving import serving_limits
from tests.tools.test_prepare_data import load_tool
from tests.trainer.reading import scalars

export_hf = load_tool("export_hf")


def card_of(checkpoint, folder):
    pytest.importorskip("tokenizers")
    export_hf.export(open_model(checkpoint), folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def table(card, heading):
    """The rows of the table below a heading, by the first column."""
    lines = [line for line in card.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_card_of_a_finished_run_has_its_numbers(finished_run, tmp_path):
    card = card_of(finished_run, tmp_path / "hf")
    summary, points = json.loads((finished_run / "summary.json").read_text()), scalars(finished_run)
    data, losses = table(card, "Data"), table(card, "Held-out loss")
    assert list(data) == list(losses) == list(summary["data"])
    for name, counted in summary["data"].items():
        assert data[name]["source"] == f"{name}.jsonl"
        assert data[name]["documents"] == f"{counted['documents']:,}"
        assert data[name]["of them held out"] == f"{counted['heldout_documents']:,}"
        assert data[name]["text tokens trained on"] == f"{counted['met_tokens']:,}"
        for kind, column in (("validation", "nats per token"), ("validation_bpb", "bits per byte")):
            step, value = points[f"loss/{kind}/{name}"][-1]
            assert losses[name][column] == f"{value:.4f}"
            assert losses[name]["measured at step"] == f"{step}"
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", losses[name]["on (UTC)"])
    assert f"{summary['tokens']:,} tokens were trained on" in " ".join(card.split())
    assert (
        f"{summary['parameters']['all']:,} parameters of which {summary['parameters']['active']:,} are active" in card
    )
    assert f"step {summary['steps']} of {summary['steps']} of the run `{finished_run.name}`" in " ".join(card.split())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    shown = table(card, "Architecture")
    assert {key: row["value"] for key, row in shown.items()} == {key: str(config[key]) for key in shown}
    assert len(shown) == 14
    assert table(card, "Training")["optim.learning_rate"]["value"] == "0.01"


def test_the_card_of_an_earlier_checkpoint_knows_nothing_of_what_came_later(finished_run, tmp_path):
    checkpoint = list_checkpoints(finished_run)[0]
    step = open_model(checkpoint).step
    assert checkpoint == checkpoint_folder(finished_run, step)
    assert step < json.loads((finished_run / "summary.json").read_text())["steps"]
    card = card_of(checkpoint, tmp_path / "hf")
    points = scalars(finished_run)
    for name, row in table(card, "Held-out loss").items():
        at, value = [point for point in points[f"loss/validation/{name}"] if point[0] <= step][-1]
        assert (row["nats per token"], row["measured at step"]) == (f"{value:.4f}", str(at))
    for name, row in table(card, "Data").items():
        at, value = [point for point in points[f"data/tokens/{name}"] if point[0] <= step][-1]
        assert row["text tokens trained on"] == f"{value:,.0f} at step {at}"


def test_the_head_is_valid_and_no_path_of_the_machine_is_told(finished_run, tmp_path):
    card = card_of(finished_run, tmp_path / "hf")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation",
                    "tags": ["olmoe", "mixture-of-experts", "moetrain"]}  # fmt: skip
    assert str(finished_run.parent) not in card
    assert "/tmp" not in card
    cards = pytest.importorskip("huggingface_hub").ModelCard(card)
    assert cards.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("data/a*.jsonl", "data/a*.jsonl"),
        ("/home/ada/secret/a.jsonl", "a.jsonl"),
        ("~/secret/a.jsonl", "a.jsonl"),
        ("$DATA/a.jsonl", "a.jsonl"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl"),
        (["one.jsonl", "/two.jsonl"], "one.jsonl, two.jsonl"),
    ],
)
def test_sources_are_named_without_the_folders_of_a_machine(place, shown):
    from common.model_card import _public

    assert _public(place) == shown


def test_a_card_of_narrow_experts_names_the_implementation(finished_run):
    from common.model_card import model_card

    trained = open_model(finished_run)
    config = olmoe_config(trained.settings.model, 320, 64, 1, 2, torch.float32)
    assert "experts_implementation" not in model_card(trained, config)
    narrow = trained.settings.model.model_copy(update={"intermediate_size": 18})
    config = olmoe_config(narrow, 320, 64, 1, 2, torch.float32)
    assert '`experts_implementation="eager"`' in model_card(trained, config)


def test_what_stands_against_other_programs_is_named():
    plain = {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    assert serving_limits(plain) == {"vLLM": [], "llama.cpp": []}
    for change, words in (
        ({"norm_topk_prob": True}, "norm_topk_prob is true"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps of 1e-05 instead of 1e-06"),
        ({"tie_word_embeddings": True}, "no lm_head.weight"),
    ):
        for limits in serving_limits(plain | change).values():
            assert len(limits) == 1
            assert words in limits[0]
    found = serving_limits(plain | {"num_key_value_heads": 2})
    assert found["vLLM"] == []
    assert "num_key_value_heads differs" in found["llama.cpp"][0]
