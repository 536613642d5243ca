"""Atomic writes, file hashes, the user's cache folder, and detection of a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["file_digest", "is_disk_full", "open_whole", "user_cache_folder", "write_bytes_whole", "write_text_whole"]

# Messages of a full disk that is not an OSError: the first two from safetensors, the others from torch.save.
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos ")


@contextmanager
def open_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for an atomic write: it gets its name when all content is on disk. Creates the folder.

    Raises `OSError`. After any exception the old content is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex[:16]}.part")  # several machines may share the folder
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes_whole(path: str | Path, content: bytes) -> None:
    """Write a file atomically; creates its folder. Raises `OSError`, and then keeps the old content."""
    with open_whole(path) as file:
        file.write(content)


def write_text_whole(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically, as `write_bytes_whole` does."""
    write_bytes_whole(path, text.encode("utf-8"))


def user_cache_folder(part: str) -> Path:
    """Return the cache folder `bfpo/PART` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Without a home folder it is in the system's folder for temporary files.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        root = Path(tempfile.gettempdir())
    return root / "bfpo" / part


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as hex; raises `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one in its chain of causes, reports a full disk or quota."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, Exception) and any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
