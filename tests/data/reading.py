"""Reading the documents of a domain ``d`` with overrides of its settings."""

from moetrain.config import load_settings
from moetrain.data.documents import DomainReport, read_documents


def read(folder, *overrides):
    """The documents of the domain, and its report."""
    chosen = load_settings(None, [f"data.root={folder}", *(f"data.domains.d.{o}" for o in overrides)])
    report = DomainReport("d")
    return list(read_documents("d", chosen.data.domains["d"], chosen.data, 0, set(), report)), report
