"""Files to pairs, prompts and completions; a bad row is a `Reject` with its place, never a traceback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from bfpo.data.fields import Columns, messages_of, text_of
from bfpo.data.layouts import LAYOUTS, Layout, detect_layout
from bfpo.data.names import SeenNames
from bfpo.data.rejects import (
    BadRows,
    CompletionResult,
    ReadResult,
    Reject,
    check_rejects,
    describe_rejects,
)
from bfpo.data.rows import Row, RowError, iter_rows
from bfpo.data.write import write_completions, write_pairs
from bfpo.errors import DataError, SettingError
from bfpo.schema import Completion, Message, Pair, Prompt

__all__ = [
    "BadRows",
    "CompletionResult",
    "PairIds",
    "ReadResult",
    "Reject",
    "check_rejects",
    "describe_rejects",
    "iter_pairs",
    "read_completions",
    "read_pairs",
    "read_prompts",
    "read_sft",
    "write_completions",
    "write_pairs",
]

Item = TypeVar("Item")
_LINES = 1 << 40  # more lines than any file has: a file's number and a line make one number
_PAIR_COLUMNS = {name for layout in LAYOUTS.values() for name in (*layout.needs, *layout.reads)}
_COMPLETION_COLUMNS = {"id", "prompt", "completion", "text", "messages", "model", "kind", "finished"}


# -------------------------------------------------------------------------------------------------------- pairs


def read_pairs(
    files: Sequence[Path],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
) -> ReadResult:
    """Read preference pairs from JSON lines (`.jsonl`, `.json`, `.gz`) and Parquet.

    `layout` names a row of `LAYOUTS`; `"auto"` decides for each file from its first row whose columns fit one, and
    `ReadResult.layouts` says which. `columns` maps a name that the layout knows to the file's name for it. `source`
    replaces the rows' own. A row without an id gets one from its content, with `-2`, `-3` for repetitions.

    Raises `SettingError` for an unknown layout or a name no layout knows, `DataError` for a file that cannot be read
    or fits no layout. Bad rows are in `ReadResult.rejects`.
    """
    rejects: list[Reject] = []
    pairs: list[Pair] = []
    layouts: dict[str, str] = {}
    for item in iter_pairs(files, layout=layout, columns=columns, source=source, layouts=layouts):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            pairs.append(item)
    return ReadResult(rejects, len(pairs) + len(rejects), pairs, layouts)


def iter_pairs(
    files: Sequence[Path],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    layouts: dict[str, str] | None = None,
    ids: PairIds | None = None,
) -> Iterator[Pair | Reject]:
    """Yield what each row of the files is, in their order, without holding rows; as `read_pairs` in all else.

    `layouts` is filled with the layout of each file. `ids` is for those who read the same files more than once.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise SettingError(f"layout: got {layout!r}; allowed: auto, {', '.join(LAYOUTS)}")
    _check_columns(columns, _PAIR_COLUMNS)
    ids = ids or PairIds()
    for file in map(Path, files):
        found = LAYOUTS[layout] if layout != "auto" else _layout_of(file, columns)
        if found is not None and layouts is not None:
            layouts[str(file)] = found.name
        ids.start(file)
        make = partial(_pair_of, layout=found, source=source, ids=ids)
        for row in _rows(file, columns):
            yield _attempt(make, file, row)


def _check_columns(columns: Mapping[str, str] | None, known: set[str]) -> None:
    unknown = sorted(set(columns or {}) - known)
    if unknown:
        raise SettingError(
            f"columns: got {', '.join(unknown)}; allowed (our name: the file's): {', '.join(sorted(known))}"
        )


def _renamed(row: Row, columns: Mapping[str, str] | None) -> Row:
    """Give the columns our names; a name mapped to a column the row lacks is then absent, not read from elsewhere."""
    if not columns:
        return row
    kept = {name: value for name, value in row.columns.items() if name not in columns}
    mapped = {ours: row.columns[theirs] for ours, theirs in columns.items() if theirs in row.columns}
    return Row(row.line, {**kept, **mapped}, row.bad)


def _rows(file: Path, columns: Mapping[str, str] | None) -> Iterator[Row]:
    return (_renamed(row, columns) for row in iter_rows(file))


def _layout_of(file: Path, columns: Mapping[str, str] | None) -> Layout | None:
    """Return the layout of the first row that fits any; `None` where no row has columns at all."""
    first: Row | None = None
    for row in _rows(file, columns):
        if row.bad is not None:
            continue
        first = first or row
        layout = detect_layout(row.columns)
        if layout is not None:
            return layout
    if first is None:
        return None
    seen = ", ".join(map(str, first.columns)) or "none"
    known = "; ".join(f"{layout.name} needs {', '.join(layout.needs)}" for layout in LAYOUTS.values())
    what = f"the columns fit no layout; columns seen: {seen}; layouts: {known}"
    raise DataError.at(file, first.line, f"{what}. `columns` renames (our name: the file's)")


def _pair_of(row: Row, *, layout: Layout | None, source: str | None, ids: PairIds) -> Pair:
    assert layout is not None  # a row with columns gives its file a layout, or the file is refused
    columns = row.columns if source is None else {**row.columns, "source": source}
    return ids.claim(layout.to_pair(columns), row)


