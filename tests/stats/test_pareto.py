from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bfpo.core.errors import SettingError
from bfpo.stats import Choice, Interval, hypervolume, hypervolume_interval, nearest_to, pareto_front
from messages import raises

ZERO = {"helpful": 0.0, "harmless": 0.0}


def points_of(*scores: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {f"p{n}": {"helpful": x, "harmless": y} for n, (x, y) in enumerate(scores)}


# A coarse grid, so that ties and duplicates occur.
some_points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9).map(
    lambda pairs: points_of(*[(x / 6, y / 6) for x, y in pairs])
)


def beats(first: dict[str, float], second: dict[str, float]) -> bool:
    return all(first[key] >= second[key] for key in second) and first != second


@given(some_points)
def test_the_front_is_what_nothing_beats(points: dict[str, dict[str, float]]) -> None:
    front = pareto_front(points)
    unbeaten = {name for name in points if not any(beats(other, points[name]) for other in points.values())}
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten)
    assert [points[name]["helpful"] for name in front] == sorted(points[name]["helpful"] for name in front)
    assert hypervolume({name: points[name] for name in front}, ZERO) == pytest.approx(hypervolume(points, ZERO))


def test_ties_and_duplicates() -> None:
    points = points_of((0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (0.2, 0.5), (0.1, 0.9))
    assert pareto_front(points) == ["p4", "p0", "p1"]
    assert pareto_front({}) == []
    with_more = {name: {**scores, "well_formed": 1.0} for name, scores in points.items()}
    assert pareto_front(with_more, ("harmless", "helpful")) == ["p0", "p1", "p4"]


@given(some_points, st.tuples(st.integers(-2, 5), st.integers(-2, 5)))
def test_hypervolume_is_the_count_of_cells(points: dict[str, dict[str, float]], corner: tuple[int, int]) -> None:
    cells = sum(
        any(round(6 * p["helpful"]) > x and round(6 * p["harmless"]) > y for p in points.values())
        for x in range(corner[0], 7)
        for y in range(corner[1], 7)
    )
    reference = {"helpful": corner[0] / 6, "harmless": corner[1] / 6}
    assert hypervolume(points, reference) == pytest.approx(cells / 36, abs=1e-12)


@given(some_points, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_hypervolume_grows_with_points(points: dict[str, dict[str, float]], extra: tuple[float, float]) -> None:
    before = hypervolume(points, ZERO)
    added = {"helpful": extra[0], "harmless": extra[1]}
    after = hypervolume({**points, "extra": added}, ZERO)
    assert after >= before - 1e-12
    if not any(beats(other, added) or other == added for other in points.values()) and min(extra) > 1e-3:
        assert "extra" in pareto_front({**points, "extra": added})
    swapped = {name: {"helpful": p["harmless"], "harmless": p["helpful"]} for name, p in points.items()}
    assert hypervolume(swapped, ZERO) == pytest.approx(before)


def test_hypervolume_by_hand() -> None:
    points = points_of((0.1, 0.9), (0.5, 0.5), (0.4, 0.4))
    assert hypervolume(points, ZERO) == pytest.approx(0.1 * 0.9 + 0.4 * 0.5)
    assert hypervolume(points, {"helpful": 0.2, "harmless": 0.1}) == pytest.approx(0.3 * 0.4)
    assert hypervolume({}, ZERO) == 0.0
    assert hypervolume(points, {"helpful": 0.6, "harmless": 0.95}) == 0.0


def drawn(
    rng: np.random.Generator, truth: dict[str, tuple[float, float]], num: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[object]]]:
    """Return answers of models that find the same prompts hard, on benign prompts and on harmful ones."""
    shared = rng.uniform(size=(num, 2))
    values = {}
    for name, rates in truth.items():
        luck = np.where(rng.uniform(size=(num, 2)) < 0.6, shared, rng.uniform(size=(num, 2)))
        right = (luck < rates).astype(float)
        values[name] = {"helpful": right[:, 0].tolist(), "harmless": right[:, 1].tolist()}
    return values, {key: [(key, n) for n in range(num)] for key in ZERO}


def test_coverage_of_the_hypervolume() -> None:
    rng = np.random.default_rng(0)
    for truth, enough in (
        ({"a": (0.2, 0.9), "b": (0.4, 0.8), "c": (0.42, 0.78), "d": (0.7, 0.4)}, binom.ppf(0.001, 150, 0.94)),
        # Six equal models are the hardest case: the best of them looks better than any is.
        (dict.fromkeys("abcdef", (0.5, 0.5)), binom.ppf(0.001, 150, 0.87)),
    ):
        area = hypervolume({name: dict(zip(ZERO, rates, strict=True)) for name, rates in truth.items()}, ZERO)
        inside = 0
        for trial in range(150):
            got = hypervolume_interval(*drawn(rng, truth, 60), ZERO, num_resamples=200, random_seed=trial)
            inside += got.low <= area <= got.high  # type: ignore[operator]
        assert inside >= enough


def test_the_interval_of_one_point_is_its_means() -> None:
    values = {"a": {"helpful": [1, 0, 1, 1] * 20, "harmless": [1] * 40}}
    prompts = {"helpful": list(range(80)), "harmless": [f"h{n // 2}" for n in range(40)]}
    got = hypervolume_interval(values, prompts, ZERO)
    assert got.value == pytest.approx(0.75)
    assert got.num == 100
    half = 1.96 * (0.75 * 0.25 / 80) ** 0.5
    assert (got.low, got.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.015)
    assert hypervolume_interval(values, prompts, ZERO) == got


def test_prompts_of_both_objectives_are_redrawn_together() -> None:
    hits = [1.0, 0.0] * 50
    values = {"a": {"helpful": hits, "harmless": [1 - hit for hit in hits]}}
    same = {"helpful": list(range(100)), "harmless": list(range(100))}
    apart = {"helpful": list(range(100)), "harmless": list(range(100, 200))}
    together = hypervolume_interval(values, same, ZERO)
    separate = hypervolume_interval(values, apart, ZERO)
    # p (1 - p) hardly moves around p = 1/2, the product of two rates that vary apart does.
    assert together.high - together.low < 0.3 * (separate.high - separate.low)  # type: ignore[operator]
    assert (together.num, separate.num) == (100, 200)


def test_nothing_to_redraw() -> None:
    prompts = {"helpful": [1], "harmless": [2]}
    one = {"a": {"helpful": [1.0], "harmless": [0.5]}}
    assert hypervolume_interval(one, prompts, ZERO) == Interval(0.5, None, None, 2)
    assert hypervolume_interval({}, prompts, ZERO) == Interval(None, None, None, 2)
    none = {"a": {"helpful": [], "harmless": [0.5]}}
    assert hypervolume_interval(none, {"helpful": [], "harmless": [2]}, ZERO) == Interval(None, None, None, 1)


def test_the_point_that_meets_a_constraint() -> None:
    points = points_of((0.1, 0.99), (0.6, 0.96), (0.9, 0.7))
    assert nearest_to(points, {"harmless": 0.95}) == Choice("p1", True, {})
    assert nearest_to(points, {"helpful": 0.5}) == Choice("p1", True, {})
    assert nearest_to(points, {"harmless": 0.96}).name == "p1"  # met exactly is met
    assert nearest_to(points, {"helpful": 0.05, "harmless": 0.6}).name == "p1"
    unmet = nearest_to(points, {"helpful": 0.75, "harmless": 0.95})
    assert (unmet.name, unmet.meets) == ("p1", False)
    assert unmet.missing == pytest.approx({"helpful": 0.15})
    assert nearest_to(points, {"harmless": 0.999}) == Choice("p0", False, {"harmless": pytest.approx(0.009)})
    assert nearest_to(points_of((0.2, 0.5), (0.3, 0.5)), {"harmless": 0.6}).name == "p1"
    assert nearest_to(points_of((0.3, 0.96), (0.3, 0.97), (0.3, 0.97)), {"harmless": 0.9}).name == "p1"


@given(some_points, st.floats(0, 1.2))
def test_no_point_does_better_than_the_chosen(points: dict[str, dict[str, float]], bound: float) -> None:
    choice = nearest_to(points, {"harmless": bound})
    able = [p["helpful"] for p in points.values() if p["harmless"] >= bound]
    assert choice.meets == bool(able)
    if able:
        assert points[choice.name]["helpful"] == max(able)
        assert choice.missing == {}
        assert choice.name in pareto_front(points)
    else:
        assert points[choice.name]["harmless"] == max(p["harmless"] for p in points.values())


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: pareto_front({"a": {"helpful": 1.0}}), "objectives"),
        (lambda: pareto_front({"a": {"x": 1, "y": 1}, "b": {"x": 1}}), "b"),
        (lambda: hypervolume(points_of((0.1, float("nan"))), ZERO), "p0"),
        (lambda: hypervolume(points_of((0.1, 0.2)), {"helpful": 0}), "objectives"),
        (lambda: hypervolume(points_of((0.1, 0.2)), {**ZERO, "helpful": float("nan")}), "reference"),
        (lambda: nearest_to({}, {"harmless": 1}), "points"),
        (lambda: nearest_to(points_of((0.1, 0.2)), {}), "at_least"),
        (lambda: nearest_to(points_of((0.1, 0.2)), {"harmles": 1}), "harmles"),
        (
            lambda: hypervolume_interval({"a": {"helpful": [1], "harmless": [1, 1]}}, {key: [1] for key in ZERO}, ZERO),
            "a, harmless",
        ),
        (lambda: hypervolume_interval({}, {"helpful": [1]}, ZERO), "prompts"),
        (lambda: hypervolume_interval({}, {}, ZERO, num_resamples=0), "num_resamples"),
    ],
)
def test_bad_values(call: object, key: str) -> None:
    with raises(SettingError, key):
        call()  # type: ignore[operator]
