"""Layouts of preference files: one pure function row -> Pair each, registered by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bfpo.core.schema import Message, Pair, Role
from bfpo.data.fields import (
    CONTEXT,
    DESIRABLE,
    FINISHED,
    REASONING,
    WEIGHT,
    Columns,
    cell_value,
    choice_of,
    completion_of,
    instruction_of,
    label_of,
    marked_of,
    optional_text,
    pair_of,
    value_of,
)
from bfpo.data.layouts import Layouts
from bfpo.data.messages import (
    answer_of,
    check_weight,
    is_parts,
    messages_of,
    text_of,
    transcript_turns,
    turns_with_beginning,
)
from bfpo.data.rejects import CellText, RowError
from bfpo.data.thinking import message_extra

__all__ = ["PAIR_LAYOUTS", "UNPAIRED", "UNPAIRED_LAYOUTS", "transcript_of"]

PAIR_LAYOUTS: Layouts[Pair] = Layouts(reads=("id", "source", "category", WEIGHT, *FINISHED, *CONTEXT))

UNPAIRED = "unpaired"
UNPAIRED_LAYOUTS: Layouts[Pair] = Layouts(reads=("id", "source", WEIGHT, *REASONING, *CONTEXT))
"""Rows of single answers, for pointwise methods: never detected, since such rows also hold texts to imitate."""

_COMPLETIONS, _LABELS = ("chosen", "rejected"), ("chosen_is_safe", "rejected_is_safe")
_OURS = ("prompt", *_COMPLETIONS, *_LABELS)
_PKU_HARMS = ("response_0_harm_category", "response_1_harm_category")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_HELPSTEER_ROLES: dict[str, Role] = {"User": "user", "Assistant": "assistant"}
_NO_PROMPT = "a row without a column prompt needs (columns: {prompt: question} takes it from the column question)"


@PAIR_LAYOUTS.register(
    "bfpo",
    "our columns: prompt (text or messages), two plain completions, two labels (null = unknown)",
    needs=_OURS,
    labels=_LABELS,
    fits=lambda row: row.keys() >= set(_OURS) and not _is_conversation(row),
    order=1,
)
def bfpo_pair(row: Columns) -> Pair:
    """Our columns: plain completions and both labels, which may be null but not absent."""
    for field in _LABELS:
        value_of(row, field)
    return pair_of(row, *_plain_texts(row), (label_of(row, _LABELS[0]), label_of(row, _LABELS[1])))


def _plain_texts(row: Columns) -> tuple[tuple[Message, ...], Message, Message]:
    """Return the prompt and both completions; raises `RowError` where these are transcripts that hold the prompt."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    chosen, rejected = (answer_of(value_of(row, field), field) for field in _COMPLETIONS)
    transcripts = [transcript_turns(answer.content) for answer in (chosen, rejected)]
    if all(len(turns) > 1 and turns[0].role == "user" for turns in transcripts):
        reason = "whole transcripts of Human: and Assistant: turns (columns: {prompt: null} reads the prompt from them)"
        raise RowError("chosen, rejected", reason, chosen.content)
    return prompt, chosen, rejected


