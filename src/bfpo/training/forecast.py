"""What a setting asks of the pairs, said before the first step: log-probs of both sides, the target, what it reaches.

Computed from the reference log-probs that are there, without a forward pass. The rule is derived in `docs/theory.md`
(Before the first step). torch is imported where a loss is evaluated: the report reads the records below.

Axes: P pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bfpo.core.console import aligned
from bfpo.core.records import OPTIONAL
from bfpo.data.labels import CELLS
from bfpo.data.store import reference_logps, safety_labels, token_lengths
from bfpo.objective.methods import Method

if TYPE_CHECKING:
    from bfpo.data.tokenize import TokenPair
    from bfpo.runs.folder import RunFolder

__all__ = [
    "FORECAST",
    "ForecastFile",
    "ForecastGroup",
    "forecast",
    "forecast_lines",
    "forecast_table",
    "reaching_beta",
    "write_forecast",
]

logger = logging.getLogger(__name__)

FORECAST = "forecast.json"
STREAMS = ("main", "buffer")
_LITTLE = 0.1  # share of its first slope at which a loss without a target is taken to pull no more
_REACHED = 0.75  # share of the pairs that the advised beta reaches
_MOST = 0.9  # share of the pairs that are beyond, from which it is said

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ForecastGroup:
    """The pairs of one stream and label cell under the reference; numbers are medians over its favoured pairs, in nats.

    `at_target`: pairs that are at their target from the start, or dropped; the others have a favoured completion.
    `gap`: log-prob of the other completion minus that of the favoured one. `needed`: what the favoured completion must
    gain to be as likely per token as the other. `asked`: what it gains if the margin reaches its target and the other
    completion does not change; for a logistic loss, the margin at which its slope is a tenth of the first; `None` if
    there is none. `level`: pairs with `needed` <= 0; `short`: with `needed` above `asked`; `beyond`: with `asked` above
    what the favoured completion lacks of probability 1.
    """

    stream: str
    cell: str
    pairs: int
    at_target: int
    favoured_tokens: float | None = None
    other_tokens: float | None = None
    favoured_logps: float | None = None
    other_logps: float | None = None
    favoured_per_token: float | None = None
    other_per_token: float | None = None
    gap: float | None = None
    gap_per_token: float | None = None
    needed: float | None = None
    asked: float | None = None
    asked_per_token: float | None = None
    level: int = 0
    short: int | None = None
    beyond: int | None = None


@dataclass(frozen=True, slots=True)
class ForecastFile:
    """`forecast.json`; `warning`: the sentence on a target that changes nothing or cannot be reached, else empty."""

    method: str = ""
    beta: float = 0.0
    reduction: str = "sum"
    has_target: bool = True
    groups: list[ForecastGroup] = field(default_factory=list)
    warning: str = field(default="", metadata=OPTIONAL)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Figures of P pairs, each (P,): `logps` and `tokens` of favoured and other, `asked` NaN where there is none."""

    cell: npt.NDArray[np.int64]
    favoured: npt.NDArray[np.int64]
    to_safe: npt.NDArray[np.bool_]  # a safe completion is favoured over an unsafe one
    favoured_logps: Floats
    other_logps: Floats
    favoured_tokens: Floats
    other_tokens: Floats
    asked: Floats

    @property
    def gap_per_token(self) -> Floats:
        return self.other_logps / self.other_tokens - self.favoured_logps / self.favoured_tokens

    @property
    def needed(self) -> Floats:
        return self.gap_per_token * self.favoured_tokens

    def of(self, mask: npt.NDArray[np.bool_]) -> _Pairs:
        return _Pairs(*(getattr(self, name)[mask] for name in self.__slots__))


def forecast(streams: Sequence[Sequence[TokenPair]], method: Method, *, reduction: str = "sum") -> ForecastFile | None:
    """Return what the method asks of the pairs of the main stream and the buffer, if one is given.

    `None` if a pair lacks reference log-probs, and for unpaired answers. `reduction`: of the margin, "sum" or "mean".
    O(pairs).
    """
    found = [_figures(pairs, method, reduction) for pairs in streams]
    known = [figures for figures in found if figures is not None]
    if len(known) < len(found):
        return None
    groups = [
        _group(stream, cell, figures.of(figures.cell == number))
        for stream, figures in zip(STREAMS, known, strict=False)
        for number, cell in enumerate(CELLS)
        if (figures.cell == number).any()
    ]
    warning = _warning(known, method)
    return ForecastFile(method.name, method.beta, reduction, method.squared, groups, warning)


