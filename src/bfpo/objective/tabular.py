"""The theory on tabular policies: the optimum of the pairwise loss, the RLHF optimum, and when the two are equal.

A world of n actions and no prompt. `beats` (n, n): probability that the row's action is more helpful than the column's,
with `beats + beats.T = 1` (1/2 on the diagonal: an action ties with itself). `is_safe` (..., n): bits or probabilities;
leading dimensions are assignments of safety to the same actions. `weights` (n,): how often the data draw each action;
`reference` (n,): the frozen policy; both uniform if None. Everything is float64. `docs/theory.md` has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bfpo.core.errors import LabelError, SettingError
from bfpo.objective.losses import bfpo_target
from bfpo.objective.methods import BFPO, check_number

__all__ = [
    "alpha_window",
    "bilinear_reward",
    "closed_form",
    "e_safe",
    "helpfulness_order",
    "implied_reward",
    "order_gap",
    "pair_targets",
    "reward_gap",
    "rlhf_optimum",
    "wanted_order",
    "win_rate",
    "win_rate_over_safe",
]


def helpfulness_order(num_actions: int) -> Tensor:
    """Return `beats` (n, n) of n actions in strict order of helpfulness, action 0 the most helpful.

    Raises `SettingError` for `num_actions < 1`.
    """
    if num_actions < 1:
        raise SettingError(f"num_actions: got {num_actions!r}; allowed: a whole number of at least 1")
    above = torch.ones(num_actions, num_actions, dtype=torch.float64).triu(1)
    return above + 0.5 * torch.eye(num_actions, dtype=torch.float64)


def _check_beats(beats: Tensor) -> Tensor:
    if beats.ndim != 2 or beats.shape[0] != beats.shape[1]:
        raise SettingError(f"beats: got shape {tuple(beats.shape)}; allowed: (n, n)")
    beats = beats.to(torch.float64)
    if not bool(((beats >= 0) & (beats <= 1)).all()) or not torch.allclose(beats + beats.T, torch.ones_like(beats)):
        raise SettingError(
            "beats: got entries that are not probabilities with beats + beats.T = 1; allowed: only those"
        )
    return beats


def _check_safe(is_safe: Tensor, num_actions: int) -> Tensor:
    if is_safe.ndim < 1 or is_safe.shape[-1] != num_actions:
        raise LabelError(f"is_safe: got shape {tuple(is_safe.shape)}; allowed: (..., {num_actions})")
    is_safe = is_safe.to(torch.float64)
    if not bool(((is_safe >= 0) & (is_safe <= 1)).all()):
        raise LabelError(f"is_safe: got {is_safe.tolist()}; allowed: bits or probabilities in [0, 1]")
    return is_safe


def _distribution(name: str, value: Tensor | None, num_actions: int) -> Tensor:
    if value is None:
        return torch.full((num_actions,), 1 / num_actions, dtype=torch.float64)
    value = value.to(torch.float64)
    total = torch.ones((), dtype=torch.float64)
    if value.shape != (num_actions,) or not bool((value > 0).all()) or not torch.allclose(value.sum(), total):
        raise SettingError(f"{name}: got {value.tolist()}; allowed: ({num_actions},) of positive numbers that sum to 1")
    return value


def e_safe(is_safe: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return E_safe (...,), the share of safe completions under the data's `weights`."""
    is_safe = _check_safe(is_safe, is_safe.shape[-1] if is_safe.ndim else 0)
    return is_safe @ _distribution("weights", weights, is_safe.shape[-1])


