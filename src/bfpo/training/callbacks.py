"""Callbacks of both training stages: epochs, metrics.jsonl, progress, and a Ctrl-C that leaves a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EpochCallback", "InterruptCallback", "MetricsCallback", "ProgressCallback", "set_epoch_everywhere"]

logger = logging.getLogger(__name__)


def set_epoch_everywhere(loader: Any, epoch: int) -> None:
    """Call `set_epoch` on the data set and every sampler inside a data loader, however deeply they are wrapped."""
    waiting, seen = [loader], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if hasattr(node, "set_epoch"):
            node.set_epoch(epoch)
        waiting += [getattr(node, name, None) for name in ("dataset", "sampler", "batch_sampler")]


class EpochCallback(TrainerCallback):
    """Tells data set and samplers the epoch before it starts.

    Data loaders of accelerate pass the epoch on to a data set or to a sampler, not to both, and with several processes
    a resumed run reaches neither; then the order of the pairs, or the buffer, would be that of the first epoch again.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch, a resumed one too; it is whole but for a run that goes on inside an epoch."""
        set_epoch_everywhere(kwargs["train_dataloader"], int(state.epoch or 0))


class MetricsCallback(TrainerCallback):
    """Hands every log to `append` as one flat row that starts with its step.

    `drop_after` is called with the step that a resumed run goes on from, so that no step is there twice.
    """

    def __init__(self, append: Callable[[Mapping[str, Any]], None], drop_after: Callable[[int], None]) -> None:
        self._append = append
        self._drop_after = drop_after

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an interrupted run wrote after the checkpoint."""
        if state.is_world_process_zero:
            self._drop_after(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one row."""
        if state.is_world_process_zero and logs:
            self._append({"step": state.global_step, **logs})


class ProgressCallback(TrainerCallback):
    """Shows a bar on a terminal and logs one plain line per log elsewhere.

    `title` names the run; `shown` maps a metric to the word it is shown by.
    """

    def __init__(self, title: str, shown: Mapping[str, str], console: Console | None = None) -> None:
        self._title = title
        self._shown = shown
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._started = time.monotonic()
        if state.is_world_process_zero and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._progress.add_task(self._title, total=state.max_steps, completed=state.global_step, figures="")
            self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of this log."""
        found = [(word, (logs or {}).get(name)) for name, word in self._shown.items()]
        figures = "  ".join(f"{word} {value:.4g}" for word, value in found if value is not None)
        if not state.is_world_process_zero or not figures:
            return
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step, figures=figures)
        else:
            seconds = time.monotonic() - self._started
            logger.info(
                "%s: step %d/%d  %s  (%.0f s)", self._title, state.global_step, state.max_steps, figures, seconds
            )

    def close(self) -> None:
        """Close the bar; safe to call at any time."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save a checkpoint, stop. A second one interrupts at once.

    Use it as a context around `train()`, and raise `KeyboardInterrupt` afterwards where `requested` is set. It acts in
    the main thread of a run of one process only: several would stop at different steps and wait for each other.
    """

    def __init__(self) -> None:
        self.requested = False
        self._earlier: Any = None

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGINT, self._earlier)
            self._earlier = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer for a checkpoint and to stop."""
        if self.requested and args.world_size == 1:
            control.should_save = True
            control.should_training_stop = True
