"""The table of methods: one pure function and one row each, all on the same inputs.

Every function takes the margin `h` of P pairs (chosen minus rejected log-ratio, in nats; chosen = *more helpful*), the
two labels as probabilities of being safe, and the settings, and returns a `PairLoss`. Methods that need an order of
safety call a completion safe if its label is above 0.5; BFPO is linear in the labels and never thresholds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo.core.errors import SettingError
from bfpo.objective.targets import bfpo_target, check_safety_weight, require_finite, require_positive

__all__ = ["METHODS", "LossFunction", "LossSettings", "Method", "PairLoss"]

# exp((1 + sba_lambda) * sba_clamp) must stay finite in float32, whose largest exponent is just under 89.
_LARGEST_EXPONENT = 88.0


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The settings of all methods, validated; `Method.reads` says which of them a method reads.

    `beta`: KL coefficient (the paper's tau). `alpha`, `safety_weight` (B1): BFPO's. `safedpo_delta`: SafeDPO's offset
    of `beta * margin` on a mixed pair. `bso_shift`: the same for BSO (its C). `sba_lambda`, `sba_scale`, `sba_clamp`:
    the SBA generator's l and s, and the bound of |log R|. `safety_share`: weight of safety in a linear sum of the two
    objectives, that of helpfulness being 1 minus it.

    Raises `SettingError` for a value outside its range.
    """

    beta: float
    alpha: float = 0.5
    safety_weight: float = 3.0
    safedpo_delta: float = 10.0
    bso_shift: float = 30.0
    sba_lambda: float = 0.2
    sba_scale: float = 4.0
    sba_clamp: float = 30.0
    safety_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("beta", "sba_lambda", "sba_scale", "sba_clamp"):
            require_positive(name, getattr(self, name))
        require_finite("alpha", self.alpha)
        check_safety_weight(self.safety_weight)
        for name in ("safedpo_delta", "bso_shift"):
            if require_finite(name, getattr(self, name)) < 0:
                raise SettingError(f"{name}: got {getattr(self, name)!r}; allowed: a finite number of at least 0")
        if not 0 <= require_finite("safety_share", self.safety_share) <= 1:
            raise SettingError(f"safety_share: got {self.safety_share!r}; allowed: a number from 0 to 1")
        if (1 + self.sba_lambda) * self.sba_clamp > _LARGEST_EXPONENT:
            raise SettingError(
                f"sba_clamp: got {self.sba_clamp!r} with sba_lambda {self.sba_lambda!r}; allowed: "
                f"(1 + sba_lambda) * sba_clamp of at most {_LARGEST_EXPONENT:g}, or the loss overflows float32"
            )


@dataclass(frozen=True, slots=True)
class PairLoss:
    """What a method says about P pairs; every field is (P,).

    `loss`: 0 where dropped; carries the gradient. `target`: what `beta * margin` is pulled to, NaN where the method
    has no target. `favoured`: int8, +1 the chosen (more helpful) completion is pushed up against the other, -1 the
    rejected one, 0 neither. `dropped`: bool, the method does not use the pair. The mean over pairs counts a dropped
    pair as 0, so that accumulation and sharding change nothing.
    """

    loss: Tensor
    target: Tensor
    favoured: Tensor
    dropped: Tensor

    @property
    def swapped(self) -> Tensor:
        """(P,) bool: the pair is trained against the order of helpfulness, by relabelling or by a target below 0."""
        return self.favoured < 0


