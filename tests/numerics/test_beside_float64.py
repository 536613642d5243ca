"""Methods that read more than the margin, value and gradient, against plain Python written from their formulas."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from bfpo.core.errors import SettingError
from bfpo.objective.losses import preference_loss, pull_at_start
from bfpo.objective.methods import METHODS, Beside, make_method
from losses import PLAIN, loss_of
from messages import raises

BETA = 0.3
NAMES = [name for name in METHODS if name not in PLAIN]
SETTINGS: dict[str, list[dict[str, float]]] = {
    "hypo": [{}],
    "b_dpo": [{}, {"b_dpo_scale": 2.5}],
    "cat_dpo": [{}],
    "kto": [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.4}],
    "kldo": [{}],
}
CASES = [(name, settings) for name in NAMES for settings in SETTINGS[name]]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def _sign(c: float, r: float) -> int:
    return -1 if r > 0.5 and not c > 0.5 else 1


def _logistic(x: float, by_x: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """Return -log sigmoid(x) and its slopes by both drifts, given those of x."""
    slope = -_sigmoid(-x)
    return _softplus(-x), (slope * by_x[0], slope * by_x[1])


def _expected(method: str, row: dict[str, Any], weights: dict[str, float]) -> tuple[float, tuple[float, float]]:
    """Return the loss of a pair and its slope by the log-ratios of its chosen and its rejected answer."""
    dc, dr, c, r = row["drift"][0], row["drift"][1], row["c"], row["r"]
    s = _sign(c, r)
    if method == "hypo":  # -log sigmoid(beta (D_policy - max(D_ref, 0))), D of the winner over the loser
        reference = s * (row["reference"][0] - row["reference"][1])
        policy = reference + s * (dc - dr)
        return _logistic(BETA * (policy - max(reference, 0.0)), (BETA * s, -BETA * s))
    if method == "b_dpo":
        scale = weights.get("b_dpo_scale", 1.0)
        winner, loser = (0, 1) if s > 0 else (1, 0)
        e = [math.exp(row["information"][side]) for side in (winner, loser)]
        w = [2 * e[1] / (e[0] + e[1]), 2 * e[0] / (e[0] + e[1])]
        x = BETA * scale * (w[0] * row["drift"][winner] - w[1] * row["drift"][loser])
        slopes = {winner: BETA * scale * w[0], loser: -BETA * scale * w[1]}
        return _logistic(x, (slopes[0], slopes[1]))
    if method == "cat_dpo":
        mixed = (c > 0.5) != (r > 0.5)
        return _logistic(BETA * s * (dc - dr) - (row["state"] if mixed else 0.0), (BETA * s, -BETA * s))
    good = (c > 0.5, r > 0.5 and not c > 0.5)
    value, slopes = 0.0, [0.0, 0.0]
    for side in (0, 1):
        if not row["present"][side]:
            continue
        d = row["drift"][side]
        if method == "kto":
            weight = weights.get("desirable_weight" if good[side] else "undesirable_weight", 1.0)
            up = 1 if good[side] else -1
            x = _sigmoid(up * BETA * (d - row["state"]))
            value += weight * (1 - x)
            slopes[side] = -weight * up * BETA * x * (1 - x)
        elif good[side]:
            value -= row["balance"][0] * BETA * d
            slopes[side] = -row["balance"][0] * BETA
        else:
            b = row["state"]
            value += row["balance"][1] * (math.exp(BETA * d - b) + b - 1)
            slopes[side] = row["balance"][1] * BETA * math.exp(BETA * d - b)
    return value, (slopes[0], slopes[1])


def _rows(num: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "drift": [rng.gauss(0, rng.choice((0.3, 3, 20))), rng.gauss(0, rng.choice((0.3, 3, 20)))],
            "reference": [-rng.uniform(0, 90), -rng.uniform(0, 90)],
            "information": [rng.gauss(0.4, 2), rng.gauss(0.2, 2)],
            "mean_logps": [-rng.uniform(0, 3), -rng.uniform(0, 3)],
            "present": [True, rng.random() < 0.7],
            "balance": [rng.uniform(0.5, 2), rng.uniform(0.5, 2)],
            "group": rng.randrange(3),
            "c": rng.choice((0.0, 1.0, rng.random())),
            "r": rng.choice((0.0, 1.0, rng.random())),
        }
        for _ in range(num)
    ]


STATE = [0.7, 0.0, 1.9]


def _tensors(rows: list[dict[str, Any]], dtype: torch.dtype = torch.float64) -> tuple[Beside, torch.Tensor, Any]:
    """Return the rows as `Beside`, its drift as a leaf, and the labels."""

    def both(name: str, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.tensor([row[name] for row in rows], dtype=kind).reshape(-1, 2).T.contiguous()

    drift = both("drift").requires_grad_()
    labels = [torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("c", "r")]
    group = torch.tensor([row["group"] for row in rows], dtype=torch.int64)
    beside = Beside(
        drift=drift,
        present=both("present", torch.bool),
        group=group,
        state=torch.tensor(STATE, dtype=dtype),
        **{name: both(name) for name in ("reference", "information", "mean_logps", "balance")},
    )
    for row in rows:
        row["state"] = STATE[row["group"]]
    return beside, drift, labels


@pytest.mark.parametrize("num", [0, 1, 7, 60])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_gradient_are_those_of_the_formula(name, settings, num):
    rows = _rows(num, seed=num)
    beside, drift, labels = _tensors(rows)
    found = preference_loss(drift[0] - drift[1], *labels, method=name, beta=BETA, beside=beside, **settings)
    (gradient,) = torch.autograd.grad(found.loss.sum(), drift)
    expected = [_expected(name, row, settings) for row in rows]
    assert found.loss.tolist() == pytest.approx([value for value, _ in expected], rel=1e-11, abs=1e-13)
    for side in (0, 1):
        assert gradient[side].tolist() == pytest.approx([slope[side] for _, slope in expected], rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_oracles_slope_is_its_finite_difference(name, settings):
    for row in _rows(40, seed=3):
        row["state"] = STATE[row["group"]]
        slopes = _expected(name, row, settings)[1]
        for side in (0, 1):
            if BETA * row["drift"][side] > 12:
                continue  # e^12: a difference of two values has few digits left
            values = []
            for step in (-1e-5, 1e-5):
                drift = list(row["drift"])
                drift[side] += step
                values.append(_expected(name, {**row, "drift": drift}, settings)[0])
            assert slopes[side] == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_stay_finite_in_float32_too(name):
    for dtype in (torch.float32, torch.float64):
        rows = _rows(12, seed=5)
        for place, row in enumerate(rows):
            row["drift"] = [1e4 * (-1) ** place, -1e4 * (-1) ** (place // 2)]
            row["information"] = [300.0, -300.0]
            row["reference"] = [-1e5, -1.0]
        beside, drift, labels = _tensors(rows, dtype)
        loss = preference_loss(drift[0] - drift[1], *labels, method=name, beta=1.0, beside=beside).loss
        (gradient,) = torch.autograd.grad(loss.mean(), drift)
        assert loss.dtype == dtype
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64_to_its_precision(name):
    fine, coarse = (_tensors(_rows(60, seed=9), dtype) for dtype in (torch.float64, torch.float32))
    losses = [
        preference_loss(drift[0] - drift[1], *labels, method=name, beta=BETA, beside=beside).loss
        for beside, drift, labels in (fine, coarse)
    ]
    torch.testing.assert_close(losses[1].double(), losses[0], rtol=1e-4, atol=1e-3)


def test_the_exponential_of_kldo_goes_on_as_its_tangent():
    drift = torch.tensor([[29.0, 30.0, 31.0, 500.0], [0.0] * 4], dtype=torch.float64, requires_grad=True)
    labels = [torch.zeros(4, dtype=torch.float64)] * 2
    beside = Beside.at_rest(drift[0]).at(drift)
    loss = preference_loss(drift[0] - drift[1], *labels, method="kldo", beta=1.0, beside=beside).loss
    (gradient,) = torch.autograd.grad(loss.sum(), drift)
    expected = [math.exp(29) - 1, math.exp(30) - 1, 2 * math.exp(30) - 1, 471 * math.exp(30) - 1]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert gradient[0, 2:].tolist() == pytest.approx([math.exp(30)] * 2, rel=1e-12)


def test_kldo_bounds_the_donsker_varadhan_loss_and_meets_it_at_its_own_denominator():
    rows = _rows(50, seed=4)
    for row in rows:
        row |= {"present": [True, True], "group": 0, "drift": [row["drift"][0] / 4, row["drift"][1] / 4]}
    beside, drift, labels = _tensors(rows)
    good = torch.stack([labels[0] > 0.5, (labels[1] > 0.5) & ~(labels[0] > 0.5)])
    ratio = BETA * drift.detach()
    num_good, num_bad = int(good.sum()), int((~good).sum())
    exact = -float(ratio[good].mean()) + math.log(float(ratio[~good].exp().mean()))
    balance = torch.tensor([[50 / num_good] * 50, [50 / num_bad] * 50], dtype=torch.float64)

    def loss(b: float, more: float = 0.0) -> float:
        state = torch.tensor([b, 0, 0], dtype=torch.float64)
        held = replace(beside, balance=balance, state=state, drift=drift.detach() + more)
        return float(preference_loss(drift[0].detach(), *labels, method="kldo", beta=BETA, beside=held).loss.mean())

    own = math.log(float(ratio[~good].exp().mean()))
    assert loss(own) == pytest.approx(exact, rel=1e-12)
    assert min(loss(b) for b in (0.0, 1.0, -2.0)) > exact
    # The same constant on every log-ratio changes nothing at the denominator that goes with it.
    assert loss(own + 3, more=3 / BETA) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("cuts", [[0, 23], [0, 1, 9, 23]])
@pytest.mark.parametrize("name", ["cat_dpo", "kto", "kldo"])
def test_the_next_state_is_that_of_plain_loops_however_a_step_is_cut(name, cuts):
    rows = _rows(23, seed=8)
    for row in rows:
        row["group"] %= 2  # nothing of group 2 is in this step
    beside, _, _ = _tensors(rows)
    method = make_method(name, beta=BETA)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        part, _, labels = _tensors(rows[start:stop])
        sums += method.observe(*labels, part)
    found = method.next_state(beside.state, sums).tolist()
    for group, state in enumerate(STATE):
        mine = [row for row in rows if row["group"] == group]
        if name == "cat_dpo":
            mixed = [row for row in mine if (row["c"] > 0.5) != (row["r"] > 0.5)]
            wrong = sum((row["mean_logps"][0] - row["mean_logps"][1]) * _sign(row["c"], row["r"]) <= 0 for row in mixed)
            expected = min(10.0, max(0.0, state + 0.1 * (wrong / len(mixed) - 0.05))) if mixed else state
        elif name == "kto":
            drifts = [d for row in mine for d, there in zip(row["drift"], row["present"], strict=True) if there]
            expected = max(0.0, sum(drifts) / len(drifts)) if drifts else 0.0
        else:
            bad = []
            for row in mine:
                good = (row["c"] > 0.5, row["r"] > 0.5 and not row["c"] > 0.5)
                bad += [row["drift"][k] for k in (0, 1) if row["present"][k] and not good[k]]
            mean = sum(math.exp(BETA * d) for d in bad) / len(bad) if bad else math.nan
            expected = math.log(0.9 * math.exp(state) + 0.1 * mean) if bad else state
        assert found[group] == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_cat_dpo_tightens_a_margin_and_relaxes_it_within_its_bounds():
    method = make_method("cat_dpo", cat_rate=4.0, cat_tolerance=0.25, cat_largest=5.0)
    state = torch.tensor([0.0, 3.0, 4.5, 2.0], dtype=torch.float64)
    sums = torch.tensor([[0, 8], [0, 4], [4, 4], [0, 0]], dtype=torch.float64)
    assert method.next_state(state, sums).tolist() == [0.0, 2.0, 5.0, 2.0]


def test_hypo_is_dpo_safe_first_where_the_reference_agrees():
    rows = _rows(40, seed=6)
    beside, drift, labels = _tensors(rows)
    margin = drift[0] - drift[1]
    plain = preference_loss(margin, *labels, method="dpo_safe_first", beta=BETA)
    hypo = preference_loss(margin, *labels, method="hypo", beta=BETA, beside=beside)
    agrees = plain.favoured * (beside.reference[0] - beside.reference[1]) >= 0
    assert 5 < int(agrees.sum()) < 35
    assert torch.equal(hypo.loss[agrees], plain.loss[agrees])
    assert bool((hypo.loss[~agrees] > plain.loss[~agrees]).all())


@pytest.mark.parametrize("name", ["b_dpo", "cat_dpo", "hypo"])
def test_a_rival_that_knows_nothing_is_dpo_safe_first(name):
    rows = _rows(30, seed=2)
    _, drift, labels = _tensors(rows)
    margin = (drift[0] - drift[1]).detach()
    found = loss_of(margin, *labels, method=name, beta=BETA)
    plain = preference_loss(margin, *labels, method="dpo_safe_first", beta=BETA)
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-13, atol=1e-13)
    assert torch.equal(found.favoured, plain.favoured)


@pytest.mark.parametrize("mu", [1.01, 1.3, 1.5, 1.97])
def test_phi_mu_is_symmetric_and_bounded_below(mu):
    margin = torch.linspace(-60, 60, 41, dtype=torch.float64)
    safe = torch.ones(41, dtype=torch.float64)
    settings = {"method": "bso_phi", "beta": 0.5, "bso_shift": 5.0}
    ours = preference_loss(margin, safe, safe, phi_mu=mu, **settings).loss
    torch.testing.assert_close(ours, preference_loss(margin, safe, safe, phi_mu=3 - mu, **settings).loss)
    assert float(ours.min()) > -1 / ((mu - 1) * (2 - mu))
    # the per-sample loss of a generator h: h'(R) R - h(R) - h'(1/R)
    for h, loss in zip(margin.tolist(), ours.tolist(), strict=True):
        ratio = math.exp(-0.5 * h)
        k = (1 - mu) * (2 - mu)

        def generator(x: float) -> float:
            return (x ** (2 - mu) - (2 - mu) * x + 1 - mu) / k  # noqa: B023

        def slope(x: float) -> float:
            return (2 - mu) * (x ** (1 - mu) - 1) / k  # noqa: B023

        if abs(0.5 * h) < 12:
            assert loss == pytest.approx(slope(ratio) * ratio - generator(ratio) - slope(1 / ratio), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_must_be_given_and_fit(name):
    margin, labels = torch.zeros(4, dtype=torch.float64), [torch.ones(4)] * 2
    with raises(SettingError, "beside", name):
        preference_loss(margin, *labels, method=name)
    beside = Beside.at_rest(torch.zeros(3, dtype=torch.float64))
    with raises(SettingError, "beside", "pairs"):
        preference_loss(margin, *labels, method=name, beside=beside)


def test_a_method_of_the_margin_alone_does_not_take_more():
    margin = torch.zeros(4, dtype=torch.float64)
    with raises(SettingError, "beside", "dpo_h"):
        preference_loss(margin, torch.ones(4), torch.ones(4), method="dpo_h", beside=Beside.at_rest(margin))


@pytest.mark.parametrize("name", METHODS)
def test_the_pull_at_the_start_is_the_slope_of_the_weakest_cell(name):
    """By central differences of the loss at the start."""
    cells = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.float64)
    for beta in (0.05, 1.0):
        method = make_method(name, beta=beta)
        step = 1e-6 / beta
        slopes = torch.zeros(4, dtype=torch.float64)
        for side in (0, 1):
            values = []
            for sign in (1, -1):
                drift = torch.zeros(2, 4, dtype=torch.float64)
                drift[side] = sign * step
                beside = Beside.at_rest(drift[0]).at(drift) if method.reads else None
                values.append(preference_loss(drift[0] - drift[1], *cells, method=method, beside=beside).loss)
            slopes += ((values[0] - values[1]) / (2 * step)).abs() / 2
        slopes *= method.normaliser / beta
        if name in ("bso_sba", "bso_phi"):
            slopes = slopes[:1]  # the others are at the edge of the clamp, by 1e6 and more
        assert pull_at_start(method) == pytest.approx(float(slopes[slopes > 1e-6].min()), rel=1e-4)
