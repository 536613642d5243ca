"""What the methods of preference training are made of: their class, their settings, their registry, and common losses.

A method maps the margin h of P pairs (chosen minus rejected log-ratio of policy and reference, in nats; chosen = *more
helpful*) and the two labels, as probabilities of being safe, to a `PairLoss`. Methods that need an order of safety call
a completion safe if its label is above 0.5; BFPO is linear in the labels and never thresholds them. What a method reads
besides, it names in `reads`, and gets it in a `Beside`.

A new method is one class: `register` it, give it its settings as fields made by `setting`, and write `loss`.
`preference_loss`, the trainer, the YAML keys, sweeps and the report take it from `METHODS`. The formulas are methods of
tensors, and torch is not imported: configs import this module, and reading a config must not take seconds.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from bfpo.core.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "METHODS",
    "Beside",
    "Method",
    "PairLoss",
    "ReadsBeside",
    "Setting",
    "Squared",
    "check_number",
    "chosen_wins",
    "get_method",
    "logistic",
    "make_method",
    "method_settings",
    "ranked",
    "register",
    "safe_first",
    "safe_one_wins",
    "safer_wins",
    "setting",
    "sums_by_group",
    "to_target",
    "where_mixed",
]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What some methods read of P pairs besides margin and labels; rows are the chosen and the rejected completions.

    `drift` (2, P): log-ratio of policy and reference in nats, with the gradient. `reference` (2, P): log-prob under the
    reference. `information` (2, P): `log pi_ref(y | x) - log pi_ref(y)` per token. `mean_logps` (2, P): the policy's
    log-prob per token, without gradient. `present` (2, P) bool: false for the side that an unpaired answer lacks.
    `balance` (2, P): how many pairs the stream has for each of its desirable (row 0) and undesirable answers (row 1).
    `group` (P,) int64: the entry of `state` (S,) that a pair belongs to, by `Method.state_by`.
    """

    drift: Tensor
    reference: Tensor
    information: Tensor
    mean_logps: Tensor
    present: Tensor
    balance: Tensor
    group: Tensor
    state: Tensor

    @classmethod
    def at_rest(cls, margin: Tensor, states: int = 2) -> Beside:
        """Return what is read where the policy is the reference and nothing else is known, for a margin (P,)."""
        zeros = margin.detach().new_zeros(2, *margin.shape)
        return cls(
            drift=zeros, reference=zeros, information=zeros, mean_logps=zeros, present=zeros == 0,
            balance=zeros + 1, group=zeros[0].long(), state=zeros.new_zeros(states),
        )  # fmt: skip

    def at(self, drift: Tensor, *, reset: bool = False) -> Beside:
        """Return the same with another drift; `reset`: with a state of zeros, too."""
        return replace(self, drift=drift, state=self.state.new_zeros(self.state.shape) if reset else self.state)

    def to(self, like: Tensor) -> Beside:
        """Return the same with numbers in the dtype of `like`, on its device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {
            name: value.to(device=like.device, dtype=like.dtype if value.is_floating_point() else None)
            for name, value in values.items()
        }
        return Beside(**moved)

    @property
    def of_state(self) -> Tensor:
        """The state of each pair's group, (P,)."""
        return self.state[self.group]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method with its settings; a subclass is one method, its fields are its settings.

    `name`: in configs, run folders and `METHODS`. `title`: in tables and reports. `summary`: in a sentence. `paper`:
    where the loss is from. `shifted`: the margin of another model is subtracted from h. `reads`: fields of `Beside`
    that the loss reads. `pointwise`: it takes each answer by itself, so that answers without a pair will do.

    Raises `SettingError` for a setting outside its bounds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    shifted: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    pointwise: ClassVar[bool] = False

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

    def at_rest(self, margin: Tensor) -> Beside | None:
        """Return `Beside.at_rest` of a margin (P,) for a method that reads it, `None` for others."""
        return Beside.at_rest(margin) if self.reads else None

    @abstractmethod
    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Return the loss of P pairs with what the method did to each.

        All (P,): `margin` h in nats, in float32 or float64; the labels checked, in floating point.
        """


@dataclass(frozen=True, kw_only=True)
class Squared(Method):
    """A method whose loss is `(h - target / beta)^2`."""

    @property
    def squared(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, kw_only=True)
class ReadsBeside(Method):
    """A method whose loss reads a `Beside`, and that may hold a state from one optimizer step to the next.

    `companion`: pairs made of those of the data whose log-probs are needed too. "unprompted": the same completions
    after the token that unconditional text starts from; "mismatched": the completions of another pair of the data
    after this pair's prompt. `state_by`: what the state has one entry for, a "category" or a "stream" (main, buffer);
    "" is a method without state. A state of zeros is that of the start.
    """

    companion: ClassVar[Literal["", "unprompted", "mismatched"]] = ""
    state_by: ClassVar[Literal["", "category", "stream"]] = ""
    starts_known: ClassVar[bool] = True
    """Whether the labels alone imply the loss at the start."""

    def loss(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> PairLoss:
        """Raise `SettingError`: a margin and labels are not enough."""
        raise SettingError(
            f"beside: got none; the method {self.name!r} reads {', '.join(self.reads)}, so `preference_loss` needs it"
        )

    @abstractmethod
    def loss_beside(self, margin: Tensor, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> PairLoss:
        """Return what `loss` returns, with what is read beside the margin."""

    def observe(self, chosen_is_safe: Tensor, rejected_is_safe: Tensor, beside: Beside) -> Tensor:
        """Return sums over these pairs from which the next state is made, (S, 2) float64; they add up over a step."""
        raise NotImplementedError

    def next_state(self, state: Tensor, sums: Tensor) -> Tensor:
        """Return the state after a step, (S,), from the one before and the sums of `observe` over the step."""
        raise NotImplementedError


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


def to_target(margin: Tensor, target: Tensor, beta: float, link: str = "squared") -> PairLoss:
    """Return the loss of a margin by its target, whose sign says who is favoured; see `BFPO` for the links."""
    target = target.to(dtype=margin.dtype, device=margin.device)
    favoured = target.sign()
    missing = target / beta - margin
    if link == "logistic":
        loss = target.abs() * logistic(beta * favoured * margin)
        target = target.new_full(target.shape, float("nan"))  # it is a weight here: nothing is pulled to it
    else:
        loss = ((favoured * missing).relu() if link == "one_sided" else missing) ** 2
    return PairLoss(loss=loss, target=target, favoured=favoured.char(), dropped=target.new_zeros(target.shape).bool())


def ranked(margin: Tensor, favoured: Tensor, winner_loss: Callable[[Tensor], Tensor]) -> PairLoss:
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


def logistic(x: Tensor) -> Tensor:
    """Return `-log sigmoid(x) = log(e^0 + e^-x)`, exact where e^-x overflows or vanishes, with its gradient at 0."""
    return x.new_zeros(()).logaddexp(-x)


def chosen_wins(margin: Tensor) -> Tensor:
    """+1 for every pair."""
    return margin.new_ones(margin.shape).char()


def safer_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """+1 only the chosen one is safe, -1 only the rejected one, 0 equal labels."""
    return (chosen_is_safe > 0.5).char() - (rejected_is_safe > 0.5).char()


def safe_one_wins(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """SafeDPO's relabelling: +1 chosen safe, -1 only the rejected one safe, 0 (dropped) both unsafe."""
    chosen, rejected = chosen_is_safe > 0.5, rejected_is_safe > 0.5
    return chosen.char() - (rejected & ~chosen).char()


def safe_first(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """DPO safe-first's relabelling: +1 the chosen one, -1 only the rejected one is safe."""
    by_safety = safer_wins(chosen_is_safe, rejected_is_safe)
    return by_safety + (by_safety == 0).char()


def where_mixed(shift: float, chosen_is_safe: Tensor, rejected_is_safe: Tensor, margin: Tensor) -> Tensor:
    """Return the shift where one completion is safe and the other is not, else 0."""
    return ((chosen_is_safe > 0.5) != (rejected_is_safe > 0.5)).to(margin.dtype) * shift


def sums_by_group(beside: Beside, values: Tensor, counts: Tensor) -> Tensor:
    """Return the sums of values and of counts, (P,) each, by group, (S, 2) float64."""
    sums = beside.state.double().new_zeros(2, len(beside.state))
    sums[0].index_add_(0, beside.group, values.double())
    sums[1].index_add_(0, beside.group, counts.double())
    return sums.T
