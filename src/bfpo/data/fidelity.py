"""What a chat template does to the text of a conversation: what it deletes or moves, and how it opens an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bfpo.core.schema import Message, from_canonical
from bfpo.data.fields import REASONING
from bfpo.data.template import called_functions
from bfpo.data.thinking import MARKS

__all__ = ["changed_texts", "common_length", "moves_prompt", "opening_difference", "shortest_text"]

_CLOSED = re.compile("|".join(re.escape(closing) for _, closing in MARKS))
_SHOWN = 40
_NAMES = {
    "system": "a system message",
    "user": "a user message",
    "assistant": "an assistant message",
    "tool": "a tool message",
}


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items, or characters, two sequences have in common at their start."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(i for i in range(limit) if one[i] != other[i])


def shortest_text(messages: Sequence[Message]) -> int:
    """Return the number of characters of the shortest content that is not blank."""
    return min((len(text) for message in messages if (text := message.content.strip())), default=0)


def changed_texts(prompt: Sequence[Message], answer: Message | None, tools: str, head: str, whole: str) -> list[str]:
    """Return what the template deletes or moves, as fixed phrases; white space does not count.

    `head` is the rendered prompt with the generation prompt, `whole` the conversation with the answer (or `head` again
    if there is none). The contents must be in `whole` in their order, those of the prompt before the point where `head`
    and `whole` part, since that is where the completion starts. Reasoning, the names and arguments of tool calls and
    the descriptions of tools must be there too.
    """
    found = _changes(prompt, answer, tools, head, whole, spaced=True)
    return found and _changes(prompt, answer, tools, head, whole, spaced=False)


def moves_prompt(changes: Sequence[str]) -> bool:
    """Return whether `changed_texts` has found a message of the prompt in another place, or not at all."""
    return any(change.startswith(f"{name} is ") for change in changes for name in _NAMES.values())


def opening_difference(head: str, whole: str, answer: str) -> str:
    """Return how the start of an answer differs between generation (`head`) and training (`whole`); empty if equal.

    `whole` ends with the answer. `answer`: its text, empty if `head` ends inside it or if it is more than text.
    """
    start = common_length(head, whole)
    place = whole.rfind(answer.strip()) if answer.strip() else -1
    if place < 0 and answer.strip():  # the template changes its white space
        place = whole.find(answer.split(maxsplit=1)[0], start)
    elif answer.strip():
        start = min(start, place)  # an answer may begin with the same character as what opens it in generation
    opened = head[start:].strip()
    written = whole[start:place].strip() if place >= start else ""
    parts = [f"generation opens {_short(opened)}, training does not"] if opened else []
    parts += [f"training writes {_short(written)} before the answer, generation does not"] if written else []
    return "; ".join(parts)


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", ensure_ascii=False)


def _changes(
    prompt: Sequence[Message], answer: Message | None, tools: str, head: str, whole: str, *, spaced: bool
) -> list[str]:
    if not spaced:
        head, whole = _squeezed(head), _squeezed(whole)
    boundary = common_length(head, whole)
    reasons: list[str] = []
    position = 0
    for message in (*prompt, *([] if answer is None else [answer])):
        own = message is answer
        name = "the completion" if own else _NAMES[message.role]
        end = _end_of(message.content, whole, position, spaced)
        body = _CLOSED.split(message.content)[-1]
        if end is None and body != message.content:
            end = _end_of(body, whole, position, spaced)
            if end is not None:
                reasons.append(f"the reasoning of {name} is deleted")
        if end is None and _end_of(message.content, whole, 0, spaced) is not None:
            reasons.append(f"{name} is moved")
        elif end is None:
            reasons.append(f"{name} is deleted or changed")
        elif end > boundary and not own:
            inside = _end_of(message.content, whole[:boundary], position, spaced)  # the answer may quote what is JSON
            reasons += [f"{name} is part of the completion"] if inside is None else []
            end = end if inside is None else inside
        extra = from_canonical(message.extra) or {}
        thoughts = next((extra[key] for key in REASONING if isinstance(extra.get(key), str)), "")
        if _end_of(thoughts, whole, 0, spaced) is None:
            reasons.append(f"the reasoning of {name} is deleted")
        calls = [text for call in called_functions(extra) for text in _call_texts(call)]
        if any(_end_of(text, whole, position, spaced) is None for text in calls):
            reasons.append(f"a tool call of {name} is deleted or changed")
        position = position if end is None else end
    described = [text for tool in from_canonical(tools) or [] for text in _tool_texts(tool)]
    if any(_end_of(text, whole, 0, spaced) is None for text in described):
        reasons.append("the tools are deleted or changed")
    return list(dict.fromkeys(reasons))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _end_of(text: str, whole: str, start: int, spaced: bool) -> int | None:
    """Return where the first copy of a text behind `start` ends, plain or inside JSON; `None` if there is none."""
    for form in _forms(text, spaced):
        place = whole.find(form, start)
        if place >= 0:
            return place + len(form)
    return None


def _forms(text: str, spaced: bool) -> Iterator[str]:
    """Yield a text as it is, and as it is inside a JSON string, and inside one of those (arguments given as text)."""
    yield text.strip() if spaced else _squeezed(text)
    for as_ascii in (False, True):
        inner = json.dumps(text.strip(), ensure_ascii=as_ascii)[1:-1]
        for form in (inner, json.dumps(inner, ensure_ascii=as_ascii)[1:-1]):
            yield form if spaced else _squeezed(form)


def _call_texts(call: dict[str, Any]) -> list[str]:
    """Return the name of a called function and the names and values of its arguments, as far as they are text."""
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = [arguments]
    return [str(call.get("name", "")), *_leaves(arguments)]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _tool_texts(tool: Any) -> list[str]:
    """Return the name, the description and the names of the parameters of a tool."""
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(function, dict):
        return []
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    names = list(properties) if isinstance(properties, dict) else []
    return [text for text in (function.get("name"), function.get("description"), *names) if isinstance(text, str)]
