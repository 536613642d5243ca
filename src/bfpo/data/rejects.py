"""Rows of a file, and those that could not be used: how many by reason, and one clear message about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bfpo.core.errors import DataError, SettingError
from bfpo.core.remote import file_name
from bfpo.core.schema import Pair

__all__ = [
    "ADVICE",
    "DUPLICATE_ID",
    "EMPTY",
    "ID_ADVICE",
    "LEFT_OUT",
    "BadRows",
    "CellText",
    "ReadResult",
    "Reject",
    "Row",
    "RowError",
    "check_rejects",
    "describe_rejects",
]

BadRows = Literal["stop", "skip"]
ADVICE = "fix these rows, or set bad_rows to 'skip' to leave them out"
DUPLICATE_ID = "duplicate id"
ID_ADVICE = "to keep rows with one id, set columns: {id: null}: each then gets an id made from its content"
EMPTY = "empty completion"
LEFT_OUT = "left out: "
"""Begins the reason of a row that is not bad, but that a setting leaves out."""
_VALUE_CHARS = 80


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: `line` is where it starts, from 1 (in Parquet, rows); `bad` is set where it has no columns.

    `conversations`: the columns whose text was read as messages.
    """

    line: int
    columns: Mapping[str, object]
    bad: RowError | None = None
    conversations: tuple[str, ...] = ()


class RowError(Exception):
    """A row that cannot be used: the field, the reason (a fixed phrase, so that it can be counted) and the value."""

    def __init__(self, field: str, reason: str, value: object = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.value = value


class CellText(str):
    """The text of a CSV cell, where numbers and labels are text too."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that could not be used; `value` is the repr of what was found, cut to 80 characters."""

    file: str
    line: int
    field: str
    reason: str
    value: str

    @classmethod
    def of(cls, file: Path, line: int, bad: RowError) -> Reject:
        """Return the reject of a bad row at `file:line`."""
        value = repr(bad.value)
        value = value if len(value) <= _VALUE_CHARS else value[: _VALUE_CHARS - 3] + "..."
        return cls(file_name(file), line, bad.field, bad.reason, value)

    @property
    def is_bad(self) -> bool:
        """Whether the row is bad; false for one that a setting leaves out."""
        return not self.reason.startswith(LEFT_OUT)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.reason}; got {self.value}"

    def as_row(self) -> dict[str, str | int]:
        """Return a flat dict, as written to `rejects.jsonl`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Rejected rows, the number of rows seen, pairs in the order of the files, the layout of each file, and notes.

    `rows` counts every row: `rows == len(pairs) + len(rejects)`, unless the pairs were not kept. `notes`: those of
    `FileNotes.facts`.
    """

    rejects: list[Reject]
    rows: int
    pairs: list[Pair] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many rows each reason rejected, the most frequent first."""
        return dict(Counter(reject.reason for reject in self.rejects).most_common())


def check_rejects(result: ReadResult, *, bad_rows: BadRows, files: Sequence[str] = ()) -> None:
    """Raise `DataError` if nothing was read of `files`, or if a row is bad and `bad_rows` is `"stop"`."""
    if bad_rows not in ("stop", "skip"):
        raise SettingError(f"bad_rows: got {bad_rows!r}; allowed: 'stop', 'skip'")
    bad = [reject for reject in result.rejects if reject.is_bad]
    if bad and bad_rows == "stop":
        advice = ADVICE
        if any(reject.reason == DUPLICATE_ID for reject in bad):
            advice += f"; {ID_ADVICE}"
        raise DataError(f"{describe_rejects(bad, rows=result.rows)}\n{advice}")
    if result.rows == len(result.rejects):
        detail = f"{', '.join(files)} has no row; check the path, or what wrote it" if files else ""
        detail = describe_rejects(result.rejects, rows=result.rows) if result.rejects else detail
        raise DataError(f"no usable row was read{detail and ': '}{detail}")


def describe_rejects(rejects: Sequence[Reject], *, rows: int, show: int = 5) -> str:
    """Return one message: how many of the rows are bad, how many by reason, and the first few with their positions."""
    counts = Counter(reject.reason for reject in rejects)
    by_reason = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    head = f"{len(rejects)} of {rows} rows cannot be used ({by_reason})"
    lines = [f"  {reject}" for reject in _one_of_each_first(rejects)[:show]]
    if len(rejects) > show:
        lines.append(f"  and {len(rejects) - show} more")
    return "\n".join([head, *lines])


def _one_of_each_first(rejects: Iterable[Reject]) -> list[Reject]:
    """Put the first row of every reason before all others, so that rare reasons are shown."""
    first: dict[str, Reject] = {}
    rest = []
    for reject in rejects:
        if reject.reason in first:
            rest.append(reject)
        else:
            first[reject.reason] = reject
    return [*first.values(), *rest]