class PairIds:
    """Ids seen so far: a given id that comes again is an error, an id made from content gets a number.

    Held are 24 to 48 bytes a pair, and of what `again` returns only the ids that got a number.
    """

    def __init__(self) -> None:
        self._seen: SeenNames | None = SeenNames()
        self._renamed: dict[int, str] = {}
        self._files: list[str] = []

    def start(self, file: Path) -> None:
        """Go on to the next file."""
        self._files.append(file.name)

    def again(self) -> PairIds:
        """Return what another reading of the same files needs: the same ids for the same pairs, no id an error."""
        ids = PairIds()
        ids._seen, ids._renamed = None, self._renamed
        return ids

    def claim(self, pair: Pair, row: Row) -> Pair:
        """Return the pair under an id that no other has; raises `RowError` for a given id that is taken."""
        place = (len(self._files) - 1) * _LINES + row.line
        if self._seen is None:
            name = self._renamed.get(place, pair.id)
        else:
            name = self._free_name(self._seen, pair.id, given=row.columns.get("id") not in (None, ""))
            self._seen.add(name, place)
        if name == pair.id:
            return pair
        self._renamed[place] = name
        return replace(pair, id=name)

    def _free_name(self, seen: SeenNames, name: str, *, given: bool) -> str:
        free, repetition = name, 1
        while (place := seen.place_of(free)) is not None:
            if given:
                number, line = divmod(place, _LINES)
                raise RowError("id", "duplicate id", f"{name} (first at {self._files[number]}:{line})")
            repetition += 1
            free = f"{name}-{repetition}"
        return free


# ------------------------------------------------------------------------------------------ completions, prompts


def read_sft(files: Sequence[Path], *, columns: Mapping[str, str] | None = None) -> CompletionResult:
    """Read what a model shall imitate: rows `{prompt, completion}`, `{prompt, text}` or `{messages}`.

    Of `messages` the last must be the assistant's and is the completion. `columns` maps our name to the file's.
    Raises `SettingError` for an unknown name, `DataError` for a file that cannot be read.
    """
    _check_columns(columns, _COMPLETION_COLUMNS)
    completions: list[Completion] = []
    rejects: list[Reject] = []
    num_rows = 0
    for file in map(Path, files):
        rows = [_renamed(row, columns) for row in iter_rows(file)]
        num_rows += len(rows)
        _collect(file, rows, _completion_of, completions, rejects)
    return CompletionResult(rejects, num_rows, completions)


def read_completions(file: Path) -> list[Completion]:
    """Read what `write_completions` wrote. Raises `DataError` for a bad row; an empty completion is none."""
    return _all_or_error(Path(file), partial(_completion_of, allow_empty=True))


def read_prompts(file: Path) -> list[Prompt]:
    """Read prompts: JSON lines or Parquet with `prompt` (text or messages), `id` and `kind`; `.txt` holds one a line.

    Raises `DataError` for a file that cannot be read, a bad row or a repeated id.
    """
    file = Path(file)
    if file.suffix.lower() == ".txt":
        prompts = [Prompt(_digest(line)[:16], (Message("user", line),)) for line in _text_lines(file)]
    else:
        prompts = _all_or_error(file, _prompt_of)
    first: set[str] = set()
    for prompt in prompts:
        if prompt.id in first:
            raise DataError.at(
                file, None, f"the prompt with id {prompt.id!r} is there twice; ids (and prompts) must differ"
            )
        first.add(prompt.id)
    return prompts


def _collect(
    file: Path, rows: Sequence[Row], make: Callable[[Row], Item], items: list[Item], rejects: list[Reject]
) -> None:
    for row in rows:
        made = _attempt(make, file, row)
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            items.append(made)


def _attempt(make: Callable[[Row], Item], file: Path, row: Row) -> Item | Reject:
    try:
        if row.bad is not None:
            raise row.bad
        return make(row)
    except RowError as bad:
        return Reject.of(file, row.line, bad)


def _all_or_error(file: Path, make: Callable[[Row], Item]) -> list[Item]:
    items: list[Item] = []
    rejects: list[Reject] = []
    rows = list(iter_rows(file))
    _collect(file, rows, make, items, rejects)
    if rejects:
        raise DataError(describe_rejects(rejects, rows=len(rows)))
    return items


def _text_lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(file, None, f"cannot be read as UTF-8 text: {error}") from error


def _prompt_of(row: Row) -> Prompt:
    columns = row.columns
    if "prompt" not in columns:
        raise RowError("prompt", "missing column", sorted(map(str, columns)))
    messages = messages_of(columns["prompt"], "prompt")
    if not messages:
        raise RowError("prompt", "empty prompt", columns["prompt"])
    return Prompt(_optional(columns, "id") or _content_id(messages), messages, _optional(columns, "kind"))


def _completion_of(row: Row, *, allow_empty: bool = False) -> Completion:
    columns = row.columns
    if "messages" in columns:
        turns = messages_of(columns["messages"], "messages")
        if not turns or turns[-1].role != "assistant":
            raise RowError("messages", "the last message is not the assistant's", turns[-1].role if turns else None)
        prompt, field, text = turns[:-1], "messages", turns[-1].content
    else:
        field = "completion" if "completion" in columns else "text"
        if "prompt" not in columns or field not in columns:
            raise RowError("prompt, completion (or messages)", "missing column", sorted(map(str, columns)))
        prompt, text = messages_of(columns["prompt"], "prompt"), text_of(columns[field], field)
    if not allow_empty and not text.strip():
        raise RowError(field, "empty completion", text)
    finished = columns.get("finished", True)
    if not isinstance(finished, bool):
        raise RowError("finished", "wrong type (true or false is needed)", finished)
    name = _optional(columns, "id") or _content_id((*prompt, Message("assistant", text)))
    return Completion(name, prompt, text, _optional(columns, "model"), _optional(columns, "kind"), finished)


def _optional(columns: Columns, field: str) -> str:
    value = columns.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return "" if value is None else text_of(value, field)


def _content_id(messages: Sequence[Message]) -> str:
    return _digest(json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False))[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
