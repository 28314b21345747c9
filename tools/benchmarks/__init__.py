"""What `tools/bench.py` measures, one idea a module; each works as a function too."""
