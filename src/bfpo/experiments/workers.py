"""Runs chains in a few processes, each of which imports torch once, and shows how far they are."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

from bfpo.core.errors import BfpoError, RunError
from bfpo.experiments.chains import Chain
from bfpo.experiments.progress import ChainProgress
from bfpo.stages import run_stage

__all__ = ["run_chains", "usable_cores"]

_POLL_SECONDS = 0.5


def run_chains(chains: Sequence[Chain], processes: int, logs: Path, *, memory: int | None = None) -> None:
    """Run every chain, at most `processes` at a time, those whose `needs` have ended; what is finished is passed over.

    `memory`: bytes that the chains running at the same time may need together by their estimates; a chain that needs
    more by itself runs alone.

    What a chain prints goes to `logs/<seed>-<name>.log`. The first failure stops the others and is raised with the
    chain's name and the place of its log: a `RunError` for bad input, else a `RuntimeError`.
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
    """A pool of fresh processes with one torch thread each, ended at once when the experiment is stopped."""
    # Read by the new processes: more threads than cores would only wait for one another.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    pool = ProcessPoolExecutor(
        max(1, min(processes, most)), mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()


def _end_with_parent() -> None:
    """End this process when its parent is gone, killed without a word: an orphan would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_chain(chain: Chain, log_file: str) -> float:
    """Run the stages of a chain in this process and return the seconds that took."""
    start = time.monotonic()
    with Path(log_file).open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        handler = logging.StreamHandler(log)
        logging.getLogger("bfpo").addHandler(handler)
        logging.getLogger("bfpo").setLevel(logging.INFO)
        try:
            for step in chain.steps:
                run_stage(step.stage, step.config, step.out, resume=True)
        finally:
            logging.getLogger("bfpo").removeHandler(handler)
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
    """Return how many cores this process may use: the chains that run at the same time where nobody says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _log_file(logs: Path, chain: Chain) -> Path:
    return logs / f"{chain.seed}-{chain.name}.log"
