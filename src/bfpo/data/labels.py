"""Safety labels of data: unknown ones resolved as configured, pairs counted by label cell, completions to imitate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bfpo.core.errors import LabelError, SettingError
from bfpo.core.schema import Completion, Message, Pair, from_canonical
from bfpo.data.fields import Columns, is_unknown
from bfpo.data.messages import is_absent
from bfpo.data.rejects import RowError

__all__ = [
    "CELLS",
    "NO_WORDS",
    "LabelResolver",
    "LabelWords",
    "Unknown",
    "Use",
    "as_judged",
    "cell_counts",
    "cell_of",
    "completions_of_pair",
    "resolve_labels",
]

Unknown = Literal["error", "safe", "drop"]
Use = Literal["all", "chosen", "safe"]

CELLS = ("safe-safe", "safe-unsafe", "unsafe-safe", "unsafe-unsafe")
"""Label cells, chosen first. A probability counts as safe above 0.5."""


@dataclass(frozen=True, slots=True)
class LabelWords:
    """Values of label columns that mean safe or unsafe, where they are neither true or false nor probabilities."""

    safe: frozenset[str] = frozenset()
    unsafe: frozenset[str] = frozenset()

    @classmethod
    def of(cls, safe: Sequence[str], unsafe: Sequence[str]) -> LabelWords:
        """Return the words of the settings `safe_values` and `unsafe_values`.

        Raises `SettingError` for a value in both.
        """
        words = cls(frozenset(map(_word, safe)), frozenset(map(_word, unsafe)))
        if both := sorted(words.safe & words.unsafe):
            raise SettingError(f"safe_values, unsafe_values: {', '.join(both)} is in both")
        return words

    def __bool__(self) -> bool:
        return bool(self.safe or self.unsafe)

    def read(self, value: object) -> bool | None:
        """Return whether the value means safe, `None` if it is none of the words; null and NaN never are."""
        if is_absent(value):
            return None
        word = _word(value)
        return True if word in self.safe else False if word in self.unsafe else None

    def applied(self, row: Columns, fields: Iterable[str]) -> Columns:
        """Return the row with these label columns as true, false or null (unknown).

        Raises `RowError` for a value that is neither unknown nor one of the words.
        """
        labels: dict[str, bool | None] = {}
        for field in fields:
            if field in row:
                labels[field] = self.read(row[field])  # first, since a word may be one that is else unknown, as "none"
                if labels[field] is None and not is_unknown(row[field]):
                    raise RowError(field, "in neither safe_values nor unsafe_values", row[field])
        return {**row, **labels}


NO_WORDS = LabelWords()
"""Labels are true, false or probabilities."""


def _word(value: object) -> str:
    """Return a label's value as text: true and false in lower case, a whole number without a fraction."""
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if math.isfinite(number) and number == int(number) else text


def _unknown(pair: Pair) -> bool:
    return pair.chosen_is_safe is None or pair.rejected_is_safe is None


class LabelResolver:
    """Resolves unknown labels pair by pair and counts them; under `"error"`, `check` raises at the end.

    Raises `SettingError` for another `unknown`.
    """

    def __init__(self, unknown: Unknown) -> None:
        if unknown not in ("error", "safe", "drop"):
            raise SettingError(f"unknown: got {unknown!r}; allowed: 'error', 'safe', 'drop'")
        self._unknown = unknown
        self._num_pairs = self._num_lacking = 0
        self._first_lacking: list[str] = []

    def __call__(self, pair: Pair) -> Pair | None:
        """Return the pair with both labels known, or `None` if it is left out."""
        self._num_pairs += 1
        if not _unknown(pair):
            return pair
        self._num_lacking += 1
        if len(self._first_lacking) < 3:
            self._first_lacking.append(pair.id)
        return _taken_as_safe(pair) if self._unknown == "safe" else None

    def check(self) -> None:
        """Raise `LabelError` if labels were unknown and that is an error."""
        if self._unknown != "error" or not self._num_lacking:
            return
        names = ", ".join(self._first_lacking) + (", ..." if self._num_lacking > 3 else "")
        raise LabelError(
            f"{self._num_lacking} of {self._num_pairs} pairs lack a safety label ({names}); label them, or set "
            "unknown_label: 'safe' counts an unknown label as safe, 'drop' leaves the pair out"
        )

    @property
    def counts(self) -> dict[str, int]:
        """The counts so far, in pairs: `known`, `set_safe`, `dropped`."""
        lacking = self._num_lacking
        return {
            "known": self._num_pairs - lacking,
            "set_safe": lacking if self._unknown == "safe" else 0,
            "dropped": lacking if self._unknown == "drop" else 0,
        }


