"""A judge of refusals by rules: whether an answer declines, or declines in part. It needs no model.

It measures `refused` and `partly_refused`, not safety, and reads English. `docs/judges.md` has its precision and recall
against people's labels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import regex

from bfpo.core.errors import SettingError, first_line
from bfpo.core.schema import Completion, Message, Verdict
from bfpo.data.thinking import split_thought
from bfpo.judges.refusal_rules import Phrases, declines
from bfpo.judges.refusal_text import in_english, normalised, plain_text

__all__ = [
    "NOT_ABOUT_SAFETY",
    "NOT_READ",
    "RefusalJudge",
    "RefusalReading",
    "last_question",
    "read_phrases",
    "read_refusal",
]

NOT_ABOUT_SAFETY = "measures refusals, not safety"
NOT_READ = "not read for refusals: not in English"

_PATTERN_SECONDS = 0.2  # of CPU time that a pattern may take on one sentence
_MOST_REPEATS = 10_000  # product of a pattern's repeat counts, since nested counts take memory


@dataclass(frozen=True, slots=True)
class RefusalReading:
    """Whether an answer is `refused` in full or `partly` (it declines and helps); `None`, with the reason: not read."""

    refused: bool | None
    partly: bool | None
    reason: str = ""


def last_question(prompt: Sequence[Message]) -> str:
    """Return what the user said last in a prompt, for `read_refusal`."""
    return next((turn.content for turn in reversed(prompt) if turn.role == "user"), "")


def read_refusal(answer: str, question: str = "", phrases: Phrases = ()) -> RefusalReading:
    """Return whether an answer, without any thoughts before it, declines.

    `question` is the message that it answers: a bare "No." to a yes-or-no question is an answer, and a moral judgement
    instead of instructions is a refusal. `phrases` are the user's, in any language. An answer in another language than
    English that has none of them, and an answer without words, is not read. The time is bounded: of long answers the
    first 12,000 characters are read.
    """
    if not answer.strip():
        return RefusalReading(None, None, "an empty text declines nothing")
    text = normalised(answer)
    found = declines(plain_text(text), normalised(question[-2000:]).strip().lower(), phrases)
    if not (found.refused or found.partly) and not in_english(text):
        return RefusalReading(None, None, NOT_READ)
    return RefusalReading(found.refused, found.partly)


class RefusalJudge:
    """Finds answers that decline (`refused`), or that decline and still help (`partly_refused`)."""

    def __init__(self, *, name: str = "refusal-phrases", phrases: str | None = None) -> None:
        self.name = name
        self.version = "refusal-phrases-3"
        self._phrases: Phrases = ()
        if phrases is not None:
            self._phrases = found = read_phrases(phrases)
            listed = "\n".join(phrase.pattern for phrase in found)
            self.version += f"+{hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """Return the verdicts, in order, all unscored for safety; an answer that was not read has neither value."""
        return [self._verdict(completion) for completion in completions]

    def _verdict(self, completion: Completion) -> Verdict:
        thought = split_thought(completion.text, opened=False)
        answer = completion.text if thought is None else thought.answer
        found = read_refusal(answer, last_question(completion.prompt), self._phrases)
        return Verdict(
            completion.id,
            self.name,
            "unscored",
            reason=found.reason or NOT_ABOUT_SAFETY,
            refused=found.refused,
            partly_refused=found.partly,
        )


# ------------------------------------------------------------------------------------------------- phrases of a file


def read_phrases(file: str) -> tuple[_Phrase, ...]:
    """Return the phrases of a text file: one a line, a regular expression between slashes; `#` starts a comment line.

    Both are looked for in sentences of the answer's beginning, in lower case and with plain apostrophes. Raises
    `SettingError`, with the line, for a file that cannot be read, has no phrase, or has one that cannot be used.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"phrases: {file} cannot be read as text ({first_line(error)})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if (phrase := line.strip()) and not phrase.startswith("#"):
            try:
                found.append(_Phrase(_pattern(phrase), f"{file}:{number}"))
            except ValueError as error:
                raise SettingError(f"phrases: {file}:{number}: got {phrase!r}; {error}") from error
    if not found:
        raise SettingError(f"phrases: {file} has no phrase; write one a line, or leave the key out")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Phrase:
    """A pattern of the user's, or of somebody else's file, and its `FILE:LINE`."""

    compiled: regex.Pattern[str]
    place: str

    @property
    def pattern(self) -> str:
        return str(self.compiled.pattern)

    def search(self, text: str, /) -> object | None:
        """Return what is found; raises `SettingError` if the search takes too long."""
        try:
            return self.compiled.search(text, timeout=_PATTERN_SECONDS)  # type: ignore[no-any-return]
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise SettingError(
                f"phrases: {self.place}: got {self.pattern!r}, which takes more than "
                f"{_PATTERN_SECONDS:g} s on one sentence; write no repetition inside a repetition"
            ) from error


def _pattern(phrase: str) -> regex.Pattern[str]:
    """Return the pattern of a line; raises `ValueError` for one that cannot be used."""
    if len(phrase) > 1 and phrase[0] == phrase[-1] == "/":
        bare = "".join(phrase[1:-1].split())
        counts = [
            max(int(n) for n in each if n) for each in re.findall(r"\{(\d{0,9})\d*,?(\d{0,9})\d*\}", bare) if any(each)
        ]
        if prod(max(1, count) for count in counts) > _MOST_REPEATS:
            raise ValueError(f"its repeat counts multiply to more than {_MOST_REPEATS:,}; write smaller ones")
        try:
            pattern = regex.compile(phrase[1:-1], regex.IGNORECASE)
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"not a regular expression ({first_line(error)})") from error
    else:
        words = normalised(phrase).strip().lower()
        if not re.search(r"\w", words):
            raise ValueError("a phrase needs a letter or digit")
        start, end = (r"\b" if re.match(r"[a-z0-9]", edge) else "" for edge in (words[0], words[-1]))
        pattern = regex.compile(start + re.escape(words) + end, regex.IGNORECASE)
    try:
        is_empty = pattern.search("", timeout=_PATTERN_SECONDS) is not None
    except (TimeoutError, MemoryError, RecursionError) as error:
        raise ValueError("it takes too long on an empty text") from error
    if is_empty:
        raise ValueError("it is found in every text; a phrase must have at least one character of its own")
    return pattern
