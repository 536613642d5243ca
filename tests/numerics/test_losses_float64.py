"""Every loss and its gradient against plain float64 Python, written from the formulas and sharing no code with ours."""

from __future__ import annotations

import math
import random

import pytest
import torch

from bfpo.objective.losses import anchor, preference_loss
from bfpo.objective.methods import get_method
from losses import PLAIN

BETAS = (0.01, 0.1, 1.0)


def _log1p_exp(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _bfpo(h, c, r, beta):
    target = 0.5 * (3 * c - r) - 0.5
    return (h - target / beta) ** 2, 2 * (h - target / beta)


def _ipo(h, c, r, beta):
    return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))


def _dpo_h(h, c, r, beta):
    return _log1p_exp(-beta * h), -beta * _sigmoid(-beta * h)


def _dpo_s(h, c, r, beta):
    if (c > 0.5) == (r > 0.5):
        return 0.0, 0.0
    if c > 0.5:
        return _dpo_h(h, c, r, beta)
    return _log1p_exp(beta * h), beta * _sigmoid(beta * h)


def _dpo_mix(h, c, r, beta):
    items = _dpo_h(h, c, r, beta), _dpo_s(h, c, r, beta)
    return items[0][0] + items[1][0], items[0][1] + items[1][1]


def _dpo_safe_first(h, c, r, beta):
    if r > 0.5 and not c > 0.5:
        return _log1p_exp(beta * h), beta * _sigmoid(beta * h)
    return _dpo_h(h, c, r, beta)


def _relabelled(h, c, r):
    """Return the winner's margin, its slope by h, and u_loser - u_winner; None where both are unsafe."""
    u_c, u_r = int(not c > 0.5), int(not r > 0.5)
    if u_c and u_r:
        return None
    if u_c:
        return -h, -1, u_c - u_r
    return h, 1, u_r - u_c


def _offset_logistic(h, c, r, beta, offset):
    pair = _relabelled(h, c, r)
    if pair is None:
        return 0.0, 0.0
    margin, slope, more_unsafe = pair
    x = beta * margin - more_unsafe * offset
    return _log1p_exp(-x), -_sigmoid(-x) * beta * slope


def _safedpo(h, c, r, beta):
    return _offset_logistic(h, c, r, beta, 10.0)


def _bso(h, c, r, beta):
    return _offset_logistic(h, c, r, beta, 30.0)


def _bso_sba(h, c, r, beta, lam=0.2, scale=4.0):
    pair = _relabelled(h, c, r)
    if pair is None:
        return 0.0, 0.0
    margin, slope, more_unsafe = pair
    log_ratio = -(beta * margin - 30.0 * more_unsafe)
    inside = abs(log_ratio) < 30
    ratio = math.exp(min(max(log_ratio, -30.0), 30.0))
    value = (lam * ratio ** (1 + lam) - (1 + lam) * ratio**-lam + 1) / (scale * lam * (lam + 1))
    by_log_ratio = (ratio ** (1 + lam) + ratio**-lam) / scale
    return value, (-beta * slope * by_log_ratio if inside else 0.0)


def _bso_phi(h, c, r, beta, mu=1.5):
    pair = _relabelled(h, c, r)
    if pair is None:
        return 0.0, 0.0
    margin, slope, more_unsafe = pair
    log_ratio = -(beta * margin - 30.0 * more_unsafe)
    inside = abs(log_ratio) < 30
    ratio = math.exp(min(max(log_ratio, -30.0), 30.0))
    value = ((1 - mu) * ratio ** (2 - mu) - (2 - mu) * ratio ** (mu - 1) + 1) / ((1 - mu) * (2 - mu))
    return value, (-beta * slope * (ratio ** (2 - mu) + ratio ** (mu - 1)) if inside else 0.0)


def _linear_sum(h, c, r, beta, share=0.5):
    target = (1 - share) * 0.5 + share * 0.5 * (c - r)
    return (h - target / beta) ** 2, 2 * (h - target / beta)


def _modpo(h, c, r, beta, share=0.5, other=0.0):
    x = (beta * h - share * beta * other) / (1 - share)
    return _log1p_exp(-x), -beta / (1 - share) * _sigmoid(-x)


def _robust_dpo(h, c, r, beta, noise=0.1):
    value, slope = _dpo_h(h, c, r, beta)
    flipped, flipped_slope = _log1p_exp(beta * h), beta * _sigmoid(beta * h)
    scale = 1 / (1 - 2 * noise)
    return scale * ((1 - noise) * value - noise * flipped), scale * ((1 - noise) * slope - noise * flipped_slope)


