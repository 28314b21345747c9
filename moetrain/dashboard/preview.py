"""What is about to be trained, in words and a table, before the first step."""

from __future__ import annotations

from moetrain.config import Settings
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream, stream_tokens
from moetrain.model.transformer import Transformer

DATA_COLUMNS = (
    "domain",
    "docs",
    "held out",
    "twice",
    "bad",
    "train tokens",
    "bytes/token",
    "long",
    "unused",
)


def model_line(model: Transformer) -> str:
    """Size and kind of the model."""
    every, active = model.parameter_counts()
    settings = model.settings
    mlp = (
        "dense"
        if settings.experts == "dense"
        else f"{settings.num_experts} experts, top {settings.num_experts_per_tok}"
    )
    dtype = str(model.dtype).removeprefix("torch.")
    size = f"{every / 1e6:.1f}M parameters, {active / 1e6:.1f}M active"
    return f"{size}, {settings.num_hidden_layers} layers, {mlp}, {dtype}"


def data_rows(corpus: Corpus, stream: Stream, steps: int, settings: Settings) -> list[list[str]]:
    """By domain: what was read, what will be trained on, the share of samples long enough to be monitored."""
    met = stream_tokens(stream, len(corpus.domains), steps)
    rows = []
    for number, domain in enumerate(corpus.domains):
        length = stream.samples.length[stream.samples.domain == number]
        report, index = domain.report, domain.index
        first_copies = index["length"][~index["repeated"]]
        counts = (report.documents, report.heldout_documents, report.duplicates, report.bad, int(length.sum()))
        rows.append(
            [
                domain.name,
                *(f"{count:,}" for count in counts),
                f"{report.text_bytes / max(1, int(first_copies.sum())):.2f}",
                f"{(length >= settings.panel_tokens(domain.name)).mean():.0%}",
                f"{1 - met[number] / length.sum():.0%}",
            ]
        )
    return rows


def stream_line(stream: Stream, steps: int, settings: Settings) -> str:
    """Length of the run."""
    tokens = int(stream_tokens(stream, int(stream.samples.domain.max()) + 1, steps).sum())
    return (
        f"{steps:,} steps of {settings.train.batch_rows} rows of {settings.data.seq_len} tokens: {tokens:,} text "
        f"tokens; rows are {stream.fullness():.1%} full"
    )
