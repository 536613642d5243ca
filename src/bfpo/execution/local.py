"""Workers that are processes of this machine: one pool of concurrent.futures each, so that one can die alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from typing import Any

from bfpo.core.processes import end_group, end_with_parent
from bfpo.execution.worker import Setup, Worker, WorkerDiedError, setup_of, usable_cores

__all__ = ["LocalProcesses"]


class LocalProcesses:
    """`num` new processes that share the cores, unless each has `threads`; `visible_gpus` are those of each."""

    def __init__(
        self, make: bytes, num: int, visible_gpus: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self._make, self._gpus = make, visible_gpus
        self._threads = threads or max(1, usable_cores() // num)
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._processes: dict[int, set[BaseProcess]] = {}

    def start(self, worker: int) -> Future[None]:
        """Start a process, in place of a dead one."""
        if (dead := self._pools.pop(worker, None)) is not None:
            dead.shutdown(wait=False, cancel_futures=True)
            _end_groups(self._processes[worker])
        threads = str(self._threads)
        environment = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        environment |= {} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": self._gpus[worker]}
        setup = setup_of(self._make, environment, logs=worker == 0)
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(setup,))
        before = set(active_children())
        future = pool.submit(_prepare)
        self._pools[worker], self._processes[worker] = pool, set(active_children()) - before
        return future

    def submit(self, worker: int, function: Callable[[Any, Any], Any], item: Any) -> Future[Any]:
        """Have a process run a function."""
        try:
            return self._pools[worker].submit(_run, function, item)
        except BrokenProcessPool as error:  # it died while it had nothing to do
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def result(self, future: Future[Any]) -> Any:
        """Return the result of a future that is done."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise WorkerDiedError("a process ended abruptly") from error

    def check(self) -> None:
        """Do nothing: processes always start."""

    def close(self) -> None:
        """End the processes, and what they have started once they are gone: a training may save a checkpoint first."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        processes = [process for some in self._processes.values() for process in some]
        for process in processes:
            with suppress(ValueError):  # closed by its pool
                process.terminate()
        threading.Thread(target=_end_groups, args=(processes,)).start()


def _end_groups(processes: Iterable[BaseProcess]) -> None:
    """Wait for processes that are ending, and end what they have started."""
    for process in processes:
        with suppress(ValueError):
            process.join()
            if process.pid is not None:
                end_group(process.pid)


_worker: Worker | None = None


def _begin(setup: Setup) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends the others
    end_with_parent()
    _worker = Worker(setup)


def _prepare() -> None:
    assert _worker is not None
    _worker.prepare()


def _run(function: Callable[[Any, Any], Any], item: Any) -> Any:
    assert _worker is not None
    return _worker.run(function, item)
