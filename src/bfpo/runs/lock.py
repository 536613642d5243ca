"""One run, one writer: the lock file of a run folder, which names the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from bfpo.core.errors import HeldError, RunError
from bfpo.core.processes import is_first_process

__all__ = ["LOCK", "SECONDS_UNTIL_STALE", "only_writer"]

_log = logging.getLogger(__name__)

LOCK = ".lock"
_SECONDS_BETWEEN_SIGNS = 30.0
SECONDS_UNTIL_STALE = 300.0
"""How long the lock of a process of another host lasts without a sign of life."""
_held: set[Path] = set()  # by this process, to which locks of the kernel are transparent


@dataclass(frozen=True, slots=True)
class _Holder:
    """A process, the time when it started, which a later one with the same number does not share, and its lock file."""

    host: str
    pid: int
    start: str
    since: str
    inode: int


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created; of several processes of a launcher, the first one holds it.

    The lock is one of the kernel, which ends with its process, on a file with host and process number. Where the file
    system has no such locks, or the file names another host, the process number or the last sign of life decides. A
    folder that cannot be written is not locked: a finished run can be read there, and any other use reports it.

    Raises `HeldError` if another process holds the lock; nothing is changed then.
    """
    if not is_first_process() or (folder.exists() and not folder.is_dir()):
        yield
        return
    path = folder.resolve() / LOCK
    if path in _held:
        raise RunError(
            f"{folder}: this process is already writing to it; wait until that run ends, or set another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder, path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{path}: is a link, which bfpo does not make; delete it") from error
        yield
        return
    _held.add(path)
    ended = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(path, descriptor, ended), daemon=True)
    signs.start()
    try:
        yield
    finally:
        ended.set()
        signs.join()
        _held.discard(path)
        with suppress(OSError):
            if _is_file(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _take(folder: Path, path: Path) -> int:
    """Return the descriptor of the locked file; raises `HeldError` if another process holds it, or `OSError`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            has_locks = _lock(descriptor)
            if not _is_file(path, descriptor):  # the holder has just ended and removed it
                os.close(descriptor)
                continue
            holder = _read(descriptor)
            silent = max(0.0, time.time() - os.fstat(descriptor).st_mtime)
            if has_locks is None or (holder is not None and _lives(holder, silent)):
                error = HeldError(_refusal(folder, path, holder, silent))
                error.on_another_host = holder is not None and holder.host != socket.gethostname()
                raise error
            if holder is not None:
                _log.info("%s: process %d on %s, which held the lock, has ended", folder, holder.pid, holder.host)
            own = _Holder(
                socket.gethostname(), os.getpid(), _start_of(os.getpid()), _now(), os.fstat(descriptor).st_ino
            )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(asdict(own)) + "\n").encode(), 0)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int) -> bool | None:
    """Lock a file for this process: true, `None` if another process has locked it, false without such locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in (errno.EACCES, errno.EAGAIN) else False
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> _Holder | None:
    """Return the process that a lock file names; `None` for a copy of another folder's file, and for a broken one."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        found = _Holder(str(value["host"]), int(value["pid"]), str(value["start"]), str(value["since"]), value["inode"])
    except (ValueError, KeyError, TypeError):
        return None
    return found if found.inode == os.fstat(descriptor).st_ino else None


def _lives(holder: _Holder, silent: float) -> bool:
    """Return whether the process of a lock that the kernel does not hold may still write; `silent`: seconds."""
    if holder.host != socket.gethostname():
        return silent < SECONDS_UNTIL_STALE
    if holder.pid == os.getpid():  # an earlier process with this number, as in a container that was started again
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return "" in (holder.start, start := _start_of(holder.pid)) or holder.start == start


def _start_of(pid: int) -> str:
    """Return when a process started: the boot of the system and the clock ticks since; empty where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{boot} {stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _refusal(folder: Path, path: Path, holder: _Holder | None, silent: float) -> str:
    if holder is None:
        return f"{folder}: another process is writing to it; wait until it ends, or set another --out"
    who = f"{folder}: process {holder.pid} on {holder.host} has been writing to it since {holder.since}"
    if holder.host == socket.gethostname():
        return f"{who}; wait until it ends, stop it, or set another --out"
    return (
        f"{who} (last sign of life {silent:.0f} s ago); wait until it ends, or set another --out. If it was killed, "
        f"its lock ends {SECONDS_UNTIL_STALE:.0f} s after its last sign of life, or when you delete {path}"
    )


def _give_signs(path: Path, descriptor: int, ended: threading.Event) -> None:
    """Touch the lock file until the run ends; say if somebody has removed it."""
    while not ended.wait(_SECONDS_BETWEEN_SIGNS):
        with suppress(OSError):
            os.utime(descriptor)
            if not _is_file(path, descriptor):
                _log.warning("%s: was removed while this run writes; another process may write to the folder too", path)
                return


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
