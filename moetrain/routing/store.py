"""Panel readings on disk, in Parquet: every logged panel metric can be computed again from these files.

A reading has up to three files. ``panel``: per sample the routing of its even and odd tokens in float16, the tokens
sent to each expert, and its loss. ``router``: Gram blocks of the routers, which is all that cosines need. ``answers``:
the routing at the tokens that marked answers are predicted from. Metrics are always computed from these rounded values,
in float64, so that a later report agrees exactly with the values that were logged.

Shapes: P panel samples, L layers, E experts, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moetrain.atomic_io import PARTIAL, write_atomically
from moetrain.fault_injection import fault_point
from moetrain.routing.answers import AnswerRouting, no_answers
from moetrain.routing.panel import CELLS, Panel, PanelReading

FOLDER = "routing"
"""The folder of a run that holds the files."""


class StoreError(ValueError):
    """A file that cannot be read; the message names it."""


@dataclass(frozen=True)
class TrainingContext:
    """State of the training at a reading: tokens, and controls of the phase rule."""

    tokens: int = 0  # trained on so far
    router_entropy: float | None = None  # mean over tokens and layers, nats; None before the first step
    load_cv: float | None = None  # coefficient of variation of the experts' load, mean over layers


@dataclass(frozen=True)
class StoredReading:
    """One reading as stored; arrays in the order of the panel."""

    step: int
    domain: np.ndarray  # object [P], names
    cell: np.ndarray  # int8 [P], see `moetrain.routing.panel.CELLS`
    document: np.ndarray  # uint64 [P]
    piece: np.ndarray  # int32 [P]
    first_step: np.ndarray  # int64 [P], the step that first trains on the text, 0 if none does
    tokens: np.ndarray  # int32 [P], number of first text tokens whose routing is stored
    loss: np.ndarray  # float32 [P]
    initial: np.ndarray  # float32 [P], the loss before the first step; NaN where that was not read
    difficulty: np.ndarray  # float32 [P], loss under the frequencies of tokens, nats; NaN in older runs
    claim_gain: np.ndarray  # float32 [P], see `moetrain.routing.claims`; NaN where it was not read
    claim: np.ndarray  # float32 [P], likewise
    even: np.ndarray  # float16 [P, L, E]
    odd: np.ndarray  # float16 [P, L, E]
    counts: np.ndarray  # uint16 [P, L, E]
    inputs: np.ndarray  # float16 [P, L, D], mean layer inputs; D is 0 without panel.linear_kernel
    blocks: tuple[np.ndarray, np.ndarray]  # float32 [L, E, E] and [L - 1, E, E]
    answers: AnswerRouting  # weights float16 [A, L, E]
    training_context: TrainingContext = TrainingContext()

    @cached_property
    def finite(self) -> np.ndarray:
        """Whether the routing of each sample is finite, bool [P]; the others are in no metric."""
        return np.isfinite(self.even).all((1, 2)) & np.isfinite(self.odd).all((1, 2))

    @cached_property
    def weights(self) -> np.ndarray:
        """Sample routing weights g, float64 [P, L, E]: token-weighted mean of the halves, normalised to sum to 1."""
        even_tokens = (self.tokens + 1) // 2
        share = (even_tokens / np.maximum(self.tokens, 1))[:, None, None]
        with np.errstate(invalid="ignore"):  # samples whose routing is not finite
            mean = share * self.even.astype(np.float64) + (1 - share) * self.odd.astype(np.float64)
            return mean / mean.sum(-1, keepdims=True)

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Routing of the even and the odd tokens, float64 [P, L, E], each summing to 1; NaN without odd tokens."""
        even, odd = self.even.astype(np.float64), self.odd.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return even / even.sum(-1, keepdims=True), odd / odd.sum(-1, keepdims=True)


