"""What several test files share: small data that can be learned, and runs on it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetrain.config import Settings, load_settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # as for `python tools/NAME.py`


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors: threads only cost, and the machine's other tests run beside."""
    torch.set_num_threads(1)


def sentences(rng: random.Random, count: int) -> str:
    """Text with a grammar, so that a model can learn it."""
    names = ("Ada", "Ben", "Cleo", "Dan", "Eva")
    things = ("apple", "bread", "candle", "drum")
    return " ".join(
        f"{(n := rng.choice(names))} has a {(t := rng.choice(things))}, so the {t} belongs to {n}."
        for _ in range(count)
    )


def sums(rng: random.Random, count: int) -> str:
    """Additions, all right."""
    pairs = [(rng.randint(0, 20), rng.randint(0, 20)) for _ in range(count)]
    return "\n".join(f"{a} plus {b} is {a + b}." for a, b in pairs)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of JSONL: short and long documents, some longer than a row."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for name, write in (("stories", sentences), ("sums", sums)):
        lines = [json.dumps({"text": f"{number}. " + write(rng, rng.randint(2, 24))}) for number in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    quiz = [
        {
            "domain": "sums",
            "task": "adding",
            "id": f"adding-{a}-{b}",
            "prompt": f"{a} plus {b} is",
            "sep": " ",
            "choices": [f"{a + b + wrong}." for wrong in (-1, 0, 1, 2)],
            "answer": 1,
        }
        for a in range(21, 31)
        for b in range(6)
    ]
    told = [
        {
            "domain": "stories",
            "task": "owners",
            "id": f"owners-{name}-{number}",
            "prompt": f"{name} has a {thing}, so the {thing} belongs to",
            "sep": " ",
            "target": f"{name}.",
        }
        for name in ("Ada", "Ben", "Cleo", "Dan", "Eva")
        for number, thing in enumerate(("kettle", "lamp", "mirror"))
    ]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz + told)) + "\n")
    return folder


MakeSettings = Callable[..., Settings]


@pytest.fixture
def make_settings(corpus_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeSettings:
    """Settings of a small run on that corpus, with ``section.key=value`` overrides."""

    def make(*overrides: str) -> Settings:
        return load_settings(None, [*small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp()), *overrides])

    return make


# Overrides for `small_run`: a domain with marked answers, enough of them in the first step for leave-one-out accuracy.
MARKED_ANSWERS = (
    "data.domains.rule.builtin=modular",
    "data.domains.rule.repeats=4",
    "data.domains.rule.facts.modulus=97",
    "data.domains.rule.panel_tokens=4",
    "train.batch_rows=32",
    "panel.samples=20",
    "data.seq_len=60",  # five facts fill a row, so that the first step meets many
)


def small_run(corpus: Path, output: Path, cache: Path) -> list[str]:
    """Overrides of a run that takes seconds."""
    return [
        f"data.root={corpus}",
        "data.domains.stories.path=stories.jsonl",
        "data.domains.sums.path=sums.jsonl",
        f"data.cache_dir={cache / 'prepared'}",
        "data.heldout_share=0.1",
        "data.seq_len=64",
        "tokenizer.vocab_size=320",
        "model.hidden_size=32",
        "model.num_hidden_layers=3",
        "model.num_attention_heads=2",
        "model.num_experts=8",
        "model.num_experts_per_tok=2",
        "model.intermediate_size=16",
        "optim.learning_rate=0.01",
        "optim.warmup_steps=2",
        "train.batch_rows=16",
        "train.log_every=3",
        "train.eval_every=4",
        "train.eval_tokens=1000",
        "train.checkpoint_every=5",
        "train.max_steps=12",
        "train.precision=fp32",
        "train.threads=1",
        "monitor.every=2",
        "monitor.window=8",
        "panel.tokens=16",
        "panel.samples=16",
        "panel.readings=4",
        f"run.output_dir={output / 'runs'}",
        "run.report=false",
    ]


@pytest.fixture(scope="session")
def finished_run(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a panel, probes and a report; not to be written to."""
    from tests.report.runs import trained

    cache = tmp_path_factory.getbasetemp()
    return trained(corpus_folder, tmp_path_factory.mktemp("finished"), cache, "run.report=true")
