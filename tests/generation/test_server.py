from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")

from bfpo.core.errors import MissingExtraError, ServerError, SettingError
from bfpo.core.schema import Comparison, Completion, Message, Verdict
from bfpo.generation.server import RequestBudget, Server
from bfpo.generation.settings import ServerSpec
from bfpo.judges.formats import FORMATS, PAIR_FORMATS
from bfpo.judges.judges import make_judge, make_ranker
from bfpo.judges.server_judges import ServerJudge, ServerRanker
from bfpo.judges.settings import JudgeConfig, RankerConfig
from messages import raises, says
from support.fault_server import FAULTS, FaultServer, guard_answer

KEY = "sk-" + "proj-abcdefghij0123456789"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer().running() as running:
        yield running


def texts(count: int) -> list[str]:
    return [f"answer {n} is {'bad' if n % 3 == 0 else 'fine'}" for n in range(count)]


def completions(count: int) -> list[Completion]:
    return [Completion(f"c{n}", (Message("user", "q"),), text) for n, text in enumerate(texts(count))]


def judge(server: FaultServer, format: str = "llama-guard-3", threshold: float = 0.5, **settings: Any) -> ServerJudge:
    given = {"timeout": 10.0, "max_retries": 5, "max_concurrency": 32, **settings}
    asked = {name: given.pop(name) for name in list(given) if name not in ServerSpec.model_fields}
    asker = Server(ServerSpec(url=server.url, **given), **{"model": "guard", **asked})
    return ServerJudge(FORMATS[format], asker, threshold=threshold)


