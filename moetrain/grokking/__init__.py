"""Metrics of memorization and generalization from the router: pure functions from arrays to numbers.

README.md in this folder gives the definition, sign and limits of every quantity; `describe(name)` returns its sections.
"""

from .consistency import (
    GroupConsistency,
    GuardedMedian,
    cosine,
    gram_blocks,
    group_consistency,
    guarded_median,
    inconsistency,
    layer_cosines,
    max_cosine,
)
from .correlation import Correlation, correlate, first_above_chance
from .describe import describe
from .documents import claim_ratio, mean_over_documents, memorized_gap, memorized_share
from .estimate import Estimate, jackknife, mean_of_samples, share
from .exposure import exposure_bucket, mean_per_token
from .generalization import generalized_at, generalized_groups, generalized_onsets
from .kernel import (
    RiskBound,
    d_eff,
    d_eff_by_layer,
    d_eff_estimate,
    effective_dimension,
    effective_rank,
    layer_cka,
    risk_bound,
    routing_kernel,
    spread,
)
from .left_out import left_out
from .memorization import (
    OnlineAgreement,
    choose_eps,
    memorized_at,
    memorized_groups,
    memorized_now,
    memorized_onsets,
    online_agreement,
    too_few,
)
from .pairing import Delay, GroupPair, ReadingTimes, delay, mean_delay, pair_groups
from .pathway import (
    d_path,
    d_path_between,
    d_path_both,
    d_path_by_layer,
    d_path_floor,
    individuality,
    pathways,
    sharing,
)
from .phase import Curve, Evidence, History, Phase, PhaseChange, PhaseThresholds, Verdict, changes, curve, phases
from .repeats import repeat_budget, repeat_worth

__all__ = [
    "Correlation",
    "Curve",
    "Delay",
    "Estimate",
    "Evidence",
    "GroupConsistency",
    "GroupPair",
    "GuardedMedian",
    "History",
    "OnlineAgreement",
    "Phase",
    "PhaseChange",
    "PhaseThresholds",
    "ReadingTimes",
    "RiskBound",
    "Verdict",
    "changes",
    "choose_eps",
    "claim_ratio",
    "correlate",
    "cosine",
    "curve",
    "d_eff",
    "d_eff_by_layer",
    "d_eff_estimate",
    "d_path",
    "d_path_between",
    "d_path_both",
    "d_path_by_layer",
    "d_path_floor",
    "delay",
    "describe",
    "effective_dimension",
    "effective_rank",
    "exposure_bucket",
    "first_above_chance",
    "generalized_at",
    "generalized_groups",
    "generalized_onsets",
    "gram_blocks",
    "group_consistency",
    "guarded_median",
    "inconsistency",
    "individuality",
    "jackknife",
    "layer_cka",
    "layer_cosines",
    "left_out",
    "max_cosine",
    "mean_delay",
    "mean_of_samples",
    "mean_over_documents",
    "mean_per_token",
    "memorized_at",
    "memorized_gap",
    "memorized_groups",
    "memorized_now",
    "memorized_onsets",
    "memorized_share",
    "online_agreement",
    "pair_groups",
    "pathways",
    "phases",
    "repeat_budget",
    "repeat_worth",
    "risk_bound",
    "routing_kernel",
    "share",
    "sharing",
    "spread",
    "too_few",
]