ORACLES = {
    "bfpo": _bfpo, "ipo": _ipo, "dpo_h": _dpo_h, "dpo_s": _dpo_s, "dpo_mix": _dpo_mix,
    "dpo_safe_first": _dpo_safe_first, "safedpo": _safedpo, "bso": _bso, "bso_sba": _bso_sba,
    "bso_phi": _bso_phi,
    "linear_sum": _linear_sum, "modpo": _modpo, "robust_dpo": _robust_dpo,
}  # fmt: skip


def _one_sided(h, c, r, beta):
    target = 0.5 * (3 * c - r) - 0.5
    sign = (target > 0) - (target < 0)
    missing = max(0.0, abs(target) / beta - sign * h)
    return missing**2, -2 * sign * missing


def _logistic_link(h, c, r, beta):
    target = 0.5 * (3 * c - r) - 0.5
    sign = (target > 0) - (target < 0)
    weight, x = abs(target), beta * sign * h
    return weight * _log1p_exp(-x), -weight * beta * sign * _sigmoid(-x)


LINKS = {"squared": _bfpo, "one_sided": _one_sided, "logistic": _logistic_link}


def _pairs(beta: float, num_pairs: int = 60, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Margins from a few tenths of a nat to far beyond every target and clamp; labels as bits and as probabilities."""
    generator = random.Random(seed)
    margins = [generator.gauss(0, generator.choice((0.3, 3, 45))) / beta for _ in range(num_pairs)]
    labels = [[generator.choice((0.0, 1.0, generator.random())) for _ in range(num_pairs)] for _ in range(2)]
    return margins, labels[0], labels[1]


def test_every_method_has_an_oracle():
    assert list(ORACLES) == PLAIN


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("method", PLAIN)
def test_value_and_gradient_are_those_of_the_formula(method, beta):
    margins, chosen, rejected = _pairs(beta)
    margin = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    loss = preference_loss(margin, *labels, method=method, beta=beta).loss
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    expected = [ORACLES[method](*pair, beta) for pair in zip(margins, chosen, rejected, strict=True)]
    assert loss.tolist() == pytest.approx([value for value, _ in expected], rel=1e-11, abs=1e-13)
    assert gradient.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("link", LINKS)
def test_value_and_gradient_of_each_link_of_bfpo(link, beta):
    """Among the pairs are the extremes, a margin on the target, and a target of 0 from labels of 1/2 and 1/2."""
    margins, chosen, rejected = _pairs(beta, num_pairs=300, seed=3)
    margins += [1e4, -1e4, 1 / beta, 0.5 / beta, 2.0, -2.0, 0.0]
    chosen += [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    rejected += [0.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5]
    margin = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    found = preference_loss(margin, *labels, beta=beta, link=link)
    (gradient,) = torch.autograd.grad(found.loss.sum(), margin)
    expected = [LINKS[link](*pair, beta) for pair in zip(margins, chosen, rejected, strict=True)]
    assert found.loss.tolist() == pytest.approx([value for value, _ in expected], rel=1e-11, abs=1e-13)
    assert gradient.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-11, abs=1e-13)
    if link != "logistic":  # what training logs as the pull of a pair
        assert (2 * found.loss.detach().sqrt()).tolist() == pytest.approx(gradient.abs().tolist(), rel=1e-12)
    assert torch.equal(found.favoured, preference_loss(margin, *labels, beta=beta).favoured)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-2)):
        coarse = preference_loss(margin.detach().to(dtype), *labels, beta=beta, link=link).loss
        assert coarse.dtype == torch.float32
        kept = margin.detach().to(dtype).double()
        values = [LINKS[link](*pair, beta)[0] for pair in zip(kept.tolist(), chosen, rejected, strict=True)]
        fits = torch.tensor(values).isfinite()  # margins beyond 65504 do not fit float16
        torch.testing.assert_close(coarse[fits], torch.tensor(values)[fits], rtol=tolerance, atol=1e-3)
    for h, c, r, (_, slope_of_formula) in zip(margins[:300], chosen, rejected, expected, strict=False):
        low, high = (LINKS[link](h + side * 1e-4, c, r, beta)[0] for side in (-1, 1))
        assert slope_of_formula == pytest.approx((high - low) / 2e-4, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("method", ["linear_sum", "modpo"])
def test_the_share_of_safety_and_the_margin_of_another_model(method, share):
    """The margin reward of the formula is beta times the other model's log-ratio margin."""
    margins, chosen, rejected = _pairs(0.1, seed=7)
    others = _pairs(0.1, seed=8)[0] if method == "modpo" else [0.0] * len(margins)
    margin = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    extra = {"other_margin": torch.tensor(others, dtype=torch.float64)} if method == "modpo" else {}
    loss = preference_loss(margin, *labels, method=method, beta=0.1, safety_share=share, **extra).loss
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    rows = zip(margins, chosen, rejected, others, strict=True)
    expected = [
        _modpo(h, c, r, 0.1, share, other) if method == "modpo" else _linear_sum(h, c, r, 0.1, share)
        for h, c, r, other in rows
    ]
    assert loss.tolist() == pytest.approx([value for value, _ in expected], rel=1e-11, abs=1e-13)
    assert gradient.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3, 0.49])