@PAIR_LAYOUTS.register(
    "trl",
    "TRL: prompt, chosen, rejected as text, or conversations (the prompt may be their beginning)",
    needs=_COMPLETIONS,
    reads=("prompt",),
    labels=_LABELS,
    fits=lambda row: row.keys() >= set(_COMPLETIONS) and ("prompt" in row or _is_conversation(row)),
    order=1,
)
def trl_pair(row: Columns) -> Pair:
    """TRL's columns: plain text, or conversations whose prompt is given separately or is their common beginning."""
    labels = (label_of(row, _LABELS[0]), label_of(row, _LABELS[1]))
    if not _is_conversation(row):
        return pair_of(row, *_plain_texts(row), labels)
    conversations = []
    for field in _COMPLETIONS:
        value = value_of(row, field)
        if not isinstance(value, list):
            raise RowError(field, "wrong type (a list of messages, as for the other completion, is needed)", value)
        conversations.append(messages_of(value, field))
        check_weight(value[-1] if value else None, field)
    given = row.get("prompt")
    explicit = () if given is None else messages_of(given, "prompt")
    if isinstance(given, list) and not all(turns[: len(explicit)] == explicit for turns in conversations):
        endings = conversations
    else:
        # Some files give the prompt as text and also in the conversations: then the conversations are used. A shared
        # system message alone does not hold it: then the text follows it.
        shared = _common_beginning(*conversations)
        common = conversations[0][:shared]
        is_whole = isinstance(given, list) or any(turn.role == "user" for turn in common)
        explicit = (common or explicit) if is_whole else (*common, *explicit)
        endings = [turns[shared:] for turns in conversations]
    chosen, rejected = (_only_answer(turns, field) for turns, field in zip(endings, _COMPLETIONS, strict=True))
    if given is None and not explicit:
        if "prompt" in row:
            raise RowError("prompt", "null, and chosen and rejected begin with no common message", given)
        raise RowError("chosen, rejected", f"they begin with no common message, which {_NO_PROMPT}", chosen.content)
    return pair_of(row, explicit, chosen, rejected, labels)


def _is_conversation(row: Columns) -> bool:
    return any(isinstance(row.get(field), list) and not is_parts(row[field]) for field in _COMPLETIONS)


