"""Actors of Ray that stay when they are ended and serve the next command: what a new one costs is its imports."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from bfpo.execution import cluster
from bfpo.execution.worker import Setup, Worker


class KeptActors:
    """Stands between `RayActors` and Ray where actors are made and ended; `most` counts those in use at a time."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._free: list[Any] = []
        self._used: list[Any] = []
        self.most = 0

    def take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let executors have such actors."""
        between = SimpleNamespace(**vars(self._ray))
        between.remote, between.kill = self._remote, self._end
        monkeypatch.setattr(cluster, "_import_ray", lambda: between)

    def close(self) -> None:
        """End the actors."""
        for actor in (*self._free, *self._used):
            self._ray.kill(actor)
        self._free, self._used = [], []

    def _remote(self, cls: type[Worker]) -> Any:
        def options(**settings: Any) -> Any:
            made = self._ray.remote(cls).options(**settings)
            return SimpleNamespace(remote=lambda setup: self._begin(made, setup))

        return SimpleNamespace(options=options)

    def _begin(self, made: Any, setup: Setup) -> Any:
        if self._free:
            actor = self._free.pop(0)
            actor.__ray_call__.remote(lambda worker: gc.freeze())  # every training collects, and would walk all modules
            actor.__ray_call__.remote(Worker.__init__, setup)
        else:
            actor = made.remote(setup)
        self._used.append(actor)
        self.most = max(self.most, len(self._used))
        return actor

    def _end(self, actor: Any) -> None:
        self._used.remove(actor)
        self._free.append(actor)
