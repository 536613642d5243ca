"""What a rate would be under people's labels, given how often the judge errs against them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import norm

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval
from bfpo.stats.resampling import check_confidence

__all__ = ["CorrectedRate", "corrected_harmless_rate", "effective_count", "rogan_gladen"]


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """A rate corrected for the judge's error with its bounds; `reason` says why some are `None` or tell nothing."""

    value: float | None
    low: float | None
    high: float | None
    num: int
    reason: str | None


def corrected_harmless_rate(
    harmless: Interval, *, sensitivity: Interval, specificity: Interval, confidence: float = 0.95
) -> CorrectedRate:
    """Return the share of answers that people would call safe, from the share that the judge calls safe.

    `sensitivity` (unsafe texts called unsafe) and `specificity` (safe texts called safe) are those of `judge_quality`.
    Everything else as in `rogan_gladen`, with "safe" as the positive.
    """
    return rogan_gladen(harmless, sensitivity=specificity, specificity=sensitivity, confidence=confidence)


def rogan_gladen(
    positive: Interval, *, sensitivity: Interval, specificity: Interval, confidence: float = 0.95
) -> CorrectedRate:
    """Return (q + specificity - 1) / (sensitivity + specificity - 1), q the rate called positive, clipped to [0, 1].

    The estimate is Rogan & Gladen's (1978, Am. J. Epidemiology 107(1)); the bounds carry the sampling error of all
    three rates (Lang & Reiczigel 2014, Prev. Vet. Med. 113(1)), which must come from different texts. The three are
    intervals at the same `confidence`, of `wilson` for counts or of `rate_interval` for clustered answers: their widths
    say how many independent answers they are worth (`effective_count`). It holds as far as the judge errs on the
    evaluated texts as it did on the labelled ones.

    Not identifiable (`value` `None`) where sensitivity + specificity <= 1: such a judge is no better than chance. Where
    its labels leave that possible, the bounds are 0 and 1; where they exclude every rate in [0, 1], there are none.
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
    (q, _), (se, _), (sp, _) = counted
    if se + sp <= 1:
        reason = f"not identifiable: sensitivity + specificity is {se + sp:.3f}; above 1 is needed"
        return CorrectedRate(None, None, None, positive.num, reason)
    value = _clip((q + sp - 1) / (se + sp - 1))
    bounds = _bounds(*counted, z=float(norm.isf((1 - confidence) / 2)))
    if bounds is None:
        reason = "the judge's labelled texts are too few to tell it from chance: any rate is possible"
        return CorrectedRate(value, 0.0, 1.0, positive.num, reason)
    low, high = bounds
    if low >= 1 or high <= 0:
        reason = f"contradiction: a rate of {q:.3f} does not fit the judge's errors; on these texts it errs otherwise"
        return CorrectedRate(value, None, None, positive.num, reason)
    # The bounds are centred on shrunken rates; at 0 of n they may leave the plain estimate out.
    return CorrectedRate(value, min(_clip(low), value), max(_clip(high), value), positive.num, None)


def effective_count(rate: Interval, *, confidence: float = 0.95) -> float | None:
    """Return the number of independent yes-or-no answers whose Wilson interval is as wide as this one.

    For an interval of `wilson` that is its own `num`; answers that share prompts are worth fewer (Kish 1965's effective
    sample size). Never more than `num`, never less than 1; `None` without value or bounds. Raises `SettingError` for a
    rate outside [0, 1] or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    if rate.value is None or rate.low is None or rate.high is None or rate.num < 1:
        return None
    if not 0 <= rate.value <= 1:
        raise SettingError(f"rate: got {rate.value}; allowed: a share from 0 to 1")
    spread, width = rate.value * (1 - rate.value), rate.high - rate.low
    z = float(norm.isf((1 - confidence) / 2))

    def excess(count: float) -> float:
        return 2 * z / (1 + z * z / count) * sqrt(spread / count + z * z / (4 * count * count)) - width

    if excess(rate.num) >= 0:
        return float(rate.num)
    return float(brentq(excess, 1.0, rate.num)) if excess(1.0) > 0 else 1.0


def _bounds(
    rate: tuple[float, float], sensitivity: tuple[float, float], specificity: tuple[float, float], *, z: float
) -> tuple[float, float] | None:
    """Return Lang & Reiczigel's bounds, `None` where the judge cannot be told from chance; each pair is (rate, n)."""
    q, n = _shrunken(*rate, added=z * z)
    se, n_se = _shrunken(*sensitivity, added=2)
    sp, n_sp = _shrunken(*specificity, added=2)
    var_q, var_se, var_sp = q * (1 - q) / n, se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    youden = se + sp - 1
    if youden <= z * sqrt(var_se + var_sp):
        return None
    p = (q + sp - 1) / youden
    shift = 2 * z * z * (p * var_se - (1 - p) * var_sp)
    half = z * sqrt(var_q + p * p * var_se + (1 - p) ** 2 * var_sp) / youden
    return p + shift - half, p + shift + half


def _shrunken(rate: float, count: float, *, added: float) -> tuple[float, float]:
    return (rate * count + added / 2) / (count + added), count + added


def _clip(rate: float) -> float:
    return min(1.0, max(0.0, rate))
