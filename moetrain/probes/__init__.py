"""Probes: benchmarks that the model is scored on while it trains."""
