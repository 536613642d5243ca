"""What replies of servers mean, in the forms of many of them; the wordings are like theirs, not theirs."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import pytest

from bfpo.core.schema import from_canonical
from bfpo.generation.replies import blocked_reason, lacks_credit, read_chat, read_completion, unsupported_parameter

AZURE = {
    "error": {
        "message": "The prompt was filtered. Please change it.",
        "param": "prompt",
        "code": "content_filter",
        "innererror": {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": {
                "hate": {"filtered": False, "severity": "safe"},
                "violence": {"filtered": True, "severity": "medium"},
                "jailbreak": {"filtered": True, "detected": True},
            },
        },
    }
}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            400,
            AZURE,
            "status 400 content_filter: The prompt was filtered. Please change it. (violence medium, jailbreak)",
        ),
        (400, AZURE["error"], "content_filter"),  # as the client's library hands it on
        (400, {"code": "bad", "innererror": {"code": "ResponsibleAIPolicyViolation"}}, "ResponsibleAIPolicyViolation"),
        (400, {"error": {"message": "Refused.", "type": "x", "code": "content_policy_violation"}}, "Refused."),
        (
            400,
            {"error": {"message": "Your input breaks our usage policies", "code": "invalid_prompt"}},
            "usage policies",
        ),
        (403, {"error": {"code": 403, "message": "The model needs moderation and the input was flagged"}}, "flagged"),
        (403, {"code": "no permission", "error": "Content violates the usage guidelines. Key ID: x"}, "violates"),
        (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}, "Content Exists Risk"),
        (400, {"code": "data_inspection_failed", "message": "Input may hold inappropriate content."}, "inappropriate"),
        (400, {"message": "The request was rejected because it was considered high risk"}, "high risk"),
        (422, {"detail": "Guardrail: violence"}, "Guardrail"),
        (451, "unsafe content", "unsafe content"),
        (400, [{"error": {"code": 400, "message": "The request was blocked due to safety filters"}}], "safety filters"),
        (500, {"error": {"code": "content_filter", "message": "stopped"}}, "stopped"),
    ],
)
def test_a_refusal_of_a_prompt_is_recognised(status: int, body: Any, words: str) -> None:
    reason = blocked_reason(status, body)
    assert reason is not None
    assert words in reason
    assert reason.startswith(f"status {status}")
    assert len(reason) <= 300


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": "Your key was blocked by our safety system", "code": "content_filter"}}),
        (404, {"error": {"message": "no model content-filter", "code": "model_not_found"}}),
        (429, {"error": {"message": "too many requests flagged"}}),
        (403, {"error": {"message": "Your account was flagged for a violation of our policies"}}),
        (403, {"error": {"message": "you have no access to this model"}}),
        (
            400,
            {"error": {"message": "Unsupported parameter: 'seed'", "code": "unsupported_parameter", "param": "seed"}},
        ),
        (
            400,
            {
                "error": {
                    "message": "This model's maximum context length is 8 tokens",
                    "code": "context_length_exceeded",
                }
            },
        ),
        (400, {"error": {"message": "roles must alternate"}}),
        (500, {"error": {"message": "unsafe content in the loader"}}),
        (400, None),
        (400, ["content_filter"]),
        (400, {}),
    ],
)
def test_another_error_says_nothing_about_the_prompt(status: int, body: Any) -> None:
    assert blocked_reason(status, body) is None


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"error": {"message": "'max_tokens' is not supported here, use 'max_completion_tokens'"}}, "max_tokens"),
        ({"error": {"message": "x", "param": "temperature", "code": "unsupported_value"}}, "temperature"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, "seed"),
        ({"message": "json: unknown field `top_logprobs`"}, "top_logprobs"),
        ("logprobs isn't implemented", "logprobs"),
        ([{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], "seed"),
        ({"message": "`temperature` and `top_p` cannot both be specified for this model. Use one."}, "top_p"),
        ({"message": "`temperature` cannot be 3 and `top_p` cannot be 2"}, None),
        ({"error": {"message": "'max_tokens' or 'max_completion_tokens' is too large: 9"}}, None),
        ({"error": {"message": "model does not support images"}}, None),
        ({"error": {"message": "the seedling is unknown"}}, None),
        ({"error": {"message": "no", "param": "messages", "code": "unsupported_parameter"}}, None),
    ],
)
def test_the_parameter_that_is_not_supported(body: Any, parameter: str | None) -> None:
    assert unsupported_parameter(body) == parameter


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "You exceeded your current quota, please wait 7 s."),  # Gemini's limit of a minute
        (422, "insufficient balance"),
        (400, "roles must alternate"),
        (500, "insufficient quota of the node"),
    ],
)
def test_another_error_says_nothing_about_the_credit(status: int, message: str) -> None:
    assert not lacks_credit(status, {"message": message, "code": status})


def reply(message: Any, finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    return {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish}], **more}


@pytest.mark.parametrize(
    ("message", "finish", "text", "reasoning", "finished"),
    [
        ({"content": "yes"}, "stop", "yes", "", True),
        ({"content": "yes"}, "length", "yes", "", False),
        ({"content": "yes"}, "STOP", "yes", "", True),
        ({"content": "yes"}, "eos_token", "yes", "", True),
        ({"content": "yes", "reasoning_content": "is it?"}, "stop", "yes", "is it?", True),
        ({"content": "yes", "reasoning": "is it?"}, "stop", "yes", "is it?", True),
        ({"content": None, "reasoning_content": "is it"}, "length", "", "is it", False),
        ({"content": None}, "length", "", "", False),  # thoughts that the server does not show
        ({"content": ""}, "stop", "", "", True),
        ({"content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}, "stop", "yes", "", True),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "is it?"}]},
                    {"type": "text", "text": "a"},
                ]
            },
            *("stop", "a", "is it?", True),
        ),
        ({"content": "yes", "refusal": None}, "stop", "yes", "", True),
    ],
)
def test_an_answer_of_a_writer(message: Any, finish: str, text: str, reasoning: str, finished: bool) -> None:
    answer = read_chat(reply(message, finish), writes=True)
    assert (answer.text, answer.reasoning, answer.finished) == (text, reasoning, finished)
    assert (answer.blocked, answer.fault) == (False, "")
    opinion = read_chat(reply(message, finish))
    assert opinion.text == (text or None)  # a judge that writes nothing has no opinion
    assert bool(opinion.fault) == (not text)


def test_calls_of_tools_are_an_answer_without_a_text() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    answer = read_chat(reply({"content": None, "tool_calls": calls}, "tool_calls"), writes=True)
    assert (answer.text, answer.finished, from_canonical(answer.tool_calls)) == ("", True, calls)


@pytest.mark.parametrize(
    ("found", "words", "unsure"),
    [
        (
            reply({"content": None, "refusal": "I will not."}, "content_filter"),
            "finish_reason content_filter: I will not.",
            False,
        ),
        (reply({"content": "The first st"}, "content_filter"), "cut after 12 characters", False),
        (reply({"content": ""}, "SAFETY"), "finish_reason SAFETY", False),
        (reply({"content": None, "refusal": "I will not."}), "refusal: I will not.", False),
        (reply({"content": [{"type": "refusal", "refusal": "I will not."}]}), "refusal: I will not.", False),
        ({"object": "chat.completion", "choices": []}, "no choice", True),
        ({"object": "chat.completion", "choices": None}, "no choice", True),
        (
            {"choices": [], "prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": True}}}]},
            *("no choice (hate)", False),
        ),
        ({"choices": None, "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, "PROHIBITED_CONTENT", False),
        ({"error": {"code": 403, "message": "the input was flagged"}}, "flagged", False),
    ],
)
def test_a_reply_that_blocks_the_prompt(found: Any, words: str, unsure: bool) -> None:
    for answer in (read_chat(found), read_chat(found, writes=True)):
        assert answer.text is None
        assert answer.blocked
        assert answer.unsure == unsure
        assert words in answer.fault


@pytest.mark.parametrize(
    ("found", "may_pass"),
    [
        ({"error": {"code": 502, "message": "no upstream"}}, True),
        ({"error": {"code": 429, "message": "slowly"}}, True),
        ({"error": {"code": 402, "message": "pay"}}, False),
        ({"error": "odd"}, False),
        ({"object": "list", "data": []}, False),
        ({"choices": "odd"}, False),
        ({"choices": ["odd"]}, False),
        ([], False),
        (reply({"content": 7}, None), False),
        (reply("odd", None), False),
    ],
)
def test_a_reply_that_is_none(found: Any, may_pass: bool) -> None:
    answer = read_chat(found, writes=True)
    assert answer.text is None
    assert answer.fault
    assert (answer.blocked, answer.may_pass) == (False, may_pass)


def test_the_completions_endpoint() -> None:
    def read(text: Any, finish: str | None, **settings: bool) -> Any:
        return read_completion({"choices": [{"text": text, "finish_reason": finish}]}, **settings)

    assert (read("a", "stop").text, read("a", "stop").finished) == ("a", True)
    assert read("", "length", writes=True).text == ""
    assert read("", "stop").text is None
    assert read("a", "content_filter").blocked
    assert read_completion({"choices": []}).blocked


ODD: tuple[Any, ...] = (None, 1, 1.5, True, "x", ["x"], {"x": 1}, [{}])


def other_forms(value: Any) -> Iterator[Any]:
    """Yield a value with something odd in the place of each of its parts."""
    yield from ODD
    for place in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for odd in other_forms(value[place]):
            other = copy(value)
            other[place] = odd
            yield other


def test_no_form_of_a_reply_is_a_failure_here() -> None:
    logprobs = {"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": -1.0}]}]}
    filters = [{"content_filter_results": {"hate": {"filtered": True}}}]
    choice = {"message": {"content": "a"}, "finish_reason": "content_filter", "logprobs": logprobs}
    for form in other_forms({"choices": [choice], "prompt_filter_results": filters}):
        read_chat(form)
        read_completion(form)
    for form in other_forms({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}):
        unsupported_parameter(form)
    for form in other_forms(AZURE):
        blocked_reason(400, form)
