"""The rows of a source's files: raw ones, to be shared out, and what turns one into a pair or a completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bfpo.core.schema import Completion, Pair
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.files import attempt, first_that_fits, mapped_rows
from bfpo.data.layouts import AUTO, Layout, check_columns, check_layout, columns_of
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.rejects import Reject, Row
from bfpo.data.sources import SourceKind

__all__ = ["AUTO", "RowReader", "kind_of_layout", "raw_rows", "reader_of"]


def _all_layouts() -> dict[str, Layout[Pair | Completion]]:
    """Return all layouts in the order of `load_completions`: what holds a completion is one, whatever else it holds."""
    return {**COMPLETION_LAYOUTS, **PAIR_LAYOUTS}


def kind_of_layout(name: str) -> SourceKind | None:
    """Return what rows of a layout are, `None` for `"auto"`; raises `SettingError` for a name no layout has."""
    check_layout(name, _all_layouts())
    return None if name == AUTO else "completions" if name in COMPLETION_LAYOUTS else "pairs"


@dataclass(frozen=True, slots=True)
class RowReader:
    """Turns rows of one file into pairs or completions; plain values, so that it can be sent to another process."""

    file: str
    layout: str

    @property
    def kind(self) -> SourceKind:
        """What the rows are."""
        return "completions" if self.layout in COMPLETION_LAYOUTS else "pairs"

    def read(self, line: int, columns: Mapping[str, object]) -> Pair | Completion | Reject:
        """Return what a row is; its id may be that of another row."""
        return attempt(self._make, Path(self.file), Row(line, columns))

    def _make(self, row: Row) -> Pair | Completion:
        layouts = COMPLETION_LAYOUTS if self.layout in COMPLETION_LAYOUTS else PAIR_LAYOUTS
        return layouts[self.layout].parse(row.columns)


def reader_of(
    file: Path, *, layout: str, columns: Mapping[str, str], kind: SourceKind | None = None
) -> RowReader | None:
    """Return the reader of a file; with `"auto"` the first row that fits a layout (of this kind) decides.

    `None` where no row has columns. Raises `DataError` for a file that cannot be read or fits no layout, `SettingError`
    for a layout or a column of ours that is unknown.
    """
    kind = kind_of_layout(layout) or kind
    known = _all_layouts()
    if layout != AUTO:
        check_columns(columns, columns_of([known[layout]]))
        return RowReader(str(file), layout)
    check_columns(columns, columns_of(known.values()))
    of_kind = [one for name, one in known.items() if kind in (None, kind_of_layout(name))]
    found = first_that_fits(file, mapped_rows(file, columns), of_kind)
    return None if found is None else RowReader(str(file), found.name)


def raw_rows(file: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, object]] | Reject]:
    """Yield the rows of a file under our names: line and columns, or a reject where it has none.

    Raises `DataError` as `iter_rows` does.
    """
    for row in mapped_rows(file, columns):
        yield Reject.of(file, row.line, row.bad) if row.bad is not None else (row.line, row.columns)
