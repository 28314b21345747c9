"""The one error of data."""


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line naming the place and the remedy."""
