"""The configurations of the project: all load and are listed, and the large ones have the published shapes."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from moetrain.config import load_settings
from moetrain.models.transformer import Transformer
from moetrain.train import main
from tests.conftest import small_run
from tests.tools.test_prepare_data import load_tool

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PUBLISHED_VOCABULARY = 50_304  # rows of OLMoE's embedding


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_loads_and_is_described(path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_DATA", "/data")
    settings = load_settings(path)
    assert settings.run.name == path.stem
    comment = re.match(r"(#.*\n)+", path.read_text())
    assert comment is not None
    assert len(comment[0].splitlines()) >= 2
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "vocabulary", "every", "active"),
    [("nano_moe", 16_384, 55.08e6, 25.88e6), ("olmoe_1b_7b", PUBLISHED_VOCABULARY, 6.919e9, 1.282e9)],
)
def test_parameter_counts_are_those_published(name, vocabulary, every, active):
    with torch.device("meta"):
        model = Transformer(load_settings(FOLDER / f"{name}.yaml").model, vocabulary, torch.bfloat16)
    assert model.parameter_counts() == pytest.approx((every, active), rel=1e-3)


def test_olmoe_has_the_shape_of_transformers_own():
    model = load_settings(FOLDER / "olmoe_1b_7b.yaml").model
    transformers = pytest.importorskip("transformers")
    published = transformers.OlmoeConfig()  # its defaults are those of OLMoE-1B-7B, except for the width of experts
    shared = set(type(model).model_fields) & set(vars(published)) - {"intermediate_size", "num_key_value_heads"}
    assert {"hidden_size", "num_experts", "num_experts_per_tok", "rms_norm_eps"} <= shared
    ours = {name: getattr(model, name) for name in shared}
    assert ours == {name: getattr(published, name) for name in shared}
    assert model.key_value_heads == published.num_key_value_heads


def test_olmoe_fits_eight_gpus_only_when_sharded():
    bench = load_tool("bench")
    command = ["plan", str(FOLDER / "olmoe_1b_7b.yaml"), "--vocab-size", str(PUBLISHED_VOCABULARY)]
    options = bench.parse([*command, "--gpus", "8", "--tokens", "20e9", "--tokens-per-second", "20000"])
    found = bench.plan.run(options)
    fits = {name: each["memory"]["fits"] for name, each in found["plans"][0]["layouts"].items()}
    assert fits == {"none": False, "fsdp": True, "hybrid": True}


@pytest.mark.parametrize("name", ["nano_moe", "olmoe_1b_7b"])
def test_a_large_configuration_runs_at_a_small_size(name, corpus_folder, tmp_path, capsys, monkeypatch):
    """A dry step with all of its settings except sizes, data and those that need CUDA."""
    monkeypatch.setenv("MOETRAIN_DATA", str(corpus_folder))
    settings = load_settings(FOLDER / f"{name}.yaml")
    own = small_run(corpus_folder, tmp_path, tmp_path)
    nothing = {"hub": None, "hub_config": None, "split": "train", "streaming": False, "size": None}
    domains = {domain: nothing | {"text_field": "text"} for domain in settings.data.domains}
    files = dict(zip(domains, ["stories.jsonl", "sums.jsonl"], strict=False))
    base = tmp_path / "small.yaml"
    tree = settings.model_dump()
    tree["data"]["domains"] = {
        domain: tree["data"]["domains"][domain] | domains[domain] | {"path": path} for domain, path in files.items()
    }
    tree["probes"] |= {"tasks": [], "task_domains": {}}
    tree["tokenizer"]["model"] = None
    tree["train"] |= {"compile": False, "sharding": "none", "micro_batch_rows": None}
    base.write_text(yaml.safe_dump(tree))
    own = [word for word in own if not word.startswith("data.domains.")]
    assert main([str(base), "--check", *own]) == 0
    assert "one step" in capsys.readouterr().out
