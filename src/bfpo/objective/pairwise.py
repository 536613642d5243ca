"""Methods whose loss is a function of a pair's margin and its labels alone, one class each."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfpo.core.errors import SettingError
from bfpo.objective.base import (
    Method,
    PairLoss,
    Squared,
    chosen_wins,
    logistic,
    ranked,
    register,
    safe_first,
    safe_one_wins,
    safer_wins,
    setting,
    to_target,
    where_mixed,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BFPO",
    "BSO",
    "IPO",
    "MODPO",
    "BSOWithPhi",
    "BSOWithSBA",
    "DPOHelpful",
    "DPOMix",
    "DPOSafe",
    "DPOSafeFirst",
    "LinearSum",
    "RobustDPO",
    "SafeDPO",
]

# The largest exponential of a generator must stay finite in float32, whose largest exponent is just under 89.
_LARGEST_EXPONENT = 88.0


@register
@dataclass(frozen=True, kw_only=True)
class BFPO(Method):
    """BFPO: pulls the margin to a target computed from both safety labels.

    Drops nothing. At alpha = 1/2 a pair with an unsafe chosen completion has a negative target: it is reversed.

    `link` says how a margin h is held to its target t. "squared" (the paper): `(h - t/beta)^2`, which also pulls back a
    margin that is past its target. "one_sided": `relu(|t|/beta - sign(t) h)^2`, which does not (the truncated square of
    arXiv 2402.05749). "logistic": `-|t| log sigmoid(sign(t) beta h)`, which pulls for ever, by the weight |t|.
    """

    name = "bfpo"
    title = "BFPO"
    summary = "squared loss to a target from both safety labels; reverses pairs whose chosen completion is unsafe"
    paper = "arXiv 2408.15313"

    alpha: float = setting(0.5, "shift of the target, subtracted from it")
    safety_weight: float = setting(3.0, "weight of the chosen completion's safety (the paper's B1)", gt=1)
    link: str = setting(
        "squared",
        "how a margin is held to its target: squared (the paper), one_sided (not pulled back when past it), logistic",
        choices=("squared", "one_sided", "logistic"),
    )

    @property
    def squared(self) -> bool:
        """Whether the link is a square."""
        return self.link != "logistic"

    def target(self, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
        """Return what `beta * margin` is pulled to, (P,); see `bfpo_target`."""
        # The labels have different weights, so the target is not a function of s_c - s_r: it is higher for two safe
        # answers than for two unsafe ones, by B3 (B1 - 1) = 1.
        b1 = self.safety_weight
        return (b1 * chosen_is_safe - rejected_is_safe) / (b1 - 1) - self.alpha

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return the link of h and the target `B3 (B1 s_c - s_r) - alpha`, B3 = 1/(B1 - 1)."""
        return to_target(margin, self.target(chosen_is_safe, rejected_is_safe), self.beta, self.link)


@register
@dataclass(frozen=True, kw_only=True)
class IPO(Squared):
    """IPO, equation 17 of its paper; labels are not read.

    The margin is of summed log-probs, as in the equation; some implementations take per-token means.
    """

    name = "ipo"
    title = "IPO"
    summary = "squared loss to 1/2 on the order of helpfulness"
    paper = "arXiv 2310.12036"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `(h - 1/(2 beta))^2`, that is target 1/2."""
        return to_target(margin, margin.new_full(margin.shape, 0.5), self.beta)


@register
@dataclass(frozen=True, kw_only=True)
class DPOHelpful(Method):
    """DPO on the order of helpfulness; labels are not read."""

    name = "dpo_h"
    title = "DPO-H"
    summary = "DPO on the order of helpfulness"
    paper = "arXiv 2305.18290"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `-log sigmoid(beta h)`."""
        return ranked(margin, chosen_wins(margin), lambda h: logistic(self.beta * h))


