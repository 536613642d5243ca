"""Workers that are actors of a Ray cluster, one of each wherever it has room."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal

from bfpo.core.errors import MissingExtraError, RunError, SettingError, WorkerError, first_line
from bfpo.execution.settings import RayExecutor, workers_on
from bfpo.execution.worker import Worker, WorkerDiedError, setup_of

__all__ = ["RayActors"]

_log = logging.getLogger(__name__)
_SECONDS_TO_START = 600.0  # without a single worker; a cluster that grows takes minutes for a node
_SECONDS_BETWEEN_LINES = 30.0


class RayActors:
    """Actors with `config.cpus_per_worker` cores and their GPUs; `num` is how many there are at the same time.

    Connects to a cluster that runs, and leaves it as it was. Raises `MissingExtraError` without Ray, `RunError` if no
    cluster runs, `SettingError` if no node has room for a worker.
    """

    def __init__(
        self,
        config: RayExecutor,
        make: bytes,
        *,
        one_per: Literal["gpu", "core", "gpu or core"] = "gpu",
        threads: int | None = None,
    ) -> None:
        self._ray = _import_ray()
        self._connected = _connect(self._ray, config)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        each = config.gpus_per_worker
        if each is None:
            each = 1.0 if gpus and one_per != "core" else 0.0
        room = [int(node.get("CPU", 0.0) // config.cpus_per_worker) for node in nodes]
        if each:
            room = [min(most, workers_on(node.get("GPU", 0.0), each)) for most, node in zip(room, nodes, strict=True)]
        asked = f"{config.cpus_per_worker} cores and {each:g} GPUs"
        if not any(room):
            self.close()
            raise SettingError(
                f"executor: no node of the cluster ({len(nodes)} nodes, {cpus:g} cores, {gpus:g} GPUs) has {asked} for "
                "a worker; lower cpus_per_worker or gpus_per_worker"
            )
        auto = sum(room) if each or one_per != "gpu" else sum(map(bool, room))
        self.num = auto if config.workers == "auto" else config.workers
        self._threads, self._make = threads or config.cpus_per_worker, make
        self._actor = self._ray.remote(Worker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=each,
            max_restarts=0,  # replaced here, so that the items of a dead one are known
            scheduling_strategy="SPREAD",
        )
        self._actors: dict[int, Any] = {}
        self._since = self._line = time.monotonic()
        self._wanted = f"{self.num} workers with {asked} each, on {len(nodes)} nodes with {cpus:g} cores, {gpus:g} GPUs"

    def start(self, worker: int) -> Future[None]:
        """Start an actor, in place of one that died."""
        self._since = self._line = time.monotonic()
        self._end(worker)
        environment = {"OMP_NUM_THREADS": str(self._threads), "RAYON_NUM_THREADS": str(self._threads)}
        self._actors[worker] = self._actor.remote(setup_of(self._make, environment, logs=worker == 0))
        future: Future[None] = self._actors[worker].prepare.remote().future()
        return future

    def submit(self, worker: int, function: Callable[[Any, Any], Any], item: Any) -> Future[Any]:
        """Have an actor run a function."""
        future: Future[Any] = self._actors[worker].run.remote(function, item).future()
        return future

    def result(self, future: Future[Any]) -> Any:
        """Return the result of a future that is done; anything but an error of the function itself is a death."""
        errors = self._ray.exceptions
        try:
            return future.result()
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.RayError):  # killed within the call, as for its memory
                raise WorkerDiedError(first_line(error.cause)) from error
            raise error.cause from error
        except errors.RayError as error:
            raise WorkerDiedError(first_line(error)) from error

    def check(self) -> None:
        """Say that the cluster has no room; raises `WorkerError` after ten minutes without a worker."""
        now = time.monotonic()
        if now - self._since > _SECONDS_TO_START:
            raise WorkerError(
                f"executor: no worker has started for {_SECONDS_TO_START:.0f} s; asked were {self._wanted}; see `ray "
                "status`, and continue with --resume"
            )
        if now - self._line > _SECONDS_BETWEEN_LINES:
            self._line = now
            _log.info("waiting for the cluster: %s", self._wanted)

    def close(self) -> None:
        """End the actors, and the connection if it was made here."""
        for worker in list(getattr(self, "_actors", ())):
            self._end(worker)
        if self._connected:
            self._ray.shutdown()

    def _end(self, worker: int) -> None:
        if (actor := self._actors.pop(worker, None)) is not None:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError(
            "executor.backend 'ray' needs the package ray; install it with: pip install 'bfpo[ray]'"
        ) from error
    return ray


def _connect(ray: Any, config: RayExecutor) -> bool:
    """Connect to the cluster; return whether there was no connection before."""
    if ray.is_initialized():
        return False
    try:
        ray.init(address=config.address or "auto", logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        at = f"at {config.address}" if config.address else "here"
        raise RunError(
            f"executor.address: no Ray cluster can be reached {at} ({first_line(error)}); start one by `ray start "
            "--head`, and on the other nodes `ray start --address HOST:6379`, or set executor.backend to local"
        ) from error
    return True
