"""Runs chains in worker processes, each of which imports torch once, and shows their progress."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bfpo.core.console import one_line, start_logging
from bfpo.core.errors import BfpoError, RunError
from bfpo.core.processes import end_with_parent
from bfpo.experiments.points import Chain
from bfpo.runs.stages import run_stage

__all__ = ["run_chains", "usable_cores"]

_POLL_SECONDS = 0.5


def run_chains(chains: Sequence[Chain], processes: int, logs: Path, *, memory: int | None = None) -> None:
    """Run every chain once its `needs` have ended, at most `processes` at a time; finished stages are skipped.

    `memory`: the estimated bytes that simultaneous chains may need together; a chain that needs more runs alone.

    The output of a chain goes to `logs/<seed>-<name>.log`. The first failure stops the others and is raised with the
    chain's name and log file: a `RunError` for bad input, else a `RuntimeError`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(chains)
    ended: set[tuple[int, str]] = set()
    running: dict[Future[float], Chain] = {}
    with _pool(processes, len(chains)) as pool, ChainProgress(len(chains)) as progress:
        while waiting or running:
            for chain in _next(waiting, ended, list(running.values()), processes, memory):
                waiting.remove(chain)
                running[pool.submit(_run_chain, chain, str(_log_file(logs, chain)))] = chain
            progress.show(running.values())
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                chain = running.pop(future)
                seconds = _result(future, chain, logs)
                ended.add((chain.seed, chain.name))
                progress.end(chain, seconds)


def _next(
    waiting: Sequence[Chain],
    ended: set[tuple[int, str]],
    running: Sequence[Chain],
    processes: int,
    memory: int | None,
) -> list[Chain]:
    """Return the chains to start now, in their order."""
    started: list[Chain] = []
    for chain in waiting:
        beside = [*running, *started]
        ready = all((chain.seed, name) in ended for name in chain.needs)
        room = memory is None or not beside or sum(one.memory for one in beside) + chain.memory <= memory
        if ready and room and len(beside) < processes:
            started.append(chain)
    return started


@contextmanager
def _pool(processes: int, most: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of new processes with one torch thread each, terminated when the experiment is stopped."""
    # Read by the new processes; more threads than cores would be slower.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    pool = ProcessPoolExecutor(
        max(1, min(processes, most)), mp_context=get_context("spawn"), initializer=end_with_parent
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()


def _run_chain(chain: Chain, log_file: str) -> float:
    """Run the stages of a chain in this process and return the time in seconds."""
    start = time.monotonic()
    with Path(log_file).open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        start_logging()  # to stderr, which is the log now
        for step in chain.steps:
            run_stage(step.stage, step.config, step.out, resume=True)
    return time.monotonic() - start


def _result(future: Future[float], chain: Chain, logs: Path) -> float:
    try:
        return future.result()
    except BfpoError as error:
        raise RunError(f"{chain.title}: {error} (log: {_log_file(logs, chain)})") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RuntimeError(f"{chain.title}: {text} (log: {_log_file(logs, chain)})") from error


def usable_cores() -> int:
    """Return the number of cores this process may use, the default number of simultaneous chains."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
