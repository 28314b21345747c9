"""The error that all of `moetrain.data` raises."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the place, the problem and the remedy."""


def cannot_read(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    remedy = "allow reading it" if isinstance(error, PermissionError) else "restore it"
    return DataError(f"{path}: cannot be read ({error.strerror or error}): {remedy}")
