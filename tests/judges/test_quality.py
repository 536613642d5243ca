from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, cohen_kappa_score, roc_auc_score

from bfpo.core.errors import SettingError
from bfpo.core.schema import Score, Verdict
from bfpo.judges.quality import calibration_bins, calibration_figure, judge_quality, trust_in
from messages import raises


def said(p_safe: float | None, threshold: float = 0.5) -> Verdict:
    if p_safe is None:
        return Verdict("", "j", "unscored", reason="?")
    return Verdict("", "j", "safe" if p_safe > threshold else "unsafe", p_safe=p_safe)


def quality(p_safe, labels, clusters=None, **settings) -> dict[str, Score]:
    settings = {"num_resamples": 200, **settings}
    rows = judge_quality([said(p) for p in p_safe], labels, clusters or list(range(len(labels))), **settings)
    return {score.metric: score for score in rows}


def sample(num: int, seed: int) -> tuple[list[float], list[bool]]:
    rng = random.Random(seed)
    labels = [rng.random() < 0.6 for _ in range(num)]
    return [round(min(1, max(0, rng.gauss(0.7 if label else 0.3, 0.25))), 2) for label in labels], labels


@given(st.lists(st.tuples(st.sampled_from((0.0, 0.1, 0.3, 0.5, 0.9, 1.0)), st.booleans()), min_size=1, max_size=25))
def test_values_are_those_of_plain_loops(rows) -> None:
    p_safe, labels = [row[0] for row in rows], [row[1] for row in rows]
    found = quality(p_safe, labels, num_resamples=5)
    calls = [p > 0.5 for p in p_safe]
    assert found["accuracy"].value == pytest.approx(np.mean([c == s for c, s in zip(calls, labels, strict=True)]))
    pairs = [(p, q) for (p, s), (q, t) in product(rows, rows) if s and not t]
    auc = math.fsum(1.0 if p > q else 0.5 if p == q else 0.0 for p, q in pairs) / len(pairs) if pairs else None
    assert found["roc_auc"].value == (None if auc is None else pytest.approx(auc, abs=1e-12))
    brier = math.fsum((p - s) ** 2 for p, s in rows) / len(rows)
    assert found["brier"].value == pytest.approx(brier, abs=1e-12)
    error = 0.0
    for low in range(10):
        inside = [(p, s) for p, s in rows if min(int(p * 10), 9) == low]
        error += abs(math.fsum(p - s for p, s in inside)) / len(rows)
    assert found["calibration_error"].value == pytest.approx(error, abs=1e-12)
    unsafe = [c for c, s in zip(calls, labels, strict=True) if not s]
    assert found["sensitivity"].num == len(unsafe)
    assert found["sensitivity"].value == (pytest.approx(1 - np.mean(unsafe)) if unsafe else None)


@pytest.mark.parametrize("seed", range(4))
def test_values_agree_with_scikit_learn(seed: int) -> None:
    p_safe, labels = sample(60, seed)
    found = quality(p_safe, labels)
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(labels, p_safe), abs=1e-12)
    assert found["brier"].value == pytest.approx(brier_score_loss(labels, p_safe), abs=1e-12)
    assert found["kappa"].value == pytest.approx(cohen_kappa_score(labels, [p > 0.5 for p in p_safe]), abs=1e-12)


def test_a_bootstrap_weight_counts_as_so_many_copies() -> None:
    """The statistics take weights: a text of weight 3 is three texts."""
    from bfpo.judges import quality as module

    p_safe, labels = sample(30, 7)
    weights = np.random.default_rng(0).integers(0, 4, 30)
    copies = np.repeat(np.arange(30), weights)
    p, y = np.array(p_safe), np.array(labels)
    for function in (module._roc_auc, module._brier, module._calibration_error):
        weighed = function(p, y, weights.astype(float))
        assert weighed == pytest.approx(function(p[copies], y[copies], np.ones(len(copies))), abs=1e-12)
    calls = (p > 0.5).astype(float)
    weighed = module._kappa(calls, y, weights.astype(float))
    assert weighed == pytest.approx(cohen_kappa_score(y[copies], calls[copies] > 0), abs=1e-12)


def test_a_calibrated_judge_gets_no_interval_that_says_that_it_is_not() -> None:
    """The bounds of resamples were above 0, and of this sample above the value itself."""
    rng = np.random.default_rng(1)
    p_safe = rng.random(100)
    found = quality(p_safe.tolist(), (rng.random(100) < p_safe).tolist(), num_resamples=50)["calibration_error"]
    assert found.value is not None
    assert (found.low, found.high) == (None, None)


def test_an_unscored_text_is_counted_and_enters_nothing() -> None:
    p_safe, labels = sample(40, 1)
    without = quality(p_safe, labels)
    with_some = quality([*p_safe, None, None, None], [*labels, True, False, False])
    for name, score in with_some.items():
        assert score.value == without[name].value
        expected = {"sensitivity": 2, "specificity": 1}.get(name, 3)
        assert (score.num, score.unscored) == (without[name].num, expected)


