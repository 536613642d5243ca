"""How far the chains of an experiment are: bars on a terminal, a line per chain in a log."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bfpo.experiments.chains import Chain

__all__ = ["ChainProgress"]

_log = logging.getLogger(__name__)
_TAIL_BYTES = 16384


class ChainProgress:
    """Shows the running chains by the steps that their `metrics.jsonl` tells; to be used as a context."""

    def __init__(self, num_chains: int) -> None:
        self._num_chains = num_chains
        self._num_ended = 0
        self._tasks: dict[Chain, TaskID] = {}
        columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> ChainProgress:
        if self._is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bars.stop()

    def show(self, running: Iterable[Chain]) -> None:
        """Bring the bars of the running chains up to date; a chain seen for the first time gets one, or a line."""
        for chain in running:
            if chain not in self._tasks:
                if not self._is_terminal:
                    _log.info("%s: running", chain.title)
                self._tasks[chain] = self._bars.add_task(chain.title, total=_num_steps(chain), state="")
            if self._is_terminal:
                step, total = _last_step(chain), _num_steps(chain)
                state = f"step {step} of {total}" if step < total else "answers and verdicts"
                self._bars.update(self._tasks[chain], completed=step, state=state)

    def end(self, chain: Chain, seconds: float) -> None:
        """Take the bar of a chain away and say in a line that it has ended."""
        self._num_ended += 1
        self._bars.remove_task(self._tasks[chain])
        text = f"{chain.title}: done in {seconds:.0f} s ({self._num_ended} of {self._num_chains})"
        if self._is_terminal:
            self._bars.console.print(text, highlight=False)
        else:
            _log.info("%s", text)


def _num_steps(chain: Chain) -> int:
    return int(getattr(chain.steps[0].config, "max_steps", None) or 1)


def _last_step(chain: Chain) -> int:
    """Return the last step that the first stage of the chain has logged."""
    return max((int(row.get("step") or 0) for row in _tail(chain.steps[0].out / "metrics.jsonl")), default=0)


def _tail(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that is cut, or just being written
            continue
    return [row for row in rows if isinstance(row, dict)]
