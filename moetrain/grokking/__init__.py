"""The metrics of memorization and generalization from the router: pure functions, arrays in and numbers out.

Definitions, signs and limits of every quantity are in README.md beside this file, and in `describe(name)`.
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
from .estimate import Estimate, mean_of_samples
from .generalization import generalized_at, generalized_groups, generalized_onsets
from .kernel import (
    RiskBound,
    d_eff,
    effective_dimension,
    effective_rank,
    layer_cka,
    risk_bound,
    routing_kernel,
    spread,
)
from .memorization import (
    OnlineAgreement,
    choose_eps,
    memorized_at,
    memorized_fraction,
    memorized_gap,
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

__all__ = [
    "Correlation",
    "Delay",
    "Estimate",
    "GroupConsistency",
    "GroupPair",
    "GuardedMedian",
    "OnlineAgreement",
    "ReadingTimes",
    "RiskBound",
    "choose_eps",
    "correlate",
    "cosine",
    "d_eff",
    "d_path",
    "d_path_between",
    "d_path_both",
    "d_path_by_layer",
    "d_path_floor",
    "delay",
    "describe",
    "effective_dimension",
    "effective_rank",
    "first_above_chance",
    "generalized_at",
    "generalized_groups",
    "generalized_onsets",
    "gram_blocks",
    "group_consistency",
    "guarded_median",
    "inconsistency",
    "individuality",
    "layer_cka",
    "layer_cosines",
    "max_cosine",
    "mean_delay",
    "mean_of_samples",
    "memorized_at",
    "memorized_fraction",
    "memorized_gap",
    "memorized_groups",
    "memorized_now",
    "memorized_onsets",
    "online_agreement",
    "pair_groups",
    "pathways",
    "risk_bound",
    "routing_kernel",
    "sharing",
    "spread",
    "too_few",
]
