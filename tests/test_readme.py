"""The README: its links exist, and its example runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.metrics import table
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.stream import StreamMonitor

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_links_and_pictures_exist():
    places = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(places) > 8
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_tools_and_configurations_in_commands_exist():
    named = set(re.findall(r"\b(?:tools|configs)/\w+\.(?:py|yaml)", README))
    assert len(named) > 5
    assert [place for place in named if not (ROOT / place).exists()] == []


def test_every_curve_is_in_the_list_of_metrics():
    rows = README[README.index("## Metrics") : README.index("## Interpretation")].splitlines()
    missing = []
    for metric in table.METRICS:
        group, _, leaf = re.sub(r"exposure_\d+", "exposure_K", metric.tag).rpartition("/")
        if group and not any(f"`{group}/" in row and re.search(rf"[`/]{leaf}[`/]", row) for row in rows):
            missing.append(metric.tag)
    assert missing == []


def test_the_training_loop_example_runs(capsys):
    transformers = pytest.importorskip("transformers")
    (block,) = re.findall(r"<!-- a test runs this block -->\n```python\n(.*?)```", README, re.DOTALL)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OlmoeConfig(vocab_size=64, num_experts=8, num_experts_per_tok=2, pad_token_id=None, **sizes)
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def update(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    domains = np.arange(16) % 2
    batches = [(torch.randint(64, (16, 12)), 16 * step + np.arange(16), domains) for step in range(10)]
    exec(block, {"np": np, "torch": torch, "StreamMonitor": StreamMonitor, "SampleRouting": SampleRouting} | locals())
    printed = capsys.readouterr().out
    assert printed.startswith("10 {'code': Estimate(")
    assert "'math': Estimate(" in printed
