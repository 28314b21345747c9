"""Data: sources, built-in domains, tokenizers, packing, and the stream that gives every row of a run once."""
