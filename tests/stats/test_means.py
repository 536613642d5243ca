from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from bfpo.core.errors import SettingError
from bfpo.stats import Interval, mean_interval, wilson
from messages import raises


def test_symmetric_intervals_give_the_delta_method() -> None:
    errors, values = (0.02, 0.05, 0.01), (0.3, 0.5, 0.9)
    parts = [Interval(v, v - 1.96 * e, v + 1.96 * e, 100) for v, e in zip(values, errors, strict=True)]
    found = mean_interval(parts)
    assert found.value == pytest.approx(sum(values) / 3)
    reach = 1.96 * sqrt(sum(e**2 for e in errors)) / 3
    assert found.low == pytest.approx(sum(values) / 3 - reach)
    assert found.high == pytest.approx(sum(values) / 3 + reach)
    assert found.num == 3


def test_one_part_keeps_its_interval_and_ends_stay_on_their_side() -> None:
    part = wilson(0, 40)
    assert mean_interval([part]) == Interval(part.value, pytest.approx(part.low), pytest.approx(part.high), 1)
    low_end = mean_interval([wilson(0, 40), wilson(0, 10)])
    assert low_end.low == 0.0
    assert 0.0 < (low_end.high or 0.0) < (wilson(0, 10).high or 0.0)


def test_parts_of_the_same_prompts_add_up_as_they_are() -> None:
    first, second, third = wilson(12, 40), wilson(15, 40), wilson(30, 50)
    together = mean_interval([first, second], ["a", "a"])
    assert together.low == pytest.approx(((first.low or 0) + (second.low or 0)) / 2)
    apart = mean_interval([first, second], ["a", "b"])
    assert apart.high is not None
    assert together.high is not None
    assert apart.high < together.high
    of_three = mean_interval([first, second, third], ["a", "a", "b"])
    reaches = [p.high - p.value for p in (first, second, third) if p.high is not None and p.value is not None]
    assert of_three.high == pytest.approx(
        (of_three.value or 0) + sqrt((reaches[0] + reaches[1]) ** 2 + reaches[2] ** 2) / 3
    )


def test_what_lacks_a_bound_or_a_value_gives_none() -> None:
    whole = wilson(3, 9)
    assert mean_interval([whole, Interval(0.5, None, None, 4)]) == Interval((1 / 3 + 0.5) / 2, None, None, 2)
    assert mean_interval([whole, Interval(None, None, None, 0)]).value is None
    assert mean_interval([]).value is None
    with raises(SettingError):
        mean_interval([whole], ["a", "b"])


@pytest.mark.parametrize("rates", [(0.5, 0.7, 0.2), (0.97, 0.99, 0.9, 0.95), (0.02, 0.6)])
def test_the_interval_holds_the_true_mean_as_often_as_it_says(rates: tuple[float, ...]) -> None:
    generator = np.random.default_rng(1)
    sizes = (60, 150, 40, 90)[: len(rates)]
    truth, trials, held = sum(rates) / len(rates), 1500, 0
    for _ in range(trials):
        parts = []
        for rate, size in zip(rates, sizes, strict=True):
            hits = int(generator.binomial(size, rate))
            z2, p = 1.959964**2, hits / size  # Wilson's bounds by hand: fast, and another way than the package's
            middle, half = (p + z2 / (2 * size)), 1.959964 * sqrt(p * (1 - p) / size + z2 / (4 * size**2))
            parts.append(Interval(p, (middle - half) / (1 + z2 / size), (middle + half) / (1 + z2 / size), size))
        found = mean_interval(parts)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 0.935 <= held / trials <= 0.985


def test_dependent_parts_are_covered_too() -> None:
    """Two judges of the same answers agree on nearly all: taken as independent, the mean would be too sure."""
    generator = np.random.default_rng(2)
    held = {"same": 0, "independent": 0}
    for _ in range(600):
        first = generator.random(80) < 0.6
        second = np.where(generator.random(80) < 0.95, first, ~first)
        truth = (0.6 + 0.6 * 0.95 + 0.4 * 0.05) / 2
        parts = [wilson(int(first.sum()), 80), wilson(int(second.sum()), 80)]
        for name, groups in (("same", ["a", "a"]), ("independent", ["a", "b"])):
            found = mean_interval(parts, groups)
            assert found.low is not None
            assert found.high is not None
            held[name] += found.low <= truth <= found.high
    assert held["same"] / 600 >= 0.93
    assert held["independent"] / 600 < 0.9
