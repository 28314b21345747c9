"""Checkpoints, complete or absent: written, checked, pruned and loaded; and the run folders that hold them."""