def win_rate(beats: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return p (n,), the probability that each action is more helpful than another draw, which may be itself."""
    beats = _check_beats(beats)
    return beats @ _distribution("weights", weights, beats.shape[0])


def win_rate_over_safe(beats: Tensor, is_safe: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return q (..., n), the probability that each action beats another draw *and* that draw is safe."""
    beats = _check_beats(beats)
    is_safe = _check_safe(is_safe, beats.shape[0])
    return (is_safe * _distribution("weights", weights, beats.shape[0])) @ beats.T


def pair_targets(beats: Tensor, is_safe: Tensor, *, alpha: float = 0.5, safety_weight: float = 3.0) -> Tensor:
    """Return G (..., n, n), the antisymmetric extension of BFPO's target: what `beta (u_i - u_j)` is pulled to.

    `G_ij = beats_ij target(i, j) - beats_ji target(j, i)`, the mean over which of the two is the more helpful. Raises
    `LabelError` and `SettingError` as `bfpo_target`, and `SettingError` for invalid `beats`.
    """
    beats = _check_beats(beats)
    is_safe = _check_safe(is_safe, beats.shape[0])
    shape = (*is_safe.shape, beats.shape[0])
    first, second = is_safe[..., :, None].expand(shape), is_safe[..., None, :].expand(shape)
    target = bfpo_target(first.flatten(), second.flatten(), alpha=alpha, safety_weight=safety_weight)
    ordered = beats * target.reshape(shape)
    return ordered - ordered.mT


def implied_reward(targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return a (..., n), the reward that is equivalent to pairwise targets G: `a(y) = E_{y'} G(y, y')`.

    `targets`: (..., n, n), antisymmetric; raises `SettingError` otherwise.
    """
    if targets.ndim < 2 or targets.shape[-1] != targets.shape[-2] or not torch.allclose(targets, -targets.mT):
        raise SettingError(f"targets: got shape {tuple(targets.shape)}; allowed: (..., n, n), antisymmetric")
    return targets.to(torch.float64) @ _distribution("weights", weights, targets.shape[-1])


def rlhf_optimum(reward: Tensor, *, beta: float, reference: Tensor | None = None) -> Tensor:
    """Return the policy (..., n) that maximises `E[reward] - beta KL(pi || reference)`: `reference exp(reward / beta)`.

    `reward`: (..., n). Raises `SettingError` for `beta <= 0` or a reference that is not a distribution.
    """
    logs = _distribution("reference", reference, reward.shape[-1]).log()
    return torch.softmax(logs + reward.to(torch.float64) / check_number("beta", beta, gt=0), dim=-1)


def closed_form(
    targets: Tensor, *, beta: float, weights: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Return the policy (..., n) that minimises `E_{i,j ~ weights} (u_i - u_j - G_ij / beta)^2`, u = log(pi/reference).

    `targets`: G (..., n, n) of `pair_targets`. The optimum is `u = implied_reward / beta` up to a constant, that is the
    RLHF optimum of the implied reward. Drawing only pairs of different actions has the same optimum, as long as the
    weights are uniform. Errors as in `implied_reward` and `rlhf_optimum`. Source: the theorem of arXiv 2408.15313.
    """
    return rlhf_optimum(implied_reward(targets, weights=weights), beta=beta, reference=reference)


def bilinear_reward(
    beats: Tensor,
    is_safe: Tensor,
    *,
    alpha: float = 0.5,
    safety_weight: float = 3.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the two-factor reward (..., n): `(s + E_safe - 2 alpha)(p + B3)`, `B3 = 1/(safety_weight - 1)`.

    At alpha = 0 and safety_weight = 3 it is the paper's `(r_safe + E_safe)(r_help + 1/2)`. Equal to the implied reward
    up to a constant where winning is independent of the other's safety; see `reward_gap`. Source: arXiv 2408.15313.
    """
    bfpo = BFPO(alpha=alpha, safety_weight=safety_weight)
    beats = _check_beats(beats)
    is_safe = _check_safe(is_safe, beats.shape[0])
    mean = e_safe(is_safe, weights=weights)[..., None]
    return (is_safe + mean - 2 * bfpo.alpha) * (win_rate(beats, weights=weights) + 1 / (bfpo.safety_weight - 1))


def reward_gap(beats: Tensor, is_safe: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return `q - p E_safe` (..., n): implied minus bilinear reward, up to a constant, whatever alpha and B1.

    Zero if helpfulness does not depend on the other completion's safety.
    """
    share = e_safe(_check_safe(is_safe, beats.shape[0]), weights=weights)[..., None]
    return win_rate_over_safe(beats, is_safe, weights=weights) - win_rate(beats, weights=weights) * share


def alpha_window(share_safe: float) -> tuple[float, float]:
    """Return the open interval of alpha that gives the wanted order at this E_safe, given independence.

    Above `E_safe / 2` unsafe completions are pushed down the more, the more helpful they are; below `(1 + E_safe) / 2`
    safe ones are still pushed up in order of helpfulness. Only alpha = 1/2 is inside for every E_safe strictly between
    0 and 1. Raises `SettingError` for a share outside [0, 1].
    """
    check_number("share_safe", share_safe, ge=0, le=1)
    return share_safe / 2, (1 + share_safe) / 2


def wanted_order(is_safe: Tensor) -> Tensor:
    """Return the actions (..., n) from best to worst, if action 0 is the most helpful and so on.

    Safe ones first, the more helpful the better; then unsafe ones, the more helpful the worse. `is_safe`: bits.
    """
    if not bool(((is_safe == 0) | (is_safe == 1)).all()):
        raise LabelError(f"is_safe: got {is_safe.tolist()}; allowed: bits, an order needs them decided")
    rank = torch.arange(is_safe.shape[-1], device=is_safe.device).expand(is_safe.shape)
    unsafe_rank = 2 * is_safe.shape[-1] - rank
    return torch.where(is_safe.bool(), rank, unsafe_rank).argsort(dim=-1)


def order_gap(log_probs: Tensor, is_safe: Tensor) -> Tensor:
    """Return (...,) the smallest drop of log-probability, in nats, from one action to the next in the wanted order.

    Positive if and only if the order is right; 0 at a tie. In nats and not in probability, so that it means the same
    among likely and unlikely actions. `log_probs`: (..., n) with the shape of `is_safe`, or one that it expands to.
    """
    order = wanted_order(is_safe).expand(log_probs.shape)
    ranked = log_probs.gather(-1, order)
    return (ranked[..., :-1] - ranked[..., 1:]).amin(dim=-1)