def resolve_labels(pairs: Iterable[Pair], *, unknown: Unknown) -> tuple[list[Pair], dict[str, int]]:
    """Return pairs whose labels are all known, and the counts `known`, `set_safe` and `dropped` (in pairs).

    If a label is unknown, `"error"` raises, `"safe"` counts that completion as safe, `"drop"` leaves the pair out.
    Raises `LabelError` with the number of such pairs, `SettingError` for another `unknown`.
    """
    resolve = LabelResolver(unknown)
    known = [pair for pair in map(resolve, pairs) if pair is not None]
    resolve.check()
    return known, resolve.counts


def _taken_as_safe(pair: Pair) -> Pair:
    return replace(
        pair,
        chosen_is_safe=1.0 if pair.chosen_is_safe is None else pair.chosen_is_safe,
        rejected_is_safe=1.0 if pair.rejected_is_safe is None else pair.rejected_is_safe,
    )


def cell_of(chosen_is_safe: float, rejected_is_safe: float) -> str:
    """Return the name of the label cell."""
    return CELLS[2 * (not chosen_is_safe > 0.5) + (not rejected_is_safe > 0.5)]


def cell_counts(pairs: Iterable[Pair]) -> dict[str, int]:
    """Return the number of pairs in each of `CELLS`, and under `"unknown"` if there are any."""
    counts = dict.fromkeys(CELLS, 0)
    for pair in pairs:
        if pair.chosen_is_safe is None or pair.rejected_is_safe is None:
            counts["unknown"] = counts.get("unknown", 0) + 1
        else:
            counts[cell_of(pair.chosen_is_safe, pair.rejected_is_safe)] += 1
    return counts


def completions_of_pair(pair: Pair) -> tuple[Completion, Completion]:
    """Return both completions of a pair with their labels; `kind` is the pair's source."""
    chosen = Completion(f"{pair.id}:chosen", pair.prompt, pair.chosen, kind=pair.source, tools=pair.tools)
    return (
        replace(chosen, is_safe=pair.chosen_is_safe, extra=pair.chosen_extra, finished=pair.chosen_finished),
        replace(
            chosen,
            id=f"{pair.id}:rejected",
            text=pair.rejected,
            is_safe=pair.rejected_is_safe,
            extra=pair.rejected_extra,
            finished=pair.rejected_finished,
        ),
    )


def as_judged(completion: Completion, *, keep_label: bool = False) -> Completion:
    """Return a completion as judges see it, without a label: tool calls stand below the texts, as their JSON."""
    prompt = tuple(
        Message(message.role, _with_calls(message.content, message.extra)) if message.extra else message
        for message in completion.prompt
    )
    text = _with_calls(completion.text, completion.extra)
    label = completion.is_safe if keep_label else None
    return replace(completion, prompt=prompt, text=text, extra="", is_safe=label)


def _with_calls(text: str, extra: str) -> str:
    calls = (from_canonical(extra) or {}).get("tool_calls", [])
    return "\n".join(part for part in (text, *(json.dumps(call, ensure_ascii=False) for call in calls)) if part)
