"""The scheduler: items go to workers, each of which makes its state (a model, a judge) once; results come by number.

What a worker returns depends on the item and the state alone. Results are counted once each, in the process that asked
for them; a worker that dies is replaced, and its items are given out again.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

from bfpo.core.errors import RunError, SettingError, WorkerError
from bfpo.core.processes import release_memory
from bfpo.execution.settings import ExecutorConfig, RayExecutor, workers_on
from bfpo.execution.worker import WorkerDiedError, usable_cores

__all__ = [
    "Backend",
    "OnePer",
    "Workers",
    "describe_workers",
    "in_process",
    "num_gpus",
    "num_local",
]

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")

OnePer = Literal["gpu", "core", "gpu or core"]
"""What `workers: auto` counts: GPUs for work of models, cores for work that needs none, or cores if there is no GPU."""

_POLL_SECONDS = 0.5
_MOST_DEATHS = 3  # workers that one item, or making the state, may cost


class Backend(Protocol):
    """Starts workers by number and runs functions of (state, item) in them, one after another in each."""

    def start(self, worker: int) -> Future[None]:
        """Start a worker, in place of an earlier one of this number; done when it has made its state."""

    def submit(self, worker: int, function: Callable[[Any, Any], Any], item: Any) -> Future[Any]:
        """Have a worker that has started run a function."""

    def result(self, future: Future[Any]) -> Any:
        """Return the result of a future that is done; raises `WorkerDiedError`, or what the function raised."""

    def check(self) -> None:
        """Raise `WorkerError` if no worker runs and none can be expected to start."""

    def close(self) -> None:
        """End all workers at once; none of them is waited for."""


@dataclass(slots=True)
class _Worker:
    """A worker and the items given to it, the one it works on first."""

    number: int
    starting: Future[None] | None = None
    ready: bool = False
    given: deque[tuple[int, Any, Future[Any]]] = field(default_factory=deque)


class Workers(Generic[State]):
    """Workers of an executor, as a context manager; none is started before there is an item for it.

    `make` makes the state of each; it and the functions of `map` are sent to other processes by pickle, so that they
    are functions of modules (or partials of them). `most`: the number of items, if it is known; `threads`: CPU threads
    of each worker, `None` for its share of the cores. `here`: a single worker on this machine is this process.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        make: Callable[[], State],
        *,
        one_per: OnePer = "gpu",
        most: int | None = None,
        threads: int | None = None,
        here: bool = False,
    ) -> None:
        self._backend: Backend
        if here and in_process(config, one_per):
            self._backend, num = _ThisProcess(make), 1
        elif isinstance(config, RayExecutor):
            from bfpo.execution.cluster import RayActors

            actors = RayActors(config, pickle.dumps(make), one_per=one_per, threads=threads)
            self._backend, num = actors, actors.num
        else:
            from bfpo.execution.local import LocalProcesses

            num = num_local(config, one_per)
            gpus = _visible_gpus(config, num, one_per)
            num = num if most is None else max(1, min(num, most))
            self._backend = LocalProcesses(pickle.dumps(make), num, gpus, threads)
        self._workers = [_Worker(number) for number in range(num if most is None else max(1, min(num, most)))]
        self._failed_starts = 0

    def __enter__(self) -> Workers[State]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.close()

    def __len__(self) -> int:
        """Return the number of workers at the same time, at most."""
        return len(self._workers)

    def call(self, function: Callable[[State, None], Result]) -> Result:
        """Return the result of a function in one of the workers."""
        (result,) = (result for _, result in self.map([None], function))
        return result

    def map(
        self,
        items: Iterable[Item],
        function: Callable[[State, Item], Result],
        *,
        depth: int = 1,
        title: Callable[[Item], str] = str,
        may_read: Callable[[int], bool] = lambda number: True,
        may_start: Callable[[Item, Sequence[Item]], bool] | None = None,
        waiting: Callable[[Sequence[Item]], None] = lambda running: None,
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of each item and its result as they arrive, every item once.

        `depth`: items that a worker has at the same time; `title` names an item in errors. `may_read` says whether the
        item of a number may be read already. `may_start` is told which items run and says whether another one may start
        now; all items are read first then. `waiting` is called with the running items at least twice a second.

        Raises what `make` or the function raises, and `WorkerError` for an item at which workers die again and again.
        """
        assert not any(worker.given for worker in self._workers)  # of a map that was not read to its end
        source = enumerate(items)
        todo: list[tuple[int, Item]] = list(source) if may_start is not None else []
        num_read = len(todo)
        deaths: Counter[int] = Counter()
        while True:
            while len(todo) < len(self._workers) * depth and may_read(num_read) and (one := next(source, None)):
                todo.append(one)
                num_read += 1
            self._give_out(todo, function, depth, may_start)
            running = [item for worker in self._workers for _, item, _ in worker.given]
            waiting(running)
            futures = [future for worker in self._workers for _, _, future in worker.given]
            starting = [worker.starting for worker in self._workers if worker.starting is not None]
            if not todo and not running:
                return
            if not futures and not starting:
                raise RunError(f"{title(todo[0][1])}: waits for something that does not run")
            wait([*futures, *starting], timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for worker in self._workers:
                self._see_start(worker)
                while worker.given and worker.given[0][2].done():
                    number, item, future = worker.given.popleft()
                    try:
                        result = self._backend.result(future)
                    except WorkerDiedError as error:
                        deaths[number] += 1
                        if deaths[number] >= _MOST_DEATHS:
                            raise WorkerError(_died(title(item), deaths[number], error)) from error
                        again = [(number, item), *((n, one) for n, one, _ in worker.given)]
                        worker.given.clear()
                        worker.ready = False
                        todo[:0] = again
                        break
                    yield number, result

    def in_order(
        self, items: Iterable[Item], function: Callable[[State, Item], Result], *, title: Callable[[Item], str] = str
    ) -> Iterator[Result]:
        """Yield the results in the order of the items, of which few are in memory at a time; otherwise as `map`."""
        early: dict[int, Result] = {}
        num_given = 0
        most = 4 * len(self._workers)

        def may_read(number: int) -> bool:
            return number < num_given + most

        for number, result in self.map(items, function, depth=2, title=title, may_read=may_read):
            early[number] = result
            while num_given in early:
                num_given += 1
                yield early.pop(num_given - 1)

    def _give_out(
        self,
        todo: list[tuple[int, Any]],
        function: Callable[[Any, Any], Any],
        depth: int,
        may_start: Callable[[Any, Sequence[Any]], bool] | None,
    ) -> None:
        """Give items to workers with room, the least busy first, and start workers for those that remain."""
        for worker in sorted(self._workers, key=lambda one: len(one.given)):
            while worker.ready and len(worker.given) < depth:
                running = [item for one in self._workers for _, item, _ in one.given]
                place = next((n for n, (_, it) in enumerate(todo) if may_start is None or may_start(it, running)), None)
                if place is None:
                    break
                number, item = todo.pop(place)
                worker.given.append((number, item, self._backend.submit(worker.number, function, item)))
        free = sum(worker.starting is not None or (worker.ready and not worker.given) for worker in self._workers)
        for worker in self._workers:
            if free < len(todo) and not worker.ready and worker.starting is None:
                worker.starting = self._backend.start(worker.number)
                free += 1

    def _see_start(self, worker: _Worker) -> None:
        if worker.starting is None:
            return
        if not worker.starting.done():
            if not any(one.ready for one in self._workers):
                self._backend.check()
            return
        future, worker.starting = worker.starting, None
        try:
            self._backend.result(future)
        except WorkerDiedError as error:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_DEATHS:
                raise WorkerError(_died("the start of a worker", self._failed_starts, error)) from error
            return
        self._failed_starts, worker.ready = 0, True


def _died(what: str, times: int, error: WorkerDiedError) -> str:
    return (
        f"{what}: {times} workers died ({error}), probably out of memory: set executor.workers to fewer or the batch "
        "smaller, and continue with --resume, which keeps what is done (your own program must call this under "
        "`if __name__ == '__main__':`)"
    )


# ----------------------------------------------------------------------------------------------------- this machine


class _ThisProcess:
    """The back end of one worker that is this process: what is asked is done at once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._state = make, None

    def start(self, worker: int) -> Future[None]:
        self._state = self._make()
        return _done(None)

    def submit(self, worker: int, function: Callable[[Any, Any], Any], item: Any) -> Future[Any]:
        return _done(function(self._state, item))

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._state = None
        release_memory()


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def num_local(config: ExecutorConfig, one_per: OnePer = "gpu") -> int:
    """Return the number of workers on this machine; of one, the work is done in this process."""
    if config.workers != "auto":
        return config.workers
    if one_per == "core" or (one_per == "gpu or core" and not num_gpus()):
        return usable_cores()
    return max(1, workers_on(num_gpus(), config.gpus_per_worker or 1))


def in_process(config: ExecutorConfig, one_per: OnePer = "gpu") -> bool:
    """Return whether work is done in this process: for one worker on this machine."""
    return not isinstance(config, RayExecutor) and num_local(config, one_per) == 1


def describe_workers(config: ExecutorConfig, one_per: OnePer = "gpu") -> str:
    """Return in words how much is done at a time; no cluster is asked."""
    if isinstance(config, RayExecutor):
        return f"{'as many' if config.workers == 'auto' else config.workers} at a time on the Ray cluster" + (
            " as it has room for" if config.workers == "auto" else ""
        )
    return f"{num_local(config, one_per)} at a time"


def num_gpus() -> int:
    """Return the number of GPUs that CUDA (or ROCm) shows to this process; none of them is used for it."""
    import torch

    return torch.cuda.device_count()


def _visible_gpus(config: ExecutorConfig, num: int, one_per: OnePer) -> list[str] | None:
    """Return the value of CUDA_VISIBLE_DEVICES of each worker, `None` to leave it as it is.

    Work that needs no GPU sees none, as on a Ray cluster: its many workers would crowd the first one.
    Raises `SettingError` for more GPUs than there are.
    """
    each = config.gpus_per_worker
    if each is None and one_per == "core":
        return [""] * num
    found = num_gpus()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = names[:found] if len(names) >= found else [str(number) for number in range(found)]
    if each is None:
        return [names[number % found] for number in range(num)] if found else None
    if each and num > workers_on(found, each):
        raise SettingError(
            f"executor.gpus_per_worker: got {each:g} for each of {num} workers; this machine has {found} GPUs; lower "
            "workers or gpus_per_worker (below 1, workers share a GPU)"
        )
    if each < 1:
        return [names[number // workers_on(1, each)] if each else "" for number in range(num)]
    return [",".join(names[int(number * each) : int((number + 1) * each)]) for number in range(num)]
