"""Pointwise methods: each answer is desirable or undesirable by itself, and no pair is needed."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfpo.objective.base import Beside, PairLoss, ReadsBeside, register, setting, sums_by_group

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KLDO", "KTO", "desirable_answers"]

_LARGEST_POWER = 30.0  # e^30 is 1e13; from here on exp is continued by its tangent, so that float32 holds it


def desirable_answers(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the chosen answers are desirable (safe), and the rejected ones (alone safe), (P,) bool each."""
    chosen = chosen_is_safe > 0.5
    return chosen, (rejected_is_safe > 0.5) & ~chosen


@dataclass(frozen=True, kw_only=True)
class Pointwise(ReadsBeside):
    """A method that makes desirable answers more likely than under the reference, and others less.

    Of a pair, an answer is desirable if it is safe and wins by the order of DPO safe-first: the more helpful one if it
    is safe, else the other one if that is safe; all others are undesirable, both of them where both are unsafe. The
    loss of a pair is the sum over its answers. An unpaired answer is a pair whose rejected side is absent.
    """

    pointwise = True
    state_by = "stream"

    @abstractmethod
    def answer_losses(self, desirable: Tensor, beside: Beside) -> Tensor:
        """Return the loss of each answer, (2, P); `desirable` (2, P) bool."""

    def loss_beside(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> PairLoss:
        """Return the sum of the losses of each pair's answers; a pair favours its desirable answer, if it has one."""
        chosen, rejected = desirable_answers(chosen_is_safe, rejected_is_safe)
        desirable = beside.present.new_zeros(beside.present.shape)
        desirable[0], desirable[1] = chosen, rejected
        # Masked before, too: an absent side has drift 0, and no gradient whatever its loss.
        each = self.answer_losses(desirable, beside.at(beside.drift.masked_fill(~beside.present, 0.0)))
        return PairLoss(
            loss=each.masked_fill(~beside.present, 0.0).sum(0),
            target=margin.new_full(margin.shape, float("nan")),
            favoured=chosen.char() - rejected.char(),
            dropped=margin.new_zeros(margin.shape).bool(),
        )


@register
@dataclass(frozen=True, kw_only=True)
class KTO(Pointwise):
    """KTO: each answer's log-ratio against the mean log-ratio of unrelated answers, z0, by a saturating value function.

    `z0 = max(0, mean of log pi(y') / pi_ref(y'))` over the prompts of an optimizer step, each with an answer y' to
    another one (here those of the pair half the data away, or of one behind it where that has the same prompt), without
    gradient; one z0 for each stream, over all processes. In an evaluation it is the mean over all held-out prompts. It
    costs a forward pass more, without gradient, in every step, and one under the reference before training.
    """

    name = "kto"
    title = "KTO"
    summary = "pointwise: desirable answers are raised above the policy's mean log-ratio, others lowered below it"
    paper = "arXiv 2402.01306"
    reads = ("drift", "present", "group", "state")
    companion = "mismatched"

    desirable_weight: float = setting(1.0, "KTO's weight of a desirable answer", gt=0)
    undesirable_weight: float = setting(1.0, "KTO's weight of an undesirable answer", gt=0)

    def answer_losses(self, desirable: Tensor, beside: Beside) -> Tensor:
        """Return `w (1 - sigmoid(+-beta (d - z0)))`, + for a desirable answer, d its log-ratio."""
        above = self.beta * (beside.drift - beside.of_state)
        value, other = (-above).sigmoid(), above.sigmoid()
        return (self.desirable_weight * value).where(desirable, self.undesirable_weight * other)

    def observe(self, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> Tensor:
        """Return by stream the sum of the log-ratios of mismatched answers, and their number, (S, 2)."""
        drift = beside.drift.detach().double().masked_fill(~beside.present, 0.0)
        return sums_by_group(beside, drift.sum(0), beside.present.sum(0))

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Return z0 of each stream, in nats."""
        return (sums[:, 0] / sums[:, 1].clamp(min=1)).clamp(min=0)


@register
@dataclass(frozen=True, kw_only=True)
class KLDO(Pointwise):
    """KLDO: the Donsker-Varadhan bound of the divergence between desirable and undesirable answers.

    The loss is `-E+ r + ln E- e^r`, r = beta x log-ratio, means over the desirable and over the undesirable answers of
    a stream. A mean over few answers inside the logarithm gives a biased gradient, so the denominator is a moving
    average: with b its logarithm, an undesirable answer has the loss `e^(r - b) + b - 1`, which is at least `ln E- e^r`
    in the mean, and equal to it at b = ln E- e^r. b is 0 at the start, where that is exact, and after a step
    `e^b <- (1 - kldo_rate) e^b + kldo_rate x mean e^r`. The two means weigh the same however many answers each has:
    else a constant added to all log-ratios would change the loss. From r - b = 30 on, e^(r - b) is its tangent.

    The loss is 0 at the start and falls below, so it has no `loss_over_start`.
    """

    name = "kldo"
    title = "KLDO"
    summary = "pointwise: estimates the divergence of desirable from undesirable answers, and raises it"
    paper = "arXiv 2502.00657"
    reads = ("drift", "present", "balance", "group", "state")

    kldo_rate: float = setting(0.1, "KLDO's share of the newest step in its moving denominator", gt=0, le=1)

    def answer_losses(self, desirable: Tensor, beside: Beside) -> Tensor:
        """Return `-r` of a desirable answer, `e^(r - b) + b - 1` of another, times the balance."""
        ratio = self.beta * beside.drift
        lowered = _exp(ratio - beside.of_state) + beside.of_state - 1
        return (-ratio * beside.balance[0]).where(desirable, lowered * beside.balance[1])

    def observe(self, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> Tensor:
        """Return by stream the sum of e^(r - b) over undesirable answers, and their number, (S, 2)."""
        chosen, rejected = desirable_answers(chosen_is_safe, rejected_is_safe)
        counted = beside.present.clone()
        counted[0] &= ~chosen
        counted[1] &= ~rejected
        excess = _exp(self.beta * beside.drift.detach().double() - beside.of_state.double())
        return sums_by_group(beside, excess.masked_fill(~counted, 0.0).sum(0), counted.sum(0))

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Return the logarithm of the moving denominator of each stream."""
        mean = sums[:, 0] / sums[:, 1].clamp(min=1)
        # e^b times 1 + rate (mean - 1); a rate of 1 and a mean of 0 in float64 would be ln 0
        moved = state + (1 + self.kldo_rate * (mean - 1)).clamp(min=1e-300).log()
        return moved.where(sums[:, 1] > 0, state)


def _exp(x: Tensor) -> Tensor:
    """Return e^x, continued by its tangent from `_LARGEST_POWER` on."""
    return x.clamp(max=_LARGEST_POWER).exp() * (1 + (x - _LARGEST_POWER).clamp(min=0))
