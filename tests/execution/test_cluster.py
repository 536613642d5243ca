"""Ray: on a cluster of two nodes on this machine commands write the bytes of this machine, and one node is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from bfpo.config import GenerateConfig
from bfpo.core.errors import DataError, RunError, SettingError, WorkerError
from bfpo.execution.settings import ExecutorConfig
from bfpo.execution.workers import Workers
from bfpo.policy.devices import computes_bfloat16
from bfpo.policy.save import save_policy
from bfpo.runs.stages import STAGES, run_stage
from commands.test_sweep import make_sweep
from execution import jobs
from execution.copies import take_copies
from execution.kept import KeptActors
from execution.test_shared_work import make_inputs
from judges.test_rankers import save_reward
from messages import raises
from preparation.test_prepare import mixture, suites
from small_world import SMALL
from tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def node(**settings: Any) -> dict[str, Any]:
    """Return the settings of a node with one core; of an agent without a port, a node waits 15 s and then stops."""
    agents = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in agents]
        ports = [one.getsockname()[1] for one in sockets]
    return {"num_cpus": 1, "include_log_monitor": False, **dict(zip(agents, ports, strict=True)), **settings}


class Nodes:
    """A cluster of two nodes with one core each, and the actors that are kept on it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A node that is gone is noticed after 5 refused checks: by default every 3 s.
        head = node(include_dashboard=False, no_monitor=True, _system_config={"health_check_period_ms": 300})
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._second: Any = None
        self.complete()
        ray.init(address=self._cluster.address, logging_level="ERROR", log_to_driver=False)
        self.kept = KeptActors(ray)

    @property
    def is_complete(self) -> bool:
        """Return whether there is a second node."""
        return self._second is not None

    def complete(self) -> None:
        """Start the second node, if there is none."""
        if not self.is_complete:
            self._second = self._cluster.add_node(**node())
            self._cluster.wait_for_nodes()

    def kill(self) -> None:
        """Kill the second node."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


@pytest.fixture
def cluster(nodes: Nodes) -> Nodes:
    """Both nodes, with room for new actors."""
    nodes.complete()
    nodes.kept.close()
    return nodes


@pytest.fixture
def kept(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> KeptActors:
    """Both nodes, with actors that serve command after command."""
    nodes.complete()
    nodes.kept.take(monkeypatch)
    return nodes.kept


def on_ray(**keys: Any) -> ExecutorConfig:
    return ExecutorConfig.model_validate({"backend": "ray", **keys})


# ------------------------------------------------------------------------------------------------- the same bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, judges, prompts, answers and pairs."""
    made = make_inputs(tmp_path_factory.mktemp("made"))
    save_policy(tiny_model(seed=4, initializer_range=0.6), tiny_tokenizer(), made / "other")
    save_reward(made / "ranker")
    shared = {"title": "Mine", "summary": "s", "kind": "generative", "licence": "CC0", "prompt_kind": "harmful"}
    shared |= {"source": {"files": ["prompts.jsonl"]}, "sampling": {"max_new_tokens": 12, "temperature": 0.0}}
    suite = {
        "name": "mine",
        **shared,
        "judge": {"role": "harm", "default": "oracle"},
        "metrics": {"harmless": "higher"},
    }
    (made / "mine.yaml").write_text(yaml.safe_dump(suite))
    (made / "sweep").mkdir()
    return made


def asked(made: Path) -> dict[str, Any]:
    """Return the keys by which a model answers in several parts."""
    keys = {"model": str(made / "model"), "prompts": str(made / "prompts.jsonl")}
    return {**keys, "temperature": 1.0, "max_new_tokens": 12, "batch_size": 1, "threads": 1}


def opinions(made: Path) -> dict[str, Any]:
    """Return the keys of a judge and a ranker whose models are loaded by workers; what they say is kept in the run."""
    judge = {"format": "classifier", "model": str(made / "judge"), "safe_label": 1, "text": "completion"}
    ranker = {"format": "reward-model", "model": str(made / "ranker")}
    return {"judges": judge, "ranker": ranker, "label_cache": "cache"}


def label(made: Path) -> dict[str, Any]:
    run_stage("generate", GenerateConfig.model_validate({**asked(made), "num_completions": 2}), made / "answers")
    start = {"model": str(made / "model")}
    return {**opinions(made), "completions": str(made / "answers/completions.jsonl"), "coherence": start, "threads": 1}


def redteam(made: Path) -> dict[str, Any]:
    return {**asked(made), **opinions(made), "num_completions": 2, "limit": 9}


def evaluate(made: Path) -> dict[str, Any]:
    judge, ranker, cache = opinions(made).values()
    suites = {"use": str(made / "mine.yaml"), "folders": [str(made)], "limit": 9, "batch_size": 1}
    depth = {"prefill": {"tokens": [3], "assist": "reference", "top": 2}, "divergence": {"answers": "own"}}
    return {
        "models": [{"name": name, "model": str(made / name)} for name in ("model", "other")],
        "suites": {**suites, "judges": {"harm": judge}, "ranker": ranker, "baseline": "model", "label_cache": cache},
        "depth": {"start": "model", **depth},
        "bootstrap_samples": 20,
        "threads": 1,
    }


def prepare(made: Path) -> dict[str, Any]:
    return {"sources": mixture(made), "decontaminate": suites(made), "language_sample": 0}


