"""The win rate at equal length: what is left of preferences when longer answers are not liked for their length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from bfpo.core.errors import SettingError
from bfpo.stats.intervals import Interval, rate_interval
from bfpo.stats.resampling import (
    Floats,
    bootstrap_weights,
    check_confidence,
    in_unit_interval,
    label_codes,
)

__all__ = ["MIN_PROMPTS", "length_controlled_rate"]

MIN_PROMPTS = 30
"""With fewer prompts two parameters are not fitted: the interval would say nothing."""

_INVERSE_PENALTY = 100.0  # a standard deviation of 10 log-odds: only keeps what the data do not bound finite


def length_controlled_rate(
    preferences: Sequence[float],
    longer_by: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Return p(better) at equal length by the length term of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

    A logistic regression of `preferences` in [0, 1] on a constant and tanh(`longer_by` / its standard deviation), the
    characters that the answer has more than the other one; the rate is its prediction at 0, and the bounds are of the
    bootstrap over `clusters` (prompts). The paper's term of each instruction's difficulty needs the preferences of many
    other models and is left out. Fewer than `MIN_PROMPTS` prompts give no value. Raises `SettingError` for lengths that
    differ, values outside their range, or a confidence outside (0, 1).
    """
    check_confidence(confidence)
    wanted, lengths = in_unit_interval("preferences", preferences), np.asarray(longer_by, dtype=np.float64)
    if lengths.shape != wanted.shape or not np.isfinite(lengths).all():
        raise SettingError(f"longer_by: got {lengths.size} for {wanted.size} preferences; a finite number for each")
    names = list(range(wanted.size)) if clusters is None else list(clusters)
    codes = label_codes("clusters", names, wanted.size)
    if len(set(codes.tolist())) < MIN_PROMPTS:
        return Interval(None, None, None, 0)
    if np.ptp(wanted) == 0:  # length explains nothing, and no resample differs
        return rate_interval(preferences, clusters, confidence=confidence, num_resamples=1, random_seed=random_seed)
    spread = float(lengths.std(ddof=1))
    term = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    value = _at_zero(wanted, term, np.ones_like(wanted))
    rates = [_at_zero(wanted, term, weights) for weights in bootstrap_weights(names, num_resamples, random_seed)]
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(rates, [tail, 1 - tail]))
    return Interval(value, low, high, wanted.size)


def _at_zero(preferences: Floats, term: Floats, weights: Floats) -> float:
    """Return the prediction at `term` = 0; a preference is a win and a loss with its share as their weights."""
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    columns = np.column_stack([np.ones_like(term), term])
    model = LogisticRegression(C=_INVERSE_PENALTY, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
    share = np.concatenate([weights * preferences, weights * (1 - preferences)])
    model.fit(np.concatenate([columns, columns]), np.repeat([1, 0], preferences.size), sample_weight=share)
    return float(expit(model.coef_[0, 0]))