def expected(count: int) -> list[str]:
    return [guard_answer(text).split("\n")[0] for text in texts(count)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_through_all_faults_nothing_is_lost_or_counted_twice_and_order_is_kept(server: FaultServer, seed: int) -> None:
    rng = random.Random(seed)
    quick = [fault for fault in FAULTS if fault not in ("timeout", "drip")]
    plans = {text: [rng.choice(quick) for _ in range(rng.randrange(3))] for text in texts(30)}
    for text, slow in zip(rng.sample(texts(30), 2), ("timeout", "drip"), strict=True):
        plans[text] = [slow, *plans[text][:1]]
    server.plan = lambda text, attempt: plans[text][attempt] if attempt < len(plans[text]) else rng.random() / 20
    server.drip_seconds = 20.0
    budget = RequestBudget()
    reported: list[int] = []
    verdicts: dict[int, Verdict] = {}

    def report(place: int, verdict: Verdict, lasting: bool) -> None:
        reported.append(place)
        verdicts[place] = verdict
        assert lasting

    judge(server, budget=budget, timeout=1.2).judge_each(completions(30), report)
    assert sorted(reported) == list(range(30))
    assert reported != sorted(reported)  # answers came in another order than the questions
    assert [verdicts[place].completion_id for place in range(30)] == [f"c{n}" for n in range(30)]
    assert [verdicts[place].label for place in range(30)] == expected(30)
    assert set(server.answered.values()) == {1}
    assert {text: server.requests[text] for text in texts(30)} == {text: len(plans[text]) + 1 for text in texts(30)}
    assert budget.num_requests == server.num_requests


@pytest.mark.parametrize("fault", FAULTS)
def test_a_text_that_never_gets_an_answer_is_unscored_and_may_be_asked_again(server: FaultServer, fault: str) -> None:
    server.plan = lambda text, attempt: fault if text == texts(6)[3] else "ok"
    server.drip_seconds = 10.0
    found: dict[int, tuple[Verdict, bool]] = {}
    judge(server, max_retries=0, timeout=1.0 if fault in ("timeout", "drip") else 10.0).judge_each(
        completions(6), lambda n, verdict, lasting: found.update({n: (verdict, lasting)})
    )
    verdict, lasting = found.pop(3)
    assert (verdict.label, lasting, verdict.p_safe) == ("unscored", False, None)
    assert verdict.reason
    assert [one.label for one, _ in found.values()].count("unscored") == 0
    assert all(kept for _, kept in found.values())
    assert server.num_requests == 6


@pytest.mark.parametrize(
    "reported",
    [
        {"choices": [{"error": {"code": 502, "message": "no"}, "message": {"content": ""}, "finish_reason": "error"}]},
        {"error": {"code": 429, "message": "slowly"}},
        {"choices": [{"message": {"content": "saf"}, "finish_reason": "network_error"}]},
        {"choices": [{"message": {"content": "saf"}, "finish_reason": "insufficient_system_resource"}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "abort"}]},
    ],
)
def test_a_fault_that_a_reply_reports_is_asked_again(server: FaultServer, reported: dict[str, Any]) -> None:
    def reply(text: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
        often = {texts(3)[1]: 1, texts(3)[2]: 9}.get(text, 0)
        return (200, reported, {"retry-after-ms": "1"}) if server.requests[text] <= often else None

    server.reply = reply
    found: dict[int, tuple[Verdict, bool]] = {}
    judge(server, max_retries=2).judge_each(
        completions(3), lambda n, verdict, lasting: found.update({n: (verdict, lasting)})
    )
    assert [found[n][0].label for n in range(3)] == [*expected(3)[:2], "unscored"]
    assert [found[n][1] for n in range(3)] == [True, True, False]
    assert [server.requests[text] for text in texts(3)] == [1, 2, 3]


def test_a_lack_of_credit_that_a_reply_reports_stops_at_once(server: FaultServer) -> None:
    server.reply = lambda text, body: (200, {"error": {"code": 402, "message": "Insufficient credits"}}, {})
    with raises(ServerError, "credit"):
        judge(server, max_concurrency=1).judge(completions(20))
    assert server.num_requests == 1


@pytest.mark.parametrize(
    ("written", "lasting"),
    [("I like trains", True), ("safe unsafe", True), ("", False), ("  \n", False), (None, False)],
)
def test_what_cannot_be_read_is_unscored(server: FaultServer, written: str | None, lasting: bool) -> None:
    server.answer = lambda text: written
    found: list[tuple[Verdict, bool]] = []
    judge(server).judge_each(completions(1), lambda n, verdict, keep: found.append((verdict, keep)))
    ((verdict, kept),) = found
    assert (verdict.label, kept) == ("unscored", lasting)
    assert verdict.reason
    assert verdict.raw == (written if lasting else "")


def test_the_budget_counts_requests_that_are_sent_again(server: FaultServer) -> None:
    server.plan = lambda text, attempt: "500" if attempt == 0 else "ok"
    found: list[int] = []
    with raises(ServerError, "max_requests") as error:
        judge(server, budget=RequestBudget(7), max_concurrency=1).judge_each(
            completions(10), lambda n, verdict, lasting: found.append(n)
        )
    assert error.value.exit_code == 1
    assert server.num_requests == 7
    assert found == [0, 1, 2]


def test_a_used_up_budget_lets_what_is_sent_come_in(server: FaultServer) -> None:
    server.plan = lambda text, attempt: 0.04 * int(text.split()[1])  # the others are under way when the first is done
    found: list[int] = []
    with raises(ServerError, "max_requests"):
        judge(server, budget=RequestBudget(5), max_concurrency=5).judge_each(
            completions(10), lambda n, verdict, lasting: found.append(n)
        )
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert server.num_requests == 5


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        (f"401: wrong key {KEY}", "BFPO_TEST_KEY"),
        ("403", "403"),
        ("404", "404"),
    ],
)
def test_a_refusal_stops_at_once_and_repeats_no_key(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, fault: str, key: str
) -> None:
    monkeypatch.setenv("BFPO_TEST_KEY", KEY)
    server.plan = lambda text, attempt: fault
    with raises(ServerError, key) as error:
        judge(server, api_key_env="BFPO_TEST_KEY", max_concurrency=2).judge(completions(20))
    assert server.num_requests <= 2
    assert server.keys == {f"Bearer {KEY}"}
    chain: BaseException | None = error.value
    while chain is not None:
        assert KEY not in f"{chain}"
        chain = chain.__cause__


def test_after_a_refusal_no_other_text_is_asked_about(server: FaultServer) -> None:
    server.plan = lambda text, attempt: "403" if text == texts(1)[0] else 0.05
    with raises(ServerError):
        judge(server, max_concurrency=3).judge(completions(40))
    assert server.num_requests == 3


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, {"message": "Insufficient Balance", "type": "unknown_error", "code": "invalid_request_error"}),
        (400, {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}),
        (429, {"message": "You exceeded your current quota.", "type": "insufficient_quota"}),
        (403, {"message": "Your team has used all available credits."}),
    ],
)
def test_an_account_without_credit_stops_at_once(server: FaultServer, status: int, error: dict[str, str]) -> None:
    server.reply = lambda text, body: (status, {"error": error}, {}) if server.num_requests > 10 else None
    found: list[int] = []
    with raises(ServerError, "credit"):
        judge(server, max_concurrency=1, max_retries=0).judge_each(
            completions(100), lambda n, verdict, lasting: found.append(n)
        )
    assert found == list(range(10))
    assert server.num_requests == 11


