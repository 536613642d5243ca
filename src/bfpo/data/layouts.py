"""Layouts of rows: one function row -> pair, completion or prompts each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from bfpo.core.errors import SettingError
from bfpo.data.fields import ColumnNames, Columns
from bfpo.data.rejects import Row

__all__ = ["AUTO", "Layout", "Layouts", "check_columns", "check_layout", "columns_of", "parse_row"]

AUTO = "auto"
"""Instead of a layout's name: detect the layout of each file from its columns."""

Made = TypeVar("Made")
MadeOf = TypeVar("MadeOf", covariant=True)


@dataclass(frozen=True, slots=True)
class Layout(Generic[MadeOf]):
    """A layout of rows: the columns it needs, those it also reads, and its function.

    `fits` looks at the columns alone (and whether a completion is text or a conversation), never at other values.
    `parse` converts a row and raises `RowError` if it cannot. `labelled`: of completions, whether the layout has its
    own column for the safety label. `labels`: the columns of safety labels; they are read too.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    fits: Callable[[Columns], bool]
    parse: Callable[[Columns], MadeOf]
    order: int = 0
    labelled: bool = False
    labels: tuple[str, ...] = ()


def parse_row(row: Row, *, layout: Layout[Made] | None) -> Made:
    """Return what a layout makes of a row; a file whose rows have columns has a layout. Raises `RowError`."""
    assert layout is not None
    return layout.parse(row.columns)


class Layouts(Mapping[str, Layout[Made]]):
    """The layouts of one kind of row by name, in the order in which `detect` tries them.

    `reads`: optional columns that all of them read.
    """

    def __init__(self, reads: tuple[str, ...] = ()) -> None:
        self._reads = reads
        self._layouts: dict[str, Layout[Made]] = {}

    def register(
        self,
        name: str,
        summary: str,
        *,
        needs: tuple[str, ...] = (),
        reads: tuple[str, ...] = (),
        fits: Callable[[Columns], bool] | None = None,
        order: int = 0,
        labelled: bool = False,
        labels: tuple[str, ...] = (),
    ) -> Callable[[Callable[[Columns], Made]], Callable[[Columns], Made]]:
        """Return a decorator that registers the function of a row as the layout `name`.

        A row fits if it has all columns of `needs`; `fits` replaces this rule. Layouts are tried by `order`, then in
        order of registration: a layout whose columns other files may have too comes late.
        """

        def add(function: Callable[[Columns], Made]) -> Callable[[Columns], Made]:
            if name == AUTO or name in self._layouts:
                raise SettingError(f"layout: got {name!r} for a new layout; that name is taken")
            has_all = fits or (lambda row: row.keys() >= set(needs))
            columns = (*reads, *labels, *self._reads)
            self._layouts[name] = Layout(name, summary, needs, columns, has_all, function, order, labelled, labels)
            return function

        return add

    def detect(self, row: Columns) -> Layout[Made] | None:
        """Return the first layout that fits these columns, `None` if none does."""
        return next((layout for layout in self.values() if layout.fits(row)), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in order of registration, for messages; iteration is in the order of `detect`."""
        return tuple(self._layouts)

    def __getitem__(self, name: str) -> Layout[Made]:
        return self._layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._layouts, key=lambda name: self._layouts[name].order))

    def __len__(self) -> int:
        return len(self._layouts)


def check_layout(name: str, layouts: Collection[str]) -> None:
    """Raise `SettingError` for a name that is neither a layout's nor `AUTO`."""
    if name != AUTO and name not in layouts:
        raise SettingError(f"layout: got {name!r}; allowed: {', '.join((AUTO, *layouts))}")


def columns_of(layouts: Iterable[Layout[object]]) -> set[str]:
    """Return the columns that any of these layouts reads."""
    return {name for layout in layouts for name in (*layout.needs, *layout.reads)}


def check_columns(columns: ColumnNames | None, known: Collection[str]) -> None:
    """Raise `SettingError` if `columns` maps a name that no layout reads; any may be null, which leaves it out."""
    unknown = sorted({ours for ours, theirs in (columns or {}).items() if theirs is not None} - set(known))
    if unknown:
        raise SettingError(
            f"columns: got {', '.join(unknown)}; allowed (our name: the file's): {', '.join(sorted(known))}"
        )
