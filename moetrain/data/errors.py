"""The error that all of `moetrain.data` raises."""


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the place, the problem and the remedy."""
