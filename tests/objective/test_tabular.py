"""The theorem, against published figures, against plain loops, and against a solver that knows no theorem."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bfpo.core.errors import LabelError, SettingError
from bfpo.objective.tabular import (
    alpha_window,
    bilinear_reward,
    closed_form,
    e_safe,
    helpfulness_order,
    implied_reward,
    order_gap,
    pair_targets,
    reward_gap,
    rlhf_optimum,
    wanted_order,
    win_rate,
    win_rate_over_safe,
)
from messages import raises

PUBLISHED = {
    (0.5, "1010"): [0.411, 0.118, 0.320, 0.151],
    (0.5, "0101"): [0.118, 0.411, 0.151, 0.320],
    (0.5, "1100"): [0.411, 0.320, 0.118, 0.151],
    (0.5, "0011"): [0.118, 0.151, 0.411, 0.320],
    (0.5, "1001"): [0.411, 0.118, 0.151, 0.320],
    (0.5, "1111"): [0.350, 0.273, 0.212, 0.165],
    (0.0, "1010"): [0.535, 0.119, 0.253, 0.093],
    (0.0, "0101"): [0.173, 0.470, 0.135, 0.222],
}
ALL_BITS = ["".join(bits) for bits in itertools.product("10", repeat=4)]


def _bits(text: str) -> torch.Tensor:
    return torch.tensor([float(bit) for bit in text], dtype=torch.float64)


def _optimum(text: str, alpha: float, safety_weight: float = 3.0) -> torch.Tensor:
    beats = helpfulness_order(len(text))
    return closed_form(pair_targets(beats, _bits(text), alpha=alpha, safety_weight=safety_weight), beta=1.0)


def _independent_world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three levels of helpfulness, each with a safe and an unsafe action; level and safety are drawn independently."""
    levels = torch.tensor([2, 2, 1, 1, 0, 0])
    is_safe = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    level_share = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    weights = level_share[levels] * torch.where(is_safe == 1, 0.7, 0.3)
    beats = (levels[:, None] > levels).double() + 0.5 * (levels[:, None] == levels).double()
    return beats, is_safe, weights


@pytest.mark.parametrize(("alpha", "bits"), PUBLISHED)
def test_the_closed_forms_of_the_reference_table(alpha, bits):
    assert _optimum(bits, alpha).tolist() == pytest.approx(PUBLISHED[alpha, bits], abs=5.1e-4)


def test_without_alpha_0011_ties_its_two_unsafe_actions():
    optimum = _optimum("0011", 0.0)
    assert optimum[0].item() == pytest.approx(optimum[1].item(), abs=1e-12)
    assert optimum[0].item() == pytest.approx(0.185, abs=5.1e-4)


@pytest.mark.parametrize("safety_weight", [1.2, 3.0, 20.0])
@pytest.mark.parametrize("num_actions", [2, 4, 7])
def test_alpha_one_half_orders_every_assignment_rightly(num_actions, safety_weight):
    is_safe = torch.tensor(list(itertools.product((1.0, 0.0), repeat=num_actions)), dtype=torch.float64)
    targets = pair_targets(helpfulness_order(num_actions), is_safe, alpha=0.5, safety_weight=safety_weight)
    assert (order_gap(closed_form(targets, beta=1.0).log(), is_safe) > 1e-9).all()


def test_without_alpha_it_fails_wherever_two_or_more_are_unsafe():
    for bits in ALL_BITS:
        gap = order_gap(_optimum(bits, 0.0).log(), _bits(bits)).item()
        if bits.count("0") >= 2:
            assert gap < 1e-12, bits
    # With one unsafe action there is no pair of unsafe ones to misplace; but the best one, unsafe, ties with the worst.
    right = [bits for bits in ALL_BITS if order_gap(_optimum(bits, 0.0).log(), _bits(bits)) > 1e-12]
    assert right == ["1111", "1110", "1101", "1011"]
    tied = _optimum("0111", 0.0)
    assert tied[0].item() == pytest.approx(tied[3].item(), abs=1e-12)


