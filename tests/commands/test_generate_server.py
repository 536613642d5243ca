from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from bfpo.config import GenerateConfig, RedteamConfig
from bfpo.core.errors import DataError, MissingExtraError, ServerError
from bfpo.core.schema import Completion, Message, canonical_json
from bfpo.data.read import read_completions
from bfpo.generation.engines import Made, ServerEngine, Task, append_made, completion_seed, read_made
from bfpo.generation.server import Server
from bfpo.generation.settings import ServerSpec
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises
from support.fault_server import FaultServer

KEY = "sk-" + "proj-abcdefghij0123456789"
NUM = 10


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer().running() as running:
        running.answer = lambda text: f"on {text}"
        yield running


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(NUM)))
    return path


def config(server: FaultServer, prompts: Path, **settings: Any) -> GenerateConfig:
    defaults = {"model": "writer", "timeout": 0.5, "max_retries": 3, "max_new_tokens": 9, "max_concurrency": 4}
    return GenerateConfig(**{**defaults, "prompts": str(prompts), "engine": "server", "url": server.url, **settings})


def rows(folder: Path) -> list[Completion]:
    return list(read_completions(folder / "completions.jsonl"))


def asked_for(server: FaultServer) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for body in server.bodies:
        seeds.setdefault(body["messages"][-1]["content"], []).append(body["seed"])
    return seeds


def test_completions_of_a_server_are_in_order_whatever_comes_first(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    faults = {"question 1": "500", "question 2": "drop", "question 3": "half JSON", "question 4": "429"}
    server.plan = lambda text, attempt: faults[text] if attempt == 0 and text in faults else 0.02 * (text[-1] == "0")
    server.finish = lambda text: "length" if text == "question 5" else "stop"
    server.usage = {"completion_tokens": 3, "prompt_tokens": 1, "total_tokens": 4}
    folder = run_stage("generate", config(server, prompts, temperature=0.7, top_p=0.9), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row.text for row in found] == [f"on question {n}" for n in range(NUM)]
    assert [row.finished for row in found] == [n != 5 for n in range(NUM)]
    assert {row.model for row in found} == {"writer"}
    assert len({row.id for row in found}) == NUM
    assert folder.record["completions"]["completion_tokens"] == 3 * NUM
    assert folder.record["requests"] == server.num_requests == NUM + len(faults)
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("writer", 9, 0.7, 0.9)
    assert body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}]
    assert not {"logprobs", "top_logprobs"} & body.keys()
    assert not (tmp_path / "run" / "completions.partial.jsonl").exists()


