"""Fields of a row: text, messages, labels and ids as stored on disk, or the reason why they cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import cast, get_args

from bfpo.core.schema import Completion, Message, Pair, Role
from bfpo.data.rejects import CellText, RowError

__all__ = [
    "Columns",
    "cell_value",
    "choice_of",
    "completion_of",
    "content_id",
    "label_of",
    "messages_of",
    "optional_text",
    "pair_of",
    "sharegpt_messages_of",
    "text_of",
    "value_of",
]

Columns = Mapping[str, object]

_SHAREGPT_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
_SHAREGPT_ROLES |= {"user": "user", "assistant": "assistant", "observation": "tool", "function_call": "assistant"}


def value_of(row: Columns, field: str) -> object:
    """Return the field's value; raises `RowError` where the row has no such column."""
    if field not in row:
        raise RowError(field, "missing column")
    return row[field]


def text_of(value: object, field: str) -> str:
    """Return the value if it is text that UTF-8 can hold, else raise `RowError`."""
    if not isinstance(value, str):
        raise RowError(field, "wrong type (text is needed)", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(field, "not valid Unicode", value[error.start : error.end]) from None
    return str(value)  # of a CSV cell too


def messages_of(value: object, field: str) -> tuple[Message, ...]:
    """Return a prompt as messages: text is one user message, empty text or an empty list no messages."""
    if isinstance(value, str):
        return (Message("user", text_of(value, field)),) if value else ()
    if not isinstance(value, list):
        raise RowError(field, "wrong type (text or a list of messages is needed)", value)
    return tuple(_message(item, field) for item in value)


def _message(item: object, field: str) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise RowError(field, "not a message with role and content", item)
    role = item["role"]
    if role not in get_args(Role):
        raise RowError(field, "unknown role", role)
    return Message(cast(Role, role), text_of(item["content"], field))


def sharegpt_messages_of(value: object, field: str) -> tuple[Message, ...]:
    """Return ShareGPT turns, a list of `{from, value}`, as messages; raises `RowError`."""
    if not isinstance(value, list):
        raise RowError(field, "wrong type (a list of turns is needed)", value)
    turns = []
    for item in value:
        if not isinstance(item, dict) or not {"from", "value"} <= item.keys():
            raise RowError(field, "not a turn with from and value", item)
        role = _SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
        if role is None:
            raise RowError(field, "unknown role", item["from"])
        turns.append(Message(role, text_of(item["value"], field)))
    return tuple(turns)


def label_of(row: Columns, field: str) -> float | None:
    """Return a safety label in [0, 1], `None` where it is absent or null; raises `RowError` for anything else.

    In CSV, where everything is text, `true`, `false` and numbers are labels; an empty cell counts as absent.
    """
    value = cell_value(row.get(field))
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise RowError(field, "wrong type (true, false, a number or null is needed)", value)
    if not 0 <= value <= 1:  # also refuses NaN
        raise RowError(field, "label outside [0, 1]", value)
    return float(value)


def cell_value(value: object) -> object:
    """Return a CSV cell as true, false, a number, or `None` if it is empty; any other value unchanged."""
    if not isinstance(value, CellText):
        return value
    word = value.strip().lower()
    if word in ("true", "false", ""):
        return None if not word else word == "true"
    try:
        return float(word)
    except ValueError:
        return value


def choice_of(row: Columns, field: str, allowed: tuple[int, int]) -> int:
    """Return which of two numbers the field names; raises `RowError` for anything else."""
    value = value_of(row, field)
    number = cell_value(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number not in allowed:
        raise RowError(field, f"neither {allowed[0]} nor {allowed[1]}", value)
    return int(number)


def optional_text(row: Columns, field: str) -> str:
    """Return a field of text or a whole number as text, empty where it is absent or null; raises `RowError`."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return "" if value is None else text_of(value, field)


def id_of(row: Columns) -> str:
    """Return the row's own id as text, empty where it has none; raises `RowError` for another type."""
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("id", "wrong type (text or a whole number is needed)", value)
    return text_of(str(value), "id")


def pair_of(
    row: Columns,
    prompt: tuple[Message, ...],
    chosen: str,
    rejected: str,
    labels: tuple[float | None, float | None],
    fields: tuple[str, str] = ("chosen", "rejected"),
) -> Pair:
    """Return the pair after the checks common to all layouts; without an id it gets one from its content."""
    for field, text in zip(fields, (chosen, rejected), strict=True):
        if not text.strip():
            raise RowError(field, "empty completion", text)
    if chosen.strip() == rejected.strip():
        raise RowError(" = ".join(fields), "identical completions", chosen)
    source = row.get("source")
    content = [[[message.role, message.content] for message in prompt], chosen, rejected, *labels]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return Pair(
        id=id_of(row) or digest[:16],
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_is_safe=labels[0],
        rejected_is_safe=labels[1],
        source="" if source is None else text_of(source, "source"),
    )


def completion_of(
    row: Columns,
    prompt: tuple[Message, ...],
    text: str,
    field: str,
    *,
    kind: str = "",
    is_safe: float | None = None,
    allow_empty: bool = False,
) -> Completion:
    """Return the completion after the checks common to all layouts; `id`, `model`, `finished` are the row's."""
    if not allow_empty and not text.strip():
        raise RowError(field, "empty completion", text)
    finished = cell_value(row.get("finished", True))
    if not isinstance(finished, bool):
        raise RowError("finished", "wrong type (true or false is needed)", finished)
    name = optional_text(row, "id") or content_id((*prompt, Message("assistant", text)))
    return Completion(name, prompt, text, optional_text(row, "model"), kind, finished, is_safe)


def content_id(messages: Sequence[Message]) -> str:
    """Return an id made from messages: 16 hex digits of a hash."""
    content = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
