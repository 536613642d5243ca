"""From files to the pairs or completions that a stage uses, in one fixed order of steps, with counts of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from bfpo.core.errors import DataError, LabelError, SettingError
from bfpo.core.inputs import expand_files
from bfpo.core.schema import Completion, Pair
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.fields import ColumnNames
from bfpo.data.files import mapped_rows
from bfpo.data.labels import (
    CELLS,
    LabelResolver,
    LabelWords,
    cell_of,
    completions_of_pair,
)
from bfpo.data.layouts import AUTO
from bfpo.data.notes import FileNotes
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.read import PairIds, iter_completions, iter_pairs
from bfpo.data.rejects import EMPTY, LEFT_OUT, ReadResult, Reject, check_rejects
from bfpo.data.settings import DataConfig, PairRowsConfig, RowsConfig, SftDataConfig
from bfpo.data.split import RowPicker, prompt_hashes

__all__ = [
    "CompletionStream",
    "Hashes",
    "LoadedCompletions",
    "LoadedPairs",
    "PairStream",
    "RowStream",
    "Scan",
    "load_completions",
    "load_pair_rows",
    "load_pairs",
    "merged_hashes",
]

Row = TypeVar("Row", Pair, Completion)
Seen = TypeVar("Seen")
Hashes = npt.NDArray[np.uint64]
_HASH_BYTES = 16
_NO_CONTENT = bytes(_HASH_BYTES)
_ROWS_OF_ERROR = 1000
_CHANGED = "the files have changed since they were checked; do not write to them during a run, and start again"


def merged_hashes(hashes: Iterable[Hashes]) -> Hashes:
    """Return all hashes, ascending, each once."""
    found: Hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    return found


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Pairs whose labels are all known, the rows that could not be used, and the counts."""

    pairs: list[Pair]
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedCompletions:
    """Completions to imitate, the rows that could not be used, and the counts."""

    completions: list[Completion]
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scan:
    """What the first pass over the rows of some files found.

    `rejects`: the rows that cannot be used. `counts`: as in `LoadedPairs` or `LoadedCompletions`. `hashes`: those of
    the prompts of what is used (`prompt_hashes`), ascending, each once.
    """

    rejects: list[Reject]
    counts: dict[str, Any]
    hashes: Hashes


class RowStream(ABC, Generic[Row]):
    """Pairs or completions, read from their files again at each iteration and not kept in memory.

    A first pass over the files, made by `scan` or on first use, checks all rows and selects those to use; `check` is
    called in this pass only. It keeps one byte a row, and while it runs 16 each for a split and a limit, and what the
    subclasses say. Iteration raises `DataError` if the files have changed since the scan.
    """

    unit: ClassVar[str]
    """What is counted, as the key of `counts`."""

    def __init__(self, data: Any, *, seed: int = 0, check: Callable[[Pair | Completion], None] | None = None) -> None:
        self._data, self._seed, self._check = data, seed, check
        self._ids = PairIds()  # after the scan: of later passes
        self._found: _Chosen[Row] | None = None
        self._recalled: Scan | None = None

    def recall(self, scan: Scan) -> None:
        """Take the result of an earlier scan of the same files, settings and check; only iteration makes another."""
        self._recalled = scan

    def scan(self) -> Scan:
        """Return what the first pass finds, made unless it was already, or what was recalled.

        Raises as `load_pairs` or `load_completions` does.
        """
        return self._recalled or self._chosen().scan

    def __len__(self) -> int:
        return int(self.scan().counts[self.unit])

    def __iter__(self) -> Iterator[Row]:
        chosen = self._chosen()
        return chosen.of(self._read(self._ids.again()))

    def _chosen(self) -> _Chosen[Row]:
        if self._found is None:
            ids, notes = PairIds(), FileNotes()
            self._found = self._choose(self._read(ids, self._check, notes), notes)
            self._ids = ids.again()
        return self._found

    @abstractmethod
    def _read(
        self, ids: PairIds, check: Callable[[Any], None] | None = None, notes: FileNotes | None = None
    ) -> Iterator[Any]:
        """Yield the row or reject of each row of the files."""

    @abstractmethod
    def _choose(self, rows: Iterable[Any], notes: FileNotes) -> _Chosen[Row]:
        """Check all rows and select those to use, keeping a few bytes of each."""