def _common_beginning(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Count the messages that two conversations share; the last of each is a completion and never counts."""
    limit = max(min(len(one), len(other)) - 1, 0)
    return next((i for i in range(limit) if one[i] != other[i]), limit)


def _only_answer(turns: Sequence[Message], field: str) -> Message:
    if len(turns) != 1:
        raise RowError(field, "not exactly one message after the shared prompt", [message.role for message in turns])
    if turns[0].role != "assistant":
        raise RowError(field, "the completion is not the assistant's", turns[0].role)
    return turns[0]


@PAIR_LAYOUTS.register(
    "pku",
    "PKU-SafeRLHF: two responses, the id of the more helpful one, a safety label for each",
    needs=("prompt", "response_0", "response_1", "better_response_id"),
    reads=_PKU_HARMS,
    labels=("is_response_0_safe", "is_response_1_safe"),
)
def pku_pair(row: Columns) -> Pair:
    """PKU-SafeRLHF's columns: `better_response_id` orders by helpfulness, `is_response_k_safe` are the labels."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    responses = [answer_of(value_of(row, f"response_{k}"), f"response_{k}") for k in (0, 1)]
    labels = [label_of(row, f"is_response_{k}_safe") for k in (0, 1)]
    first = choice_of(row, "better_response_id", (0, 1))
    second = 1 - first
    fields = (f"response_{first}", f"response_{second}")
    both = (labels[first], labels[second])
    category = marked_of(row, _PKU_HARMS[0]) or marked_of(row, _PKU_HARMS[1])
    return pair_of(row, prompt, responses[first], responses[second], both, fields, category)


@PAIR_LAYOUTS.register(
    "hh",
    "HH-RLHF: chosen and rejected as whole transcripts of Human: and Assistant: turns, no prompt",
    needs=_COMPLETIONS,
    labels=_LABELS,
    fits=lambda row: row.keys() >= set(_COMPLETIONS) and "prompt" not in row,
    order=1,
)
def hh_pair(row: Columns) -> Pair:
    """HH-RLHF's transcripts: the last assistant turn of each is the completion, the turns before must be the same."""
    first, second = (value_of(row, field) for field in _COMPLETIONS)
    chosen = transcript_of(first, "chosen")
    rejected = turns_with_beginning(first, chosen, second) or transcript_of(second, "rejected")
    for field, turns in zip(_COMPLETIONS, (chosen, rejected), strict=True):
        if turns[-1].role != "assistant":
            raise RowError(field, "the transcript does not end with the assistant", turns[-1].role)
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen, rejected", "the two transcripts do not share their prompt", len(chosen) - 1)
    labels = (label_of(row, _LABELS[0]), label_of(row, _LABELS[1]))
    return pair_of(row, chosen[:-1], chosen[-1].content, rejected[-1].content, labels)


def transcript_of(value: object, field: str) -> tuple[Message, ...]:
    """Return the turns of a transcript of `Human:` and `Assistant:`, each after an empty line. Raises `RowError`."""
    text = text_of(value, field) if isinstance(value, str) else ""
    if not (turns := transcript_turns(text)):
        raise RowError(
            field, f"not a transcript of Human: and Assistant: turns, which {_NO_PROMPT}", text[:60] or value
        )
    return turns


@PAIR_LAYOUTS.register(
    "redteam",
    "BFPO's red-team file: two model outputs, the number of the more helpful one, a label for each",
    needs=("prompt", "modeloutput1", "modeloutput2", "better_modelout"),
    labels=("is_modelout1_safe", "is_modelout2_safe"),
)
def redteam_pair(row: Columns) -> Pair:
    """The red-team file of BFPO's authors: `better_modelout` (1 or 2) orders by helpfulness."""
    prompt = messages_of(value_of(row, "prompt"), "prompt")
    texts = {k: answer_of(value_of(row, f"modeloutput{k}"), f"modeloutput{k}") for k in (1, 2)}
    labels = {k: label_of(row, f"is_modelout{k}_safe") for k in (1, 2)}
    better = row.get("better_modelout")
    known = {**row, "better_modelout": CellText(better)} if isinstance(better, str) else row  # a digit as text, too
    first = choice_of(known, "better_modelout", (1, 2))
    second = 3 - first
    fields = (f"modeloutput{first}", f"modeloutput{second}")
    return pair_of(row, prompt, texts[first], texts[second], (labels[first], labels[second]), fields)


@PAIR_LAYOUTS.register(
    "helpsteer2",
    "HelpSteer2 preferences: two responses, a strength below 0 for the first, above for the second",
    needs=("prompt", "response_1", "response_2", "preference_strength"),
)
def helpsteer2_pair(row: Columns) -> Pair:
    """HelpSteer2's preferences: `preference_strength` from -3 (the first response) to 3 (the second); 0 is a tie."""
    prompt = _helpsteer_turns(text_of(value_of(row, "prompt"), "prompt"))
    return _preferred(row, prompt, ("response_1", "response_2"), "preference_strength")


@PAIR_LAYOUTS.register(
    "helpsteer3",
    "HelpSteer3 preferences: as HelpSteer2, after messages",
    needs=("context", "response1", "response2", "overall_preference"),
)
def helpsteer3_pair(row: Columns) -> Pair:
    """HelpSteer3's preferences: messages as `context`, `overall_preference` from -3 (the first) to 3; 0 is a tie."""
    prompt = messages_of(value_of(row, "context"), "context")
    return _preferred(row, prompt, ("response1", "response2"), "overall_preference")


def _helpsteer_turns(text: str) -> tuple[Message, ...]:
    """Return a prompt of several turns, which markers separate, as messages; it starts with the user's."""
    first, *rest = _HELPSTEER_TURN.split(text)
    turns = [Message("user", first)]
    turns += [Message(_HELPSTEER_ROLES[who], said) for who, said in zip(rest[::2], rest[1::2], strict=True)]
    return tuple(turn for turn in turns if turn.content)


def _preferred(row: Columns, prompt: tuple[Message, ...], fields: tuple[str, str], preference: str) -> Pair:
    texts = [answer_of(value_of(row, field), field) for field in fields]
    value = cell_value(value_of(row, preference))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -3 <= value <= 3:
        raise RowError(preference, "not a number from -3 to 3", value)
    if value == 0:
        raise RowError(preference, "a tie (neither response is preferred)", value)
    first = int(value > 0)
    return pair_of(row, prompt, texts[first], texts[1 - first], (None, None), (fields[first], fields[1 - first]))


@PAIR_LAYOUTS.register(
    "sharegpt",
    "ShareGPT pairs: conversations, chosen and rejected as turns of {from, value}",
    needs=("conversations", "chosen", "rejected"),
    labels=_LABELS,
)
def sharegpt_pair(row: Columns) -> Pair:
    """ShareGPT pairs: `conversations` is the prompt, `chosen` and `rejected` one turn each, all `{from, value}`."""
    turns = value_of(row, "conversations")
    if not isinstance(turns, list):
        raise RowError("conversations", "wrong type (a list of turns is needed)", turns)
    prompt = messages_of(turns, "conversations")
    chosen, rejected = (answer_of(value_of(row, field), field) for field in _COMPLETIONS)
    return pair_of(row, prompt, chosen, rejected, (label_of(row, _LABELS[0]), label_of(row, _LABELS[1])))


@PAIR_LAYOUTS.register(
    "messages",
    "messages as the prompt, chosen and rejected as one message each, as in Axolotl",
    needs=("messages", *_COMPLETIONS),
    labels=_LABELS,
    fits=lambda row: (
        row.keys() >= {"messages", *_COMPLETIONS}
        and "prompt" not in row
        and all(map(_is_one, map(row.get, _COMPLETIONS)))
    ),
)
def messages_pair(row: Columns) -> Pair:
    """Axolotl's columns: `messages` is the prompt, `chosen` and `rejected` one message each."""
    prompt = messages_of(value_of(row, "messages"), "messages")
    chosen, rejected = (answer_of(value_of(row, field), field) for field in _COMPLETIONS)
    return pair_of(row, prompt, chosen, rejected, (label_of(row, _LABELS[0]), label_of(row, _LABELS[1])))


def _is_long(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and not is_parts(value)


def _is_one(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and len(value) == 1 and not is_parts(value))


@PAIR_LAYOUTS.register(
    "alpaca_pairs",
    "Alpaca: instruction (and input, history), with chosen and rejected, or output as a list of both",
    needs=("instruction",),
    reads=("input", "output", *_COMPLETIONS),
    labels=_LABELS,
    fits=lambda row: (
        "instruction" in row
        and "prompt" not in row
        and (row.keys() >= set(_COMPLETIONS) or isinstance(row.get("output"), list))
        and not any(map(_is_long, map(row.get, _COMPLETIONS)))
    ),
)
def alpaca_pair(row: Columns) -> Pair:
    """Alpaca's columns, as in LLaMA-Factory: `chosen` and `rejected`, or `output` as a list of these two."""
    field = _COMPLETIONS
    if "output" in row and not row.keys() & set(_COMPLETIONS):
        both, field = row["output"], ("output", "output")
        if not isinstance(both, list) or len(both) != 2:
            raise RowError("output", "wrong type (a list of two, chosen and rejected, is needed)", both)
    else:
        both = [value_of(row, name) for name in _COMPLETIONS]
    chosen, rejected = (answer_of(value, name) for value, name in zip(both, field, strict=True))
    labels = (label_of(row, _LABELS[0]), label_of(row, _LABELS[1]))
    return pair_of(row, instruction_of(row), chosen, rejected, labels)


@UNPAIRED_LAYOUTS.register(
    UNPAIRED,
    "single answers for the methods kto and kldo of bfpo train",
    needs=("prompt", "completion"),
    reads=("text", "model", "category", "finished", *DESIRABLE),
    labels=("is_safe",),
    fits=lambda row: "prompt" in row and ("completion" in row or "text" in row),
)
def unpaired_answer(row: Columns) -> Pair:
    """A single answer as a pair without a rejected one; it is desirable if its `label` says so and it is safe.

    With one of the two columns that one decides; with neither the label is unknown. So is it where `is_safe` is null,
    unless the answer is undesirable anyway.
    """
    field = "completion" if "completion" in row else "text"
    prompt, answer = messages_of(value_of(row, "prompt"), "prompt"), answer_of(value_of(row, field), field)
    one = completion_of(row, prompt, answer, field, may_be_undesirable=True)
    given = [label_of(row, name) for name in (*DESIRABLE, "is_safe") if name in row]
    known = [label for label in given if label is not None]
    label = min(known) if known else None
    if label and "is_safe" in row and label_of(row, "is_safe") is None:
        label = None
    return Pair(
        one.id,
        one.prompt,
        one.text,
        "",
        label,
        None if label is None else 1 - label,
        optional_text(row, "source"),
        tools=one.tools,
        chosen_extra=message_extra(one),
        chosen_finished=one.finished,
        category=one.category,
        unpaired=True,
    )
