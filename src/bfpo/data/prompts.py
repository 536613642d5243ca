"""Files to prompts: ours, those of evaluation suites, and what attack tools export."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError
from bfpo.core.inputs import no_such_file
from bfpo.core.schema import Message, Prompt
from bfpo.data.fields import ColumnNames, content_id
from bfpo.data.files import attempt, first_that_fits, mapped_rows, text_rows
from bfpo.data.layouts import AUTO, check_columns, check_layout, columns_of, parse_row
from bfpo.data.notes import FileNotes
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.rejects import ADVICE, BadRows, Reject, Row, describe_rejects

__all__ = ["PromptResult", "read_prompt_files", "read_prompts"]

_TEXT = "text"
_REPEATED, _NO_PROMPT = "repeated prompt", "holds no prompt"


@dataclass(frozen=True, slots=True)
class PromptResult:
    """Prompts in the order of the files, how many were left out by reason, layouts of the files, `FileNotes.facts`.

    Left out are repeated texts without an id of their own, entries of a tool that are not prompts, and bad rows, which
    are in `rejects`: `num_seen == len(prompts) + sum(left_out.values())`.
    """

    prompts: list[Prompt]
    left_out: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def num_seen(self) -> int:
        """Prompts and entries without one, together."""
        return len(self.prompts) + sum(self.left_out.values())


def read_prompts(file: str | Path, *, layout: str = AUTO, columns: ColumnNames | None = None) -> list[Prompt]:
    """Read prompts from a file or a folder of files: `read_prompt_files` for one path, without its counts."""
    return read_prompt_files([file], layout=layout, columns=columns).prompts


def read_prompt_files(
    files: Sequence[str | Path],
    *,
    layout: str = AUTO,
    columns: ColumnNames | None = None,
    check: Callable[[Prompt], None] | None = None,
    bad_rows: BadRows | None = None,
) -> PromptResult:
    """Read prompts of every row of files; a `.txt` file has one per line, a folder stands for its other files.

    `layout` names one of `PROMPT_LAYOUTS`, "auto" decides for each file by its first row that fits one; `columns`
    maps our name to the file's. A row with a prompt for which `check` raises `RowError` is a bad row. Raises
    `SettingError` for an unknown layout or column, `DataError` for a file that cannot be read or fits no layout, for a
    bad row unless `bad_rows` is "skip" (`None`: the caller has no such setting), and for an id that is given twice.
    """
    check_layout(layout, PROMPT_LAYOUTS)
    check_columns(columns, columns_of(PROMPT_LAYOUTS.values()))
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    layouts: dict[str, str] = {}
    rejects: list[Reject] = []
    notes = FileNotes()
    for file in notes.files(files):
        name, parsed = _parsed(file, layout, columns, notes, check)
        layouts[str(file)] = name
        bad = [row for row in parsed if isinstance(row, Reject)]
        if bad and bad_rows != "skip":
            raise DataError(describe_rejects(bad, rows=len(parsed)) + (f"\n{ADVICE}" if bad_rows else ""))
        rejects += bad
        for prompts in parsed:
            if isinstance(prompts, Reject):
                left_out[prompts.reason] += 1
                continue
            left_out[_NO_PROMPT] += not prompts
            for prompt in prompts:
                named = prompt if prompt.id else replace(prompt, id=_made_id(prompt, name))
                if named.id not in found:
                    found[named.id] = named
                elif prompt.id:
                    what = f"the prompt id {prompt.id!r} occurs twice; use unique ids, or set columns: {{id: null}} to "
                    what += "make ids from the prompts' content"
                    raise DataError.at(file, None, what)
                else:
                    left_out[_REPEATED] += 1
    numbers = {reason: num for reason, num in left_out.items() if num}
    return PromptResult(list(found.values()), numbers, layouts, notes.facts(), rejects)


def _parsed(
    file: Path,
    layout: str,
    columns: ColumnNames | None,
    notes: FileNotes,
    check: Callable[[Prompt], None] | None,
) -> tuple[str, list[Sequence[Prompt] | Reject]]:
    """Return the layout of a file and the prompts of each of its rows, or the reject of a bad one."""
    parse: Callable[[Row], Sequence[Prompt]] = _line_prompt
    rows: Iterator[Row]
    if file.suffix.lower() == ".txt":
        name, rows = _TEXT, _text_rows(file)
    else:
        fitting = PROMPT_LAYOUTS[layout] if layout != AUTO else None
        if layout == AUTO:
            fitting = first_that_fits(file, mapped_rows(file, columns, cells_only=True), PROMPT_LAYOUTS.values())
        if fitting is not None and fitting.needs:
            rows = notes.rows(file, columns, (*fitting.needs, *fitting.reads), cells_only=True)
        else:
            rows = mapped_rows(file, columns, cells_only=True)
        name, parse = fitting.name if fitting else "", partial(parse_row, layout=fitting)

    def make(row: Row) -> Sequence[Prompt]:
        prompts = parse(row)
        if check is not None:
            for prompt in prompts:
                check(prompt)
        return prompts

    return name, [attempt(make, file, row) for row in rows]


def _text_rows(file: Path) -> Iterator[Row]:
    if not file.is_file():
        raise DataError.at(file, None, no_such_file(file))
    return text_rows(file)


def _made_id(prompt: Prompt, layout: str) -> str:
    if layout == _TEXT:
        return hashlib.sha256(prompt.messages[0].content.encode()).hexdigest()[:16]
    return content_id(prompt.messages, prompt.tools)


def _line_prompt(row: Row) -> Sequence[Prompt]:
    return [Prompt("", (Message("user", str(row.columns["text"])),))]
