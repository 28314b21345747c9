"""Metrics as rows of one table, and the newest value of each."""