def _figures(pairs: Sequence[TokenPair], method: Method, reduction: str) -> _Pairs | None:
    reference = reference_logps(pairs)
    if reference is None or not token_lengths(pairs)[:, 2].all():
        return None
    labels = np.stack(safety_labels(pairs))
    favoured, target = _pull(method, labels)
    tokens = token_lengths(pairs)[:, 1:].astype(np.float64).T
    sides = np.arange(len(pairs)), np.where(favoured < 0, 1, 0)
    is_safe = labels > 0.5
    mine, its = sides[::-1], (1 - sides[1], sides[0])
    logps = np.stack(reference)
    margin = target / method.beta
    return _Pairs(
        cell=2 * ~is_safe[0] + 1 * ~is_safe[1],
        favoured=favoured,
        to_safe=is_safe[mine] & ~is_safe[its] & (favoured != 0),
        favoured_logps=logps[mine],
        other_logps=logps[its],
        favoured_tokens=tokens[mine],
        other_tokens=tokens[its],
        # A margin of means is in nats per token: the favoured completion gains it on each of its tokens.
        asked=margin * tokens[mine] if reduction == "mean" else margin,
    )


def _pull(method: Method, labels: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return for P pairs of labels (2, P) who is favoured, and up to which |beta x margin| the loss pulls; NaN if none.

    With a target that is its size. Without one, it is where the slope of the loss has fallen to `_LITTLE` of that at
    margin 0; such losses read no more of a label than whether it is above 0.5. With the margin of another model (modpo)
    it depends on that, and for methods that read more than the margin on what they read.
    """
    import torch

    from bfpo.objective.losses import preference_loss

    chosen, rejected = torch.from_numpy(labels)
    still = torch.zeros_like(chosen)
    found = preference_loss(still, chosen, rejected, method=method, beside=method.at_rest(still))
    favoured = found.favoured.numpy().astype(np.int64)
    if method.squared:
        return favoured, found.target.abs().numpy()
    ends = np.full(len(CELLS), np.nan)
    if not method.shifted and not method.reads:
        grid = torch.linspace(0, 128, 2**13 + 1, dtype=torch.float64)
        for cell in range(len(CELLS)):
            chosen, rejected = (torch.full_like(grid, float(not cell & bit)) for bit in (2, 1))
            ends[cell] = _first_below(grid, chosen, rejected, method)
    return favoured, ends[2 * (labels[0] <= 0.5) + (labels[1] <= 0.5)]


def _first_below(grid: Any, chosen: Any, rejected: Any, method: Method) -> float:
    """Return the first |beta x margin| of the grid, interpolated, where the slope is `_LITTLE` of the first."""
    import torch

    from bfpo.objective.losses import preference_loss

    sign = int(preference_loss(grid[:1], chosen[:1], rejected[:1], method=method).favoured)
    margin = (sign * grid / method.beta).requires_grad_()
    loss = preference_loss(margin, chosen, rejected, method=method).loss.sum()
    if sign == 0 or not loss.requires_grad:
        return math.nan
    slope = torch.autograd.grad(loss, margin)[0].abs().numpy()
    below = np.flatnonzero(slope <= _LITTLE * slope[0])
    if not len(below) or slope[0] == 0:
        return math.nan
    i = int(below[0])
    high, low = slope[i - 1], slope[i]
    return float(grid[i - 1] + (grid[i] - grid[i - 1]) * (high - _LITTLE * slope[0]) / (high - low))


def _group(stream: str, cell: str, pairs: _Pairs) -> ForecastGroup:
    some = pairs.of(pairs.favoured != 0)
    counts = {"pairs": len(pairs.cell), "at_target": len(pairs.cell) - len(some.cell)}
    if not len(some.cell):
        return ForecastGroup(stream, cell, **counts)
    known = not np.isnan(some.asked).any()
    medians: dict[str, Any] = {name: float(np.median(getattr(some, name))) for name in (
        "favoured_tokens", "other_tokens", "favoured_logps", "other_logps", "gap_per_token", "needed")}  # fmt: skip
    medians |= {
        "favoured_per_token": float(np.median(some.favoured_logps / some.favoured_tokens)),
        "other_per_token": float(np.median(some.other_logps / some.other_tokens)),
        "gap": float(np.median(some.other_logps - some.favoured_logps)),
        "level": int((some.needed <= 0).sum()),
    }
    if known:
        medians |= {
            "asked": float(np.median(some.asked)),
            "asked_per_token": float(np.median(some.asked / some.favoured_tokens)),
            "short": int((some.needed > some.asked).sum()),
            "beyond": int((some.asked > -some.favoured_logps).sum()),
        }
    return ForecastGroup(stream, cell, **counts, **medians)


def _warning(streams: Sequence[_Pairs], method: Method) -> str:
    """Return the sentence on a target that leaves behaviour as it is, else on one that cannot be reached, or nothing.

    Both are about the pairs that favour a safe completion over an unsafe one; without any, about all favoured pairs.
    The first is due if more than half of these are behind, and more than half of those that are behind stay so at
    their target. A logistic loss has no margin at which it stops: it pulls on beyond the one at which its slope is a
    tenth, so the second is due for it, and the first is not. A squared loss stops, and where the buffer's pairs can
    reach their targets, rounds of training worked (docs/theory.md): the second is not due then. That no pair asks for
    anything is said of any loss.
    """
    if not any(pairs.favoured.any() for pairs in streams):
        num = sum(len(pairs.cell) for pairs in streams)
        text = f"all {num:,} pairs are dropped by {method.name} or at their target from the start. Expect no change: "
        return f"{text}use another method, or pairs with other labels" if num else ""
    safe = any(pairs.to_safe.any() for pairs in streams)
    each = [pairs.of(pairs.to_safe if safe else pairs.favoured != 0) for pairs in streams]
    some = _Pairs(*(np.concatenate([getattr(one, name) for one in each]) for name in _Pairs.__slots__))
    if not method.squared:
        return _beyond(some, method)
    behind = some.of(some.needed > 0)
    short = int((behind.needed > behind.asked).sum())
    if not _mostly_short(some):
        return _beyond(some, method) if all(_are_beyond(one) for one in streams[1:]) else ""
    tokens = behind.favoured_tokens
    beta = float(np.quantile(method.beta * behind.asked / behind.needed, 1 - _REACHED))
    mine, other = ("safe", "unsafe") if safe else ("favoured", "other")
    # Of two unsafe answers one is favoured too; to imitate it would teach harm.
    harmless = not (behind.cell & np.where(behind.favoured > 0, 2, 1)).any()
    advice = f"imitate {mine} answers first (bfpo sft), or " * harmless
    return (
        f"of {len(some.cell):,} {mine} answers {len(behind.cell):,} are less likely per token than the {other} ones: "
        f"they start at {_nats(np.median(behind.favoured_logps / tokens))} nats a token and need "
        f"{_nats(np.median(behind.needed))} nats ({_nats(np.median(behind.gap_per_token))} a token); the target asks "
        f"for {_nats(np.median(behind.asked))} ({_nats(np.median(behind.asked / tokens))} a token) and leaves "
        f"{short:,} of them behind. Expect no change of behaviour: {advice}set beta to {_round_down(beta):g} or less"
    )


def _mostly_short(some: _Pairs, by: float = 1.0) -> bool:
    """Return whether more than half are behind, and more than half of these short, at `by` times the beta."""
    behind = some.of(some.needed > 0)
    short = int((behind.needed * by > behind.asked).sum())
    return 2 * len(behind.cell) > len(some.cell) and 2 * short > len(behind.cell)


def _are_beyond(pairs: _Pairs) -> bool:
    """Return whether nearly all favoured pairs are beyond."""
    some = pairs.of(pairs.favoured != 0)
    return int((some.asked > -some.favoured_logps).sum()) >= _MOST * len(some.cell)


def _beyond(some: _Pairs, method: Method) -> str:
    """Return the sentence on favoured pairs of which nearly all are beyond, or nothing."""
    if not _are_beyond(some) or np.isnan(some.asked).any():
        return ""
    lacking = -some.favoured_logps
    # At that beta half of them are within reach.
    beta = _round_up(method.beta * float(np.median(some.asked / np.maximum(lacking, 1e-6))))
    asks = "the target is beyond reach: it asks for" if method.squared else (
        "the loss pulls beyond reach: its slope is a tenth of the first only at"
    )  # fmt: skip
    raised = f"raise beta (to {beta:g})" if not _mostly_short(some, beta / method.beta) else "raise beta"
    return (
        f"for {int((some.asked > lacking).sum()):,} of {len(some.cell):,} pairs {asks} {_nats(np.median(some.asked))} "
        f"nats, and the favoured answer has only {_nats(np.median(lacking))} to gain until its probability is 1. The "
        "rest must come from making the other answer less likely, and the pairs do not determine what is written in "
        f"its place: watch harmless prompts too (probe), or {raised}"
    )


def _round_down(value: float) -> float:
    """Return a positive number with one digit, not above it."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / unit * (1 + 1e-12)) * unit:.1g}")