LossFunction = Callable[[Tensor, Tensor, Tensor, LossSettings], PairLoss]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: a method's name, its function, and what others need to know of it.

    `reads`: the names of the settings that its loss depends on. `squared`: the loss is `(h - target/beta)^2`, so it
    has a target and grows as 1/beta^2; the others are functions of `beta * h` alone. `shifted`: `h` reaches the
    function less `safety_share` times the margin of another model. `source`: the paper.
    """

    name: str
    summary: str
    source: str
    function: LossFunction
    reads: frozenset[str] = field(default_factory=lambda: frozenset({"beta"}))
    squared: bool = False
    shifted: bool = False

    @property
    def has_target(self) -> bool:
        """Whether `beta * margin` is pulled to a finite value, which `PairLoss.target` then holds."""
        return self.squared

    def normaliser(self, beta: float) -> float:
        """Return what the loss is multiplied by to become a function of `beta * margin` alone: beta^2 or 1."""
        return require_positive("beta", beta) ** 2 if self.squared else 1.0


def _bits(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> tuple[Tensor, Tensor]:
    return chosen_is_safe > 0.5, rejected_is_safe > 0.5


def _squared(margin: Tensor, target: Tensor, beta: float) -> PairLoss:
    target = target.to(dtype=margin.dtype, device=margin.device)
    return PairLoss(
        loss=(margin - target / beta) ** 2,
        target=target,
        favoured=target.sign().to(torch.int8),
        dropped=torch.zeros_like(target, dtype=torch.bool),
    )


def _without_target(margin: Tensor, favoured: Tensor, per_pair: Callable[[Tensor], Tensor]) -> PairLoss:
    """Apply `per_pair` to the margin of the favoured completion over the other; `favoured` 0 means dropped."""
    favoured = favoured.to(torch.int8)
    dropped = favoured == 0
    # Both sides of the choice are kept finite: the gradient of a dropped pair is 0 even where its margin is not finite.
    winner_margin = torch.where(dropped, torch.zeros_like(margin), margin) * favoured.to(margin.dtype)
    loss = per_pair(winner_margin)
    return PairLoss(
        loss=torch.where(dropped, torch.zeros_like(loss), loss),
        target=torch.full_like(margin, float("nan"), requires_grad=False),
        favoured=favoured,
        dropped=dropped,
    )


def _chosen_wins(margin: Tensor) -> Tensor:
    return torch.ones_like(margin, dtype=torch.int8, requires_grad=False)


def _safer_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    chosen, rejected = _bits(chosen_is_safe, rejected_is_safe)
    return chosen.to(torch.int8) - rejected.to(torch.int8)


def _safe_one_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """SafeDPO's relabelling: +1 chosen safe, -1 only the rejected one safe, 0 (dropped) both unsafe."""
    chosen, rejected = _bits(chosen_is_safe, rejected_is_safe)
    return torch.where(chosen, 1, torch.where(rejected, -1, 0)).to(torch.int8)


def _shift_where_mixed(chosen_is_safe: Tensor, rejected_is_safe: Tensor, shift: float, margin: Tensor) -> Tensor:
    chosen, rejected = _bits(chosen_is_safe, rejected_is_safe)
    return (chosen != rejected).to(margin.dtype) * shift


