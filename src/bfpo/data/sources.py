"""Layouts of preference files: one pure function per layout, row -> Pair, and the table of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from bfpo.data.rows import RowError
from bfpo.schema import Message, Pair, Role

__all__ = ["LAYOUTS", "Layout", "detect_layout", "messages_of", "text_of"]

Columns = Mapping[str, object]
_LABELS = ("chosen_is_safe", "rejected_is_safe")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to write pairs in columns: what it needs, what else it reads, and its function row -> Pair.

    `fits` decides from the columns alone (and whether a completion is text or a conversation), never from what the
    values say. `to_pair` raises `RowError`.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    fits: Callable[[Columns], bool]
    to_pair: Callable[[Columns], Pair]


def detect_layout(columns: Columns) -> Layout | None:
    """Return the first layout that fits these columns, `None` where none does."""
    return next((layout for layout in LAYOUTS.values() if layout.fits(columns)), None)


# ---------------------------------------------------------------------------------------------------- one field


def _value(row: Columns, field: str) -> object:
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


def _label(row: Columns, field: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        raise RowError(field, "wrong type (true, false, a number or null is needed)", value)
    if not 0 <= value <= 1:  # NaN is not either
        raise RowError(field, "label outside [0, 1]", value)
    return float(value)


def _id(row: Columns) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("id", "wrong type (text or a whole number is needed)", value)
    return text_of(str(value), "id")


def _pair(
    row: Columns,
    prompt: tuple[Message, ...],
    chosen: str,
    rejected: str,
    labels: tuple[float | None, float | None],
    fields: tuple[str, str] = ("chosen", "rejected"),
) -> Pair:
    """Check what every layout has in common and give a row without an id one from its content."""
    for field, text in zip(fields, (chosen, rejected), strict=True):
        if not text.strip():
            raise RowError(field, "empty completion", text)
    if chosen.strip() == rejected.strip():
        raise RowError(" = ".join(fields), "identical completions", chosen)
    source = row.get("source")
    content = [[[message.role, message.content] for message in prompt], chosen, rejected, *labels]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return Pair(
        id=_id(row) or digest[:16],
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_is_safe=labels[0],
        rejected_is_safe=labels[1],
        source="" if source is None else text_of(source, "source"),
    )


# ------------------------------------------------------------------------------------------------------ layouts


def bfpo_pair(row: Columns) -> Pair:
    """Our columns: plain completions and both labels, which may be null but not absent."""
    for field in _LABELS:
        _value(row, field)
    prompt = messages_of(_value(row, "prompt"), "prompt")
    chosen, rejected = (text_of(_value(row, field), field) for field in ("chosen", "rejected"))
    return _pair(row, prompt, chosen, rejected, (_label(row, _LABELS[0]), _label(row, _LABELS[1])))


def trl_pair(row: Columns) -> Pair:
    """TRL's columns: plain text, or conversations whose prompt is given apart or is their common beginning."""
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    labels = (_label(row, _LABELS[0]), _label(row, _LABELS[1]))
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        prompt = messages_of(_value(row, "prompt"), "prompt")
        return _pair(row, prompt, text_of(chosen, "chosen"), text_of(rejected, "rejected"), labels)
    conversations = []
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, list):
            raise RowError(field, "wrong type (a list of messages, as for the other completion, is needed)", value)
        conversations.append(messages_of(value, field))
    given = row.get("prompt")
    explicit = () if given is None else messages_of(given, "prompt")
    if isinstance(given, list) and not all(turns[: len(explicit)] == explicit for turns in conversations):
        endings = conversations
    else:
        # Some files give the prompt as text beside conversations that already hold it: then the conversations count.
        shared = _common_beginning(*conversations)
        explicit = conversations[0][:shared] or explicit
        endings = [turns[shared:] for turns in conversations]
    texts = [_only_answer(turns, field) for turns, field in zip(endings, ("chosen", "rejected"), strict=True)]
    return _pair(row, explicit, texts[0], texts[1], labels)


