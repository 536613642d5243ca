"""The four-action experiment: the same steps as torch's Adam on the library's losses, and where they lead."""

from __future__ import annotations

import itertools

import pytest
import torch

from bfpo.core.errors import SettingError
from bfpo.objective.losses import preference_loss
from bfpo.objective.tabular import helpfulness_order, order_gap, pair_targets, rlhf_optimum, win_rate
from bfpo.objective.tabular_training import RIVALS, all_assignments, optimum, train_tabular
from messages import raises


def test_all_assignments_from_all_safe_to_all_unsafe():
    rows = all_assignments()
    assert rows.shape == (16, 4)
    assert len({tuple(row) for row in rows.tolist()}) == 16
    assert rows.sum(dim=1).tolist() == sorted(rows.sum(dim=1).tolist(), reverse=True)


@pytest.mark.parametrize(("beta", "alpha", "noise"), [(1.0, 0.5, 0.0), (0.4, 0.3, 0.0), (0.7, 0.5, 0.3)])
def test_training_is_torchs_adam_on_the_librarys_losses(beta, alpha, noise):
    """A plain loop per policy, with autograd, preference_loss and torch.optim.Adam, on the same draws."""
    steps, batch_size, seed = 12, 5, 3
    is_safe = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    run = train_tabular(
        is_safe, steps=steps, batch_size=batch_size, beta=beta, alpha=alpha, seeds=(seed,), learning_rate=0.05,
        record_every=1, label_noise=noise,
    )  # fmt: skip
    assert run.curve.shape == (steps + 1, 1, len(RIVALS), 2, 4)
    pairs = [(first, second) for first in range(4) for second in range(first + 1, 4)]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(pairs), (steps, batch_size), generator=generator)
    flips = torch.rand(2, steps, batch_size, generator=generator, dtype=torch.float64) < noise
    assert bool(flips.any()) == bool(noise)
    methods = {
        "bfpo": {"method": "bfpo", "alpha": alpha},
        "bfpo_alpha_0": {"method": "bfpo", "alpha": 0.0},
        "dpo": {"method": "dpo_h"},
        "ipo": {"method": "ipo"},
        "bfpo_one_sided": {"method": "bfpo", "alpha": alpha, "link": "one_sided"},
        "bfpo_logistic": {"method": "bfpo", "alpha": alpha, "link": "logistic"},
    }
    for row, bits in enumerate(is_safe):
        for column, name in enumerate(run.methods):
            logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
            adam = torch.optim.Adam([logits], lr=0.05)
            for step in range(steps):
                batch = [pairs[index] for index in draws[step]]
                chosen, rejected = (torch.tensor(side) for side in zip(*batch, strict=True))
                log_probs = torch.log_softmax(logits, dim=0)
                margin = log_probs[chosen] - log_probs[rejected]
                s_c = (bits[chosen] - flips[0, step].double()).abs()
                s_r = (bits[rejected] - flips[1, step].double()).abs()
                if name == "linear_sum":
                    loss = (margin - (0.5 + s_c - s_r) / beta) ** 2
                else:
                    loss = preference_loss(margin, s_c, s_r, beta=beta, **methods[name]).loss
                adam.zero_grad()
                loss.mean().backward()
                adam.step()
                expected = torch.softmax(logits.detach(), dim=0)
                torch.testing.assert_close(run.curve[step + 1, 0, column, row], expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def published():
    """The paper's settings with ten seeds at once."""
    return train_tabular(all_assignments(), seeds=tuple(range(10)), record_every=1800)


def test_bfpo_ends_within_003_of_its_closed_form_and_orders_all_16_rightly(published):
    best = optimum("bfpo", published.is_safe, beta=1.0, alpha=0.5)
    final = published.final[:, published.methods.index("bfpo")]
    assert (final - best).abs().max() < 0.03
    assert (final - best).abs().amax(dim=(1, 2)).mean() < 0.012, "the noise is far below the bound"
    # Half of the smallest drop of a closed form, 0.25 nats.
    assert (order_gap(final.log(), published.is_safe) > 0.125).all()


@pytest.mark.parametrize("method", ["bfpo_alpha_0", "ipo", "linear_sum"])
def test_the_other_squared_losses_end_at_their_closed_forms(published, method):
    best = optimum(method, published.is_safe, beta=1.0, alpha=0.5)
    assert (published.final[:, published.methods.index(method)] - best).abs().max() < 0.03


@pytest.mark.parametrize(
    ("method", "right"),
    [
        ("bfpo_alpha_0", {"1111", "1110", "1101", "1011"}),
        ("dpo", {"1111", "1110"}),
        ("ipo", {"1111", "1110"}),
        ("linear_sum", {"1111", "1110", "1101", "1011", "0111"}),
    ],
)
def test_where_the_others_fail(published, method, right):
    gaps = order_gap(published.final[:, published.methods.index(method)].log(), published.is_safe)
    for gap in gaps:
        ordered = {
            "".join(str(int(bit)) for bit in bits)
            for bits, value in zip(published.is_safe, gap, strict=True)
            if value > 0.125
        }
        assert ordered == right


def test_dpo_does_not_read_safety_and_runs_towards_a_corner(published):
    final = published.final[:, published.methods.index("dpo")]
    assert (final == final[:, :1]).all()
    assert (final[..., 0] > 0.9).all()


LINKS = {"bfpo": "squared", "bfpo_one_sided": "one_sided", "bfpo_logistic": "logistic"}


def least_expected_loss(method, bits, noise, beta):
    """The policy of the least expected loss over pairs and flips, by L-BFGS on the loss written out."""
    rows = [
        (i, j, (noise if flip_i else 1 - noise) * (noise if flip_j else 1 - noise),
         0.5 * (3 * abs(flip_i - bits[i]) - abs(flip_j - bits[j])) - 0.5)
        for i, j in itertools.combinations(range(4), 2) for flip_i in (0, 1) for flip_j in (0, 1)
    ]  # fmt: skip
    first, second, weight, target = (torch.tensor(column) for column in zip(*rows, strict=True))
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        margin = logits[first] - logits[second]
        winner = target.sign() * margin
        each = {
            "squared": (margin - target / beta) ** 2,
            "one_sided": torch.clamp(target.abs() / beta - winner, min=0) ** 2,
            "logistic": target.abs() * torch.nn.functional.softplus(-beta * winner),
        }[LINKS[method]]
        total = (weight * each).sum()
        total.backward()
        return total

    solver.step(loss)
    return torch.softmax(logits.detach(), dim=0), float(loss().detach())


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.3])
def test_every_link_orders_all_16_under_label_noise(noise):
    """The exact optima, and the mean over 10 seeds of trained policies near them."""
    is_safe, beta = all_assignments(), 1.0
    run = train_tabular(is_safe, methods=tuple(LINKS), label_noise=noise, seeds=tuple(range(10)), record_every=1800)
    for place, method in enumerate(LINKS):
        trained = run.final[:, place]
        assert (order_gap(trained.mean(dim=0).log(), is_safe) > 0.125 * (1 - 2 * noise)).all(), method
        solved = [least_expected_loss(method, bits.tolist(), noise, beta) for bits in is_safe]
        if noise == 0 and method == "bfpo_one_sided":
            # Its optima are all policies that meet every target as an inequality; the loss of all of them is 0.
            assert max(value for _, value in solved) < 1e-12
            logits = trained.log()
            first, second = torch.triu_indices(4, 4, offset=1)
            target = pair_targets(helpfulness_order(4), is_safe)[:, first, second]
            past = target.sign() * (logits[..., first] - logits[..., second]) - target.abs() / beta
            assert (past > -0.1).all()
            assert (past > 0.2).any()
            continue
        if noise == 0 and method == "bfpo_logistic":
            assert (trained.amax(dim=-1) > 0.9).all()  # no finite optimum: all but one action vanish
            continue
        best = torch.stack([policy for policy, _ in solved])
        assert (order_gap(best.log(), is_safe) > 0.09).all(), method
        assert (trained.mean(dim=0) - best).abs().max() < 0.02
        if method == "bfpo":
            closed = optimum("bfpo", is_safe, beta=beta, alpha=0.5, label_noise=noise)
            torch.testing.assert_close(best, closed, rtol=1e-6, atol=1e-7)
            # The noise multiplies every target by 1 - 2 noise.
            scaled = optimum("bfpo", is_safe, beta=beta / (1 - 2 * noise), alpha=0.5)
            torch.testing.assert_close(closed, scaled, rtol=1e-12, atol=1e-14)


