"""The text of README.md by quantity: what a TensorBoard tag shows as its description."""

import re
from functools import cache
from importlib.resources import files

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def describe(name: str) -> str:
    """What a quantity is, its sign, how to read it and what it does not mean: its section of README.md (Markdown).

    name: a heading such as "d_path_norm", or a tag that holds one, such as "pathway/d_path_norm/math"; the first part
    of the tag that is a heading counts. Raises ValueError, listing the headings, where there is none.
    """
    sections = _sections()
    for part in name.split("/"):
        if part in sections:
            return sections[part]
    raise ValueError(f"no description of {name!r}: the quantities are {', '.join(sections)}")


@cache
def _sections() -> dict[str, str]:
    """Sections whose heading is one name in backquotes; the others are for readers of the page."""
    readme = files(__package__).joinpath("README.md").read_text(encoding="utf-8")
    parts = HEADING.split(readme)[1:]  # heading, text, heading, text, ...
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {heading.strip("`"): text.strip() for heading, text in pairs if heading.startswith("`")}
