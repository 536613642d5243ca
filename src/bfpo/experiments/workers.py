"""Runs chains in the workers of an executor and shows their progress."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bfpo.core.console import one_line, start_logging
from bfpo.core.errors import BfpoError, HeldError
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import OnePer, Workers
from bfpo.experiments.points import Chain, Step
from bfpo.runs import lock
from bfpo.runs.stages import run_stage

__all__ = ["run_chains"]

_SECONDS_BETWEEN_TRIES = 10.0


def run_chains(
    chains: Sequence[Chain],
    executor: ExecutorConfig,
    logs: Path,
    *,
    memory: int | None = None,
    one_per: OnePer = "core",
) -> None:
    """Run every chain once its `needs` have ended, each in a worker with one thread; finished stages are skipped.

    `memory`: the estimated bytes that simultaneous chains may need together; a chain that needs more runs alone.
    `one_per`: what automatic workers are counted by. A chain whose worker dies goes on in another one.

    The output of a chain goes to `logs/<seed>-<name>.log`. The first failure stops the others and is raised with the
    chain's name and log file: a `BfpoError` as one of its class, others as a `RuntimeError`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ended: set[tuple[int, str]] = set()

    def may_start(chain: Chain, running: Sequence[Chain]) -> bool:
        return _may_start(chain, running, ended, memory)

    workers: Workers[object] = Workers(executor, object, one_per=one_per, most=len(chains), threads=1)
    run = partial(_run_chain, str(logs))
    with workers, ChainProgress(len(chains)) as progress:
        for number, seconds in workers.map(
            chains, run, title=lambda chain: chain.title, may_start=may_start, waiting=progress.show
        ):
            ended.add((chains[number].seed, chains[number].name))
            progress.end(chains[number], seconds)


def _may_start(chain: Chain, running: Sequence[Chain], ended: Collection[tuple[int, str]], memory: int | None) -> bool:
    """Return whether what a chain needs has ended, and there is memory for it beside those that run."""
    ready = all((chain.seed, name) in ended for name in chain.needs)
    return ready and (memory is None or not running or sum(one.memory for one in running) + chain.memory <= memory)


def _run_chain(logs: str, _: object, chain: Chain) -> float:
    """Run the stages of a chain in this process and return the time in seconds."""
    start = time.monotonic()
    file = _log_file(Path(logs), chain)
    try:
        with file.open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            start_logging()  # to stderr, which is the log now
            for step in chain.steps:
                _run_step(step)
    except BfpoError as error:
        raise type(error)(f"{chain.title}: {error} (log: {file})") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RuntimeError(f"{chain.title}: {text} (log: {file})") from error
    return time.monotonic() - start


def _run_step(step: Step) -> None:
    """Run a stage in its folder; one that a worker of another node held when that died is free once its lock is stale.

    Raises `HeldError` if that worker still gives signs of life then.
    """
    end = time.monotonic() + lock.SECONDS_UNTIL_STALE + _SECONDS_BETWEEN_TRIES
    for number in itertools.count():
        try:
            run_stage(step.stage, step.config, step.out, resume=True)
            return
        except HeldError as error:
            if not error.on_another_host or time.monotonic() > end:
                raise
            if number == 0:
                _log.info("waiting, in case that process has died: %s", error)
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _log_file(logs: Path, chain: Chain) -> Path:
    return logs / chain.log_name


_log = logging.getLogger(__name__)
_TAIL_BYTES = 16384


class ChainProgress:
    """A context that shows the running chains by the steps in their `metrics.jsonl`."""

    def __init__(self, num_chains: int) -> None:
        self._num_chains = num_chains
        self._num_ended = 0
        self._tasks: dict[Chain, TaskID] = {}
        columns = (TextColumn("{task.description:24}", markup=False), BarColumn(), TextColumn("{task.fields[state]}"))
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
        """Update the bars of the running chains; a new chain gets a bar or, without a terminal, a line."""
        for chain in running:
            if chain not in self._tasks:
                if not self._is_terminal:
                    _log.info("%s: running", chain.title)
                self._tasks[chain] = self._bars.add_task(one_line(chain.title), total=_num_steps(chain), state="")
            if self._is_terminal:
                step, total = _last_step(chain), _num_steps(chain)
                state = f"step {step} of {total}" if step < total else "answers and verdicts"
                self._bars.update(self._tasks[chain], completed=step, state=state)

    def end(self, chain: Chain, seconds: float) -> None:
        """Remove the bar of a chain and print a line that it has ended."""
        self._num_ended += 1
        self._bars.remove_task(self._tasks[chain])
        text = f"{chain.title}: done in {seconds:.0f} s ({self._num_ended} of {self._num_chains})"
        if self._is_terminal:
            self._bars.console.print(one_line(text), highlight=False, markup=False)
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
        except ValueError:  # a truncated line, or one being written
            continue
    return [row for row in rows if isinstance(row, dict)]
