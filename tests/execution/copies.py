"""Workers that live in this process and get copies of what they are sent, without the seconds that processes take."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future
from threading import Timer
from typing import Any

import pytest


class Copies:
    """A back end of `num` workers; the first result of all arrives after others."""

    def __init__(self, make: bytes, num: int, visible_gpus: Any = None, threads: int | None = None) -> None:
        self._make, self._states, self.used = make, dict[int, Any](), set[int]()

    def start(self, worker: int) -> Future[None]:
        self._states[worker] = pickle.loads(self._make)()
        return self._arrives(None, 0.0)

    def submit(self, worker: int, function: Callable[[Any, Any], Any], item: Any) -> Future[Any]:
        function, item = pickle.loads(pickle.dumps((function, item)))
        late = 0.0 if self.used else 0.2
        self.used.add(worker)
        return self._arrives(pickle.loads(pickle.dumps(function(self._states[worker], item))), late)

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._states.clear()

    @staticmethod
    def _arrives(result: Any, seconds: float) -> Future[Any]:
        future: Future[Any] = Future()
        if seconds:
            Timer(seconds, future.set_result, [result]).start()
        else:
            future.set_result(result)
        return future


def take_copies(monkeypatch: pytest.MonkeyPatch) -> list[Copies]:
    """Let local executors have such workers; returns a list that gets each back end as it is made."""
    made: list[Copies] = []

    def backend(*args: Any, **kwargs: Any) -> Copies:
        made.append(Copies(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("bfpo.execution.local.LocalProcesses", backend)
    return made
