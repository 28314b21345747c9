"""How training can fail."""


class TrainingDivergedError(Exception):
    """So many updates in a row were skipped that training cannot go on."""
