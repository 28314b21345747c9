"""The table of metrics: one row per metric, read by everything that computes, logs, compares or draws one.

To add a metric, write its function in `moetrain.grokking` and its row here. The panel, the streaming metrics,
TensorBoard, summary.json, `moetrain.open_run`, the report, the comparison, the correlations and the evidence of phase
verdicts read the row. Rows are in the order of TensorBoard's page ``Grokking monitor`` and of the report.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.grokking.consistency import GuardedMedian
from moetrain.metrics.cell import DOMAIN, HELDOUT, MODEL, PROBE, SEEN, STREAM, TO_COME, UNSEEN, Cell, CellName
from moetrain.metrics.metric import Metric
from moetrain.metrics.trainer_metrics import TRAINER_METRICS


def _mean_loss(cell: Cell) -> Estimate:
    return grokking.mean_over_documents(cell.losses, cell.documents)


def _frequency_loss(cell: Cell) -> Estimate | None:
    if not np.isfinite(cell.difficulty).all():
        return None  # a reading of an earlier version
    return grokking.mean_over_documents(cell.difficulty, cell.documents)


def _gap(cell: Cell) -> Estimate | None:
    """Between the first and the last tenth of the run, when one cell is trained on and the other is not yet."""
    tenth = max(1, cell.steps // 10)
    if not tenth <= cell.step <= cell.steps - tenth:
        return None
    return _gap_to(cell.peers[TO_COME], cell)


def _gap_heldout(cell: Cell) -> Estimate:
    return _gap_to(cell.peers[HELDOUT], cell)


def _gap_to(unseen: Cell, seen: Cell) -> Estimate:
    return grokking.memorized_gap(unseen.losses, seen.losses, unseen.documents, seen.documents)


def _memorized_share(cell: Cell) -> Estimate | None:
    unseen = cell.peers[UNSEEN]
    initial = np.concatenate([cell.initial, unseen.initial])
    if not np.isfinite(initial).all() or not len(initial):
        return None
    difficulties = unseen.difficulty, cell.difficulty
    return grokking.memorized_share(
        unseen.losses,
        cell.losses,
        float(initial.mean(dtype=np.float64)),
        unseen.documents,
        cell.documents,
        *(difficulties if np.isfinite(np.concatenate(difficulties)).all() else (None, None)),
    )


def _claim_ratio(cell: Cell) -> Estimate:
    known = np.isfinite(cell.claims).all(0)
    gains, claims = cell.claims[:, known]
    return grokking.claim_ratio(gains, claims, cell.documents[known])


def _left_out(cell: Cell) -> Estimate | None:
    answers = cell.answers
    if answers is None:
        return None
    return grokking.left_out(answers.weights, answers.sample, answers.place, answers.token)


def _individuality(cell: Cell) -> Estimate | None:
    both = cell.tokens > 1  # a single token has no odd half
    if both.sum() < 2:
        return None
    documents = None if cell.resampled is None else cell.resampled[both]
    return grokking.individuality(cell.even[both], cell.odd[both], cell.tau, cell.max_pairs, documents=documents)


def _sharing(cell: Cell) -> Estimate | None:
    if len(cell.foreign) < 2:
        return None
    others = cell.foreign_texts if len(cell.foreign_texts) else None
    return grokking.sharing(
        cell.weights, cell.foreign, cell.tau, cell.max_pairs, documents=cell.resampled, other_documents=others
    )


def _d_eff_linear(cell: Cell) -> Estimate | None:
    if not cell.inputs.size:
        return None
    return grokking.d_eff_estimate(cell.weights, cell.inputs.astype(np.float64), cell.resampled)


def _median(median: GuardedMedian) -> Estimate:
    return Estimate(median.median, median.low, median.high, median.samples, 0)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


_PANEL = (SEEN, TO_COME, HELDOUT)
_ALL = (*_PANEL, STREAM)

# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("phase", "phase", "Phase", (DOMAIN,), verdict=True, categories=True,
           chart="phase: 0 undecided, 1 learning, 2 memorizing, 3 generalizing, 4 settled"),
    Metric("share", "memorized/share", "Share of what was learned that is memory", (SEEN,), _memorized_share, least=1,
           evidence=3, compared=True, verdict=True,
           chart="memorized share (0 carries over to other texts, 1 is memory)"),
    Metric("left_out", "kernel/left_out", "Leave-one-out accuracy", (SEEN,), _left_out, predictor=8, evidence=7,
           compared=True, chart="leave-one-out accuracy (answers predicted from the routing of other samples)"),
    Metric("train_loss", "loss/train", "Training loss", (DOMAIN, MODEL), key="train_loss", predictor=10, compared=True,
           chart="training loss",
           text="Training loss in nats per predicted token, before the update, over the steps since the last point."),
    Metric("train_loss_average", "", "Moving average of training loss", (DOMAIN,), key="train_loss_average",
           predictor=11, text="Moving average of the training loss: each point has a weight of one tenth."),
    Metric("loss_seen", "loss/panel_seen", "Loss of samples trained on", (SEEN,), _mean_loss, least=1, evidence=1,
           compared=True, chart="panel loss: seen", by_sample=lambda cell: cell.losses,
           text="Mean loss of the panel samples that the run has trained on, in nats per token: over their first panel "
           "tokens or, where the document marks an answer, over the answer."),
    Metric("loss_to_come", "loss/panel_to_come", "Loss of samples to come", (TO_COME,), _mean_loss, least=1,
           text="Mean loss of the panel samples that the run first trains on in its last tenth, in nats per token."),
    Metric("loss_heldout", "loss/panel_heldout", "Loss of held-out samples", (HELDOUT,), _mean_loss, least=1,
           compared=True, chart="panel loss: held out",
           text="Mean loss of the panel samples that the run never trains on, in nats per token."),
    Metric("loss_unseen", "loss/panel_unseen", "Loss of samples not trained on", (UNSEEN,), _mean_loss, least=1,
           evidence=2,
           text="Mean loss of the panel samples that the run has not trained on by now, in nats per token: held-out "
           "samples, and the samples to come before they come."),
    Metric("loss_frequencies", "loss/panel_frequencies", "Loss of samples trained on, by token frequencies",
           (SEEN,), _frequency_loss, least=1, evidence=16,
           text="Mean loss of the panel samples that the run has trained on under the frequencies of tokens in their "
           "domain, in nats per token: what is known of a text before anything in it is used to predict the rest."),
    Metric("claim_ratio", "memorized/claim_ratio", "Claim ratio", (SEEN,), _claim_ratio, evidence=4, compared=True,
           chart="claim ratio (above 1: gains more from a text's own context than it believes)"),
    Metric("gap", "memorized/gap", "Gap to samples to come", (SEEN,), _gap, evidence=5, compared=True,
           chart="gap of samples to come over samples seen"),
    Metric("gap_heldout", "memorized/gap_heldout", "Gap to held-out samples", (SEEN,), _gap_heldout, evidence=6,
           compared=True, chart="gap of held-out samples over samples seen"),
    Metric("fraction", "memorized/fraction", "Share of samples memorized by the online rule", (SEEN,),
           chart="samples memorized by the online rule (share)"),
    Metric("validation_loss", "loss/validation", "Held-out loss", (DOMAIN,), key="validation_loss", predictor=12,
           text="Loss on held-out text in nats per predicted token."),
    Metric("bits_per_byte", "loss/validation_bpb", "Held-out loss, bits per byte", (DOMAIN,), key="bits_per_byte",
           compared=True,
           text="Loss on held-out text in bits per byte of text. It does not depend on the tokenizer."),
    Metric("d_path", "pathway/d_path", "Pathway distance, edits", (SEEN, STREAM), lambda cell: cell.distances[0],
           by_layer=lambda cell: grokking.d_path_by_layer(cell.weights, cell.tau, cell.max_pairs), predictor=1,
           compared=True),
    Metric("d_path_norm", "pathway/d_path_norm", "Pathway distance, normalised", _ALL, lambda cell: cell.distances[1],
           evidence=12, compared=True, figure="routing", chart="pathway distance, normalised",
           heldout_chart="control: pathway distance of held-out samples"),
    Metric("spread", "pathway/spread", "Spread of routing", _ALL, lambda cell: cell.statistic(grokking.spread),
           predictor=5, evidence=9, compared=True, figure="routing", log=True, chart="spread of routing"),
    Metric("effective_rank", "kernel/effective_rank", "Effective rank of routing", (SEEN,),
           lambda cell: cell.statistic(grokking.effective_rank),
           predictor=9, evidence=10, compared=True, figure="routing", chart="effective rank"),
    Metric("layer_cka", "pathway/layer_cka", "Agreement of consecutive layers (CKA)", (SEEN,),
           lambda cell: cell.statistic(grokking.layer_cka),
           predictor=6, evidence=11, compared=True, figure="routing", chart="agreement of consecutive layers (CKA)"),
    Metric("consistency", "pathway/consistency", "Pathway consistency", (SEEN,),
           lambda cell: _median(cell.consistency.consistency), predictor=2, compared=True, figure="consistency",
           chart="pathway consistency"),
    Metric("inconsistency", "pathway/inconsistency", "Pathway inconsistency", (SEEN, STREAM),
           lambda cell: _median(cell.consistency.inconsistency)),
    Metric("cosine", "pathway/cosine", "Cosine of consecutive layers", _ALL, lambda cell: cell.consistency.cosine,
           by_sample=lambda cell: _finite(grokking.cosine(cell.weights, cell.blocks)), predictor=3, evidence=8,
           compared=True, figure="consistency", chart="cosine of consecutive layers"),
    Metric("d_eff", "kernel/d_eff", "Effective dimension of routing", (SEEN,),
           lambda cell: grokking.d_eff_estimate(cell.weights, documents=cell.resampled),
           by_layer=lambda cell: grokking.d_eff_by_layer(cell.weights), top=64.0,
           predictor=7, compared=True, figure="routing", chart="effective dimension of the routing kernel"),
    Metric("d_eff_linear", "kernel/d_eff_linear", "Effective dimension of routing and content", (SEEN,), _d_eff_linear),
    Metric("individuality", "pathway/individuality", "Individuality: beyond a sample's own halves", (SEEN,),
           _individuality, evidence=13, compared=True, figure="controls",
           chart="control: individuality (above 0 where samples differ)"),
    Metric("sharing", "pathway/sharing", "Sharing: closer than to other domains", (SEEN,), _sharing, predictor=4,
           compared=True, figure="controls", chart="control: sharing (closer than to other domains)"),
    Metric("delay", "delay", "Delay of generalization after memorization", (DOMAIN,)),
    Metric("correlation", "correlation", "Rank correlation with probe accuracy", (DOMAIN,)),
    *TRAINER_METRICS,
)
# fmt: on


def find(name: str) -> Metric:
    """The row of a name.

    Raises:
        KeyError: there is none.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise KeyError(name)


