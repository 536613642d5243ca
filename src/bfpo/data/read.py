"""Files to pairs and completions; a bad row is a `Reject` with its position, never an exception."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from bfpo.core.inputs import expand_files
from bfpo.core.remote import file_name
from bfpo.core.schema import Completion, Pair
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS, plain_completion
from bfpo.data.fields import ColumnNames
from bfpo.data.files import attempt, first_that_fits, iter_rows, made_or_error, mapped_rows
from bfpo.data.labels import NO_WORDS, LabelWords
from bfpo.data.layouts import AUTO, Layout, Layouts, check_columns, check_layout, columns_of
from bfpo.data.messages import is_absent
from bfpo.data.notes import FileNotes
from bfpo.data.pair_layouts import PAIR_LAYOUTS, UNPAIRED_LAYOUTS
from bfpo.data.rejects import DUPLICATE_ID, ReadResult, Reject, Row, RowError
from bfpo.data.thinking import Thinking, without_thought

__all__ = [
    "COMPLETIONS",
    "RAW",
    "PairIds",
    "SeenNames",
    "iter_completions",
    "iter_pairs",
    "read_completions",
    "read_pairs",
]

Made = TypeVar("Made")

COMPLETIONS = "completions.jsonl"  # of `bfpo generate`
RAW = "completions.raw.jsonl"  # the whole texts of those whose thoughts it put apart

_LINES = 1 << 40  # above any line number: a file's number and a line are packed into one integer
_FIRST_SLOTS = 1 << 10


# -------------------------------------------------------------------------------------------------------- pairs


def read_pairs(
    files: Sequence[str | Path],
    *,
    layout: str = AUTO,
    columns: ColumnNames | None = None,
    source: str | None = None,
    labels: LabelWords = NO_WORDS,
    check: Callable[[Pair], None] | None = None,
) -> ReadResult:
    """Read preference pairs from JSON lines or documents, CSV, Parquet and Arrow; a folder stands for its files.

    `layout` names one of `PAIR_LAYOUTS` or `UNPAIRED_LAYOUTS`; `"auto"` decides for each file from its first row whose
    columns fit one of pairs, and `ReadResult.layouts` says which. `columns` maps a name that the layout knows to the
    file's name for it. `source` replaces the rows' own. A row without an id gets one from its content, with `-2`, `-3`
    for repetitions. `labels`: what label columns hold in place of true and false.

    Raises `SettingError` for an unknown layout or a name no layout knows, `DataError` for a file that cannot be read
    or fits no layout. Bad rows are in `ReadResult.rejects`.
    """
    rejects: list[Reject] = []
    pairs: list[Pair] = []
    layouts: dict[str, str] = {}
    notes = FileNotes()
    rows = iter_pairs(
        files,
        layout=layout,
        columns=columns,
        source=source,
        layouts=layouts,
        labels=labels,
        check=check,
        notes=notes,
    )
    for item in rows:
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            pairs.append(item)
    return ReadResult(rejects, len(pairs) + len(rejects), pairs, layouts, notes.facts())


def iter_pairs(
    files: Sequence[str | Path],
    *,
    layout: str = AUTO,
    columns: ColumnNames | None = None,
    source: str | None = None,
    layouts: dict[str, str] | None = None,
    ids: PairIds | None = None,
    labels: LabelWords = NO_WORDS,
    check: Callable[[Pair], None] | None = None,
    notes: FileNotes | None = None,
) -> Iterator[Pair | Reject]:
    """Yield the pair or reject of each row, in order, without keeping rows; otherwise as `read_pairs`.

    `layouts` is filled with the layout of each file, `notes` with what is said about it. `ids`: for callers that read
    the same files more than once. `check` raises `RowError` for a pair that cannot be used.
    """
    ids = ids or PairIds()
    known = UNPAIRED_LAYOUTS if layout in UNPAIRED_LAYOUTS else PAIR_LAYOUTS
    others = UNPAIRED_LAYOUTS.values()
    for file, found in _files_with_layouts(files, known, layout, columns, layouts, notes, others=others):
        ids.start(file)
        make = partial(_pair_of, layout=found, source=source, ids=ids, labels=labels, check=check)
        for row in _rows(file, columns, found, notes):
            ids.next_row()
            yield attempt(make, file, row)


def _pair_of(
    row: Row,
    *,
    layout: Layout[Pair] | None,
    source: str | None,
    ids: PairIds,
    labels: LabelWords,
    check: Callable[[Pair], None] | None,
) -> Pair:
    assert layout is not None  # a file whose rows have columns has a layout
    columns = row.columns if source is None else {**row.columns, "source": source}
    pair = layout.parse(labels.applied(columns, layout.labels) if labels else columns)
    if check is not None:
        check(pair)
    return ids.claim(pair, row)


def _rows(
    file: Path, columns: ColumnNames | None, layout: Layout[Made] | None, notes: FileNotes | None
) -> Iterator[Row]:
    if notes is None or layout is None:
        return mapped_rows(file, columns)
    return notes.rows(file, columns, (*layout.needs, *layout.reads))


def _files_with_layouts(
    files: Sequence[str | Path],
    known: Layouts[Made],
    layout: str,
    columns: ColumnNames | None,
    layouts: dict[str, str] | None,
    notes: FileNotes | None,
    *,
    others: Iterable[Layout[Made]] = (),
) -> Iterator[tuple[Path, Layout[Made] | None]]:
    """Yield each file with its layout, `None` if no row has columns; fills `layouts` with their names."""
    check_layout(layout, known)
    check_columns(columns, columns_of(known.values()))
    for file in expand_files(files) if notes is None else notes.files(files):
        auto = layout == AUTO
        rows = mapped_rows(file, columns)
        found = first_that_fits(file, rows, known.values(), others=others) if auto else known[layout]
        if found is not None and layouts is not None:
            layouts[file_name(file)] = found.name
        yield file, found


# -------------------------------------------------------------------------------------------------- completions


def iter_completions(
    files: Sequence[str | Path],
    *,
    layout: str = AUTO,
    columns: ColumnNames | None = None,
    layouts: dict[str, str] | None = None,
    labels: LabelWords = NO_WORDS,
    check: Callable[[Completion], None] | None = None,
    notes: FileNotes | None = None,
) -> Iterator[Completion | Reject]:
    """Yield the completion or reject of each row, in order, without keeping rows; a folder stands for its files.

    `layout` names one of `COMPLETION_LAYOUTS`, "auto" decides for each file by its first row that fits one;
    `layouts`, `labels`, `notes` and `check` as in `iter_pairs`. Raises `SettingError` for an unknown layout or column,
    `DataError` for a file that cannot be read or fits no layout.
    """
    for file, found in _files_with_layouts(files, COMPLETION_LAYOUTS, layout, columns, layouts, notes):
        make = partial(_completion_of, layout=found, labels=labels, check=check)
        for row in _rows(file, columns, found, notes):
            yield attempt(make, file, row)


def _completion_of(
    row: Row,
    *,
    layout: Layout[Completion] | None,
    labels: LabelWords,
    check: Callable[[Completion], None] | None,
) -> Completion:
    assert layout is not None
    completion = layout.parse(labels.applied(row.columns, layout.labels) if labels else row.columns)
    if check is not None:
        check(completion)
    return completion


def read_completions(file: str | Path, *, thinking: Thinking | None = None) -> list[Completion]:
    """Read what `write_completions` wrote, or rows of its columns from elsewhere; thoughts are put apart.

    Raises `DataError` for a bad row; an empty completion is allowed. `thinking` as in `without_thought`, except that a
    completion whose thoughts `bfpo generate` put apart is not in an open thought.
    """
    path = Path(file)
    raw = path.with_name(RAW)
    has_raw = path.name == COMPLETIONS and raw.is_file()
    split = {row.columns.get("id") for row in iter_rows(raw)} if has_raw else set()
    of_split = (thinking or Thinking()).model_copy(update={"opened": False})

    def make(row: Row) -> Completion:
        found = plain_completion(row.columns, allow_empty=True)
        return without_thought(found, of_split if found.id in split else thinking)

    return made_or_error(path, iter_rows(path), make)


# ---------------------------------------------------------------------------------------------------------- ids


class PairIds:
    """Ids seen so far: a repeated given id is an error, a repeated id made from content gets a number.

    It takes 24 to 48 bytes per pair; the result of `again` holds only the ids that got a number.
    """

    def __init__(self) -> None:
        self._seen: SeenNames | None = SeenNames()
        self._renamed: dict[int, str] = {}  # by the number of the row: elements of a JSON array may share a line
        self._files: list[str] = []
        self._num_rows = 0

    def start(self, file: Path) -> None:
        """Start the next file."""
        self._files.append(file.name)

    def next_row(self) -> None:
        """Go to the next row, of which a pair may be claimed."""
        self._num_rows += 1

    def again(self) -> PairIds:
        """Return the ids for another pass over the same files: the same ones for the same pairs, and no errors."""
        ids = PairIds()
        ids._seen, ids._renamed = None, self._renamed
        return ids

    def claim(self, pair: Pair, row: Row) -> Pair:
        """Return the pair with a unique id; raises `RowError` for a repeated given id."""
        if self._seen is None:
            name = self._renamed.get(self._num_rows, pair.id)
        else:
            name = self._free_name(self._seen, pair.id, given=not is_absent(row.columns.get("id")))
            self._seen.add(name, (len(self._files) - 1) * _LINES + row.line)
        if name == pair.id:
            return pair
        self._renamed[self._num_rows] = name
        return replace(pair, id=name)

    def _free_name(self, seen: SeenNames, name: str, *, given: bool) -> str:
        free, repetition = name, 1
        while (place := seen.place_of(free)) is not None:
            if given:
                number, line = divmod(place, _LINES)
                raise RowError("id", DUPLICATE_ID, f"{name} (first at {self._files[number]}:{line})")
            repetition += 1
            free = f"{name}-{repetition}"
        return free


class SeenNames:
    """Names with a number each, kept as 64-bit hashes in an open-addressing table of 24 to 48 bytes a name.

    Two of ten million names share a hash with a probability of 3 in a million; the second then counts as seen.
    """

    def __init__(self) -> None:
        self._make_slots(_FIRST_SLOTS)
        self._num = 0

    def _make_slots(self, num: int) -> None:
        self._keys = array("Q", [0]) * num
        self._places = array("Q", [0]) * num
        self._mask = num - 1

    def place_of(self, name: str) -> int | None:
        """Return the number that `add` was given with the name, `None` if it was never added."""
        key = _key(name)
        slot = self._slot(key)
        return self._places[slot] if self._keys[slot] == key else None

    def add(self, name: str, place: int) -> None:
        """Add a name that was not seen; `place` in [0, 2^64)."""
        if 3 * self._num >= 2 * len(self._keys):
            self._grow()
        key = _key(name)
        slot = self._slot(key)
        self._keys[slot], self._places[slot] = key, place
        self._num += 1

    def _slot(self, key: int) -> int:
        """Return the slot that holds the key, or the free one where it belongs."""
        keys, mask = self._keys, self._mask
        slot = key & mask
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, places = self._keys, self._places
        self._make_slots(2 * len(keys))
        for key, place in zip(keys, places, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._places[slot] = key, place


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
