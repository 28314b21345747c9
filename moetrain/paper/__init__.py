"""The figures and tables of the paper (Li, Fan and Zhou, arXiv 2506.21551), of runs, replays and checkpoints."""
