"""Inside a worker: its environment, its state, and the functions that it runs."""

from __future__ import annotations

import logging
import os
import pickle
import platform
from collections.abc import Callable, Mapping
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

Setup = tuple[bytes, Mapping[str, str], str, bool, str]
"""How a worker begins: the pickled maker of its state, variables of its environment, its folder, whether it logs, and
the version of bfpo that asks."""


class WorkerDiedError(Exception):
    """A worker, its process or its node, is gone; what it was doing may be asked again."""


class Worker:
    """Holds a state that is made once, and runs functions of it.

    The maker is unpickled, which imports torch, only after the variables are set, which torch reads at its import.
    """

    def __init__(self, setup: Setup) -> None:
        make, environment, folder, logs, self._version = setup
        for name in _OF_A_LAUNCHER & os.environ.keys():
            del os.environ[name]
        os.environ.update(environment)
        if Path(folder).is_dir():  # relative paths of a config are those of the process that asks
            os.chdir(folder)
        if logs:
            start_logging(logging.WARNING)
        self._make, self._state = make, None

    def prepare(self) -> None:
        """Make the state; raises `RunError` on a machine with another version of bfpo."""
        if self._version != __version__:
            raise RunError(
                f"{platform.node()}: has bfpo {__version__}, and the work is for {self._version}; install one version "
                "on all nodes"
            )
        self._state = pickle.loads(self._make)()

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        """Return the result of a function of the state and an item."""
        return function(self._state, item)


def setup_of(make: bytes, environment: Mapping[str, str], *, logs: bool) -> Setup:
    """Return the setup of a worker of this process; the first one logs its warnings if this process logs."""
    quiet = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    logging_here = bool(logging.getLogger("bfpo").handlers)
    environment = {**quiet, "TOKENIZERS_PARALLELISM": "false", **environment}
    return make, environment, str(Path.cwd()), logs and logging_here, __version__


_PASSED_ON = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