@register
@dataclass(frozen=True, kw_only=True)
class DPOSafe(Method):
    """DPO on the order of safety: the safe one wins, pairs of equal labels are dropped."""

    name = "dpo_s"
    title = "DPO-S"
    summary = "DPO on the order of safety; drops pairs of equal labels"
    paper = "arXiv 2305.18290"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `-log sigmoid(beta h)`, h the margin of the safe one."""
        favoured = safer_wins(chosen_is_safe, rejected_is_safe)
        return ranked(margin, favoured, lambda h: logistic(self.beta * h))


@register
@dataclass(frozen=True, kw_only=True)
class DPOMix(Method):
    """DPO on the union of both orders, the naive mix of arXiv 2408.15313.

    Each pair gives its item by helpfulness and, if labels differ, its item by safety. Where the orders conflict (chosen
    unsafe, rejected safe) the items oppose each other: the pair is pulled to margin 0 and favours neither.
    """

    name = "dpo_mix"
    title = "DPO-mix"
    summary = "DPO on the union of both orders"
    paper = "arXiv 2305.18290"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return the sum of the losses of a pair's items."""
        by_help = DPOHelpful(beta=self.beta).loss(margin, chosen_is_safe, rejected_is_safe)
        by_safety = DPOSafe(beta=self.beta).loss(margin, chosen_is_safe, rejected_is_safe)
        return PairLoss(
            loss=by_help.loss + by_safety.loss,
            target=by_help.target,
            favoured=(by_help.favoured + by_safety.favoured).sign(),
            dropped=by_help.dropped,
        )


@register
@dataclass(frozen=True, kw_only=True)
class DPOSafeFirst(Method):
    """DPO after relabelling: equal labels keep the order of helpfulness, else the safe one wins.

    Both-unsafe pairs teach the more helpful of two harmful answers.
    """

    name = "dpo_safe_first"
    title = "DPO safe-first"
    summary = "DPO in which a safe completion beats an unsafe one, helpfulness deciding the rest"
    paper = "arXiv 2305.18290"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `-log sigmoid(beta h)`, h the margin of the winner."""
        return ranked(margin, safe_first(chosen_is_safe, rejected_is_safe), lambda h: logistic(self.beta * h))


@register
@dataclass(frozen=True, kw_only=True)
class SafeDPO(Method):
    """SafeDPO: the safe one wins, by an offset Delta where labels differ; both-unsafe pairs are dropped.

    Pairs with an unsafe chosen and a safe rejected completion are swapped. The paper has beta .1 and Delta 10: at the
    start a mixed pair costs log(1 + e^10).
    """

    name = "safedpo"
    title = "SafeDPO"
    summary = "DPO on relabelled pairs with an offset where labels differ; drops both-unsafe pairs"
    paper = "arXiv 2505.20065"

    safedpo_delta: float = setting(10.0, "SafeDPO's offset in nats of beta x margin", ge=0)

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `-log sigmoid(beta h - Delta [labels differ])`, h the margin of the winner."""
        favoured = safe_one_wins(chosen_is_safe, rejected_is_safe)
        delta = where_mixed(self.safedpo_delta, chosen_is_safe, rejected_is_safe, margin)
        # Minus: a mixed pair costs as much as one whose margin is Delta / beta smaller, until it is wider by that.
        return ranked(margin, favoured, lambda h: logistic(self.beta * h - delta))