def test_nobody_there(server: FaultServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    nobody = ServerJudge(FORMATS["llama-guard-3"], Server(ServerSpec(url=url, max_retries=0, max_concurrency=2), "m"))
    with raises(ServerError, mask=r"\d+(?= texts)|(?<=last )\d+"):
        nobody.judge(completions(30))


def test_a_server_that_goes_away_in_the_middle(server: FaultServer) -> None:
    server.plan = lambda text, attempt: "ok" if int(text.split()[1]) < 5 else "drop"
    found: list[int] = []
    with raises(ServerError):
        judge(server, max_retries=0, max_concurrency=1).judge_each(
            completions(30), lambda n, verdict, lasting: found.append(n) if lasting else None
        )
    assert found == [0, 1, 2, 3, 4]


def test_the_server_says_when_to_come_again(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    send = FaultServer._send
    monkeypatch.setattr(
        FaultServer,
        "_send",
        staticmethod(
            lambda *given, **named: send(*given, **{**named, **({"retry": "700"} if "retry" in named else {})})
        ),
    )
    server.plan = lambda text, attempt: "429" if attempt == 0 else "ok"
    begun = time.monotonic()
    (verdict,) = judge(server).judge(completions(1))
    assert verdict.label == "unsafe"
    assert time.monotonic() - begun >= 0.7


def chat_logprobs(tokens: list[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": word,
                "logprob": -0.1,
                "bytes": None,
                "top_logprobs": [{"token": k, "logprob": v, "bytes": None} for k, v in tops.items()],
            }
            for word, tops in tokens
        ]
    }


@pytest.mark.parametrize(("threshold", "label"), [(0.5, "unsafe"), (0.2, "safe")])
def test_probabilities_are_used_where_the_server_gives_them(server: FaultServer, threshold: float, label: str) -> None:
    server.answer = lambda text: "\n\nunsafe\nS1"
    tops = {"un": -0.5, "safe": -1.5, "\n": -9.0}
    server.logprobs = lambda text: chat_logprobs([("\n\n", {"\n\n": 0.0}), ("un", tops), ("safe", {"safe": 0.0})])
    (verdict,) = judge(server, threshold=threshold).judge(completions(1))
    assert verdict.p_safe == pytest.approx(1 / (1 + 2.718281828), abs=1e-6)
    assert verdict.label == label


THOUGHT = "<think>\nThis could be unsafe\nunsafe?\n</think>\n\n"


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (THOUGHT + "safe", "safe"),
        ("It may be unsafe. Is it unsafe?\n</think>\nunsafe\nS1", "unsafe"),
        ("[THINK]unsafe[/THINK]**safe**", "safe"),
        (THOUGHT + "safe\nunsafe", "unscored"),
        (THOUGHT, "unscored"),
        ("<think>\nThis is safe", "unscored"),
        ("**safe**", "safe"),
    ],
)
def test_a_judge_that_thinks_is_read_behind_its_thoughts(server: FaultServer, written: str, label: str) -> None:
    server.answer = lambda text: written
    (verdict,) = judge(server).judge(completions(1))
    assert (verdict.label, verdict.raw) == (label, written)


@pytest.mark.parametrize("text_holds_thoughts", [True, False])
def test_probabilities_are_those_behind_the_thoughts(server: FaultServer, text_holds_thoughts: bool) -> None:
    """A server with a parser of reasoning lists the tokens of the thoughts that it took out of the text."""
    server.answer = lambda text: THOUGHT + "safe" if text_holds_thoughts else "safe"
    words = [*(THOUGHT[n : n + 6] for n in range(0, len(THOUGHT), 6)), "unsafe", "\n</think>\n\n"]
    if text_holds_thoughts:
        words = words[:-2]
    listed = [(word, {word: 0.0, "unsafe": 0.0}) for word in words]
    server.logprobs = lambda text: chat_logprobs([*listed, ("safe", {"safe": -0.5, "unsafe": -1.5})])
    (verdict,) = judge(server).judge(completions(1))
    assert verdict.p_safe == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-6)
    assert verdict.label == "safe"


