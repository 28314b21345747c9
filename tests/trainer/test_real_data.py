"""The shipped configurations on real text; skipped where there is none."""

import json
import os
from pathlib import Path

import pytest

from moetrain.train import main

CONFIGS = Path(__file__).parents[2] / "configs"
needs_data = pytest.mark.skipif("MOETRAIN_DATA" not in os.environ, reason="MOETRAIN_DATA names no folder of real text")


@needs_data
def test_four_real_domains_train_and_their_loss_falls(tmp_path):
    small = [
        "train.max_steps=12",
        "train.batch_rows=4",
        "train.eval_tokens=2000",
        "train.log_every=4",
        "monitor.every=12",
        "panel.readings=2",
        "probes.readings=2",
        "probes.items=30",
    ]
    sizes = [f"data.domains.{name}.size=300000" for name in ("math", "code", "general", "science")]
    model = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_experts=8", "tokenizer.vocab_size=1024"]
    where = [
        f"run.output_dir={tmp_path}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.seq_len=256",
        "data.heldout_share=0.05",
    ]
    assert main([str(CONFIGS / "four_domains.yaml"), *small, *sizes, *model, *where, "optim.warmup_steps=2"]) == 0
    domains = json.loads((tmp_path / "four_domains" / "summary.json").read_text())["domains"]
    assert set(domains) == {"math", "code", "general", "science"}
    for name, domain in domains.items():
        # A uniform guess over 1,024 tokens is 6.93 nats.
        assert domain["metrics"]["validation_loss"]["value"] < 6.8, name


@pytest.mark.slow  # continuous integration runs the command itself
def test_the_quickstart_takes_its_first_steps(tmp_path):
    small = [
        "train.max_steps=2",
        "train.eval_tokens=1000",
        "data.domains.code.size=200000",
        "data.domains.repeated_code.size=300000",
    ]
    where = [f"run.output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main([str(CONFIGS / "quickstart.yaml"), *small, *where]) == 0
    assert (tmp_path / "quickstart" / "summary.json").exists()
