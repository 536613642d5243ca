"""What a server's reply says: an answer, a refusal of this prompt, a parameter that is not supported, or a fault."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bfpo.core.schema import canonical_json

__all__ = [
    "Answer",
    "Token",
    "blocked_reason",
    "error_message",
    "lacks_credit",
    "may_pass",
    "read_chat",
    "read_completion",
    "refuses_to_continue",
    "reported_fault",
    "unsupported_parameter",
]

# Codes and finish reasons of content filters (Azure, OpenAI, Gemini, Bedrock, DashScope, Zhipu, OpenRouter, LiteLLM).
_FILTER_CODE = re.compile(
    r"content_?(filter|polic)|contentpolicy|policy_?violation|responsible_?ai|moderation|guardrail|data_?inspection|"
    r"prohibited|blocklist|safety|spii|recitation|sensitive|refusal|content_?risk",
    re.IGNORECASE,
)
_FILTER_MESSAGE = re.compile(
    r"content[ _-](management|filter|polic|moderation|exists risk)|moderation|\bflagged\b|guardrail|policy violation|"
    r"(filtered|blocked|rejected) (due to|because of|by) .{0,40}(content|polic|safety|filter|risk|moderation)|"
    r"safety (system|filter|reason|check|setting|polic|guideline)|usage (polic|guideline)|responsible ai|"
    r"violat\w+ .{0,80}(polic|guideline|terms|rules|safety)|considered high risk|"
    r"(inappropriate|sensitive|harmful|unsafe|prohibited|objectionable) (content|information|material|prompt)",
    re.IGNORECASE,
)
_ABOUT_THE_ACCOUNT = re.compile(r"\b(your|this) (account|organi[sz]ation|project)\b", re.IGNORECASE)
# Of Anthropic, LiteLLM, Moonshot, xAI, and OpenAI's code; its message is also that of Gemini's rate limits.
_NO_CREDIT = re.compile(
    r"credit balance|insufficient[ _](balance|credit|fund|quota)|exceeded_current_quota|budget has been exceeded|"
    r"used all available credits",
    re.IGNORECASE,
)
_MAY_LACK_CREDIT = (400, 403, 429)
_PASSING = (408, 409, 425, 429)
_NOT_ABOUT_A_PROMPT = (401, 402, 404, 405, *_PASSING)
_PARAMETERS = (
    *("max_completion_tokens", "max_tokens", "top_logprobs", "logprobs", "seed", "temperature", "top_p"),
    "chat_template_kwargs",
)
_UNSUPPORTED = re.compile(
    r"unsupported|unknown|unrecogni[sz]ed|unexpected|forbidden|deprecated|extra (inputs|fields)|only the default|"
    r"n[o']t (yet )?(be )?(support|permit|allow|accept|available|implemented)",
    re.IGNORECASE,
)
# Newer models of Anthropic take one of the two; the temperature is kept.
_NOT_BOTH = re.compile(r"\btemperature\b.{0,20}\btop_p\b.{0,20}cannot both", re.IGNORECASE)
_ENDED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "function_call")
_LIMIT = ("length", "max_tokens")
# Of OpenRouter, Mistral, Zhipu, DeepSeek, vLLM: the text, if there is one, is a part of the answer.
_INTERRUPTED = ("error", "network_error", "insufficient_system_resource", "abort")
_LONGEST_REASON = 300
_CONTINUING = re.compile(
    r"continue_final_message|add_generation_prompt|pre-?fill|(?:last|final) (?:message|turn|role)|end with a user", re.I
)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, with the log-probabilities of the most likely tokens at its position."""

    text: str
    top_logprobs: dict[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer; `text` is `None`, with `fault`, if none arrived.

    `tokens` is empty if the server gives no log-probabilities, `num_tokens` is `None` if it does not report it.
    `finished`: the model ended the text itself. `reasoning` is what it thought before the text, `tool_calls` canonical
    JSON. A fault is one of: `blocked`, the server refuses this prompt for its content; `refused`, it refuses this
    request for a reason that need not lie in the prompt; `may_pass`, it lies in the server's state or the network.
    `unsure`: `blocked` without a stated reason.
    """

    text: str | None
    tokens: tuple[Token, ...] = ()
    fault: str = ""
    blocked: bool = False
    refused: bool = False
    may_pass: bool = False
    unsure: bool = False
    finished: bool = False
    num_tokens: int | None = None
    reasoning: str = ""
    tool_calls: str = ""


# ---------------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True, slots=True)
class _Said:
    """An error in a reply's body, whatever its form."""

    codes: tuple[str, ...] = ()
    message: str = ""
    parameter: str = ""
    filters: tuple[str, ...] = ()


def may_pass(status: int) -> bool:
    """Return whether an error status lies in the server's state or the network, so that a later request may succeed."""
    return status in _PASSING or status >= 500


def lacks_credit(status: int, body: Any) -> bool:
    """Return whether an error says that the account cannot pay, so that no further request is answered."""
    said = _said(body)
    return status == 402 or (
        status in _MAY_LACK_CREDIT and bool(_NO_CREDIT.search(" ".join((*said.codes, said.message))))
    )


def blocked_reason(status: int, body: Any) -> str | None:
    """Return why the server refuses this prompt for its content; `None` if the error is of another kind.

    `body` is that of the error. A refused key (401) or account, an unpaid bill (402), an unknown model (404) and a busy
    server say nothing about a prompt.
    """
    said = _said(body)
    by_code = next((code for code in said.codes if _FILTER_CODE.search(code)), None)
    by_message = 400 <= status < 500 and _FILTER_MESSAGE.search(said.message)
    if status in _NOT_ABOUT_A_PROMPT or not (by_code or by_message or said.filters):
        return None
    if status == 403 and not (by_code or said.filters) and _ABOUT_THE_ACCOUNT.search(said.message):
        return None
    head = " ".join(["status", str(status), *([by_code] if by_code else [])])
    return _reason(head, said.message, said.filters)


def unsupported_parameter(body: Any) -> str | None:
    """Return the parameter of ours that an error with this body calls unsupported; `None` for another error."""
    said = _said(body)
    if _NOT_BOTH.search(said.message):
        return "top_p"
    if not _UNSUPPORTED.search(" ".join((*said.codes, said.message))):
        return None
    if said.parameter in _PARAMETERS:
        return said.parameter
    places = {name: re.search(rf"(?<!\w){name}(?!\w)", said.message) for name in _PARAMETERS}
    named = {name: found.start() for name, found in places.items() if found is not None}
    return min(named, key=lambda name: named[name], default=None)


def error_message(body: Any) -> str:
    """Return what an error with this body says, in one line; empty for a page and for a body without a message."""
    text = " ".join(_said(body).message.split())
    return "" if text.startswith("<") else text


def refuses_to_continue(body: Any) -> bool:
    """Return whether an error with this body says that a message of the assistant is not continued."""
    said = _said(body)
    return bool(_CONTINUING.search(f"{said.parameter} {said.message}"))


def _reason(head: str, message: str, filters: Sequence[str] = ()) -> str:
    text = f"{head}: {' '.join(message.split())}" if message.strip() else head
    more = f" ({', '.join(filters)})" if filters else ""
    return text[: _LONGEST_REASON - len(more[:_LONGEST_REASON])] + more[:_LONGEST_REASON]


def _said(body: Any) -> _Said:
    """Read the body of an error: OpenAI's `error`, Gemini's list of one, Azure's `innererror`, FastAPI's `detail`."""
    if isinstance(body, list):
        body = next((one for one in body if isinstance(one, Mapping)), None)
    if isinstance(body, str):
        return _Said(message=body)
    if not isinstance(body, Mapping):
        return _Said()
    inner = body.get("error")
    if isinstance(inner, (Mapping, str)):
        own = _said(inner)
        outer = [str(body[key]) for key in ("code", "type") if isinstance(body.get(key), str)]
        message = own.message or str(body.get("message") or "")
        return _Said((*own.codes, *outer), message, own.parameter, own.filters)
    details = body.get("detail")
    message, parameter = str(body.get("message") or ""), str(body.get("param") or "")
    if isinstance(details, str):
        message = message or details
    for item in _list(details):
        if isinstance(item, Mapping):
            place = [str(part) for part in _list(item.get("loc")) if part != "body"]
            message = "; ".join(filter(None, (message, f"{'.'.join(place)}: {item.get('msg', '')}")))
    levels = [body, _mapping(body.get("innererror")), _mapping(body.get("inner_error"))]
    codes = tuple(str(level[key]) for level in levels for key in ("code", "type") if level.get(key))
    return _Said(codes, message, parameter, tuple(_filters(body)))


def _filters(value: Any, depth: int = 4) -> Iterator[str]:
    """Yield the filters that struck, with their severity, wherever Azure's results stand in a body."""
    if not isinstance(value, Mapping) or depth == 0:
        return
    for name, item in value.items():
        if isinstance(item, Mapping):
            if item.get("filtered") is True:
                severity = item.get("severity")
                yield f"{name} {severity}" if isinstance(severity, str) else str(name)
            else:
                yield from _filters(item, depth - 1)


# ------------------------------------------------------------------------------------------------------------ answers


def read_chat(reply: Any, *, writes: bool = False) -> Answer:
    """Read the JSON of a reply of the chat endpoint; one of an unexpected form is a fault.

    An empty text is not an answer. With `writes` it is one if the model ended it itself or used up its tokens.
    """
    choice = _choice(reply)
    if isinstance(choice, Answer):
        return choice
    message = _mapping(choice.get("message"))
    text, thought, refusal = _parts(message.get("content"))
    refusal = refusal or _string(message.get("refusal"))
    thoughts = (_string(message.get("reasoning_content")), _string(message.get("reasoning")), thought)
    items = _mapping(choice.get("logprobs")).get("content")
    tokens = []
    for item in map(_mapping, _list(items)):
        tops = map(_mapping, _list(item.get("top_logprobs")))
        pairs = [(top.get("token"), top.get("logprob")) for top in tops]
        tokens.append(Token(str(item.get("token", "")), _numbers(pairs)))
    answer = Answer(
        text,
        tuple(tokens),
        reasoning=next((one for one in thoughts if one.strip()), ""),
        tool_calls=canonical_json(message.get("tool_calls")),
    )
    return _blocked(reply, choice, text, refusal) or _ended(answer, reply, choice, writes=writes)


def read_completion(reply: Any, *, writes: bool = False) -> Answer:
    """Read the JSON of a reply of the completions endpoint, as `read_chat` does."""
    choice = _choice(reply)
    if isinstance(choice, Answer):
        return choice
    text = choice.get("text")
    tokens: tuple[Token, ...] = ()
    logprobs = _mapping(choice.get("logprobs"))
    words, tops = logprobs.get("tokens"), logprobs.get("top_logprobs")
    if isinstance(words, list) and isinstance(tops, list) and len(words) == len(tops):
        pairs = [(str(w), top.items() if isinstance(top, dict) else ()) for w, top in zip(words, tops, strict=True)]
        tokens = tuple(Token(word, _numbers(top)) for word, top in pairs)
    answer = Answer(text if isinstance(text, str) else None, tokens)
    return _blocked(reply, choice, answer.text, "") or _ended(answer, reply, choice, writes=writes)


def reported_fault(reply: Any) -> tuple[int, Any] | str | None:
    """Return a fault of server or account that a reply with a status of success reports, `None` without one.

    It is a status and its error, or why the answer is not whole.
    """
    choice, error = _first(_mapping(reply))
    if error:
        status = _status(error)
        concerns_all = blocked_reason(status, error) is None and (may_pass(status) or lacks_credit(status, error))
        return (status, error) if concerns_all else None
    reason = _string(_mapping(choice).get("finish_reason")).lower()
    return f"finish_reason {reason}" if reason in _INTERRUPTED else None


def _first(reply: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a reply's first choice, and the error that it reports, as OpenRouter and others do with status 200."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice, _mapping(choice).get("error") or (reply.get("error") if choice is None else None)


def _status(error: Any) -> int:
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 400


def _choice(reply: Any) -> Mapping[str, Any] | Answer:
    """Return the first choice of a reply, or the answer that says why there is none."""
    reply = _mapping(reply)
    choices = reply.get("choices")
    choice, error = _first(reply)
    if error:
        status = _status(error)
        if (reason := blocked_reason(status, error)) is not None:
            return Answer(None, fault=reason, blocked=True)
        return Answer(None, fault=_reason(f"error {status}", _said(error).message), may_pass=may_pass(status))
    if isinstance(choice, Mapping):
        return choice
    if "choices" not in reply or choices:
        return Answer(None, fault="the reply holds no choices; check that url is one of an OpenAI-compatible server")
    filters = tuple(_prompt_filters(reply))
    return Answer(None, fault=_reason("the reply has no choice", "", filters), blocked=True, unsure=not filters)


def _prompt_filters(reply: Mapping[str, Any]) -> Iterator[str]:
    """Yield the filters that struck the prompt: Azure's, or Gemini's reason."""
    for name in ("prompt_filter_results", "prompt_annotations"):
        for one in _list(reply.get(name)):
            yield from _filters(one)
    for name in ("prompt_feedback", "promptFeedback"):
        feedback = _mapping(reply.get(name))
        yield from (str(feedback[key]) for key in ("block_reason", "blockReason") if feedback.get(key))


def _blocked(reply: Any, choice: Mapping[str, Any], text: str | None, refusal: str) -> Answer | None:
    """Return the answer of a choice that the server's filter or the model's refusal took the text from."""
    reason = _string(choice.get("finish_reason"))
    if not _FILTER_CODE.search(reason):
        if not refusal.strip() or (text or "").strip():
            return None
        return Answer(None, fault=_reason("refusal", refusal), blocked=True)
    filters = (*_filters(choice), *_prompt_filters(reply))
    cut = f"cut after {len(text)} characters" if text else ""
    return Answer(None, fault=_reason(f"finish_reason {reason}", refusal or cut, filters), blocked=True)


def _ended(answer: Answer, reply: Any, choice: Mapping[str, Any], *, writes: bool) -> Answer:
    """Return the answer with its end, or the fault of one without a text."""
    reason = _string(choice.get("finish_reason")).lower()
    count = _mapping(_mapping(reply).get("usage")).get("completion_tokens")
    answer = replace(answer, finished=reason in _ENDED, num_tokens=count if isinstance(count, int) else None)
    text = answer.text or ""
    if text.strip() or (writes and (text or reason in _ENDED or reason in _LIMIT or answer.reasoning)):
        return replace(answer, text=text)
    said = f" (finish_reason {reason})" if reason not in ("", "stop") else ""
    return Answer(None, fault=f"the answer holds {'reasoning but ' * bool(answer.reasoning)}no text{said}")


def _parts(content: Any) -> tuple[str | None, str, str]:
    """Return text, thoughts and refusal of a message's content: a text, or a list of parts."""
    if not isinstance(content, list):
        return (content if isinstance(content, str) else None), "", ""
    found: dict[str, list[str]] = {"text": [], "thinking": [], "refusal": []}
    for part in content:
        if isinstance(part, str):
            found["text"].append(part)
            continue
        kind = _string(_mapping(part).get("type"))
        place = "text" if kind in ("text", "output_text") else "thinking" if kind in ("thinking", "reasoning") else kind
        inner = _mapping(part).get(kind if place != "text" else "text")
        found.setdefault(place, []).append(_parts(inner)[0] or "")
    return "".join(found["text"]) if found["text"] else None, "".join(found["thinking"]), "".join(found["refusal"])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _numbers(pairs: Any) -> dict[str, float]:
    """Return the log-probabilities by token; of a token that is listed twice, the first is the more likely."""
    found: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, (int, float)) and not isinstance(logprob, bool):
            found.setdefault(token, float(logprob))
    return found
