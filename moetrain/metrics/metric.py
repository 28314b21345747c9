"""A row of the table of metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moetrain import grokking
from moetrain.grokking import Estimate
from moetrain.metrics.cell import DOMAIN, HELDOUT, MODEL, SEEN, STREAM, TO_COME, UNSEEN, Cell, CellName

LEAST_SAMPLES = 2  # one sample has no distance to another


@dataclass(frozen=True)
class Metric:
    """One metric: how it is computed, what it is called, and where it is shown.

    Attributes:
        name: short and unique: the name among the predictors, in the evidence of a verdict and of the streaming metric.
        tag: TensorBoard tag on the first of ``cells``, without the domain; empty for what has no curve.
        title: what the report and the comparison call it.
        cells: what it is computed on.
        compute: its value on one cell, None or NaN where there is none; None for what the trainer itself measures.
        least: samples below which it is not computed.
        text: description in Markdown; empty for the section of that name in moetrain/grokking/README.md.
        key: its name in summary.json, where that is not the tag.
        by_layer: values of the seen cell by layer [L], drawn over the readings as the heat map ``TAG_by_layer``.
        top: the value of the brightest color of its heat map.
        by_sample: values of the seen cell by sample [S], shown as the distribution ``TAG_by_sample``.
        predictor: place among the predictors of probe accuracy, from 1, and column in a checkpoint; 0: it is not one.
        evidence: place in the evidence of a phase verdict, from 1; 0: it is not shown there.
        chart: title of its chart on TensorBoard's page ``Grokking monitor``; metrics of one title share a chart.
        verdict: whether it is the verdict on a domain, or the number that decides it: TensorBoard shows it first.
        categories: whether its values are numbers of categories, between which there is nothing.
        heldout_chart: title of a chart of its held-out curve, which the comparison of runs then shows too.
        compared: whether the comparison of runs has a row and a chart of it.
        figure: the group of figures of the report that draws it over time.
        log: whether the report draws it on a logarithmic axis.
        bounds: of the y axis in the report; None for those of the data.
    """

    name: str
    tag: str
    title: str
    cells: tuple[CellName, ...]
    compute: Callable[[Cell], Estimate | None] | None = None
    least: int = LEAST_SAMPLES
    text: str = ""
    key: str = ""
    by_layer: Callable[[Cell], np.ndarray] | None = None
    top: float = 1.0
    by_sample: Callable[[Cell], np.ndarray] | None = None
    predictor: int = 0
    evidence: int = 0
    chart: str = ""
    verdict: bool = False
    categories: bool = False
    heldout_chart: str = ""
    compared: bool = False
    figure: Literal["", "routing", "consistency", "controls"] = ""
    log: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def description(self) -> str:
        """What it is, how to read it and what it does not mean, in Markdown."""
        return self.text or grokking.describe(self.name)

    @property
    def summary_key(self) -> str:
        """Its name in summary.json."""
        return self.key or self.tag

    @property
    def per_domain(self) -> bool:
        """Whether each domain has a value of its own."""
        return any(cell in self.cells for cell in (SEEN, TO_COME, HELDOUT, UNSEEN, DOMAIN))

    @property
    def of_model(self) -> bool:
        """Whether the model as a whole has a value."""
        return MODEL in self.cells

    def tag_on(self, cell: CellName) -> str:
        """The tag of its curve on a cell, without the domain."""
        if cell == self.cells[0]:
            return self.tag
        group, _, leaf = self.tag.partition("/")
        return {
            TO_COME: f"{group}_to_come/{leaf}",
            HELDOUT: f"{group}_heldout/{leaf}",
            STREAM: f"stream/{self.name}",
        }.get(cell, self.tag)

    def value(self, cell: Cell) -> Estimate | None:
        """Its value on a cell; None where it is not computed there, or the cell has too few samples."""
        if self.compute is None or cell.name not in self.cells or len(cell) < self.least:
            return None
        return self.compute(cell)

    def layers(self, cell: Cell) -> np.ndarray:
        """Its values by layer [L]; NaN where the cell has too few samples."""
        assert self.by_layer is not None
        return self.by_layer(cell) if len(cell) >= self.least else np.full(cell.weights.shape[1], np.nan)
