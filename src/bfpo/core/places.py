"""Texts without places of this machine, for cards that leave it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["without_places"]

# `~/`, `/` or `//` before two names or more, a drive, or a share; then folders; the name that follows stays.
_NAME = r"[^\s|,;:'\"`()<>/\\]+"
_ALONE = r"(?<![\w/.~>)-])"  # not in the middle of another path or an address
_START = rf"~/|//?(?={_NAME}/)|[A-Za-z]:\\|\\\\(?={_NAME}\\)"
_PATH = re.compile(rf"{_ALONE}(?<!:)(?:{_START})(?:{_NAME}[/\\])*(?=[^\s/\\])")


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """Return the text with absolute paths shortened: to what is below the current or the home folder, else to the name.

    Addresses (`https://...`) stay as they are. `known`: texts that are paths, of which also those of one name, such as
    `/model`, or with spaces are shortened.
    """
    folders = sorted({str(Path.cwd()), _home()} - {"", "/"}, key=len, reverse=True)
    for folder in folders:
        text = re.sub(rf"(?:{_ALONE}|(?<=://)|(?<=:///)){re.escape(folder)}/", "", text)  # also of file:///...
    for path in sorted({path.rstrip("/") for path in known if path.startswith("/")} - {""}, key=len, reverse=True):
        name = Path(path).name.replace("\\", r"\\")  # a replacement in which nothing is special
        text = re.sub(rf"{_ALONE}(?<!:){re.escape(path)}/?(?![\w/\\-]|\.\w)", name, text)
    return _PATH.sub("", text)


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:
        return ""