def _bfpo(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """BFPO: `(h - target/beta)^2`, target = B3 (B1 s_c - s_r) - alpha. Source: arXiv 2408.15313.

    Drops nothing. At alpha = 1/2 a pair with an unsafe chosen completion has a negative target: it is reversed.
    """
    target = bfpo_target(chosen_is_safe, rejected_is_safe, alpha=settings.alpha, safety_weight=settings.safety_weight)
    return _squared(margin, target, settings.beta)


def _ipo(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """IPO: `(h - 1/(2 beta))^2`, that is target 1/2; labels are not read. Source: arXiv 2310.12036, equation 17.

    `h` is of summed log-probs here, as in the equation; some implementations take per-token means.
    """
    return _squared(margin, torch.full_like(margin, 0.5, requires_grad=False), settings.beta)


def _dpo_h(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """DPO on the order of helpfulness: `-log sigmoid(beta h)`; labels are not read. Source: arXiv 2305.18290."""
    return _without_target(margin, _chosen_wins(margin), lambda h: -logsigmoid(settings.beta * h))


def _dpo_s(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """DPO on the order of safety: the safe one wins, pairs of equal labels are dropped. Source: arXiv 2305.18290."""
    favoured = _safer_wins(chosen_is_safe, rejected_is_safe)
    return _without_target(margin, favoured, lambda h: -logsigmoid(settings.beta * h))


def _dpo_mix(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """DPO on the union of both orders: each pair's item by helpfulness and, if labels differ, its item by safety.

    The loss of a pair is the sum of its items; where the orders conflict (chosen unsafe, rejected safe) they oppose
    each other: the pair is pulled to margin 0 and favours none. Source: arXiv 2305.18290, the mix of arXiv 2408.15313.
    """
    by_help = _dpo_h(margin, chosen_is_safe, rejected_is_safe, settings)
    by_safety = _dpo_s(margin, chosen_is_safe, rejected_is_safe, settings)
    return PairLoss(
        loss=by_help.loss + by_safety.loss,
        target=by_help.target,
        favoured=(by_help.favoured + by_safety.favoured).sign(),
        dropped=by_help.dropped,
    )


def _dpo_safe_first(
    margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings
) -> PairLoss:
    """DPO after relabelling: equal labels keep the order of helpfulness, else the safe one wins.

    Source: arXiv 2305.18290 for the loss. Both-unsafe pairs teach the more helpful of two harmful answers.
    """
    by_safety = _safer_wins(chosen_is_safe, rejected_is_safe)
    favoured = torch.where(by_safety == 0, _chosen_wins(margin), by_safety)
    return _without_target(margin, favoured, lambda h: -logsigmoid(settings.beta * h))


def _safedpo(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """SafeDPO: `-log sigmoid(beta h - Delta)` on pairs of one safe and one unsafe, without Delta on both-safe ones.

    `h` is the safe winner's margin: pairs with an unsafe chosen and a safe rejected completion are swapped, both-unsafe
    ones dropped. Source: arXiv 2505.20065 (beta .1, Delta 10). At the start a mixed pair costs log(1 + e^Delta).
    """
    favoured = _safe_one_wins(chosen_is_safe, rejected_is_safe)
    delta = _shift_where_mixed(chosen_is_safe, rejected_is_safe, settings.safedpo_delta, margin)
    return _without_target(margin, favoured, lambda h: -logsigmoid(settings.beta * h - delta))


def _bso(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """BSO with the logistic generator: `log(1 + R)`, `log R = C [labels differ] - beta h`. Source: arXiv 2605.12339.

    Relabelled as SafeDPO, to which it is equal at C = Delta. log R needs no clamp here: the logarithm is exact at any
    size, and clamping would take the gradient from the pairs that need it most.
    """
    favoured = _safe_one_wins(chosen_is_safe, rejected_is_safe)
    shift = _shift_where_mixed(chosen_is_safe, rejected_is_safe, settings.bso_shift, margin)
    return _without_target(margin, favoured, lambda h: -logsigmoid(settings.beta * h - shift))


def _bso_sba(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """BSO with the SBA generator: `[l R^(1+l) - (1+l) R^(-l) + 1] / (s l (l+1))`, log R as in `_bso`, clamped.

    Its derivative by log R is `(R^(1+l) + R^(-l)) / s`: positive everywhere, 2/s at R = 1 (at s = 4 that is DPO's). The
    loss is 0 at R = 1 and has no lower bound: as the winner's margin grows it falls like `-R^(-l) / (s l)`, and it is
    the clamp, |log R| <= 30, that ends it at -503 (l = .2, s = 4). Beyond the clamp the gradient is 0, on both sides.
    So at C = 30 a mixed pair starts on the clamp's upper edge, with loss 9.0e14 and gradient 1.1e15 beta, and one whose
    margin falls below 0 gets no gradient: clip gradients, and do not read this loss as a measure of progress.

    Source: arXiv 2605.12339 (l = .2, s = 4, C = 30). Raises `SettingError` if C is above the clamp, where no mixed pair
    would ever train.
    """
    if settings.bso_shift > settings.sba_clamp:
        raise SettingError(
            f"bso_shift: got {settings.bso_shift!r}; allowed: at most sba_clamp ({settings.sba_clamp!r}), "
            "or pairs with one safe completion start beyond the clamp and get no gradient"
        )
    favoured = _safe_one_wins(chosen_is_safe, rejected_is_safe)
    shift = _shift_where_mixed(chosen_is_safe, rejected_is_safe, settings.bso_shift, margin)
    lam, scale, clamp = settings.sba_lambda, settings.sba_scale, settings.sba_clamp

    def per_pair(winner_margin: Tensor) -> Tensor:
        log_ratio = (shift - settings.beta * winner_margin).clamp(-clamp, clamp)
        # expm1 takes the constant in: l - (1 + l) + 1 = 0, so that R = 1 gives exactly 0.
        high = lam * torch.expm1((1 + lam) * log_ratio)
        low = (1 + lam) * torch.expm1(-lam * log_ratio)
        return (high - low) / (scale * lam * (1 + lam))

    return _without_target(margin, favoured, per_pair)


def _linear_sum(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """Squared loss to a linear sum of two targets: `w (s_c - s_r)/2 + (1 - w)/2`, w = `safety_share`.

    Each half is IPO's target for its objective, so the optimum is that of RLHF on the linear sum of the two rewards,
    w x safety + (1 - w) x helpfulness: what MORL scalarises, without a reward model. A pair whose target is 0 favours
    none. Source: arXiv 2310.12036 for the loss; the linear sum that arXiv 2408.15313 compares with.
    """
    safer = (chosen_is_safe - rejected_is_safe).to(margin.dtype)
    share = settings.safety_share
    return _squared(margin, share * safer / 2 + (1 - share) / 2, settings.beta)


def _modpo(margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, settings: LossSettings) -> PairLoss:
    """MODPO on the order of helpfulness: `-log sigmoid(beta (h - w m) / (1 - w))`, w = `safety_share`.

    `m` is the log-ratio margin of a DPO model of safety, trained with the same `beta`, so that `beta m` is its implicit
    reward; `h - w m` is what comes in here as `margin`. Labels are not read: safety is in `m`.
    Source: arXiv 2310.03708.

    Raises `SettingError` for a `safety_share` of 1, where no weight is left for helpfulness.
    """
    if settings.safety_share == 1:
        raise SettingError("safety_share: got 1; modpo allows a number from 0 to below 1, or nothing is left to learn")
    scale = settings.beta / (1 - settings.safety_share)
    return _without_target(margin, _chosen_wins(margin), lambda h: -logsigmoid(scale * h))


_SHIFTED = frozenset({"beta", "bso_shift"})

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "bfpo",
            "squared loss to a target from both safety labels; reverses pairs whose chosen completion is unsafe",
            "arXiv 2408.15313",
            _bfpo,
            frozenset({"beta", "alpha", "safety_weight"}),
            squared=True,
        ),
        Method("ipo", "squared loss to 1/2 on the order of helpfulness", "arXiv 2310.12036", _ipo, squared=True),
        Method("dpo_h", "DPO on the order of helpfulness", "arXiv 2305.18290", _dpo_h),
        Method("dpo_s", "DPO on the order of safety; drops pairs of equal labels", "arXiv 2305.18290", _dpo_s),
        Method("dpo_mix", "DPO on the union of both orders", "arXiv 2305.18290", _dpo_mix),
        Method(
            "dpo_safe_first",
            "DPO in which a safe completion beats an unsafe one, helpfulness deciding the rest",
            "arXiv 2305.18290",
            _dpo_safe_first,
        ),
        Method(
            "safedpo",
            "DPO on relabelled pairs with an offset where labels differ; drops both-unsafe pairs",
            "arXiv 2505.20065",
            _safedpo,
            frozenset({"beta", "safedpo_delta"}),
        ),
        Method(
            "bso", "SafeDPO's pairs, logistic generator; drops both-unsafe pairs", "arXiv 2605.12339", _bso, _SHIFTED
        ),
        Method(
            "bso_sba",
            "SafeDPO's pairs, SBA generator; drops both-unsafe pairs",
            "arXiv 2605.12339",
            _bso_sba,
            _SHIFTED | {"sba_lambda", "sba_scale", "sba_clamp"},
        ),
        Method(
            "linear_sum",
            "squared loss to the linear sum of a target of safety and one of helpfulness",
            "arXiv 2310.12036",
            _linear_sum,
            frozenset({"beta", "safety_share"}),
            squared=True,
        ),
        Method(
            "modpo",
            "DPO on the order of helpfulness, less the margin of a model of safety",
            "arXiv 2310.03708",
            _modpo,
            frozenset({"beta", "safety_share"}),
            shifted=True,
        ),
    )
}
