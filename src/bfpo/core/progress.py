"""Progress of a long count: a bar on a terminal, occasional log lines elsewhere; and of a training, as its run folder
keeps it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bfpo.core.console import one_line

__all__ = ["CountProgress", "TrainingProgress"]


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """`progress.json` of a training in progress.

    `seconds_left` is estimated from the steps since the process started; `updated`: when this was written (UTC).
    """

    step: int = 0
    max_steps: int = 0
    seconds_left: float | None = None
    updated: str = ""


class CountProgress:
    """Context manager that shows a count up to `total`, or alone if `total` is `None`.

    On a terminal it is a bar, elsewhere a line to `logger` with the time left, at most every `seconds_between_lines`.
    `shown=False`, as in all processes but the first, shows nothing.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        logger: logging.Logger,
        *,
        shown: bool = True,
        seconds_between_lines: float = 30.0,
        console: Console | None = None,
    ) -> None:
        self._title, self._total, self._logger = one_line(title), total, logger
        self._shown, self._between = shown, seconds_between_lines
        self._console = console or Console(stderr=True)
        self._count = 0
        self._bar: Progress | None = None

    def __enter__(self) -> CountProgress:
        self._started = self._last_line = time.monotonic()
        if self._shown and self._console.is_terminal:
            known = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            count = (TextColumn("{task.completed}"),) if self._total is None else known
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), *count, console=self._console, transient=True
            )
            self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Add `count` to the progress."""
        self._count += count
        if self._total is not None:
            self._count = min(self._count, self._total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._count)
            return
        now = time.monotonic()
        if self._shown and now - self._last_line >= self._between:
            self._last_line = now
            seconds = now - self._started
            of_total = left = ""
            if self._total is not None:
                of_total = f" of {self._total}"
                left = f", about {seconds * (self._total - self._count) / max(self._count, 1):.0f} s left"
            self._logger.info("%s: %d%s  (%.0f s%s)", self._title, self._count, of_total, seconds, left)
