"""Typed records of bfpo's own JSON files: one dataclass per file, shared by its writer and all readers.

The fields of a record are the keys of its file, in their order. A file is validated once, here; readers then use
attributes. Keys that this version does not know are ignored and reported.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bfpo.core.errors import RunError

__all__ = ["OPTIONAL", "as_json", "load", "load_lines", "narrowed"]

Record = TypeVar("Record")
_log = logging.getLogger(__name__)
OPTIONAL = {"optional": True}
"""Metadata of a field whose default (`None` or "") stands for an absent key, and that is then not written."""


def as_json(value: Any) -> Any:
    """Return JSON values: records as objects, tuples as lists, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        given = ((one, getattr(value, one.name)) for one in fields(value))
        return {one.name: as_json(item) for one, item in given if item not in (None, "") or one.metadata != OPTIONAL}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def narrowed(kind: type[Record], record: Any) -> Record:
    """Return the fields of the base class `kind` of a record as an object of that class."""
    return kind(**{one.name: getattr(record, one.name) for one in fields(kind)})  # type: ignore[arg-type]


def load(kind: type[Record], path: str | Path, problems: list[str] | None = None) -> Record:
    """Return the record that a JSON file holds.

    Raises `RunError` with file, key and value for a file that is missing or invalid. With `problems` nothing is raised:
    invalid values are dropped and described there, and a file that cannot be read gives `kind()`.
    """
    record: Record
    try:
        record, left_out, unknown = _fit(kind, Path(path).read_text(encoding="utf-8"), strict=problems is None)
    except (OSError, ValueError, RecursionError) as error:
        if problems is None:
            raise RunError(f"{path}: cannot be read ({error})") from error
        problems.append(
            f"{path}: {error}"
            if isinstance(error, _MisfitError)
            else f"{path}: cannot be read ({type(error).__name__})"
        )
        return kind()
    _report(path, left_out, unknown, problems)
    return record


def load_lines(
    kind: type[Record], path: str | Path, problems: list[str] | None = None, *, whole: bool = False
) -> list[Record]:
    """Return the records of a JSON Lines file, as `load` does; with `problems` an invalid line is skipped.

    `whole`: without a last line that has no end, which a crash may have cut short.
    """
    try:
        errors = "strict" if problems is None else "replace"
        text = Path(path).read_bytes()
        lines = (text[: text.rfind(b"\n") + 1] if whole else text).decode("utf-8", errors).split("\n")
    except (OSError, ValueError) as error:
        if problems is None:
            raise RunError(f"{path}: cannot be read ({error})") from error
        problems.append(f"{path}: cannot be read ({type(error).__name__})")
        return []
    records: list[Record] = []
    left_out: list[str] = []
    unknown: list[str] = []
    broken = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record, left_out_here, unknown_here = _fit(kind, line, strict=problems is None)
        except (ValueError, RecursionError) as error:
            if problems is None:
                raise RunError(f"{path}:{number}: {error}") from error
            if isinstance(error, _MisfitError) and str(error) != _NO_OBJECT:
                left_out.append(f"line {number}: {error}")
            else:
                broken += 1
            continue
        records.append(record)
        left_out += (f"line {number}: {one}" for one in left_out_here)
        unknown += unknown_here
    if broken and problems is not None:
        problems.append(f"{path}: {broken} lines are not JSON objects and were skipped")
    if len(left_out) > 1:
        left_out = [f"{left_out[0]}; and {len(left_out) - 1} more"]
    _report(path, left_out, unknown, problems)
    return records


def _report(path: str | Path, left_out: list[str], unknown: Iterable[str], problems: list[str] | None) -> None:
    """Report the dropped values and the unknown keys of a file, in `problems` or in the log."""
    notes = [f"{path}: left out: {one}" for one in left_out]
    if names := list(dict.fromkeys(unknown)):
        notes.append(f"{path}: written by another version; not read: {', '.join(names)}")
    if problems is not None:
        problems += notes
    else:
        for note in notes:
            _log.info("%s", note)


class _MisfitError(ValueError):
    """JSON that is not a record of the expected class."""


_NO_OBJECT = "not a JSON object"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _fit(kind: Any, text: str, *, strict: bool) -> tuple[Any, list[str], list[str]]:
    """Return the record, the dropped values, and the keys that the class does not have."""
    value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    if not isinstance(value, dict):
        raise _MisfitError(_NO_OBJECT)
    left_out: list[str] = []
    while True:
        try:
            record = _adapter(kind).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            found = {_place(value, one["loc"]): _words(one) for one in error.errors(include_url=False)}
            if strict or () in found:
                raise _MisfitError("; ".join(found.values())) from error
            left_out += found.values()
            outermost = [place for place in found if not any(place[:n] in found for n in range(len(place)))]
            for place in sorted(outermost, reverse=True):  # the last item of a list first: the other indices stay valid
                _remove(value, place)
            continue
        return record, left_out, list(_unknown(value, record))


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _place(value: Any, place: tuple[int | str, ...]) -> tuple[Any, ...]:
    """Return the part of a location that exists in the value; for a missing key, that of the object without it."""
    found: list[int | str] = []
    for step in place:
        inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if not inside:
            break
        value = value[step]
        found.append(step)
    return tuple(found)


def _remove(value: Any, place: tuple[Any, ...]) -> None:
    for step in place[:-1]:
        value = value[step]
    del value[place[-1]]


def _words(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    got = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r:.80})"
    return f"{key}{': ' if key else ''}{error['msg']}{got}"


def _unknown(value: Any, record: Any) -> Iterator[str]:
    """Yield the keys of a JSON value that its record has no field for; a class with `OPEN` takes any."""
    if isinstance(value, list) and isinstance(record, (list, tuple)):
        for item, one in zip(value, record, strict=True):
            yield from _unknown(item, one)
    elif isinstance(value, dict) and isinstance(record, dict):
        for key, item in value.items():
            yield from _unknown(item, record[key])
    elif isinstance(value, dict) and is_dataclass(record) and not getattr(record, "OPEN", False):
        names = {one.name for one in fields(record)}
        for key, item in value.items():
            if key in names:
                yield from _unknown(item, getattr(record, key))
            else:
                yield key
