"""From files to the pairs or completions that a stage uses, in one fixed order of steps, with counts of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

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
    Unknown,
    Use,
    cell_of,
    completions_of_pairs,
    resolve_labels,
)
from bfpo.data.notes import FileNotes
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.read import PairIds, iter_pairs, read_pairs, read_sft
from bfpo.data.rejects import EMPTY, LEFT_OUT, ReadResult, Reject, check_rejects
from bfpo.data.settings import DataConfig, PairRowsConfig, RowsConfig, SftDataConfig
from bfpo.data.split import RowPicker, prompt_hashes

__all__ = ["LoadedCompletions", "LoadedPairs", "PairStream", "load_completions", "load_pair_rows", "load_pairs"]

Row = TypeVar("Row", Pair, Completion)
Hashes = npt.NDArray[np.uint64]
_NO_CELL = len(CELLS)
_CHANGED = "the files have changed since they were checked; do not write to them during a run, and start again"


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

    @property
    def hashes(self) -> Hashes:
        """The hashes of their prompts (`prompt_hashes`), ascending, each once."""
        return np.unique(np.frombuffer(b"".join(prompt_hashes(row.prompt) for row in self.completions), "<u8"))


class PairStream:
    """The pairs of `load_pairs`, read from their files again at each iteration and not kept in memory.

    A first pass over the files, made by `scan` or on first use, checks all rows and selects those to use. It keeps one
    byte a row, and while it runs 40 to 64 more for repeated ids and hashes, 16 each for a split and a limit. Arguments
    are those of `load_pairs` (`check` is called in this pass only), and `scan` raises the same errors. Iteration raises
    `DataError` if the files have changed since the scan.
    """

    def __init__(self, data: DataConfig, *, seed: int = 0, check: Callable[[Pair], None] | None = None) -> None:
        self._data, self._seed, self._check = data, seed, check
        self._ids = PairIds()  # after the scan: of later passes
        self._found: _Chosen | None = None

    def scan(self) -> None:
        """Make the first pass unless it was made already. Raises as `load_pairs` does."""
        self._chosen()

    @property
    def rejects(self) -> list[Reject]:
        """The rows that cannot be used."""
        return self._chosen().rejects

    @property
    def counts(self) -> dict[str, Any]:
        """The counts, as in `LoadedPairs`."""
        return self._chosen().counts

    @property
    def hashes(self) -> Hashes:
        """The hashes of the prompts of the pairs to use (`prompt_hashes`), ascending, each once."""
        return self._chosen().hashes

    def __len__(self) -> int:
        return int(self.counts["pairs"])

    def __iter__(self) -> Iterator[Pair]:
        chosen = self._chosen()
        return chosen.of(self._read(self._ids.again()))

    def _read(
        self, ids: PairIds, check: Callable[[Pair], None] | None = None, notes: FileNotes | None = None
    ) -> Iterator[Pair | Reject]:
        return _rows_of(self._data, ids, check, notes)

    def _chosen(self) -> _Chosen:
        if self._found is None:
            ids, notes = PairIds(), FileNotes()
            self._found = _choose(self._read(ids, self._check, notes), self._data, self._seed, notes)
            self._ids = ids.again()
        return self._found


def load_pairs(data: DataConfig, *, seed: int = 0, check: Callable[[Pair], None] | None = None) -> LoadedPairs:
    """Read pairs, resolve unknown labels, take one part of a split by prompt, and draw `limit` of them, in this order.

    A row for which `check` raises `RowError` is a bad row.

    Raises `DataError` for files that cannot be used, bad rows under `bad_rows="stop"` and if nothing is left,
    `LabelError` for unknown labels under `unknown_label="error"`, `SettingError` for a split or limit that cannot be
    taken.
    """
    notes = FileNotes()
    rows = list(_rows_of(data, check=check, notes=notes))
    chosen = _choose(rows, data, seed, notes)
    return LoadedPairs(list(chosen.of(rows)), chosen.rejects, chosen.counts)


def load_pair_rows(data: PairRowsConfig, *, seed: int = 0) -> ReadResult:
    """Read pairs whatever their labels, take one part of a split by prompt, and draw `limit` of them, in this order.

    `rows` counts all rows read. Raises `DataError` for files that cannot be used, bad rows under `bad_rows="stop"` and
    if nothing is left.
    """
    result = read_pairs(
        [Path(file) for file in data.files],
        layout=data.layout,
        columns=data.columns,
        source=data.source,
        labels=LabelWords.of(data.safe_values, data.unsafe_values),
    )
    check_rejects(result, bad_rows=data.bad_rows)
    pairs = _chosen_part(result.pairs, data, seed)
    if not pairs:
        raise DataError.at(data.files[0], None, "no pair is left; check split and limit")
    return replace(result, pairs=pairs)


def _rows_of(
    data: DataConfig,
    ids: PairIds | None = None,
    check: Callable[[Pair], None] | None = None,
    notes: FileNotes | None = None,
) -> Iterator[Pair | Reject]:
    return iter_pairs(
        [Path(file) for file in data.files],
        layout=data.layout,
        columns=data.columns,
        source=data.source,
        ids=ids,
        labels=LabelWords.of(data.safe_values, data.unsafe_values),
        check=check,
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which rows are used, one byte each, with the rejects and the counts."""

    used: npt.NDArray[np.bool_]
    unknown_label: Unknown
    rejects: list[Reject]
    counts: dict[str, Any]
    hashes: Hashes

    def of(self, rows: Iterable[Pair | Reject]) -> Iterator[Pair]:
        """Yield the pairs of the used rows, given the same rows again."""
        resolve = LabelResolver(self.unknown_label)
        num_rows = 0
        for row in rows:
            if num_rows < len(self.used) and self.used[num_rows]:
                pair = None if isinstance(row, Reject) else resolve(row)
                if pair is None:
                    raise DataError(f"row {num_rows + 1} is no longer a usable pair; {_CHANGED}")
                yield pair
            num_rows += 1
        if num_rows != len(self.used):
            raise DataError(f"the files have {num_rows} rows, but had {len(self.used)}; {_CHANGED}")


