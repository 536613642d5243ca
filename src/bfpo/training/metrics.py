"""Metrics of preference training by stream and label cell, summed on the device and read once per log.

A micro-batch gives a `PairFigures`, whose table of pairs x columns `CellMetrics` sums by stream and cell;
`summarise` turns the sums into named metrics. `TrainingRecord` is what the trainer holds of all this, and
`RunningLoss` the mean loss since the last row, in both stages of training and through checkpoints.

Axes: P pairs, S streams, G = streams x cells groups, K columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bfpo.data.labels import CELLS
from bfpo.objective.losses import anchor_factor
from bfpo.objective.methods import Beside, PairLoss
from bfpo.training.arguments import BFPOConfig
from bfpo.training.beside import MethodInputs
from bfpo.training.checks import DivergenceWatch

__all__ = ["CellMetrics", "PairFigures", "RunningLoss", "TrainingRecord", "cell_index", "group_index", "summarise"]

logger = logging.getLogger(__name__)

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
    "tied_pairs",
    "past_pairs",
    "pull",
    "past_pull",
    "favoured_answers",
)
_AT = {name: place for place, name in enumerate(COLUMNS)}
_PER_ANSWER = ("favoured_drift", "favoured_drift_per_token")


def cell_index(chosen_is_safe: Tensor, rejected_is_safe: Tensor) -> Tensor:
    """Return the place of each pair's label cell in `CELLS`, (P,) int64; a probability counts as safe above 0.5."""
    return 2 * (chosen_is_safe <= 0.5).long() + (rejected_is_safe <= 0.5).long()


def group_index(chosen_is_safe: Tensor, rejected_is_safe: Tensor, is_buffer: Tensor) -> Tensor:
    """Return the place of each pair's stream and cell, (P,) int64: `len(CELLS) * is_buffer + cell`."""
    return len(CELLS) * is_buffer.long() + cell_index(chosen_is_safe, rejected_is_safe)


@dataclass(frozen=True, slots=True)
class PairFigures:
    """The figures of P pairs in a step; every tensor is (P,), without gradient.

    `margin` in nats, in the reduction of the loss; up to `rounding` it has no sign. `chosen_drift`, `rejected_drift`:
    log-prob of the policy minus that of the reference, summed over the completion. `loss_at_start`: what the labels
    imply at margin 0. `anchor`: before its weight. `other_margin`: of modpo's safety model, `None` for other methods.
    `beside`: what the method read besides, if it reads more.
    """

    pair_loss: PairLoss
    margin: Tensor
    rounding: Tensor
    beta: float
    chosen_drift: Tensor
    rejected_drift: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    loss_at_start: Tensor
    anchor: Tensor
    other_margin: Tensor | None = None
    beside: Beside | None = None

    def table(self) -> Tensor:
        """Return one row per pair and one of `COLUMNS` per column, (P, K) float64; to be summed over pairs."""
        favoured_P = self.pair_loss.favoured  # +1 chosen, -1 rejected, 0 neither
        has_favourite_P = favoured_P != 0
        drift_P = torch.where(favoured_P > 0, self.chosen_drift, self.rejected_drift)
        drift_P = torch.where(has_favourite_P, drift_P, torch.zeros_like(drift_P))
        tokens_P = torch.where(favoured_P > 0, self.chosen_tokens, self.rejected_tokens)
        is_tied_P = has_favourite_P & (self.margin.abs() <= self.rounding)
        is_past_P = favoured_P * self.beta * self.margin > self.pair_loss.target.abs()  # false where it is NaN
        # |d loss / d margin| of a square of the distance d to the target is 2 d, also where it is one-sided.
        pull_P = 2 * self.pair_loss.loss.detach().sqrt()
        is_right_P = ~is_tied_P & (favoured_P * self.margin > 0)  # the sign that the method pulls the margin to
        columns = {
            "num_pairs": torch.ones_like(self.margin),
            "loss": self.pair_loss.loss.detach(),
            "loss_at_start": self.loss_at_start,
            "beta_margin": self.beta * self.margin,
            "target": self.pair_loss.target,
            "favoured_pairs": has_favourite_P,
            "right_pairs": is_right_P,
            "favoured_drift": drift_P,
            "favoured_drift_per_token": drift_P / tokens_P.clamp(min=1),
            "chosen_tokens": self.chosen_tokens,
            "rejected_tokens": self.rejected_tokens,
            "dropped_pairs": self.pair_loss.dropped,
            "swapped_pairs": self.pair_loss.swapped,
            "anchor": self.anchor,
            "tied_pairs": is_tied_P,
            "past_pairs": is_past_P,
            "pull": pull_P,
            "past_pull": pull_P * is_past_P,
            "favoured_answers": has_favourite_P & (tokens_P > 0),  # that of a single answer may be its absent side
        }
        return torch.stack([columns[name].double() for name in COLUMNS], dim=1)


