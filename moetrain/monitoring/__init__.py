"""What is measured of a model while it trains or in a replay, and what follows from the readings of a run."""
