from __future__ import annotations

import random

import pytest

from bfpo.core.errors import SettingError
from bfpo.judges.agreement import cohen_kappa, disagreement, fleiss_kappa
from bfpo.judges.panel import Opinion
from messages import raises


def ratings(num: int, raters: int, seed: int, noise: float = 0.3) -> list[list[bool]]:
    rng = random.Random(seed)
    truth = [rng.random() < 0.6 for _ in range(num)]
    return [[value if rng.random() > noise else not value for value in truth] for _ in range(raters)]


def test_cohens_kappa_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        first, second = ratings(60, 2, seed)
        assert cohen_kappa(first, second).value == pytest.approx(metrics.cohen_kappa_score(first, second), abs=1e-12)


def test_cohens_kappa_of_a_textbook_table() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, by chance 0.5
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = cohen_kappa(first, second)
    assert found.value == pytest.approx(0.4)
    assert found.num == 50
    assert found.low is not None
    assert found.high is not None
    assert 0.1 < found.low < 0.4 < found.high < 0.7


def fleiss_by_rater_pairs(raters: list[list[bool]]) -> float:
    """The definition, item by item and pair of raters by pair of raters."""
    num, count = len(raters[0]), len(raters)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    observed = sum(raters[i][n] == raters[j][n] for n in range(num) for i, j in pairs) / (num * len(pairs))
    share = sum(map(sum, raters)) / (num * count)
    chance = share**2 + (1 - share) ** 2
    return (observed - chance) / (1 - chance)


@pytest.mark.parametrize("raters", [2, 3, 5])
def test_fleiss_kappa_is_its_definition(raters: int) -> None:
    for seed in range(3):
        made = ratings(40, raters, seed)
        assert fleiss_kappa(made).value == pytest.approx(fleiss_by_rater_pairs(made), abs=1e-12)


def test_what_was_not_rated_is_left_out() -> None:
    first, second, third = ratings(30, 3, 1)
    gaps: list[bool | None] = [None if n % 5 == 0 else value for n, value in enumerate(second)]
    kept = [n for n in range(30) if n % 5]
    alone = [[one[n] for n in kept] for one in (first, second, third)]
    assert cohen_kappa(first, gaps).value == cohen_kappa(*alone[:2]).value
    assert cohen_kappa(first, gaps).num == len(kept)
    assert fleiss_kappa([first, gaps, third]).value == fleiss_kappa(alone).value


def test_nothing_to_agree_on_is_no_number() -> None:
    assert cohen_kappa([True] * 5, [True] * 5).value is None
    assert fleiss_kappa([[False] * 5] * 3).value is None
    assert cohen_kappa([None, True], [True, None]).num == 0
    assert cohen_kappa([], []).value is None
    with raises(SettingError):
        cohen_kappa([True], [True, False])
    with raises(SettingError):
        fleiss_kappa([[True]])


def test_raters_who_never_disagree_have_no_interval() -> None:
    """Nor has one who always says the same: no resample can differ."""
    first = [True, False, True, False, True]
    for found in (cohen_kappa(first, first), fleiss_kappa([first] * 3)):
        assert (found.value, found.low, found.high, found.num) == (1.0, None, None, 5)
    constant = cohen_kappa([True] * 7, [True, False, True, True, False, True, True])
    assert (constant.value, constant.low, constant.high) == (pytest.approx(0, abs=1e-12), None, None)


def test_intervals_redraw_prompts_and_not_texts() -> None:
    first, second = ratings(20, 2, 3)
    once = cohen_kappa(first, second)
    tenfold = cohen_kappa(first * 10, second * 10, [n % 20 for n in range(200)])
    independent = cohen_kappa(first * 10, second * 10)
    assert tenfold.value == pytest.approx(once.value)
    assert once.low is not None
    assert tenfold.low == pytest.approx(once.low, abs=0.1)
    assert independent.low is not None
    assert independent.low > once.low + 0.1


def opinion(p_safe: float | None) -> Opinion:
    label = "unscored" if p_safe is None else "safe" if p_safe >= 0.5 else "unsafe"
    return Opinion("j", label, p_safe, 1, p_safe is not None)  # type: ignore[arg-type]


def test_disagreement_is_about_labels() -> None:
    found = disagreement({"a": opinion(0.9), "b": opinion(0.2), "c": opinion(None), "given label": 1.0})
    assert found is not None
    assert found.distance == pytest.approx(0.8)
    assert found.p_safe == {"a": 0.9, "b": 0.2, "given label": 1.0}
    assert disagreement({"a": opinion(0.9), "b": opinion(0.6)}) is None
    assert disagreement({"a": opinion(0.9), "b": opinion(None)}) is None