def _choose(rows: Iterable[Pair | Reject], data: DataConfig, seed: int, notes: FileNotes) -> _Chosen:
    """Check all rows and select those to use, keeping a few bytes of each; raises as `load_pairs`."""
    resolve = LabelResolver(data.unknown_label)
    picker = RowPicker(split=data.split, limit=data.limit, seed=seed)
    cells = bytearray()  # of each row: the index of its label cell
    hashes = bytearray()  # of each usable row
    rejects: list[Reject] = []
    for row in rows:
        pair = None if isinstance(row, Reject) else resolve(row)
        cells.append(_NO_CELL)
        if isinstance(row, Reject):
            rejects.append(row)
        elif pair is not None and pair.chosen_is_safe is not None and pair.rejected_is_safe is not None:
            picker.add(pair)
            hashes += prompt_hashes(pair.prompt)
            cells[-1] = CELLS.index(cell_of(pair.chosen_is_safe, pair.rejected_is_safe))
    num_rows = len(cells)
    result = ReadResult(rejects, num_rows)
    check_rejects(result, bad_rows=data.bad_rows)
    resolve.check()
    by_row = np.frombuffer(cells, np.uint8)
    used = by_row != _NO_CELL
    used[used] = picked = picker.picked()
    num_used = int(used.sum())
    if num_used == 0:
        raise DataError.at(data.files[0], None, "no pair is left to use; check split, unknown_label and limit")
    num_by_cell = np.bincount(by_row[used], minlength=len(CELLS)).tolist()
    counts = {
        "rows": num_rows,
        "rows_rejected": len(rejects),
        "rejected_by_reason": result.counts(),
        "labels_set_safe": resolve.counts["set_safe"],
        "pairs_without_label_dropped": resolve.counts["dropped"],
        "pairs": num_used,
        "cells": dict(zip(CELLS, num_by_cell, strict=True)),
        **notes.facts(),
    }
    each = np.unique(np.frombuffer(hashes, "<u8").reshape(-1, 2)[picked])
    return _Chosen(used, data.unknown_label, rejects, counts, each)


