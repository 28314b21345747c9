"""The token files that a path names, their format, and what is left out of a folder."""

from __future__ import annotations

import glob
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Literal

from moetrain.data.errors import DataError
from moetrain.data.sources.files import HIDDEN, Listing
from moetrain.data.sources.remote import is_url
from moetrain.data.sources.tokens import litdata, mds, megatron
from moetrain.data.sources.tokens.described import ChunkIndex, MdsIndex, ShardEntry, parse

Format = Literal["megatron", "olmo", "mds", "litdata"]

_KNOWN = "Megatron's .bin with .idx, OLMo's .npy, MDS or litdata"
_UNKNOWN = "of no token format"
_NOT_LISTED = "not named by index.json"


def token_format(path: Path, given: Format | None) -> Format | None:
    """The format of a token file, as given or by its name and what lies beside it; None if it has another."""
    if given == "olmo":
        return "olmo"
    found: Format | None = None
    if path.suffix == ".mds" or (path.suffix in mds.COMPRESSIONS and path.with_suffix("").suffix == ".mds"):
        found = "mds"
    elif path.suffix == ".npy":
        found = "olmo"
    elif path.suffix == ".bin":
        if path.name.startswith("chunk-") and (path.parent / litdata.INDEX).is_file():
            found = "litdata"
        else:
            found = "megatron" if given == "megatron" or megatron.index_of(path).is_file() else "olmo"
    return found if given in (None, found) else None


def described_by(path: Path, given: Format | None) -> list[Path]:
    """The files that say how a token file is read."""
    match token_format(path, given):
        case "megatron":
            return [megatron.index_of(path)]
        case "litdata":
            return [path.parent / litdata.INDEX]
    return []


def list_token_files(pattern: str, key: str, given: Format | None) -> Listing:
    """The token files of a path or pattern, in order; folders, named or matched, stand for those below them.

    Raises:
        DataError: no file, or one that an index names is missing or of another size; begins with ``key``.
    """
    if is_url(pattern):
        raise DataError(f"{key}: {pattern}: token files are read from disk only: copy them to a folder")
    if os.path.lexists(pattern):
        matched = [Path(pattern)]
    elif os.path.isfile(f"{pattern}.bin"):  # as Megatron names its data
        matched = [Path(f"{pattern}.bin")]
    else:
        matched = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    files: dict[Path, None] = {}
    left_out: defaultdict[str, list[Path]] = defaultdict(list)
    for path in matched:
        if path.is_dir():
            files.update(dict.fromkeys(_below(path, key, given, left_out)))
        elif path.name == litdata.INDEX:
            files.update(dict.fromkeys(_indexed(path.parent, key, given) or []))
        elif path.suffix == ".idx" and given in (None, "megatron"):
            files[_data_of(path, key)] = None
        elif not path.is_file() or token_format(path, given) is None:
            left_out[_UNKNOWN].append(path)
        else:
            files[path] = None
    listing = Listing(list(files), dict(left_out))
    if not files:
        if not matched:
            raise DataError(f"{key}: no file at {pattern}: correct the path, or data.root it starts from")
        kind = _KNOWN if given is None else f"files of format {given}"
        why = f" ({', '.join(listing.left_out_lines())})" if left_out else ""
        raise DataError(f"{key}: no token file at {pattern}{why}: give {kind}, or set format: olmo for raw ids")
    return listing


def _data_of(index: Path, key: str) -> Path:
    """The data file of a Megatron index."""
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{key}: {data} is missing beside {index.name}: fetch it")
    return data


def _below(folder: Path, key: str, given: Format | None, left_out: defaultdict[str, list[Path]]) -> list[Path]:
    """The token files below a folder; links are followed."""
    files: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        left_out[HIDDEN] += [here / name for name in sorted((*folders, *names)) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        listed = _indexed(here, key, given) if litdata.INDEX in shown else None
        if listed is not None:
            files += listed
            both = {path.with_suffix("") if path.suffix in mds.COMPRESSIONS else path for path in listed}
            below = (path for path in sorted(here.rglob("*")) if path.is_file() and path.name != litdata.INDEX)
            left_out[_NOT_LISTED] += [
                path for path in below if path not in listed and path not in both and path.with_suffix("") not in both
            ]
            folders.clear()
            continue
        for name in shown:
            path = here / name
            if name.endswith(".idx") and given in (None, "megatron"):
                if (data := _data_of(path, key)) not in files:
                    files.append(data)
            elif path.suffix in (".bin", ".npy", ".mds", *mds.COMPRESSIONS) and token_format(path, given) is not None:
                if path not in files:
                    files.append(path)
            else:
                left_out[_UNKNOWN].append(path)
    for reason in [reason for reason, paths in left_out.items() if not paths]:
        del left_out[reason]
    return files


def _indexed(folder: Path, key: str, given: Format | None) -> list[Path] | None:
    """The files that the ``index.json`` of a folder names; None if it is not one of MDS or litdata.

    Raises:
        DataError: one is missing or of another size, or the index is of an unknown version.
    """
    path = folder / litdata.INDEX
    content = path.read_bytes()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    if "shards" in tree and given in (None, "mds"):
        index = parse(MdsIndex, content, path)
        if index.version != 2:
            raise DataError(
                f"{key}: {path}: version {index.version} of MDS is not known, 2 is: write it again with "
                "mosaicml-streaming"
            )
        return [_shard(folder, shard, key) for shard in index.shards]
    if "chunks" in tree and given in (None, "litdata"):
        chunks = [folder / chunk.filename for chunk in parse(ChunkIndex, content, path).chunks]
        missing = next((chunk for chunk in chunks if not chunk.is_file()), None)
        if missing is not None:
            raise DataError(f"{key}: {missing} is missing, although {path.name} beside it names it: fetch it")
        return chunks
    return None


def _shard(folder: Path, shard: ShardEntry, key: str) -> Path:
    """The file of an MDS shard: the plain one if it is there, else the compressed one."""
    named = (shard.raw_data, shard.zip_data)
    paths = [(folder / entry.basename, entry.bytes) for entry in named if entry is not None]
    for path, size in paths:
        if not path.is_file():
            continue
        if size is not None and path.stat().st_size != size:
            raise DataError(
                f"{key}: {path}: {path.stat().st_size} bytes, but {litdata.INDEX} says {size}: fetch both again"
            )
        if path.suffix != ".mds" and path.suffix not in mds.COMPRESSIONS:
            raise DataError(
                f"{key}: {path}: is compressed in a way that is not read ({', '.join(mds.COMPRESSIONS)} are): "
                "decompress it, or write it again with compression='zstd'"
            )
        return path
    name = paths[0][0] if paths else folder
    raise DataError(f"{key}: {name} is missing, although {litdata.INDEX} beside it names it: fetch it")