class CellMetrics:
    """Sums over pairs, (G, K) float64 on the device: of the current step, and since the last reading.

    With several processes the sums of a step are reduced when it ends: between steps all of them hold the same.
    """

    def __init__(self, device: torch.device) -> None:
        # Float64: many pairs are added, and a squared loss starts at target^2 / beta^2, which is 1e4 and more. On the
        # device: no step waits for the CPU.
        self._step_GK = torch.zeros(len(STREAMS) * len(CELLS), len(COLUMNS), dtype=torch.float64, device=device)
        self._sums_GK = self._step_GK.clone()

    def add(self, table: Tensor, group: Tensor) -> None:
        """Add P pairs: `table` (P, K) of `PairFigures.table`, `group` (P,) of `group_index`."""
        self._step_GK.index_add_(0, group, table)

    def end_step(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
        """Return the sums of the step, `reduce`d over processes, and add them to those since the last reading."""
        step_GK = reduce(self._step_GK.clone())
        self._step_GK.zero_()
        self._sums_GK += step_GK
        return step_GK

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last reading."""
        return not any(count for count, *_ in self.state())

    def state(self) -> list[list[float]]:
        """Return the sums of the steps that ended since the last reading."""
        sums: list[list[float]] = self._sums_GK.tolist()
        return sums

    def load(self, sums: Sequence[Sequence[float]] | None) -> None:
        """Restore what `state` returned; `None` starts at zero."""
        self._step_GK.zero_()
        self._sums_GK = torch.zeros_like(self._step_GK)
        if sums is not None:
            held_GK = self._sums_GK.new_tensor(sums)
            self._sums_GK[:, : held_GK.shape[1]] = held_GK  # checkpoints of before have fewer columns
            if held_GK.shape[1] <= _AT["favoured_answers"]:
                self._sums_GK[:, _AT["favoured_answers"]] = held_GK[:, _AT["favoured_pairs"]]

    def read(self) -> list[list[float]]:
        """Return the sums, those of a step that has not ended included, and reset them."""
        self.end_step()
        sums = self.state()
        self.load(None)
        return sums


def _weighted_mean(sums_GK: Tensor, *, buffer_weight: float) -> dict[str, Tensor]:
    """Return mean(main) + `buffer_weight` x mean(buffer) of every column, scalars, as the differentiated loss is."""
    streams_SK = sums_GK.view(len(STREAMS), len(CELLS), len(COLUMNS)).sum(dim=1)
    mean_SK = streams_SK / streams_SK[:, :1].clamp(min=1)  # a stream without pairs has loss 0
    return dict(zip(COLUMNS, mean_SK[0] + buffer_weight * mean_SK[1], strict=True))


def summarise(
    sums: Sequence[Sequence[float]], *, normaliser: float, has_target: bool, anchored: bool = False
) -> dict[str, float]:
    """Turn sums by group into metrics named `{stream}/{metric}` and `{stream}/{cell}/{metric}`; empty groups give none.

    Counts: `num_pairs`, `dropped_pairs`, `swapped_pairs`. Means over all pairs of the group: `loss`, `normalised_loss`
    (loss x beta^2 for a squared loss), `loss_at_start` (normalised; what the labels imply at margin 0), `beta_margin`
    beside `target` (where the method has one), `chosen_tokens`, `rejected_tokens`, `anchor` (where it has a weight).
    Means over pairs with a favoured completion: `accuracy` (the margin has the sign that the method pulls it to; one
    within rounding of 0 is a tie and counts half, as by chance); with a target also `past_target`, the share whose
    margin is past it. `past_gradient`: the part of these pairs in the sum of |d loss / d margin|. `tied_pairs`: the
    number of ties, if there are any. Means over favoured completions, without the absent side of a single answer:
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
        figures["accuracy"] = (row[_AT["right_pairs"]] + row[_AT["tied_pairs"]] / 2) / num_favoured
        if has_target:
            figures["past_target"] = row[_AT["past_pairs"]] / num_favoured
            figures["past_gradient"] = row[_AT["past_pull"]] / pull if (pull := row[_AT["pull"]]) else 0.0
    if num_answers := row[_AT["favoured_answers"]]:
        figures.update({name: row[_AT[name]] / num_answers for name in _PER_ANSWER})
    figures.update({name: row[_AT[name]] / num_pairs for name in ("chosen_tokens", "rejected_tokens")})
    figures.update({name: int(row[_AT[name]]) for name in ("dropped_pairs", "swapped_pairs")})
    if row[_AT["tied_pairs"]] > 0:
        figures["tied_pairs"] = int(row[_AT["tied_pairs"]])
    if anchored:
        figures["anchor"] = row[_AT["anchor"]] / num_pairs
    return figures


class TrainingRecord:
    """Sums for the rows of the log, saved in checkpoints: a resumed run logs the same as an uninterrupted one.

    `callback` must be among the trainer's callbacks. `reduce` sums a tensor over all processes. `watch` is `None` until
    the first row. `inputs`: those of a method that reads more than the margin; their state is saved and logged too.
    """

    def __init__(
        self, args: BFPOConfig, *, reduce: Callable[[Tensor], Tensor], inputs: MethodInputs | None = None
    ) -> None:
        self._args, self._inputs = args, inputs
        self._method = args.method_object()
        self._reduce = reduce
        self._metrics = CellMetrics(args.device)
        self.watch: DivergenceWatch | None = None
        self.callback = RunningLoss(self._end_step, save=self._state, load=self._load)

    def add(self, table: Tensor, group: Tensor) -> None:
        """Add the P pairs of a micro-batch: `table` (P, K) of `PairFigures.table`, `group` (P,) of `group_index`."""
        self._metrics.add(table, group)

    def fill(self, logs: dict[str, float], state: TrainerState) -> None:
        """Complete a row of the log, and reset the sums."""
        ends = "train_runtime" in logs
        if not ends and "learning_rate" not in logs:
            return
        self.callback.fill(logs, state.global_step)
        if not self._metrics.empty:
            sums = self._metrics.read()
            logs.update(self._named(sums))
            logs.update({} if self._inputs is None else self._inputs.figures)
            self._update_watch(sums, logs, state, last=ends or state.global_step >= state.max_steps)

    def of_evaluation(self, table: Any, group: Any) -> dict[str, float]:
        """Return the metrics of held-out pairs by cell, from their tables and groups."""
        metrics = CellMetrics(torch.device("cpu"))
        metrics.add(torch.as_tensor(table), torch.as_tensor(group))
        named = self._named(metrics.read())
        kept = {name: value for name, value in named.items() if not name.endswith("/loss_at_start")}
        return {name.removeprefix("main/"): value for name, value in kept.items()}

    def _end_step(self) -> Tensor:
        mean = _weighted_mean(self._metrics.end_step(self._reduce), buffer_weight=self._args.buffer_weight)
        if self._inputs is not None:
            self._inputs.end_step(self._reduce)
        return mean["loss"] + self._anchor_factor * mean["anchor"]

    @cached_property
    def _anchor_factor(self) -> float:
        """How often the loss of a pair contains its anchor."""
        return anchor_factor(self._args.anchor_weight, self._args.anchor_scale, self._method)

    def _state(self) -> dict[str, Any]:
        watch = None if self.watch is None else {"warmup_steps": self.watch.warmup_steps, **self.watch.state()}
        method = {} if self._inputs is None else {"method": self._inputs.state()}
        return {"sums": self._metrics.state(), "watch": watch, **method}

    def _load(self, state: Mapping[str, Any] | None) -> None:
        self._metrics.load(state["sums"] if state else None)
        if self._inputs is not None:
            self._inputs.load(state["method"] if state else None)
        self.watch = None
        if state and state["watch"]:
            self.watch = DivergenceWatch(self._args.learning_rate, state["watch"]["warmup_steps"])
            self.watch.load(state["watch"])

    def _named(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        return summarise(
            sums,
            normaliser=self._method.normaliser,
            has_target=self._method.squared,
            anchored=self._args.anchor_weight > 0,
        )

    def _update_watch(
        self, sums: Sequence[Sequence[float]], logs: dict[str, float], state: TrainerState, *, last: bool
    ) -> None:
        if self.watch is None:
            self.watch = DivergenceWatch(self._args.learning_rate, self._args.get_warmup_steps(state.max_steps))
        # Both sides are of the same pairs with the weights of the loss, and without the anchor: the labels imply no
        # value of it, and it falls whether or not the margins move.
        mean = _weighted_mean(torch.tensor(sums, dtype=torch.float64), buffer_weight=self._args.buffer_weight)
        observed, implied = float(mean["loss"]), float(mean["loss_at_start"])
        warning = self.watch.update(state.global_step, observed, implied, last=last)
        if implied > 0:
            logs["loss_over_start"] = observed / implied
        if self._args.anchor_weight > 0:
            logs["preference_loss"], logs["anchor_loss"] = observed, self._anchor_factor * float(mean["anchor"])
        if warning is not None:
            logs["diverging"] = 1.0
            logger.warning(warning)


class RunningLoss(TrainerCallback, ExportableState):
    """Sums the losses of the optimizer steps, exactly, in float64, since the last row of the log and over the run.

    `end_step` is called after every optimizer step in every process and returns the step's loss, a float64 scalar that
    is the same in all of them. `save` returns further sums of the next row as JSON values; `load` gets them when a run
    resumes from a checkpoint, and `None` when one starts.

    The trainer's own `loss` and `train_loss` count only the steps since the process started, and older versions round
    them.
    """

    def __init__(
        self,
        end_step: Callable[[], Tensor],
        *,
        save: Callable[[], Any] = lambda: None,
        load: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._end_step = end_step
        self._save = save
        self._load = load
        self._start(None)

    def _start(self, held: Mapping[str, Any] | None) -> None:
        # On the CPU until the device is known, in the first step.
        self._since_row = torch.tensor(held["since_row"] if held else 0.0, dtype=torch.float64)
        self._whole = torch.tensor(held["whole"] if held else 0.0, dtype=torch.float64)
        self._num_steps: int = held["num_steps"] if held else 0

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint; JSON numbers keep every float64 bit for bit."""
        held = {"since_row": float(self._since_row), "whole": float(self._whole), "num_steps": self._num_steps}
        return {"args": {}, "attributes": {**held, "more": self._save()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the sums from the trainer's checkpoint, or start at zero."""
        stored: Any = state.stateful_callbacks
        if state.global_step == 0 or type(self).__name__ not in stored:
            self._start(None)
            self._load(None)
            stored[type(self).__name__] = self.state()
            return
        held = stored[type(self).__name__]["attributes"]
        self._start(held)
        self._load(held["more"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the loss of the step that has ended."""
        loss = self._end_step()
        self._since_row = self._since_row.to(loss.device) + loss
        self._whole = self._whole.to(loss.device) + loss
        self._num_steps += 1

    def fill(self, logs: dict[str, float], global_step: int) -> None:
        """Put the means into a row: `loss` over the steps since the last row, `train_loss` over those of the run.

        The row of the end, which has `train_loss`, has the `loss` of steps after the last row, if there are any.
        """
        if ("loss" in logs or "train_loss" in logs) and self._num_steps > 0:
            logs["loss"] = float(self._since_row) / self._num_steps
            self._since_row, self._num_steps = torch.zeros_like(self._since_row), 0
        if "train_loss" in logs and global_step > 0:
            logs["train_loss"] = float(self._whole) / global_step
