from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from bfpo.core.errors import SettingError
from bfpo.stats import MIN_PROMPTS, length_controlled_rate
from messages import raises


def simulate(
    num: int, constant: float, slope: float, seed: int, mean: float = 300.0
) -> tuple[list[float], list[float]]:
    """Return wins and losses of a model whose answers are longer on average, and by how much each is."""
    generator = np.random.default_rng(seed)
    longer = generator.normal(mean, 300, num)
    chances = 1 / (1 + np.exp(-(constant + slope * np.tanh(longer / longer.std(ddof=1)))))
    return (generator.random(num) < chances).astype(float).tolist(), longer.tolist()


def by_hand(preferences: list[float], longer: list[float]) -> float:
    """Minimise the same penalised loss one term at a time."""
    spread = np.std(longer, ddof=1)

    def loss(weights: np.ndarray) -> float:
        total = float(weights @ weights) / (2 * 100)
        for preference, length in zip(preferences, longer, strict=True):
            logit = weights[0] + weights[1] * math.tanh(length / spread)
            total += preference * math.log1p(math.exp(-logit)) + (1 - preference) * math.log1p(math.exp(logit))
        return total

    found = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000})
    return float(1 / (1 + math.exp(-found.x[0])))


def test_length_alone_is_no_merit() -> None:
    preferences, longer = simulate(4000, 0.0, 1.5, seed=1)
    found = length_controlled_rate(preferences, longer, num_resamples=20)
    assert np.mean(preferences) > 0.65
    assert found.value == pytest.approx(0.5, abs=0.04)
    better = length_controlled_rate(*simulate(4000, 1.0, 1.5, seed=2), num_resamples=20)
    assert better.value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


def test_it_is_the_fit_of_a_loop() -> None:
    preferences, longer = simulate(60, 0.3, 1.0, seed=3)
    shades = [0.1 + 0.7 * one for one in preferences]
    assert length_controlled_rate(shades, longer, num_resamples=1).value == pytest.approx(
        by_hand(shades, longer), abs=1e-6
    )


def test_turning_all_pairs_round_turns_the_rate_round() -> None:
    preferences, longer = simulate(80, 0.3, 1.0, seed=4)
    one = length_controlled_rate(preferences, longer, num_resamples=200)
    other = length_controlled_rate([1 - each for each in preferences], [-each for each in longer], num_resamples=200)
    assert None not in (one.value, one.low, one.high, other.value, other.low, other.high)
    assert other.value == pytest.approx(1 - one.value)  # type: ignore[operator]
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low))  # type: ignore[operator]


def test_a_model_against_itself_has_a_half_with_room_for_doubt() -> None:
    found = length_controlled_rate([0.5] * 40, [0.0] * 40)
    assert found.value == 0.5
    assert found.low is not None
    assert found.high is not None
    # 0 of 40 prompts leave a share of about .09 open, each with a preference of at most .5 away.
    assert found.low < 0.46 < 0.54 < found.high


def test_winners_by_length_alone_stay_finite() -> None:
    found = length_controlled_rate([1.0, 0.0] * 20, [5.0, -5.0] * 20, num_resamples=50)
    assert found.value == pytest.approx(0.5, abs=1e-6)
    assert length_controlled_rate([1.0] * 40, list(range(40)), num_resamples=5).value == 1.0


def test_too_few_prompts_give_no_value_and_answers_to_one_prompt_are_one() -> None:
    few = MIN_PROMPTS - 1
    assert length_controlled_rate([0.0, 1.0] * few, list(range(2 * few)), [n // 2 for n in range(2 * few)]).num == 0
    assert length_controlled_rate(*simulate(MIN_PROMPTS, 0, 1, seed=5), num_resamples=5).num == MIN_PROMPTS
    assert length_controlled_rate([], []).value is None


def test_bad_input_says_what_is_wrong() -> None:
    with raises(SettingError, "longer_by"):
        length_controlled_rate([0.5, 0.5], [1.0])
    with raises(SettingError, "preferences"):
        length_controlled_rate([1.5], [1.0])


@pytest.mark.slow
def test_the_interval_covers_as_it_says() -> None:
    true = 1 / (1 + math.exp(-0.4))
    hits = 0
    for seed in range(150):
        found = length_controlled_rate(*simulate(120, 0.4, 1.0, seed=seed), num_resamples=200)
        hits += found.low is not None and found.high is not None and found.low <= true <= found.high
    assert 0.89 <= hits / 150 <= 0.99
