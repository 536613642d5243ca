"""Messages as data files hold them: text or its parts, turns of several forms, tool calls, conversations as text."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from bfpo.core.schema import Message, Role, canonical_json
from bfpo.data.rejects import RowError

__all__ = [
    "MEDIA",
    "MESSAGE_KEYS",
    "answer_of",
    "check_no_media",
    "check_weight",
    "ends_with_assistant",
    "is_absent",
    "messages_of",
    "parsed_conversation",
    "parsed_transcript",
    "text_of",
    "tools_of",
    "transcript_turns",
    "turns_with_beginning",
    "without_empty_end",
]

_SHAREGPT_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_ROLES: dict[str, Role] = {**{role: role for role in get_args(Role)}, **_SHAREGPT_ROLES, "function_call": "assistant"}

_CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "tool_plan")
_WEIGHTS = ("weight", "train", "training", "loss")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Columns of a row, and keys of a message, that hold what is not text."""
MESSAGE_KEYS = frozenset({"role", "content", "from", "value", "function_call", *_CARRIED, *_WEIGHTS, *MEDIA})
"""The keys of a message that are read: a file may have others, which are reported."""

_NO_WEIGHTS = "rows are not weighted: only weight 1 is read (columns: {weight: null} takes all rows as equal)"


def is_absent(value: object) -> bool:
    """Return whether a value stands for none: null, NaN, or an empty text, list or object."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], {})


def ends_with_assistant(messages: Sequence[Message]) -> bool:
    """Return whether the last message is one of the assistant that an answer continues; an empty one is not."""
    last = messages[-1] if messages else None
    return last is not None and last.role == "assistant" and bool(last.content.strip() or last.extra)


def without_empty_end(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a prompt without an empty message of the assistant at its end, which the answer takes the place of."""
    ends_empty = bool(messages) and messages[-1].role == "assistant" and not ends_with_assistant(messages)
    return messages[:-1] if ends_empty else messages


# ---------------------------------------------------------------------------------------------------------- text


def text_of(value: object, field: str) -> str:
    """Return the value if it is text that UTF-8 can hold, or a list of parts of text, else raise `RowError`."""
    if is_parts(value):
        return "".join(_part(part, field) for part in cast("list[Any]", value))
    if not isinstance(value, str):
        raise RowError(field, "wrong type (text is needed)", value)
    if isinstance(value, _Unreadable):
        raise RowError(field, "begins like a conversation as JSON or Python text, but cannot be read as one", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, "not valid Unicode", value[error.start : error.end]) from None
    return str(value)  # of a CSV cell too


