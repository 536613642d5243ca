"""Work for the tests of workers, in a module that other processes can import."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


class State:
    def __init__(self, factor: int, folder: str | None = None) -> None:
        self.factor = factor
        if folder is not None:
            (Path(folder) / f"made-{os.getpid()}").touch()


def times(state: State, item: int) -> int:
    return state.factor * item


def itself(state: State, item: Any) -> State:
    return state


def pid(state: State, item: Any) -> int:
    return os.getpid()


def starts(state: State, item: Any) -> int:
    """Start a process that does not end by itself, as vLLM does, and return its number."""
    return subprocess.Popen(["sleep", "600"]).pid


def starts_and_dies(state: State, file: str) -> int:
    """The same, with a note of the number, after which the worker is killed, the first time."""
    if Path(file).exists():
        return starts(state, None)
    Path(file).write_text(str(starts(state, None)))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def seen(state: State, item: Any) -> tuple[str | None, str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"), os.environ.get("RANK")


def dies(state: State, item: tuple[int, str, int]) -> tuple[int, int]:
    """Kill the worker at item 3, as often as asked, after a note of it; else return the item and the process."""
    number, folder, deaths = item
    if number == 3:
        notes = list(Path(folder).glob("death-*"))
        if len(notes) < deaths:
            (Path(folder) / f"death-{len(notes)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    with (Path(folder) / f"done-{number}").open("a") as file:
        file.write("x")
    return number, os.getpid()


def slow_first(state: State, item: int) -> int:
    time.sleep(0.3 if item == 0 else 0.0)
    return item


def fails(state: State, item: int) -> int:
    from bfpo.core.errors import DataError

    if item == 2:
        raise DataError.at("file.jsonl", 7, "cannot be used")
    return item


def noted(state: State, item: tuple[int, str]) -> int:
    """Note the node of Ray on which an item is worked on, and wait until two nodes have noted one."""
    import ray

    number, folder = item
    (Path(folder) / f"{number}").write_text(ray.get_runtime_context().get_node_id())
    for _ in range(2400):
        if len({file.read_text() for file in Path(folder).iterdir()} - {""}) > 1:
            break
        time.sleep(0.05)
    time.sleep(0.02)
    return state.factor * number


def no_state() -> State:
    raise RuntimeError("no model")


def dead_state() -> State:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