def on_cell(cell: CellName) -> list[Metric]:
    """The rows that are computed on a cell."""
    return [metric for metric in METRICS if cell in metric.cells and metric.compute is not None]


def predictors() -> dict[str, str]:
    """By name, what the accuracy of probes is correlated with, and the key of ``summary.json`` of its newest value."""
    rows = sorted((metric for metric in METRICS if metric.predictor), key=lambda metric: metric.predictor)
    return {metric.name: metric.summary_key for metric in rows}


def evidence() -> list[Metric]:
    """What a phase verdict rests on or shows, in the order of its evidence."""
    return sorted((metric for metric in METRICS if metric.evidence), key=lambda metric: metric.evidence)


def charts() -> dict[str, list[tuple[str, Metric]]]:
    """Charts of the page ``Grokking monitor`` by title, controls last: their tags without the domain, and rows."""
    found: dict[str, list[tuple[str, Metric]]] = {}
    for metric in METRICS:
        if metric.chart and PROBE not in metric.cells:
            found.setdefault(metric.chart, []).append((metric.tag, metric))
        if metric.heldout_chart:
            found.setdefault(metric.heldout_chart, []).append((metric.tag_on(HELDOUT), metric))
    return dict(sorted(found.items(), key=lambda chart: chart[0].startswith("control: ")))


def probe_metrics() -> list[Metric]:
    """The rows of probe tasks."""
    return [metric for metric in METRICS if PROBE in metric.cells]


def compared() -> dict[str, Metric]:
    """By tag without the domain, what the comparison of runs shows."""
    found: dict[str, Metric] = {}
    for metric in METRICS:
        if metric.compared and PROBE not in metric.cells:
            found[metric.tag] = metric
            if metric.heldout_chart:
                found[metric.tag_on(HELDOUT)] = replace(metric, title=f"{metric.title}, of held-out samples")
    return found


def describe(tag: str) -> str:
    """What a TensorBoard tag shows, how to read it and what it does not mean, in Markdown.

    Raises:
        ValueError: no row has this tag.
    """
    known = {metric.tag_on(cell): metric for metric in METRICS for cell in metric.cells}
    parts = tag.split("/")
    if parts[0] == "probe":
        parts = ["probe", parts[-1]]
    for length in range(len(parts), 0, -1):
        if metric := known.get("/".join(parts[:length])):
            return metric.description
    raise ValueError(f"no description of {tag!r}: add a row to moetrain.metrics.table")
