"""Files to rows: JSON lines, JSON documents, CSV, Parquet and Arrow, each row with its line number."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from bfpo.core.console import one_line
from bfpo.core.errors import DataError, first_line
from bfpo.core.inputs import ALLOWED_KINDS, kind_of, no_such_file
from bfpo.core.remote import is_remote
from bfpo.data.columnar import check_names_differ, table_rows
from bfpo.data.fields import ColumnNames
from bfpo.data.hub_stream import open_lines, open_packed
from bfpo.data.layouts import Layout
from bfpo.data.messages import parsed_conversation, parsed_transcript
from bfpo.data.rejects import CellText, Reject, Row, RowError, describe_rejects

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "MAX_LEVELS",
    "MAX_LINE_BYTES",
    "attempt",
    "first_that_fits",
    "iter_rows",
    "made_or_error",
    "mapped_rows",
    "text_rows",
]

Item = TypeVar("Item")

MAX_LINE_BYTES = 1 << 26
"""64 MiB: a longer line is a bad row, so that a file without line ends cannot fill the memory."""
MAX_LEVELS = 100
MAX_DOCUMENT_BYTES = 1 << 26
"""64 MiB: an object over many lines is read whole, and a longer one is read as JSON lines."""

_BLOCK_BYTES = 1 << 20
_FIRST_BYTES = 1 << 12
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_BEHIND = frozenset(",] \t\r\n")
_ANSWERS = ("chosen", "rejected", "completion", "text")
_CONVERT = "write one object per line (JSON lines), for example with `jq -c '.[]'`"


def iter_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file of any kind, of this disk or on the hub; blank lines are skipped.

    Raises `DataError` if the file as a whole cannot be read: missing, a folder, an unknown kind, damaged.
    """
    kind = kind_of(file)
    if not is_remote(file) and not file.is_file():
        what = "is a folder, a file is needed" if file.is_dir() else no_such_file(file)
        raise DataError.at(file, None, what)
    if kind is None:
        raise DataError.at(file, None, f"got a file of unknown kind; {ALLOWED_KINDS}")
    if kind[0] in (".parquet", ".arrow"):
        yield from table_rows(file, kind[0])
    elif kind[0] in (".csv", ".tsv"):
        yield from _csv_rows(file, "," if kind[0] == ".csv" else "\t")
    else:
        yield from _json_rows(file, one_document=kind[0] == ".json")


def text_rows(file: Path) -> Iterator[Row]:
    """Yield the lines of a text file that are not blank, each as `{"text": line}`; with any kind of line ending."""
    for line, raw in _lines(file):
        if raw is None:
            yield Row(line, {}, _too_long())
        elif raw.strip():
            try:
                parts = raw.decode("utf-8").split("\r")
            except UnicodeDecodeError as error:
                yield Row(line, {}, _not_utf8(error))
            else:
                yield from (Row(line, {"text": part.rstrip("\n")}) for part in parts if part.strip())


def _too_long() -> RowError:
    """Return the error for a line beyond the limit."""
    return RowError("row", f"line longer than {MAX_LINE_BYTES} bytes")


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError("row", "invalid UTF-8", error.object[error.start : error.start + 20])


# ----------------------------------------------------------------------------------------- rows under our names


def mapped_rows(file: Path, columns: ColumnNames | None, *, cells_only: bool = False) -> Iterator[Row]:
    """Yield the rows of a file, with columns renamed to ours by `columns`, and texts of conversations as messages.

    `cells_only`: only in CSV, which cannot hold messages otherwise, and no transcripts. Raises `DataError` as
    `iter_rows`.
    """
    return (_with_conversations(_renamed(row, columns), cells_only) for row in iter_rows(file))


def _renamed(row: Row, columns: ColumnNames | None) -> Row:
    """Rename the columns to ours; a name mapped to null or to a column that the row lacks counts as absent."""
    if not columns:
        return row
    kept = {name: value for name, value in row.columns.items() if name not in columns}
    mapped = {
        ours: row.columns[theirs] for ours, theirs in columns.items() if theirs is not None and theirs in row.columns
    }
    return Row(row.line, {**kept, **mapped}, row.bad)


