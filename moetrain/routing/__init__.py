"""Routing per sample: recorded while training, read from a fixed panel, stored in Parquet, turned into metrics."""
