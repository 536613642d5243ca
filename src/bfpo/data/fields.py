"""Fields of a row: labels, ids and what surrounds the texts, and the records made of them."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bfpo.core.schema import Completion, Message, Pair, Prompt, from_canonical
from bfpo.data.messages import (
    MEDIA,
    check_no_media,
    check_weight,
    ends_with_assistant,
    is_absent,
    messages_of,
    text_of,
    tools_of,
)
from bfpo.data.rejects import EMPTY, CellText, RowError

__all__ = [
    "CONTEXT",
    "DESIRABLE",
    "FINISHED",
    "REASONING",
    "WEIGHT",
    "ColumnNames",
    "Columns",
    "category_of",
    "cell_value",
    "choice_of",
    "completion_of",
    "content_id",
    "instruction_of",
    "is_unknown",
    "label_of",
    "marked_of",
    "optional_text",
    "pair_of",
    "prompt_of",
    "value_of",
]

Columns = Mapping[str, object]
ColumnNames = Mapping[str, str | None]
"""Our column name -> the file's name for it, `None` for a column that is not taken from the file."""

CONTEXT = ("system", "system_prompt", "history", "tools", "chat_template_kwargs", *MEDIA)
"""Columns that every layout reads: what stands before the prompt, and what cannot be read."""
DESIRABLE = ("label", "kto_tag")
"""Columns of KTO data sets, in TRL and in LLaMA-Factory: whether an answer is desirable."""
_MISSING = ("nan", "none", "null")  # a missing value as text
_UNDESIRABLE = ("false", "0", "0.0")
FINISHED = ("chosen_finished", "rejected_finished")
"""Columns of a pair: whether the model ended the text itself; absent or null means that it did."""
WEIGHT = "weight"
REASONING = ("reasoning", "reasoning_content", "thinking")
"""Columns of a completion's thoughts, the first that is there."""


def value_of(row: Columns, field: str) -> object:
    """Return the field's value; raises `RowError` where the row has no such column."""
    if field not in row:
        raise RowError(field, "missing column")
    return row[field]


def label_of(row: Columns, field: str) -> float | None:
    """Return a safety label in [0, 1], `None` where it is absent, null, NaN or empty; raises `RowError` otherwise.

    In CSV, where everything is text, `true`, `false` and numbers are labels.
    """
    value = cell_value(row.get(field))
    if is_unknown(value):
        return None
    if not isinstance(value, (bool, int, float)):
        reason = "not a label (true, false, a number in [0, 1] or null; safe_values and unsafe_values name others)"
        raise RowError(field, reason, value)
    if not 0 <= value <= 1:
        raise RowError(field, "label outside [0, 1]", value)
    return float(value)


def is_unknown(value: object) -> bool:
    """Return whether a label's value says that it is unknown: null, NaN, or an empty text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", *_MISSING)
    return value is None or (isinstance(value, float) and math.isnan(value))


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
    value = _whole_number(_given(row, field))
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return "" if is_absent(value) else text_of(value, field)


def _given(row: Columns, field: str) -> object:
    """Return an optional field's value, `None` for a CSV cell in which a missing value was written as text."""
    value = row.get(field)
    return None if isinstance(value, CellText) and value.strip().lower() in _MISSING else value


def category_of(row: Columns, field: str) -> str:
    """Return a field of text, a whole number or a list of texts as the name of a category, else "": it groups only."""
    if (value := _whole_number(_listed_or_marked(row.get(field)))) is None:
        return ""
    texts = value if isinstance(value, list) else [str(value) if isinstance(value, int) else value]
    named = [text_of(text, field) for text in texts if isinstance(text, str) and not isinstance(value, bool)]
    return ", ".join(text.strip() for text in named)


def _category_of_answer(row: Columns) -> str:
    """Return `category` as `category_of` does, and of marks, which judge an answer and not its prompt, the first."""
    marks = _listed_or_marked(row.get("category"))
    return _first_marked(marks) if isinstance(marks, dict) else category_of(row, "category")


def _listed_or_marked(value: object) -> object:
    """Return the list or object that a CSV cell is as JSON or as Python prints it, any other value unchanged."""
    if not isinstance(value, CellText) or not value.lstrip().startswith(("[", "{")):
        return value
    return found if isinstance(found := _printed(value), (list, dict)) else value


