"""What is measured: one table of metrics, and the samples that each is computed from."""
