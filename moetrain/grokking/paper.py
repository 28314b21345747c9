"""Values that the paper reports, for comparison (Li, Fan and Zhou, arXiv 2506.21551, version 4)."""

_DOMAINS = ("math", "code", "commonsense", "domain")
_ROWS = {
    "d_path": ((-0.947, -0.949), (-0.929, -0.928), (-0.982, -0.975), (-0.925, -0.949)),
    "consistency": ((0.925, 0.949), (0.979, 0.986), (0.980, 0.975), (0.992, 0.949)),
    "train_loss": ((-0.044, -0.211), (-0.068, -0.205), (0.643, 0.410), (0.794, 0.949)),
    "validation_loss": ((0.480, -0.105), (0.547, 0.872), (-0.575, -0.462), (-0.334, -0.316)),
}
CORRELATIONS = {
    predictor: {
        domain: {"raw pearson": pearson, "raw spearman": spearman}
        for domain, (pearson, spearman) in zip(_DOMAINS, row, strict=True)
    }
    for predictor, row in _ROWS.items()
}
"""Table 1: correlation with accuracy over about 4 to 6 checkpoints per domain, so its confidence intervals are wide."""
