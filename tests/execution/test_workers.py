from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bfpo.execution.workers as workers_module
from bfpo.core.errors import DataError, MissingExtraError, RunError, SettingError, WorkerError
from bfpo.execution import cluster
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.worker import usable_cores
from bfpo.execution.workers import Workers, num_local
from execution import jobs
from messages import raises


def local(workers: int | str = 2, **keys: Any) -> ExecutorConfig:
    return ExecutorConfig.model_validate({"workers": workers, **keys})


def test_every_item_has_one_result_and_each_worker_makes_its_state_once(tmp_path: Path) -> None:
    with Workers(local(2), partial(jobs.State, 3, str(tmp_path))) as workers:
        assert len(workers) == 2
        found = dict(workers.map(range(20), jobs.times))
        assert found == {n: 3 * n for n in range(20)}
        assert workers.call(jobs.pid) != os.getpid()
        assert list(workers.in_order(range(12), jobs.slow_first)) == list(range(12))
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def test_results_in_order_hold_few_items_back(tmp_path: Path) -> None:
    read: list[int] = []

    def items() -> Any:
        for n in range(200):
            read.append(n)
            yield n

    with Workers(local(2), partial(jobs.State, 1)) as workers:
        ordered = workers.in_order(items(), jobs.slow_first)
        assert next(ordered) == 0
        assert len(read) <= 4 * 2 + 1
        assert list(ordered) == list(range(1, 200))


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    items = [(n, str(tmp_path), 2) for n in range(8)]
    with Workers(local(2), partial(jobs.State, 1)) as workers:
        found = list(workers.map(items, jobs.dies, depth=2))
    assert Counter(number for number, _ in found) == Counter(range(8))
    assert [result[0] for _, result in sorted(found)] == list(range(8))
    assert len(list(tmp_path.glob("death-*"))) == 2
    assert {file.name: file.read_text() for file in tmp_path.glob("done-*")} == {f"done-{n}": "x" for n in range(8)}


def test_an_item_that_kills_worker_after_worker_is_named(tmp_path: Path) -> None:
    items = [(n, str(tmp_path), 9) for n in range(5)]
    with Workers(local(1), partial(jobs.State, 1)) as workers, raises(WorkerError, "shard 3") as caught:
        list(workers.map(items, jobs.dies, title=lambda item: f"shard {item[0]}"))
    assert getattr(caught.value, "exit_code", None) == 1
    assert len(list(tmp_path.glob("death-*"))) == 3


def test_errors_of_the_work_are_raised_as_they_are() -> None:
    with Workers(local(2), partial(jobs.State, 1)) as workers, raises(DataError, "file.jsonl:7"):
        list(workers.map(range(6), jobs.fails))
    with Workers(local(1), jobs.no_state) as workers, pytest.raises(RuntimeError, match="no model"):
        list(workers.map(range(6), jobs.times))
    with Workers(local(1), jobs.dead_state) as workers, raises(WorkerError, "start"):
        list(workers.map(range(6), jobs.times))


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    def stopped() -> None:
        with Workers(local(2), partial(jobs.State, 1, str(tmp_path))) as workers:
            next(workers.map(range(50), jobs.pid))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    pids = [int(file.name.removeprefix("made-")) for file in tmp_path.iterdir()]
    assert pids
    _check_ended(*pids)


def test_what_a_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    with Workers(local(1), partial(jobs.State, 1)) as workers:
        child = workers.call(jobs.starts)
        assert _runs(child)
    _check_ended(child)
    with Workers(local(1), partial(jobs.State, 1)) as workers:  # a killed one is replaced
        [(_, child)] = workers.map([str(tmp_path / "child")], jobs.starts_and_dies)
        _check_ended(int((tmp_path / "child").read_text()))
        assert _runs(child)
    _check_ended(child)