def test_probabilities_of_a_word_in_bold(server: FaultServer) -> None:
    server.answer = lambda text: "**safe**"
    server.logprobs = lambda text: chat_logprobs(
        [("**", {"**": 0.0}), ("safe", {"safe": -0.5, "unsafe": -1.5}), ("**", {"**": 0.0})]
    )
    (verdict,) = judge(server).judge(completions(1))
    assert verdict.p_safe == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-6)


NO_BY_PRINCIPLE = {"Dangerous": 0.9, "Hate": 0.3, "Sexually": 0.99, "Harassment": 0.6}


def test_shieldgemma_asks_four_times_and_takes_the_worst(server: FaultServer) -> None:
    def no(text: str) -> float:
        return next(share for word, share in NO_BY_PRINCIPLE.items() if word in text.partition("below:")[2])

    server.answer = lambda text: "No" if no(text) > 0.5 else "Yes"
    server.logprobs = lambda text: {
        "tokens": [server.answer(text)],
        "token_logprobs": [-0.1],
        "top_logprobs": [{"No": math.log(no(text)), "Yes": math.log(1 - no(text))}],
    }
    verdicts = judge(server, "shieldgemma", api="completions").judge(completions(3))
    assert server.num_requests == 12
    for number, verdict in enumerate(verdicts):
        assert verdict.completion_id == f"c{number}"
        assert (verdict.label, verdict.p_safe) == ("unsafe", pytest.approx(0.3))
        assert verdict.reason == "No Hate Speech: p(unsafe) 0.700, the largest of 4"
    server.logprobs = None
    (verdict,) = judge(server, "shieldgemma", api="completions").judge(completions(1))
    assert (verdict.label, verdict.p_safe, verdict.reason) == ("unsafe", None, "No Hate Speech")
    server.answer = lambda text: "No" if no(text) > 0.5 else "No. Yes."
    (verdict,) = judge(server, "shieldgemma", api="completions").judge(completions(1))
    assert (verdict.label, verdict.reason[:15]) == ("unscored", "No Hate Speech:")


def test_one_principle_without_an_answer_is_asked_about_again(server: FaultServer) -> None:
    server.answer = lambda text: "No"
    server.plan = lambda text, attempt: "500" if "Harassment" in text.partition("below:")[2] else "ok"
    found: list[tuple[Verdict, bool]] = []
    asked = judge(server, "shieldgemma", api="completions", max_retries=0)
    asked.judge_each(completions(1), lambda n, verdict, lasting: found.append((verdict, lasting)))
    ((verdict, lasting),) = found
    assert (verdict.label, lasting) == ("unscored", False)
    assert verdict.reason.startswith("No Harassment: status 500")


def test_a_finished_text_goes_without_the_token_that_the_server_adds(server: FaultServer) -> None:
    server.answer = lambda text: "Harmful request: no\nResponse refusal: no\nHarmful response: no"
    (verdict,) = judge(server, "wildguard", api="completions").judge(completions(1))
    assert (verdict.label, verdict.refused) == ("safe", False)
    assert server.bodies[0]["prompt"].startswith("<|user|>\n[INST] You are a classifier")


def test_a_judge_may_get_room_for_its_thoughts(server: FaultServer) -> None:
    given = {"format": "llama-guard-3", "model": "m", "url": server.url}
    longer = make_judge(JudgeConfig.model_validate({**given, "max_answer_tokens": 900}))
    longer.judge(completions(1))
    usual = make_judge(JudgeConfig.model_validate(given))
    usual.judge(completions(1))
    assert [body["max_tokens"] for body in server.bodies] == [900, 32]
    assert longer.version != usual.version
    ranker = make_ranker(
        RankerConfig.model_validate({"format": "pairwise", "model": "m", "url": server.url, "max_answer_tokens": 77})
    )
    ranker.compare([(completions(2)[0], completions(2)[1])])
    assert server.bodies[-1]["max_tokens"] == 77


def test_probabilities_of_the_completions_endpoint(server: FaultServer) -> None:
    server.answer = lambda text: "no"
    server.logprobs = lambda text: {
        "tokens": ["no"],
        "token_logprobs": [-0.1],
        "top_logprobs": [{"no": -0.1, " Yes": -3.1}],
    }
    (verdict,) = judge(server, "harmbench", api="completions").judge(completions(1))
    assert verdict.label == "safe"
    assert verdict.p_safe == pytest.approx(1 / (1 + 0.049787), abs=1e-4)
    assert server.bodies[0]["prompt"].startswith("[INST]")
    with raises(SettingError):
        judge(server, "llama-guard-3", api="completions").judge(completions(1))


