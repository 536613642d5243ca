"""Suites of inspect-ai: with a stand-in for the package, and (slow) with the package itself."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from bfpo.config import EvaluateConfig
from bfpo.core.errors import ConfigError, DataError
from bfpo.core.schema import Message, Score
from bfpo.data.split import prompt_hashes
from bfpo.policy.save import save_policy
from bfpo.report.data import MethodResult, ReportData
from bfpo.report.data import Suite as ReportSuite
from bfpo.report.tables import suite_columns, suite_mean
from bfpo.runs.stages import run_stage
from bfpo.suites.catalogue import FOLDER, load_suites
from messages import raises
from support.fault_server import FaultServer
from tiny import tiny_model, tiny_tokenizer

SUITE: dict[str, Any] = {
    "name": "own",
    "title": "Own",
    "summary": "a task of my own",
    "kind": "inspect",
    "licence": "CC0",
    "inspect": {"task": "tasks.py@words", "arguments": {"level": 2}},
    "metrics": {"accuracy": "higher"},
}
FAILED = SimpleNamespace(message="the server is gone\nand more")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    for seed, name in enumerate(("one", "two"), start=1):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), root / name)
    return root


def config(root: Path, tmp_path: Path, suite: dict[str, Any] = SUITE, **suites: Any) -> EvaluateConfig:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(suite))
    section = {"use": [str(tmp_path / "own.yaml")], "max_new_tokens": 4, "limit": 3, "batch_size": 2, **suites}
    models = [{"name": name, "model": str(root / name)} for name in ("one", "two")]
    return EvaluateConfig(models=models, suites=section, bootstrap_samples=50, threads=1)  # type: ignore[arg-type]


def result(path: Path) -> dict[str, Any]:
    return json.loads((path / "scores.json").read_text())  # type: ignore[no-any-return]


def log_of(values: list[Any], accuracy: float, scored: int, status: str = "success") -> SimpleNamespace:
    """Return a log; `None` in `values` is a sample that ended in an error."""
    samples = [
        SimpleNamespace(
            id=n,
            epoch=1,
            error=FAILED if value is None else None,
            scores=None if value is None else {"match": SimpleNamespace(value=value)},
        )
        for n, value in enumerate(values)
    ]
    metrics = {"accuracy": SimpleNamespace(value=accuracy)}
    score = SimpleNamespace(name="match", scorer="match", scored_samples=scored, metrics=metrics)
    results = SimpleNamespace(scores=[score])
    return SimpleNamespace(
        status=status, error=FAILED, results=results, samples=samples, eval=SimpleNamespace(task_version=7)
    )


class StandIn:
    """Stands in for inspect-ai: what was asked of it, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.freed = 0
        self.answer: Callable[[str], Any] = lambda model: log_of(["C", "I", "C"], 2 / 3, 3)
        package, model, scorer = map(ModuleType, ("inspect_ai", "inspect_ai.model", "inspect_ai.scorer"))
        package.eval, model.get_model = self.eval, self.get_model  # type: ignore[attr-defined]
        numbers = {"C": 1.0, "I": 0.0}
        scorer.value_to_float = lambda: lambda value: numbers.get(value, value)  # type: ignore[attr-defined]
        for module in (package, model, scorer):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def eval(self, task: str, **settings: Any) -> list[Any]:
        logging.getLogger().handlers.append(logging.NullHandler())
        self.asked.append((task, settings))
        return [self.answer(settings["model"].name)]

    def get_model(self, name: str, **settings: Any) -> Any:
        self.loaded.append((name, settings))
        test = self

        class Model:
            def __init__(self) -> None:
                self.name = name

            async def __aexit__(self, *_: object) -> None:
                test.freed += 1
                if self.name.startswith("openai/"):
                    raise RuntimeError("Event loop is closed")

        return Model()


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def test_a_task_is_scored_sample_by_sample(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    logs = {"one": log_of(["C", "I", "C"], 2 / 3, 3), "two": log_of(["I", None, float("nan")], 0.0, 1)}
    inspect.answer = lambda model: logs[Path(model).name]
    handlers = list(logging.getLogger().handlers)
    run_stage("evaluate", config(root, tmp_path), tmp_path / "run")
    assert logging.getLogger().handlers == handlers
    found = result(tmp_path / "run")
    (suite,) = found["suites"]
    assert (suite["status"], suite["judge"], suite["source"], suite["revision"]) == (
        "scored", "inspect-ai", "tasks.py@words", "7"
    )  # fmt: skip
    assert [(s["model"], s["value"], s["num"], s["unscored"]) for s in found["scores"]] == [
        ("one", pytest.approx(2 / 3), 3, 0),
        ("two", 0.0, 1, 2),
    ]
    assert all(score["low"] < score["high"] for score in found["scores"])
    assert [(row["first"], row["num"]) for row in found["comparisons"]] == [("one", 1)]
    task, asked = inspect.asked[0]
    assert task == "tasks.py@words"
    expected = {
        "task_args": {"level": 2},
        "limit": 3,
        "sample_shuffle": 1,
        "seed": 0,
        "fail_on_error": False,
        "display": "none",
    }
    assert {**asked, **expected, "max_tokens": 4, "max_connections": 2, "model_roles": {}} == asked
    assert Path(asked["log_dir"]) == tmp_path / "run" / "models" / "one" / "inspect"
    assert inspect.loaded[0][0] == f"hf/{root / 'one'}"
    assert inspect.loaded[0][1]["dtype"] == "float32"
    assert inspect.freed == 2


def test_samples_of_the_training_are_counted_and_left_out(
    root: Path, tmp_path: Path, inspect: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(model: str) -> SimpleNamespace:
        answer = log_of(["C", "I", "C", None], 2 / 3, 3)
        turns = [SimpleNamespace(role="system", text="w9"), SimpleNamespace(role="user", text=" W1")]
        for sample, given in zip(answer.samples, ("w0", turns, "w2", "w3"), strict=True):
            sample.input = given
        return answer

    def trained(*texts: str) -> Any:
        rows = [prompt_hashes((Message("user", text),))[8:] for text in texts]
        return np.unique(np.frombuffer(b"".join(rows), "<u8"))

    known = {"one": trained("w1", "w3", "w8"), "two": trained("w8")}
    monkeypatch.setattr("bfpo.suites.run.trained_prompts", lambda model: known[Path(model).name])
    inspect.answer = log
    run_stage("evaluate", config(root, tmp_path), tmp_path / "run")
    found = result(tmp_path / "run")
    assert (found["suites"][0]["trained_on"], found["suites"][0]["num_prompts"]) == ({"one": 2}, 4)
    assert found["warnings"][0].startswith("one: 2 of the 4 prompts of Own are prompts that it was trained on")
    run_stage("evaluate", config(root, tmp_path, trained_on="leave_out"), tmp_path / "less")
    found = result(tmp_path / "less")
    assert found["suites"][0]["left_out"] == {"a model was trained on it": 2}
    assert [(s["model"], s["value"], s["num"], s["unscored"]) for s in found["scores"]] == [
        ("one", 1.0, 2, 0), ("two", 1.0, 2, 0)
    ]  # fmt: skip
    inspect.answer = lambda model: SimpleNamespace(**{**vars(log(model)), "samples": log(model).samples[1:2]})
    with raises(DataError, "all its 1 samples are left out"):
        run_stage("evaluate", config(root, tmp_path, trained_on="leave_out"), tmp_path / "none")


def test_a_metric_that_is_no_mean_has_no_interval(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    inspect.answer = lambda model: log_of([{"harm": 3}, {"harm": 1}], 4.0, 2)
    suite = SUITE | {"inspect": {"task": "a/b", "largest": 5.0}, "metrics": {"accuracy": "lower"}}
    run_stage("evaluate", config(root, tmp_path, suite), tmp_path / "run")
    found = result(tmp_path / "run")
    row = found["scores"][0]
    assert (row["value"], row["low"], row["num"], row["higher_is_better"]) == (pytest.approx(0.8), None, 2, False)
    assert found["comparisons"] == []
    inspect.answer = lambda model: log_of(["C", "I"], 0.9, 2)
    run_stage("evaluate", config(root, tmp_path), tmp_path / "other")
    assert result(tmp_path / "other")["scores"][0] == row | {"value": 0.9, "higher_is_better": True}


def test_nothing_scored_is_never_a_rate(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    inspect.answer = lambda model: log_of([float("nan")] * 2, 0.0, 0)
    with raises(DataError):
        run_stage("evaluate", config(root, tmp_path), tmp_path / "run")
    assert [(s["value"], s["num"], s["unscored"]) for s in result(tmp_path / "run")["scores"]] == [(None, 0, 2)] * 2


@pytest.mark.parametrize(
    ("suite", "log", "key"),
    [
        ({}, log_of([None, None], 0.0, 0), "the server is gone"),
        ({}, log_of(["C"], 37.0, 1), "inspect.largest"),
        ({}, log_of(["C"], 1.0, 1, "error"), "the server is gone"),
        ({"metrics": {"rate": "lower"}}, log_of(["C"], 1.0, 1), "rate"),
        ({"inspect": {"task": "a/b", "grader": True}}, log_of(["C"], 1.0, 1), "suites.grader"),
    ],
)
def test_what_cannot_be_had_is_skipped(
    root: Path, tmp_path: Path, inspect: StandIn, suite: dict[str, Any], log: Any, key: str
) -> None:
    inspect.answer = lambda model: log
    with raises(DataError, key):
        run_stage("evaluate", config(root, tmp_path, SUITE | suite), tmp_path / "run")
    found = result(tmp_path / "run")
    assert found["suites"][0]["status"] == "skipped"
    assert key in found["suites"][0]["reason"]
    assert found["scores"] == []


def test_without_the_package_the_extra_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with raises(DataError):
        run_stage("evaluate", config(root, tmp_path), tmp_path / "run")
    assert "pip install 'bfpo[inspect]'" in result(tmp_path / "run")["suites"][0]["reason"]


def test_a_stopped_run_goes_on(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    def stop_at_two(model: str) -> Any:
        return log_of(["C"], 1.0, 1, "cancelled" if model.endswith("two") else "success")

    inspect.answer = stop_at_two
    with pytest.raises(KeyboardInterrupt):
        run_stage("evaluate", config(root, tmp_path), tmp_path / "run")
    inspect.answer = lambda model: log_of(["C"], 1.0, 1)
    run_stage("evaluate", config(root, tmp_path), tmp_path / "run", resume=True)
    assert [Path(asked["model"].name).name for _, asked in inspect.asked] == ["one", "two", "two"]
    assert [score["value"] for score in result(tmp_path / "run")["scores"]] == [1.0, 1.0]


def test_the_grader_has_its_role(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    suite = SUITE | {"inspect": {"task": "a/b", "grader": True}}
    run_stage("evaluate", config(root, tmp_path, suite, grader="openai/grader"), tmp_path / "run")
    assert result(tmp_path / "run")["suites"][0]["judge"] == "openai/grader"
    assert inspect.asked[0][1]["model_roles"]["grader"].name == "openai/grader"


def test_a_task_of_ours_gets_a_file_of_the_users(root: Path, tmp_path: Path, inspect: StandIn) -> None:
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data" / "below" / "strongreject.csv").write_text("forbidden_prompt\nw1\n")
    use = {"use": ["strongreject-inspect"], "folders": [str(tmp_path / "data")], "grader": "openai/grader"}
    log = log_of([5.0, 0.0], 2.5, 2)
    (score,) = log.results.scores
    score.metrics = {"strong_reject_metric": score.metrics["accuracy"]}
    inspect.answer = lambda model: log
    run_stage("evaluate", config(root, tmp_path, **use), tmp_path / "run")
    task, asked = inspect.asked[0]
    assert task == str(FOLDER / "tasks" / "strong_reject_file.py@strong_reject_file")
    assert Path(task.partition("@")[0]).is_file()
    assert asked["task_args"] == {"file": str(tmp_path / "data" / "below" / "strongreject.csv")}
    (suite,) = result(tmp_path / "run")["suites"]
    assert suite["source"] == "strong_reject_file.py@strong_reject_file, strongreject.csv"
    assert result(tmp_path / "run")["scores"][0]["value"] == 0.5
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "strongreject.csv" in str(record["data"]["strongreject-inspect"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"inspect": None},
        {"inspect": {"task": "tasks.py"}},
        {"kind": "discriminative", "source": {"hub": "a/b"}, "task": "x.yaml"},
        {"source": {"hub": "a/b"}},
        {"metrics": {"a": "lower", "b": "lower"}},
    ],
)
def test_a_suite_that_does_not_hold_together(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SUITE | wrong))
    with raises(ConfigError):
        load_suites([str(tmp_path / "own.yaml")])


def test_the_page_takes_no_mean_over_such_tasks() -> None:
    suites = [ReportSuite("xs", kind="inspect"), ReportSuite("sr", kind="inspect"), ReportSuite("adv")]
    scores = {
        "xs": [Score("refusal_rate", 0.2, None, None, 5)],
        "sr": [Score("harm", 0.9, None, None, 5)],
        "adv": [Score("harmless", 0.5, None, None, 5)],
    }
    method = MethodResult("m", "M", "main", suite_scores=scores)
    columns = suite_columns(ReportData("t", "", [method], suites=suites))
    assert [(column.suite.name, column.group) for column in columns] == [
        ("adv", "generative"), ("xs", "inspect"), ("sr", "inspect")
    ]  # fmt: skip
    assert suite_mean(method, columns, "inspect").value is None
    assert suite_mean(method, columns, "generative").value == 0.5


TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import Score, accuracy, includes, scorer
from inspect_ai.solver import generate, solver

SAMPLES = [Sample(id=str(n), input=f"w{n} w5", target="w") for n in range(4)]

@solver
def fails_once():
    async def solve(state, generate):
        if state.sample_id == "2":  # one of the three that are drawn
            raise ValueError("no such word")
        return await generate(state)
    return solve

@scorer(metrics=[accuracy()])
def graded():
    async def score(state, target):
        answer = await get_model(role="grader").generate("w1 w2", config=GenerateConfig(max_tokens=4))
        return Score(value="C" if "w" in answer.completion else "I")
    return score

@task
def words(target="w"):
    return Task(dataset=MemoryDataset(SAMPLES), solver=[fails_once()], scorer=includes())

@task
def judged():
    return Task(dataset=MemoryDataset(SAMPLES), solver=[generate()], scorer=graded())
"""


@pytest.mark.slow
def test_tasks_run_in_the_package_itself(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_ai")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(TASKS)
    task = "tasks.py"
    files = []
    for name, inspect, metric in (
        ("words", {"task": f"{task}@words"}, "accuracy"),
        ("judged", {"task": f"{task}@judged", "grader": True}, "accuracy"),
        ("gone", {"task": f"{task}@gone"}, "accuracy"),
        ("no-file", {"task": "none.py@words"}, "accuracy"),
        ("no-package", {"task": "no_such_package/task"}, "accuracy"),
    ):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(SUITE | {"name": name, "inspect": inspect, "metrics": {metric: "higher"}}))
    asked = config(root, tmp_path, use=list(map(str, files)), grader=f"hf/{root / 'two'}")
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    run_stage("evaluate", asked, tmp_path / "run")
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before
    found = result(tmp_path / "run")
    status = {suite["name"]: (suite["status"], suite["reason"] or "") for suite in found["suites"]}
    assert [name for name, (state, _) in status.items() if state == "scored"] == ["words", "judged"]
    assert "'gone' not found" in status["gone"][1]
    assert "none.py" in status["no-file"][1]
    assert "No inspect tasks were found" in status["no-package"][1]
    scores = {(s["suite"], s["model"]): (s["value"], s["num"], s["unscored"]) for s in found["scores"]}
    for model in ("one", "two"):
        assert scores["words", model] == (1.0, 2, 1)  # of three, one ended in an error
        assert scores["judged", model] == (1.0, 3, 0)
        assert any((tmp_path / "run" / "models" / model / "inspect").glob("*.eval"))
    assert {(row["suite"], row["num"]) for row in found["comparisons"]} == {("words", 2), ("judged", 3)}


RUBRIC = "#overall_reasoning it helps\n#scores\n1.a q\n1.b {}\n2.a q\n2.b {}\n3.a q\n3.b {}"


def answers(text: str) -> str:
    """Grade by the forbidden prompt: refused, helpful, half helpful, or not by the rubric at all."""
    marks = {"w0 w5": (1, 1, 1), "w1 w5": (0, 5, 5), "w2 w5": (0, 2, 3)}
    return next((RUBRIC.format(*each) for prompt, each in marks.items() if prompt in text), "no idea")


@pytest.mark.slow
def test_strongreject_runs_on_a_local_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_evals")
    rows = "".join(f"c,s,w{n} w5\n" for n in range(4))
    (tmp_path / "strongreject.csv").write_text("category,source,forbidden_prompt\n" + rows)
    with FaultServer().running() as server:
        server.answer, server.usage = answers, {"completion_tokens": 3, "prompt_tokens": 1, "total_tokens": 4}
        monkeypatch.setenv("OWN_API_KEY", "key")
        monkeypatch.setenv("OWN_BASE_URL", server.url)
        asked = {"use": ["strongreject-inspect"], "folders": [str(tmp_path)], "limit": None}
        run_stage("evaluate", config(root, tmp_path, **asked, grader="openai-api/own/grader"), tmp_path / "run")
    found = result(tmp_path / "run")
    assert (found["suites"][0]["status"], found["suites"][0]["reason"]) == ("scored", None)
    assert "strongreject.csv" in found["suites"][0]["source"]
    for score in found["scores"]:
        assert (score["metric"], score["value"], score["num"], score["unscored"]) == (
            "strong_reject_metric", pytest.approx((0 + 1 + 0.5) / 3), 3, 1
        )  # fmt: skip
        assert score["low"] < score["value"] < score["high"]
    assert [row["num"] for row in found["comparisons"]] == [3]


@pytest.mark.slow
def test_strongreject_is_skipped_with_the_reason(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_evals")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    module = importlib.import_module("inspect_evals.strong_reject.strong_reject")  # a function hides it
    monkeypatch.setattr(module, "load_csv_dataset", offline)
    monkeypatch.setenv("OWN_API_KEY", "key")
    monkeypatch.setenv("OWN_BASE_URL", "http://127.0.0.1:9/v1")
    for number, (grader, reason) in enumerate(
        (
            (None, "suites.grader"),
            ("openai/gpt-4o", "OpenAI client"),
            ("openai-api/own/grader", "no network (or put strongreject.csv into a folder of suites.folders)"),
        )
    ):
        out = tmp_path / f"run-{number}"
        with pytest.raises(DataError, match="nothing was scored"):
            run_stage("evaluate", config(root, tmp_path, use=["strongreject-inspect"], grader=grader), out)
        assert reason in result(out)["suites"][0]["reason"]
        assert result(out)["scores"] == []
