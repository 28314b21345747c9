"""Data: sources and built-in domains, tokenizer, prepared token files, samples, packing and the one-epoch stream."""
