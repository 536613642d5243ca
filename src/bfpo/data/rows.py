"""Files to rows: JSON lines (plain or gzip) and Parquet, with the place of every row and no tracebacks."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bfpo.errors import DataError

__all__ = ["Row", "RowError", "iter_rows", "list_files"]

_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_ALLOWED = "allowed: .jsonl or .json (one object per line), the same with .gz, .parquet"


class RowError(Exception):
    """A row that cannot be used: the field, the reason (a fixed phrase, so that it can be counted) and the value."""

    def __init__(self, field: str, reason: str, value: object = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.value = value


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: `line` counts from 1 (in Parquet, rows); `bad` is set where it has no columns."""

    line: int
    columns: Mapping[str, object]
    bad: RowError | None = None


def iter_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON-lines or Parquet file; blank lines are no rows.

    Raises `DataError` where the file as a whole cannot be read: absent, a folder, an unknown kind, damaged.
    """
    name = file.name.lower()
    if not file.is_file():
        what = "is a folder, a file is needed" if file.is_dir() else "no such file"
        raise DataError.at(file, None, what)
    if name.endswith(_JSON_SUFFIXES):
        yield from _json_rows(file)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(file)
    else:
        raise DataError.at(file, None, f"got a file of unknown kind; {_ALLOWED}")


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders that can be read, sorted by their path; hidden ones do not count.

    Raises `DataError` where there is none.
    """
    found = [
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith((*_JSON_SUFFIXES, ".parquet"))
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not found:
        raise DataError.at(folder, None, f"the folder holds no file that can be read; {_ALLOWED}")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _json_rows(file: Path) -> Iterator[Row]:
    started = False
    for line, raw in _lines(file):
        content = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if not content:
            continue
        if not started and content.startswith(b"["):
            raise DataError.at(file, line, "starts a JSON array; write one object per line (JSON lines)")
        started = True
        yield _json_row(line, content)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError.at(file, None, f"cannot be read to its end: {error}") from error


def _json_row(line: int, content: bytes) -> Row:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(line, {}, RowError("row", "invalid UTF-8", content[error.start : error.start + 20]))
    except (ValueError, RecursionError):
        return Row(line, {}, RowError("row", "invalid JSON", content[:60].decode("utf-8", "replace")))
    if not isinstance(value, dict):
        return Row(line, {}, RowError("row", "not an object", value))
    return Row(line, value)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            line = 0
            for batch in table.iter_batches():
                for columns in batch.to_pylist():
                    line += 1
                    yield Row(line, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError.at(file, None, f"cannot be read as Parquet: {error}") from error