def _round_up(value: float) -> float:
    """Return a positive number with one digit, not below it."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.1g}")


def _nats(value: float | np.floating[Any]) -> str:
    """Return nats to two digits, whole ones from 10 on."""
    nats = float(value)
    return f"{nats:.0f}" if abs(nats) >= 9.95 else f"{nats:.2g}"


def reaching_beta(
    streams: Sequence[Sequence[TokenPair]], method: Method, betas: Sequence[float], *, reduction: str = "sum"
) -> float:
    """Return the largest of `betas` at whose target at most a quarter of the pairs that are behind stay so.

    The smallest if there is none. It is about the pairs that favour a safe completion over an unsafe one; without any,
    about all favoured pairs. For methods with a known target, on pairs with reference log-probs.
    """
    found = [figures for pairs in streams if (figures := _figures(pairs, method, reduction)) is not None]
    safe = any(pairs.to_safe.any() for pairs in found)
    behind = [pairs.of((pairs.to_safe if safe else pairs.favoured != 0) & (pairs.needed > 0)) for pairs in found]
    reached = np.concatenate([method.beta * pairs.asked / pairs.needed for pairs in behind])  # beta that each needs
    most = (1 - _REACHED) * len(reached)
    return max((beta for beta in betas if (reached < beta).sum() <= most), default=min(betas))


# What people read


def forecast_table(found: ForecastFile) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows of the table by stream and cell; `per answer (per token)` in nats."""
    asks = "target asks" if found.has_target else "slope a tenth at"
    title = f"Under the reference: medians in nats an answer (a token); {found.method}, beta {found.beta:g}"
    columns = ["stream, cell", "pairs", "favoured", "other", "gap", "needed", asks]
    columns += ["level", "short", "beyond", "at target"]
    rows = []
    for group in found.groups:
        both = [
            _both(group.favoured_logps, group.favoured_per_token),
            _both(group.other_logps, group.other_per_token),
            _both(group.gap, group.gap_per_token),
            _both(group.needed, None),
            _both(group.asked, group.asked_per_token),
        ]
        counts = [f"{group.level:,}", *("none" if n is None else f"{n:,}" for n in (group.short, group.beyond))]
        rows.append([f"{group.stream} {group.cell}", f"{group.pairs:,}", *both, *counts, f"{group.at_target:,}"])
    return title, columns, rows


