"""Suites asked of a model behind an OpenAI-compatible server, beside one that is loaded here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("openai")

from bfpo.commands import report
from bfpo.config import EvaluateConfig
from bfpo.config.load import load_config
from bfpo.core.errors import ConfigError, DataError, ServerError
from bfpo.policy.save import save_policy
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises
from support.fault_server import FaultServer
from tiny import tiny_model, tiny_tokenizer

SUITE = {
    "name": "mine",
    "title": "Mine",
    "summary": "prompts of my own",
    "kind": "generative",
    "licence": "CC0",
    "source": {"files": ["mine.jsonl"]},
    "metrics": {"refused_harmful": "higher"},
    "sampling": {"max_new_tokens": 4, "temperature": 0.0},
}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer().running() as running:
        running.answer = lambda text: "I cannot help with that." if text.endswith("1") else f"Sure, {text}"
        yield running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    save_policy(tiny_model(seed=1), tiny_tokenizer(), root / "local")
    rows = [{"id": str(n), "prompt": f"w{n} w{n}", "kind": "harmful"} for n in range(4)]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine.yaml").write_text(yaml.safe_dump(SUITE))
    return root


def config(server: FaultServer, root: Path, *, use: tuple[str, ...] = (), local: bool = True, **keys: Any) -> Any:
    served = {"name": "served", "model": "writer", "engine": "server", "url": server.url, "max_retries": 0, **keys}
    models = [served, {"name": "local", "model": str(root / "local")}] if local else [served]
    suites = {"use": [str(root / "mine.yaml"), *use], "folders": [str(root)], "label_cache": str(root / "cache")}
    values = {"models": models, "suites": suites, "bootstrap_samples": 20, "threads": 1}
    return EvaluateConfig.model_validate(values)


def result(path: Path) -> dict[str, Any]:
    return json.loads((path / "scores.json").read_text())  # type: ignore[no-any-return]


def test_a_served_model_is_asked_and_compared(server: FaultServer, root: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(server, root), tmp_path / "run")
    found = result(tmp_path / "run")
    scores = {score["model"]: score for score in found["scores"] if score["metric"] == "refused_harmful"}
    assert (scores["served"]["value"], scores["served"]["num"], scores["local"]["num"]) == (0.25, 4, 4)
    assert [(row["first"], row["second"], row["num"]) for row in found["comparisons"]] == [("served", "local", 4)]
    assert found["models"][0] == {
        "name": "served", "model": "writer", "reference": None, "engine": "server", "url": server.url
    }  # fmt: skip
    assert found["models"][1].keys() == {"name", "model", "reference"}
    assert {body["model"] for body in server.bodies} == {"writer"}
    assert {(body["max_tokens"], body["temperature"]) for body in server.bodies} == {(4, 0.0)}
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows if row["model"] == "served"} >= {"I cannot help with that.", "Sure, w0 w0"}


def test_a_stopped_run_asks_only_for_what_is_missing(server: FaultServer, root: Path, tmp_path: Path) -> None:
    server.plan = lambda text, attempt: "500" if text == "w2 w2" and attempt == 0 else "ok"
    with raises(ServerError):
        run_stage("evaluate", config(server, root, local=False), tmp_path / "run")
    again = load_config(EvaluateConfig, tmp_path / "run" / "config.yaml")
    assert again == config(server, root, local=False)
    run_stage("evaluate", again, tmp_path / "run", resume=True)
    assert server.requests == {"w0 w0": 1, "w1 w1": 1, "w2 w2": 2, "w3 w3": 1}
    assert result(tmp_path / "run")["scores"][0]["num"] == 4


def test_answers_are_used_again_from_the_same_server_alone(server: FaultServer, root: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(server, root, local=False), tmp_path / "run")
    asked = config(server, root, local=False, timeout=9.0).resolved()
    asked["suites"]["reuse"] = str(tmp_path / "run")
    run_stage("evaluate", EvaluateConfig.model_validate(asked), tmp_path / "again")
    assert server.num_requests == 4
    assert (tmp_path / "again" / "scores.json").read_bytes() == (tmp_path / "run" / "scores.json").read_bytes()
    asked["models"][0]["model"] = "other"
    run_stage("evaluate", EvaluateConfig.model_validate(asked), tmp_path / "other")
    assert server.num_requests == 8


def test_what_needs_the_weights_is_skipped_for_all(server: FaultServer, root: Path, tmp_path: Path) -> None:
    use = ("ifeval", "strongreject-inspect")
    run_stage("evaluate", config(server, root, use=use), tmp_path / "run")
    suites = {suite["name"]: suite for suite in result(tmp_path / "run")["suites"]}
    assert suites["mine"]["status"] == "scored"
    for name, package in (("ifeval", "lm-eval"), ("strongreject-inspect", "inspect-ai")):
        assert suites[name]["status"] == "skipped"
        assert suites[name]["reason"].startswith(f"served is behind a server, and {package} needs the weights")


def test_requests_are_bounded(server: FaultServer, root: Path, tmp_path: Path) -> None:
    asked = config(server, root, local=False).resolved()
    asked["suites"]["max_requests"] = 2
    with raises(ServerError):
        run_stage("evaluate", EvaluateConfig.model_validate(asked), tmp_path / "run")
    assert server.num_requests == 2


def test_one_limit_of_requests_holds_for_all_models(server: FaultServer, root: Path, tmp_path: Path) -> None:
    asked = config(server, root, local=False).resolved()
    asked["models"].append({**asked["models"][0], "name": "second", "model": "other"})
    asked["suites"]["max_requests"] = 6
    settings = EvaluateConfig.model_validate(asked)
    with raises(ServerError, "max_requests"):
        run_stage("evaluate", settings, tmp_path / "run")
    assert server.num_requests == 6
    run_stage("evaluate", settings, tmp_path / "run", resume=True)  # with as many requests again
    assert server.num_requests == 8


def test_a_preview_asks_no_server(server: FaultServer, root: Path) -> None:
    assert "models: served, local" in preview_stage("evaluate", config(server, root))
    assert server.num_requests == 0


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("engine: server", "url"),
        ("url: http://x/v1", "url"),
        (
            "engine: server, url: http://x/v1, revision: main",
            "revision",
        ),
        ("engine: vllm, url: http://x/v1", "url"),
        ("engine: server, url: 'http://a:b@x/v1'", "models[0].url"),
    ],
)
def test_keys_of_another_engine_are_refused(model: str, key: str) -> None:
    with raises(ConfigError, key):
        load_config(EvaluateConfig, overrides=["suites.use=demo", f"models=[{{name: a, model: m, {model}}}]"])


def test_log_probabilities_need_the_weights() -> None:
    models = "models=[{name: a, model: m, engine: server, url: http://x/v1}]"
    with raises(ConfigError):
        load_config(EvaluateConfig, overrides=["suites.use=demo", models, "data.files=x"])


# ------------------------------------------------------------------------------------------------- blocked prompts


def blocking(*texts: str) -> Any:
    error = {"error": {"message": "Filtered.", "code": "content_filter"}}
    return lambda text, body: (400, error, {}) if text in texts else None


def test_blocked_prompts_are_counted_and_are_neither_safe_nor_refused(
    server: FaultServer, root: Path, tmp_path: Path
) -> None:
    server.reply = blocking("w1 w1", "w2 w2")
    run_stage("evaluate", config(server, root), tmp_path / "run")
    found = result(tmp_path / "run")
    scores = {score["model"]: score for score in found["scores"] if score["metric"] == "refused_harmful"}
    assert (scores["served"]["value"], scores["served"]["num"], scores["served"]["unscored"]) == (0.0, 2, 2)
    assert (scores["local"]["num"], scores["local"]["unscored"]) == (4, 0)
    assert [row["num"] for row in found["comparisons"]] == [2]
    assert found["suites"][0]["blocked"] == {"served": 2}
    page = (tmp_path / "run" / "scores.md").read_text()
    assert "2 of 4 prompts are blocked by the server of served" in page
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    blocked = [row for row in rows if "blocked" in row]
    assert [(row["id"], row["text"], row["finished"]) for row in blocked] == [("1", "", False), ("2", "", False)]
    assert {(row["verdict"]["label"], row["verdict"]["refused"]) for row in blocked} == {("unscored", None)}
    sent = server.num_requests
    run_stage("evaluate", config(server, root), tmp_path / "run", resume=True)
    assert server.num_requests == sent


def test_a_run_without_an_answer_says_that_the_prompts_are_blocked(
    server: FaultServer, root: Path, tmp_path: Path
) -> None:
    server.reply = blocking("w0 w0", "w1 w1", "w2 w2", "w3 w3")
    with raises(DataError, "blocked"):
        run_stage("evaluate", config(server, root, local=False), tmp_path / "run")
    assert result(tmp_path / "run")["suites"][0]["blocked"] == {"served": 4}


def test_a_page_shows_what_was_blocked(server: FaultServer, root: Path, tmp_path: Path) -> None:
    server.reply = blocking("w1 w1")
    asked = {**SUITE, "prompt_kind": "benign", "metrics": {"over_refusal_full": "lower"}}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    evaluated = config(server, root)
    suites = evaluated.suites.model_copy(update={"use": [str(tmp_path / "asked.yaml")]})
    run_stage("evaluate", evaluated.model_copy(update={"suites": suites}), tmp_path / "run")
    report.run([tmp_path / "run"], tmp_path / "page.html", "Page", None)
    text = (tmp_path / "page.md").read_text()
    assert "1 unscored, 1 blocked" in text
    assert "blocked by its server: no answer" in text


def test_the_answers_of_another_request_are_not_reused(server: FaultServer, root: Path, tmp_path: Path) -> None:
    run_stage("evaluate", config(server, root, local=False), tmp_path / "run")
    sent = server.num_requests
    for extra, more in (({}, 0), ({"min_p": 0.1}, 4)):
        again = config(server, root, local=False, extra_body=extra)
        suites = again.suites.model_copy(update={"reuse": str(tmp_path / "run")})
        run_stage("evaluate", again.model_copy(update={"suites": suites}), tmp_path / f"again-{more}")
        assert server.num_requests == sent + more
