"""What a server answers, reduced to its text and log-probabilities; whatever is not where it should be is not given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "Token", "read_chat", "read_completion"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, with the log-probabilities of the likeliest ones in its place."""

    text: str
    top_logprobs: dict[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server wrote; `text` is `None`, with the fault, where no answer came.

    `tokens` is empty where the server gives no log-probabilities, `finish_reason` and `num_tokens` `None` where it does
    not say. `may_pass` says that the fault lies in the server's state or the network, not in the question.
    """

    text: str | None
    tokens: tuple[Token, ...] = ()
    fault: str = ""
    may_pass: bool = False
    finish_reason: str | None = None
    num_tokens: int | None = None


def read_chat(response: Any, *, may_be_empty: bool = False) -> Answer:
    """Read an answer of the chat endpoint; whatever is not where it should be counts as not given.

    An empty text is no answer. With `may_be_empty` it is one where the model ended it by itself, and blanks are text.
    """
    choice = _first(getattr(response, "choices", None))
    reason = _reason(choice)
    text = _text(getattr(getattr(choice, "message", None), "content", None), reason, may_be_empty)
    if text is None:
        return _no_text(reason)
    items = getattr(getattr(choice, "logprobs", None), "content", None)
    tokens = []
    for item in items if isinstance(items, list) else ():
        tops = getattr(item, "top_logprobs", None)
        pairs = [(getattr(top, "token", None), getattr(top, "logprob", None)) for top in tops or ()]
        tokens.append(Token(str(getattr(item, "token", "")), _numbers(pairs)))
    return Answer(text, tuple(tokens), finish_reason=reason, num_tokens=_num_tokens(response))


def read_completion(response: Any, *, may_be_empty: bool = False) -> Answer:
    """Read an answer of the completions endpoint, as `read_chat` does."""
    choice = _first(getattr(response, "choices", None))
    reason = _reason(choice)
    text = _text(getattr(choice, "text", None), reason, may_be_empty)
    if text is None:
        return _no_text(reason)
    tokens: tuple[Token, ...] = ()
    logprobs = getattr(choice, "logprobs", None)
    words, tops = getattr(logprobs, "tokens", None), getattr(logprobs, "top_logprobs", None)
    if isinstance(words, list) and isinstance(tops, list) and len(words) == len(tops):
        pairs = [(str(w), top.items() if isinstance(top, dict) else ()) for w, top in zip(words, tops, strict=True)]
        tokens = tuple(Token(word, _numbers(top)) for word, top in pairs)
    return Answer(text, tokens, finish_reason=reason, num_tokens=_num_tokens(response))


def _text(text: Any, reason: str | None, may_be_empty: bool) -> str | None:
    """Return the text of an answer, `None` where there is none."""
    if may_be_empty and reason == "stop" and text is None:
        return ""
    if not isinstance(text, str):
        return None
    is_text = bool(text.strip()) or (may_be_empty and (text != "" or reason == "stop"))
    return text if is_text else None


def _no_text(reason: str | None) -> Answer:
    said = "" if reason in (None, "stop") else f" (finish_reason {reason})"
    return Answer(None, fault=f"the answer holds no text{said}")


def _reason(choice: Any) -> str | None:
    reason = getattr(choice, "finish_reason", None)
    return reason if isinstance(reason, str) else None


def _num_tokens(response: Any) -> int | None:
    number = getattr(getattr(response, "usage", None), "completion_tokens", None)
    return number if isinstance(number, int) else None


def _first(items: Any) -> Any:
    return items[0] if isinstance(items, list) and items else None


def _numbers(pairs: Any) -> dict[str, float]:
    """Return the log-probabilities by token; the first of a token that is listed twice is the likelier one."""
    found: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, (int, float)) and not isinstance(logprob, bool):
            found.setdefault(token, float(logprob))
    return found
