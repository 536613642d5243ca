"""What is said once about each data file: which files of a folder are read, and what of their rows is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bfpo.core.inputs import choose_files, expand_files
from bfpo.core.remote import file_name
from bfpo.data.fields import ColumnNames
from bfpo.data.files import mapped_rows
from bfpo.data.messages import MESSAGE_KEYS, is_absent
from bfpo.data.rejects import Row

__all__ = ["NOTES", "FileNotes"]

NOTES = ("columns_not_read", "rows_with_conversations_as_text", "splits_read", "prompts_are_numbers")
"""Keys of `FileNotes.facts`, in the facts of a stage."""
_SHOWN, _KEPT, _LONGEST_NAME = 4, 40, 80
_PROMPT_COLUMNS = ("prompt", "instruction", "Behavior", "Goal")  # of the layouts
_WHOLE_NUMBER = re.compile(r"\s*-?\d+(\.0)?\s*")
_FEWEST_NUMBERS = 5  # fewer rows may be sums that a user typed
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class FileNotes:
    """Notes on the files that one stage reads; each is also logged when its file or folder has been read.

    `unread`: file -> columns that held something and that its layout does not read (`messages[].key` for a key of
    messages). `conversations`: file -> number of rows in which text was read as messages. `splits`: folder -> the split
    that was read of several. `numbers`: file -> its column of prompts, if that holds whole numbers alone.
    """

    unread: dict[str, list[str]] = field(default_factory=dict)
    conversations: dict[str, int] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what there is to say, for a stage's counts."""
        found: tuple[dict[str, Any], ...] = (self.unread, self.conversations, self.splits, self.numbers)
        return {name: value for name, value in zip(NOTES, found, strict=True) if value}

    def files(self, paths: Sequence[str | Path]) -> list[Path]:
        """Return `expand_files` of the paths, and say which files of a folder are read."""
        for path in map(Path, paths):
            if not path.is_dir():
                continue
            choice = choose_files(path)
            names = [file.relative_to(path).as_posix() for file in choice.files]
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            split = f" of split {choice.split}" if choice.split else ""
            left = ", ".join(f"{name} ({number})" for name, number in choice.left_out.items())
            _log.info("%s: files%s read: %s%s", path, split, shown, f"; splits not read: {left}" if left else "")
            if choice.left_out:
                self.splits[str(path)] = choice.split
        return expand_files(paths)

    def rows(
        self, file: Path, columns: ColumnNames | None, read: Iterable[str], *, cells_only: bool = False
    ) -> Iterator[Row]:
        """Yield the rows of a file as `mapped_rows` does, and note the columns that are not in `read`."""
        known = {*read, *(columns or {}).values()}
        absent = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        unread: dict[str, None] = {}
        num_conversations = num_rows = num_complete = 0
        prompt, numbers = _prompt_column(read), 0
        try:
            for row in mapped_rows(file, columns, cells_only=cells_only):
                for name, value in row.columns.items():
                    if name not in known:
                        if name not in unread and not is_absent(value):
                            unread[name] = None
                    elif isinstance(value, list):
                        unread.update(dict.fromkeys(_unread_keys(name, value)))
                if absent and row.bad is None:
                    absent = {ours: theirs for ours, theirs in absent.items() if ours not in row.columns}
                    num_complete += 1
                num_conversations += bool(row.conversations)
                num_rows += 1
                numbers += bool(_WHOLE_NUMBER.fullmatch(str(row.columns.get(prompt, ""))))
                yield row
        finally:  # also where the rest of the file is not needed
            if absent and num_complete:
                names = ", ".join(f"{ours}: {_short(theirs)}" for ours, theirs in absent.items())
                _log.warning(
                    "%s: columns: {%s}: no row has such a column, and it counts as absent; check the spelling",
                    file_name(file),
                    names,
                )
            self._say(
                file,
                columns,
                prompt if numbers == num_rows >= _FEWEST_NUMBERS else "",
                num_rows,
                unread,
                num_conversations,
            )

    def _say(
        self,
        file: Path,
        columns: ColumnNames | None,
        numbers: str,
        num_rows: int,
        unread: Mapping[str, None],
        num_conversations: int,
    ) -> None:
        """Note and log what was found in a file; `numbers`: its column of prompts, if these are all whole numbers."""
        if numbers:
            self.numbers[file_name(file)] = column = (columns or {}).get(numbers) or numbers
            _log.warning(
                "%s: the prompts, in the column %r, are whole numbers in all %d rows: an index is not a prompt. Join "
                "the file with the texts that it numbers, or name another column as columns.%s",
                file_name(file),
                column,
                num_rows,
                numbers,
            )
        if unread:
            names = [_short(name) for name in islice(unread, _KEPT)]
            more = [f"{len(unread) - _KEPT} more"] if len(unread) > _KEPT else []
            self.unread[file_name(file)] = [*names, *more]
            _log.info("%s: columns that are not read: %s", file_name(file), ", ".join([*names, *more]))
        if num_conversations:
            self.conversations[file_name(file)] = num_conversations
            _log.info(
                "%s: %d rows hold conversations as text; they were read as messages", file_name(file), num_conversations
            )


def _prompt_column(read: Iterable[str]) -> str:
    names = set(read)
    return next((name for name in _PROMPT_COLUMNS if name in names), "")


def _short(name: object) -> str:
    """Return a name that can be written as UTF-8, which half a surrogate pair cannot, cut if it is long."""
    text = str(name).encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _unread_keys(name: str, messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if isinstance(message, dict) and ("role" in message or "from" in message):
            for key, value in message.items():
                if key not in MESSAGE_KEYS and not is_absent(value):
                    yield f"{name}[].{key}"
