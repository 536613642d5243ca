"""Names of files on the hub that are read without a copy on this disk: `hf://datasets/ORG/NAME@COMMIT/PATH`."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["file_name", "is_pinned", "is_remote", "remote_name"]

_PINNED = re.compile(r"hf:/{1,2}datasets/[^/@]+(/[^/@]+)?@[0-9a-f]{40}/.+")


def remote_name(hub_id: str, commit: str, path: str) -> str:
    """Return the name of a file of a data set at a commit, as `huggingface_hub.HfFileSystem` takes it."""
    return f"hf://datasets/{hub_id}@{commit}/{path}"


def is_remote(path: str | Path) -> bool:
    """Whether a path names a file on the hub; `Path` writes `hf://` as `hf:/`."""
    return _text(path).startswith("hf:/")


def is_pinned(path: str | Path) -> bool:
    """Whether a path names a file of a data set of the hub at a commit, so that its content cannot change."""
    return _PINNED.fullmatch(_text(path)) is not None


def file_name(path: str | Path) -> str:
    """Return a path as text, one on the hub with `hf://`."""
    return f"hf://{_text(path)[3:].lstrip('/')}" if is_remote(path) else str(path)


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path