def test_robust_dpo_is_dpo_of_the_true_order_on_average_over_flips(noise):
    """A flipped pair enters with its margin reversed; labels are not read."""
    margins, chosen, rejected = _pairs(0.1, seed=9)
    margin = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    kept, flipped = (
        preference_loss(sign * margin, *labels, method="robust_dpo", beta=0.1, label_noise=noise).loss
        for sign in (1, -1)
    )
    mean = (1 - noise) * kept + noise * flipped
    clean = preference_loss(margin, *labels, method="dpo_h", beta=0.1).loss
    # Up to 1 / (1 - 2 noise) = 50 times the rounding of losses of about 100.
    torch.testing.assert_close(mean, clean, rtol=1e-12, atol=1e-11)
    (gradient,) = torch.autograd.grad(mean.sum(), margin, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(clean.sum(), margin)[0], rtol=1e-11, atol=1e-13)
    expected = [_robust_dpo(h, c, r, 0.1, noise)[0] for h, c, r in zip(margins, chosen, rejected, strict=True)]
    assert kept.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    if noise == 0:
        assert torch.equal(kept, clean)


@pytest.mark.parametrize("method", PLAIN)
def test_the_oracles_slope_is_its_finite_difference(method):
    """The gradient formulas above are themselves checked, by central differences of the value formulas."""
    beta, step = 0.5, 1e-4
    for h, c, r in zip(*_pairs(beta, seed=1), strict=True):
        if method in ("bso_sba", "bso_phi") and (abs(beta * h) > 25 or (c > 0.5) != (r > 0.5)):
            continue  # at R near e^30 a difference of two values of 1e14 has no digits left
        low, high = (ORACLES[method](h + side * step, c, r, beta)[0] for side in (-1, 1))
        assert ORACLES[method](h, c, r, beta)[1] == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", PLAIN)
def test_gradcheck(method):
    margin = torch.tensor([-2.0, -0.5, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([1.0, 0.0, 1.0, 0.0] * 2, dtype=torch.float64)
    rejected = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2, dtype=torch.float64)

    # A shift well inside the clamp, where the function is smooth.
    settings = {"beta": 0.8} | ({"bso_shift": 3.0} if "bso_shift" in get_method(method).settings() else {})

    def loss(values):
        return preference_loss(values, chosen, rejected, method=method, **settings).loss

    assert torch.autograd.gradcheck(loss, (margin,))
    assert torch.autograd.gradgradcheck(loss, (margin,))


def test_anchor_value_and_gradient():
    generator = random.Random(2)
    rows = [
        (
            generator.choice((-1, 0, 1)),
            generator.uniform(0, 9),
            generator.uniform(0, 9),
            generator.choice((0.0, 1.0, generator.random())),
            generator.choice((0.0, 1.0, generator.random())),
        )
        for _ in range(80)
    ]
    favoured, nll_c, nll_r, safe_c, safe_r = (list(column) for column in zip(*rows, strict=True))
    nlls = [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in (nll_c, nll_r)]
    value = anchor(
        torch.tensor(favoured, dtype=torch.int8),
        *nlls,
        torch.tensor(safe_c, dtype=torch.float64),
        torch.tensor(safe_r, dtype=torch.float64),
    )
    gradients = torch.autograd.grad(value.sum(), nlls)
    for pair, (sign, chosen_nll, rejected_nll, p_c, p_r) in enumerate(rows):
        weight_c = p_c if sign == 1 and p_c > 0.5 else 0.0
        weight_r = p_r if sign == -1 and p_r > 0.5 else 0.0
        assert value[pair].item() == pytest.approx(weight_c * chosen_nll + weight_r * rejected_nll, rel=1e-14)
        assert gradients[0][pair].item() == weight_c
        assert gradients[1][pair].item() == weight_r


@pytest.mark.parametrize("method", PLAIN)
def test_float32_agrees_with_float64_to_its_precision(method):
    margins, chosen, rejected = _pairs(0.1, seed=4)
    labels = torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    fine = preference_loss(torch.tensor(margins, dtype=torch.float64), *labels, method=method, beta=0.1).loss
    coarse = preference_loss(torch.tensor(margins, dtype=torch.float32), *labels, method=method, beta=0.1).loss
    # Relative error of exp(x) is that of x times x: 36 x 6e-8 at the clamp; h - target/beta may cancel.
    torch.testing.assert_close(coarse.double(), fine, rtol=2e-5, atol=1e-3)