def marked_of(row: Columns, field: str) -> str:
    """Return the first name that a field of names and marks, as in PKU's data sets, marks true, "" for none.

    The cell of a CSV file is JSON, or what Python prints; raises `RowError` for another text in it.
    """
    marks = row.get(field)
    if isinstance(marks, CellText) and marks.strip():
        marks = _printed(marks)
        if not isinstance(marks, dict):
            raise RowError(field, "not names and marks, such as {'Violence': True}", row[field])
    return _first_marked(marks) if isinstance(marks, dict) else ""


def _first_marked(marks: Mapping[str, object]) -> str:
    return next((str(name) for name, marked in marks.items() if marked is True), "")


def _printed(cell: str) -> object:
    """Return the value that a text is as JSON or as Python prints it, `None` for another text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            found: object = read(cell)
            return found
    return None


def _whole_number(value: object) -> object:
    """Return a float that is a whole number as one: a column of numbers in which some are missing holds floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def id_of(row: Columns) -> str:
    """Return the row's own id as text, empty where it has none; raises `RowError` for another type."""
    value = _whole_number(row.get("id"))
    if is_absent(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError("id", "wrong type (text or a whole number is needed)", value)
    return text_of(str(value), "id")


def pair_of(
    row: Columns,
    prompt: tuple[Message, ...],
    chosen: str | Message,
    rejected: str | Message,
    labels: tuple[float | None, float | None],
    fields: tuple[str, str] = ("chosen", "rejected"),
    category: str = "",
) -> Pair:
    """Return the pair after the checks common to all layouts; without an id it gets one from its content."""
    prompt, tools = _with_context(row, prompt)
    _check_row_weight(row)
    chosen, rejected = _as_answer(chosen), _as_answer(rejected)
    for field, answer in zip(fields, (chosen, rejected), strict=True):
        _check_answer(answer, field)
    _check_not_in_prompt(prompt, (chosen, rejected), fields)
    if chosen.content.strip() == rejected.content.strip() and chosen.extra == rejected.extra:
        raise RowError(" = ".join(fields), "identical completions", chosen.content)
    source = row.get("source")
    content: list[object] = [_parts_of(prompt), chosen.content, rejected.content, *labels]
    content += [text for text in (chosen.extra, rejected.extra, tools) if text]
    finished = [_finished(row, field) for field in FINISHED]
    content += [] if all(finished) else finished
    return Pair(
        id=id_of(row) or _short_hash(content),
        prompt=prompt,
        chosen=chosen.content,
        rejected=rejected.content,
        chosen_is_safe=labels[0],
        rejected_is_safe=labels[1],
        source="" if is_absent(source) else text_of(source, "source"),
        tools=tools,
        chosen_extra=chosen.extra,
        rejected_extra=rejected.extra,
        chosen_finished=finished[0],
        rejected_finished=finished[1],
        category=category or _category_of_answer(row),
    )


def _check_not_in_prompt(prompt: Sequence[Message], answers: Sequence[Message], fields: Sequence[str]) -> None:
    """Raise `RowError` where the prompt is a whole conversation, which ends with one of the answers."""
    if not ends_with_assistant(prompt):
        return
    for field, answer in zip(fields, answers, strict=True):
        if prompt[-1].content.strip() == answer.content.strip() and prompt[-1].extra == answer.extra:
            raise RowError(field, "the prompt ends with this completion", answer.content)


def _finished(row: Columns, field: str) -> bool:
    if (value := row.get(field)) is None:
        return True
    value = cell_value(value)
    if not is_absent(value) and not isinstance(value, bool):
        raise RowError(field, "wrong type (true or false is needed)", value)
    return value is not False


def completion_of(
    row: Columns,
    prompt: tuple[Message, ...],
    answer: str | Message,
    field: str,
    *,
    kind: str = "",
    is_safe: float | None = None,
    category: str = "",
    allow_empty: bool = False,
    may_be_undesirable: bool = False,
) -> Completion:
    """Return the completion after the checks common to all layouts; `id`, `model`, `finished` are the row's."""
    prompt, tools = _with_context(row, prompt)
    _check_row_weight(row)
    for name in () if may_be_undesirable else DESIRABLE:
        if str(row.get(name)).strip().lower() in _UNDESIRABLE:  # in JSON, too, some files hold it as text
            reason = f"the completion is marked as undesirable (columns: {{{name}: null}} takes it all the same)"
            raise RowError(name, reason, row[name])
    answer = _as_answer(answer)
    if not allow_empty:
        _check_answer(answer, field)
    name = optional_text(row, "id") or content_id((*prompt, answer), tools)
    return Completion(
        name,
        prompt,
        answer.content,
        optional_text(row, "model"),
        kind,
        _finished(row, "finished"),
        is_safe,
        reasoning=next(
            (text_of(text, name) for name in REASONING if isinstance(text := _given(row, name), str) and text.strip()),
            "",
        ),
        blocked=blocked if isinstance(blocked := row.get("blocked"), str) and not answer.content else "",
        tools=tools,
        extra=answer.extra,
        category=category or _category_of_answer(row),
    )


def prompt_of(row: Columns, name: str, messages: Sequence[Message], kind: str, category: str = "") -> Prompt:
    """Return the prompt with what the row says beside its text, as in all layouts."""
    prompt, tools = _with_context(row, tuple(messages))
    return Prompt(name, prompt, kind, tools, category)


def instruction_of(row: Columns) -> tuple[Message, ...]:
    """Return Alpaca's prompt: the instruction, and on the next line the input where there is one."""
    parts = [text_of(value_of(row, "instruction"), "instruction"), optional_text(row, "input")]
    return messages_of("\n".join(part for part in parts if part.strip()), "instruction")


def content_id(messages: Sequence[Message], tools: str = "") -> str:
    """Return an id made from messages: 16 hex digits of a hash."""
    return _short_hash([*_parts_of(messages), *([tools] if tools else [])])


_TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


def _short_hash(content: list[object]) -> str:
    return hashlib.sha256(_TO_JSON(content).encode()).hexdigest()[:16]


def _parts_of(messages: Sequence[Message]) -> list[list[str]]:
    """Return what identifies messages."""
    return [[message.role, message.content, *([message.extra] if message.extra else [])] for message in messages]


def _as_answer(answer: str | Message) -> Message:
    return Message("assistant", answer) if isinstance(answer, str) else answer


def _check_answer(answer: Message, field: str) -> None:
    if not answer.content.strip() and not (answer.extra and "tool_calls" in from_canonical(answer.extra)):
        raise RowError(field, EMPTY, answer.content)


def _check_row_weight(row: Columns) -> None:
    if WEIGHT in row:
        check_weight({WEIGHT: cell_value(row[WEIGHT])}, WEIGHT)


# -------------------------------------------------------------------------------------- what stands beside a prompt


def _with_context(row: Columns, prompt: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """Return the prompt after the row's system message and history, and the row's tools. Raises `RowError`."""
    if row.keys().isdisjoint(CONTEXT):
        return prompt, ""
    check_no_media(row)
    if not is_absent(row.get("chat_template_kwargs")):
        reason = "not read from rows (columns: {chat_template_kwargs: null} leaves it out)"
        raise RowError("chat_template_kwargs", reason, row["chat_template_kwargs"])
    prompt = (*_history(row, prompt), *prompt)
    for field in ("system", "system_prompt"):
        value = _given(row, field)
        if is_absent(value):
            continue
        system = text_of(value, field)
        if prompt and prompt[0].role == "system":
            if prompt[0].content.strip() != system.strip():
                raise RowError(field, "differs from the system message of the conversation", value)
        elif system.strip():
            prompt = (Message("system", system), *prompt)
    return prompt, tools_of(_given(row, "tools"))


def _history(row: Columns, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return earlier turns of Alpaca's `history`: a list of question and answer, or of messages."""
    value = _given(row, "history")
    if isinstance(value, CellText):
        value = _listed(value)
    if is_absent(value):
        return ()
    if not isinstance(value, list):
        raise RowError("history", "wrong type (a list of [question, answer] is needed)", value)
    if len(prompt) != 1 or prompt[0].role != "user":
        raise RowError("history", "stands beside a conversation, which would hold it", [turn.role for turn in prompt])
    if all(isinstance(turn, dict) for turn in value):
        return messages_of(value, "history")
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("history", "wrong type (a list of [question, answer] is needed)", turn)
        turns += [Message("user", text_of(turn[0], "history")), Message("assistant", text_of(turn[1], "history"))]
    return tuple(turns)


def _listed(cell: CellText) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None if not cell.strip() else str(cell)