def test_each_completion_has_a_seed_of_its_own_that_is_asked_for_again(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        server.bodies.clear()
        run_stage("generate", config(server, prompts, num_completions=3, seed=seed), tmp_path / name)
        seeds = asked_for(server)
        ids = [row.id for row in rows(tmp_path / name)]
        own = [completion_seed(seed, completion_id) for completion_id in ids]
        expected = {f"question {n}": set(own[3 * n : 3 * n + 3]) for n in range(NUM)}
        assert {text: set(found) for text, found in seeds.items()} == expected
        assert len(set().union(*expected.values())) == 3 * NUM
    assert completion_seed(3, "a") != completion_seed(4, "a")


def test_an_empty_answer_that_ended_by_itself_is_a_completion(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    given: dict[str, str | None] = {"question 0": "", "question 1": None, "question 2": " \n"}
    server.answer = lambda text: given.get(text, "fine")
    server.finish = lambda text: "length" if text == "question 2" else "stop"
    folder = run_stage("generate", config(server, prompts), tmp_path / "run")
    assert [(row.text, row.finished) for row in rows(tmp_path / "run")][:4] == [
        ("", True),
        ("", True),
        (" \n", False),
        ("fine", True),
    ]
    assert folder.record["completions"]["completion_tokens"] is None  # this server does not count


def test_half_a_surrogate_pair_does_not_stop_a_run(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    server.answer = lambda text: "a\ud83db"
    run_stage("generate", config(server, prompts), tmp_path / "run")
    assert {row.text for row in rows(tmp_path / "run")} == {"a?b"}


@pytest.mark.parametrize("fault", ["500", "drop"])
def test_an_answer_that_never_came_is_no_completion_and_resume_asks_only_for_it(
    server: FaultServer, prompts: Path, tmp_path: Path, fault: str
) -> None:
    lost = {"question 3", "question 7"}
    server.plan = lambda text, attempt: fault if text in lost else "ok"
    settings = config(server, prompts, max_retries=1)
    with raises(ServerError, mask="(?<=')[0-9a-f]{16}"):
        run_stage("generate", settings, tmp_path / "run")
    assert not (tmp_path / "run" / "completions.jsonl").exists()
    first = asked_for(server)
    server.plan = lambda text, attempt: "ok"
    server.bodies.clear()
    run_stage("generate", settings, tmp_path / "run", resume=True)
    again = asked_for(server)
    assert again.keys() == lost
    assert all(again[text] == first[text][:1] for text in lost)  # asked for with the same seed
    assert [row.text for row in rows(tmp_path / "run")] == [f"on question {n}" for n in range(NUM)]


def test_half_an_answer_of_an_interrupted_server_is_no_completion(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    server.finish = lambda text: "error" if text == "question 3" else "stop"
    settings = config(server, prompts, max_retries=0)
    with raises(ServerError, mask="(?<=')[0-9a-f]{16}"):
        run_stage("generate", settings, tmp_path / "run")
    server.finish = lambda text: "stop"
    run_stage("generate", settings, tmp_path / "run", resume=True)
    assert [row.text for row in rows(tmp_path / "run")] == [f"on question {n}" for n in range(NUM)]
    assert server.num_requests == NUM + 1


def test_a_used_up_budget_keeps_what_came_and_resume_ends_the_run(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    settings = config(server, prompts, max_requests=6, max_concurrency=1)
    with raises(ServerError, "max_requests"):
        run_stage("generate", settings, tmp_path / "run")
    more = settings.model_copy(update={"max_requests": 60})
    run_stage("generate", more, tmp_path / "run", resume=True)
    assert set(server.requests.values()) == {1}
    assert len(rows(tmp_path / "run")) == NUM


def test_one_limit_of_requests_holds_for_all_stages_of_redteam(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    judge = {"format": "llama-guard-3", "model": "guard", "url": server.url}
    own = {"judges": judge, "ranker": "oracle", "num_completions": 2, "limit": 3, "max_requests": 10}
    given = config(server, prompts).model_dump(exclude_unset=True) | own
    settings = RedteamConfig.model_validate({**given, "label_cache": tmp_path / "cache"})
    with raises(ServerError, "max_requests"):
        run_stage("redteam", settings, tmp_path / "run")
    assert Counter(body["model"] for body in server.bodies) == {"writer": 3 + 6, "guard": 1}  # a sample first
    with raises(DataError):  # no verdict can be read; equal texts are judged once
        run_stage("redteam", settings, tmp_path / "run", resume=True)
    assert Counter(body["model"] for body in server.bodies) == {"writer": 3 + 6, "guard": 3}


def test_a_killed_run_goes_on_where_it_was(
    server: FaultServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bfpo.commands.generate as stage

    original, kept = stage.append_made, []

    def dies(path: Path, made: Any) -> None:
        original(path, made)
        kept.extend(made)
        if len(kept) == 4:
            raise KeyboardInterrupt

    settings = config(server, prompts, max_concurrency=1)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "append_made", dies)
        with pytest.raises(KeyboardInterrupt):
            run_stage("generate", settings, tmp_path / "run")
    run_stage("generate", settings, tmp_path / "run", resume=True)
    assert {text: server.requests[text] for text in sorted(server.requests)} == {f"question {n}": 1 for n in range(NUM)}
    assert [row.text for row in rows(tmp_path / "run")] == [f"on question {n}" for n in range(NUM)]


def test_the_key_is_sent_and_written_nowhere(
    server: FaultServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BFPO_TEST_KEY", KEY)
    server.answer = lambda text: f"your key is {KEY}"
    run_stage("generate", config(server, prompts, api_key_env="BFPO_TEST_KEY"), tmp_path / "run")
    assert server.keys == {f"Bearer {KEY}"}
    assert rows(tmp_path / "run")[0].text == "your key is ***"
    server.plan = lambda text, attempt: f"401:{KEY}"
    with raises(ServerError):
        run_stage("generate", config(server, prompts, api_key_env="BFPO_TEST_KEY"), tmp_path / "refused")
    files = [item for item in tmp_path.rglob("*") if item.is_file()]
    assert len(files) > 5
    assert not [item for item in files if KEY in item.read_text(errors="replace")]


# ------------------------------------------------------------------------------------------------- blocked prompts

REFUSALS: dict[str, tuple[int, Any, str]] = {
    "filter": (
        400,
        {"error": {"message": "Stopped by the content filter.", "code": "content_filter"}},
        "content filter",
    ),
    "moderation": (403, {"error": {"message": "Moderation: the input was flagged."}}, "flagged"),
    "too long": (400, {"error": {"message": "The context is 8 tokens, the prompt has 9."}}, "the prompt has 9"),
    "firewall": (403, b"<html>Sorry, you have been blocked</html>", "status 403"),
    "form": (422, {"detail": [{"loc": ["body", "messages"], "msg": "cannot be read"}]}, "status 422"),
    "finish": (
        200,
        {"choices": [{"message": {"content": "The fi"}, "finish_reason": "content_filter"}]},
        "cut after 6",
    ),
    "refusal": (200, {"choices": [{"message": {"content": None, "refusal": "No, I won't."}}]}, "refusal: No, I won't."),
    "no choice": (200, {"object": "chat.completion", "choices": []}, "no choice"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_prompt_that_the_server_refuses_is_blocked_and_never_asked_again(
    server: FaultServer, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    status, body, words = REFUSALS[kind]
    blocked = {"question 4", "question 9"}
    server.reply = lambda text, asked: (status, body, {}) if text in blocked else None
    with caplog.at_level("INFO", "bfpo"):
        folder = run_stage("generate", config(server, prompts, max_concurrency=1), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [n for n, row in enumerate(found) if row.blocked] == [4, 9]
    assert [row.text for row in found] == ["" if n in (4, 9) else f"on question {n}" for n in range(NUM)]
    assert [row.finished for row in found] == [n not in (4, 9) for n in range(NUM)]
    assert words in found[4].blocked
    kinds = {frozenset(json.loads(line)) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()}
    plain = frozenset({"id", "prompt", "text", "model", "kind", "finished"})
    assert kinds == {plain, plain | {"blocked"}}
    facts = folder.record["completions"]
    assert (facts["num_completions"], facts["num_finished"], facts["num_blocked"]) == (NUM, NUM - 2, 2)
    assert list(facts["blocked"].values()) == [2]
    assert "2 of 10 completions are blocked" in caplog.text
    assert "0 did not end" in caplog.text
    assert "| num_blocked | 2 |" in (tmp_path / "run/README.md").read_text()
    sent = server.num_requests
    run_stage("generate", config(server, prompts, max_concurrency=1), tmp_path / "run", resume=True)
    assert server.num_requests == sent


def test_a_refusal_without_its_reason_counts_only_while_other_prompts_are_answered(
    server: FaultServer, prompts: Path, tmp_path: Path
) -> None:
    alone = {"error": {"message": "not today"}}
    down: list[bool] = []
    server.reply = lambda text, asked: (400, alone, {}) if text == "question 9" or down else None
    server.answer = lambda text: down.append(True) or "fine" if text == "question 8" else "fine"  # type: ignore[func-returns-value]
    settings = config(server, prompts, max_concurrency=1)
    with raises(ServerError, mask="(?<=')[0-9a-f]{16}"):  # from now on the server refuses everything
        run_stage("generate", settings, tmp_path / "run")
    with raises(ServerError, mask="(?<=')[0-9a-f]{16}"):
        run_stage("generate", settings, tmp_path / "run", resume=True)
    down.clear()
    server.answer = lambda text: "fine"
    run_stage("generate", settings, tmp_path / "run", resume=True)
    assert [row.blocked != "" for row in rows(tmp_path / "run")] == [n == 9 for n in range(NUM)]


def test_a_column_of_that_name_with_an_answer_beside_it_blocks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    cells = [("a", False), ("b", "no"), ("c", None), ("", "filtered")]
    path.write_text("".join(json.dumps({"prompt": "q", "text": t, "blocked": cell}) + "\n" for t, cell in cells))
    assert [row.blocked for row in read_completions(path)] == ["", "", "", "filtered"]


@pytest.mark.parametrize("kind", ["filter", "finish"])
def test_a_killed_run_remembers_what_was_blocked(server: FaultServer, prompts: Path, tmp_path: Path, kind: str) -> None:
    status, body, _ = REFUSALS[kind]
    server.reply = lambda text, asked: (status, body, {}) if text == "question 0" else None
    server.plan = lambda text, attempt: "404" if text == "question 5" else "ok"
    with raises(ServerError, "404"):
        run_stage("generate", config(server, prompts, max_concurrency=1), tmp_path / "run")
    server.plan = lambda text, attempt: "ok"
    run_stage("generate", config(server, prompts, max_concurrency=1), tmp_path / "run", resume=True)
    assert server.requests["question 0"] == 1
    assert [row.blocked != "" for row in rows(tmp_path / "run")] == [n == 0 for n in range(NUM)]


def test_a_run_of_nothing_but_blocked_prompts_ends(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    status, body, _ = REFUSALS["filter"]
    server.reply = lambda text, asked: (status, body, {})
    folder = run_stage("generate", config(server, prompts, num_completions=4), tmp_path / "run")
    assert folder.record["completions"]["num_blocked"] == 4 * NUM


def test_thoughts_are_kept_beside_the_text(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    def reply(text: str, asked: Any) -> Any:
        whole = text != "question 1"
        message = {"content": "42" if whole else None, "reasoning_content": f"{text}?"}
        return 200, {"choices": [{"message": message, "finish_reason": "stop" if whole else "length"}]}, {}

    server.reply = reply
    run_stage("generate", config(server, prompts), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [(row.text, row.reasoning, row.finished) for row in found[:2]] == [
        ("42", "question 0?", True),
        ("", "question 1?", False),
    ]


def test_what_the_server_does_not_take_is_in_the_record(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    def reply(text: str, asked: Any) -> Any:
        error = {"message": "Unsupported value: only the default is allowed", "param": "temperature"}
        return (400, {"error": error}, {}) if "temperature" in asked else None

    server.reply = reply
    folder = run_stage("generate", config(server, prompts), tmp_path / "run")
    assert folder.record["not_sent"] == ["temperature"]
    assert "| temperature |" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("name", ["seed", "top_p"])
def test_a_refusal_of_a_part_that_another_server_words_otherwise(
    server: FaultServer, prompts: Path, tmp_path: Path, name: str
) -> None:
    def reply(text: str, asked: Any) -> Any:
        if name == "seed" and "seed" in asked:
            return 400, [{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], {}
        if name == "top_p" and {"temperature", "top_p"} <= asked.keys():
            return 400, {"error": {"message": "`temperature` and `top_p` cannot both be specified for this model."}}, {}
        return None

    server.reply = reply
    folder = run_stage("generate", config(server, prompts, temperature=0.7, max_concurrency=1), tmp_path / "run")
    assert len(rows(tmp_path / "run")) == NUM
    assert folder.record["not_sent"] == [name]
    assert server.bodies[-1]["temperature"] == 0.7
    assert server.num_requests == NUM + 1


def test_tools_and_further_keys_of_messages_reach_the_server_and_calls_come_back(server: FaultServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weigh", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]
    message = {"content": None, "tool_calls": [call]}
    server.reply = lambda text, asked: (200, {"choices": [{"message": message, "finish_reason": "tool_calls"}]}, {})
    turns = (
        Message("user", "how heavy?"),
        Message("assistant", "", canonical_json({"tool_calls": [call]})),
        Message("tool", "3 kg", canonical_json({"tool_call_id": "1"})),
    )
    made: list[Made] = []
    engine = ServerEngine(Server(ServerSpec(url=server.url), "m", writer=True), max_new_tokens=9, seed=0)
    engine.complete([Task("a", turns, (), canonical_json(tools))], made.extend)
    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": "how heavy?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3 kg", "tool_call_id": "1"},
    ]
    assert server.bodies[0]["tools"] == tools
    assert made == [Made("a", "", True, None, extra=canonical_json({"tool_calls": [call]}))]


def test_an_answer_of_an_old_partial_file_is_kept(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    path.write_text('{"id": "a", "text": "old", "finished": true, "num_tokens": null}\n')
    append_made(path, [Made("b", "new", True, 3), Made("c", "", False, None, blocked="no")])
    assert path.read_text().splitlines()[1] == '{"id": "b", "text": "new", "finished": true, "num_tokens": 3}'
    assert read_made(path) == {
        "a": Made("a", "old", True, None),
        "b": Made("b", "new", True, 3),
        "c": Made("c", "", False, None, blocked="no"),
    }


def test_a_preview_asks_nobody(server: FaultServer, prompts: Path) -> None:
    text = preview_stage("generate", config(server, prompts, num_completions=2))
    assert "20 completions of at most 9 tokens" in text
    assert "not known here" in text
    assert f"requests go to writer at {server.url}" in text
    assert server.num_requests == 0
    resolved = text.split("\n\n")[0]
    assert "url:" in resolved
    assert "batch_size" not in resolved


def test_a_greedy_request_has_neither_seed_nor_top_p(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    run_stage("generate", config(server, prompts, temperature=0.0, limit=1), tmp_path / "run")
    assert server.bodies[0]["temperature"] == 0
    assert not {"seed", "top_p"} & server.bodies[0].keys()


def test_a_refused_request_is_sent_once(server: FaultServer, prompts: Path, tmp_path: Path) -> None:
    server.plan = lambda text, attempt: "400"
    with raises(ServerError):
        run_stage("generate", config(server, prompts, limit=1), tmp_path / "run")
    assert server.num_requests == 1  # there is nothing to leave out


def test_without_the_client(
    server: FaultServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with raises(MissingExtraError, "bfpo[server]"):
        run_stage("generate", config(server, prompts), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_prompt_that_ends_with_the_assistant_is_continued(server: FaultServer, tmp_path: Path) -> None:
    begun = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "Turn "}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in (begun, begun[:1])))
    run_stage("generate", config(server, file, max_concurrency=1), tmp_path / "run")
    asked = {len(body["messages"]): body for body in server.bodies}
    assert (asked[2]["continue_final_message"], asked[2]["add_generation_prompt"]) == (True, False)
    assert not {"continue_final_message", "add_generation_prompt"} & asked[1].keys()
    assert [row.text for row in rows(tmp_path / "run")] == ["on Turn ", "on Which way?"]


def test_arguments_of_a_call_go_to_the_server_as_the_text_that_its_api_has(server: FaultServer, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weigh", "arguments": '{"what": "ä"}'}}
    turns = [{"role": "user", "content": "How heavy?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "3 kg", "tool_call_id": "1"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": turns}))
    run_stage("generate", config(server, file), tmp_path / "run")
    assert server.bodies[0]["messages"] == turns


def test_an_empty_message_of_the_assistant_at_the_end_is_not_sent(server: FaultServer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": ""}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": turns}))
    run_stage("generate", config(server, file), tmp_path / "run")
    assert server.bodies[0]["messages"] == turns[:1]
    assert "continue_final_message" not in server.bodies[0]