ENDED = """
import os, signal, sys
from functools import partial
sys.path.insert(0, {tests!r})
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers
from execution import jobs

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    with Workers(ExecutorConfig.model_validate({{"workers": 2}}), partial(jobs.State, 1)) as workers:
        print(*(result for _, result in workers.map(range(2), jobs.starts)), flush=True)
        os.kill(os.getpid(), signal.{name})
        signal.pause()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_workers_and_what_they_have_started_end_with_the_process_that_asks(tmp_path: Path, name: str) -> None:
    script = tmp_path / "ended.py"
    script.write_text(ENDED.format(tests=str(Path(__file__).parents[1]), name=name))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    _check_ended(*pids)


def _check_ended(*processes: int) -> None:
    for one in processes:
        for _ in range(100):
            if not _runs(one):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"process {one} still runs")


def _runs(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):  # the second: it ends while the file is read
        return False


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_cluster_is_counted_as_this_machine_is(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": float(gpus)}} for _ in range(3)]
    remote = SimpleNamespace(options=lambda **settings: None)
    ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes, remote=lambda cls: remote)
    monkeypatch.setattr(cluster, "_import_ray", lambda: ray)
    monkeypatch.setattr(workers_module, "num_gpus", lambda: gpus)
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 4)
    on_ray = ExecutorConfig.model_validate({"backend": "ray"})
    expected = {"gpu": (gpus or 1, 3 * (gpus or 1)), "core": (4, 12), "gpu or core": (gpus or 4, 3 * (gpus or 4))}
    for one_per, numbers in expected.items():
        actors = cluster.RayActors(on_ray, b"", one_per=one_per)
        assert (num_local(local("auto"), one_per), actors.num) == numbers


def test_a_worker_sees_its_own_gpus_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "num_gpus", lambda: 4)
    monkeypatch.setattr("bfpo.execution.local.usable_cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("RANK", "0")
    assert num_local(local("auto")) == 4
    assert num_local(local("auto", gpus_per_worker=2)) == 2
    assert [num_local(local("auto", gpus_per_worker=each)) for each in (0.7, 0.6, 0.4, 1 / 3)] == [4, 4, 8, 12]
    assert num_local(local("auto"), "core") == usable_cores()
    with Workers(local(2), partial(jobs.State, 1)) as workers:
        assert {result for _, result in workers.map(range(6), jobs.seen)} <= {("4", "4", None), ("5", "4", None)}
    names = {
        (workers, each): workers_module._visible_gpus(local(workers, gpus_per_worker=each), workers, "gpu")
        for workers, each in ((4, None), (6, None), (2, 2), (8, 0.5), (3, 0), (4, 0.7), (8, 0.4))
    }
    assert names[4, None] == ["4", "5", "6", "7"]
    assert names[6, None] == ["4", "5", "6", "7", "4", "5"]
    assert names[2, 2] == ["4,5", "6,7"]
    assert names[8, 0.5] == ["4", "4", "5", "5", "6", "6", "7", "7"]
    assert names[3, 0] == ["", "", ""]
    assert names[4, 0.7] == ["4", "5", "6", "7"]
    assert names[8, 0.4] == ["4", "4", "5", "5", "6", "6", "7", "7"]
    assert workers_module._visible_gpus(local(3), 3, "core") == ["", "", ""]
    with raises(SettingError, "gpus_per_worker"):
        workers_module._visible_gpus(local(3, gpus_per_worker=2), 3, "gpu")
    with raises(SettingError, "gpus_per_worker"):  # 5 x 0.7 is less than 4, and yet two would be on one
        workers_module._visible_gpus(local(5, gpus_per_worker=0.7), 5, "gpu")


def test_the_memory_of_a_worker_in_this_process_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    with Workers(local(1), partial(jobs.State, 1), here=True) as workers:
        state = workers.call(jobs.itself)
        state.itself = state  # as in models, which refer to themselves
        alive = weakref.ref(state)
        del state
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(alive() is not None))
    assert seen == [False]


def test_what_waits_for_another_starts_after_it(tmp_path: Path) -> None:
    ended: list[int] = []
    with Workers(local(2), partial(jobs.State, 1)) as workers:
        running_at_most: list[int] = []

        def may_start(item: int, running: Any) -> bool:
            return not running if item == 0 else 0 in ended

        for number, _ in workers.map(
            [3, 0, 1, 2], jobs.times, may_start=may_start, waiting=lambda some: running_at_most.append(len(some))
        ):
            ended.append([3, 0, 1, 2][number])
    assert ended[0] == 0
    assert sorted(ended) == [0, 1, 2, 3]
    assert max(running_at_most) <= 2
    with Workers(local(1), partial(jobs.State, 1)) as workers, raises(RunError, "waits"):
        list(workers.map([1], jobs.times, may_start=lambda item, running: False))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": "all"}, "workers"),
        ({"backend": "slurm"}, "backend"),
        ({"address": "host:6379"}, "address"),
        ({"cpus_per_worker": 2}, "cpus_per_worker"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker"),
        ({"backend": "ray", "cpus_per_worker": 0}, "cpus_per_worker"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ExecutorConfig.model_validate(keys)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with raises(MissingExtraError, "bfpo[ray]"):
        Workers(ExecutorConfig.model_validate({"backend": "ray"}), partial(jobs.State, 1))