def test_a_server_that_takes_no_request_for_probabilities(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.plan = lambda text, attempt: "400" if server.bodies[-1].get("logprobs") else "ok"
    asked = judge(server, max_concurrency=1)
    assert [verdict.label for verdict in asked.judge(completions(5))] == expected(5)
    assert server.num_requests == 5 + 3  # found out once, for 20, 5 and 2 of them


@pytest.mark.parametrize(
    ("most", "said", "asked"),
    [
        (8, "Requested sample logprobs of 20, which is greater than max allowed: 8", [20, 5, 5, 5]),
        (5, "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 20", [20, 5, 5, 5]),
        (3, "", [20, 5, 2, 2, 2]),
        (1, "Value for 'top_logprobs' must be <= 1", [20, 5, 2, None, None, None]),
    ],
)
def test_a_server_that_allows_fewer_probabilities(
    server: FaultServer, caplog: pytest.LogCaptureFixture, most: int, said: str, asked: list[int | None]
) -> None:
    server.reply = lambda text, body: (400, {"message": said}, {}) if body.get("top_logprobs", 0) > most else None
    server.answer = lambda text: "safe"
    server.logprobs = lambda text: chat_logprobs([("safe", {"safe": math.log(0.6), "unsafe": math.log(0.4)})])
    with caplog.at_level(logging.INFO, "bfpo"):
        verdicts = judge(server, max_concurrency=1, threshold=0.7).judge(completions(3))
    assert [body.get("top_logprobs") for body in server.bodies] == asked
    if asked[-1] is None:
        assert [(verdict.label, verdict.p_safe) for verdict in verdicts] == [("safe", None)] * 3
        says(caplog, "threshold")
        assert [record.levelname for record in caplog.records if "threshold" in record.message] == ["WARNING"]
    else:
        assert [verdict.label for verdict in verdicts] == ["unsafe"] * 3
        assert [verdict.p_safe for verdict in verdicts] == pytest.approx([0.6] * 3)
        assert "threshold" not in caplog.text
        says(caplog, "log-probabilities", str(asked[-1]))


def test_a_request_that_was_under_way_while_another_found_the_form_is_sent_again(server: FaultServer) -> None:
    late, last = texts(3)[1:]

    def reply(text: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
        while text == late and not server.requests[last]:  # which is sent after the first text has its answer
            time.sleep(0.01)
        return (400, {"message": "no"}, {}) if body.get("logprobs") else None

    server.reply = reply
    assert [verdict.label for verdict in judge(server, max_concurrency=2).judge(completions(3))] == expected(3)
    assert server.requests[late] == 2


def test_a_text_that_the_server_refuses_is_unscored(server: FaultServer) -> None:
    server.plan = lambda text, attempt: "400" if text == texts(4)[2] else "ok"
    verdicts = judge(server, max_concurrency=1).judge(completions(4))
    assert [verdict.label for verdict in verdicts] == ["unsafe", "safe", "unscored", "unsafe"]
    assert "status 400: " in verdicts[2].reason
    assert server.num_requests == 4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([{"error": {"code": 400, "message": "The prompt is too long.", "status": "INVALID_ARGUMENT"}}], " too long."),
        ({"detail": "The prompt is too long."}, " too long."),
        (b"The prompt is too long.", " too long."),
        (b"<html>Bad request</html>", "Error code: 400"),
    ],
)
def test_the_message_of_a_refusal_is_found_wherever_it_stands(server: FaultServer, body: Any, said: str) -> None:
    server.reply = lambda text, asked: (400, body, {}) if text == texts(2)[1] else None
    (_, verdict) = judge(server, max_concurrency=1).judge(completions(2))
    assert verdict.label == "unscored"
    assert verdict.reason.endswith(said)


def test_votes_are_drawn_with_a_seed_of_their_own(server: FaultServer) -> None:
    asked = judge(server, temperature=0.7)
    assert asked.is_sampled
    asked.judge_each(completions(1), lambda *found: None, vote=3)
    assert (server.bodies[0]["seed"], server.bodies[0]["temperature"]) == (3, 0.7)
    assert not judge(server).is_sampled
    assert judge(server).version != asked.version


def test_a_judged_text_cannot_close_its_turn(server: FaultServer) -> None:
    judge(server).judge([Completion("x", (Message("user", "q"),), "fine<|im_end|>")])
    assert "<|im_end|>" not in server.bodies[0]["messages"][-1]["content"]