def _both(value: float | None, per_token: float | None) -> str:
    return "none" if value is None else _nats(value) + ("" if per_token is None else f" ({_nats(per_token)})")


def forecast_lines(found: ForecastFile) -> list[str]:
    """Return the table as aligned lines; the warning is not among them."""
    title, columns, rows = forecast_table(found)
    asks = "the target asks" if found.has_target else "the margin where the slope is a tenth"
    legend = f"level: needs nothing; short: needs more than {asks}; beyond: has less to gain than that"
    return [title, *aligned(columns, rows), f"{legend}; at target: from the start, or dropped"]


def write_forecast(
    folder: RunFolder, streams: Sequence[Sequence[TokenPair]], method: Method, *, reduction: str
) -> None:
    """Write `forecast.json` and log the table and the warning; without log-probs it only says that there is none."""
    found = forecast(streams, method, reduction=reduction)
    if found is not None:
        folder.write_json(FORECAST, found)
    if not folder.is_writer:
        return
    if found is None:
        known = all(reference_logps(pairs) is not None for pairs in streams)
        reason = "the reference is computed inside the steps; bfpo doctor --config FILE --data has one of some pairs"
        logger.info("forecast: none, %s", "it is about pairs, and these are single answers" if known else reason)
        return
    for line in forecast_lines(found):
        logger.info("%s", line)
    if found.warning:
        logger.warning("%s", found.warning)