@register
@dataclass(frozen=True, kw_only=True)
class BSO(Method):
    """BSO with the logistic generator, relabelled as SafeDPO, to which it is equal at C = Delta.

    log R needs no clamp here: the logarithm is exact at any size, and clamping would take the gradient from the pairs
    that need it most.
    """

    name = "bso"
    title = "BSO"
    summary = "SafeDPO's pairs, logistic generator; drops both-unsafe pairs"
    paper = "arXiv 2605.12339"

    bso_shift: float = setting(30.0, "BSO's safety offset C in nats of beta x margin", ge=0)

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return the generator's loss of `log R = C [labels differ] - beta h`, h the margin of the winner."""
        favoured = safe_one_wins(chosen_is_safe, rejected_is_safe)
        shift = where_mixed(self.bso_shift, chosen_is_safe, rejected_is_safe, margin)
        return ranked(margin, favoured, lambda h: self.generator(shift - self.beta * h))

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Return `log(1 + R)`, which is `-log sigmoid(-log R)`."""
        return logistic(-log_ratio)


@dataclass(frozen=True, kw_only=True)
class _Clamped(BSO):
    """BSO with a generator of powers of R, whose log is clamped.

    Beyond the clamp the gradient is 0, on both sides. A mixed pair starts at log R = C, so at C = 30 on the clamp's
    upper edge, and one whose margin falls below 0 gets no gradient.

    Raises `SettingError` if C is above the clamp, where no mixed pair would ever train, and for a clamp at which the
    loss overflows float32.
    """

    sba_clamp: float = setting(30.0, "bound of BSO-SBA's and BSO-phi's |log R| in nats", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        name, value, power = self._power()
        if power * self.sba_clamp > _LARGEST_EXPONENT:
            raise SettingError(
                f"sba_clamp: got {self.sba_clamp!r} with {name} {value!r}; allowed: "
                f"{power:g} * sba_clamp of at most {_LARGEST_EXPONENT:g}, or the loss overflows float32"
            )
        if self.bso_shift > self.sba_clamp:
            raise SettingError(
                f"bso_shift: got {self.bso_shift!r}; allowed: at most sba_clamp ({self.sba_clamp!r}), "
                "or pairs with one safe completion start beyond the clamp and get no gradient"
            )

    @abstractmethod
    def _power(self) -> tuple[str, float, float]:
        """Return the setting of the generator that its largest power of R comes from: name, value, and the power."""

    @abstractmethod
    def _clamped(self, log_ratio: Tensor) -> Tensor:
        """Return the generator's loss of log R inside the clamp."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Return the generator's loss of log R, clamped."""
        return self._clamped(log_ratio.clamp(-self.sba_clamp, self.sba_clamp))


@register
@dataclass(frozen=True, kw_only=True)
class BSOWithSBA(_Clamped):
    """BSO with the SBA generator.

    Its derivative by log R is `(R^(1+l) + R^(-l)) / s`: positive everywhere, 2/s at R = 1 (at s = 4 that is DPO's). The
    loss is 0 at R = 1 and has no lower bound: as the winner's margin grows it falls like `-R^(-l) / (s l)`, and the
    clamp, |log R| <= 30, ends it at -503 (l = .2, s = 4). A mixed pair at C = 30 starts with loss 9.0e14 and gradient
    1.1e15 beta: clip gradients, and do not read this loss as a measure of progress.
    """

    name = "bso_sba"
    title = "BSO-SBA"
    summary = "SafeDPO's pairs, SBA generator; drops both-unsafe pairs"

    sba_lambda: float = setting(0.2, "BSO-SBA's exponent (its lambda)", gt=0)
    sba_scale: float = setting(4.0, "BSO-SBA's scale (its s)", gt=0)

    def _power(self) -> tuple[str, float, float]:
        return "sba_lambda", self.sba_lambda, 1 + self.sba_lambda

    def _clamped(self, log_ratio: Tensor) -> Tensor:
        """Return `[l R^(1+l) - (1+l) R^(-l) + 1] / (s l (l+1))`."""
        l, s = self.sba_lambda, self.sba_scale  # noqa: E741  # the paper's names
        # expm1 takes the constant in: l - (1 + l) + 1 = 0, so that R = 1 gives exactly 0.
        high = l * ((1 + l) * log_ratio).expm1()
        low = (1 + l) * (-l * log_ratio).expm1()
        return (high - low) / (s * l * (1 + l))


@register
@dataclass(frozen=True, kw_only=True)
class BSOWithPhi(_Clamped):
    """BSO with the generator phi_mu, `(R^(2-mu) - (2-mu) R + 1 - mu) / ((1-mu)(2-mu))`, its authors' default.

    The loss's derivative by log R is `R^(2-mu) + R^(mu-1)`: 2 at R = 1, and towards 0 as the winner's margin grows, so
    that between mu = 1 and 2, the values allowed here, the loss is bounded below, by `-1/((mu-1)(2-mu))`. mu and 3 - mu
    are the same loss; mu = 1 - l would be the SBA generator with exponent l and scale 1, which is not bounded.
    """

    name = "bso_phi"
    title = "BSO-phi"
    summary = "SafeDPO's pairs, generator phi_mu; drops both-unsafe pairs"

    phi_mu: float = setting(1.5, "exponent of BSO-phi's generator (its mu)", gt=1, lt=2)

    def _power(self) -> tuple[str, float, float]:
        return "phi_mu", self.phi_mu, max(2 - self.phi_mu, self.phi_mu - 1)

    def _clamped(self, log_ratio: Tensor) -> Tensor:
        """Return `[(1-mu) R^(2-mu) - (2-mu) R^(mu-1) + 1] / ((1-mu)(2-mu))`."""
        # With a + b = 1 that is (R^a - 1) / a + (R^b - 1) / b.
        a, b = 2 - self.phi_mu, self.phi_mu - 1
        return (a * log_ratio).expm1() / a + (b * log_ratio).expm1() / b


@dataclass(frozen=True, kw_only=True)
class _TwoObjectives(Method):
    """A method that weighs safety against helpfulness."""

    safety_share: float = setting(0.5, "weight of safety in linear_sum and modpo; helpfulness has the rest", ge=0, le=1)


@register
@dataclass(frozen=True, kw_only=True)
class LinearSum(Squared, _TwoObjectives):
    """Squared loss to a linear sum of two targets, one for each objective; a baseline of arXiv 2408.15313.

    Each half is IPO's target for its objective, so the optimum is that of RLHF on the linear sum of the rewards,
    `w * safety + (1 - w) * helpfulness`, as scalarised in MORL, without a reward model. A pair whose target is 0
    favours neither.
    """

    name = "linear_sum"
    title = "linear reward sum"
    summary = "squared loss to the linear sum of a target of safety and one of helpfulness"
    paper = "arXiv 2310.12036"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `(h - target/beta)^2`, target = w (s_c - s_r)/2 + (1 - w)/2, w = `safety_share`."""
        safer = (chosen_is_safe - rejected_is_safe).to(margin.dtype)
        return to_target(margin, self.safety_share * safer / 2 + (1 - self.safety_share) / 2, self.beta)


@register
@dataclass(frozen=True, kw_only=True)
class MODPO(_TwoObjectives):
    """MODPO on the order of helpfulness; labels are not read, safety is in the other model's margin m.

    m is the log-ratio margin of a DPO model trained on safety with the same `beta`, so that `beta m` is its implicit
    reward. Raises `SettingError` for a `safety_share` of 1, where no weight is left for helpfulness.
    """

    name = "modpo"
    title = "MODPO"
    summary = "DPO on the order of helpfulness, less the margin of a model of safety"
    paper = "arXiv 2310.03708"
    shifted = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safety_share == 1:
            raise SettingError(
                "safety_share: got 1; modpo allows a number from 0 to below 1, or nothing is left to learn"
            )

    @property
    def other_share(self) -> float:
        """The weight of the safety model."""
        return self.safety_share

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `-log sigmoid(beta (h - w m) / (1 - w))`, w = `safety_share`; `margin` is h - w m already."""
        scale = self.beta / (1 - self.safety_share)
        return ranked(margin, chosen_wins(margin), lambda h: logistic(scale * h))


@register
@dataclass(frozen=True, kw_only=True)
class RobustDPO(Method):
    """Robust DPO on the order of helpfulness, for labels of which a known share is flipped; it reads no safety labels.

    Its mean over the flips is the DPO loss of the true labels, so it estimates that loss without bias; at `label_noise`
    0 it is `DPOHelpful`. But it is not bounded below: it falls like `-label_noise / (1 - 2 label_noise) beta h` as the
    margin grows.
    """

    name = "robust_dpo"
    title = "robust DPO"
    summary = "DPO on the order of helpfulness, corrected for a known share of flipped labels"
    paper = "arXiv 2403.00409"

    label_noise: float = setting(0.1, "robust DPO's share of pairs whose order is flipped", ge=0, lt=0.5)

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `[(1 - e) l(h) - e l(-h)] / (1 - 2 e)`, l(h) = -log sigmoid(beta h), e = `label_noise`."""
        noise = self.label_noise

        def winner_loss(h: Tensor) -> Tensor:
            # Minus: the share e of flipped pairs has added e l(-h) too much, and e l(h) too little.
            return ((1 - noise) * logistic(self.beta * h) - noise * logistic(-self.beta * h)) / (1 - 2 * noise)

        return ranked(margin, chosen_wins(margin), winner_loss)