def blocked_by(**error: Any) -> dict[str, Any]:
    return {"error": {"message": "Filtered by our rules on content policy.", "code": "content_filter", **error}}


def test_a_text_that_the_judges_server_blocks_is_unscored_for_good(server: FaultServer) -> None:
    server.reply = lambda text, body: (400, blocked_by(), {}) if text in texts(6)[1:3] else None
    found: dict[int, tuple[Verdict, bool]] = {}
    judge(server).judge_each(completions(6), lambda n, verdict, lasting: found.update({n: (verdict, lasting)}))
    labels = expected(6)
    assert [found[n][0].label for n in range(6)] == [labels[0], "unscored", "unscored", *labels[3:]]
    assert all(lasting for _, lasting in found.values())
    assert found[1][0].reason.startswith("the judge's server blocks the text: status 400 content_filter: Filtered by")
    assert server.num_requests == 6  # nothing is left out for a text that is blocked


def test_a_server_that_blocks_every_text_does_not_stop(server: FaultServer) -> None:
    server.reply = lambda text, body: (403, {"error": {"message": "The input was flagged as violence"}}, {})
    assert {verdict.label for verdict in judge(server).judge(completions(200))} == {"unscored"}
    assert server.num_requests == 200


def refuses(*parameters: str, named: bool = True) -> Any:
    """Return what a server replies that knows none of these parameters, in the words of several servers."""

    def reply(text: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
        for name in parameters:
            if name in body and named:
                detail = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
                return 422, {"detail": [detail]}, {}
            if name in body:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                return 400, {"error": {"message": said, "param": name, "code": "unsupported_parameter"}}, {}
        return None

    return reply


@pytest.mark.parametrize("named", [True, False])
def test_parameters_that_a_server_does_not_know_are_left_out_and_named_once(
    server: FaultServer, caplog: pytest.LogCaptureFixture, named: bool
) -> None:
    server.reply = refuses("max_tokens", "top_logprobs", "logprobs", "seed", "temperature", named=named)
    with caplog.at_level(logging.INFO, "bfpo"):
        asked = judge(server, temperature=0.5, max_concurrency=1)
        assert [verdict.label for verdict in asked.judge(completions(9))] == expected(9)
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert server.num_requests == 4 + 9  # each is found out once
    for name in ("seed", "temperature", "log-probabilities", "max_tokens"):
        assert (
            len(
                [
                    record
                    for record in caplog.records
                    if f"refuses {name}" in record.message.replace("requests for ", "")
                ]
            )
            == 1
        )
    server.reply = lambda text, body: None
    assert [verdict.label for verdict in asked.judge(completions(3))] == expected(3)
    assert "temperature" not in server.bodies[-1]  # remembered for the run


def test_a_parameter_that_must_stay_is_not_left_out(server: FaultServer) -> None:
    server.reply = refuses("model")
    with raises(ServerError, mask=r"\d+(?= texts)|(?<=last )\d+"):
        judge(server).judge(completions(200))


def test_a_limit_that_is_too_large_is_not_a_limit_of_another_name(server: FaultServer) -> None:
    said = "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context length is 8 tokens."
    server.reply = lambda text, body: (
        (400, {"error": {"message": said, "code": 400}}, {}) if text == texts(1)[0] else None
    )
    verdicts = judge(server, max_concurrency=1).judge(completions(3)[1:] + completions(1))
    assert [verdict.label for verdict in verdicts] == [*expected(3)[1:], "unscored"]
    assert "max_completion_tokens" not in server.bodies[-1]


# ------------------------------------------------------------------------------------------- the key and its host


def test_the_key_of_another_server_is_not_sent(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Own: {KEY}")
    assert [verdict.label for verdict in judge(server).judge(completions(3))] == expected(3)
    assert server.keys == {""}
    assert not [headers for headers in server.headers if KEY in str(headers)]
    judge(server, api_key_env="OPENAI_API_KEY").judge(completions(1))
    assert server.keys == {"", f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", "OPENAI_API_KEY"),
        ("http://api.openai.com/v1", None),
        ("https://api.openai.com.example.org/v1", None),
        ("https://xapi.openai.com/v1", None),
        ("https://example.org/api.openai.com/v1", None),
        ("http://127.0.0.1:8000/v1", None),
    ],
)
def test_the_default_key_belongs_to_one_host(url: str, variable: str | None) -> None:
    assert ServerSpec(url=url).key_variable == variable
    assert ServerSpec(url=url, api_key_env="MY_KEY").key_variable == "MY_KEY"


def test_without_a_key_the_message_says_that_none_was_sent(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.plan = lambda text, attempt: "401"
    with raises(ServerError, "api_key_env"):
        judge(server).judge(completions(1))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_is_refused(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("BFPO_TEST_KEY", KEY)
    with FaultServer().running() as other:
        server.reply = lambda text, body: (status, {}, {"location": f"{other.url}/chat/completions"})
        with raises(ServerError, "redirects"):
            judge(server, api_key_env="BFPO_TEST_KEY").judge(completions(20))
        assert other.num_requests == 0


def test_a_redirect_at_the_same_host_is_followed(server: FaultServer) -> None:
    moved: list[str] = []

    def reply(text: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
        moved.append(text)
        return (307, {}, {"location": f"{server.url}/chat/completions/"}) if len(moved) % 2 else None

    server.reply = reply
    budget = RequestBudget()
    assert [
        verdict.label for verdict in judge(server, budget=budget, max_concurrency=1).judge(completions(3))
    ] == expected(3)
    assert budget.num_requests == 6


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_drops_the_body_is_refused_with_the_new_address(server: FaultServer, status: int) -> None:
    location = {"location": f"{server.url.replace('http://', f'http://me:{KEY}@')}/new/chat/completions"}
    server.reply = lambda text, body: (status, {}, location)
    with raises(ServerError, "url") as error:
        judge(server, max_concurrency=1).judge(completions(20))
    assert "/v1/new/chat/completions" in str(error.value)
    assert KEY not in str(error.value)
    assert server.num_requests == 1


# --------------------------------------------------------------------------------------------------- large answers


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_stops_with_one_message(server: FaultServer, packed: bool) -> None:
    import bfpo.generation.transport as transport

    whole = b" " * (transport.MOST_BYTES + 1)
    content, headers = (gzip.compress(whole, 9), {"content-encoding": "gzip"}) if packed else (whole, {})
    server.reply = lambda text, body: (200, content, headers)
    with raises(ServerError, "MiB"):
        judge(server, max_concurrency=1, timeout=60.0).judge(completions(2))
    assert server.num_requests == 1


def test_an_answer_that_is_packed_twice_is_not_unpacked(server: FaultServer) -> None:
    twice = gzip.compress(gzip.compress(b"{}" * 1000))
    server.reply = lambda text, body: (200, twice, {"content-encoding": "gzip, gzip"})
    (verdict,) = judge(server, max_retries=0).judge(completions(1))
    assert "content-encoding" in verdict.reason


def test_an_answer_that_is_packed_once_is_read(server: FaultServer) -> None:
    whole = server._answer({"messages": [], "model": "m"}, "fine")
    server.reply = lambda text, body: (200, gzip.compress(json.dumps(whole).encode()), {"content-encoding": "gzip"})
    assert judge(server).judge(completions(1))[0].label == "safe"
    assert server.headers[0]["accept-encoding"] == "identity"


# ------------------------------------------------------------------------------------------------------ extra_body


def test_further_keys_are_sent_and_part_of_the_version(server: FaultServer) -> None:
    plain = judge(server)
    asked = judge(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}, "repetition_penalty": 1.1})
    assert asked.judge(completions(1))[0].label == expected(1)[0]
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.bodies[0]["repetition_penalty"] == 1.1
    assert asked.version != plain.version
    assert asked.version == judge(server, extra_body=dict(reversed(asked._server._spec.extra_body.items()))).version


def test_arguments_of_the_format_and_of_the_user_are_joined(server: FaultServer) -> None:
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    judge(server, "granite-guardian", extra_body=given).judge(completions(1))
    sent = server.bodies[0]["chat_template_kwargs"]
    assert sent["enable_thinking"] is False
    own = FORMATS["granite-guardian"].template_arguments
    assert sent == {**own, "enable_thinking": False}
    with raises(SettingError, "chat_template_kwargs"):
        judge(server, "granite-guardian", extra_body={"chat_template_kwargs": dict(own)}).judge(completions(1))


@pytest.mark.parametrize(
    "extra", [{"seed": 3, "model": "other"}, {"api_key": "abc"}, {"x": {"y": KEY}}, {"x": {1, 2}}, {"x": float("nan")}]
)
def test_keys_that_cannot_be_sent(extra: dict[str, Any]) -> None:
    with raises(ValueError, "extra_body") as refused:
        ServerSpec(url="http://127.0.0.1:1/v1", extra_body=extra)
    assert KEY not in str(refused.value)


def ranks(server: FaultServer, answer: Any) -> list[Comparison]:
    server.answer = answer
    ranker = ServerRanker(
        PAIR_FORMATS["helpfulness"], Server(ServerSpec(url=server.url, timeout=0.5, max_retries=1), "m")
    )
    one, two, three = completions(3)
    return ranker.compare([(one, two), (two, three), (three, one)])


def test_a_ranker_is_asked_in_both_orders(server: FaultServer) -> None:
    def second_text_is_best(text: str) -> str:
        return "A" if "answer 1" in text.partition("Answer A:")[2].partition("Answer B:")[0] else "B"

    found = ranks(server, second_text_is_best)
    assert server.num_requests == 6
    assert [(row.first_id, row.second_id) for row in found] == [("c0", "c1"), ("c1", "c2"), ("c2", "c0")]
    assert [row.first_is_better for row in found] == [0.0, 1.0, 0.5]


def test_a_ranker_that_looks_at_the_place_says_a_tie_and_one_that_says_nothing_is_unscored(server: FaultServer) -> None:
    assert [row.first_is_better for row in ranks(server, lambda text: "A")] == [0.5, 0.5, 0.5]
    assert [row.first_is_better for row in ranks(server, lambda text: "both")] == [None, None, None]


def test_a_ranker_that_thinks_is_read_behind_its_thoughts(server: FaultServer) -> None:
    listed = [("<think>", {}), ("B", {"B": 0.0}), ("</think>", {}), ("A", {"A": math.log(0.8), "B": math.log(0.2)})]
    server.logprobs = lambda text: chat_logprobs(listed)
    (first, *_) = ranks(server, lambda text: "<think>B</think>A")
    assert first.first_is_better == pytest.approx(0.5)  # (0.8 + 1 - 0.8) / 2
    server.logprobs = None

    def second_text_is_best(text: str) -> str:
        letter = "A" if "answer 1" in text.partition("Answer A:")[2].partition("Answer B:")[0] else "B"
        return f"<think>A or B?</think>\n\n**{letter}**"

    assert [row.first_is_better for row in ranks(server, second_text_is_best)] == [0.0, 1.0, 0.5]
    assert [row.first_is_better for row in ranks(server, lambda text: "<think>A")] == [None] * 3


def test_probabilities_of_both_orders_are_averaged(server: FaultServer) -> None:
    server.logprobs = lambda text: chat_logprobs([("A", {"A": -0.1, "B": -2.3})])
    (first, *_) = ranks(server, lambda text: "A")
    assert first.first_is_better == pytest.approx(0.5)


def test_inside_an_event_loop(server: FaultServer) -> None:
    async def notebook() -> list[Verdict]:
        return judge(server).judge(completions(3))

    assert [verdict.label for verdict in asyncio.run(notebook())] == expected(3)


def test_an_interrupt_inside_an_event_loop_ends_the_requests(server: FaultServer) -> None:
    def reply(text: str, body: dict[str, Any]) -> None:
        if sum(server.requests.values()) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    async def notebook() -> None:
        judge(server, max_concurrency=1).judge(completions(30))

    server.reply = reply
    loop = asyncio.new_event_loop()  # `asyncio.run` would handle the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(notebook())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()
    num = server.num_requests
    time.sleep(0.5)
    assert server.num_requests == num < 10


def test_a_key_that_would_travel_in_the_open_is_named(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for url, warned in ((server.url, False), ("https://host/v1", False), ("http://host:8000/v1", True)):
        monkeypatch.setenv("BFPO_TEST_KEY", KEY)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bfpo"):
            Server(ServerSpec(url=url, api_key_env="BFPO_TEST_KEY"), "m")
        assert ("BFPO_TEST_KEY goes to host:8000 unencrypted" in caplog.text) == warned
        assert KEY not in caplog.text


def test_what_cannot_be_asked(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(SettingError, "max_requests"):
        RequestBudget(0)
    with raises(ValueError, "url") as refused:
        ServerSpec(url=f"http://me:{KEY}@host/v1")
    assert KEY not in str(refused.value)
    monkeypatch.setenv("BFPO_TEST_KEY", "two words")
    with raises(SettingError, "BFPO_TEST_KEY") as error:
        Server(ServerSpec(url=server.url, api_key_env="BFPO_TEST_KEY"), "m")
    assert "two words" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with raises(MissingExtraError, "bfpo[server]"):
        Server(ServerSpec(url=server.url), "m")
