"""Ray: a cluster of two nodes on this machine, one of which is killed while it works."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bfpo.core.errors import DataError, RunError, SettingError, WorkerError
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers
from execution import jobs
from messages import raises

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def node(**settings: Any) -> dict[str, Any]:
    """Return the settings of a node with one core; of an agent without a port, a node waits 15 s and then stops."""
    agents = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in agents]
        ports = [one.getsockname()[1] for one in sockets]
    return {"num_cpus": 1, "include_log_monitor": False, **dict(zip(agents, ports, strict=True)), **settings}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    # A node that is gone is noticed after 5 refused checks: by default every 3 s.
    head = node(include_dashboard=False, no_monitor=True, _system_config={"health_check_period_ms": 300})
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def on_ray(**keys: Any) -> ExecutorConfig:
    return ExecutorConfig.model_validate({"backend": "ray", **keys})


def test_a_node_that_is_killed_loses_nothing_and_counts_nothing_twice(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(**node())
    cluster.wait_for_nodes()
    items = [(n, str(tmp_path)) for n in range(60)]
    found: list[tuple[int, int]] = []
    nodes: set[str] = set()  # whose results have arrived
    with Workers(on_ray(), partial(jobs.State, 3)) as workers:
        assert len(workers) == 2
        for number, result in workers.map(items, jobs.noted, depth=2):
            found.append((number, result))
            nodes.add((tmp_path / str(number)).read_text())
            if second is not None and len(nodes) == 2:
                cluster.remove_node(second, allow_graceful=False)
                second = None
    assert second is None
    assert Counter(number for number, _ in found) == Counter(range(60))
    assert dict(found) == {n: 3 * n for n in range(60)}


def test_the_bytes_are_those_of_this_process(cluster: Any, tmp_path: Path) -> None:
    from bfpo.runs.stages import run_stage
    from execution.test_shared_work import generate, make_inputs

    made = make_inputs(tmp_path / "made")
    run_stage("generate", generate(made), tmp_path / "here")
    run_stage("generate", generate(made, executor={"backend": "ray"}), tmp_path / "there")
    one, other = ((tmp_path / name / "completions.jsonl").read_bytes() for name in ("here", "there"))
    assert one == other


def test_errors_come_back_as_they_are(cluster: Any) -> None:
    with Workers(on_ray(workers=1), partial(jobs.State, 1)) as workers, raises(DataError, "file.jsonl:7"):
        list(workers.map(range(6), jobs.fails))
    with raises(SettingError, "cpus_per_worker"):
        Workers(on_ray(cpus_per_worker=64), partial(jobs.State, 1))
    with Workers(on_ray(workers=1), jobs.dead_state) as workers, raises(WorkerError, "start"):
        list(workers.map(range(2), jobs.times))


def test_without_a_cluster_it_is_said_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def no_cluster(**keys: Any) -> None:
        assert keys["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", no_cluster)
    with raises(RunError, "ray start"):
        Workers(on_ray(), partial(jobs.State, 1))
