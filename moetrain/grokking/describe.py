"""Descriptions of the quantities: the sections of README.md, shown as descriptions of the TensorBoard tags."""

import re
from functools import cache
from importlib.resources import files

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def describe(name: str) -> str:
    """The README.md section of a quantity, in Markdown: its definition, sign, use and limits.

    Args:
        name: a heading such as "d_path_norm", or a tag such as "pathway/d_path_norm/math". The first part of the tag
            that is a heading counts.

    Raises:
        ValueError: no part is a heading; the message lists the headings.
    """
    sections = _sections()
    for part in name.split("/"):
        if part in sections:
            return sections[part]
    raise ValueError(f"no description of {name!r}: the quantities are {', '.join(sections)}")


@cache
def _sections() -> dict[str, str]:
    """The sections whose heading is a single name in backquotes. The others describe no quantity."""
    readme = files(__package__).joinpath("README.md").read_text(encoding="utf-8")
    parts = HEADING.split(readme)[1:]  # heading, text, heading, text, ...
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {heading.strip("`"): text.strip() for heading, text in pairs if heading.startswith("`")}
