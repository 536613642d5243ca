"""Files to single completions: those of data sets to imitate, and those that a model of ours wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from bfpo.core.errors import SettingError
from bfpo.core.inputs import expand_files
from bfpo.core.schema import Completion
from bfpo.data.completion_layouts import (
    COMPLETION_LAYOUTS,
    CompletionLayout,
    detect_completion_layout,
    plain_completion,
)
from bfpo.data.files import iter_rows
from bfpo.data.mapped import attempt, check_columns, first_that_fits, made_or_error, mapped_rows
from bfpo.data.rejects import CompletionResult, Reject
from bfpo.data.row import Row

__all__ = ["iter_completions", "read_completions", "read_sft"]

_COLUMNS = {name for layout in COMPLETION_LAYOUTS.values() for name in (*layout.needs, *layout.reads)}
_NEEDS = {layout.name: layout.needs for layout in COMPLETION_LAYOUTS.values()}


def iter_completions(
    files: Sequence[str | Path],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    layouts: dict[str, str] | None = None,
) -> Iterator[Completion | Reject]:
    """Yield what each row of the files is, in their order, without holding rows; a folder stands for its files.

    `layout` names a row of `COMPLETION_LAYOUTS`, "auto" decides for each file by its first row that fits one;
    `layouts` is filled with the layout of each file. Raises `SettingError` for an unknown layout or column,
    `DataError` for a file that cannot be read or fits no layout.
    """
    if layout != "auto" and layout not in COMPLETION_LAYOUTS:
        raise SettingError(f"layout: got {layout!r}; allowed: auto, {', '.join(COMPLETION_LAYOUTS)}")
    check_columns(columns, _COLUMNS)
    for file in expand_files(files):
        found: CompletionLayout | None
        if layout == "auto":
            found = first_that_fits(file, mapped_rows(file, columns), detect_completion_layout, _NEEDS)
        else:
            found = COMPLETION_LAYOUTS[layout]
        if found is not None and layouts is not None:
            layouts[str(file)] = found.name
        make = partial(_completion_of, layout=found)
        for row in mapped_rows(file, columns):
            yield attempt(make, file, row)


def _completion_of(row: Row, *, layout: CompletionLayout | None) -> Completion:
    assert layout is not None  # a row with columns gives its file a layout, or the file is refused
    return layout.to_completion(row.columns)


def read_sft(
    files: Sequence[str | Path], *, layout: str = "completions", columns: Mapping[str, str] | None = None
) -> CompletionResult:
    """Read what a model shall imitate, such as rows `{prompt, completion}`, `{prompt, text}` or `{messages}`.

    Of `messages` the last must be the assistant's and is the completion. `columns` maps our name to the file's.
    Raises as `iter_completions` does.
    """
    completions: list[Completion] = []
    rejects: list[Reject] = []
    for item in iter_completions(files, layout=layout, columns=columns):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            completions.append(item)
    return CompletionResult(rejects, len(completions) + len(rejects), completions)


def read_completions(file: str | Path) -> list[Completion]:
    """Read what `write_completions` wrote. Raises `DataError` for a bad row; an empty completion is none."""
    path = Path(file)
    return made_or_error(path, iter_rows(path), lambda row: plain_completion(row.columns, allow_empty=True))