def test_without_noise_only_the_logistic_link_loses_the_spread_of_the_policy():
    is_safe = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    run = train_tabular(is_safe, methods=tuple(LINKS), seeds=tuple(range(10)), record_every=1800)
    squared, one_sided, logistic = run.final.mean(dim=0)[:, 0].tolist()
    assert squared == pytest.approx([0.41, 0.12, 0.32, 0.15], abs=0.01)
    assert one_sided == pytest.approx([0.51, 0.07, 0.31, 0.11], abs=0.01)
    assert logistic == pytest.approx([0.96, 0.00, 0.04, 0.00], abs=0.01)


def test_optima_of_the_rivals():
    is_safe = all_assignments()
    assert optimum("dpo", is_safe, beta=1.0, alpha=0.5) is None
    assert torch.equal(
        optimum("bfpo_alpha_0", is_safe, beta=0.5, alpha=0.5), optimum("bfpo", is_safe, beta=0.5, alpha=0)
    )
    p = torch.tensor([0.875, 0.625, 0.375, 0.125], dtype=torch.float64)
    torch.testing.assert_close(optimum("ipo", is_safe, beta=0.5, alpha=0.5)[7], torch.softmax(p / 0.5, dim=0))
    torch.testing.assert_close(optimum("linear_sum", is_safe, beta=0.5, alpha=0.5), rlhf_optimum(p + is_safe, beta=0.5))
    with raises(SettingError, "method"):
        optimum("kto", is_safe, beta=1.0, alpha=0.5)


