"""The examples of the package's README run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moetrain
from moetrain.integrations.recorder import RouterRecorder
from moetrain.models.router import RecordingMasks
from moetrain.routing.recorder import SampleRouting
from moetrain.routing.stream import StreamMonitor

README = (Path(moetrain.__file__).parent / "integrations" / "README.md").read_text()
BLOCKS = re.findall(r"<!-- a test runs this block -->\n```python\n(.*?)```", README, re.DOTALL)
NAMES = {
    "np": np,
    "torch": torch,
    "StreamMonitor": StreamMonitor,
    "SampleRouting": SampleRouting,
    "RouterRecorder": RouterRecorder,
    "RecordingMasks": RecordingMasks,
}


def batches(count):
    draw = torch.Generator().manual_seed(0)
    for step in range(count):
        yield torch.randint(3, 96, (16, 12), generator=draw), 16 * step + torch.arange(16), torch.arange(16) % 2


def test_links_exist():
    places = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    folder = Path(moetrain.__file__).parent / "integrations"
    assert [place for place in places if not (folder / place).exists()] == []


class Router(nn.Module):
    """A gate and a top-k, as in torchtitan."""

    def __init__(self, width, experts, top_k):
        super().__init__()
        self.gate, self.top_k = nn.Linear(width, experts, bias=False), top_k

    def forward(self, x_ND):
        scores, index = self.gate(x_ND).float().softmax(-1).topk(self.top_k, dim=-1)
        return scores, index


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.router, self.experts = Router(width, 8, 2), nn.Parameter(0.1 * torch.randn(8, width, width))

    def forward(self, x_ND):
        scores, index = self.router(x_ND)
        return x_ND + (torch.einsum("nd,nkde->nke", x_ND, self.experts[index]) * scores[..., None]).sum(1)


def test_a_router_module_with_a_gate_is_watched(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(96, 16), nn.Flatten(0, 1), Layer(16), Layer(16), nn.Linear(16, 96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def update(model, tokens):
        nn.functional.cross_entropy(model(tokens)[:-1], tokens.flatten()[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = [(tokens, samples.numpy(), domains.numpy()) for tokens, samples, domains in batches(10)]
    found = NAMES | {"model": model, "Router": Router, "update": update, "batches": taken}
    exec(BLOCKS[0], found)
    assert re.fullmatch(r"\{'code': \d+\.\d+, 'math': \d+\.\d+\}\n", capsys.readouterr().out)
    assert len(found["monitor"].windows()[0]) == 64
    with torch.no_grad():  # the newest samples, by hand
        tokens = taken[-1][0]
        model(tokens)
    assert torch.stack(found["found"][-2:]).shape == (2, 16 * 12, 8)


def test_a_lightning_module_is_watched(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs pip install lightning")
    pytest.importorskip("transformers")
    from tests.integrations.tiny import tiny_model

    found = NAMES | {"lightning": lightning}
    exec(BLOCKS[1], found)
    watched = found["Watched"](tiny_model("mixtral").train())
    data = torch.utils.data.DataLoader(list(batches(10)), batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(watched, data)
    assert [reading.domain for reading in watched.readings] == ["code", "math"]
    assert all(np.isfinite(reading.metrics["d_path"].mean) for reading in watched.readings)
    window = watched.monitor.windows()[0]
    assert np.allclose(window.weights.sum(-1), 1)
    assert (window.even_SLE.sum(-1) > 5.9).all()  # 6 even tokens of 12
