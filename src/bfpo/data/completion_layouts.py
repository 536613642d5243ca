"""Layouts of single completions: one pure function row -> Completion each, registered by name."""

from __future__ import annotations

from dataclasses import replace

from bfpo.core.schema import Completion, Message
from bfpo.data.fields import (
    Columns,
    completion_of,
    label_of,
    messages_of,
    optional_text,
    sharegpt_messages_of,
    text_of,
    value_of,
)
from bfpo.data.layouts import Layouts
from bfpo.data.rejects import RowError

__all__ = ["COMPLETION_LAYOUTS", "plain_completion"]

COMPLETION_LAYOUTS: Layouts[Completion] = Layouts(reads=("id",))

_HARM_LABELS = {"harmful": 0.0, "unharmful": 1.0}
_PROMPT_KINDS = {"harmful": "harmful", "unharmful": "benign"}


@COMPLETION_LAYOUTS.register(
    "completions",
    "prompt with completion or text, or messages whose last is the assistant's",
    needs=("prompt", "completion"),
    reads=("text", "messages", "model", "kind", "finished", "is_safe"),
    fits=lambda row: (
        "messages" in row or "completion" in row or ({"prompt", "text"} <= row.keys() and "chosen" not in row)
    ),
)
def our_completion(row: Columns) -> Completion:
    """Our columns: `prompt` with `completion` or `text`, or `messages` of which the last is the assistant's."""
    return plain_completion(row)


def plain_completion(row: Columns, *, allow_empty: bool = False) -> Completion:
    """Return the completion of a row in our columns; `allow_empty` for what `write_completions` wrote."""
    if "messages" in row:
        turns, field = messages_of(row["messages"], "messages"), "messages"
        prompt, text = _without_answer(turns, field)
    else:
        field = "completion" if "completion" in row else "text"
        if "prompt" not in row or field not in row:
            raise RowError("prompt, completion (or messages)", "missing column", sorted(map(str, row)))
        prompt, text = messages_of(row["prompt"], "prompt"), text_of(row[field], field)
    kind, is_safe = optional_text(row, "kind"), label_of(row, "is_safe")
    made = completion_of(row, prompt, text, field, kind=kind, is_safe=is_safe, allow_empty=allow_empty)
    return replace(made, blocked=optional_text(row, "blocked")) if allow_empty else made


@COMPLETION_LAYOUTS.register(
    "conversations",
    "ShareGPT: conversations as turns of {from, value}, the last of which is learnt",
    needs=("conversations",),
    reads=("system",),
    fits=lambda row: "conversations" in row and "chosen" not in row,
    order=2,
)
def sharegpt_completion(row: Columns) -> Completion:
    """ShareGPT's `conversations`, turns of `{from, value}`: the last is the assistant's and the completion."""
    turns = sharegpt_messages_of(value_of(row, "conversations"), "conversations")
    system = optional_text(row, "system")
    prompt, text = _without_answer((Message("system", system), *turns) if system else turns, "conversations")
    return completion_of(row, prompt, text, "conversations")


@COMPLETION_LAYOUTS.register(
    "beavertails",
    "BeaverTails: prompt, response and whether it is safe",
    needs=("prompt", "response", "is_safe"),
    order=1,
    labelled=True,
)
def beavertails_completion(row: Columns) -> Completion:
    """BeaverTails' questions and answers, each with `is_safe`; rows of one prompt are not pairs: none is preferred."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    text = text_of(value_of(row, "response"), "response")
    return completion_of(row, prompt, text, "response", is_safe=label_of(row, "is_safe"))


@COMPLETION_LAYOUTS.register(
    "wildguardmix",
    "WildGuardMix: prompt, response and whether the response is harmful",
    needs=("prompt", "response", "response_harm_label"),
    reads=("prompt_harm_label",),
    labelled=True,
)
def wildguardmix_completion(row: Columns) -> Completion:
    """WildGuardMix: `response_harm_label` gives the label, `prompt_harm_label` the kind; some rows have no response."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    response = value_of(row, "response")
    if response is None:
        raise RowError("response", "a prompt without a response", response)
    kind = _PROMPT_KINDS.get(optional_text(row, "prompt_harm_label"), "")
    is_safe = _harm_label(row.get("response_harm_label"))
    return completion_of(row, prompt, text_of(response, "response"), "response", kind=kind, is_safe=is_safe)


def _harm_label(value: object) -> float | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in _HARM_LABELS:
        raise RowError("response_harm_label", "neither harmful nor unharmful", value)
    return _HARM_LABELS[value]


def _without_answer(turns: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], str]:
    if not turns or turns[-1].role != "assistant":
        raise RowError(field, "the last message is not the assistant's", turns[-1].role if turns else None)
    return turns[:-1], turns[-1].content
