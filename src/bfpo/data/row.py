"""One row of a file, of whatever kind the file is, and what is wrong with one that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bfpo.data import byte_lines

__all__ = ["CellText", "Row", "RowError", "too_long"]


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
class Row:
    """One row of a file: `line` is where it starts, from 1 (in Parquet, rows); `bad` is set where it has no columns."""

    line: int
    columns: Mapping[str, object]
    bad: RowError | None = None


def too_long() -> RowError:
    """Return what is wrong with a line beyond the limit."""
    return RowError("row", f"line longer than {byte_lines.MAX_LINE_BYTES} bytes")
