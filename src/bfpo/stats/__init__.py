"""Intervals, paired tests, corrections for several tests, power, and the trade-off between two objectives."""

from bfpo.stats.intervals import (
    Interval,
    between_seed_sd,
    mean_interval,
    paired_difference,
    rate_interval,
    upper_bound_of_zero,
    wilson,
)
from bfpo.stats.one_sided import difference_floor, rate_bound
from bfpo.stats.paired_tests import (
    MIN_PROMPTS,
    PairedTest,
    detectable_difference,
    holm,
    length_controlled_rate,
    mcnemar,
    minimum_detectable_effect,
    paired_test,
    sign_flip,
)
from bfpo.stats.pareto import Choice, Points, hypervolume, hypervolume_interval, nearest_to, pareto_front
from bfpo.stats.powered import PoweredInterval, Predictions, half_width, labels_for, powered_difference, powered_rate
from bfpo.stats.resampling import bootstrap_weights

__all__ = [
    "MIN_PROMPTS",
    "Choice",
    "Interval",
    "PairedTest",
    "Points",
    "PoweredInterval",
    "Predictions",
    "between_seed_sd",
    "bootstrap_weights",
    "detectable_difference",
    "difference_floor",
    "half_width",
    "holm",
    "hypervolume",
    "hypervolume_interval",
    "labels_for",
    "length_controlled_rate",
    "mcnemar",
    "mean_interval",
    "minimum_detectable_effect",
    "nearest_to",
    "paired_difference",
    "paired_test",
    "pareto_front",
    "powered_difference",
    "powered_rate",
    "rate_bound",
    "rate_interval",
    "sign_flip",
    "upper_bound_of_zero",
    "wilson",
]
