"""The model card of an exported checkpoint, ``README.md``: data, tokens, measured losses, architecture, use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain.checkpoint.restore import TrainedModel
from moetrain.config import DomainSettings
from moetrain.models.serving import serving_limits
from moetrain.version import __version__


class Point(NamedTuple):
    """A point of a TensorBoard curve."""

    step: int
    value: float
    day: str  # on which it was measured, UTC


class Recorded:
    """What a run's folder holds of its course up to a checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        self._step = step
        self._board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1, "histograms": 1}).Reload()
        self._curves = set(self._board.Tags()["scalars"])
        path = run / "summary.json"
        self.summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def at_the_end(self) -> bool:
        """Whether the checkpoint is the last one of a finished run, which the summary describes."""
        return self.summary.get("steps") == self._step

    def newest(self, tag: str) -> Point | None:
        """The newest point of a curve up to the checkpoint's step."""
        found = self._board.Scalars(tag) if tag in self._curves else []
        point = max((each for each in found if each.step <= self._step), key=lambda each: each.step, default=None)
        if point is None:
            return None
        return Point(point.step, point.value, datetime.fromtimestamp(point.wall_time, UTC).date().isoformat())


def model_card(trained: TrainedModel, config: Mapping[str, Any]) -> str:
    """The card of a checkpoint, Markdown with a YAML head.

    Numbers are those that the run recorded up to the checkpoint's step; what it has not recorded is shown as "-".

    Args:
        config: ``config.json`` of the exported folder.
    """
    recorded = Recorded(trained.run, trained.step)
    steps, source = recorded.summary.get("steps"), trained.settings.model.initialize_from
    of = f" of {steps:,}" if steps else ""
    start = f"the weights of {_public(source)}" if source else "random weights"
    every, active = trained.model.parameter_counts()
    name = trained.run.resolve().name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts, moetrain]
---

# {name}

A language model of OLMoE's architecture, {every:,} parameters of which {active:,} are active for a token, trained from
{start} with moetrain {__version__}: step {trained.step:,}{of} of the run `{name}`. It is a base model that continues
text, without instruction tuning and without a chat template.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=30)[0]))
```

The tokenizer puts a begin mark before each text, as each sample in training had one, and no end mark after it. The
model was trained on samples of up to {config["max_position_embeddings"]:,} tokens.
{_experts_note(config)}
{_serving(config)}

## Data

{_data(trained, recorded)}

{trained.tokens_trained:,} tokens were trained on up to this step, marks of begin and end included; the text tokens
above are without marks.

## Held-out loss

Of documents held out of training, whole and chosen by a hash of their content.

{_losses(trained, recorded)}

## Architecture

{_table(("setting", "value"), [(key, f"{value}") for key, value in config.items() if key in _ARCHITECTURE])}

## Training

{_table(("setting", "value"), _training(trained))}
"""


_ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "intermediate_size",
    "norm_topk_prob",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "max_position_embeddings",
    "torch_dtype",
)


def _experts_note(config: Mapping[str, Any]) -> str:
    if "experts_implementation" not in config:
        return ""
    return (
        "\nThe default experts of transformers refuse the widths of this model, which are no multiples of 16 bytes.\n"
        'So `config.json` names `experts_implementation="eager"`, which `save_pretrained` leaves out.\n'
    )


def _serving(config: Mapping[str, Any]) -> str:
    lines = [
        f"- {program}: {'; '.join(limits) if limits else 'no setting of this model stands against it'}."
        for program, limits in serving_limits(config).items()
    ]
    known = "- llama.cpp's converter knows the tokenizers of published models only; see moetrain/models/README.md."
    return "\n".join(["In other programs:", "", *lines, known])


def _data(trained: TrainedModel, recorded: Recorded) -> str:
    rows = []
    for name, domain in trained.settings.data.domains.items():
        found = recorded.summary.get("data", {}).get(name, {})
        counts = [f"{found[key]:,}" if key in found else "-" for key in ("documents", "heldout_documents", "copies")]
        tokens, point = "-", recorded.newest(f"data/tokens/{name}")
        if recorded.at_the_end:
            tokens = f"{found['met_tokens']:,}"
        elif point is not None:  # TensorBoard's numbers have seven digits
            tokens = f"{float(f'{point.value:.6g}'):,.0f} at step {point.step:,}"
        rows.append((name, _source(domain), *counts, tokens))
    return _table(
        ("domain", "source", "documents", "of them held out", "copies of each", "text tokens trained on"), rows
    )


def _losses(trained: TrainedModel, recorded: Recorded) -> str:
    rows = []
    for name in trained.settings.data.domains:
        loss, bits = (recorded.newest(f"loss/{kind}/{name}") for kind in ("validation", "validation_bpb"))
        measured = ("-",) * 4
        if loss is not None and bits is not None:
            measured = (f"{loss.value:.4f}", f"{bits.value:.4f}", f"{loss.step:,}", loss.day)
        rows.append((name, *measured))
    return _table(("domain", "nats per token", "bits per byte", "measured at step", "on (UTC)"), rows)


def _training(trained: TrainedModel) -> list[tuple[str, str]]:
    optim, train, data = trained.settings.optim, trained.settings.train, trained.settings.data
    return [
        ("tokens of a step", f"{train.batch_rows * data.seq_len:,} ({train.batch_rows:,} rows of {data.seq_len:,})"),
        *((f"optim.{key}", f"{value}") for key, value in optim.model_dump().items() if value is not None),
        ("model.balancing", trained.settings.model.balancing),
        ("train.precision", train.precision),
        ("run.seed", f"{trained.settings.run.seed}"),
    ]


def _source(domain: DomainSettings) -> str:
    if domain.builtin is not None:
        return f"built-in {domain.builtin}"
    if domain.hub is not None:
        config = f", {domain.hub_config}" if domain.hub_config else ""
        return f"{_public(domain.hub)}{config}"
    return _public(domain.path or "-")


def _public(place: Any) -> str:
    """A path without the folders of one machine: as given where it is relative or a URL, else its last part."""
    texts = place if isinstance(place, list) else [place]
    return ", ".join(Path(text).name if text.startswith(("/", "~", "$")) else text for text in map(str, texts))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