def _with_conversations(row: Row, cells_only: bool) -> Row:
    kind = CellText if cells_only else str
    found = {name: parsed_conversation(value) for name, value in row.columns.items() if isinstance(value, kind)}
    if "prompt" in found and not cells_only and not isinstance(row.columns.get("chosen"), list):
        turns = parsed_transcript(found["prompt"])
        if turns is not found["prompt"]:  # the space behind its last `Assistant:` begins the answers
            texts = [name for name in _ANSWERS if name in found and found[name] is row.columns[name]]
            found |= {"prompt": turns, **{name: found[name].removeprefix(" ") for name in texts}}
    read = {name: value for name, value in found.items() if value is not row.columns[name]}
    return Row(row.line, {**row.columns, **read}, row.bad, tuple(read)) if read else row


def first_that_fits(
    file: Path, rows: Iterable[Row], layouts: Iterable[Layout[Item]], *, others: Iterable[Layout[Item]] = ()
) -> Layout[Item] | None:
    """Return the first layout that fits the first row which fits any; `None` if no row has columns.

    `others` are not detected, but named where one of them fits. Raises `DataError`, with what the layouts need, if rows
    have columns but fit no layout.
    """
    known = list(layouts)
    first: Row | None = None
    for row in rows:
        if row.bad is not None:
            continue
        first = first or row
        layout = next((layout for layout in known if layout.fits(row.columns)), None)
        if layout is not None:
            return layout
    if first is None:
        return None
    seen = ", ".join(map(one_line, first.columns)) or "none"
    needs = "; ".join(f"{layout.name} needs {', '.join(layout.needs)}" for layout in known if layout.needs)
    what = f"the columns fit no layout; columns seen: {seen}; layouts: {needs}"
    if fitting := next((other for other in others if other.fits(first.columns)), None):
        what = f"the columns are those of {fitting.summary}, which `layout: {fitting.name}` reads; {what}"
    raise DataError.at(file, first.line, f"{what}. `columns` renames (our name: the file's)")


def attempt(make: Callable[[Row], Item], file: str | Path, row: Row) -> Item | Reject:
    """Return what `make` returns for a row, or the reject with its error."""
    try:
        if row.bad is not None:
            raise row.bad
        return make(row)
    except RowError as bad:
        return Reject.of(Path(file), row.line, bad)


def made_or_error(file: Path, rows: Iterable[Row], make: Callable[[Row], Item]) -> list[Item]:
    """Return what `make` returns for each row; raises `DataError` if any row is bad."""
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


# --------------------------------------------------------------------------------------------------------- JSON


def _json_rows(file: Path, *, one_document: bool) -> Iterator[Row]:
    """Yield the rows of JSON lines, of an array, or (`one_document`) the one row of an object over several lines."""
    if _begins_an_array(file):
        yield from _array_rows(file)
        return
    started = False
    for line, raw in _lines(file):
        content = b"" if raw is None else raw.strip()
        if raw is not None and not content:
            continue
        row = Row(line, {}, _too_long()) if raw is None else _json_row(line, content)
        if not started and one_document and row.bad is not None and content.startswith(b"{"):
            yield from _object_rows(file, line, raw or b"", row)
            return
        started = True
        yield row


class _RepeatedKeyError(ValueError):
    """An object that has a key twice, of which JSON's own rule would take the last value."""


