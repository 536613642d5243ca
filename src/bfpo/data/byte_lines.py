"""Files as lines of bytes, decompressed on the way, none longer than a limit."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

from bfpo.core.errors import DataError, first_line

__all__ = ["MAX_LINE_BYTES", "iter_lines", "open_bytes"]

MAX_LINE_BYTES = 1 << 26
"""64 MiB: a longer line is a bad row, so that a file without line ends cannot fill the memory."""

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file to read what it holds, decompressed by its suffix (.gz, .zst, .xz).

    Raises `DataError` where it cannot be read to its end, also from the block inside.
    """
    suffix = file.suffix.lower()
    try:
        with _opened(file, suffix) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError.at(file, None, f"cannot be read to its end: {first_line(error)}") from error


def _opened(file: Path, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def iter_lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield number (from 1) and content of each line, without a byte-order mark; `None` for one that is too long.

    Lines end with a line feed, which is kept. Raises `DataError` as `open_bytes`.
    """
    with open_bytes(file) as stream:
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