def load_completions(
    data: SftDataConfig, *, seed: int = 0, check: Callable[[Pair | Completion], None] | None = None
) -> LoadedCompletions:
    """Read completions to imitate from a file of completions, or from pairs of which `use` selects some.

    The layout decides which; "auto" looks at the columns of the first file. `limit` counts rows, or pairs if the file
    has pairs; `source` replaces a completion's kind. Labels matter for `use="safe"` only; otherwise an unknown label is
    not an error. Raises as `load_pairs` does.
    """
    files = [Path(file) for file in data.files]
    labels = LabelWords.of(data.safe_values, data.unsafe_values)
    if data.layout in COMPLETION_LAYOUTS or (
        data.layout == "auto" and _holds_completions(expand_files(files)[0], data.columns)
    ):
        result = read_sft(files, layout=data.layout, columns=data.columns, labels=labels, check=check)
        if "incoherent" in data.leave_out:
            named = [replace(one, reason=f"{LEFT_OUT}empty") if one.reason == EMPTY else one for one in result.rejects]
            result = replace(result, rejects=named)
        check_rejects(result, bad_rows=data.bad_rows)
        rows, rejects, counts = result.completions, result.rejects, {"rows": result.rows, **result.notes}
        rows = _chosen_part(_picked(rows, data.use, data.unknown_label), data, seed)
        rows = rows if data.source is None else [replace(row, kind=data.source) for row in rows]
    else:
        if data.leave_out:
            raise SettingError("leave_out: read only of completions, and these files hold pairs; leave it out")
        found = read_pairs(
            files, layout=data.layout, columns=data.columns, source=data.source, labels=labels, check=check
        )
        check_rejects(found, bad_rows=data.bad_rows)
        pairs = found.pairs if data.use != "safe" else resolve_labels(found.pairs, unknown=data.unknown_label)[0]
        pairs = _chosen_part(pairs, data, seed)
        rows = completions_of_pairs(pairs, data.use)
        rejects, counts = found.rejects, {"rows": found.rows, "pairs": len(pairs), **found.notes}
    if not rows:
        raise DataError.at(data.files[0], None, "nothing is left to use; check split, unknown_label, use and limit")
    counts |= {"rows_rejected": sum(one.is_bad for one in rejects), "completions": len(rows)}
    if left_out := Counter(one.reason.removeprefix(LEFT_OUT) for one in rejects if not one.is_bad):
        counts["left_out"] = dict(left_out.most_common())
    return LoadedCompletions(rows, rejects, counts)


def _holds_completions(file: Path, columns: ColumnNames | None) -> bool:
    """Whether the first row that fits any layout fits one of completions."""
    for row in mapped_rows(file, columns):
        if row.bad is None and COMPLETION_LAYOUTS.detect(row.columns) is not None:
            return True
        if row.bad is None and PAIR_LAYOUTS.detect(row.columns) is not None:
            return False
    return False


def _picked(rows: list[Completion], use: Use, unknown_label: Unknown) -> list[Completion]:
    """Return the completions that `use` selects: all, or the safe ones of a labelled data set."""
    if use == "all":
        return rows
    lacking = [row.id for row in rows if row.is_safe is None]
    if use != "safe" or len(lacking) == len(rows):
        raise SettingError(
            f"use: got {use!r} for a file of completions{'' if use != 'safe' else ' without safety labels'}; "
            "allowed: 'all', and 'safe' if they have safety labels"
        )
    if lacking and unknown_label == "error":
        raise LabelError(
            f"{len(lacking)} of {len(rows)} completions lack a safety label ({lacking[0]}, ...); label them, or "
            "set unknown_label: 'safe' counts an unknown label as safe, 'drop' leaves the completion out"
        )
    taken = 1.0 if unknown_label == "safe" else 0.0
    return [row for row in rows if (taken if row.is_safe is None else row.is_safe) > 0.5]


def _chosen_part(rows: Sequence[Row], data: RowsConfig, seed: int) -> list[Row]:
    """Split by prompt, then draw; both use only a row's prompt and id, which pairs and completions share."""
    picker = RowPicker(split=data.split, limit=data.limit, seed=seed)
    for row in rows:
        picker.add(row)
    return list(compress(rows, picker.picked()))
