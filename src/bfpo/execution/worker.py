"""Inside a worker: its environment, its state, and the functions that it runs."""

from __future__ import annotations

import logging
import os
import pickle
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo._version import __version__
from bfpo.core.console import start_logging
from bfpo.core.errors import RunError

__all__ = ["Setup", "Worker", "WorkerDiedError", "setup_of", "usable_cores"]

# Of a launcher: a worker is no rank of its group, and would wait for the others.
_OF_A_LAUNCHER = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
)


@dataclass(frozen=True, slots=True)
class Setup:
    """How a worker begins: the pickled maker of its state, and what it takes over from the process that asks.

    `environment`: variables; `folder`: the working directory; `paths`: where modules are; `logs`: whether warnings of
    the worker are written; `version`: that of bfpo.
    """

    make: bytes
    environment: Mapping[str, str]
    folder: str
    paths: tuple[str, ...]
    logs: bool
    version: str = __version__


class WorkerDiedError(Exception):
    """A worker, its process or its node, is gone; what it was doing may be asked again."""


class Worker:
    """Holds a state that is made once, and runs functions of it.

    The maker is unpickled, which imports torch, only after the variables are set, which torch reads at its import.
    """

    def __init__(self, setup: Setup) -> None:
        for name in _OF_A_LAUNCHER & os.environ.keys():
            del os.environ[name]
        os.environ.update(setup.environment)
        sys.path += [path for path in setup.paths if path not in sys.path]
        if Path(setup.folder).is_dir():  # relative paths of a config are those of the process that asks
            os.chdir(setup.folder)
        if setup.logs:
            start_logging(logging.WARNING)
        self._setup, self._state = setup, None

    def prepare(self) -> None:
        """Make the state; raises `RunError` on a machine with another version of bfpo."""
        if self._setup.version != __version__:
            raise RunError(
                f"{platform.node()}: has bfpo {__version__}, and the work is for {self._setup.version}; install one "
                "version on all nodes"
            )
        self._state = pickle.loads(self._setup.make)()

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        """Return the result of a function of the state and an item."""
        return function(self._state, item)


def setup_of(make: bytes, environment: Mapping[str, str], *, logs: bool) -> Setup:
    """Return the setup of a worker of this process; the first one logs its warnings if this process logs."""
    quiet = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    logging_here = bool(logging.getLogger("bfpo").handlers)
    environment = {**quiet, "TOKENIZERS_PARALLELISM": "false", **environment}
    return Setup(make, environment, str(Path.cwd()), tuple(map(os.path.abspath, sys.path)), logs and logging_here)


_PASSED_ON = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
