"""CSV files to rows: quoted fields over many lines, broken quotes as bad rows, the line of each row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from bfpo.core.errors import DataError
from bfpo.data import byte_lines
from bfpo.data.byte_lines import iter_lines
from bfpo.data.row import CellText, Row, RowError, too_long

__all__ = ["iter_csv_rows"]


class _LongLineError(Exception):
    """A line beyond the limit."""


class _Lines:
    """The text lines of a file, for a reader that goes on after an error; `number` is that of the last one."""

    def __init__(self, file: Path) -> None:
        self._lines = iter_lines(file)
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        if raw is None:
            raise _LongLineError
        return raw.decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 are found again in their cell


def iter_csv_rows(file: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, whose first row names the columns; every cell is a `CellText`.

    Raises `DataError` for a file without such a row, or where a column's name comes twice.
    """
    # The module's own limit of 128 KiB is less than a long conversation; it is one for the process, and only rises.
    csv.field_size_limit(max(csv.field_size_limit(), byte_lines.MAX_LINE_BYTES))
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _LongLineError) as error:
            if names is None:
                raise DataError.at(file, line, f"the row that names the columns cannot be read: {error}") from error
            yield Row(line, {}, _bad(error, lines.number))
            continue
        if len(cells) < 2 and not "".join(cells).strip():
            continue
        if names is None:
            names = _checked_names(file, line, cells)
        else:
            yield _row(line, names, cells)


def _bad(error: Exception, last_line: int) -> RowError:
    if isinstance(error, _LongLineError):
        return too_long()
    return RowError("row", "broken CSV (quotes or line ends)", f"{error}, up to line {last_line}")


def _checked_names(file: Path, line: int, cells: list[str]) -> list[str]:
    if any(_not_utf8(cell) for cell in cells):
        raise DataError.at(file, line, "the row that names the columns is no UTF-8; save the file as UTF-8")
    names = [cell.strip() for cell in cells]
    named = [name for name in names if name]  # an index column has none
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise DataError.at(file, line, f"two columns have the name {', '.join(map(repr, twice))}; rename one")
    return names


def _row(line: int, names: list[str], cells: list[str]) -> Row:
    if len(cells) != len(names):
        return Row(line, {}, RowError("row", "wrong number of fields", f"{len(cells)} of {len(names)}"))
    for name, cell in zip(names, cells, strict=True):
        if _not_utf8(cell):
            return Row(line, {}, RowError(name or "row", "invalid UTF-8", cell.encode("utf-8", "surrogateescape")[:20]))
    return Row(line, {name: CellText(cell) for name, cell in zip(names, cells, strict=True) if name})


def _not_utf8(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
