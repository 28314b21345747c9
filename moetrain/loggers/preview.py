"""What will be trained: a summary and a table, printed before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream, stream_tokens
from moetrain.distributed.mesh import ParallelLayout
from moetrain.dtensor import local_tensor
from moetrain.loggers.terminal import Terminal
from moetrain.models.transformer import Transformer
from moetrain.version import __version__

_COUNTED = {
    "documents": "docs",
    "heldout_documents": "held out",
    "duplicates_dropped": "duplicates",
    "bad_dropped": "bad",
    "left_out": "left out",
    "train_tokens": "text tokens",
}
PROBES_LEGEND = (
    "items: asked, of those that exist; in training text: left out unless probes.contaminated=keep; cut: too long for "
    "the model's context"
)


def print_preview(
    terminal: Terminal,
    model: Transformer,
    ranks: int,
    corpus: Corpus,
    stream: Stream,
    steps: int,
    settings: Settings,
) -> None:
    """Print the model, its backends, and the table of the data."""
    terminal.note(f"moetrain {__version__}: {model_line(model)}, {ranks} rank{'s' * (ranks > 1)}")
    for line in model.backends(model.lm_head.weight.device).notes:
        terminal.note(line)
    for domain in corpus.domains:
        for place in domain.report.bad_places:
            terminal.note(f"skipped {place}")
        for line in domain.report.left_out_files:
            terminal.note(f"{domain.name}: left out {line}")
    summary = data_summary(corpus, stream, steps, settings)
    terminal.table("data", *data_table(summary))
    terminal.note(data_legend(summary))
    for line in short_lines(summary, settings):
        terminal.note(line)


def layout_line(model: Transformer, layout: ParallelLayout, settings: Settings) -> str | None:
    """How the model is laid out over ranks, and the memory that its state takes on this one.

    None where it is whole, as it is to be.
    """
    held = sum(local_tensor(parameter).numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    if held == whole:
        sharding = settings.train.sharding
        each = " on each machine" if sharding == "hybrid" else ""
        return f"train.sharding={sharding}: no effect with one rank{each}" if sharding != "none" else None
    parts = [f"layout: {layout.world_size} ranks"]
    if layout.shards > 1:
        parts.append(f"the model sharded over {layout.shards}")
    if (ranks := layout.expert_ranks) > 1:
        parts.append(f"the experts of each layer split over {ranks}, {settings.model.num_experts // ranks} on each")
    state = held * (8 + {"fp32": 8, "bf16": 4}[settings.optim.state_precision])
    size = f"each holds {held / whole:.0%} of the weights; with gradients and moments {state / 2**30:.3f} GiB"
    return f"{', '.join(parts)}; {size}"


def model_line(model: Transformer) -> str:
    """Size and kind of the model."""
    every, active = model.parameter_counts()
    settings = model.settings
    mlp = f"{settings.num_experts} experts, top {settings.num_experts_per_tok}"
    if settings.experts == "dense":
        blocks = settings.dense_experts
        mlp = f"dense, monitored as {blocks} blocks of units" if blocks else "dense, not monitored: model.dense_experts"
    dtype = str(model.dtype).removeprefix("torch.")
    layers = f"{settings.num_hidden_layers} layer{'s' * (settings.num_hidden_layers > 1)}"
    size = f"{every / 1e6:.1f}M parameters, {active / 1e6:.1f}M active"
    return f"{size}, {layers}, {mlp}, {dtype}"


def data_summary(corpus: Corpus, stream: Stream, steps: int, settings: Settings) -> dict[str, dict[str, Any]]:
    """Per domain: documents read and dropped, files left out, tokens met and unused, copies; for ``summary.json``."""
    trained_tokens = stream_tokens(stream, len(corpus.domains), 0, steps)
    found: dict[str, dict[str, Any]] = {}
    for number, domain in enumerate(corpus.domains):
        length = stream.samples.length[stream.samples.domain == number]
        report, index = domain.report, domain.index
        first_copies = index["length"][~index["repeated"]]
        found[domain.name] = {
            "documents": report.documents,
            "heldout_documents": report.heldout_documents,
            "duplicates_dropped": report.duplicates,
            "bad_dropped": report.bad,
            "empty_dropped": report.empty,
            "left_out": report.left_out,
            "left_out_files": report.left_out_files,
            "train_tokens": int(length.sum()),
            "met_tokens": int(trained_tokens[number]),
            "unused_share": 1 - float(trained_tokens[number]) / float(length.sum()),
            "copies": settings.data.domains[domain.name].copies,
            "bytes_per_token": report.text_bytes / max(1, int(first_copies.sum())),
            "long_enough_share": float((length >= settings.panel_tokens(domain.name)).mean()),
        }
    return found


def data_table(summary: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the table of the data; files left out have a column where there are any."""
    counted = [key for key in _COUNTED if key != "left_out" or any(domain[key] for domain in summary.values())]
    rows = [
        [
            name,
            *(f"{domain[key]:,}" for key in counted),
            f"{domain['bytes_per_token']:.2f}",
            f"{domain['long_enough_share']:.0%}",
            f"{domain['copies']}",
            f"{domain['unused_share']:.0%}",
        ]
        for name, domain in summary.items()
    ]
    return ["domain", *(_COUNTED[key] for key in counted), "bytes/tok", "long", "copies", "unused"], rows


def data_legend(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """What the headings of the table of the data mean."""
    files = "left out: files; " if any(domain["left_out"] for domain in summary.values()) else ""
    return (
        f"docs: all that were read, the held-out ones included; duplicates, bad: dropped; {files}"
        "text tokens: of the stream, all copies; long: share of its samples long enough for the panel; "
        "unused: share of its text that the run does not reach"
    )


def short_lines(summary: Mapping[str, Mapping[str, Any]], settings: Settings) -> list[str]:
    """One line per domain whose samples are all too short to be compared."""
    return [
        f"{name}: no sample has {settings.panel_tokens(name)} tokens, so none is compared: lower panel.tokens or "
        f"data.domains.{name}.panel_tokens"
        for name, domain in summary.items()
        if settings.watches_routing and not domain["long_enough_share"]
    ]


def stream_line(stream: Stream, steps: int, settings: Settings) -> str:
    """Length of the run."""
    tokens = int(stream_tokens(stream, int(stream.samples.domain.max()) + 1, 0, steps).sum())
    return (
        f"{steps:,} steps of {settings.train.batch_rows} rows of {settings.data.seq_len} tokens: {tokens:,} text "
        f"tokens; rows are {stream.fullness():.1%} full"
    )
