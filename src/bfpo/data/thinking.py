"""Answers of models that think first: the thoughts and the answer behind them, apart.

A text is cut where a thought was opened: at the beginning of the answer, or by the prompt. A closing mark in the middle
of an answer, in prose or in code, is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, field_validator

from bfpo.core.schema import Completion, canonical_json, from_canonical
from bfpo.core.settings import ConfigPart
from bfpo.data.fields import REASONING

__all__ = [
    "MARKS",
    "Thinking",
    "ThinkingKey",
    "Thought",
    "describe_thoughts",
    "message_extra",
    "opens_thought",
    "split_thought",
    "with_own_thought",
    "without_thought",
]

MARKS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
)
"""Known pairs of opening and closing marks, in any case; channels of the harmony format are read besides."""


class Thinking(ConfigPart):
    """How thoughts are separated from answers, and whether they are judged."""

    judged: bool = Field(
        default=False, description="true: thoughts stay in the answer's text and are judged and shown with it"
    )
    marks: list[list[str]] = Field(
        default=[],
        description="more pairs of an opening and a closing mark, such as [['<plan>', '</plan>']]; <think>, "
        "<thinking>, <reasoning>, [THINK], gpt-oss channels and others are known",
    )
    opened: bool | None = Field(
        default=None,
        description="whether the prompt opens the thought, so that an answer holds its closing mark alone; "
        "null = found from the chat template, or from each answer",
    )

    @field_validator("marks")
    @classmethod
    def _pairs(cls, value: list[list[str]]) -> list[list[str]]:
        if any(len(pair) != 2 or not all(mark.strip() for mark in pair) or pair[0] == pair[1] for pair in value):
            raise ValueError("needed: pairs of two different texts, such as [['<plan>', '</plan>']]")
        return value

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of marks, the user's first."""
        return (*((opening, closing) for opening, closing in self.marks), *MARKS)


ThinkingKey = Annotated[
    Thinking | None,
    Field(description="how thoughts in answers are found, and whether they are judged; null = known marks, not judged"),
]
"""The key `thinking` of a stage."""


@dataclass(frozen=True, slots=True)
class Thought:
    """A text that begins with thoughts: the thoughts, the answer, and where the answer starts in the text, characters.

    `closed` is false if the thoughts never end; there is then no answer.
    """

    reasoning: str
    answer: str
    start: int
    closed: bool = True


def without_thought(
    completion: Completion, thinking: Thinking | None = None, *, opened: bool | None = None
) -> Completion:
    """Return a completion whose `text` is the answer alone, the thoughts in `reasoning`.

    One whose thoughts never end is unfinished and has no text. If thoughts are judged, they are part of `text`.
    `opened` as in `split_thought`; a setting comes first.
    """
    thinking = thinking or Thinking()
    completion = with_own_thought(completion)
    if thinking.judged:
        return replace(completion, text=_joined(completion.reasoning, completion.text), reasoning="")
    if completion.reasoning:  # a closing mark alone then belongs to the answer
        opened = False
    elif thinking.opened is not None:
        opened = thinking.opened
    found = split_thought(completion.text, thinking.pairs, opened=opened)
    if found is None:
        return completion
    reasoning = _joined(completion.reasoning, "" if found.reasoning in completion.reasoning else found.reasoning)
    finished = completion.finished and found.closed
    return replace(completion, text=found.answer, reasoning=reasoning, finished=finished)


def describe_thoughts(completions: Sequence[Completion]) -> list[str]:
    """Return a line on how many completions begin with thoughts, and how many of these never end; none without any."""
    thoughts = [completion for completion in completions if completion.reasoning]
    if not thoughts:
        return []
    lost = sum(not completion.text for completion in thoughts)
    ends = f"; without an answer behind them: {lost}" if lost else ""
    return [f"{len(thoughts)} of {len(completions)} answers begin with thoughts, which are not judged{ends}"]