def to_stored(
    panel: Panel,
    reading: PanelReading,
    domains: Collection[str],
    blocks: tuple[np.ndarray, np.ndarray],
    training_context: TrainingContext = TrainingContext(),
    initial: np.ndarray | None = None,
    claims: tuple[np.ndarray, np.ndarray] | None = None,
) -> StoredReading:
    """A reading, rounded as it is stored.

    Args:
        panel: the panel that was read.
        reading: of the panel.
        domains: names by number.
        blocks: Gram blocks of the routers, see `moetrain.grokking.gram_blocks`.
        training_context: state of the training.
        initial: losses before the first step, float32 [P]; None where they were not read.
        claims: gain and claim of each sample, see `moetrain.routing.claims.panel_claims`; None where not read.
    """
    names = np.array(list(domains), dtype=object)
    nothing = np.full_like(reading.loss, np.nan)
    claim_gain, claim = (nothing, nothing) if claims is None else claims
    return StoredReading(
        step=reading.step,
        domain=names[panel.samples.domain],
        cell=panel.cell,
        document=panel.samples.document,
        piece=panel.samples.piece,
        first_step=panel.first_step,
        tokens=panel.tokens,
        loss=reading.loss,
        initial=nothing if initial is None else initial,
        difficulty=panel.difficulty,
        claim_gain=claim_gain,
        claim=claim,
        even=reading.even.astype(np.float16),
        odd=reading.odd.astype(np.float16),
        counts=reading.counts,
        inputs=reading.inputs.astype(np.float16),
        blocks=blocks,
        answers=replace(reading.answers, weights=reading.answers.weights.astype(np.float16)),
        training_context=training_context,
    )


def write_reading(run: Path, stored: StoredReading) -> list[Path]:
    """Write the files of a reading, each atomically; returns their paths, the panel's first.

    Raises:
        OSError: nothing was written, for instance because the disk is full.
    """
    folder = run / FOLDER
    layers, experts = stored.even.shape[1:]
    columns = {
        "step": np.full(len(stored.cell), stored.step),
        "domain": pa.array(stored.domain.tolist()).dictionary_encode(),
        "cell": pa.array([CELLS[cell] for cell in stored.cell]).dictionary_encode(),
        "document": stored.document,
        "piece": stored.piece,
        "first_step": stored.first_step,
        "tokens": stored.tokens,
        "loss": stored.loss,
        "initial": stored.initial,
        "difficulty": stored.difficulty,
        "claim_gain": stored.claim_gain,
        "claim": stored.claim,
        "even": fixed_lists(stored.even),
        "odd": fixed_lists(stored.odd),
        "counts": fixed_lists(stored.counts),
    }
    if stored.inputs.size:
        columns["inputs"] = fixed_lists(stored.inputs)
    answers = stored.answers
    shape = {"layers": str(layers), "experts": str(experts)}
    about = shape | {"answers": str(len(answers))}
    context = {name: "" if value is None else repr(value) for name, value in asdict(stored.training_context).items()}
    own, following = stored.blocks
    router = {"own": fixed_lists(own), "next": fixed_lists(np.concatenate([following, np.zeros_like(own[:1])]))}
    # The panel's file is written last: if it exists, the reading is complete.
    pieces = {"router": (pa.table(router), shape), "panel": (pa.table(columns), about | context)}
    if len(answers):
        numbers = {"member": answers.member, "place": answers.place, "token": answers.token}
        table = pa.table(numbers | {"weights": fixed_lists(answers.weights)})
        pieces = {"answers": (table, shape), **pieces}
    written: list[Path] = []
    try:
        for name, (table, metadata) in pieces.items():
            written.append(write_table(folder / f"{name}_{stored.step:08d}.parquet", table, metadata))
    except OSError:
        for path in written:
            path.unlink()
        raise
    return written[::-1]


def has_reading(run: Path, step: int) -> bool:
    """Whether a run has a reading of its panel at a step."""
    return (run / FOLDER / f"panel_{step:08d}.parquet").is_file()


def read_reading(run: Path, step: int) -> StoredReading:
    """A reading of a run.

    Raises:
        StoreError: a file is missing, truncated or corrupt; the message names it.
    """
    panel_file = run / FOLDER / f"panel_{step:08d}.parquet"
    router_file = run / FOLDER / f"router_{step:08d}.parquet"
    table, layers, experts = _read_matrices(panel_file)
    router, _, _ = _read_matrices(router_file)
    try:
        answers = _read_answers(run / FOLDER / f"answers_{step:08d}.parquet", table, layers, experts)
        return _as_reading(step, table, router, answers, layers, experts)
    except StoreError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise StoreError(
            f"{panel_file} and {router_file.name}: not a reading ({error}): remove both; this reading is lost"
        ) from None


def _read_answers(path: Path, panel: pa.Table, layers: int, experts: int) -> AnswerRouting:
    """The answer tokens of a reading; none if its panel file names no number of them, as in older runs."""
    count = panel.schema.metadata.get(b"answers", b"0")
    if count == b"0":
        return no_answers(layers, experts, np.float16)
    table, *_ = _read_matrices(path)
    try:
        member, place, token = (_flat_numbers(table[name]) for name in ("member", "place", "token"))
        weights = _flat(table["weights"]).reshape(len(member), layers, experts)
        if len(member) != int(count) or not (0 <= member.min() <= member.max() < len(panel)):
            raise ValueError("it belongs to another panel")
        return AnswerRouting(member=member, place=place, token=token, weights=weights)
    except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise _corrupt(path, error) from None


