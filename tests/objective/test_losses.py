"""Step 0, precision, pairs that must not count, and the anchor."""

from __future__ import annotations

import pytest
import torch

from bfpo.core.errors import LabelError, SettingError
from bfpo.objective.losses import add_anchor, anchor, loss_at_start, preference_loss
from bfpo.objective.methods import METHODS
from losses import loss_of
from messages import raises

CHOSEN = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.3])
def test_step_0_shows_the_mean_squared_target_over_beta_squared(beta, alpha):
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    targets = [1.5 * c - 0.5 * r - alpha for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    expected = sum(target**2 for target in targets) / len(targets) / beta**2
    loss = loss_at_start(chosen, rejected, beta=beta, alpha=alpha)
    assert loss.shape == (50,)
    assert loss.dtype == torch.float64
    assert loss.mean().item() == pytest.approx(expected, rel=1e-14)


def test_the_published_settings_start_between_2500_and_10000_a_pair():
    assert loss_at_start(CHOSEN, REJECTED, beta=0.01).tolist() == pytest.approx([2500, 10000, 10000, 2500], rel=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_at_a_small_and_a_large_beta_stay_finite(method, size, dtype):
    for beta in (1e-3, 1.0):
        margin = torch.full((4,), size, dtype=dtype, requires_grad=True)
        loss = loss_of(margin, CHOSEN, REJECTED, method=method, beta=beta).loss
        (gradient,) = torch.autograd.grad(loss.mean(), margin)
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert loss.dtype == dtype


def test_sba_is_flat_beyond_its_clamp_and_bounded_there():
    # beta h = -40, -30, 0, 30, 40 on a both-safe pair: log R is its negative.
    margin = torch.tensor([-40.0, -30.0, 0.0, 30.0, 40.0], dtype=torch.float64, requires_grad=True)
    safe = torch.ones(5, dtype=torch.float64)
    loss = preference_loss(margin, safe, safe, method="bso_sba", beta=1.0).loss
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert loss[0] == loss[1] == loss.max()
    assert loss[3] == loss[4] == loss.min()
    assert loss[4].item() == pytest.approx(-503.244, abs=1e-3)
    assert loss[0].item() == pytest.approx(8.98e14, rel=1e-3)
    assert gradient[0] == gradient[4] == 0
    assert gradient[2].item() == pytest.approx(-0.5)
    assert bool((gradient[1:4] < 0).all())


def test_sba_mixed_pairs_start_on_the_edge_and_still_get_a_gradient():
    margin = torch.tensor([0.0, 0.0, -0.1, 0.1], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    loss = preference_loss(margin, chosen, 1 - chosen, method="bso_sba", beta=1.0).loss
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient[0] < 0 < gradient[1]
    # Once the safe winner has fallen below its start, the pair is beyond the clamp and out of reach.
    assert gradient[2:].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    margin = torch.tensor([0.5, -0.5, 1.0, 2.0], dtype=dtype, requires_grad=True)
    loss = preference_loss(margin, CHOSEN, REJECTED, beta=0.01).loss
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([(0.5 - 50) ** 2, (-0.5 - 100) ** 2, (1 + 100) ** 2, (2 + 50) ** 2])


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name in ("dpo_s", "safedpo", "bso", "bso_sba", "bso_phi")]
)
def test_a_dropped_pair_has_neither_loss_nor_gradient_even_if_its_margin_is_not_finite(method):
    margin = torch.tensor([0.3, 0.3, 0.3, float("nan")], dtype=torch.float64, requires_grad=True)
    result = preference_loss(margin, CHOSEN, REJECTED, method=method, beta=0.1)
    (gradient,) = torch.autograd.grad(result.loss.mean(), margin)
    assert result.dropped[3]
    assert result.loss[3] == gradient[3] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_mean_over_all_pairs_is_the_mean_of_the_means_of_equal_parts(method):
    margin = torch.linspace(-1, 1, 8, dtype=torch.float64)
    chosen, rejected = CHOSEN.repeat(2), REJECTED.repeat(2)
    whole = loss_of(margin, chosen, rejected, method=method, beta=0.1).loss.mean()
    parts = [
        loss_of(margin[part], chosen[part], rejected[part], method=method, beta=0.1).loss.mean()
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-14)


def test_the_anchor_imitates_the_favoured_completion_only_where_it_is_safe():
    nll_chosen = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    nll_rejected = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64, requires_grad=True)
    favoured = preference_loss(torch.zeros(4, dtype=torch.float64), CHOSEN, REJECTED, beta=0.1).favoured
    value = anchor(favoured, nll_chosen, nll_rejected, CHOSEN, REJECTED)
    # both safe: the chosen; chosen unsafe, rejected safe: the rejected; both unsafe: never.
    assert value.tolist() == [1.0, 2.0, 7.0, 0.0]
    gradients = torch.autograd.grad(value.sum(), (nll_chosen, nll_rejected))
    assert [gradient.tolist() for gradient in gradients] == [[1, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_ever_imitates_an_unsafe_completion(method):
    favoured = loss_of(torch.zeros(4, dtype=torch.float64), CHOSEN, REJECTED, method=method, beta=0.1).favoured
    nll_chosen, nll_rejected = torch.full((2, 4), 1.0, dtype=torch.float64)
    value = anchor(favoured, nll_chosen * 2, nll_rejected * 3, CHOSEN, REJECTED)
    allowed = []
    for sign, safe_c, safe_r in zip(favoured.tolist(), CHOSEN.tolist(), REJECTED.tolist(), strict=True):
        allowed.append(2.0 if sign > 0 and safe_c else 3.0 if sign < 0 and safe_r else 0.0)
    assert value.tolist() == allowed
    assert value[3] == 0


def test_the_anchor_weighs_by_the_probability_of_being_safe():
    favoured = torch.tensor([1, 1, -1], dtype=torch.int8)
    nll = torch.full((3,), 2.0, dtype=torch.float64)
    is_safe = torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)
    assert anchor(favoured, nll, nll, is_safe, 1 - is_safe).tolist() == [1.5, 0.0, 1.5]


def test_an_nll_that_is_not_used_gives_no_gradient_even_if_it_is_not_finite():
    nll = torch.tensor([1.0, float("inf")], dtype=torch.float64, requires_grad=True)
    is_safe = torch.tensor([1.0, 0.0], dtype=torch.float64)
    value = anchor(torch.tensor([1, 1]), nll, torch.zeros(2, dtype=torch.float64), is_safe, is_safe)
    (gradient,) = torch.autograd.grad(value.sum(), nll)
    assert value.tolist() == [1, 0]
    assert gradient.tolist() == [1, 0]


@pytest.mark.parametrize("method", METHODS)
def test_an_anchor_weight_means_the_same_at_every_beta(method):
    """Total x normaliser, as a function of beta x margin, must not depend on beta."""
    scaled = torch.tensor([-0.8, 0.1, 0.5, 2.0], dtype=torch.float64)
    term = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    totals = []
    for beta in (0.01, 0.1, 1.0):
        loss = loss_of(scaled / beta, CHOSEN, REJECTED, method=method, beta=beta).loss
        total = add_anchor(loss, term, anchor_weight=0.3, method=method, beta=beta)
        totals.append(total * METHODS[method](beta=beta).normaliser)
        torch.testing.assert_close(totals[-1], loss * METHODS[method](beta=beta).normaliser + 0.3 * term)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(totals[1], totals[2], rtol=1e-12, atol=1e-12)


def test_without_weight_the_anchor_changes_nothing():
    loss = loss_at_start(CHOSEN, REJECTED, beta=0.1)
    assert torch.equal(add_anchor(loss, torch.ones(4), anchor_weight=0.0, beta=0.1), loss)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), "1"])
def test_a_bad_anchor_weight_is_refused(weight):
    with raises(SettingError, "anchor_weight", repr(weight)):
        add_anchor(torch.zeros(1), torch.zeros(1), anchor_weight=weight, beta=0.1)


def test_anchor_inputs_that_do_not_fit_are_refused():
    nll = torch.zeros(4, dtype=torch.float64)
    with raises(SettingError, "mean_nll_rejected"):
        anchor(torch.ones(4), nll, nll[:3], CHOSEN, REJECTED)
    with raises(LabelError, "NaN"):
        anchor(torch.ones(4), nll, nll, CHOSEN, torch.full((4,), float("nan")))