def _object_of(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        raise _RepeatedKeyError(Counter(name for name, _ in items).most_common(1)[0][0])
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def _repeated(error: _RepeatedKeyError) -> RowError:
    return RowError("row", "an object has a key twice", str(error))


def _json_row(line: int, content: bytes) -> Row:
    try:
        value = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(line, {}, _not_utf8(error))
    except _RepeatedKeyError as error:
        return Row(line, {}, _repeated(error))
    except RecursionError:
        return Row(line, {}, _too_deep())
    except ValueError:
        return Row(line, {}, RowError("row", "invalid JSON", content[:60].decode("utf-8", "replace")))
    return _value_row(line, value, content.count(b"[") + content.count(b"{"))


def _value_row(line: int, value: object, brackets: int) -> Row:
    """Return the row of a JSON value whose text has this many opening brackets."""
    if brackets > MAX_LEVELS and _levels(value) > MAX_LEVELS:
        return Row(line, {}, _too_deep())
    return Row(line, value) if isinstance(value, dict) else Row(line, {}, RowError("row", "not an object", value))


def _levels(value: object) -> int:
    levels, inside = 0, [value]
    while inside := [each for each in inside if isinstance(each, (dict, list))]:
        levels += 1
        inside = [item for each in inside for item in (each.values() if isinstance(each, dict) else each)]
    return levels


def _too_deep() -> RowError:
    return RowError("row", f"lists and objects nested more than {MAX_LEVELS} levels deep")


def _begins_an_array(file: Path) -> bool:
    with _open_bytes(file) as stream:
        content = stream.read(_FIRST_BYTES).removeprefix(_BOM).lstrip(_SPACE)
        while not content and (block := stream.read(_FIRST_BYTES)):
            content = block.lstrip(_SPACE)
    return content.startswith(b"[")


def _array_rows(file: Path) -> Iterator[Row]:
    """Yield the elements of an array one by one, each with the line it starts on; no more than one is in memory."""
    with _open_bytes(file) as stream:
        text = _ArrayText(file, stream)
        try:
            text.pass_mark()
            while text.mark() != "]":
                yield text.element()
                if text.mark() == ",":
                    text.pass_mark()
                    text.mark()
                elif text.mark() != "]":
                    raise ValueError("an element is followed by neither a comma nor the end of the array")
            text.pass_mark()
            if text.mark():
                raise ValueError("more text follows its end")
        except DataError:  # of the file, with its line
            raise
        except (ValueError, RecursionError) as error:
            what = f"the JSON array is damaged: {_short(error)}; fix it, or {_CONVERT}"
            raise DataError.at(file, text.line, what) from None


class _ArrayText:
    """The text of an array from a place on: what was passed is dropped, and more is read when it is needed."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode, self._decode_any = _DECODER.raw_decode, json.JSONDecoder().raw_decode
        self._text, self._place, self._ended = "", 0, False
        self.line = 1
        """The line of the place."""

    def mark(self) -> str:
        """Go to the next character that is not white space and return it; empty at the end of the file."""
        while True:
            self._go_to(_after_space(self._text, self._place))
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read_more()

    def pass_mark(self) -> None:
        """Go behind the character that `mark` returns."""
        self.mark()
        self._go_to(self._place + 1)

    def element(self) -> Row:
        """Return the value at the place as a row and go behind it; raises `ValueError` or `RecursionError`."""
        repeated: _RepeatedKeyError | None = None
        while True:
            try:
                try:
                    value, end = self._decode(self._text, self._place)
                except _RepeatedKeyError as error:
                    repeated = error
                    value, end = self._decode_any(self._text, self._place)
                if isinstance(value, (int, float)) and self._text[end : end + 1] not in _BEHIND and not self._ended:
                    raise ValueError("a number is not followed by a comma")  # or it goes on in the next block
                break
            except ValueError as error:  # damaged, or cut at the end of what was read
                if self._ended:
                    raise
                if len(self._text) - self._place > MAX_LINE_BYTES:
                    what = f"{_short(error)}, or an element is longer than {MAX_LINE_BYTES} characters"
                    raise ValueError(what) from None
            self._read_more()
        brackets = self._text.count("[", self._place, end) + self._text.count("{", self._place, end)
        row = _value_row(self.line, value, brackets)
        row = row if repeated is None else Row(self.line, {}, _repeated(repeated))
        self._go_to(end)
        return row

    def _go_to(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read_more(self) -> None:
        """Read a block, or as much again as there is, so that a long element is tried few times."""
        rest = self._text[self._place :]
        block = self._stream.read(max(_BLOCK_BYTES, len(rest)))
        self._ended = not block
        try:
            self._text, self._place = rest + self._utf8.decode(block, final=self._ended), 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError.at(self._file, line, f"invalid UTF-8 in a JSON array; {_CONVERT}") from None


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _short(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _object_rows(file: Path, line: int, first: bytes, row: Row) -> Iterator[Row]:
    """Yield the one row of an object that fills the file; else the file is JSON lines whose first row is bad."""
    head = bytearray(first)
    for number, raw in _lines(file):
        if number > line:
            head += raw or b"x" * (MAX_DOCUMENT_BYTES + 1)
        if len(head) > MAX_DOCUMENT_BYTES:
            break
    whole = _json_row(line, bytes(head)) if len(head) <= MAX_DOCUMENT_BYTES else row
    del head
    if whole.bad is None:
        yield whole
        return
    yield row
    for number, raw in _lines(file):
        if number > line and (raw is None or raw.strip()):
            yield Row(number, {}, _too_long()) if raw is None else _json_row(number, raw.strip())


# ---------------------------------------------------------------------------------------------------------- CSV


def _csv_rows(file: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, whose first row names the columns; every cell is a `CellText`.

    Raises `DataError` for a file without such a row or with two columns of one name.
    """
    # The default limit of 128 KiB is too small for a long conversation. It is global to the process and only raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    lines = _TextLines(file)
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
            if len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:]):  # else quotes would be text
                reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        else:
            yield _row(line, names, cells)


