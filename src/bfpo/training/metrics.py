"""Metrics of preference training by stream and label cell, summed on the device and read once per log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bfpo.data.labels import CELLS
from bfpo.objective.losses import PairLoss

__all__ = ["COLUMNS", "STREAMS", "CellMetrics", "PairFigures", "cell_index", "group_index", "step_loss", "summarise"]

STREAMS = ("main", "buffer")
COLUMNS = (
    "num_pairs",
    "loss",
    "loss_at_start",
    "beta_margin",
    "target",
    "favoured_pairs",
    "right_pairs",
    "favoured_drift",
    "favoured_drift_per_token",
    "chosen_tokens",
    "rejected_tokens",
    "dropped_pairs",
    "swapped_pairs",
    "anchor",
)
_AT = {name: place for place, name in enumerate(COLUMNS)}
_PER_FAVOURED = ("favoured_drift", "favoured_drift_per_token")


def cell_index(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """Return the place of each pair's label cell in `CELLS`, (P,) int64; a probability counts as safe above 0.5."""
    return 2 * (chosen_is_safe <= 0.5).long() + (rejected_is_safe <= 0.5).long()


def group_index(chosen_is_safe: Tensor, rejected_is_safe: Tensor, is_buffer: Tensor) -> Tensor:
    """Return the place of each pair's stream and cell, (P,) int64: `len(CELLS) * is_buffer + cell`."""
    return len(CELLS) * is_buffer.long() + cell_index(chosen_is_safe, rejected_is_safe)


@dataclass(frozen=True, slots=True)
class PairFigures:
    """What a step knows about its P pairs; every tensor is (P,), without gradient.

    `margin` in nats, in the reduction of the loss. `chosen_drift`, `rejected_drift`: log-prob of the policy minus that
    of the reference, summed over the completion. `loss_at_start`: what the labels imply at margin 0. `anchor`: before
    its weight.
    """

    pair_loss: PairLoss
    margin: Tensor
    beta: float
    chosen_drift: Tensor
    rejected_drift: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    loss_at_start: Tensor
    anchor: Tensor

    def table(self) -> Tensor:
        """Return one row per pair and one of `COLUMNS` per column, (P, K) float64; to be summed over pairs."""
        favoured = self.pair_loss.favoured
        has_favourite = favoured != 0
        drift = torch.where(favoured > 0, self.chosen_drift, self.rejected_drift)
        tokens = torch.where(favoured > 0, self.chosen_tokens, self.rejected_tokens)
        drift = torch.where(has_favourite, drift, torch.zeros_like(drift))
        columns = {
            "num_pairs": torch.ones_like(self.margin),
            "loss": self.pair_loss.loss.detach(),
            "loss_at_start": self.loss_at_start,
            "beta_margin": self.beta * self.margin,
            "target": self.pair_loss.target,
            "favoured_pairs": has_favourite,
            "right_pairs": favoured * self.margin > 0,
            "favoured_drift": drift,
            "favoured_drift_per_token": drift / tokens,
            "chosen_tokens": self.chosen_tokens,
            "rejected_tokens": self.rejected_tokens,
            "dropped_pairs": self.pair_loss.dropped,
            "swapped_pairs": self.pair_loss.swapped,
            "anchor": self.anchor,
        }
        return torch.stack([columns[name].double() for name in COLUMNS], dim=1)


class CellMetrics:
    """Sums over pairs, (streams x cells, K) float64 on the device: of the step under way, and since the last reading.

    With several processes the sums of a step are reduced when it ends: between steps all of them hold the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros(len(STREAMS) * len(CELLS), len(COLUMNS), dtype=torch.float64, device=device)
        self._sums = self._step.clone()

    def add(self, table: Tensor, group: Tensor) -> None:
        """Add P pairs: `table` (P, K) of `PairFigures.table`, `group` (P,) of `group_index`."""
        self._step.index_add_(0, group, table)

    def end_step(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
        """Return the sums of the step, `reduce`d over processes, and take them into those since the last reading."""
        step = reduce(self._step.clone())
        self._step.zero_()
        self._sums += step
        return step

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last reading."""
        return not any(count for count, *_ in self.state())

    def state(self) -> list[list[float]]:
        """Return the sums of the steps that ended since the last reading."""
        sums: list[list[float]] = self._sums.tolist()
        return sums

    def load(self, sums: Sequence[Sequence[float]] | None) -> None:
        """Go on from what `state` returned; `None` starts anew."""
        self._step.zero_()
        self._sums = torch.zeros_like(self._step) if sums is None else self._sums.new_tensor(sums)

    def read(self) -> list[list[float]]:
        """Return the sums, those of a step that has not ended included, and start anew."""
        self.end_step()
        sums = self.state()
        self.load(None)
        return sums


