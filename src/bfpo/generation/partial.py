"""The completions that an unfinished run has made: rows appended as they come, read again when it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bfpo.generation.engines import Made

__all__ = ["append_made", "read_made"]

_KEYS = {field.name for field in fields(Made)}


def append_made(path: Path, made: Sequence[Made]) -> None:
    """Append the rows and see them on the disk, behind whatever a killed run left."""
    with path.open("ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":  # a killed run left half a row
            file.write(b"\n")
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in made)
        file.write(lines.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def read_made(path: Path) -> dict[str, Made]:
    """Return the whole rows by id; half a row, left by a killed run, is made again."""
    if not path.exists():
        return {}
    made: dict[str, Made] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() == _KEYS:
            made[row["id"]] = Made(**row)
    return made


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last
