"""Measure time and peak memory of data preparation, with an empty cache and over all of its processes.

With --synthetic BYTES it first writes that much text: the configuration's own documents with their lines shuffled, so
that there are no duplicates. Text and cache are deleted afterwards.

    MOETRAIN_DATA=/data python tools/bench_preparation.py configs/four_domains.yaml --synthetic 2000000000
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.command_line import make_parser, reports_errors

from moetrain.config import Settings, SettingsError, load_settings
from moetrain.data.contamination import all_documents
from moetrain.data.errors import DataError

_FILES = 8
_PREPARE = """
import sys
from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
prepare_corpus(load_settings(sys.argv[1], sys.argv[2:]))
"""


def write_synthetic(settings: Settings, folder: Path, size: int) -> None:
    """Write ``size`` bytes of text to several JSON Lines files."""
    rng = random.Random(0)
    texts = [document.text or "" for document in all_documents(settings)]
    for number in range(_FILES):
        written = count = 0
        with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as file:
            while written < size // _FILES:
                lines = rng.choice(texts).split("\n")
                rng.shuffle(lines)
                text = f"{number}.{count}\n" + "\n".join(lines)
                written += len(text.encode())
                count += 1
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def resident_bytes(process: int) -> int:
    """Memory of a process and its descendants; shared pages are counted once per process."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = [
            int(child)
            for thread in Path(f"/proc/{process}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, children))


def measure(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a preparation in a subprocess."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-c", _PREPARE, *arguments])
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - start, peak


@reports_errors(SettingsError, DataError, OSError)
def main(arguments: list[str] | None = None) -> int:
    """Prepare, measure, print one line of JSON; returns the exit status: 0 done, 2 invalid settings or data."""
    parser = make_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--synthetic", type=int, metavar="BYTES", help="measure this much synthetic text instead")
    options = parser.parse_intermixed_args(arguments)
    print(json.dumps(benchmark(options.config, options.overrides, options.synthetic)))
    return 0


def benchmark(config: str, overrides: list[str], synthetic: int | None = None) -> dict[str, float]:
    """Seconds, peak memory and text size of preparing a configuration's data, or that many bytes of synthetic text.

    Raises:
        SettingsError, DataError: invalid settings or data.
    """
    load_settings(config, overrides)  # report errors before the long work
    with tempfile.TemporaryDirectory() as name:
        overrides = [*overrides, f"data.cache_dir={name}/cache"]
        if synthetic:
            (Path(name) / "texts").mkdir()
            write_synthetic(load_settings(config, overrides), Path(name) / "texts", synthetic)
            config = f"{name}/synthetic.yaml"
            Path(config).write_text(f"data: {{domains: {{synthetic: {{path: {name}/texts}}}}}}\n")
        seconds, peak = measure([config, *overrides])
        folder = next(Path(name, "cache").glob("corpus-*"))
        domains = json.loads((folder / "corpus.json").read_text())["domains"]
        text = sum(domain["text_bytes"] for domain in domains.values())
        tokens = sum(path.stat().st_size for path in folder.glob("*/tokens.bin")) // 2
    return {
        "seconds": round(seconds, 1),
        "memory_mb": round(peak / 1e6),
        "text_mb": round(text / 1e6),
        "documents": sum(domain["documents"] for domain in domains.values()),
        "million_tokens": round(tokens / 1e6),
        "text_mb_per_second": round(text / 1e6 / seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
