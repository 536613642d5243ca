"""Layouts of single completions: one pure function per layout, row -> Completion, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from bfpo.data.rejects import RowError

__all__ = ["COMPLETION_LAYOUTS", "CompletionLayout", "detect_completion_layout", "plain_completion"]

_HARM_LABELS = {"harmful": 0.0, "unharmful": 1.0}
_PROMPT_KINDS = {"harmful": "harmful", "unharmful": "benign"}


@dataclass(frozen=True, slots=True)
class CompletionLayout:
    """A way to write completions in columns, as `Layout` is of pairs; `labelled` ones say whether each is safe."""

    name: str
    summary: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    labelled: bool
    fits: Callable[[Columns], bool]
    to_completion: Callable[[Columns], Completion]


def detect_completion_layout(columns: Columns) -> CompletionLayout | None:
    """Return the first layout that fits these columns, `None` where none does."""
    return next((layout for layout in COMPLETION_LAYOUTS.values() if layout.fits(columns)), None)


def plain_completion(row: Columns, *, allow_empty: bool = False) -> Completion:
    """Our columns: `prompt` with `completion` or `text`, or `messages` of which the last is the assistant's."""
    if "messages" in row:
        turns, field = messages_of(row["messages"], "messages"), "messages"
        prompt, text = _without_answer(turns, field)
    else:
        field = "completion" if "completion" in row else "text"
        if "prompt" not in row or field not in row:
            raise RowError("prompt, completion (or messages)", "missing column", sorted(map(str, row)))
        prompt, text = messages_of(row["prompt"], "prompt"), text_of(row[field], field)
    kind, is_safe = optional_text(row, "kind"), label_of(row, "is_safe")
    return completion_of(row, prompt, text, field, kind=kind, is_safe=is_safe, allow_empty=allow_empty)


def sharegpt_completion(row: Columns) -> Completion:
    """ShareGPT's `conversations`, turns of `{from, value}`: the last is the assistant's and the completion."""
    turns = sharegpt_messages_of(value_of(row, "conversations"), "conversations")
    system = optional_text(row, "system")
    prompt, text = _without_answer((Message("system", system), *turns) if system else turns, "conversations")
    return completion_of(row, prompt, text, "conversations")


def beavertails_completion(row: Columns) -> Completion:
    """BeaverTails' questions and answers, each with `is_safe`; rows of one prompt are no pair, as none is better."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    text = text_of(value_of(row, "response"), "response")
    return completion_of(row, prompt, text, "response", is_safe=label_of(row, "is_safe"))


def wildguardmix_completion(row: Columns) -> Completion:
    """WildGuardMix: `response_harm_label` is the label, the prompt's own its kind; some rows hold no response."""
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


def _is_plain(row: Columns) -> bool:
    return "messages" in row or "completion" in row or ({"prompt", "text"} <= row.keys() and "chosen" not in row)


_WILDGUARD_NEEDS = ("prompt", "response", "response_harm_label")
_BEAVERTAILS_NEEDS = ("prompt", "response", "is_safe")

COMPLETION_LAYOUTS: dict[str, CompletionLayout] = {
    layout.name: layout
    for layout in (
        CompletionLayout(
            name="completions",
            summary="prompt with completion or text, or messages whose last is the assistant's",
            needs=("prompt", "completion"),
            reads=("text", "messages", "id", "model", "kind", "finished", "is_safe"),
            labelled=False,
            fits=_is_plain,
            to_completion=plain_completion,
        ),
        CompletionLayout(
            name="wildguardmix",
            summary="WildGuardMix: prompt, response and whether the response is harmful",
            needs=_WILDGUARD_NEEDS,
            reads=("prompt_harm_label", "id"),
            labelled=True,
            fits=lambda row: row.keys() >= set(_WILDGUARD_NEEDS),
            to_completion=wildguardmix_completion,
        ),
        CompletionLayout(
            name="beavertails",
            summary="BeaverTails: prompt, response and whether it is safe",
            needs=_BEAVERTAILS_NEEDS,
            reads=("id",),
            labelled=True,
            fits=lambda row: row.keys() >= set(_BEAVERTAILS_NEEDS),
            to_completion=beavertails_completion,
        ),
        CompletionLayout(
            name="conversations",
            summary="ShareGPT: conversations as turns of {from, value}, the last of which is learnt",
            needs=("conversations",),
            reads=("system", "id"),
            labelled=False,
            fits=lambda row: "conversations" in row and "chosen" not in row,
            to_completion=sharegpt_completion,
        ),
    )
}
