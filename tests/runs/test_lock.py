"""Two processes and one run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bfpo.runs.stages
from bfpo.config import ToyConfig
from bfpo.core.errors import DataError, RunError
from bfpo.experiments import workers
from bfpo.experiments.points import Chain, Step
from bfpo.runs import lock
from bfpo.runs.folder import RunFolder
from bfpo.runs.lock import LOCK, only_writer
from bfpo.runs.stages import Stage, run_stage
from messages import raises

VARIES = r"(?<=process )\d+|(?<= on )\S+(?= is)|(?<=since )[\dT:+-]+|(?<=life )\d+"
HOLD = """
import sys, time
from pathlib import Path
from bfpo.runs.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    holders: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.wait()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stage that runs the functions of this list."""
    actions: list[Any] = []

    class Acting(Stage):
        def run(self) -> Any:
            return lambda config, folder: [action(folder) for action in actions]

    toy = bfpo.runs.stages.STAGES["toy"]
    monkeypatch.setitem(bfpo.runs.stages.STAGES, "toy", Acting(toy.name, toy.config, toy.module, toy.help))
    return actions


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


def run(folder: Path, resume: bool = False) -> RunFolder:
    return run_stage("toy", ToyConfig(), folder, resume=resume)


def write_lock(folder: Path, *, age: float = 0.0, **changes: Any) -> Path:
    """Write a lock that no process holds."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK
    path.touch()
    here = {"host": socket.gethostname(), "pid": os.getppid(), "start": lock._start_of(os.getppid()), "since": "then"}
    path.write_text(json.dumps({**here, "inode": path.stat().st_ino, **changes}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_second_process_is_refused_and_changes_nothing(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], stage: list[Any]
) -> None:
    stage.append(lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run")
    before = files(tmp_path)
    holder = hold(tmp_path / "run")
    for resume in (False, True):
        with raises(RunError, "another --out", mask=VARIES) as error:
            run(tmp_path / "run", resume)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
        assert error.value.exit_code == 2
    with raises(RunError, mask=VARIES):  # by another name of the folder
        (tmp_path / "link").symlink_to(tmp_path / "run")
        run(tmp_path / "link", resume=True)
    assert files(tmp_path) == before


def test_a_killed_process_leaves_a_lock_that_counts_no_more(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], stage: list[Any]
) -> None:
    holder = hold(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    assert run(tmp_path / "run", resume=True).finished
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("error", [None, DataError("no"), KeyboardInterrupt()])
def test_the_lock_ends_with_the_run(tmp_path: Path, stage: list[Any], error: BaseException | None) -> None:
    seen: list[bool] = []

    def act(folder: RunFolder) -> None:
        seen.append((folder.path / LOCK).exists())
        if error is not None:
            raise error

    stage.append(act)
    if error is None:
        run(tmp_path / "run")
    else:
        with pytest.raises(type(error)):
            run(tmp_path / "run")
    assert seen == [True]
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_inside_another_has_a_lock_of_its_own_and_the_same_folder_is_refused(
    tmp_path: Path, stage: list[Any]
) -> None:
    def act(folder: RunFolder) -> None:
        stage.clear()
        assert run(folder.path / "inner").finished
        with raises(RunError, "already"):
            run(folder.path, resume=True)

    stage.append(act)
    assert run(tmp_path / "run").finished


def test_other_processes_of_a_launcher_take_no_lock(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    with only_writer(tmp_path / "run"):
        pass
    monkeypatch.setenv("RANK", "0")
    with raises(RunError, mask=VARIES), only_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("changes", "age", "lives"),
    [
        ({}, 0, True),
        ({"pid": 2**22 + 1}, 0, False),
        ({"start": "another boot 1"}, 0, False),  # a later process with the same number
        ({"pid": os.getpid()}, 0, False),  # as in a container that was started again
        ({"inode": 1}, 0, False),  # a copy of another folder
        ({"host": "elsewhere"}, 0, True),
        ({"host": "elsewhere"}, 250, True),
        ({"host": "elsewhere"}, 301, False),
        ({"host": 3, "pid": "x"}, 0, False),
    ],
)
@pytest.mark.parametrize("has_locks", [True, False])
def test_the_file_decides_where_the_kernel_says_nothing(
    tmp_path: Path,
    stage: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    age: float,
    lives: bool,
    has_locks: bool,
) -> None:
    def no_locks(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    path = write_lock(tmp_path / "run", age=age, **changes)
    if lives:
        content = path.read_text()
        with pytest.raises(RunError, match="another --out"):
            run(tmp_path / "run")
        assert path.read_text() == content
        assert list((tmp_path / "run").iterdir()) == [path]
    else:
        assert run(tmp_path / "run").finished
        assert not path.exists()


def test_a_link_is_not_followed(tmp_path: Path, stage: list[Any]) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with raises(RunError, LOCK):
        run(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "text"


def test_the_message_about_another_host_says_how_to_go_on(tmp_path: Path, stage: list[Any]) -> None:
    path = write_lock(tmp_path / "run", age=20, host="elsewhere", pid=77, since="2026-01-02T03:04:05+00:00")
    with raises(RunError, str(path), "last sign of life", mask=VARIES):
        run(tmp_path / "run")


@pytest.mark.parametrize("lives", [False, True])
def test_a_chain_takes_over_the_folder_of_a_worker_that_died_on_another_node(
    tmp_path: Path, stage: list[Any], monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr(lock, "SECONDS_UNTIL_STALE", 0.3)
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_TRIES", 0.1)
    write_lock(tmp_path / "run", age=-3600 if lives else 0, host="elsewhere")
    chain = Chain("point", 0, (Step("toy", ToyConfig(), tmp_path / "run"),))
    if lives:
        with pytest.raises(RunError, match="elsewhere"):
            workers._run_chain(str(tmp_path), None, chain)
    else:
        workers._run_chain(str(tmp_path), None, chain)
        assert run(tmp_path / "run", resume=True).finished


def test_a_chain_does_not_wait_for_a_process_of_this_machine(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    hold(tmp_path / "run")
    chain = Chain("point", 0, (Step("toy", ToyConfig(), tmp_path / "run"),))
    with pytest.raises(RunError, match="another --out"):
        workers._run_chain(str(tmp_path), None, chain)


def test_a_run_gives_signs_of_life_and_sees_that_its_lock_is_gone(
    tmp_path: Path, stage: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_BETWEEN_SIGNS", 0.01)

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not until() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert until()

    def act(folder: RunFolder) -> None:
        path = folder.path / LOCK
        os.utime(path, (1, 1))
        wait(lambda: path.stat().st_mtime > 1)
        path.unlink()
        wait(lambda: "was removed while this run writes" in caplog.text)

    stage.append(act)
    assert run(tmp_path / "run").finished


def test_a_finished_run_is_read_where_nothing_can_be_written(
    tmp_path: Path, stage: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run")
    before = files(tmp_path)

    def refuse(*given: Any, **settings: Any) -> int:
        raise PermissionError(errno.EROFS, "read-only")

    monkeypatch.setattr(lock.os, "open", refuse)
    assert run(tmp_path / "run", resume=True).finished
    assert files(tmp_path) == before


def test_a_copy_of_a_folder_that_is_in_use_is_free(
    tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]], stage: list[Any]
) -> None:
    hold(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run(tmp_path / "copy", resume=True).finished


def test_a_folder_whose_run_was_killed_before_any_output_counts_as_empty(tmp_path: Path, stage: list[Any]) -> None:
    stage.append(lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run")
    write_lock(tmp_path / "run", pid=2**22 + 1)
    stage.clear()
    assert run(tmp_path / "run").finished
