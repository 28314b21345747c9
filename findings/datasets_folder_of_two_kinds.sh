#!/usr/bin/env bash
# datasets 5.2.0: load_dataset of a local folder that holds files of two kinds reads one kind and says nothing of the
# other.
#
# Seen with datasets 5.2.0, Python 3.11: a folder with a .jsonl file of 3 rows and a .parquet file of 2 rows gives the 2
# rows of the Parquet file, status 0, no warning. This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0
cat > "$folder/case.py" <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

root = Path(sys.argv[1])
caught = []
warnings.showwarning = lambda message, *_: caught.append(str(message))


def rows(name, *files):
    folder = root / name
    folder.mkdir()
    for file, texts in files:
        if file.endswith(".parquet"):
            pq.write_table(pa.table({"text": texts}), folder / file)
        else:
            (folder / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(root / "cache"))["text"]


both = list(rows("both", ("a.jsonl", ["one", "two", "three"]), ("b.parquet", ["four", "five"])))
alone = list(rows("alone", ("b.parquet", ["four", "five"])))
print("datasets", datasets.__version__)
print("folder of .jsonl (3 rows) and .parquet (2 rows):", both, "warnings:", caught)
print("folder of .parquet alone:", alone)
assert alone == ["four", "five"]
assert both == ["four", "five"] and not caught, "both kinds are read now, or it says so"
PYTHON
HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/case.py" "$folder"
