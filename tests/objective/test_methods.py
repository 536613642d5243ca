"""What each method does to each cell of labels, as one table; and the table itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bfpo.core.errors import SettingError
from bfpo.objective.losses import add_anchor, loss_at_start, preference_loss
from bfpo.objective.methods import BFPO, METHODS, make_method, method_settings
from losses import PLAIN, loss_of
from messages import raises

CELLS = {"safe-safe": (1.0, 1.0), "safe-unsafe": (1.0, 0.0), "unsafe-safe": (0.0, 1.0), "unsafe-unsafe": (0.0, 0.0)}
CHOSEN, REJECTED = (torch.tensor(column, dtype=torch.float64) for column in zip(*CELLS.values(), strict=True))
LOG2 = math.log(2)
SBA_EDGE = (0.2 * math.expm1(36) - 1.2 * math.expm1(-6)) / (4 * 0.2 * 1.2)

# Per cell, in the order of CELLS: favoured (+1 chosen, -1 rejected, 0 none), dropped, and the loss at beta 0.1 before
# the first step, with the settings at their defaults.
GOLDEN = {
    "bfpo": ([1, 1, -1, -1], [0, 0, 0, 0], [25, 100, 100, 25]),
    "ipo": ([1, 1, 1, 1], [0, 0, 0, 0], [25, 25, 25, 25]),
    "dpo_h": ([1, 1, 1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "dpo_s": ([0, 1, -1, 0], [1, 0, 0, 1], [0, LOG2, LOG2, 0]),
    "dpo_mix": ([1, 1, 0, 1], [0, 0, 0, 0], [LOG2, 2 * LOG2, 2 * LOG2, LOG2]),
    "dpo_safe_first": ([1, 1, -1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "safedpo": ([1, 1, -1, 0], [0, 0, 0, 1], [LOG2, math.log1p(math.exp(10)), math.log1p(math.exp(10)), 0]),
    "bso": ([1, 1, -1, 0], [0, 0, 0, 1], [LOG2, math.log1p(math.exp(30)), math.log1p(math.exp(30)), 0]),
    "bso_sba": ([1, 1, -1, 0], [0, 0, 0, 1], [0, SBA_EDGE, SBA_EDGE, 0]),
    "bso_phi": ([1, 1, -1, 0], [0, 0, 0, 1], [0, 4 * math.expm1(15), 4 * math.expm1(15), 0]),
    "linear_sum": ([1, 1, 0, 1], [0, 0, 0, 0], [6.25, 25, 0, 6.25]),
    "modpo": ([1, 1, 1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "robust_dpo": ([1, 1, 1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "kto": ([1, 1, -1, 0], [0, 0, 0, 0], [1] * 4),
    "kldo": ([1, 1, -1, 0], [0, 0, 0, 0], [0] * 4),
    "hypo": ([1, 1, -1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "b_dpo": ([1, 1, -1, 1], [0, 0, 0, 0], [LOG2] * 4),
    "cat_dpo": ([1, 1, -1, 1], [0, 0, 0, 0], [LOG2] * 4),
}
TARGETS = {"bfpo": [0.5, 1.0, -1.0, -0.5], "ipo": [0.5] * 4, "linear_sum": [0.25, 0.5, 0, 0.25]}


def test_every_method_is_in_the_golden_table():
    assert list(METHODS) == list(GOLDEN)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_to_each_cell(method):
    favoured, dropped, at_start = GOLDEN[method]
    result = loss_of(torch.zeros(4, dtype=torch.float64), CHOSEN, REJECTED, method=method, beta=0.1)
    assert result.favoured.tolist() == favoured
    assert result.favoured.dtype == torch.int8
    assert result.dropped.tolist() == [bool(value) for value in dropped]
    assert result.swapped.tolist() == [value < 0 for value in favoured]
    assert result.loss.tolist() == pytest.approx(at_start, rel=1e-12)
    assert torch.equal(loss_at_start(CHOSEN, REJECTED, method=method, beta=0.1), result.loss)
    if METHODS[method]().squared:
        assert result.target.tolist() == TARGETS[method]
    else:
        assert bool(result.target.isnan().all())


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_moves_the_favoured_completion_up(method):
    margin = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    result = loss_of(margin, CHOSEN, REJECTED, method=method, beta=0.1)
    (gradient,) = torch.autograd.grad(result.loss.sum(), margin)
    assert gradient.sign().neg().tolist() == GOLDEN[method][0]


@pytest.mark.parametrize("method", PLAIN)
def test_a_method_reads_every_setting_that_it_has(method):
    # Away from the edges of the clamp, at margins that reach both of its sides.
    margins = torch.tensor([-9.0, -0.3, 0.4, 9.0], dtype=torch.float64).repeat_interleave(4)
    labels = CHOSEN.repeat(4), REJECTED.repeat(4)
    base = {"beta": 0.7, "bso_shift": 3.0, "sba_clamp": 5.0}
    settings = METHODS[method].settings()
    one = make_method(method, **{name: value for name, value in base.items() if name in settings})
    before = preference_loss(margins, *labels, method=one).loss
    for name in settings:
        value = getattr(one, name)
        other = replace(one, **{name: "one_sided" if name == "link" else 0.8 * value})
        assert not torch.equal(before, preference_loss(margins, *labels, method=other).loss), name


@pytest.mark.parametrize("method", METHODS)
def test_normalised_loss_is_a_function_of_beta_times_margin(method):
    scaled = torch.tensor([-0.8, 0.1, 0.5, 2.0], dtype=torch.float64)
    rows = [
        loss_of(scaled / beta, CHOSEN, REJECTED, method=method, beta=beta).loss * METHODS[method](beta=beta).normaliser
        for beta in (0.01, 0.1, 2.0)
    ]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows[1], rows[2], rtol=1e-12, atol=1e-12)


def test_bso_with_the_logistic_generator_is_safedpo_at_the_same_shift():
    margin = torch.linspace(-70, 70, 4, dtype=torch.float64)
    ours = preference_loss(margin, CHOSEN, REJECTED, method="bso", beta=0.4, bso_shift=7.0)
    theirs = preference_loss(margin, CHOSEN, REJECTED, method="safedpo", beta=0.4, safedpo_delta=7.0)
    assert torch.equal(ours.loss, theirs.loss)


def test_a_probability_counts_as_safe_above_one_half_only():
    chosen = torch.tensor([0.5, 0.51, 0.49, 0.9], dtype=torch.float64)
    rejected = torch.tensor([0.9, 0.1, 0.51, 0.6], dtype=torch.float64)
    margin = torch.zeros(4, dtype=torch.float64)
    assert preference_loss(margin, chosen, rejected, method="dpo_s", beta=1.0).favoured.tolist() == [-1, 1, -1, 0]
    assert preference_loss(margin, chosen, rejected, method="bfpo", beta=1.0).favoured.tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": "0.1"}, "beta"),
        ({"alpha": math.inf}, "alpha"),
        ({"safety_weight": 1.0}, "safety_weight"),
        (
            {"method": "safedpo", "safedpo_delta": -1.0},
            "safedpo_delta",
        ),
        ({"method": "bso", "bso_shift": -1.0}, "bso_shift"),
        ({"method": "bso_sba", "sba_lambda": 0.0}, "sba_lambda"),
        ({"method": "bso_sba", "sba_scale": 0.0}, "sba_scale"),
        ({"method": "bso_sba", "sba_clamp": 0.0}, "sba_clamp"),
        ({"method": "bso_sba", "sba_clamp": 80.0}, "sba_clamp"),
        ({"method": "bso_sba", "bso_shift": 31.0}, "bso_shift"),
        ({"method": "linear_sum", "safety_share": 1.1}, "safety_share"),
        ({"method": "robust_dpo", "label_noise": 0.5}, "label_noise"),
        ({"method": "dpo_h", "alpha": 0.5}, "alpha"),
        ({"method": "dpo_h", "alpha": 0.5, "bso_shift": 1.0}, "alpha, bso_shift"),
        ({"alfa": 0.5}, "alfa"),
        ({"link": "hinge"}, "link"),
        ({"link": 1.0}, "link"),
        ({"method": "ipo", "link": "one_sided"}, "link"),
        ({"method": BFPO()}, "beta"),
        ({"method": "modpo", "safety_share": 1.0}, "safety_share"),
        ({"method": "bfpo", "other_margin": torch.zeros(4)}, "other_margin"),
        ({"method": "modpo", "other_margin": torch.zeros(3)}, "other_margin"),
        ({"method": "bpfo"}, "method"),
        ({"method": "xyzzy"}, "method"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings, key):
    with raises(SettingError, key):
        preference_loss(torch.zeros(4), CHOSEN, REJECTED, **{"beta": 0.1, **settings})


@pytest.mark.parametrize(
    ("margin", "key"),
    [
        (torch.zeros(3), "margin"),
        (torch.zeros(4, 1), "margin"),
        (torch.zeros(4, dtype=torch.int64), "margin"),
        ([0.0] * 4, "margin"),
    ],
)
def test_a_margin_that_does_not_fit_is_refused(margin, key):
    with raises(SettingError, key):
        preference_loss(margin, CHOSEN, REJECTED, beta=0.1)


def test_an_object_is_the_other_way_to_name_a_method():
    margin = torch.linspace(-1, 1, 4, dtype=torch.float64)
    method = BFPO(beta=0.2, alpha=0.3)
    by_name = preference_loss(margin, CHOSEN, REJECTED, method="bfpo", beta=0.2, alpha=0.3)
    assert torch.equal(preference_loss(margin, CHOSEN, REJECTED, method=method).loss, by_name.loss)
    assert torch.equal(
        loss_at_start(CHOSEN, REJECTED, method=method), loss_at_start(CHOSEN, REJECTED, beta=0.2, alpha=0.3)
    )
    total = add_anchor(by_name.loss, margin, anchor_weight=0.3, method=method)
    assert torch.equal(total, add_anchor(by_name.loss, margin, anchor_weight=0.3, beta=0.2))


def test_a_setting_that_several_methods_have_is_the_same_in_all():
    for method in METHODS.values():
        for name, setting in method.settings().items():
            assert setting == method_settings()[name], f"{method.name}.{name}"
