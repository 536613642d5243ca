"""Completions that people have labelled safe or unsafe, to train a judge on or to check one against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from bfpo.data.fields import messages_of, text_of
from bfpo.data.layouts import detect_layout
from bfpo.data.read import iter_pairs
from bfpo.data.rejects import BadRows, ReadResult, Reject, check_rejects
from bfpo.data.rows import Row, RowError, iter_rows
from bfpo.errors import DataError, SettingError
from bfpo.schema import Completion

__all__ = ["Labelled", "LabelledResult", "load_labelled"]

_TEXTS = ("completion", "text", "response")
_OURS = ("id", "prompt", "completion", "is_safe", "kind")
_SAFE, _UNSAFE = ("true", "1", "1.0", "safe"), ("false", "0", "0.0", "unsafe")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A completion and whether people call it safe."""

    completion: Completion
    is_safe: bool


@dataclass(frozen=True, slots=True)
class LabelledResult:
    """What was read: the rows, the bad ones, and counts of what was left out on purpose, by name."""

    rows: list[Labelled]
    rejects: list[Reject]
    counts: dict[str, int]


def load_labelled(
    files: Sequence[str | Path],
    *,
    columns: Mapping[str, str] | None = None,
    safe_values: Collection[str] = (),
    unsafe_values: Collection[str] = (),
    where: Mapping[str, str] | None = None,
    bad_rows: BadRows = "stop",
) -> LabelledResult:
    """Read labelled completions: one a row, or two from a preference pair whose labels are known.

    A row has a completion (`completion`, `text` or `response`), `is_safe`, and may have `prompt` (text or messages),
    `id` and `kind`; `columns` maps our name to the file's. `is_safe` is true or false, 1 or 0, "safe" or "unsafe", or
    one of `safe_values` and `unsafe_values`; with those given, rows with any other value are left out and counted.
    `where` keeps the rows whose column (the file's name) matches a pattern, as in `{"type": "contrast_*"}`. Of a pair
    file, a label that is unknown or between 0 and 1 is left out and counted.

    Raises `DataError` for files that cannot be read, bad rows under `bad_rows="stop"`, and where nothing is left;
    `SettingError` for an unknown name in `columns` or values that are both.
    """
    unknown = sorted(set(columns or {}) - set(_OURS))
    if unknown:
        raise SettingError(f"columns: got {', '.join(unknown)}; allowed (our name: the file's): {', '.join(_OURS)}")
    both = sorted(set(safe_values) & set(unsafe_values))
    if both:
        raise SettingError(f"safe_values, unsafe_values: {', '.join(both)} is in both")
    rows: list[Labelled] = []
    rejects: list[Reject] = []
    left_out: Counter[str] = Counter()
    values = _Values(frozenset(safe_values), frozenset(unsafe_values))
    for item in _read(list(map(Path, files)), columns or {}, values, where or {}):
        if isinstance(item, Labelled):
            rows.append(item)
        elif isinstance(item, Reject):
            rejects.append(item)
        else:
            left_out[item] += 1
    num_rows = len(rows) + len(rejects) + left_out.total()
    if num_rows:
        check_rejects(ReadResult(rejects, num_rows), bad_rows=bad_rows)
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it holds no row"
        raise DataError.at(files[0], None, f"no labelled completion is left to use ({counts})")
    return LabelledResult(_with_own_ids(rows), rejects, dict(left_out))


@dataclass(frozen=True, slots=True)
class _Values:
    """What a label's value means."""

    safe: frozenset[str]
    unsafe: frozenset[str]

    def read(self, value: object) -> bool | None:
        """Return whether it says safe, `None` for a value that named ones leave out; raises `RowError` for no label."""
        text = str(value).strip()
        if self.safe or self.unsafe:
            return True if text in self.safe else False if text in self.unsafe else None
        if text.lower() in (*_SAFE, *_UNSAFE):
            return text.lower() in _SAFE
        raise RowError("is_safe", "neither safe nor unsafe (safe_values and unsafe_values name others)", value)


def _read(
    files: Sequence[Path], columns: Mapping[str, str], values: _Values, where: Mapping[str, str]
) -> Iterator[Labelled | Reject | str]:
    """Yield what each row is: labelled, bad, or the reason for which it is left out."""
    for file in files:
        if _holds_pairs(file, columns):
            if where:
                raise SettingError(f"where: not read for the pairs of {file}; leave it out")
            yield from _of_pairs(file)
            continue
        for row in iter_rows(file):
            try:
                yield _of_row(row, columns, values, where)
            except RowError as bad:
                yield Reject.of(file, row.line, bad)


def _holds_pairs(file: Path, columns: Mapping[str, str]) -> bool:
    first = next((row for row in iter_rows(file) if row.bad is None), None)
    if first is None or columns or any(name in first.columns for name in _TEXTS):
        return False
    return detect_layout(first.columns) is not None


def _of_pairs(file: Path) -> Iterator[Labelled | Reject | str]:
    for pair in iter_pairs([file]):
        if isinstance(pair, Reject):
            yield pair
            continue
        for side, text, label in (
            ("chosen", pair.chosen, pair.chosen_is_safe),
            ("rejected", pair.rejected, pair.rejected_is_safe),
        ):
            if label not in (0.0, 1.0):
                yield "label unknown or between 0 and 1"
            else:
                yield Labelled(Completion(f"{pair.id}:{side}", pair.prompt, text, kind=pair.source), label == 1.0)


def _of_row(row: Row, columns: Mapping[str, str], values: _Values, where: Mapping[str, str]) -> Labelled | str:
    if row.bad is not None:
        raise row.bad
    held = row.columns
    for name, pattern in where.items():
        if name not in held:
            raise RowError(name, "missing column, named in where", sorted(map(str, held)))
        if not fnmatchcase(str(held[name]), pattern):
            return f"{name} is not {pattern}"
    field = columns.get("completion") or next((name for name in _TEXTS if name in held), "completion")
    text = text_of(_value(held, field), field)
    if not text.strip():
        raise RowError(field, "empty completion", text)
    is_safe = values.read(_value(held, columns.get("is_safe", "is_safe")))
    if is_safe is None:
        return "label is none of safe_values and unsafe_values"
    given = held.get(columns.get("prompt", "prompt"), "")
    prompt = messages_of(str(given) if isinstance(given, int) else given, columns.get("prompt", "prompt"))
    name, kind = (_optional(held, columns.get(key, key)) for key in ("id", "kind"))
    return Labelled(Completion(name, prompt, text, kind=kind), is_safe)


def _value(held: Mapping[str, object], field: str) -> object:
    if field not in held:
        raise RowError(field, "missing column", sorted(map(str, held)))
    return held[field]


def _optional(held: Mapping[str, object], field: str) -> str:
    value = held.get(field)
    return "" if value is None else str(value)


def _with_own_ids(rows: Sequence[Labelled]) -> list[Labelled]:
    """Give a row without an id, or with one that is taken, its number: verdicts and mistakes are found by it."""
    seen: set[str] = set()
    named = []
    for number, row in enumerate(rows):
        name = row.completion.id
        if not name or name in seen:
            name = f"{name or 'row'}-{number}"
        seen.add(name)
        named.append(Labelled(replace(row.completion, id=name), row.is_safe))
    return named