def sweep(made: Path) -> dict[str, Any]:
    return make_sweep(made / "sweep", reference_cache="cache").resolved()


def compare(made: Path) -> dict[str, Any]:
    return {**SMALL, "quick": True, "seeds": 1, "methods": ["bfpo", {"method": "bfpo", "alpha": 0.4}]}


_OF_THE_RUN = {"executor", "created", "updated", "seconds", "model_runs"}  # the last: hashes of times
_SPEEDS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
_WORK = {"prompt_tokens", "padded_prompt_tokens", "row_steps", "passes"}  # of an engine in the command's own process
_WORK |= {"tokenized", "num_computed"}  # 0 where another training of the comparison was first to fill their cache
_IN_CARDS = re.compile(r"^\| executor\..*\n", re.MULTILINE)


def written(folder: Path) -> dict[str, object]:
    """Return what a run has written, by file: bytes, but for times, speeds and the executor itself.

    Left out is the text of logs: times, and what libraries say at their import.
    """
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name in ("run.json", "comparison.json"):
            found[name] = _without(json.loads(file.read_text()), _OF_THE_RUN | _SPEEDS | _WORK)
        elif file.name == "config.yaml":
            found[name] = _without(yaml.safe_load(file.read_text()), _OF_THE_RUN)
        elif file.name == "metrics.jsonl":
            found[name] = [_without(json.loads(line), _SPEEDS) for line in file.read_text().splitlines()]
        elif file.name == "README.md":
            found[name] = _IN_CARDS.sub("", file.read_text())
        elif file.is_file():
            found[name] = "" if file.suffix == ".log" else file.read_bytes()
    return found


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(one, keys) for key, one in value.items() if key not in keys}
    return [_without(one, keys) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("keys_of", [asked, label, redteam, evaluate, prepare, sweep, compare])
def test_a_command_writes_the_same_bytes(
    keys_of: Callable[[Path], dict[str, Any]],
    made: Path,
    kept: KeptActors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run on this machine, by two workers of the cluster, and by one.

    The chains of `compare`, which run as those of `sweep`, are run by this process in place of a local one, and not by
    one worker of the cluster.
    """
    monkeypatch.setattr("bfpo.judges.shared.PER_CALL", 7)
    monkeypatch.setattr("bfpo.suites.depth._ANSWERS_PER_PART", 5)
    monkeypatch.setattr("bfpo.preparation.shards._BLOCK_ROWS", 7)
    monkeypatch.setattr("bfpo.commands.compare.QUICK_TRIALS", 1)
    stage = "generate" if keys_of is asked else keys_of.__name__
    if stage == "compare":
        take_copies(monkeypatch)
        monkeypatch.setattr("bfpo.experiments.workers.start_logging", lambda: None)  # of another process
        monkeypatch.setattr("bfpo.policy.precision.computes_bfloat16", computes_bfloat16)
    keys = keys_of(made)
    found: dict[str, dict[str, object]] = {}
    for place, backend, workers in (("here", "local", 1), ("two", "ray", 2), ("one", "ray", 1)):
        if (place, stage) == ("one", "compare"):
            continue
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "bfpo", ignore_errors=True)  # nothing is taken from before
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        kept.most = 0
        executor = {"backend": backend, "workers": workers}
        run_stage(stage, STAGES[stage].config_class().model_validate({**keys, "executor": executor}), "run")
        assert kept.most == (0 if place == "here" else workers)
        found[place] = written(Path("run"))
    here = found.pop("here")
    for place, there in found.items():
        assert there.keys() == here.keys(), place
        assert [name for name in here if there[name] != here[name]] == [], place


# ------------------------------------------------------------------------------------------- faults of a cluster


def test_errors_come_back_as_they_are(cluster: Nodes) -> None:
    with Workers(on_ray(workers=1), partial(jobs.State, 1)) as workers, raises(DataError, "file.jsonl:7"):
        list(workers.map(range(6), jobs.fails))
    with raises(SettingError, "cpus_per_worker"):
        Workers(on_ray(cpus_per_worker=64), partial(jobs.State, 1))
    with Workers(on_ray(workers=1), jobs.dead_state) as workers, raises(WorkerError, "start"):
        list(workers.map(range(2), jobs.times))


def test_a_node_that_is_killed_loses_nothing_and_counts_nothing_twice(cluster: Nodes, tmp_path: Path) -> None:
    items = [(n, str(tmp_path)) for n in range(60)]
    found: list[tuple[int, int]] = []
    nodes: set[str] = set()  # whose results have arrived
    with Workers(on_ray(), partial(jobs.State, 3)) as workers:
        assert len(workers) == 2
        for number, result in workers.map(items, jobs.noted, depth=2):
            found.append((number, result))
            nodes.add((tmp_path / str(number)).read_text())
            if cluster.is_complete and len(nodes) == 2:
                cluster.kill()
    assert not cluster.is_complete
    assert Counter(number for number, _ in found) == Counter(range(60))
    assert dict(found) == {n: 3 * n for n in range(60)}


def test_without_a_cluster_it_is_said_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def no_cluster(**keys: Any) -> None:
        assert keys["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", no_cluster)
    with raises(RunError, "ray start"):
        Workers(on_ray(), partial(jobs.State, 1))
