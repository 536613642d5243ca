"""Early stopping, and the checkpoint that is kept, by a metric of the held-out rows; see `bfpo.config.best`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from bfpo.config.best import BestConfig
from bfpo.core.errors import SettingError
from bfpo.core.provenance import Remark

__all__ = ["HeldOutBest"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seen:
    """What goes into checkpoints: the best value and its step, evaluations since then, and why the run stopped."""

    best_step: int | None = None
    best_value: float | None = None
    num_worse: int = 0
    last_step: int = 0
    stopped: str = ""


class HeldOutBest(TrainerCallback, ExportableState):
    """Compares the held-out metric of each evaluation, of which one is at the last step, and acts on it.

    Every process has the same metrics, so all decide alike. Checkpoints hold what was seen: a resumed run goes on as
    one that was not stopped. Raises `SettingError` at the first evaluation if there is no such metric.
    """

    def __init__(self, settings: BestConfig) -> None:
        self._settings = settings
        self.seen = _Seen()

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"args": {}, "attributes": asdict(self.seen)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what a checkpoint holds, or start anew."""
        stored: Any = state.stateful_callbacks
        held = stored.get(type(self).__name__) if state.global_step > 0 else None
        self.seen = _Seen(**held["attributes"]) if held else _Seen()
        stored[type(self).__name__] = self.state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the metric, and save a checkpoint of the best step; stop where it has not improved for long."""
        value = (metrics or {}).get(f"eval_{self._settings.metric}")
        if value is None:
            found = sorted(name.removeprefix("eval_") for name in metrics or {} if name.startswith("eval_"))
            raise SettingError(
                f"best.metric: {self._settings.metric} is no metric of the held-out rows; they have: {', '.join(found)}"
            )
        seen, step = self.seen, state.global_step
        if step == 0:  # eval_on_start: there is no checkpoint of the start
            return
        seen.last_step = step
        if self._is_better(value):
            seen.best_step, seen.best_value, seen.num_worse = step, value, 0
            control.should_save = True
            return
        seen.num_worse += 1
        if self._settings.patience is not None and seen.num_worse >= self._settings.patience and step < state.max_steps:
            seen.stopped = f"{self._settings.metric} did not improve in {seen.num_worse} evaluations"
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                logger.info("%s: stopping at step %d of %d", seen.stopped, step, state.max_steps)

    def _is_better(self, value: float) -> bool:
        best = self.seen.best_value
        if best is None or math.isnan(best):
            return True
        gained = best - value if self._settings.lower_is_better else value - best
        return gained > self._settings.min_change

    def remarks(self) -> Iterator[Remark]:
        """Yield which checkpoint is kept, and why the run stopped before its last step."""
        seen = self.seen
        if seen.stopped:
            yield Remark("stopped", f"stopped at step {seen.last_step}, since {seen.stopped}", "note")
        if seen.best_step is not None:
            by = f"held-out {self._settings.metric} ({seen.best_value:.3g})"
            text = f"model/ is that of step {seen.best_step} of {seen.last_step}, the best by {by}"
            yield Remark("best", text, "note")