def with_own_thought(completion: Completion) -> Completion:
    """Return the completion with the thoughts that its message holds beside the content, in `reasoning`."""
    extra = from_canonical(completion.extra) or {}
    beside = {name: extra.pop(name) for name in REASONING if isinstance(extra.get(name), str)}
    if not beside:
        return completion
    given = completion.reasoning or next((words for words in beside.values() if words.strip()), "")
    return replace(completion, reasoning=given, extra=canonical_json(extra))


def message_extra(completion: Completion) -> str:
    """Return the other keys of a completion's message, its thoughts as `reasoning_content`, which templates read."""
    extra = from_canonical(completion.extra) or {}
    if completion.reasoning and not any(name in extra for name in REASONING):
        extra["reasoning_content"] = completion.reasoning
    return canonical_json(extra)


def _joined(*parts: str) -> str:
    """Return the parts that are not empty as paragraphs; a single part unchanged."""
    return "\n\n".join(part for part in parts if part)


def opens_thought(prompt: str, marks: Sequence[tuple[str, str]] = MARKS) -> bool:
    """Return whether a rendered prompt ends inside a thought: with an opening mark, or in a channel of analysis."""
    end = prompt.rstrip().lower()
    return end.endswith("<|channel|>analysis<|message|>") or any(end.endswith(mark.lower()) for mark, _ in marks)


def split_thought(text: str, marks: Sequence[tuple[str, str]] = MARKS, *, opened: bool | None = None) -> Thought | None:
    """Return the thoughts and the answer of a text, `None` if it is an answer alone.

    `opened`: whether the prompt has opened the thought. True: the text up to the closing mark is thought, all of it if
    none comes. False: only an opening mark at the beginning counts. `None` (not known): so does a single closing mark
    that ends a sentence or a line, or stands between two words without a space, and is not followed by the rest of a
    sentence, outside of code and of quotes.
    """
    if (harmony := _harmony(text, opened=bool(opened))) is not None:
        return harmony
    thoughts: list[str] = []
    start: int | None = None
    if _opening(text, 0, marks) is None and opened is not False:
        end = _closing(text, 0, [closing for _, closing in marks]) if opened else _lone_closing(text, marks)
        if end is None:
            return Thought(text.strip(), "", len(text), closed=False) if opened else None
        thoughts.append(text[: end[0]].strip())
        start = end[1]
    while (place := _opening(text, start or 0, marks)) is not None:
        begin, closing = place
        end = _closing(text, begin, [closing])
        thoughts.append(text[begin : None if end is None else end[0]].strip())
        if end is None:
            return Thought(_joined(*thoughts), "", len(text), closed=False)
        start = end[1]
    return None if start is None else _answered(_joined(*thoughts), text, start, marks)


def _answered(reasoning: str, text: str, start: int, marks: Sequence[tuple[str, str]]) -> Thought:
    """Return thoughts with the answer from `start` on: without a closing mark written twice, and out of its tags."""
    again = re.compile(rf"\s*(?:{'|'.join(re.escape(closing) for _, closing in marks)})", re.IGNORECASE)
    while (more := again.match(text, start)) is not None:
        start = more.end()
    answer = text[start:].strip()
    tagged = _ANSWER.fullmatch(answer)
    return Thought(reasoning, answer if tagged is None else tagged[1].strip(), start)


def _opening(text: str, start: int, marks: Sequence[tuple[str, str]]) -> tuple[int, str] | None:
    """Return the place behind an opening mark that is the next thing in the text, and its closing mark."""
    while start < len(text) and (text[start].isspace() or text[start] in "\ufeff\u200b"):
        start += 1
    for opening, closing in marks:
        if text[start : start + len(opening)].lower() == opening.lower():
            return start + len(opening), closing
    return None


# ------------------------------------------------------------------------------------------------- closing marks

_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“"}
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_ENDS = '.!?…)]}*"”’`。！？'
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL | re.IGNORECASE)


