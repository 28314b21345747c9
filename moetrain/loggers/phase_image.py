"""The phases of all domains over time as an image for TensorBoard, which smooths numbers between phases, not images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moetrain.grokking import Phase

# Those of the report's light theme.
_COLORS = {
    Phase.UNDECIDED: "#b3bac2",
    Phase.LEARNING: "#5b9bd5",
    Phase.MEMORIZING: "#e0913a",
    Phase.GENERALIZING: "#4caf68",
    Phase.SETTLED: "#14745a",
}
_WIDTH, _ROW, _SIDE, _TEXT = 300, 22, 8, 13  # pixels
_LONGEST = 18  # characters of a domain's name


def phase_image(steps: Sequence[int], phases: Mapping[str, Sequence[Phase]], last_step: int) -> np.ndarray:
    """A row of colored stretches per domain, over the steps of the whole run, above a legend: uint8 [H, W, 3].

    Args:
        steps: of the readings so far, ascending.
        phases: by domain, the phase at each reading. It is drawn from the reading before to this one.
        last_step: of the run.
    """
    font = ImageFont.load_default(_TEXT)
    names = {domain: domain if len(domain) <= _LONGEST else f"{domain[: _LONGEST - 2]}.." for domain in phases}
    left = 2 * _SIDE + round(max(font.getlength(name) for name in names.values()))
    entries = _legend(font)
    height = (len(phases) + 1 + 1 + max(row for row, _, _ in entries)) * _ROW + 2 * _SIDE
    picture = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    ends = [left + round((_WIDTH - _SIDE - left) * step / max(1, last_step)) for step in (0, *steps)]
    for row, (domain, own) in enumerate(phases.items()):
        top = _SIDE + row * _ROW
        draw.text((_SIDE, top + 2), names[domain], "black", font)
        draw.rectangle((left, top + 2, _WIDTH - _SIDE, top + _ROW - 4), outline="#d8dce0")
        for phase, begin, end in zip(own, ends, ends[1:], strict=False):
            if end > begin:
                draw.rectangle((begin, top + 2, end, top + _ROW - 4), fill=_COLORS[phase])
    below = _SIDE + len(phases) * _ROW
    draw.text((left, below), "step 0", "#5b646d", font)
    draw.text((_WIDTH - _SIDE - font.getlength(f"{last_step:,}"), below), f"{last_step:,}", "#5b646d", font)
    for (row, x, name), phase in zip(entries, Phase, strict=True):
        top = below + (1 + row) * _ROW
        draw.rectangle((x, top + 3, x + 12, top + 15), fill=_COLORS[phase])
        draw.text((x + 17, top + 1), name, "black", font)
    return np.asarray(picture)


def _legend(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[tuple[int, int, str]]:
    """Row, left end and name of each phase, in rows as wide as the image."""
    entries, row, x = [], 0, _SIDE
    for phase in Phase:
        name = phase.name.lower()
        width = 17 + round(font.getlength(name)) + 14
        if x + width > _WIDTH:
            row, x = row + 1, _SIDE
        entries.append((row, x, name))
        x += width
    return entries