def step_loss(sums: Tensor, *, buffer_weight: float, anchor_factor: float) -> Tensor:
    """Return the loss of one optimizer step from its sums (streams x cells, K), a scalar: what its gradient is of.

    That is mean(main) + `buffer_weight` x mean(buffer), each pair's anchor included `anchor_factor` times.
    """
    streams = sums.view(len(STREAMS), len(CELLS), len(COLUMNS)).sum(dim=1)
    total = streams[:, _AT["loss"]] + anchor_factor * streams[:, _AT["anchor"]]
    means = total / streams[:, _AT["num_pairs"]].clamp(min=1)
    return means[0] + buffer_weight * means[1]


def summarise(
    sums: Sequence[Sequence[float]], *, normaliser: float, has_target: bool, anchored: bool = False
) -> dict[str, float]:
    """Turn sums by group into metrics named `{stream}/{metric}` and `{stream}/{cell}/{metric}`; empty groups give none.

    Counts: `num_pairs`, `dropped_pairs`, `swapped_pairs`. Means over all pairs of the group: `loss`, `normalised_loss`
    (loss x beta^2 for a squared loss), `loss_at_start` (normalised; what the labels imply at margin 0), `beta_margin`
    beside `target` (where the method has one), `chosen_tokens`, `rejected_tokens`, `anchor` (where it has a weight).
    Means over pairs with a favoured completion: `accuracy` (the margin has the sign that the method pulls it to),
    `favoured_drift` in nats and `favoured_drift_per_token`.
    """
    metrics: dict[str, float] = {}
    for s, stream in enumerate(STREAMS):
        rows = sums[s * len(CELLS) : (s + 1) * len(CELLS)]
        whole = [sum(column) for column in zip(*rows, strict=True)]
        for name, row in [(stream, whole), *((f"{stream}/{cell}", row) for cell, row in zip(CELLS, rows, strict=True))]:
            if row[_AT["num_pairs"]] > 0:
                figures = _figures(row, normaliser=normaliser, has_target=has_target, anchored=anchored)
                metrics.update({f"{name}/{metric}": value for metric, value in figures.items()})
    return metrics


def _figures(row: Sequence[float], *, normaliser: float, has_target: bool, anchored: bool) -> dict[str, float]:
    num_pairs, num_favoured = row[_AT["num_pairs"]], row[_AT["favoured_pairs"]]
    figures = {
        "num_pairs": int(num_pairs),
        "loss": row[_AT["loss"]] / num_pairs,
        "normalised_loss": normaliser * row[_AT["loss"]] / num_pairs,
        "loss_at_start": normaliser * row[_AT["loss_at_start"]] / num_pairs,
        "beta_margin": row[_AT["beta_margin"]] / num_pairs,
    }
    if has_target:
        figures["target"] = row[_AT["target"]] / num_pairs
    if num_favoured > 0:
        figures["accuracy"] = row[_AT["right_pairs"]] / num_favoured
        figures.update({name: row[_AT[name]] / num_favoured for name in _PER_FAVOURED})
    figures.update({name: row[_AT[name]] / num_pairs for name in ("chosen_tokens", "rejected_tokens")})
    figures.update({name: int(row[_AT[name]]) for name in ("dropped_pairs", "swapped_pairs")})
    if anchored:
        figures["anchor"] = row[_AT["anchor"]] / num_pairs
    return figures
