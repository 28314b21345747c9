#!/usr/bin/env bash
# transformers 5.24.0: convert_tiktoken_to_fast gives special tokens other ids than the tiktoken encoding has, where those
# are not consecutive or not in the order of the dictionary.
#
# Seen with transformers 5.24.0, tiktoken 0.12.0, Python 3.11: an encoding of the 256 bytes with <|end|> = 300 and
# <|start|> = 256, as published encodings have gaps between their special ids. The converted tokenizer.json has
# <|end|> = 256 and <|start|> = 257; no warning. Ids of the bytes are right. This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tiktoken==0.12.0 blobfile==3.1.0
cat > "$folder/case.py" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import tiktoken
import tokenizers
import transformers
from transformers.integrations.tiktoken import convert_tiktoken_to_fast

caught = []
warnings.showwarning = lambda message, *_: caught.append(str(message))
wanted = {"<|end|>": 300, "<|start|>": 256}
encoding = tiktoken.Encoding(
    "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens=wanted
)
out = Path(sys.argv[1]) / "converted"
out.mkdir()
convert_tiktoken_to_fast(encoding, str(out))
fast = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
found = {mark: fast.token_to_id(mark) for mark in wanted}
print("transformers", transformers.__version__, "tiktoken", tiktoken.__version__)
print("tiktoken: ", {mark: encoding.encode_single_token(mark) for mark in wanted})
print("converted:", found, "warnings:", caught)
assert fast.encode("ab").ids == encoding.encode("ab") == [97, 98]
assert found == {"<|end|>": 256, "<|start|>": 257} and not caught, "the ids are kept now, or it says so"
PYTHON
"$folder/venv/bin/python" "$folder/case.py" "$folder"
