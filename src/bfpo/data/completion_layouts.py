"""Layouts of single completions: one pure function row -> Completion each, registered by name."""

from __future__ import annotations

from bfpo.core.schema import Completion, Message
from bfpo.data.fields import (
    CONTEXT,
    DESIRABLE,
    REASONING,
    WEIGHT,
    Columns,
    completion_of,
    instruction_of,
    is_unknown,
    label_of,
    optional_text,
    value_of,
)
from bfpo.data.layouts import Layouts
from bfpo.data.messages import answer_of, check_weight, messages_of
from bfpo.data.rejects import RowError

__all__ = ["COMPLETION_LAYOUTS", "plain_completion"]

COMPLETION_LAYOUTS: Layouts[Completion] = Layouts(
    reads=("id", "model", "category", "finished", *DESIRABLE, WEIGHT, *REASONING, *CONTEXT)
)

_HARM_LABELS = {"harmful": 0.0, "unharmful": 1.0}
_PROMPT_KINDS = {"harmful": "harmful", "unharmful": "benign"}


@COMPLETION_LAYOUTS.register(
    "completions",
    "prompt with completion or text, or messages whose last is the assistant's",
    needs=("prompt", "completion"),
    reads=("text", "messages", "kind", "blocked"),
    labels=("is_safe",),
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
        field = "messages"
        prompt, answer = _without_answer(row["messages"], field)
    else:
        field = "completion" if "completion" in row else "text"
        if "prompt" not in row or field not in row:
            raise RowError("prompt, completion (or messages)", "missing column", sorted(map(str, row)))
        prompt, answer = messages_of(row["prompt"], "prompt"), answer_of(row[field], field)
    kind, is_safe = optional_text(row, "kind"), label_of(row, "is_safe")
    return completion_of(row, prompt, answer, field, kind=kind, is_safe=is_safe, allow_empty=allow_empty)


@COMPLETION_LAYOUTS.register(
    "alpaca",
    "Alpaca: instruction (and input, history) and output",
    needs=("instruction", "output"),
    reads=("input",),
    labels=("is_safe",),
    fits=lambda row: (
        {"instruction", "output"} <= row.keys() and "prompt" not in row and not isinstance(row["output"], list)
    ),
    order=1,
)
def alpaca_completion(row: Columns) -> Completion:
    """Alpaca's columns: `output` answers `instruction`, with `input` below it where there is one."""
    answer = answer_of(value_of(row, "output"), "output")
    return completion_of(row, instruction_of(row), answer, "output", is_safe=label_of(row, "is_safe"))


@COMPLETION_LAYOUTS.register(
    "conversations",
    "ShareGPT: conversations as turns of {from, value}, the last of which is learnt",
    needs=("conversations",),
    labels=("is_safe",),
    fits=lambda row: "conversations" in row and "chosen" not in row,
    order=2,
)
def sharegpt_completion(row: Columns) -> Completion:
    """ShareGPT's `conversations`, turns of `{from, value}`: the last is the assistant's and the completion."""
    prompt, answer = _without_answer(value_of(row, "conversations"), "conversations")
    return completion_of(row, prompt, answer, "conversations", is_safe=label_of(row, "is_safe"))


@COMPLETION_LAYOUTS.register(
    "beavertails",
    "BeaverTails: prompt, response and whether it is safe",
    needs=("prompt", "response", "is_safe"),
    labels=("is_safe",),
    order=1,
    labelled=True,
)
def beavertails_completion(row: Columns) -> Completion:
    """BeaverTails' questions and answers, each with `is_safe`; rows of one prompt are not pairs: none is preferred."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    answer = answer_of(value_of(row, "response"), "response")
    return completion_of(row, prompt, answer, "response", is_safe=label_of(row, "is_safe"))


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
    return completion_of(row, prompt, answer_of(response, "response"), "response", kind=kind, is_safe=is_safe)


def _harm_label(value: object) -> float | None:
    if is_unknown(value):
        return None
    if not isinstance(value, str) or value not in _HARM_LABELS:
        raise RowError("response_harm_label", "neither harmful nor unharmful", value)
    return _HARM_LABELS[value]


def _without_answer(value: object, field: str) -> tuple[tuple[Message, ...], Message]:
    """Return a conversation as the prompt and the assistant's last message."""
    if not isinstance(value, list):
        raise RowError(field, "wrong type (a list of messages is needed)", value)
    turns = messages_of(value, field)
    if not turns or turns[-1].role != "assistant":
        raise RowError(field, "the last message is not the assistant's", turns[-1].role if turns else None)
    check_weight(value[-1], field)
    return turns[:-1], turns[-1]
