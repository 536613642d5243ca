"""Text that a chat template has rendered before: recognised, since it would be rendered a second time."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from bfpo.core.schema import Message
from bfpo.data.thinking import MARKS

__all__ = ["RenderedText", "is_mostly_rendered", "rendered_note"]

_OPENERS: tuple[str, ...] = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|user|>")
_OPENERS += ("<|begin_of_text|>", "<|system|>", "<|assistant|>", "<|start|>", "<｜User｜>", "[INST]")
_CLOSERS: tuple[str, ...] = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "<|end|>")
_CLOSERS += ("</s>",)
_TAG = re.compile(r"\[/?[A-Z_]+\]|<[^\s<>]+>")


class RenderedText:
    """Finds marks of templates where only a rendered text has them.

    A prompt is taken as rendered if it starts with the mark of a turn, or holds what this template writes between a
    question and an answer; a completion if it starts with the mark of a turn or ends with an end token. Marks are the
    `tokens` that this template writes and those of well-known templates, without those of thoughts (`<think>`), with
    which answers begin as they are generated. A text that mentions a token elsewhere is not taken as rendered.
    """

    def __init__(self, tokens: Collection[str] = (), between: str = "") -> None:
        own = [
            token for token in tokens if token.strip() and not token.strip().isalnum() and not _is_of_thoughts(token)
        ]
        self._openers = tuple(dict.fromkeys((*own, *_OPENERS)))
        self._closers = tuple(dict.fromkeys((*own, *_CLOSERS)))
        header = between.strip()
        self._header = header if any(token in header for token in own) or _TAG.search(header) else ""

    def mark(self, prompt: Sequence[Message], answers: Sequence[Message]) -> str:
        """Return the mark that shows that a row was rendered before, "" without one."""
        for message in prompt:
            text = message.content.strip()
            if opener := self._opener(text):
                return opener
            if self._header and self._header in text:
                return self._header
        for answer in answers:
            text = answer.content.strip()
            if opener := self._opener(text):
                return opener
            if text.endswith(self._closers):
                return next(mark for mark in self._closers if text.endswith(mark))
        return ""

    def _opener(self, text: str) -> str:
        if not text.startswith(("<", "[")) and not text.startswith(self._openers):
            return ""
        inner = text.removeprefix("<s>").removeprefix("<bos>").lstrip()
        return next((mark for mark in self._openers if text.startswith(mark) or inner.startswith(mark)), "")


def _is_of_thoughts(token: str) -> bool:
    return any(token.strip().lower() == mark.lower() for pair in MARKS for mark in pair)


def is_mostly_rendered(num_rendered: int, num_rows: int) -> bool:
    """Return whether so many rows look rendered that the file is, not some attacks within it: at least half."""
    return 0 < num_rows <= 2 * num_rendered


def rendered_note(num_by_mark: dict[str, int], num_rows: int, unit: str = "rows") -> str:
    """Return in words how many rows look rendered, and by which marks."""
    marks = ", ".join(f"{mark!r} {number}" for mark, number in num_by_mark.items())
    number = sum(num_by_mark.values())
    return f"{number} of {num_rows} {unit} hold the control tokens of a rendered chat ({marks})"
