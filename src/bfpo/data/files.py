"""Files to rows: JSON lines, JSON documents, CSV and Parquet, with the place of every row and no tracebacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bfpo.core.errors import DataError, first_line
from bfpo.core.inputs import ALLOWED_KINDS, kind_of
from bfpo.data.byte_lines import iter_lines
from bfpo.data.csv_rows import iter_csv_rows
from bfpo.data.row import Row, RowError, too_long

__all__ = ["MAX_DOCUMENT_BYTES", "iter_rows", "text_rows"]

MAX_DOCUMENT_BYTES = 1 << 26
"""64 MiB: a JSON array or object over many lines is read whole, and a longer one must be written as JSON lines."""

_ROWS_PER_BATCH = 1024
_CONVERT = "write one object per line (JSON lines), for example with `jq -c '.[]'`"


def iter_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file of any kind; blank lines are no rows.

    Raises `DataError` where the file as a whole cannot be read: absent, a folder, an unknown kind, damaged.
    """
    kind = kind_of(file)
    if not file.is_file():
        what = "is a folder, a file is needed" if file.is_dir() else "no such file"
        raise DataError.at(file, None, what)
    if kind is None:
        raise DataError.at(file, None, f"got a file of unknown kind; {ALLOWED_KINDS}")
    if kind[0] == ".parquet":
        yield from _parquet_rows(file)
    elif kind[0] in (".csv", ".tsv"):
        yield from iter_csv_rows(file, "," if kind[0] == ".csv" else "\t")
    else:
        yield from _json_rows(file, one_document=kind[0] == ".json")


def text_rows(file: Path) -> Iterator[Row]:
    """Yield the lines of a text file that hold more than white space, each as `{"text": line}`; of any line ends."""
    for line, raw in iter_lines(file):
        if raw is None:
            yield Row(line, {}, too_long())
        elif raw.strip():
            try:
                parts = raw.decode("utf-8").split("\r")
            except UnicodeDecodeError as error:
                yield Row(line, {}, _not_utf8(error))
            else:
                yield from (Row(line, {"text": part.rstrip("\n")}) for part in parts if part.strip())


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError("row", "invalid UTF-8", error.object[error.start : error.start + 20])


# --------------------------------------------------------------------------------------------------------- JSON


def _json_rows(file: Path, *, one_document: bool) -> Iterator[Row]:
    """Yield the rows of JSON lines, of an array, or (`one_document`) the one row of an object over several lines."""
    lines = iter_lines(file)
    started = False
    for line, raw in lines:
        content = b"" if raw is None else raw.strip()
        if raw is not None and not content:
            continue
        row = Row(line, {}, too_long()) if raw is None else None
        if not started and raw is not None and content.startswith(b"["):
            yield from _array_rows(file, line, raw + _rest(file, lines))
            return
        row = row or _json_row(line, content)
        if not started and one_document and row.bad is not None and content.startswith(b"{"):
            yield from _object_rows(file, line, raw or b"", row)
            return
        started = True
        yield row


def _json_row(line: int, content: bytes) -> Row:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(line, {}, _not_utf8(error))
    except (ValueError, RecursionError):
        return Row(line, {}, RowError("row", "invalid JSON", content[:60].decode("utf-8", "replace")))
    return _value_row(line, value)


def _value_row(line: int, value: object) -> Row:
    return Row(line, value) if isinstance(value, dict) else Row(line, {}, RowError("row", "not an object", value))


def _rest(file: Path, lines: Iterator[tuple[int, bytes | None]]) -> bytes:
    """Return what follows in the file, as long as it may be."""
    parts: list[bytes] = []
    num_bytes = 0
    for line, raw in lines:
        num_bytes += MAX_DOCUMENT_BYTES + 1 if raw is None else len(raw)
        if raw is None or num_bytes > MAX_DOCUMENT_BYTES:
            raise DataError.at(file, line, f"a JSON array of more than {MAX_DOCUMENT_BYTES} bytes; {_CONVERT}")
        parts.append(raw)
    return b"".join(parts)


def _array_rows(file: Path, line: int, content: bytes) -> Iterator[Row]:
    """Yield the elements of an array one by one, each with the line it starts on."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + content.count(b"\n", 0, error.start)
        raise DataError.at(file, at, f"invalid UTF-8 in a JSON array; {_CONVERT}") from None
    decoder = json.JSONDecoder()
    place = _after_space(text, text.index("[") + 1)
    counted = 0
    try:
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            value, place = decoder.raw_decode(text, place)
            yield _value_row(line, value)
            place = _after_space(text, place)
            if text[place : place + 1] == ",":
                place = _after_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise ValueError("neither a comma nor the end follows an element")
        if text[place + 1 :].strip():
            raise ValueError("more follows after its end")
    except (ValueError, RecursionError) as error:
        at = line + text.count("\n", counted, place)
        raise DataError.at(file, at, f"the JSON array is damaged: {_short(error)}; mend it, or {_CONVERT}") from None


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _short(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _object_rows(file: Path, line: int, first: bytes, row: Row) -> Iterator[Row]:
    """Yield the one row of an object that fills the file; else the file is JSON lines whose first row is bad."""
    head = bytearray(first)
    for number, raw in iter_lines(file):
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
    for number, raw in iter_lines(file):
        if number > line and (raw is None or raw.strip()):
            yield Row(number, {}, too_long()) if raw is None else _json_row(number, raw.strip())


# ------------------------------------------------------------------------------------------------------ Parquet


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            line = 0
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH):
                for columns in batch.to_pylist():
                    line += 1
                    yield Row(line, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError.at(file, None, f"cannot be read as Parquet: {first_line(error)}") from error