class _TextLines:
    """The text lines of a file, for a reader that continues after an error; `number` is the last line read."""

    def __init__(self, file: Path) -> None:
        self._lines = _lines(file)
        self.number = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        if raw is None:
            raise _LongLineError
        return raw.decode("utf-8", "surrogateescape")  # invalid UTF-8 is reported with its cell


class _LongLineError(Exception):
    """A line beyond the limit."""


def _bad(error: Exception, last_line: int) -> RowError:
    if isinstance(error, _LongLineError):
        return _too_long()
    return RowError("row", "broken CSV (quotes or line ends)", f"{error}, up to line {last_line}")


def _checked_names(file: Path, line: int, cells: list[str]) -> list[str]:
    if any(_holds_bad_bytes(cell) for cell in cells):
        raise DataError.at(file, line, "the row that names the columns is not UTF-8; save the file as UTF-8")
    names = [cell.strip() for cell in cells]
    check_names_differ(file, line, [name for name in names if name])  # an index column has no name
    return names


def _row(line: int, names: list[str], cells: list[str]) -> Row:
    if len(cells) != len(names):
        return Row(line, {}, RowError("row", "wrong number of fields", f"{len(cells)} of {len(names)}"))
    for name, cell in zip(names, cells, strict=True):
        if _holds_bad_bytes(cell):
            return Row(line, {}, RowError(name or "row", "invalid UTF-8", cell.encode("utf-8", "surrogateescape")[:20]))
    return Row(line, {name: CellText(cell) for name, cell in zip(names, cells, strict=True) if name})


def _holds_bad_bytes(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


# -------------------------------------------------------------------------------------------------------- lines


def _lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield number (from 1) and content of each line, without a byte-order mark; `None` for one that is too long.

    Lines end with a line feed, which is kept. Raises `DataError` as `_open_bytes`.
    """
    with _open_bytes(file) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                _skip_line(stream, line)
                yield number, None
            else:
                yield number, line.removeprefix(_BOM) if number == 1 else line


def _skip_line(stream: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(_BLOCK_BYTES)


@contextmanager
def _open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed according to its suffix (.gz, .zst, .xz).

    Raises `DataError` if it cannot be read to its end, also inside the `with` block.
    """
    suffix = file.suffix.lower()
    try:
        with _opened(file, suffix) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError.at(file, None, f"cannot be read to its end: {first_line(error)}") from error


def _opened(file: Path, suffix: str) -> BinaryIO:
    if suffix in (".gz", ".xz"):
        packed: Any = open_packed(file) if is_remote(file) else str(file)
        return cast(BinaryIO, gzip.open(packed, "rb") if suffix == ".gz" else lzma.open(packed, "rb"))
    there: Any = open_lines(file) if is_remote(file) else str(file)
    if suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, BufferedReader(pyarrow.input_stream(there, compression="zstd")))
    return cast(BinaryIO, there) if is_remote(file) else file.open("rb")
