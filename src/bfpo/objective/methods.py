"""The methods of preference training, one class each: its settings, its paper and its loss.

A method maps the margin h of P pairs (chosen minus rejected log-ratio of policy and reference, in nats; chosen = *more
helpful*) and the two labels, as probabilities of being safe, to a `PairLoss`. Methods that need an order of safety call
a completion safe if its label is above 0.5; BFPO is linear in the labels and never thresholds them.

A new method is one class here: `register` it, give it its settings as fields made by `setting`, and write `loss`.
`preference_loss`, the trainer, the YAML keys, sweeps and the report take it from `METHODS`. The formulas are methods of
tensors, and torch is not imported: configs import this module, and reading a config must not take seconds.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bfpo.core.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BFPO",
    "BSO",
    "IPO",
    "METHODS",
    "MODPO",
    "BSOWithSBA",
    "DPOHelpful",
    "DPOMix",
    "DPOSafe",
    "DPOSafeFirst",
    "LinearSum",
    "Method",
    "PairLoss",
    "RobustDPO",
    "SafeDPO",
    "Setting",
    "check_number",
    "get_method",
    "make_method",
    "method_settings",
    "register",
    "setting",
]

# exp((1 + sba_lambda) * sba_clamp) must stay finite in float32, whose largest exponent is just under 89.
_LARGEST_EXPONENT = 88.0


def check_number(
    name: str,
    value: float | str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> float:
    """Return `value` as a float; raise `SettingError` unless it is a finite number within the bounds."""
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (gt is None or value > gt)
        and (ge is None or value >= ge)
        and (lt is None or value < lt)
        and (le is None or value <= le)
    ):
        return float(value)
    low = f"above {gt:g}" if gt is not None else f"from {ge:g}" if ge is not None else ""
    high = f"below {lt:g}" if lt is not None else f"{le:g}" if le is not None else ""
    if low and high:
        words = f"a number {low} to {high}"
    elif high:
        words = f"a finite number {high}" if lt is not None else f"a finite number of at most {high}"
    else:
        words = f"a finite number {low.replace('from', 'of at least')}".rstrip()
    raise SettingError(f"{name}: got {value!r}; allowed: {words}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a method: its default, what it means, and what is allowed.

    A number has `bounds` by the names `gt`, `ge`, `lt`, `le`; a word is one of `choices`.
    """

    default: float | str
    description: str
    bounds: Mapping[str, float]
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: float | str) -> None:
        """Raise `SettingError` unless the value is allowed."""
        if not self.choices:
            check_number(name, value, **self.bounds)
        elif value not in self.choices:
            raise SettingError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, self.choices))}")


