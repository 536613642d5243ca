"""Files written whole or not at all, and the hash of a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["file_digest", "write_bytes_whole", "write_text_whole"]


def write_bytes_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; makes its folder.

    Raises `OSError`; the old content then stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text_whole(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that a reader sees the old content or the new, never a part."""
    write_bytes_whole(path, text.encode("utf-8"))


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as hex; raises `OSError` where it cannot be read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