class PairStream(RowStream[Pair]):
    """The pairs of `load_pairs`; the scan also takes 40 to 64 bytes a row for repeated ids and hashes."""

    unit = "pairs"

    def _read(
        self, ids: PairIds, check: Callable[[Pair], None] | None = None, notes: FileNotes | None = None
    ) -> Iterator[Pair | Reject]:
        return _rows_of(self._data, ids, check, notes)

    def _choose(self, rows: Iterable[Pair | Reject], notes: FileNotes) -> _Chosen[Pair]:
        return _choose(rows, self._data, self._seed, notes)


class CompletionStream(RowStream[Completion]):
    """The completions of `load_completions`; the scan takes 16 bytes a row for hashes, of pairs up to 96."""

    unit = "completions"

    @cached_property
    def _alone(self) -> bool:
        """Whether the rows are completions, not pairs."""
        data, layout = self._data, self._data.layout
        if layout != AUTO:
            return layout in COMPLETION_LAYOUTS
        return _hold_completions(expand_files([Path(file) for file in data.files]), data.columns)

    def _read(
        self, ids: PairIds, check: Callable[[Any], None] | None = None, notes: FileNotes | None = None
    ) -> Iterator[Pair | Completion | Reject]:
        data = self._data
        if not self._alone:
            return _rows_of(data, ids, check, notes)
        return iter_completions(
            [Path(file) for file in data.files],
            layout=data.layout,
            columns=data.columns,
            labels=LabelWords.of(data.safe_values, data.unsafe_values),
            check=check,
            notes=notes,
        )

    def _choose(self, rows: Iterable[Any], notes: FileNotes) -> _Chosen[Completion]:
        if not self._alone and self._data.leave_out:
            raise SettingError("leave_out: read only of completions, and these files hold pairs; leave it out")
        return (_choose_alone if self._alone else _choose_of_pairs)(rows, self._data, self._seed, notes)


def load_pairs(data: DataConfig, *, seed: int = 0, check: Callable[[Pair], None] | None = None) -> LoadedPairs:
    """Read pairs, resolve unknown labels, take one part of a split by prompt, and draw `limit` of them, in this order.

    A row for which `check` raises `RowError` is a bad row.

    Raises `DataError` for files that cannot be used, bad rows under `bad_rows="stop"` and if nothing is left,
    `LabelError` for unknown labels under `unknown_label="error"`, `SettingError` for a split or limit that cannot be
    taken.
    """
    notes = FileNotes()
    rows: list[Pair | Reject] = []

    def kept() -> Iterator[Pair | Reject]:
        for row in _rows_of(data, check=check, notes=notes):
            rows.append(row)
            yield row

    chosen = _choose(kept(), data, seed, notes)
    return LoadedPairs(list(chosen.of(rows)), chosen.scan.rejects, chosen.scan.counts)


def load_pair_rows(data: PairRowsConfig, *, seed: int = 0) -> ReadResult:
    """Read pairs whatever their labels, take one part of a split by prompt, and draw `limit` of them, in this order.

    `rows` counts all rows read. Raises `DataError` for files that cannot be used, bad rows under `bad_rows="stop"` and
    if nothing is left.
    """
    seen, notes = _Pass(data, seed), FileNotes()
    pairs: list[Pair] = []
    layouts: dict[str, str] = {}
    for row in seen.until_full(_rows_of(data, notes=notes, layouts=layouts)):
        seen.add(row, 1)
        if not isinstance(row, Reject):
            pairs.append(row)
    check_rejects(seen.result, bad_rows=data.bad_rows, files=data.files)
    picked = list(compress(pairs, seen.picked()[1]))
    if not picked:
        raise DataError.at(data.files[0], None, "no pair is left; check split and limit")
    return replace(seen.result, pairs=picked, layouts=layouts, notes=notes.facts())


