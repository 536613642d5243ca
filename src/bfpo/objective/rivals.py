"""Pairwise methods that read more than the margin: log-probs of the reference, categories of harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfpo.objective.base import (
    Beside,
    PairLoss,
    ReadsBeside,
    logistic,
    ranked,
    register,
    safe_first,
    safer_wins,
    setting,
    sums_by_group,
    where_mixed,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BalancedDPO", "CatDPO", "HyPO"]


@register
@dataclass(frozen=True, kw_only=True)
class HyPO(ReadsBeside):
    """HyPO: DPO in which a reference that prefers the loser counts as neutral; on the order of DPO safe-first.

    With D the log-prob of the winner minus that of the loser, the paper's loss is `-log sigmoid(beta (D_policy -
    max(D_ref, 0)))`, and `D_policy - max(D_ref, 0) = h + min(D_ref, 0)`. It is DPO safe-first where D_ref >= 0; where
    it is below, the pair pulls until the policy itself prefers the winner. The paper has one order of preference; that
    safety decides it first is our choice, as in the other rivals here.
    """

    name = "hypo"
    title = "HyPO"
    summary = "DPO safe-first in which a reference that prefers the loser counts as neutral"
    paper = "arXiv 2602.11902"
    reads = ("reference",)
    starts_known = False

    def loss_beside(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> PairLoss:
        """Return `-log sigmoid(beta (h + min(D_ref, 0)))`, h and D_ref of the winner over the other."""
        favoured = safe_first(chosen_is_safe, rejected_is_safe)
        sign = favoured.to(margin.dtype)
        clipped = sign * (sign * (beside.reference[0] - beside.reference[1])).clamp(max=0)
        return ranked(margin + clipped, favoured, lambda h: logistic(self.beta * h))


@register
@dataclass(frozen=True, kw_only=True)
class BalancedDPO(ReadsBeside):
    """B-DPO: separate weights on the log-ratios of winner and loser; the better understood one counts less.

    How well an answer is understood is its mutual information with the prompt, `I = log pi_ref(y | x) - log pi_ref(y)`,
    computed from the reference once before training. That, the direction of the weights and a factor that scales both
    are from the paper. Ours, because its formulas could not be read: I is taken per token, the weights are `w_w = 2
    sigmoid(I_l - I_w)` and `w_l = 2 - w_w` (1 and 1 at equal information, where the loss is DPO's), and y alone stands
    after the token that unconditional text starts from. The order is that of DPO safe-first, as in the paper's pairs.
    """

    name = "b_dpo"
    title = "B-DPO"
    summary = "DPO safe-first in which the answer that the reference understands better counts less"
    paper = "arXiv 2603.22829"
    reads = ("drift", "information")
    companion = "unprompted"

    b_dpo_scale: float = setting(1.0, "B-DPO's factor on both weights", gt=0)

    def loss_beside(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> PairLoss:
        """Return `-log sigmoid(beta scale (w_w d_w - w_l d_l))`, d the log-ratio of policy and reference."""
        chosen, rejected = beside.drift
        weight = 2 * (beside.information[1] - beside.information[0]).sigmoid()  # of the chosen one, winner or not
        weighted = self.b_dpo_scale * (weight * chosen - (2 - weight) * rejected)
        favoured = safe_first(chosen_is_safe, rejected_is_safe)
        return ranked(weighted, favoured, lambda h: logistic(self.beta * h))


@register
@dataclass(frozen=True, kw_only=True)
class CatDPO(ReadsBeside):
    """Cat-DPO: DPO safe-first with a margin for each category of harm, larger while the category is still unsafe.

    A pair with one safe answer must be won by the margin m of its category, a dual variable: as in SafeDPO, its loss is
    that of a margin m / beta smaller. From the paper: one adaptive margin a category, from per-category constrained
    optimization, which grows while the model is unsafe there and falls once it has caught up. Ours, because its update
    could not be read: a category counts as unsafe by the share u of its pairs with one safe answer in which the policy
    finds the unsafe one at least as likely per token, and after every optimizer step in which it has such pairs
    `m <- clip(m + cat_rate (u - cat_tolerance), 0, cat_largest)`. Margins start at 0. Pairs without a category share
    one.
    """

    name = "cat_dpo"
    title = "Cat-DPO"
    summary = "DPO safe-first with a margin for each category of harm, larger while it is still unsafe"
    paper = "arXiv 2604.17299"
    reads = ("mean_logps", "group", "state")
    state_by = "category"

    cat_rate: float = setting(0.1, "Cat-DPO's step of a category's margin, per optimizer step", gt=0)
    cat_tolerance: float = setting(0.05, "Cat-DPO's share of still unsafe pairs at which a margin stays", ge=0, lt=1)
    cat_largest: float = setting(10.0, "Cat-DPO's largest margin in nats of beta x margin", gt=0)

    def loss_beside(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> PairLoss:
        """Return `-log sigmoid(beta h - m [labels differ])`, h the margin of the winner, m that of its category."""
        favoured = safe_first(chosen_is_safe, rejected_is_safe)
        needed = where_mixed(1.0, chosen_is_safe, rejected_is_safe, margin) * beside.of_state
        return ranked(margin, favoured, lambda h: logistic(self.beta * h - needed))

    def observe(self, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> Tensor:
        """Return by category the pairs with one safe answer that the policy gets wrong, and their number, (S, 2)."""
        safer = safer_wins(chosen_is_safe, rejected_is_safe)
        lead = beside.mean_logps[0] - beside.mean_logps[1]
        return sums_by_group(beside, (safer != 0) & (safer * lead <= 0), safer != 0)

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Return the margins after a step, `clip(m + cat_rate (u - cat_tolerance), 0, cat_largest)`."""
        unsafe = sums[:, 0] / sums[:, 1].clamp(min=1)
        moved = (state + self.cat_rate * (unsafe - self.cat_tolerance)).clamp(0, self.cat_largest)
        return moved.where(sums[:, 1] > 0, state)
