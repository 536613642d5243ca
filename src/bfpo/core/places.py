"""Texts without places of this machine, for cards that leave it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["without_places"]

# `~/`, `/` before two names or more, or a drive; then folders; the name that follows stays.
_NAME = r"[^\s|,;:'\"`()<>/\\]+"
_ALONE = r"(?<![\w/.~>)-])"  # not in the middle of another path or an address
_PATH = re.compile(rf"{_ALONE}(?<!:)(?:~/|/(?={_NAME}/)|[A-Za-z]:\\)(?:{_NAME}[/\\])*(?=[^\s/\\])")


def without_places(text: str) -> str:
    """Return the text with absolute paths shortened: to what is below the current or the home folder, else to the name.

    Addresses (`https://...`) stay as they are.
    """
    folders = sorted({str(Path.cwd()), _home()} - {"", "/"}, key=len, reverse=True)
    for folder in folders:
        text = re.sub(rf"(?:{_ALONE}|(?<=://)|(?<=:///)){re.escape(folder)}/", "", text)  # also of file:///...
    return _PATH.sub("", text)


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:
        return ""
