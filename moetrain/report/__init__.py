"""Readers of a run: data frames (`open_run`), the report page, comparisons of runs."""
