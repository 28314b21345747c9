"""What a run recorded, read from its files without the package's own readers, and what follows from it by hand.

The tests compare sentences with these numbers: nothing here calls the code that writes the sentences.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from scipy.stats import linregress
from scipy.stats import t as student

from tests.trainer.reading import scalars

DELTA, TAIL = 0.05, 3  # of the paper's rule in runs


class Recorded:
    """The files of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.domains = list(self.config["data"]["domains"])
        path = folder / "summary.json"
        self.summary = json.loads(path.read_text()) if path.is_file() else {}
        lines = (folder / "events.jsonl").read_text().split("\n")[:-1]
        self.events = [json.loads(line) for line in lines]
        self.curves = scalars(folder)

    def _tables(self, kind: str) -> dict[int, pd.DataFrame]:
        paths = sorted((self.folder / "routing").glob(f"{kind}_????????.parquet"))
        return {int(path.stem[-8:]): pq.read_table(path).to_pandas() for path in paths}

    @cached_property
    def panel(self) -> dict[int, pd.DataFrame]:
        return self._tables("panel")

    @cached_property
    def probes(self) -> dict[int, pd.DataFrame]:
        return self._tables("probe")

    def newest(self, tag: str) -> float:
        return self.curves[tag][-1][1]

    def metric(self, domain: str, name: str) -> dict[str, float]:
        return self.summary["domains"][domain]["metrics"].get(name, {})

    def cell(self, domain: str, step: int, name: str) -> pd.DataFrame:
        """Panel samples at a reading: seen (trained on by then), to_come, heldout, unseen (not trained on by then)."""
        rows = self.panel[step]
        rows = rows[rows["domain"] == domain]
        met = (rows["first_step"] > 0) & (rows["first_step"] <= step)
        chosen = {
            "seen": (rows["cell"] == "seen") & met,
            "unseen": (rows["cell"] != "seen") & ~met,
        }.get(name, rows["cell"] == name)
        return rows[chosen]

    def documents(self, domain: str, step: int, name: str) -> int:
        return self.cell(domain, step, name)["document"].nunique()

    def mean_loss(self, domain: str, step: int, name: str) -> float:
        rows = self.cell(domain, step, name)
        return float(rows["loss"].astype(float).mean()) if len(rows) else np.nan

    def share(self, domain: str, step: int) -> float:
        """The memorized share: difference of losses at equal difficulty, by least squares, over what was learned."""
        seen, unseen = self.cell(domain, step, "seen"), self.cell(domain, step, "unseen")
        both = pd.concat([seen, unseen]).astype({"loss": float, "difficulty": float, "initial": float})
        of_seen = np.r_[np.ones(len(seen)), np.zeros(len(unseen))]
        columns = np.stack([of_seen, 1 - of_seen, both["difficulty"]], axis=1)
        at_seen, at_unseen, _ = np.linalg.lstsq(columns, both["loss"], rcond=None)[0]
        return (at_unseen - at_seen) / (both["initial"].mean() - seen["loss"].astype(float).mean())

    def before(self, domain: str, step: int) -> float:
        """The loss before the training: the highest of the seen samples, or the first of the unseen."""
        steps = [each for each in self.panel if each <= step]
        found = [self.mean_loss(domain, each, "seen") for each in steps]
        found.append(self.mean_loss(domain, steps[0], "unseen"))
        return float(np.nanmax(found))

    def marked(self, domain: str, step: int) -> bool:
        """Whether answers have been read by a reading."""
        return any(at <= step for at, _ in self.curves.get(f"kernel/left_out/{domain}", []))

    def start(self, domain: str, step: int) -> tuple[float, str]:
        """What the rule measures the fall of a loss by, and its name: for answers, that of knowing the frequencies."""
        before = self.before(domain, step)
        frequencies = float(self.cell(domain, step, "seen")["difficulty"].astype(float).mean())
        if self.marked(domain, step) and frequencies < before:
            return frequencies, "its value under the frequencies of tokens"
        return before, "its value before the training"

    @property
    def last_step(self) -> int:
        """The last step with a point."""
        return max(step for points in self.curves.values() for step, _ in points)

    def phase(self, domain: str, step: int) -> str:
        """The phase at a reading."""
        names = ("undecided", "learning", "memorizing", "generalizing", "settled")
        return names[int(dict(self.curves[f"phase/{domain}"])[step])]

    def tasks(self, domain: str) -> list[str]:
        """The probe tasks of a domain."""
        newest = self.probes[max(self.probes)] if self.probes else None
        return [] if newest is None else sorted(set(newest[newest["domain"] == domain]["task"].astype(str)))

    def falls(self, domain: str, step: int, name: str) -> bool | None:
        """Whether a loss falls at a reading, by the rule; None with fewer than three readings."""
        fall, surely, readings = self.fall(domain, step, name)
        return None if readings < 3 else fall >= self.config["phase"]["steep"] and surely

    def fall(self, domain: str, step: int, name: str) -> tuple[float, bool, int]:
        """The fall of the line through the last readings, of the fall so far; if its interval is above 0; readings."""
        rule = self.config["phase"]
        steps = [each for each in sorted(self.panel) if each <= step]
        last = steps[-rule["trend"] :]
        y = np.array([self.mean_loss(domain, each, name) for each in last])
        known = np.isfinite(y)
        if known.sum() < 3:
            return np.nan, False, int(known.sum())
        line = linregress(np.array(last)[known], y[known])
        every = np.array([self.mean_loss(domain, each, name) for each in steps])
        before = self.before(domain, step)
        newest = np.median(every[np.isfinite(every)][-3:])
        fall = -line.slope * (last[-1] - last[0]) / max(before - newest, before / 5)
        surely = line.slope + student.ppf(0.975, known.sum() - 2) * line.stderr < 0
        return fall, bool(surely), int(known.sum())

    def seen_losses(self, domain: str) -> np.ndarray:
        """[S, T] of all samples of the seen cell."""
        each = [rows[(rows["domain"] == domain) & (rows["cell"] == "seen")]["loss"] for rows in self.panel.values()]
        return np.stack(each, axis=1).astype(float)

    def memorized(self, domain: str, eps: float) -> np.ndarray:
        """Whether each seen sample has an onset by the paper's rule that enough readings follow."""
        losses = self.seen_losses(domain)
        found = []
        for row in losses:
            holds = (row <= eps) & (abs(row - row[-1]) <= DELTA)
            onsets = [t for t in range(len(row)) if holds[t:].all()]
            found.append(bool(onsets) and onsets[0] + TAIL < len(row))
        return np.array(found)

    def eps(self, domain: str) -> float | None:
        """The least multiple of 0.1 nats by which a fifth of the seen samples are memorized, by trying all."""
        most = int(np.ceil(self.seen_losses(domain).max() * 10)) + 1
        grid = (step / 10 for step in range(1, most + 1))
        return next((eps for eps in grid if self.memorized(domain, eps).mean() >= 0.2 - 1e-9), None)

    def online(self, domain: str, step: int) -> float:
        """The share memorized by the online rule at a reading."""
        steps = [each for each in sorted(self.panel) if each <= step][-3:]
        given = self.config["data"]["domains"][domain].get("eps")
        low = [
            self.panel[step]["loss"].to_numpy(float)
            <= (np.percentile(self.cell(domain, step, "unseen")["loss"].astype(float), 5) if given is None else given)
            for step in steps
        ]
        losses = [self.panel[step]["loss"].to_numpy(float) for step in steps]
        near = [abs(each - losses[-1]) <= DELTA for each in losses]
        holds = np.all([*low, *near], axis=0)
        return float(holds[self.cell(domain, steps[-1], "seen").index].mean())

    def tokens(self, step: int) -> float:
        """Text tokens trained on by a step, interpolated between logged counts."""
        logged = {0: 0.0}
        for domain in self.domains:
            for at, value in self.curves[f"data/tokens/{domain}"]:
                logged[at] = logged.get(at, 0.0) + value
        return float(np.interp(step, list(logged), list(logged.values())))

    def slope(self, domains: list[str]) -> float:
        """The slope of pathway distance on loss over the readings of some domains; NaN below 8 readings."""
        points = []
        for domain in domains:
            distance = dict(self.curves.get(f"pathway/d_path/{domain}", []))
            loss = dict(self.curves.get(f"loss/panel_seen/{domain}", []))
            points += [(loss[step], distance[step]) for step in distance if step in loss]
        return float(np.polyfit(*np.array(points).T, 1)[0]) if len(points) >= 8 else np.nan