def _common_beginning(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Count the messages that two conversations share; the last of each is a completion and never counts."""
    limit = max(min(len(one), len(other)) - 1, 0)
    return next((i for i in range(limit) if one[i] != other[i]), limit)


def _only_answer(turns: Sequence[Message], field: str) -> str:
    if len(turns) != 1:
        raise RowError(field, "not exactly one message after the shared prompt", [message.role for message in turns])
    if turns[0].role != "assistant":
        raise RowError(field, "the completion is not the assistant's", turns[0].role)
    return turns[0].content


def pku_pair(row: Columns) -> Pair:
    """PKU-SafeRLHF's columns: `better_response_id` orders by helpfulness, `is_response_k_safe` are the labels."""
    prompt = messages_of(_value(row, "prompt"), "prompt")
    responses = [text_of(_value(row, f"response_{k}"), f"response_{k}") for k in (0, 1)]
    labels = [_label(row, f"is_response_{k}_safe") for k in (0, 1)]
    better = _value(row, "better_response_id")
    if isinstance(better, bool) or better not in (0, 1):
        raise RowError("better_response_id", "neither 0 nor 1", better)
    first = int(better)
    second = 1 - first
    fields = (f"response_{first}", f"response_{second}")
    return _pair(row, prompt, responses[first], responses[second], (labels[first], labels[second]), fields)


def hh_pair(row: Columns) -> Pair:
    """HH-RLHF's transcripts: the last assistant turn of each is the completion, what precedes must be the same."""
    turns = {field: _transcript(text_of(_value(row, field), field), field) for field in ("chosen", "rejected")}
    for field, messages in turns.items():
        if messages[-1].role != "assistant":
            raise RowError(field, "the transcript does not end with the assistant", messages[-1].role)
    prompt = turns["chosen"][:-1]
    if prompt != turns["rejected"][:-1]:
        raise RowError("chosen, rejected", "the two transcripts do not share their prompt", len(prompt))
    labels = (_label(row, _LABELS[0]), _label(row, _LABELS[1]))
    return _pair(row, prompt, turns["chosen"][-1].content, turns["rejected"][-1].content, labels)


def _transcript(text: str, field: str) -> tuple[Message, ...]:
    before, *rest = _TURN.split("\n\n" + text.lstrip())
    if before or not rest:
        raise RowError(field, "not a transcript of Human: and Assistant: turns", text[:60])
    return tuple(Message(_HH_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True))


def _is_conversation(row: Columns) -> bool:
    return isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list)


_PKU_NEEDS = ("prompt", "response_0", "response_1", "better_response_id")
_OURS = ("prompt", "chosen", "rejected", *_LABELS)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="pku",
            summary="PKU-SafeRLHF: two responses, the id of the more helpful one, a safety label for each",
            needs=_PKU_NEEDS,
            reads=("is_response_0_safe", "is_response_1_safe", "id", "source"),
            fits=lambda row: row.keys() >= set(_PKU_NEEDS),
            to_pair=pku_pair,
        ),
        Layout(
            name="bfpo",
            summary="our columns: prompt (text or messages), two plain completions, two labels (null = unknown)",
            needs=_OURS,
            reads=("id", "source"),
            fits=lambda row: row.keys() >= set(_OURS) and not _is_conversation(row),
            to_pair=bfpo_pair,
        ),
        Layout(
            name="trl",
            summary="TRL: prompt, chosen, rejected as text, or conversations (the prompt may be their beginning)",
            needs=("chosen", "rejected"),
            reads=("prompt", *_LABELS, "id", "source"),
            fits=lambda row: row.keys() >= {"chosen", "rejected"} and ("prompt" in row or _is_conversation(row)),
            to_pair=trl_pair,
        ),
        Layout(
            name="hh",
            summary="HH-RLHF: chosen and rejected as whole transcripts of Human: and Assistant: turns, no prompt",
            needs=("chosen", "rejected"),
            reads=(*_LABELS, "id", "source"),
            fits=lambda row: row.keys() >= {"chosen", "rejected"} and "prompt" not in row,
            to_pair=hh_pair,
        ),
    )
}