def setting(default: float | str, description: str, *, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """Return the field of a method's class that is one of its settings; see `Setting`."""
    return field(default=default, metadata={"setting": Setting(default, description, bounds, choices)})


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of P pairs by a method, and what it did to them; every field is (P,).

    `loss`: 0 where dropped; carries the gradient. `target`: what `beta * margin` is pulled to, NaN if the method has no
    target. `favoured`: int8, +1 the chosen (more helpful) completion is pushed up against the other, -1 the rejected
    one, 0 neither. `dropped`: bool, the method does not use the pair. The mean over pairs counts a dropped pair as 0,
    so that accumulation and sharding change nothing.
    """

    loss: Tensor
    target: Tensor
    favoured: Tensor
    dropped: Tensor

    @property
    def swapped(self) -> Tensor:
        """(P,) bool: the pair is trained against the order of helpfulness, by relabelling or by a target below 0."""
        return self.favoured < 0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method with its settings; a subclass is one method, its fields are its settings.

    `name`: in configs, run folders and `METHODS`. `title`: in tables and reports. `summary`: in a sentence. `paper`:
    where the loss is from. `shifted`: the margin of another model is subtracted from h.

    Raises `SettingError` for a setting outside its bounds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    shifted: ClassVar[bool] = False

    beta: float = setting(
        0.01, "KL coefficient (the paper's tau): a squared loss asks for |target| / beta nats an answer", gt=0
    )

    def __post_init__(self) -> None:
        for name, each in self.settings().items():
            each.check(name, getattr(self, name))

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Return the settings of this method by name."""
        return {each.name: each.metadata["setting"] for each in fields(cls)}

    @property
    def squared(self) -> bool:
        """Whether the loss is a square of the distance to `target / beta`, so that it grows as 1/beta^2.

        The losses of other methods are functions of `beta * h` alone.
        """
        return False

    @property
    def normaliser(self) -> float:
        """What the loss is multiplied by to become a function of `beta * margin` alone: beta^2 or 1."""
        return self.beta**2 if self.squared else 1.0

    @property
    def other_share(self) -> float:
        """What the other model's margin is multiplied by before `preference_loss` subtracts it from h."""
        return 0.0

    @abstractmethod
    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return the loss of P pairs with what the method did to each.

        All (P,): `margin` h in nats, in float32 or float64; the labels checked, in floating point.
        """


@dataclass(frozen=True, kw_only=True)
class _Squared(Method):
    """A method whose loss is `(h - target / beta)^2`."""

    @property
    def squared(self) -> bool:
        """Yes."""
        return True


METHODS: dict[str, type[Method]] = {}
"""The class of every method by its name."""

MethodT = TypeVar("MethodT", bound=Method)


def register(method: type[MethodT]) -> type[MethodT]:
    """Put a method's class into `METHODS`; a decorator, above that of the dataclass."""
    METHODS[method.name] = method
    return method


def method_settings() -> dict[str, Setting]:
    """Return the settings of all methods by name; one that several share is the same in all of them."""
    return {name: each for method in METHODS.values() for name, each in method.settings().items()}


def get_method(name: str) -> type[Method]:
    """Return the class of the method of this name; raise `SettingError` with the nearest names if there is none."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name), METHODS, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise SettingError(f"method: got {name!r}; allowed: {', '.join(METHODS)}{hint}")


def make_method(method: str | Method, **settings: float | str) -> Method:
    """Return the method of this name with these settings, the others at their defaults; an object as it is.

    Raises `SettingError` for an unknown name, a setting that the method does not have or that is outside its bounds,
    and for settings given with an object, which has its own.
    """
    if isinstance(method, Method):
        if settings:
            raise SettingError(f"{', '.join(settings)}: the method is an object, {method!r}; set it there")
        return method
    made = get_method(method)
    _refuse_foreign(made, settings.keys() - made.settings().keys())
    return made(**settings)  # type: ignore[arg-type]  # each value is checked by its setting


def _refuse_foreign(method: type[Method], names: Collection[str]) -> None:
    if not names:
        return
    owners = [each.name for each in METHODS.values() if each.settings().keys() >= set(names)]
    remedy = f"choose a method that has it ({', '.join(owners) or 'none has them all'})"
    if unknown := sorted(names - method_settings().keys()):
        names, remedy = unknown, f"use one of its settings: {', '.join(method.settings())}"
    raise SettingError(
        f"{', '.join(sorted(names))}: not a setting of the method {method.name!r}; leave it out, or {remedy}"
    )


def _to_target(margin: Tensor, target: Tensor, beta: float, link: str = "squared") -> PairLoss:
    """Return the loss of a margin by its target, whose sign says who is favoured; see `BFPO` for the links."""
    target = target.to(dtype=margin.dtype, device=margin.device)
    favoured = target.sign()
    missing = target / beta - margin
    if link == "logistic":
        loss = target.abs() * _logistic(beta * favoured * margin)
        target = target.new_full(target.shape, float("nan"))  # it is a weight here: nothing is pulled to it
    else:
        loss = ((favoured * missing).relu() if link == "one_sided" else missing) ** 2
    return PairLoss(loss=loss, target=target, favoured=favoured.char(), dropped=target.new_zeros(target.shape).bool())


def _ranked(margin: Tensor, favoured: Tensor, winner_loss: Callable[[Tensor], Tensor]) -> PairLoss:
    """Apply `winner_loss` to the margin of the favoured completion over the other, which is the sign of `favoured` x h.

    `favoured` (P,) of -1, 0, +1; 0 means dropped.
    """
    favoured = favoured.char()  # int8
    dropped = favoured == 0
    # Masked before and after: the gradient of a dropped pair is 0 even where its margin is not finite (0 x NaN is NaN).
    winner_margin = margin.masked_fill(dropped, 0.0) * favoured.to(margin.dtype)
    return PairLoss(
        loss=winner_loss(winner_margin).masked_fill(dropped, 0.0),
        target=margin.new_full(margin.shape, float("nan")),
        favoured=favoured,
        dropped=dropped,
    )


def _logistic(x: Tensor) -> Tensor:
    """Return `-log sigmoid(x) = log(e^0 + e^-x)`, exact where e^-x overflows or vanishes, with its gradient at 0."""
    return x.new_zeros(()).logaddexp(-x)


def _chosen_wins(margin: Tensor) -> Tensor:
    return margin.new_ones(margin.shape).char()


def _safer_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """+1 only the chosen one is safe, -1 only the rejected one, 0 equal labels."""
    return (chosen_is_safe > 0.5).char() - (rejected_is_safe > 0.5).char()


def _safe_one_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """SafeDPO's relabelling: +1 chosen safe, -1 only the rejected one safe, 0 (dropped) both unsafe."""
    chosen, rejected = chosen_is_safe > 0.5, rejected_is_safe > 0.5
    return chosen.char() - (rejected & ~chosen).char()


def _where_mixed(shift: float, chosen_is_safe: Tensor, rejected_is_safe: Tensor, margin: Tensor) -> Tensor:
    """Return the shift where one completion is safe and the other is not, else 0."""
    return ((chosen_is_safe > 0.5) != (rejected_is_safe > 0.5)).to(margin.dtype) * shift


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
        return _to_target(margin, self.target(chosen_is_safe, rejected_is_safe), self.beta, self.link)


@register
@dataclass(frozen=True, kw_only=True)
class IPO(_Squared):
    """IPO, equation 17 of its paper; labels are not read.

    The margin is of summed log-probs, as in the equation; some implementations take per-token means.
    """

    name = "ipo"
    title = "IPO"
    summary = "squared loss to 1/2 on the order of helpfulness"
    paper = "arXiv 2310.12036"

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return `(h - 1/(2 beta))^2`, that is target 1/2."""
        return _to_target(margin, margin.new_full(margin.shape, 0.5), self.beta)


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
        return _ranked(margin, _chosen_wins(margin), lambda h: _logistic(self.beta * h))


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
        favoured = _safer_wins(chosen_is_safe, rejected_is_safe)
        return _ranked(margin, favoured, lambda h: _logistic(self.beta * h))


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
        by_safety = _safer_wins(chosen_is_safe, rejected_is_safe)
        favoured = by_safety + (by_safety == 0).char()
        return _ranked(margin, favoured, lambda h: _logistic(self.beta * h))


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
        favoured = _safe_one_wins(chosen_is_safe, rejected_is_safe)
        delta = _where_mixed(self.safedpo_delta, chosen_is_safe, rejected_is_safe, margin)
        # Minus: a mixed pair costs as much as one whose margin is Delta / beta smaller, until it is wider by that.
        return _ranked(margin, favoured, lambda h: _logistic(self.beta * h - delta))


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
        favoured = _safe_one_wins(chosen_is_safe, rejected_is_safe)
        shift = _where_mixed(self.bso_shift, chosen_is_safe, rejected_is_safe, margin)
        return _ranked(margin, favoured, lambda h: self.generator(shift - self.beta * h))

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Return `log(1 + R)`, which is `-log sigmoid(-log R)`."""
        return _logistic(-log_ratio)


@register
@dataclass(frozen=True, kw_only=True)
class BSOWithSBA(BSO):
    """BSO with the SBA generator.

    Its derivative by log R is `(R^(1+l) + R^(-l)) / s`: positive everywhere, 2/s at R = 1 (at s = 4 that is DPO's). The
    loss is 0 at R = 1 and has no lower bound: as the winner's margin grows it falls like `-R^(-l) / (s l)`, and the
    clamp, |log R| <= 30, ends it at -503 (l = .2, s = 4). Beyond the clamp the gradient is 0, on both sides. So a mixed
    pair at C = 30 starts on the clamp's upper edge, with loss 9.0e14 and gradient 1.1e15 beta, and one whose margin
    falls below 0 gets no gradient: clip gradients, and do not read this loss as a measure of progress.

    Raises `SettingError` if C is above the clamp, where no mixed pair would ever train, and for a clamp at which the
    loss overflows float32.
    """

    name = "bso_sba"
    title = "BSO-SBA"
    summary = "SafeDPO's pairs, SBA generator; drops both-unsafe pairs"

    sba_lambda: float = setting(0.2, "BSO-SBA's exponent (its lambda)", gt=0)
    sba_scale: float = setting(4.0, "BSO-SBA's scale (its s)", gt=0)
    sba_clamp: float = setting(30.0, "bound of BSO-SBA's |log R| in nats", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (1 + self.sba_lambda) * self.sba_clamp > _LARGEST_EXPONENT:
            raise SettingError(
                f"sba_clamp: got {self.sba_clamp!r} with sba_lambda {self.sba_lambda!r}; allowed: "
                f"(1 + sba_lambda) * sba_clamp of at most {_LARGEST_EXPONENT:g}, or the loss overflows float32"
            )
        if self.bso_shift > self.sba_clamp:
            raise SettingError(
                f"bso_shift: got {self.bso_shift!r}; allowed: at most sba_clamp ({self.sba_clamp!r}), "
                "or pairs with one safe completion start beyond the clamp and get no gradient"
            )

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Return `[l R^(1+l) - (1+l) R^(-l) + 1] / (s l (l+1))` with log R clamped."""
        l, s = self.sba_lambda, self.sba_scale  # noqa: E741  # the paper's names
        log_ratio = log_ratio.clamp(-self.sba_clamp, self.sba_clamp)
        # expm1 takes the constant in: l - (1 + l) + 1 = 0, so that R = 1 gives exactly 0.
        high = l * ((1 + l) * log_ratio).expm1()
        low = (1 + l) * (-l * log_ratio).expm1()
        return (high - low) / (s * l * (1 + l))


@dataclass(frozen=True, kw_only=True)
class _TwoObjectives(Method):
    """A method that weighs safety against helpfulness."""

    safety_share: float = setting(0.5, "weight of safety in linear_sum and modpo; helpfulness has the rest", ge=0, le=1)


@register
@dataclass(frozen=True, kw_only=True)
class LinearSum(_Squared, _TwoObjectives):
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
        return _to_target(margin, self.safety_share * safer / 2 + (1 - self.safety_share) / 2, self.beta)


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
        return _ranked(margin, _chosen_wins(margin), lambda h: _logistic(scale * h))


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
            return ((1 - noise) * _logistic(self.beta * h) - noise * _logistic(-self.beta * h)) / (1 - 2 * noise)

        return _ranked(margin, _chosen_wins(margin), winner_loss)
