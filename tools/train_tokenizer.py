"""Train the tokenizer of a configuration, and measure its bytes per token on each domain.

A run of the configuration finds it in the cache (data.cache_dir); other runs can use it with tokenizer.model=FILE.

    python tools/train_tokenizer.py configs/four_domains.yaml tokenizer.vocab_size=8192 --output four.model
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from common.command_line import make_parser, reports_errors, write_json

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.data.corpus import prepare_tokenizer
from moetrain.data.dedup import SeenIds
from moetrain.data.documents import Document, DomainReport, read_documents
from moetrain.data.errors import DataError
from moetrain.data.split import split_domains
from moetrain.data.token_shards import encode_documents
from moetrain.data.tokenizer import Tokenizer
from moetrain.loggers.terminal import Terminal

_MEASURED = 500_000  # bytes of held-out text per domain, which the tokenizer was not trained on


def measure(tokenizer: Tokenizer, settings: Settings) -> dict[str, dict[str, Any]]:
    """Documents, bytes, tokens and bytes per token of each domain's held-out text, or else of its first document."""
    found = {}
    for name, domain in settings.data.domains.items():
        documents: list[Document] = []
        size, first, report = 0, None, DomainReport(name)
        for document in read_documents(name, domain, settings.data, settings.run.seed, SeenIds(), report, tokenizer):
            first = first or document
            if document.heldout:
                documents.append(document)
                size += document.text_bytes
            if size >= _MEASURED:
                break
        assert first is not None  # a domain without documents is an error
        index, ids = encode_documents(documents or [first], tokenizer, threads=1)
        size, tokens = int(index["text_bytes"].sum()), len(ids)
        found[name] = {"documents": len(index), "bytes": size, "tokens": tokens, "bytes_per_token": size / tokens}
    return found


@reports_errors(SettingsError, DataError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Train, measure and print; returns the exit status: 0 done, 2 invalid settings or data."""
    parser = make_parser(__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override settings")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the tokenizer to this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_intermixed_args(arguments)
    terminal = Terminal()
    settings = split_domains(load_settings(options.config, options.overrides), terminal.preparing)
    start = time.monotonic()
    tokenizer, path = prepare_tokenizer(settings, terminal.preparing)
    seconds = time.monotonic() - start
    found = measure(tokenizer, settings)
    cells = [
        [name, *(f"{row[key]:,}" for key in ("documents", "bytes", "tokens")), f"{row['bytes_per_token']:.2f}"]
        for name, row in found.items()
    ]
    terminal.table("held-out text", ["domain", "docs", "bytes", "tokens", "bytes/token"], cells)
    terminal.note(f"{tokenizer.vocab_size:,} tokens, in {seconds:.1f} s: {path}")
    if options.output:
        shutil.copyfile(path, options.output)
    record = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "seconds": seconds}
    write_json(options.json, record | {"domains": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
