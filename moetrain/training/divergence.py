"""The end of a run whose loss stays not finite: a dump from which its last skipped step can be replayed."""

from __future__ import annotations

from pathlib import Path

from moetrain.checkpoint.manager import write_checkpoint
from moetrain.data.corpus import Corpus
from moetrain.data.stream import Stream
from moetrain.models.transformer import Transformer
from moetrain.training.balancing import Balancing


def write_dump(
    dump: Path,
    model: Transformer,
    balancing: Balancing,
    stream: Stream,
    corpus: Corpus,
    step: int,
    tokens_trained: int,
) -> None:
    """Write the model, the rows of ``step`` (1 the first) and the names of their samples, in a checkpoint's format.

    Raises:
        OSError: nothing was written.
    """
    batch = stream.batch(step - 1, 0, stream.batch_rows)
    members = batch.samples_BS[batch.samples_BS >= 0].numpy()
    samples = {
        "domain": [corpus.domains[number].name for number in stream.samples.domain[members]],
        "document": stream.samples.document[members].tolist(),
        "piece": stream.samples.piece[members].tolist(),
    }
    tensors = {"model": model.state_dict(), "balancing": balancing.state(), "batch": vars(batch)}
    record = {"tokens_trained": tokens_trained, "corpus": corpus.fingerprint, "samples": samples}
    write_checkpoint(dump, step, tensors, record, {})