def _as_reading(
    step: int, table: pa.Table, router: pa.Table, answers: AnswerRouting, layers: int, experts: int
) -> StoredReading:
    def matrix(name: str) -> np.ndarray:
        return _flat(table[name]).reshape(-1, layers, experts)

    own, following = (_flat(router[name]).reshape(layers, experts, experts) for name in ("own", "next"))
    return StoredReading(
        step=step,
        domain=np.array(table["domain"].to_pylist(), dtype=object),
        cell=np.array([CELLS.index(cell) for cell in table["cell"].to_pylist()], np.int8),
        document=_flat_numbers(table["document"]),
        piece=_flat_numbers(table["piece"]),
        first_step=_flat_numbers(table["first_step"]),
        tokens=_flat_numbers(table["tokens"]),
        loss=_flat_numbers(table["loss"]),
        **{name: _numbers_or_nan(table, name) for name in ("initial", "difficulty", "claim_gain", "claim")},
        even=matrix("even"),
        odd=matrix("odd"),
        counts=matrix("counts"),
        inputs=_flat(table["inputs"]).reshape(len(table), layers, -1)
        if "inputs" in table.column_names
        else np.zeros((len(table), layers, 0), np.float16),
        blocks=(own, following[:-1]),
        answers=answers,
        training_context=_training_context(table.schema.metadata),
    )


def _training_context(metadata: Mapping[bytes, bytes]) -> TrainingContext:
    entropy, load_cv = (metadata.get(name, b"") for name in (b"router_entropy", b"load_cv"))
    return TrainingContext(
        int(metadata.get(b"tokens", 0)), float(entropy) if entropy else None, float(load_cv) if load_cv else None
    )


def read_readings(run: Path) -> Iterator[StoredReading]:
    """All readings of a run, by step."""
    for path in sorted((run / FOLDER).glob("panel_????????.parquet")):
        yield read_reading(run, int(path.stem.removeprefix("panel_")))


def list_files(run: Path) -> list[str]:
    """The files of a run, relative to its folder, as a checkpoint's manifest lists them."""
    return sorted(path.relative_to(run).as_posix() for path in (run / FOLDER).glob("*.parquet"))


def remove_unlisted(run: Path, listed: Collection[str]) -> None:
    """Remove files that a checkpoint does not list: they were written after it, or are partial."""
    unfinished = [path.relative_to(run).as_posix() for path in (run / FOLDER).glob("*" + PARTIAL)]
    for name in {*list_files(run), *unfinished} - set(listed):
        (run / name).unlink()
        fault_point("remove unlisted piece")


def fixed_lists(array: np.ndarray) -> pa.FixedSizeListArray:
    """An array as a column of lists, one per row."""
    flat = np.ascontiguousarray(array).reshape(len(array), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), max(1, flat.shape[1]))


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return _flat_numbers(pa.chunked_array([chunk.flatten() for chunk in column.chunks], type=column.type.value_type))


def _flat_numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks])


def _numbers_or_nan(table: pa.Table, name: str) -> np.ndarray:
    """A column that the files of older runs do not have."""
    return _flat_numbers(table[name]) if name in table.column_names else np.full(len(table), np.nan, np.float32)


def write_table(path: Path, table: pa.Table, metadata: dict[str, str]) -> Path:
    """Write a table atomically, with metadata.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(exist_ok=True)
    named = table.replace_schema_metadata(metadata)
    # Checksums per page: reading detects a flipped bit.
    return write_atomically(
        path, lambda partial: pq.write_table(named, partial, compression="zstd", write_page_checksum=True)
    )


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A file with its metadata in the table's schema; all columns, or those named.

    Raises:
        StoreError: it is missing, truncated or corrupt; the message names it.
    """
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _corrupt(path, error) from None


def _read_matrices(path: Path) -> tuple[pa.Table, int, int]:
    """A file with its numbers of layers and experts."""
    table = read_table(path)
    metadata = table.schema.metadata or {}
    try:
        layers, experts = int(metadata[b"layers"]), int(metadata[b"experts"])
        if min(layers, experts) < 1:
            raise ValueError(f"{layers} layers of {experts} experts")
        return table, layers, experts
    except (KeyError, ValueError) as error:
        raise _corrupt(path, error) from None


def _corrupt(path: Path, error: Exception) -> StoreError:
    reason = " ".join(str(error).split())
    return StoreError(f"{path}: truncated or corrupt ({reason}): remove it; its reading is lost")
