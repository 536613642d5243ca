"""How a guard model is asked and how its answer is read: the types that every format shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bfpo.schema import Completion, Message, VerdictLabel

__all__ = ["Format", "Reading"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a guard's answer says; `unscored` with a reason where it says nothing that its format knows."""

    label: VerdictLabel
    refused: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One guard's way to be asked, and to answer.

    `ask` returns the messages of a chat (the guard's own chat template renders them), or the finished text of a guard
    that has no template. `read` reads what it wrote and never raises. The probability of safe is read from the logits
    of the first token in which `safe_words` and `unsafe_words` differ, after `answer_prefix` (what every answer begins
    with). A change of any of these changes `version`: it is part of a cache's key.
    """

    name: str
    version: str
    summary: str
    model: str
    licence: str
    ask: Callable[[Completion], tuple[Message, ...] | str]
    read: Callable[[str], Reading]
    safe_words: tuple[str, ...]
    unsafe_words: tuple[str, ...]
    answer_prefix: str = ""
    max_new_tokens: int = 32