def _places(text: str, begin: int, mark: str) -> list[tuple[int, int]]:
    """Return start and end of each occurrence of a mark that is not directly in quotes."""
    found = [(m.start() + begin, m.end() + begin) for m in re.finditer(re.escape(mark), text[begin:], re.IGNORECASE)]
    return [
        (start, end) for start, end in found if start == 0 or _QUOTES.get(text[start - 1], "\0") != text[end : end + 1]
    ]


def _closing(text: str, begin: int, marks: Sequence[str]) -> tuple[int, int] | None:
    """Return the first closing mark of an open thought, `None` without one; marks in closed code blocks are text."""
    found = sorted(place for mark in marks for place in _places(text, begin, mark))
    for start, end in found:
        before = len(_FENCE.findall(text, begin, start))
        if before % 2 == 0 or not _FENCE.search(text, end) or (start, end) == found[-1]:
            return start, end
    return None


def _lone_closing(text: str, marks: Sequence[tuple[str, str]]) -> tuple[int, int] | None:
    """Return a closing mark without an opening one that ends thoughts; see `split_thought`."""
    for opening, closing in marks:
        opened = re.search(re.escape(opening), text, re.IGNORECASE)
        for start, end in _places(text, 0, closing):
            if opened is not None and opened.start() < start:
                break
            if _ends_thoughts(text[:start], text[end:]):
                return start, end
    return None


def _ends_thoughts(before: str, after: str) -> bool:
    """Return whether a closing mark between two texts ends thoughts, rather than being spoken of."""
    begun = before.rpartition("\n")[2]
    if len(_FENCE.findall(before)) % 2 or begun.count("`") % 2:
        return False
    if before.rstrip().endswith(":") or (begun.isspace() and len(begun.expandtabs(4)) >= 4):
        return False  # an example follows, or a block of code
    head, line = before.rstrip(" \t"), after.partition("\n")[0]
    words = line.lstrip(" \t")
    if words[:1] in tuple(".,;:!?)…") or (words != line and words[0].islower()):
        return False
    return head[-1:] in ("", "\n", *_ENDS) or (head == before and words == line)


# -------------------------------------------------------------------------------------------- channels of harmony

_HEADER = re.compile(r"(?:<\|start\|>assistant\s*)?<\|channel\|>([^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>")
_END = re.compile(r"<\|(?:return|end|call|start)\|>")
_PLAIN = (
    re.compile(r"\s*analysis(?=[A-Z\"'“(])(.*?)assistant\s?final(.*)", re.DOTALL),
    re.compile(r"\s*Here(?:'s| is) my thought process:(.*?)Here(?:'s| is) my response:(.*)", re.DOTALL),
)


def _harmony(text: str, *, opened: bool) -> Thought | None:
    """Return the thoughts and the final answer of a text in gpt-oss's harmony format, `None` for another text.

    The answer is in the channel final. Without the special tokens the channels read `analysis...assistantfinal...`;
    Granite 3.2 writes headings in words.
    """
    if (plain := next((found for form in _PLAIN if (found := form.fullmatch(text))), None)) is not None:
        return Thought(plain[1].strip(), plain[2].strip(), plain.start(2))
    headers = list(_HEADER.finditer(text))
    if not text.lstrip().startswith(("<|channel|>", "<|start|>assistant")) and not (opened and headers):
        return None
    final = next((header for header in headers if header[1].split()[:1] == ["final"]), None)
    end = len(text) if final is None else final.start()
    parts = [text[: headers[0].start() if headers else end]] if opened else []
    for place, header in enumerate(headers):
        if header.start() < end:
            stop = headers[place + 1].start() if place + 1 < len(headers) else len(text)
            parts.append(text[header.end() : stop])
    reasoning = _joined(*(_END.sub("", part).strip() for part in parts))
    if final is None:
        return Thought(reasoning, "", len(text), closed=False)
    return Thought(reasoning, _END.split(text[final.end() :])[0].strip(), final.end())
