"""What must hold for every setting and every label, searched by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo.objective.losses import bfpo_target, loss_at_start, preference_loss
from bfpo.objective.methods import METHODS
from losses import PLAIN

short = settings(max_examples=60, deadline=None, derandomize=True)

safety_weights = st.floats(1.001, 1e3)
alphas = st.floats(-2, 2)
betas = st.floats(1e-3, 10)
probabilities = st.floats(0, 1)
margins = st.floats(-200, 200)


def _target(chosen: float, rejected: float, **kwargs: float) -> float:
    labels = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)
    return bfpo_target(*labels, **kwargs).item()


@short
@given(safety_weights, alphas)
def test_the_four_targets_keep_their_order(safety_weight, alpha):
    kwargs = {"safety_weight": safety_weight, "alpha": alpha}
    strongest, both_safe = _target(1, 0, **kwargs), _target(1, 1, **kwargs)
    both_unsafe, reverse = _target(0, 0, **kwargs), _target(0, 1, **kwargs)
    assert strongest > both_safe > both_unsafe > reverse
    assert both_safe - both_unsafe == pytest.approx(1, abs=1e-9)
    # What one completion's safety is worth does not depend on the other's.
    assert strongest - both_safe == pytest.approx(both_unsafe - reverse, abs=1e-9)


@short
@given(safety_weights, st.lists(margins, min_size=1, max_size=8), betas)
def test_on_all_safe_data_bfpo_is_ipo(safety_weight, values, beta):
    margin = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    safe = torch.ones(len(values), dtype=torch.float64)
    ours = preference_loss(margin, safe, safe, beta=beta, alpha=0.5, safety_weight=safety_weight).loss
    ipo = preference_loss(margin, safe, safe, method="ipo", beta=beta).loss
    plain = [(value - 1 / (2 * beta)) ** 2 for value in values]
    assert ours.tolist() == pytest.approx(plain, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(ours, ipo, rtol=1e-6, atol=1e-6)


@short
@given(safety_weights, probabilities, probabilities)
def test_at_alpha_one_half_mixed_cells_are_antisymmetric(safety_weight, first, second):
    forward = _target(first, 1 - first, alpha=0.5, safety_weight=safety_weight)
    backward = _target(1 - first, first, alpha=0.5, safety_weight=safety_weight)
    assert forward == pytest.approx(-backward, rel=1e-9, abs=1e-9)
    # Turning both bits round turns the target round, mixed or not.
    pair = _target(first, second, alpha=0.5, safety_weight=safety_weight)
    turned = _target(1 - first, 1 - second, alpha=0.5, safety_weight=safety_weight)
    assert pair == pytest.approx(-turned, rel=1e-9, abs=1e-9)


@short
@given(safety_weights, alphas.filter(lambda alpha: abs(alpha - 0.5) > 1e-3))
def test_at_any_other_alpha_they_are_not(safety_weight, alpha):
    kwargs = {"alpha": alpha, "safety_weight": safety_weight}
    assert abs(_target(1, 0, **kwargs) + _target(0, 1, **kwargs)) > 1e-3


@short
@given(safety_weights, alphas, probabilities, probabilities)
def test_probabilities_interpolate_bits(safety_weight, alpha, chosen, rejected):
    """A probability's target is the expectation over the two bits drawn independently."""
    kwargs = {"alpha": alpha, "safety_weight": safety_weight}
    expected = sum(
        (chosen if c else 1 - chosen) * (rejected if r else 1 - rejected) * _target(c, r, **kwargs)
        for c in (0, 1)
        for r in (0, 1)
    )
    assert _target(chosen, rejected, **kwargs) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@short
@given(safety_weights, alphas, betas, st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=20))
def test_step_0_is_the_mean_squared_target_over_beta_squared(safety_weight, alpha, beta, labels):
    chosen, rejected = (torch.tensor(column, dtype=torch.float64) for column in zip(*labels, strict=True))
    plain = [((safety_weight * c - r) / (safety_weight - 1) - alpha) ** 2 / beta**2 for c, r in labels]
    loss = loss_at_start(chosen, rejected, beta=beta, alpha=alpha, safety_weight=safety_weight)
    assert loss.mean().item() == pytest.approx(sum(plain) / len(plain), rel=1e-9, abs=1e-12)


@short
@given(st.sampled_from(sorted(PLAIN)), margins, probabilities, probabilities, betas)
def test_what_is_reported_of_a_pair_is_consistent(method, value, chosen, rejected, beta):
    margin = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)
    result = preference_loss(margin, *labels, method=method, beta=beta)
    (gradient,) = torch.autograd.grad(result.loss.sum(), margin)
    assert bool(result.loss.isfinite().all())
    if result.dropped.item():
        assert result.loss.item() == gradient.item() == 0
        assert result.favoured.item() == 0
    if result.favoured.item() and not METHODS[method]().squared and method != "bso_sba":
        # A loss without a target always pushes the favoured completion up, however far it is.
        assert gradient.item() * result.favoured.item() <= 0
    if METHODS[method]().squared:
        gap = result.target.item() / beta - value
        assert gradient.item() == pytest.approx(-2 * gap, rel=1e-9, abs=1e-9)
        assert result.favoured.item() == (result.target.item() > 0) - (result.target.item() < 0)
    assert result.swapped.item() == (result.favoured.item() < 0)