def test_a_judge_without_probabilities_has_no_curve_and_no_calibration() -> None:
    verdicts = [Verdict("", "j", "safe"), Verdict("", "j", "unsafe"), Verdict("", "j", "safe")]
    found = {score.metric: score for score in judge_quality(verdicts, [True, False, False], [0, 1, 2])}
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["kappa"].value is not None
    assert all(found[name].value is None for name in ("roc_auc", "brier", "calibration_error"))
    assert all(found[name].unscored == 3 for name in ("roc_auc", "brier", "calibration_error"))


def test_intervals_are_over_prompts() -> None:
    """Ten copies of every text on the same prompt say nothing more."""
    p_safe, labels = sample(40, 3)
    once = quality(p_safe, labels, num_resamples=500)
    copied = quality(p_safe * 10, labels * 10, [*range(40)] * 10, num_resamples=500)
    apart = quality(p_safe * 10, labels * 10, num_resamples=500)
    for name in ("kappa", "roc_auc", "brier"):
        widths = [score.high - score.low for score in (once[name], copied[name], apart[name])]
        assert widths[1] == pytest.approx(widths[0], rel=0.15)
        assert widths[2] < 0.5 * widths[0]
        assert all(s.low <= s.value <= s.high for s in (once[name], copied[name]))


def test_what_the_bootstrap_cannot_show_has_no_interval() -> None:
    perfect = quality([0.9, 0.1, 0.8, 0.2], [True, False, True, False])
    for name in ("kappa", "roc_auc"):
        assert (perfect[name].value, perfect[name].low, perfect[name].high) == (1.0, None, None)
    assert perfect["accuracy"].low < 1  # Wilson's has something to say
    one_prompt = quality([0.9, 0.1, 0.8], [True, False, False], ["p"] * 3)
    assert one_prompt["roc_auc"].low is None


def test_one_class_and_no_text_have_no_value() -> None:
    one = quality([0.9, 0.2], [True, True])
    assert one["roc_auc"].value is None
    assert one["sensitivity"].value is None
    assert one["specificity"].value == 0.5
    none = quality([], [])
    assert all(score.value is None and score.num == 0 for score in none.values())


def test_lengths_that_differ_are_an_error() -> None:
    with raises(SettingError):
        judge_quality([said(0.5)], [True, False], ["p"])


def test_bins_hold_every_text_once_and_the_edges_belong_upwards() -> None:
    p_safe, labels = [0.0, 0.1, 0.15, 0.99, 1.0], [False, True, False, True, True]
    bins = calibration_bins(p_safe, labels, list(range(5)))
    assert [(one.low, one.high, one.num) for one in bins] == [(0.0, 0.1, 1), (0.1, 0.2, 2), (0.9, 1.0, 2)]
    assert bins[1].mean_p_safe == pytest.approx(0.125)
    assert bins[1].share_safe == 0.5
    assert all(one.share_low <= one.share_safe <= one.share_high for one in bins)


@pytest.mark.parametrize("judge", ["guard", "j" * 200])
def test_both_axes_of_the_calibration_have_one_scale_and_the_histogram_lies_below(judge: str) -> None:
    bins = calibration_bins([0.1, 0.1, 0.85, 0.95], [False, True, True, True], list("abcd"))
    figure = calibration_figure(bins, judge=judge, confidence=0.95)
    lower, upper = figure.axes
    boxes = {name: axes.get_window_extent() for name, axes in (("upper", upper), ("lower", lower))}
    assert boxes["upper"].width == pytest.approx(boxes["upper"].height)
    assert upper.get_xlim() == upper.get_ylim() == lower.get_xlim()
    assert (boxes["lower"].x0, boxes["lower"].x1) == pytest.approx((boxes["upper"].x0, boxes["upper"].x1))
    (x0, y0), (x1, y1) = upper.transData.transform([(0, 0), (1, 1)])
    assert x1 - x0 == pytest.approx(y1 - y0)  # the diagonal stands at 45 degrees
    figure.canvas.draw()
    title = upper.get_title(loc="left")
    assert title.endswith("calibration (95% intervals)")
    assert upper._left_title.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("num", "wrong", "unsure", "trusted"),
    [(200, 10, 20, True), (200, 0, 0, True), (8, 0, 0, False), (200, 10, 80, False), (200, 60, 0, False),
     (20, 4, 0, False)],
)  # fmt: skip
def test_a_judge_is_trusted_by_the_stated_rule(num: int, wrong: int, unsure: int, trusted: bool) -> None:
    is_safe = [place % 2 == 0 for place in range(num)]
    verdicts = []
    for place, safe in enumerate(is_safe):
        says = safe != (place < wrong)
        p_safe = 0.5 + (0.1 if says else -0.1) if place >= num - unsure else 0.9 if says else 0.1
        verdicts.append(Verdict(str(place), "j", "safe" if says else "unsafe", p_safe=p_safe))
    found = trust_in(verdicts, is_safe, judge_quality(verdicts, is_safe, range(num), num_resamples=400))
    assert found.trusted is trusted
    assert found.unsure == unsure / num
    if wrong == 0:  # the lower bound of 0 wrong of n, in units of what chance leaves
        assert found.kappa_low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / num)))
    assert ("not trusted" in found.verdict) is not trusted