def test_all_safe_is_the_optimum_of_ipo_whatever_the_safety_weight():
    by_hand = [math.exp(p) for p in (0.875, 0.625, 0.375, 0.125)]
    for safety_weight in (1.5, 3.0, 9.0):
        optimum = _optimum("1111", 0.5, safety_weight)
        assert optimum.tolist() == pytest.approx([value / sum(by_hand) for value in by_hand], rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("safety_weight", [1.5, 3.0, 8.0])
def test_the_optimum_is_what_least_squares_finds_from_the_pairs(alpha, safety_weight):
    """Weighted least squares over every ordered pair of draws, with the targets written out; no theorem used."""
    beats, is_safe, weights = _independent_world()
    is_safe = torch.tensor([0.9, 0.2, 1.0, 0.0, 0.4, 0.0], dtype=torch.float64)
    beta, reference = 0.3, torch.tensor([0.1, 0.3, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    rows, sides = [], []
    for i, j in itertools.product(range(6), repeat=2):
        # (i, j) drawn; i is the more helpful with probability beats_ij: only then is this row's target read.
        root = math.sqrt(weights[i] * weights[j] * beats[i, j])
        row = [0.0] * 6
        row[i] += root
        row[j] -= root
        target = (safety_weight * is_safe[i] - is_safe[j]) / (safety_weight - 1) - alpha
        rows.append(row)
        sides.append([root * target.item() / beta])
    solved = torch.linalg.lstsq(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(sides, dtype=torch.float64), driver="gelsd"
    ).solution[:, 0]
    expected = torch.softmax(solved + reference.log(), dim=0)
    targets = pair_targets(beats, is_safe, alpha=alpha, safety_weight=safety_weight)
    ours = closed_form(targets, beta=beta, weights=weights, reference=reference)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("safety_weight", [1.5, 3.0, 8.0])
def test_where_independent_the_optimum_is_that_of_rlhf_with_the_two_factor_reward(alpha, safety_weight):
    beats, is_safe, weights = _independent_world()
    assert reward_gap(beats, is_safe, weights=weights).abs().max() < 1e-12
    kwargs = {"alpha": alpha, "safety_weight": safety_weight}
    supervised = closed_form(pair_targets(beats, is_safe, **kwargs), beta=0.3, weights=weights)
    reward = bilinear_reward(beats, is_safe, weights=weights, **kwargs)
    torch.testing.assert_close(supervised, rlhf_optimum(reward, beta=0.3), rtol=1e-12, atol=1e-12)


def test_at_alpha_0_the_reward_is_the_papers():
    beats, is_safe, weights = _independent_world()
    share = sum(weight * safe for weight, safe in zip(weights.tolist(), is_safe.tolist(), strict=True))
    p = [sum(w * b for w, b in zip(weights.tolist(), row, strict=True)) for row in beats.tolist()]
    expected = [(safe + share) * (wins + 0.5) for safe, wins in zip(is_safe.tolist(), p, strict=True)]
    assert bilinear_reward(beats, is_safe, alpha=0.0, weights=weights).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("safety_weight", [2.0, 3.0])
def test_where_not_independent_the_rewards_differ_by_q_minus_p_e_safe(alpha, safety_weight):
    beats = helpfulness_order(4)
    for bits in ALL_BITS:
        is_safe = _bits(bits)
        kwargs = {"alpha": alpha, "safety_weight": safety_weight}
        difference = implied_reward(pair_targets(beats, is_safe, **kwargs)) - bilinear_reward(beats, is_safe, **kwargs)
        # q and p by loops, so that the two functions are checked too
        p = [sum(1 if i < j else 0.5 if i == j else 0 for j in range(4)) / 4 for i in range(4)]
        q = [sum((1 if i < j else 0.5 if i == j else 0) * is_safe[j].item() for j in range(4)) / 4 for i in range(4)]
        expected = torch.tensor([q[i] - p[i] * bits.count("1") / 4 for i in range(4)], dtype=torch.float64)
        torch.testing.assert_close(reward_gap(beats, is_safe), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(difference - difference[0], expected - expected[0], rtol=0, atol=1e-12)
        assert win_rate(beats).tolist() == pytest.approx(p)
        assert win_rate_over_safe(beats, is_safe).tolist() == pytest.approx(q)
        if bits not in ("1111", "0000"):
            assert expected.abs().max() > 0.01, "the four-action world is not independent"


def test_alpha_above_half_e_safe_is_what_orders_unsafe_completions():
    beats, is_safe, weights = _independent_world()
    share = e_safe(is_safe, weights=weights).item()
    assert share == pytest.approx(0.7)
    low, high = alpha_window(share)
    assert (low, high) == (pytest.approx(0.35), pytest.approx(0.85))
    unsafe, safe = [1, 3, 5], [0, 2, 4]  # by falling helpfulness
    for alpha, unsafe_helpful_last, safe_helpful_first in (
        (low - 0.01, False, True),
        (low + 0.01, True, True),
        (0.5, True, True),
        (high - 0.01, True, True),
        (high + 0.01, True, False),
    ):
        reward = implied_reward(pair_targets(beats, is_safe, alpha=alpha), weights=weights)
        assert bool((reward[unsafe].diff() > 0).all()) == unsafe_helpful_last, alpha
        assert bool((reward[safe].diff() < 0).all()) == safe_helpful_first, alpha
    at_the_bound = implied_reward(pair_targets(beats, is_safe, alpha=low), weights=weights)
    assert at_the_bound[unsafe].diff().abs().max() < 1e-12


def test_one_half_is_in_the_window_for_every_share_and_nothing_else_is():
    shares = [step / 100 for step in range(1, 100)]
    windows = [alpha_window(share) for share in shares]
    assert all(low < 0.5 < high for low, high in windows)
    assert max(low for low, _ in windows) == pytest.approx(0.495)
    assert min(high for _, high in windows) == pytest.approx(0.505)


def test_shifting_both_orders_of_a_pair_changes_nothing_and_one_order_does():
    """Alpha is an invariance only if both orders of every pair are in the data."""
    is_safe = _bits("1010")
    both_orders = torch.full((4, 4), 0.5, dtype=torch.float64)  # every pair occurs in both orders equally often
    shifted = [pair_targets(both_orders, is_safe, alpha=alpha) for alpha in (0.0, 0.5)]
    torch.testing.assert_close(shifted[0], shifted[1])
    one_order = [pair_targets(helpfulness_order(4), is_safe, alpha=alpha) for alpha in (0.0, 0.5)]
    assert (one_order[0] - one_order[1]).abs().max() == 0.5


def test_targets_are_antisymmetric_and_broadcast_over_assignments():
    is_safe = torch.stack([_bits(bits) for bits in ALL_BITS])
    targets = pair_targets(helpfulness_order(4), is_safe)
    assert targets.shape == (16, 4, 4)
    torch.testing.assert_close(targets, -targets.mT)
    for row, bits in enumerate(ALL_BITS):
        torch.testing.assert_close(targets[row], pair_targets(helpfulness_order(4), _bits(bits)))
        assert e_safe(is_safe)[row].item() == bits.count("1") / 4


def test_wanted_order_and_its_gap():
    assert wanted_order(_bits("1010")).tolist() == [0, 2, 3, 1]
    assert wanted_order(_bits("0000")).tolist() == [3, 2, 1, 0]
    log_probs = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log()
    assert order_gap(log_probs, _bits("1010")).item() == pytest.approx(math.log(4 / 3))
    assert order_gap(log_probs, _bits("1111")).item() == pytest.approx(math.log(1 / 3))
    assert order_gap(torch.zeros(4, dtype=torch.float64), _bits("1111")).item() == 0


@pytest.mark.parametrize(
    ("call", "error", "key"),
    [
        (lambda: helpfulness_order(0), SettingError, "num_actions"),
        (lambda: win_rate(torch.ones(2, 2)), SettingError, "beats"),
        (lambda: win_rate(torch.ones(2, 3)), SettingError, "beats"),
        (lambda: win_rate(helpfulness_order(2), weights=torch.tensor([1.0, 0.0])), SettingError, "weights"),
        (lambda: e_safe(torch.tensor([0.5, 1.5])), LabelError, "is_safe"),
        (lambda: e_safe(torch.tensor(1.0)), LabelError, "is_safe"),
        (
            lambda: pair_targets(helpfulness_order(3), torch.ones(2)),
            LabelError,
            "is_safe",
        ),
        (lambda: implied_reward(torch.ones(2, 2)), SettingError, "antisymmetric"),
        (lambda: rlhf_optimum(torch.zeros(2), beta=0.0), SettingError, "beta"),
        (lambda: rlhf_optimum(torch.zeros(2), beta=1.0, reference=torch.ones(2)), SettingError, "reference"),
        (lambda: alpha_window(1.5), SettingError, "share_safe"),
        (lambda: wanted_order(torch.tensor([0.5, 1.0])), LabelError, "is_safe"),
        (
            lambda: bilinear_reward(helpfulness_order(2), torch.ones(2), safety_weight=1.0),
            SettingError,
            "safety_weight",
        ),
    ],
)
def test_bad_values_are_named(call, error, key):
    with raises(error, key):
        call()
