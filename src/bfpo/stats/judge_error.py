"""Rates corrected for the judge's error, as measured against human labels."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import norm

from bfpo.core.errors import SettingError
from bfpo.stats.clustered import clopper_pearson
from bfpo.stats.intervals import Interval
from bfpo.stats.resampling import check_confidence

__all__ = ["CorrectedRate", "corrected_harmless_rate", "effective_count", "rogan_gladen"]


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """A rate corrected for the judge's error, with bounds; `reason` says why some are `None` or uninformative."""

    value: float | None
    low: float | None
    high: float | None
    num: int
    reason: str | None


def corrected_harmless_rate(
    harmless: Interval, *, sensitivity: Interval, specificity: Interval, confidence: float = 0.95
) -> CorrectedRate:
    """Return the share of answers that humans would label safe, from the share that the judge labels safe.

    `sensitivity` (unsafe texts called unsafe) and `specificity` (safe texts called safe) are those of `judge_quality`.
    They change places here, because "safe" is the positive class; otherwise as `rogan_gladen`.
    """
    return rogan_gladen(harmless, sensitivity=specificity, specificity=sensitivity, confidence=confidence)


def rogan_gladen(
    positive: Interval, *, sensitivity: Interval, specificity: Interval, confidence: float = 0.95
) -> CorrectedRate:
    """Return the corrected rate (q + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1].

    q is the rate that the judge calls positive. The estimator is that of Rogan & Gladen (1978, Am. J. Epidemiology
    107(1)). The bounds include the sampling error of all three rates (Lang & Reiczigel 2014, Prev. Vet. Med. 113(1)),
    which must come from different texts. The inputs are intervals at the same `confidence`, from `wilson` for counts or
    from `rate_interval` for clustered answers; their widths give the effective sample sizes (`effective_count`).
    Assumes that the judge has the same error rates on the evaluated texts as on the labelled texts.

    If sensitivity + specificity <= 1, the judge is no better than chance and `value` is `None` (not identifiable). If
    the labels do not exclude that, the bounds are 0 and 1; if they exclude every rate in [0, 1], the bounds are `None`.
    Raises `SettingError` for a confidence outside (0, 1) or a rate outside [0, 1].
    """
    check_confidence(confidence)
    counted: list[tuple[float, float]] = []
    named = {"rate": positive, "sensitivity": sensitivity, "specificity": specificity}
    for name, rate in named.items():
        count = effective_count(rate, confidence=confidence)
        if rate.value is None or count is None:
            return CorrectedRate(None, None, None, positive.num, f"the {name} has no value or no interval")
        counted.append((rate.value, count))
    (q, _), (se, _), (sp, _) = counted  # E[q] = p se + (1 - p)(1 - sp), solved for the true rate p
    if se + sp <= 1:
        reason = f"not identifiable: sensitivity + specificity is {se + sp:.3f}; above 1 is needed"
        return CorrectedRate(None, None, None, positive.num, reason)
    value = _clip((q + sp - 1) / (se + sp - 1))
    bounds = _bounds(*counted, z=float(norm.isf((1 - confidence) / 2)))
    if bounds is None:
        reason = "too few labelled texts to show that the judge is better than chance: any rate is possible"
        return CorrectedRate(value, 0.0, 1.0, positive.num, reason)
    low, high = bounds
    if low >= 1 or high <= 0:
        reason = (
            f"contradiction: a rate of {q:.3f} is impossible at the judge's error rates; they differ on these texts"
        )
        return CorrectedRate(value, None, None, positive.num, reason)
    # The bounds are centred on shrunken rates; at 0 of n they may exclude the plain estimate.
    return CorrectedRate(value, min(_clip(low), value), max(_clip(high), value), positive.num, None)


def effective_count(rate: Interval, *, confidence: float = 0.95) -> float | None:
    """Return the number of independent binary answers whose exact interval has the width of this interval.

    For one answer per prompt in `rate_interval` that is `num`; answers that share prompts count for fewer (the
    effective sample size of Kish 1965). At most `num` and at least 1; `None` without value or bounds. Raises
    `SettingError` for a rate outside [0, 1] or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    if rate.value is None or rate.low is None or rate.high is None or rate.num < 1:
        return None
    if not 0 <= rate.value <= 1:
        raise SettingError(f"rate: got {rate.value}; allowed: a share from 0 to 1")
    value, width = rate.value, rate.high - rate.low

    def excess(count: float) -> float:
        # The width at `count` answers, less the width given; it falls as the count grows.
        low, high = clopper_pearson(value, count, confidence)
        return float(high - low) - width

    if excess(rate.num) >= -1e-12:
        return float(rate.num)
    return float(brentq(excess, 1.0, rate.num)) if excess(1.0) > 0 else 1.0


def _bounds(
    rate: tuple[float, float], sensitivity: tuple[float, float], specificity: tuple[float, float], *, z: float
) -> tuple[float, float] | None:
    """Return the bounds of Lang & Reiczigel, `None` if the judge may be no better than chance; pairs are (rate, n)."""
    q, n = _shrunken(*rate, added=z * z)
    se, n_se = _shrunken(*sensitivity, added=2)
    sp, n_sp = _shrunken(*specificity, added=2)
    var_q, var_se, var_sp = q * (1 - q) / n, se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    youden = se + sp - 1
    if youden <= z * sqrt(var_se + var_sp):
        return None
    # Half-width by the delta method, around a shifted centre.
    p = (q + sp - 1) / youden
    shift = 2 * z * z * (p * var_se - (1 - p) * var_sp)
    half = z * sqrt(var_q + p * p * var_se + (1 - p) ** 2 * var_sp) / youden
    return p + shift - half, p + shift + half


def _shrunken(rate: float, count: float, *, added: float) -> tuple[float, float]:
    """Return the rate and the count after `added` more answers, half of them positive (as Agresti & Coull 1998)."""
    return (rate * count + added / 2) / (count + added), count + added


def _clip(rate: float) -> float:
    return min(1.0, max(0.0, rate))
