"""Probes: small benchmarks that are read while the model trains."""
