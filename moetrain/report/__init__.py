"""The report of a run, the comparison of runs, and a run's records as data frames."""