def is_parts(value: object) -> bool:
    """Return whether a value is content in parts, such as `[{"type": "text", "text": "..."}]`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and "type" in part and "role" not in part for part in value)
    )


def _part(part: Mapping[str, Any], field: str) -> str:
    if part["type"] not in ("text", "input_text", "output_text"):
        raise RowError(field, "a part of the content is not text", part["type"])
    return text_of(part.get("text"), field)


# ------------------------------------------------------------------------------------------------------ messages


def messages_of(value: object, field: str) -> tuple[Message, ...]:
    """Return a prompt as messages: text is one user message, empty text or an empty list no messages.

    A message has `role` and `content`, or `from` and `value` as in ShareGPT. Raises `RowError`.
    """
    if isinstance(value, str) or is_parts(value):
        text = text_of(value, field)
        return (Message("user", text),) if text else ()
    if not isinstance(value, list):
        raise RowError(field, "wrong type (text or a list of messages is needed)", value)
    return tuple(_message(item, field) for item in value)


def answer_of(value: object, field: str) -> Message:
    """Return a completion: text, a message of the assistant, or a list of that one message. Raises `RowError`."""
    if isinstance(value, str) or is_parts(value):
        return Message("assistant", text_of(value, field))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(field, "wrong type (text is needed)", value)
    if len(value) != 1:
        raise RowError(field, "not exactly one message", [_role_of(item) for item in value])
    (message,) = messages_of(value, field)
    if message.role != "assistant":
        raise RowError(field, "the completion is not the assistant's", message.role)
    check_weight(value[0], field)
    return message


def check_weight(item: object, field: str) -> None:
    """Raise `RowError` where the last message of a conversation is marked as not to be trained on, or has a weight."""
    for name in _WEIGHTS:
        weight = item.get(name) if isinstance(item, dict) else None
        if is_absent(weight) or weight == 1 or not (name == "weight" or isinstance(weight, bool)):
            continue
        if weight == 0:
            raise RowError(field, f"the completion is marked as not to be trained on ({name})", weight)
        raise RowError(field, _NO_WEIGHTS, weight)


def _role_of(item: object) -> object:
    return item.get("role", item.get("from")) if isinstance(item, dict) else item


def _message(item: object, field: str) -> Message:
    if not isinstance(item, dict) or not ("role" in item or {"from", "value"} <= item.keys()):
        raise RowError(field, "not a message with role and content", item)
    given = _role_of(item)
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError(field, f"unknown role (known: {', '.join(_ROLES)})", given)
    check_no_media(item, field)
    content = item.get("content") if "role" in item else item["value"]
    if given == "function_call":  # ShareGPT: a turn whose text is the call
        calls: object = _calls_of_text(text_of(content, field), field)
        content = None
    else:
        calls = item.get("tool_calls")
        legacy = item.get("function_call")
        if is_absent(calls) and not is_absent(legacy):
            calls = [{"type": "function", "function": legacy}]
    extra = {name: item[name] for name in _CARRIED if not is_absent(item.get(name))}
    if not is_absent(calls):
        extra["tool_calls"] = _tool_calls(calls, field)
        if content is None:
            extra["content"] = None
            content = ""
    elif "content" not in item and "value" not in item:
        raise RowError(field, "not a message with role and content", item)
    return Message(role, text_of(content, field), text_of(canonical_json(extra), field))


def check_no_media(item: Mapping[str, object], field: str = "") -> None:
    """Raise `RowError` where a row or a message holds pictures, sound or film, which no stage reads."""
    for name in MEDIA:
        if not is_absent(item.get(name)):
            reason = f"only text is read (columns: {{{name}: null}} leaves it out)"
            raise RowError(f"{field}.{name}" if field else name, reason, item[name])


# --------------------------------------------------------------------------------------------------------- tools


def _tool_calls(value: object, field: str) -> list[Any]:
    """Return the calls of a message, their arguments as objects where they are the JSON text of one."""
    calls = _json_value(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(field, "tool_calls is not a list of calls", value)
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = _json_value(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _calls_of_text(text: str, field: str) -> list[Any]:
    value = _json_value(text)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise RowError(field, "function_call is not JSON of name and arguments", text)
    return [{"type": "function", "function": call} for call in calls]


def tools_of(value: object, field: str = "tools") -> str:
    """Return the tools of a row, a list of descriptions or its JSON text, as canonical JSON. Raises `RowError`."""
    if is_absent(value):
        return ""
    tools = _json_value(value)
    tools = [tools] if isinstance(tools, dict) else tools
    tools = [_json_value(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(field, "not a list of descriptions of tools, nor its JSON text", value)
    return text_of(canonical_json(tools), field)


def _json_value(value: object) -> Any:
    """Return what a text that is JSON says, any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# ------------------------------------------------------------------------------------------ conversations as text


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_MARKS = ("Human:", "Assistant:")
_HH_ANSWER = "\n\nAssistant:"
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def transcript_turns(text: str) -> tuple[Message, ...]:
    """Return the turns of a transcript of `Human:` and `Assistant:`, each after an empty line, () for another text."""
    text = text.lstrip()
    if not text.startswith(_HH_MARKS):
        return ()
    _, *rest = _HH_TURN.split("\n\n" + text)
    return tuple([Message(_HH_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)])


def turns_with_beginning(text: object, turns: Sequence[Message], other: object) -> tuple[Message, ...]:
    """Return the turns of a transcript that is as `text` up to its last answer, without reading them twice, else ().

    `turns`: of `text`.
    """
    if not (isinstance(text, str) and isinstance(other, str) and turns[-1].role == "assistant"):
        return ()
    end = text.rfind(_HH_ANSWER) + len(_HH_ANSWER)
    said = other[end:]
    if end < len(_HH_ANSWER) or not other.startswith(text[:end]) or _HH_TURN.search(said):
        return ()
    return (*turns[:-1], Message("assistant", text_of(said, "rejected").strip()))


def parsed_transcript(prompt: object) -> Any:
    """Return the messages of a prompt that is a transcript from `Human:` to a bare `Assistant:`, else it unchanged."""
    if not isinstance(prompt, str) or not prompt.rstrip().endswith(_HH_ANSWER):
        return prompt
    turns = transcript_turns(prompt)
    if not turns or turns[0].role != "user":
        return prompt
    return [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]


_BEGINS = re.compile(r"""\s*(?:\[\s*)?\{\s*["']""")
_KEYS = re.compile(r"""(["'])(?:role|from)\1\s*:""")
_BETWEEN = re.compile(r"\}[ \t]*\r?\n\s*\{")  # numpy writes no comma; within a text a line break would be `\n`


class _Unreadable(str):
    """A text that begins and ends like a conversation but cannot be read as one."""

    __slots__ = ()


def parsed_conversation(value: object) -> Any:
    """Return the list of messages that a text is (JSON, or what Python or numpy print), else the value unchanged.

    A text that begins and ends like one but cannot be read is bad where a layout reads it.
    """
    if not isinstance(value, str) or _BEGINS.match(value) is None or _KEYS.search(value) is None:
        return value
    text = value.strip()
    for read in (json.loads, ast.literal_eval, lambda text: ast.literal_eval(_BETWEEN.sub("}, {", text))):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if _is_conversation(found):
            return found if isinstance(found, list) else [found]
        return value  # JSON of another form
    return _Unreadable(value) if text.startswith("[") and text.endswith("]") else value


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, or one message of a known role and with no other keys."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_turn, value))
    return _is_turn(value) and _role_of(value) in _ROLES and value.keys() <= MESSAGE_KEYS


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(_role_of(value), str)
        and ("content" in value or "value" in value or "tool_calls" in value)
    )