def _rows_of(
    data: PairRowsConfig,
    ids: PairIds | None = None,
    check: Callable[[Pair], None] | None = None,
    notes: FileNotes | None = None,
    layouts: dict[str, str] | None = None,
) -> Iterator[Pair | Reject]:
    return iter_pairs(
        [Path(file) for file in data.files],
        layout=data.layout,
        columns=data.columns,
        source=data.source,
        layouts=layouts,
        ids=ids,
        labels=LabelWords.of(data.safe_values, data.unsafe_values),
        check=check,
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Chosen(Generic[Row]):
    """How each row is used, one byte each (0: not), and what the scan found.

    `make` returns what a row gives that is used in this way. `is_part`: rows after these were not read.
    """

    used: npt.NDArray[np.uint8]
    make: Callable[[Any, int], Iterable[Row | None]]
    scan: Scan
    is_part: bool = False

    def of(self, rows: Iterable[Pair | Completion | Reject]) -> Iterator[Row]:
        """Yield what the used rows give, given the same rows again."""
        num_rows = 0
        for row in islice(rows, len(self.used) if self.is_part else None):
            if num_rows < len(self.used) and (use := int(self.used[num_rows])):
                for made in (None,) if isinstance(row, Reject) else self.make(row, use):
                    if made is None:
                        raise DataError(f"row {num_rows + 1} is no longer a usable one; {_CHANGED}")
                    yield made
            num_rows += 1
        if num_rows != len(self.used):
            raise DataError(f"the files have {num_rows} rows, but had {len(self.used)}; {_CHANGED}")


class _Pass:
    """A pass over rows: a mark of each, one byte (0: not usable), and what selects among the usable ones."""

    def __init__(self, data: RowsConfig, seed: int) -> None:
        self._picker = RowPicker(split=data.split, limit=data.limit, seed=seed, first=data.streaming)
        self._marks, self._hashes = bytearray(), bytearray()
        self._bad_rows, self._stops = data.bad_rows, False
        self._most = (data.limit or _ROWS_OF_ERROR) if data.streaming else None
        self.rejects: list[Reject] = []

    def add(self, row: Pair | Completion | Reject, mark: int, *, stops: bool = False) -> None:
        """Add the next row; `stops`: it is an error of the run, as a bad row is under `bad_rows="stop"`."""
        if isinstance(row, Reject):
            self.rejects.append(row)
            mark, stops = 0, row.is_bad and self._bad_rows == "stop"
        self._stops |= stops
        self._marks.append(mark)
        if mark and not isinstance(row, Reject):
            self._picker.add(row)
            self._hashes += prompt_hashes(row.prompt)

    def until_full(self, rows: Iterable[Seen]) -> Iterator[Seen]:
        """Yield the rows, each to be added before the next is asked for, until no more can be picked.

        A stream with an error is not read further than its limit, or `_ROWS_OF_ERROR`, only to list more errors.
        """
        for row in rows:
            yield row
            has_failed = self._stops and self._most is not None and len(self._marks) >= self._most
            if self._picker.is_full or has_failed:
                if isinstance(rows, Generator):
                    rows.close()  # the notes on a file are complete when it is
                return

    @property
    def is_full(self) -> bool:
        """Whether no row to come can be picked."""
        return self._picker.is_full

    @property
    def result(self) -> ReadResult:
        """The rejects and the number of rows, to be checked."""
        return ReadResult(self.rejects, len(self._marks))

    def picked(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return the marks with 0 for rows that are not picked, and which of the usable rows are."""
        marks = np.frombuffer(self._marks, np.uint8).copy()
        usable = np.flatnonzero(marks)
        picked = self._picker.picked()
        marks[usable[~picked]] = 0
        return marks, picked

    def hashes(self, of: npt.NDArray[np.bool_]) -> Hashes:
        """Return the hashes of the prompts of these of the usable rows, ascending, each once."""
        found: Hashes = np.unique(np.frombuffer(self._hashes, "<u8").reshape(-1, 2)[of])
        return found


def _choose(rows: Iterable[Pair | Reject], data: DataConfig, seed: int, notes: FileNotes) -> _Chosen[Pair]:
    """Check all rows and select the pairs to use; raises as `load_pairs`. The mark of a row is its cell, from 1."""
    resolve = LabelResolver(data.unknown_label)
    seen = _Pass(data, seed)
    for row in seen.until_full(rows):
        pair = None if isinstance(row, Reject) else resolve(row)
        known = pair is not None and pair.chosen_is_safe is not None and pair.rejected_is_safe is not None
        mark = 1 + _cell_index(pair) if pair is not None and known else 0
        seen.add(row, mark, stops=mark == 0 and data.unknown_label == "error")
    check_rejects(seen.result, bad_rows=data.bad_rows, files=data.files)
    resolve.check()
    used, picked = seen.picked()
    num_used = int(picked.sum())
    if num_used == 0:
        raise DataError.at(data.files[0], None, "no pair is left to use; check split, unknown_label and limit")
    num_by_cell = np.bincount(used, minlength=1 + len(CELLS))[1:].tolist()
    counts = {
        "rows": len(used),
        "rows_rejected": len(seen.rejects),
        "rejected_by_reason": seen.result.counts(),
        "labels_set_safe": resolve.counts["set_safe"],
        "pairs_without_label_dropped": resolve.counts["dropped"],
        "pairs": num_used,
        "cells": dict(zip(CELLS, num_by_cell, strict=True)),
        **notes.facts(),
    }
    again = LabelResolver(data.unknown_label)
    scan = Scan(seen.rejects, counts, seen.hashes(picked))
    return _Chosen(used, lambda pair, _: (again(pair),), scan, seen.is_full)


def _cell_index(pair: Pair) -> int:
    assert pair.chosen_is_safe is not None
    assert pair.rejected_is_safe is not None
    return CELLS.index(cell_of(pair.chosen_is_safe, pair.rejected_is_safe))


def load_completions(
    data: SftDataConfig, *, seed: int = 0, check: Callable[[Pair | Completion], None] | None = None
) -> LoadedCompletions:
    """Read completions to imitate from a file of completions, or from pairs of which `use` selects some.

    The layout decides which; "auto" looks at the columns of the first file. `limit` counts rows, or pairs if the file
    has pairs; `source` replaces a completion's kind. Labels matter for `use="safe"` only; otherwise an unknown label is
    not an error. Of pairs, each prompt and text is used once. Raises as `load_pairs` does.
    """
    stream = CompletionStream(data, seed=seed, check=check)
    return LoadedCompletions(list(stream), stream.scan().rejects, stream.scan().counts)


def _choose_alone(
    rows: Iterable[Completion | Reject], data: SftDataConfig, seed: int, notes: FileNotes
) -> _Chosen[Completion]:
    """Select the completions of a file of completions."""
    seen = _Pass(data, seed)
    taken = 1.0 if data.unknown_label == "safe" else 0.0
    num, lacking, first = 0, 0, ""
    for row in seen.until_full(rows):
        if isinstance(row, Reject):
            is_left_out = row.reason == EMPTY and "incoherent" in data.leave_out
            seen.add(replace(row, reason=f"{LEFT_OUT}empty") if is_left_out else row, 0)
            continue
        num += 1
        if row.is_safe is None:
            lacking, first = lacking + 1, first or row.id
        is_safe = (taken if row.is_safe is None else row.is_safe) > 0.5
        lacks = data.use == "safe" and row.is_safe is None and data.unknown_label == "error"
        seen.add(row, 1 if data.use == "all" or is_safe else 0, stops=lacks or data.use == "chosen")
    check_rejects(seen.result, bad_rows=data.bad_rows, files=data.files)
    _check_use(data, num, lacking, first)
    used, picked = seen.picked()
    make = partial(_of_kind, data.source)
    counts = _completion_counts(data, seen, int(picked.sum()), notes)
    return _Chosen(used, make, Scan(seen.rejects, counts, seen.hashes(picked)), seen.is_full)


def _of_kind(kind: str | None, row: Completion, _: int) -> tuple[Completion]:
    return (row if kind is None else replace(row, kind=kind),)


def _choose_of_pairs(
    rows: Iterable[Pair | Reject], data: SftDataConfig, seed: int, notes: FileNotes
) -> _Chosen[Completion]:
    """Select completions of pairs; the mark of a row is 4, + 1 and + 2 for its two completions if they are used."""
    seen, resolve = _Pass(data, seed), LabelResolver(data.unknown_label)
    contents = bytearray()  # two hashes a usable pair, zeros for a completion that is not used
    for row in seen.until_full(rows):
        pair = None if isinstance(row, Reject) else resolve(row) if data.use == "safe" else row
        if pair is None or isinstance(pair, Reject):
            seen.add(row, 0, stops=data.unknown_label == "error")
            continue
        chosen, rejected = map(_content_hash, completions_of_pair(pair))
        wanted = [data.use != "safe" or (label or 0.0) > 0.5 for label in (pair.chosen_is_safe, pair.rejected_is_safe)]
        wanted[1] &= data.use != "chosen"
        contents += chosen * wanted[0] or _NO_CONTENT
        contents += rejected * wanted[1] or _NO_CONTENT
        seen.add(row, 4)
    check_rejects(seen.result, bad_rows=data.bad_rows, files=data.files)
    if data.use == "safe":
        resolve.check()
    used, picked = seen.picked()
    flat = np.frombuffer(contents, f"S{_HASH_BYTES}").reshape(-1, 2)[picked].ravel()
    is_new = np.zeros(len(flat), np.bool_)
    is_new[np.unique(flat, return_index=True)[1]] = True  # the first of each content
    is_new &= flat != b""
    bits = is_new.reshape(-1, 2) @ np.array([1, 2], np.uint8)
    num_pairs = len(bits)
    used[np.flatnonzero(used)] = bits
    kept = picked.copy()
    kept[np.flatnonzero(picked)] = bits > 0
    counts = _completion_counts(data, seen, int(is_new.sum()), notes, pairs=num_pairs)
    return _Chosen(used, _completions_by_bits, Scan(seen.rejects, counts, seen.hashes(kept)), seen.is_full)


def _content_hash(completion: Completion) -> bytes:
    content = repr((completion.prompt, completion.text, completion.extra, completion.tools))
    return blake2b(content.encode(), digest_size=_HASH_BYTES).digest()


def _completions_by_bits(pair: Pair, bits: int) -> Iterator[Completion]:
    for bit, completion in zip((1, 2), completions_of_pair(pair), strict=True):
        if bits & bit:
            yield replace(completion, is_safe=None)


def _completion_counts(data: SftDataConfig, seen: _Pass, num: int, notes: FileNotes, **more: int) -> dict[str, Any]:
    """Return the counts, `num` of the completions to use; raises `DataError` if there are none."""
    if num == 0:
        raise DataError.at(data.files[0], None, "nothing is left to use; check split, unknown_label, use and limit")
    rejects = seen.rejects
    counts: dict[str, Any] = {"rows": seen.result.rows, **more, **notes.facts()}
    counts |= {"rows_rejected": sum(one.is_bad for one in rejects), "completions": num}
    if left_out := Counter(one.reason.removeprefix(LEFT_OUT) for one in rejects if not one.is_bad):
        counts["left_out"] = dict(left_out.most_common())
    return counts


def _hold_completions(files: Iterable[Path], columns: ColumnNames | None) -> bool:
    """Whether the first row that fits any layout fits one of completions; a file may have no row."""
    for row in chain.from_iterable(mapped_rows(file, columns) for file in files):
        if row.bad is None and COMPLETION_LAYOUTS.detect(row.columns) is not None:
            return True
        if row.bad is None and PAIR_LAYOUTS.detect(row.columns) is not None:
            return False
    return False


def _check_use(data: SftDataConfig, num: int, lacking: int, first: str) -> None:
    """Check that `num` completions can be selected by `use`, of which `lacking` have no label, such as `first`."""
    if data.use == "all":
        return
    if data.use != "safe" or lacking == num:
        raise SettingError(
            f"use: got {data.use!r} for a file of completions{'' if data.use != 'safe' else ' without safety labels'}; "
            "allowed: 'all', and 'safe' if they have safety labels"
        )
    if lacking and data.unknown_label == "error":
        raise LabelError(
            f"{lacking} of {num} completions lack a safety label ({first}, ...); label them, or set "
            "unknown_label: 'safe' counts an unknown label as safe, 'drop' leaves the completion out"
        )
