"""Prepare the data of a run in advance: read and tokenize it, and print statistics per domain.

The run finds it in the cache (data.cache_dir). A killed preparation resumes.

    python tools/prepare_data.py configs/four_domains.yaml data.root=/data --json data.json --figure data.png

With probe items (--probes, or the setting probes.tasks) it also finds those that occur in the training text:

    python tools/prepare_data.py configs/four_domains.yaml --probes /data/bench/*.gz --contaminated-json found.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common.command_line import make_parser, reports_errors, write_json
from common.figures import new_figure, save

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.data.contamination import ContaminationReport, TaskCount, all_documents, contaminated
from moetrain.data.corpus import Corpus, prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.items import Item, read_all_items
from moetrain.data.packing import cut_samples
from moetrain.data.split import split_domains
from moetrain.data.stream import nothing_held_out
from moetrain.loggers.terminal import Terminal
from moetrain.probes.tasks import read_task_items

_DOCUMENTS = {
    "documents": "docs",
    "heldout_documents": "held-out",
    "duplicates": "duplicates",
    "empty": "empty",
    "filtered": "filtered",
    "bad": "bad",
    "left_out": "files left out",
}
_TOKENS = {
    "tokens": "tokens",
    "bytes_per_token": "bytes/token",
    "length_median": "length",
    "length_95": "95%",
    "length_max": "longest",
    "long_share": "long",
}


def summarize(corpus: Corpus, settings: Settings) -> dict[str, dict[str, Any]]:
    """Per domain: document counts, tokens of distinct documents, their lengths in tokens, and ``long_share``.

    ``long_share`` is the share of training samples that have at least the compared number of tokens.
    """
    samples = cut_samples(corpus, settings.data.seq_len, heldout=False)
    found = {}
    for number, domain in enumerate(corpus.domains):
        length = domain.index["length"][~domain.index["repeated"]]
        sample = samples.length[samples.domain == number]
        median, high = np.percentile(length, [50, 95])
        found[domain.name] = {
            **{key: value for key, value in domain.report.as_dict().items() if key != "domain"},
            "tokens": int(length.sum()),
            "bytes_per_token": domain.report.text_bytes / max(1, int(length.sum())),
            "length_mean": float(length.mean()),
            "length_median": float(median),
            "length_95": float(high),
            "length_max": int(length.max()),
            "samples": len(sample),
            "long_share": float((sample >= settings.panel_tokens(domain.name)).mean()) if len(sample) else 0.0,
        }
    return found


def write_figure(corpus: Corpus, settings: Settings, path: Path) -> None:
    """Draw each domain's tokens, and the distribution of its document lengths.

    Raises:
        SettingsError: matplotlib is missing, or cannot write this file.
    """
    figure, (left, right) = new_figure(2, width=5.5)
    names = [domain.name for domain in corpus.domains]
    for number, domain in enumerate(corpus.domains):
        index, color = domain.index, f"C{number % 10}"
        train = int(index["length"][~index["heldout"]].sum())
        heldout = int(index["length"][index["heldout"]].sum())
        left.barh(number, train / 1e6, color=color)
        left.barh(number, heldout / 1e6, left=train / 1e6, color=color, alpha=0.4)
        length = np.sort(index["length"][~index["repeated"]])
        shown = np.unique(np.linspace(0, len(length) - 1, 1000).astype(int))
        right.step(length[shown], (shown + 1) / len(length), where="post", color=color, label=domain.name)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("million tokens (pale: held-out)")
    for compared in {settings.panel_tokens(name) for name in names}:
        right.axvline(compared, color="black", linewidth=0.8, linestyle=":")
    right.axvline(settings.data.seq_len - 2, color="black", linewidth=0.8)
    place = (settings.data.seq_len - 2, 0.02)
    right.annotate("longest sample", place, rotation=90, fontsize=8, ha="right", va="bottom")
    right.set(xscale="log", ylim=(0, 1), ylabel="share of documents up to that length")
    right.set_xlabel("tokens per document (dotted: compared tokens)")
    right.legend(frameon=False, loc="upper left")
    save(figure, path)


def table_rows(found: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """The summary as cells of a table."""
    return [[name, *(_cell(key, values[key]) for key in columns)] for name, values in found.items()]


def _cell(key: str, value: float) -> str:
    if key == "bytes_per_token":
        return f"{value:.2f}"
    return f"{value:.0%}" if key == "long_share" else f"{value:,.0f}"


def contamination_rows(report: ContaminationReport) -> list[list[str]]:
    """Cells of a table, per task and in total; the share is of the items that are long enough to be searched for."""
    total = TaskCount()
    for count in report.tasks.values():
        total.items += count.items
        total.too_short += count.too_short
        total.contaminated += count.contaminated
    counts = report.tasks | ({"all": total} if len(report.tasks) > 1 else {})
    return [
        [name, f"{count.items:,}", f"{count.too_short:,}", f"{count.contaminated:,}", f"{count.share:.2%}"]
        for name, count in counts.items()
    ]


def check_probes(items: list[Item], settings: Settings, terminal: Terminal, path: Path | None) -> None:
    """Print how many probe items of each task occur in the training text, and list them in a file."""
    terminal.note(f"searching the training text for {len(items):,} probe items")
    start = time.monotonic()
    report = contaminated(items, all_documents(settings))
    columns = ["task", "items", "too short", "contaminated", "share"]
    terminal.table("probe items in the training text", columns, contamination_rows(report))
    terminal.note(f"searched in {time.monotonic() - start:.1f} s")
    write_json(path, report.as_dict())


@reports_errors(SettingsError, DataError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Prepare and print; returns the exit status: 0 done, 2 invalid settings or data."""
    parser = make_parser(__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override settings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also write a figure (needs matplotlib)")
    parser.add_argument("--probes", type=Path, nargs="+", metavar="FILE", help="search for these probe items")
    parser.add_argument("--contaminated-json", type=Path, metavar="FILE", help="list the items found in this file")
    options = parser.parse_intermixed_args(arguments)
    terminal = Terminal()
    settings = split_domains(load_settings(options.config, options.overrides), terminal.preparing)
    items = read_all_items(options.probes) if options.probes else read_task_items(settings)
    if options.contaminated_json and not items:
        raise SettingsError("--contaminated-json needs probe items: give --probes FILE, or set probes.tasks")
    start = time.monotonic()
    corpus = prepare_corpus(settings, terminal.preparing)
    seconds = time.monotonic() - start
    found = summarize(corpus, settings)
    for domain in corpus.domains:
        for place in domain.report.bad_places:
            terminal.note(f"skipped {place}")
        for line in domain.report.left_out_files:
            terminal.note(f"{domain.name}: left out {line}")
    for name, values in found.items():
        if not values["heldout_documents"]:
            terminal.note(f"training will refuse {nothing_held_out(name, values['documents'], settings)}")
    for title, columns in (("documents", _DOCUMENTS), ("tokens", _TOKENS)):
        terminal.table(title, ["domain", *columns.values()], table_rows(found, columns))
    terminal.note(
        f"{sum(values['tokens'] for values in found.values()):,} tokens with a vocabulary of "
        f"{corpus.tokenizer.vocab_size:,}, in {seconds:.1f} s; length: median; long: share of samples whose routing is "
        "compared"
    )
    if items:
        check_probes(items, settings, terminal, options.contaminated_json)
    record = {"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer.fingerprint, "seconds": seconds}
    write_json(options.json, record | {"domains": found})
    if options.figure:
        write_figure(corpus, settings, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
