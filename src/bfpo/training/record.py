"""What preference training logs: figures by stream and cell, the running loss, and the watch for divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from bfpo.objective.losses import get_method
from bfpo.training.arguments import BFPOConfig
from bfpo.training.checks import DivergenceWatch
from bfpo.training.metrics import COLUMNS, CellMetrics, step_loss, summarise
from bfpo.training.running import RunningLoss

__all__ = ["TrainingRecord"]

logger = logging.getLogger(__name__)


class TrainingRecord:
    """Sums what a log row is made of, in checkpoints too: a resumed run logs what an uninterrupted one does.

    `callback` must be among the trainer's callbacks. `reduce` sums a tensor over all processes. `watch` is `None` until
    the first row.
    """

    def __init__(self, args: BFPOConfig, *, reduce: Callable[[Tensor], Tensor]) -> None:
        self._args = args
        self._method = get_method(args.method)
        self._reduce = reduce
        self._metrics = CellMetrics(args.device)
        self.watch: DivergenceWatch | None = None
        self.callback = RunningLoss(self._end_step, save=self._state, load=self._load)

    def add(self, table: Tensor, group: Tensor) -> None:
        """Add the P pairs of a micro-batch: `table` (P, K) of `PairFigures.table`, `group` (P,) of `group_index`."""
        self._metrics.add(table, group)

    def fill(self, logs: dict[str, float], state: TrainerState) -> None:
        """Complete a row of the log, and start the sums of the next."""
        ends = "train_runtime" in logs
        if not ends and "learning_rate" not in logs:
            return
        self.callback.fill(logs, state.global_step)
        if not self._metrics.empty:
            sums = self._metrics.read()
            logs.update(self._named(sums))
            self._look(sums, logs, state, last=ends or state.global_step >= state.max_steps)

    def of_evaluation(self, table: Any, group: Any) -> dict[str, float]:
        """Return the metrics of held-out pairs by cell, from their tables and groups."""
        metrics = CellMetrics(torch.device("cpu"))
        metrics.add(torch.as_tensor(table), torch.as_tensor(group))
        named = self._named(metrics.read())
        kept = {name: value for name, value in named.items() if not name.endswith("/loss_at_start")}
        return {name.removeprefix("main/"): value for name, value in kept.items()}

    def _end_step(self) -> Tensor:
        anchor_factor = self._args.anchor_weight / self._method.normaliser(self._args.beta)
        sums = self._metrics.end_step(self._reduce)
        return step_loss(sums, buffer_weight=self._args.buffer_weight, anchor_factor=anchor_factor)

    def _state(self) -> dict[str, Any]:
        watch = None if self.watch is None else {"warmup_steps": self.watch.warmup_steps, **self.watch.state()}
        return {"sums": self._metrics.state(), "watch": watch}

    def _load(self, state: Mapping[str, Any] | None) -> None:
        self._metrics.load(state["sums"] if state else None)
        self.watch = None
        if state and state["watch"]:
            self.watch = DivergenceWatch(self._args.learning_rate, state["watch"]["warmup_steps"])
            self.watch.load(state["watch"])

    def _named(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        return summarise(
            sums,
            normaliser=self._method.normaliser(self._args.beta),
            has_target=self._method.has_target,
            anchored=self._args.anchor_weight > 0,
        )

    def _look(
        self, sums: Sequence[Sequence[float]], logs: dict[str, float], state: TrainerState, *, last: bool
    ) -> None:
        if self.watch is None:
            self.watch = DivergenceWatch(self._args.learning_rate, self._args.get_warmup_steps(state.max_steps))
        total = dict(zip(COLUMNS, (sum(column) for column in zip(*sums, strict=True)), strict=True))
        warning = self.watch.update(
            state.global_step,
            total["loss"] / total["num_pairs"],
            total["loss_at_start"] / total["num_pairs"],
            last=last,
        )
        logs["loss_over_start"] = self.watch.ratio
        if warning is not None:
            logs["diverging"] = 1.0
            logger.warning(warning)
