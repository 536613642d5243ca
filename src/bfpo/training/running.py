"""The running loss of both stages, kept in the checkpoints: a resumed run logs what an uninterrupted one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

__all__ = ["RunningLoss"]


class RunningLoss(TrainerCallback, ExportableState):
    """Sums the losses of the optimizer steps, exactly, in float64, since the last row of the log and over the run.

    `end_step` is called after every optimizer step in every process and returns the step's loss, a float64 scalar that
    is the same in all of them. `save` returns whatever else the next row is made of as JSON values; `load` is given it
    when a run goes on from a checkpoint, and `None` when one starts.

    The trainer's own `loss` and `train_loss` count only the steps since the process started, and older versions round.
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
        # On the CPU until the first step has shown its device.
        self._since_row = torch.tensor(held["since_row"] if held else 0.0, dtype=torch.float64)
        self._whole = torch.tensor(held["whole"] if held else 0.0, dtype=torch.float64)
        self._num_steps: int = held["num_steps"] if held else 0

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint; a JSON number gives every float64 back bit for bit."""
        held = {"since_row": float(self._since_row), "whole": float(self._whole), "num_steps": self._num_steps}
        return {"args": {}, "attributes": {**held, "more": self._save()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint that the trainer goes on from, or start anew."""
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
        """Put the means into a row: `loss` over the steps since the last row, `train_loss` over those of the run."""
        if "loss" in logs and self._num_steps > 0:
            logs["loss"] = float(self._since_row) / self._num_steps
            self._since_row, self._num_steps = torch.zeros_like(self._since_row), 0
        if "train_loss" in logs and global_step > 0:
            logs["train_loss"] = float(self._whole) / global_step
