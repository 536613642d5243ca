"""Completions that people have labelled safe or unsafe, to train a judge on or to check one against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError
from bfpo.core.schema import Completion, Pair
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.fields import DESIRABLE, ColumnNames, cell_value, is_unknown
from bfpo.data.files import first_that_fits, mapped_rows
from bfpo.data.labels import LabelWords, as_judged, completions_of_pair
from bfpo.data.layouts import Layout, check_columns
from bfpo.data.notes import FileNotes
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.rejects import ReadResult, Reject, Row, RowError, check_rejects
from bfpo.data.settings import LabelledConfig
from bfpo.data.thinking import without_thought

__all__ = ["LabelledResult", "load_labelled"]

_OURS = ("id", "prompt", "completion", "is_safe", "kind")
_SAFE, _UNSAFE = ("true", "1", "1.0", "safe"), ("false", "0", "0.0", "unsafe")
_UNKNOWN = "label unknown or between 0 and 1"
_NO_ANSWER = "no answer behind the thoughts"


@dataclass(frozen=True, slots=True)
class LabelledResult:
    """Completions whose `is_safe` is 0 or 1, the bad rows, what was left out by reason, and `FileNotes.facts`."""

    completions: list[Completion]
    rejects: list[Reject]
    left_out: dict[str, int]
    notes: dict[str, Any] = field(default_factory=dict)


def load_labelled(data: LabelledConfig) -> LabelledResult:
    """Read labelled completions: one a row, or two of each preference pair.

    A row has a completion (`completion` or `text`) with `is_safe`, and may have `prompt`, `id` and `kind`; or it has
    the columns of a labelled data set (BeaverTails, WildGuardMix) or of a pair layout. `columns` maps our name to the
    file's. `is_safe` is true or false, 1 or 0, "safe" or "unsafe", or one of `safe_values` and `unsafe_values`; with
    those given, rows with any other value are left out and counted. `where` keeps the rows whose column fits a pattern,
    as in `{"type": "contrast_*"}`; mapped columns go by our names. A label that is unknown or between 0 and 1 is left
    out and counted. A missing or repeated id gets a number. Thoughts before an answer are put apart; a row
    without an answer behind them is left out and counted.

    Raises `DataError` for files that cannot be read or fit no layout, bad rows under `bad_rows="stop"`, and if nothing
    is left; `SettingError` for an unknown name in `columns`, or a value that is both safe and unsafe.
    """
    check_columns(data.columns, _OURS)
    words, notes = LabelWords.of(data.safe_values, data.unsafe_values), FileNotes()
    completions: list[Completion] = []
    rejects: list[Reject] = []
    left_out: Counter[str] = Counter()
    num_rows = 0
    for file in notes.files(data.files):
        layout = _layout_of(file, data.columns)
        for row in notes.rows(file, data.columns, (*layout.needs, *layout.reads, *data.where)):
            num_rows += 1
            try:
                found = list(_read(row, layout, words, data.where))
            except RowError as bad:
                rejects.append(Reject.of(file, row.line, bad))
                continue
            for one in found:
                if isinstance(one, str):
                    left_out[one] += 1
                    continue
                answer = without_thought(one, data.thinking)
                if answer.text.strip():
                    completions.append(answer)
                else:
                    left_out[_NO_ANSWER] += 1
    check_rejects(ReadResult(rejects, num_rows), bad_rows=data.bad_rows, files=data.files)
    if not completions:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError.at(data.files[0], None, f"no labelled completion is left to use ({reasons})")
    return LabelledResult(_with_own_ids(completions), rejects, dict(left_out), notes.facts())


def _is_safe(value: object, words: LabelWords) -> bool | None:
    """Return whether the value means safe, `None` if it is not one of the given words; raises `RowError`."""
    text = str(value).strip().lower()
    if words or text not in (*_SAFE, *_UNSAFE):
        if not words:
            raise RowError("is_safe", "neither safe nor unsafe (safe_values and unsafe_values name others)", value)
        return words.read(value)
    return text in _SAFE


def _layout_of(file: Path, columns: ColumnNames | None) -> Layout[Pair | Completion]:
    alone = [replace(layout, fits=partial(_fits_without_prompt, layout)) for layout in COMPLETION_LAYOUTS.values()]
    layouts: list[Layout[Pair | Completion]] = [*alone, *PAIR_LAYOUTS.values()]
    found = first_that_fits(file, mapped_rows(file, columns), layouts)
    return found or COMPLETION_LAYOUTS["completions"]


def _fits_without_prompt(layout: Layout[Completion], row: Mapping[str, object]) -> bool:
    return layout.fits(row) or layout.fits({"prompt": "", **row})


def _read(
    row: Row, layout: Layout[Pair | Completion], words: LabelWords, where: Mapping[str, str]
) -> Iterator[Completion | str]:
    """Yield the labelled completions of a row, or the reason to leave it out; raises `RowError`."""
    if row.bad is not None:
        raise row.bad
    for name, pattern in where.items():
        if name not in row.columns:
            raise RowError(name, "missing column, named in where", sorted(map(str, row.columns)))
        if not fnmatchcase(str(row.columns[name]), pattern):
            yield f"{name} is not {pattern}"
            return
    if layout.name in PAIR_LAYOUTS:
        pair = PAIR_LAYOUTS[layout.name]
        yield from _of_pair(pair.parse(words.applied(row.columns, pair.labels) if words else row.columns))
        return
    held = {name: value for name, value in row.columns.items() if name not in DESIRABLE}  # a judge learns from both
    if layout.fits({"prompt": "", **held}):
        held = {"prompt": "", **held}
    given = held.get("is_safe")
    if "is_safe" in held and is_unknown(given) and words.read(given) is None:
        held["is_safe"] = None
    elif "is_safe" in held and (words or not isinstance(cell_value(given), float)):
        is_safe = _is_safe(given, words)
        if is_safe is None:
            yield "label is none of safe_values and unsafe_values"
            return
        held["is_safe"] = is_safe
    elif "is_safe" not in held and not layout.labelled:
        raise RowError("is_safe", "missing column", sorted(map(str, row.columns)))
    completion = COMPLETION_LAYOUTS[layout.name].parse(held)
    yield as_judged(completion, keep_label=True) if completion.is_safe in (0.0, 1.0) else _UNKNOWN


def _of_pair(pair: Pair) -> Iterator[Completion | str]:
    for completion in completions_of_pair(pair):
        yield as_judged(completion, keep_label=True) if completion.is_safe in (0.0, 1.0) else _UNKNOWN


def _with_own_ids(completions: Sequence[Completion]) -> list[Completion]:
    """Append a number to repeated ids: verdicts and mistakes are looked up by id."""
    seen: set[str] = set()
    named = []
    for number, completion in enumerate(completions):
        name = completion.id if completion.id not in seen else f"{completion.id}-{number}"
        seen.add(name)
        named.append(replace(completion, id=name))
    return named
