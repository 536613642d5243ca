"""Parquet and Arrow files to rows: the values of a table's columns as Python holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bfpo.core.errors import DataError, first_line
from bfpo.core.remote import is_remote
from bfpo.data.hub_stream import open_lines, open_table
from bfpo.data.rejects import Row

__all__ = ["check_names_differ", "table_rows"]

_ROWS_PER_BATCH = 1024
_BLOCK_BYTES = 1 << 20
_REQUEST_BYTES = 1 << 22  # of a column in Parquet on the hub: fewer requests, and memory for as much of each column
_ARROW_FILE = b"ARROW1"


def table_rows(file: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of a file of this kind, .parquet or .arrow. Raises `DataError` if it cannot be read."""
    import pyarrow

    try:
        with _batches(file, kind) as (schema, batches):
            check_names_differ(file, None, schema.names)
            nested = [name for name, type_ in zip(schema.names, schema.types, strict=True) if _holds_objects(type_)]
            line = 0
            for batch in batches:
                values = [_values(name, column) for name, column in zip(schema.names, batch.columns, strict=True)]
                for of_row in zip(*values, strict=True):
                    line += 1
                    columns = dict(zip(schema.names, of_row, strict=True))
                    yield Row(line, {**columns, **{name: _without_nulls(columns[name]) for name in nested}})
    except (pyarrow.ArrowException, OSError) as error:
        name = "Parquet" if kind == ".parquet" else "Arrow"
        raise DataError.at(file, None, f"cannot be read as {name}: {first_line(error)}") from error


def _values(name: str, column: Any) -> list[Any]:
    """Return the values of a column; times that Python cannot hold, of nanoseconds and of far years, as text.

    Raises `ArrowInvalid`, which names the column.
    """
    import pyarrow

    try:
        try:
            found = column.to_pylist()
        except (ValueError, OverflowError):
            if not pyarrow.types.is_temporal(column.type):
                raise
            found = column.cast(pyarrow.string()).to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise pyarrow.ArrowInvalid(f"column {name}: {first_line(error)}") from error
    return cast("list[Any]", found)


@contextmanager
def _batches(file: Path, kind: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yield the schema and the batches of a file; Arrow is a stream, as `datasets` writes it, or a file."""
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        # pyarrow would otherwise hold all that it has read, and at least a whole row group.
        there, block = (open_table(file), _REQUEST_BYTES) if is_remote(file) else (file, _BLOCK_BYTES)
        with pyarrow.parquet.ParquetFile(there, pre_buffer=False, buffer_size=block) as table:
            yield table.schema_arrow, table.iter_batches(batch_size=_ROWS_PER_BATCH)
        return
    with pyarrow.PythonFile(open_lines(file)) if is_remote(file) else pyarrow.memory_map(str(file)) as source:
        is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        yield reader.schema, (part for batch in batches for part in _slices(batch))


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, _ROWS_PER_BATCH) for start in range(0, batch.num_rows, _ROWS_PER_BATCH))


def _holds_objects(type_: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(type_):
        return True
    return any(_holds_objects(type_.field(place).type) for place in range(type_.num_fields))


def _without_nulls(value: Any) -> Any:
    """Leave out the null keys of objects: all objects of a column have the same keys, absent ones are null.

    A map, of which pyarrow makes a list of tuples, is an object too.
    """
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def check_names_differ(file: Path, line: int | None, names: Sequence[str]) -> None:
    """Raise `DataError` where two columns have one name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError.at(file, line, f"two columns have the name {', '.join(map(repr, twice))}; rename one")
