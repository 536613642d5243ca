"""One field of a row: text, messages, labels and ids as they are on disk, or the reason why it is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast, get_args

from bfpo.data.rows import RowError
from bfpo.schema import Message, Pair, Role

__all__ = ["Columns", "id_of", "label_of", "messages_of", "pair_of", "text_of", "value_of"]

Columns = Mapping[str, object]


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
    return value


def messages_of(value: object, field: str) -> tuple[Message, ...]:
    """Return a prompt as messages: text is one user message, empty text or an empty list is no message."""
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


def label_of(row: Columns, field: str) -> float | None:
    """Return a safety label in [0, 1], `None` where it is absent or null; raises `RowError` for anything else."""
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise RowError(field, "wrong type (true, false, a number or null is needed)", value)
    if not 0 <= value <= 1:  # NaN is not either
        raise RowError(field, "label outside [0, 1]", value)
    return float(value)


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
    """Return the pair, checked for what every layout has in common; without an id it gets one from its content."""
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
