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

    `tokens` is empty where the server gives no log-probabilities. `may_pass` says that the fault lies in the
    server's state or the network, not in the question.
    """

    text: str | None
    tokens: tuple[Token, ...] = ()
    fault: str = ""
    may_pass: bool = False


def read_chat(response: Any) -> Answer:
    """Read an answer of the chat endpoint; whatever is not where it should be counts as not given."""
    choice = _first(getattr(response, "choices", None))
    text = getattr(getattr(choice, "message", None), "content", None)
    if not isinstance(text, str) or not text.strip():
        return Answer(None, fault="the answer holds no text")
    items = getattr(getattr(choice, "logprobs", None), "content", None)
    tokens = []
    for item in items if isinstance(items, list) else ():
        tops = getattr(item, "top_logprobs", None)
        pairs = [(getattr(top, "token", None), getattr(top, "logprob", None)) for top in tops or ()]
        tokens.append(Token(str(getattr(item, "token", "")), _numbers(pairs)))
    return Answer(text, tuple(tokens))


def read_completion(response: Any) -> Answer:
    """Read an answer of the completions endpoint."""
    choice = _first(getattr(response, "choices", None))
    text = getattr(choice, "text", None)
    if not isinstance(text, str) or not text.strip():
        return Answer(None, fault="the answer holds no text")
    logprobs = getattr(choice, "logprobs", None)
    words, tops = getattr(logprobs, "tokens", None), getattr(logprobs, "top_logprobs", None)
    if not isinstance(words, list) or not isinstance(tops, list) or len(words) != len(tops):
        return Answer(text)
    pairs = [(str(word), top.items() if isinstance(top, dict) else ()) for word, top in zip(words, tops, strict=True)]
    return Answer(text, tuple(Token(word, _numbers(top)) for word, top in pairs))


def _first(items: Any) -> Any:
    return items[0] if isinstance(items, list) and items else None


def _numbers(pairs: Any) -> dict[str, float]:
    """Return the log-probabilities by token; the first of a token that is listed twice is the likelier one."""
    found: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, (int, float)) and not isinstance(logprob, bool):
            found.setdefault(token, float(logprob))
    return found
