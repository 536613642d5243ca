"""Rows of files under our column names, and what is made of each: something, or a reject with its place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from bfpo.core.errors import DataError, SettingError
from bfpo.data.files import iter_rows
from bfpo.data.rejects import Reject, describe_rejects
from bfpo.data.row import Row, RowError

__all__ = ["attempt", "check_columns", "first_that_fits", "made_or_error", "mapped_rows"]

Item = TypeVar("Item")
Layout = TypeVar("Layout")
Columns = Mapping[str, object]


def check_columns(columns: Mapping[str, str] | None, known: Collection[str]) -> None:
    """Raise `SettingError` where `columns` maps a name that no layout knows."""
    unknown = sorted(set(columns or {}) - set(known))
    if unknown:
        raise SettingError(
            f"columns: got {', '.join(unknown)}; allowed (our name: the file's): {', '.join(sorted(known))}"
        )


def mapped_rows(file: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    """Yield the rows of a file; `columns` gives columns our names. Raises `DataError` as `iter_rows`."""
    return (_renamed(row, columns) for row in iter_rows(file))


def _renamed(row: Row, columns: Mapping[str, str] | None) -> Row:
    """Give the columns our names; a name mapped to a column the row lacks is then absent, not read from elsewhere."""
    if not columns:
        return row
    kept = {name: value for name, value in row.columns.items() if name not in columns}
    mapped = {ours: row.columns[theirs] for ours, theirs in columns.items() if theirs in row.columns}
    return Row(row.line, {**kept, **mapped}, row.bad)


def first_that_fits(
    file: Path, rows: Iterable[Row], detect: Callable[[Columns], Layout | None], known: Mapping[str, tuple[str, ...]]
) -> Layout | None:
    """Return the layout of the first row that fits any; `None` where no row has columns at all.

    Raises `DataError` where rows have columns and none fits, with the needs of the `known` layouts.
    """
    first: Row | None = None
    for row in rows:
        if row.bad is not None:
            continue
        first = first or row
        layout = detect(row.columns)
        if layout is not None:
            return layout
    if first is None:
        return None
    seen = ", ".join(map(_printable, first.columns)) or "none"
    needs = "; ".join(f"{name} needs {', '.join(needed)}" for name, needed in known.items())
    what = f"the columns fit no layout; columns seen: {seen}; layouts: {needs}"
    raise DataError.at(file, first.line, f"{what}. `columns` renames (our name: the file's)")


def _printable(name: object) -> str:
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def attempt(make: Callable[[Row], Item], file: Path, row: Row) -> Item | Reject:
    """Return what is made of a row, or the reject that says why nothing is."""
    try:
        if row.bad is not None:
            raise row.bad
        return make(row)
    except RowError as bad:
        return Reject.of(file, row.line, bad)


def made_or_error(file: Path, rows: Iterable[Row], make: Callable[[Row], Item]) -> list[Item]:
    """Return what is made of all rows; raises `DataError` where any is bad."""
    items: list[Item] = []
    rejects: list[Reject] = []
    for row in rows:
        made = attempt(make, file, row)
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            items.append(made)
    if rejects:
        raise DataError(describe_rejects(rejects, rows=len(items) + len(rejects)))
    return items
