"""Processes: the first of a launcher, and workers that end with the one that started them."""

from __future__ import annotations

import os
import threading
from multiprocessing import connection, parent_process

__all__ = ["end_with_parent", "is_first_process"]


def is_first_process() -> bool:
    """Return whether this process is the first of its launcher, or was not started by one."""
    return os.environ.get("RANK", "0") in ("", "0")


def end_with_parent() -> None:
    """Make this process exit when the one that started it ends: otherwise it would never exit."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
