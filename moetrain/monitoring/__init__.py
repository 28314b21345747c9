"""A run from end to end, in pieces that `moetrain.train` puts one after another."""