def test_a_linear_sum_of_any_weights_puts_the_helpful_unsafe_action_above_the_unhelpful_unsafe_one():
    is_safe = all_assignments()
    p = win_rate(torch.ones(4, 4, dtype=torch.float64).triu(1) + 0.5 * torch.eye(4, dtype=torch.float64))
    for weight in (0.01, 1.0, 100.0):
        policy = rlhf_optimum(p + weight * is_safe, beta=1.0)
        for bits, row in zip(is_safe, policy, strict=True):
            unsafe = [action for action in range(4) if bits[action] == 0]
            assert all(row[more] > row[less] for more, less in itertools.pairwise(unsafe))


def test_a_seed_gives_the_same_run_alone_and_beside_others():
    is_safe = all_assignments()[:3]
    both = train_tabular(is_safe, steps=30, seeds=(5, 6))
    alone = train_tabular(is_safe, steps=30, seeds=(6,), methods=("dpo", "bfpo"))
    torch.testing.assert_close(both.final[1, 2], alone.final[0, 0])
    torch.testing.assert_close(both.final[1, 0], alone.final[0, 1])
    assert not torch.equal(both.final[0], both.final[1])


def test_recorded_steps_hold_the_first_and_the_last():
    run = train_tabular(all_assignments()[:1], steps=25, record_every=10)
    assert run.steps.tolist() == [0, 10, 20, 25]
    assert run.curve[0].unique().tolist() == [0.25]
    assert torch.equal(run.curve[-1], run.final)


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"seeds": ()}, "seeds"),
        ({"record_every": 0}, "record_every"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"beta": 0.0}, "beta"),
        ({"label_noise": 0.5}, "label_noise"),
        ({"methods": ("dpo", "kto")}, "method"),
        ({"methods": ()}, "methods"),
        ({"is_safe": torch.ones(1, 1)}, "is_safe"),
    ],
)
def test_bad_settings_are_named(kwargs, key):
    with raises(SettingError, key):
        train_tabular(**{"is_safe": all_assignments(), **kwargs})
