"""Rates and differences from people's labels and a judge, against loops in float64 and by simulation."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from scipy.stats import beta
from scipy.stats import t as student

from benchmarks.options import RESULTS
from benchmarks.people import GRIDS, METHODS, OURS, PAIRED, PLAIN, Grid, Population, coverage, drawn, people_table
from benchmarks.process import ROOT, read_results
from bfpo.core.errors import SettingError
from bfpo.stats import (
    Predictions,
    half_width,
    labels_for,
    paired_difference,
    powered_difference,
    powered_rate,
    rate_interval,
)
from messages import raises


def by_hand(labels: list[float], said: list[float], every: list[float], num_prompts: int, weights: list[float]) -> dict:
    """The estimate for one label per prompt, in loops: regression, shrinkage, effective number, Clopper-Pearson."""
    total = sum(weights)
    share = [weight / total for weight in weights]
    y = sum(a * b for a, b in zip(share, labels, strict=True))
    f = sum(a * b for a, b in zip(share, said, strict=True))
    yy = ff = yf = 0.0
    for part, label, value in zip(share, labels, said, strict=True):
        yy += (part * (label - y)) ** 2
        ff += (part * (value - f)) ** 2
        yf += part * part * (label - y) * (value - f)
    scaled = [weight * len(weights) / total for weight in weights]
    hits = sum(min(1, w * label) for w, label in zip(scaled, labels, strict=True))
    misses = sum(min(1, w * (1 - label)) for w, label in zip(scaled, labels, strict=True))
    slope = max(yf, 0) / ff if ff > 0 and yy > 0 else 0.0
    r2 = max(yf, 0) ** 2 / (yy * ff) if ff > 0 and yy > 0 else 0.0
    n = len(labels)
    r2 = min(max(1 - (1 - r2) * (n - 1) / (n - 2), 0), 1)
    shrunk = max(min(hits, misses) - 1, 0) / (max(min(hits, misses) - 1, 0) + 8)
    residual = 1 - (2 * shrunk - shrunk**2) * r2
    effective = 1 / sum(part**2 for part in share)
    informed = max(min(hits, misses) - 1, 0)
    alike = min(max(yy * effective * n / (n - 1) / (y * (1 - y)), effective / n), 1)
    kish = effective / ((informed * alike + 5) / (informed + 5))  # as in `relative_variance`
    if yy > 1e-12:
        effective = min(kish, y * (1 - y) / yy)
    effective = 1 / (1 / num_prompts + max(1 / effective - 1 / num_prompts, 0) * residual)
    value = min(max(y - shrunk * slope * (f - sum(every) / len(every)), 0), 1)
    low = beta.ppf(0.025, value * effective, effective * (1 - value) + 1) if value > 0 else 0.0
    high = beta.ppf(0.975, value * effective + 1, effective * (1 - value)) if value < 1 else 1.0
    return {"value": value, "low": low, "high": high, "weight": shrunk * slope, "residual": residual}


@pytest.mark.parametrize(
    ("num", "total", "rate", "weighted"),
    [(5, 9, 0.5, False), (17, 40, 0.3, True), (60, 400, 0.9, False), (60, 61, 0.2, True), (33, 33, 0.4, False)],
)
def test_the_estimate_is_the_loop(num: int, total: int, rate: float, weighted: bool) -> None:
    rng = np.random.default_rng(num)
    truth = (rng.random(total) < rate).astype(float)
    every = np.clip(0.6 * truth + 0.5 * rng.random(total), 0, 1).tolist()
    places = rng.permutation(total)[:num].tolist()
    inclusion = (rng.random(num) * 0.9 + 0.1).tolist() if weighted else None
    labels = [truth[place] for place in places]
    got = powered_rate(labels, Predictions(every, list(range(total)), places, inclusion))
    weights = [1.0] * num if inclusion is None else [1 / one for one in inclusion]
    wanted = by_hand(labels, [every[place] for place in places], every, total, weights)
    for name, number in wanted.items():
        assert getattr(got, name) == pytest.approx(number, abs=1e-9), name
    assert (got.num, got.num_predicted) == (num, total)


def test_all_answers_labelled_or_a_judge_that_says_nothing_give_the_interval_of_the_labels() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(50) < 0.3).astype(float).tolist()
    said = rng.random(50).tolist()
    alone = rate_interval(truth)
    whole = powered_rate(truth, Predictions(said, list(range(50)), list(range(50))))
    assert (whole.value, whole.low, whole.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-12)
    assert (whole.people.low, whole.people.high) == (alone.low, alone.high)
    constant = powered_rate(truth[:20], Predictions([0.5] * 400, list(range(400)), list(range(20))))
    few = rate_interval(truth[:20])
    assert (constant.low, constant.high, constant.weight) == (few.low, few.high, 0.0)
    against = powered_rate(truth[:20], Predictions([1 - t for t in truth], list(range(50)), list(range(20))))
    assert against.weight == 0.0  # a judge that is always wrong is no help either
    difference = powered_difference(truth[:25], truth[25:], Predictions([0.1] * 25, list(range(25)), list(range(25))))
    paired = paired_difference(truth[:25], truth[25:])
    assert (difference.low, difference.high) == pytest.approx((paired.low, paired.high), abs=1e-12)


def test_a_difference_is_the_loop() -> None:
    rng = np.random.default_rng(3)
    one, two = (rng.random(30) < 0.6).astype(float), (rng.random(30) < 0.4).astype(float)
    said = np.clip(one - two + 0.4 * rng.standard_normal(30), -1, 1)
    got = powered_difference(one[:12].tolist(), two[:12].tolist(), Predictions(said.tolist(), range(30), range(12)))
    d, g = (one - two)[:12], said[:12]
    r2 = np.corrcoef(d, g)[0, 1] ** 2
    r2 = 1 - (1 - r2) * 11 / 10
    informed = np.abs(d).sum() - 1
    s = informed / (informed + 8)
    value = d.mean() - s * np.polyfit(g, d, 1)[0] * (g.mean() - said.mean())
    num = 1 / (1 / 30 + (1 / 12 - 1 / 30) * (1 - (2 * s - s * s) * r2))
    squares = ((d - d.mean()) / 12) ** 2
    freedom = squares.sum() ** 2 / (squares**2).sum() + 4
    centre = num * value / (num + 2)
    variance = ((num * (d.var() + value**2) + 2) / (num + 2) - centre**2) / (num + 2)
    half = student.ppf(0.975, freedom) * variance**0.5
    assert (got.value, got.low, got.high) == pytest.approx((value, centre - half, centre + half), abs=1e-9)


@pytest.mark.parametrize("value", [0, 1])
def test_no_unsafe_label_is_not_certainty(value: int) -> None:
    got = powered_rate([value] * 20, Predictions([0.5 * value] * 500, list(range(500)), list(range(20))))
    assert (got.low, got.high) == pytest.approx((0.0, 0.168434) if value == 0 else (0.831566, 1.0), abs=1e-5)


def test_answers_to_one_prompt_count_as_one_prompt_where_they_are_alike() -> None:
    said = [0.0, 1.0] * 200
    alike = powered_rate([1.0] * 10 + [0.0] * 10, Predictions(said, [n // 5 for n in range(400)], list(range(20))))
    apart = powered_rate([1.0] * 10 + [0.0] * 10, Predictions(said, list(range(400)), list(range(20))))
    assert alike.high - alike.low > 1.5 * (apart.high - apart.low)


def test_the_intervals_cover_at_few_labels_and_extreme_rates() -> None:
    designs = {Population(100): ((10, 1),), Population(400): ((20, 1), (60, 1))}
    cells = list(coverage({PLAIN: Grid(designs, (0.005, 0.05, 0.35, 0.98), ((0.02, 0.02), (0.5, 0.6)))}, 1000))
    for cell in cells:
        if cell["method"] in (OURS, PAIRED):
            assert cell["coverage"] > 0.92, cell  # 4 standard errors below .95
    normal = [cell for cell in cells if "normal" in cell["method"]]
    assert min(cell["coverage"] for cell in normal) < 0.2  # the simulation can fail

    def width(method: str) -> float:
        return float(np.mean([cell["half_width"] for cell in cells if cell["method"] == method and _good(cell)]))

    assert width(OURS) < 0.8 * width("people alone (Clopper-Pearson)")


def _good(cell: dict) -> bool:
    return cell["labels"] == 60 and cell["rate"] == 0.35 and cell["judge"] in ("exact", "right 19 times in 20")


def test_the_intervals_cover_with_strata_and_several_answers_per_prompt() -> None:
    few = {
        "two strata, sampled unequally": {Population(400, 100): ((60, 1),)},
        "several answers per prompt": {Population(50, 0, 4, "correlation 1"): ((20, 1), (20, 4))},
    }
    grids = {
        name: Grid(designs, GRIDS[name].rates[:4], GRIDS[name].pairs[:2], ("right 4 times in 5", "strict"))
        for name, designs in few.items()
    }
    cells = list(coverage(grids, 500))
    assert {cell["method"] for cell in cells} == {OURS, PAIRED}
    for cell in cells:
        assert cell["coverage"] > 0.91, cell  # 4 standard errors below .95


@pytest.mark.parametrize(
    ("population", "labels", "read"),
    [(Population(40, 10), 12, 1), (Population(9, 0, 4), 5, 2), (Population(9, 0, 4), 5, 4), (Population(30), 7, 1)],
)
def test_a_simulated_data_set_has_the_interval_of_the_library(population: Population, labels: int, read: int) -> None:
    rng = np.random.default_rng(labels)
    shape = (1, population.prompts, population.answers)
    truth = (rng.random(shape) < 0.4).astype(np.float32)
    said = np.clip(0.5 * truth + 0.5 * rng.random(shape), 0, 1)
    cell = drawn(population, labels, read, truth, said)
    rare, half = population.rare, labels // 2
    prompts = [*range(half), *range(rare, rare + labels - half)] if rare else list(range(labels))
    places = [prompt * population.answers + answer for prompt in prompts for answer in range(read)]
    share = (
        [half / rare if p < rare else (labels - half) / (population.prompts - rare) for p in prompts] if rare else None
    )
    clusters = np.repeat(np.arange(population.prompts), population.answers).tolist()
    predictions = Predictions(said.ravel().tolist(), clusters, places, share)
    wanted = powered_rate(truth.ravel()[places].tolist(), predictions)
    low, high = METHODS[OURS](cell)
    assert (low[0], high[0]) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_the_page_shows_what_was_simulated() -> None:
    found = read_results(RESULTS, "people")
    assert found is not None
    assert people_table(found["runs"]) in (ROOT / "docs" / "annotate.md").read_text(encoding="utf-8")
    assert {row["data"] for row in found["runs"]} == set(GRIDS)
    assert found["settings"]["trials"] >= 4000


def test_the_page_says_how_many_labels_give_which_interval() -> None:
    widths = "/".join(f"{100 * half_width(labels, 400):.0f}" for labels in (20, 40, 60, 100, 200))
    assert f"+-{widths} points" in (ROOT / "docs" / "annotate.md").read_text(encoding="utf-8")


def test_a_sample_by_strata_is_covered_through_its_weights() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        rare = rng.random(400) < 0.2
        truth = (rng.random(400) < np.where(rare, 0.6, 0.05)).astype(float)
        said = np.clip(truth * 0.4 + rng.random(400) * 0.6, 0, 1).tolist()
        places = np.concatenate([rng.choice(np.flatnonzero(part), 30, replace=False) for part in (rare, ~rare)])
        inclusion = [30 / (rare.sum() if rare[place] else (~rare).sum()) for place in places]
        got = powered_rate(truth[places].tolist(), Predictions(said, list(range(400)), places.tolist(), inclusion))
        hits += got.low <= 0.2 * 0.6 + 0.8 * 0.05 <= got.high
    assert hits >= 370  # of 380 expected; without the weights none is near


def test_labels_needed_are_the_fewest() -> None:
    for total, residual in itertools.product((100, 1000), (1.0, 0.3)):
        width = partial(half_width, num_clusters=total, rate=0.36, residual=residual)
        wanted = labels_for(0.05, total, width)
        if wanted is None:
            assert width(total) > 0.05
        else:
            assert width(wanted) <= 0.05 < width(wanted - 1)
    assert labels_for(0.05, 100, lambda num: half_width(num, 100)) is None


def test_bad_values() -> None:
    three = Predictions([0.1, 0.2, 0.3], [0, 1, 2], [0])
    with raises(SettingError, "labels"):
        powered_rate([2.0], three)
    with raises(SettingError, "labelled"):
        powered_rate([1.0, 0.0], three)
    with raises(SettingError, "inclusion"):
        powered_rate([1.0], Predictions([0.1], [0], [0], [0.0]))
    with raises(SettingError, "predictions"):
        powered_difference([1.0], [0.0], Predictions([1.5], [0], [0]))
    assert powered_rate([], Predictions([0.1], [0], [])).value is None
