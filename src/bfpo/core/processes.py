"""Processes: the first of a launcher, workers that end with the one that started them, and memory given back."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import connection, parent_process

__all__ = ["end_group", "end_with_parent", "is_first_process", "release_memory"]


def is_first_process() -> bool:
    """Return whether this process is the first of its launcher, or was not started by one."""
    return os.environ.get("RANK", "0") in ("", "0")


def end_with_parent() -> None:
    """Make this process exit when the one that started it ends: otherwise it would never exit.

    It leads a process group of its own from now on, so that what it starts, such as the engine of vLLM, ends with it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def end_group(leader: int) -> None:
    """Ask the processes of a group to end, by SIGTERM; its leader may have ended already."""
    with suppress(OSError):  # no one is left
        os.killpg(leader, signal.SIGTERM)


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        end_group(os.getpid())
        os._exit(1)


def release_memory() -> None:
    """Free what nothing refers to any more, and give back the GPU memory that torch keeps for later use.

    Other processes, such as the engine of vLLM, cannot use it before.
    """
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()
