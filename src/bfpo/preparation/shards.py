"""The rows read from a source, on disk: made once, by several processes, and found again by a hash of the inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow

from bfpo._version import __version__
from bfpo.data.labels import LabelWords
from bfpo.data.notes import FileNotes
from bfpo.data.rejects import LEFT_OUT, Reject
from bfpo.judges.refusals import RefusalJudge
from bfpo.preparation.plan import PlannedSource
from bfpo.preparation.rows import KEYS, SCHEMA, Block, RawBlock, RowReader, raw_rows, reader_of
from bfpo.preparation.workers import Readers

__all__ = ["SHARD_VERSION", "Shard", "find_or_make", "problem_of", "remove_leftovers"]

SHARD_VERSION = 6
"""Part of the key of a shard; increase it when the same rows would give other bytes."""

_ROWS, _KEYS, _BANDS, _SKETCHES, _REJECTS, _HITS, _FACTS = (
    "rows.arrow",
    "keys.bin",
    "bands.bin",
    "sketches.bin",
    "rejects.jsonl",
    "hits.jsonl",
    "shard.json",
)
_BLOCK_ROWS, _BLOCK_CHARS = 1024, 1 << 20
_SHOWN_REJECTS = 5
_READ_ROWS = 1 << 15
_ABANDONED_S = 86_400


@dataclass(frozen=True)
class Shard:
    """The usable rows of a source: text in Arrow blocks, and numbers for selection in files of their own."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`rows`, `usable`, `rejected_by_reason`, `rejects` (the first ones), `hits_by_suite`, `layouts` and others.

        `files`: each file with its first usable row; `categories`: how many usable rows have one.
        """
        facts: dict[str, Any] = json.loads((self.path / _FACTS).read_text(encoding="utf-8"))
        return facts

    def __len__(self) -> int:
        return int(self.facts["usable"])

    @property
    def rejects(self) -> Iterator[dict[str, Any]]:
        """The rows that cannot be used."""
        return _json_lines(self.path / _REJECTS)

    @property
    def hits(self) -> Iterator[dict[str, Any]]:
        """The rows that match an evaluation prompt, one for each suite."""
        return _json_lines(self.path / _HITS)

    def rows_at(self, rows: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[str, int, str]]:
        """Yield the file, the line and the id of these rows, which are ascending."""
        if not len(rows):
            return
        lines, first = self.key("line")[rows].tolist(), 0
        starts = [start for _, start in self.facts["files"]]
        for batch in self.batches():
            begin, end = np.searchsorted(rows, [first, first + len(batch)])
            ids = batch.column("id").take(pyarrow.array(rows[begin:end] - first)).to_pylist()
            for row, line, name in zip(rows[begin:end].tolist(), lines[begin:end], ids, strict=True):
                yield self.facts["files"][bisect_right(starts, row) - 1][0], line, name
            first += len(batch)

    def batches(self) -> Iterator[Any]:
        """Yield the rows as Arrow record batches."""
        with (self.path / _ROWS).open("rb") as file, pyarrow.ipc.open_stream(file) as stream:
            yield from stream

    def numbers(self) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Yield the numbers of some rows at a time, with their places."""
        for start, block in self._blocks(_KEYS, KEYS):
            yield slice(start, start + len(block)), block

    def key(self, name: str, column: int | None = None) -> npt.NDArray[Any]:
        """Return one field of `KEYS` for all rows, or one column of it; only this is loaded."""
        field = KEYS[name]
        values = np.empty((len(self), *field.shape) if column is None else len(self), field.base)
        for places, block in self.numbers():
            values[places] = block[name] if column is None else block[name][:, column]
        return values

    def band(self, number: int) -> npt.NDArray[np.uint32]:
        """Return one band of the sketches of all rows."""
        values = np.empty(len(self), np.uint32)
        for start, block in self._blocks(_BANDS, np.dtype((np.uint32, self.facts["num_bands"]))):
            values[start : start + len(block)] = block[:, number]
        return values

    def sketches(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Return the low bytes of the sketches of these rows, (N, permutations)."""
        width = self.facts["num_permutations"]
        # Read, not mapped: the few requested rows are far apart, and a map would also load what is around them.
        with (self.path / _SKETCHES).open("rb", buffering=0) as file:
            read = [os.pread(file.fileno(), width, row * width) for row in rows.tolist()]
        return np.frombuffer(b"".join(read), np.uint8).reshape(len(rows), width)

    def _blocks(self, name: str, kind: np.dtype[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        with (self.path / name).open("rb") as file:
            for start in range(0, len(self), _READ_ROWS):
                yield start, np.frombuffer(file.read(_READ_ROWS * kind.itemsize), kind)


def problem_of(source: PlannedSource, shard: Shard) -> str | None:
    """Return an error message if no row of a source can be used or bad rows are an error, else `None`."""
    name, facts = source.config.name, shard.facts
    reasons: dict[str, int] = facts["rejected_by_reason"]
    if len(shard) and (all(reason.startswith(LEFT_OUT) for reason in reasons) or source.config.bad_rows == "skip"):
        return None
    if not facts["rows"]:
        return f"{name}: no row was read from {', '.join(map(str, source.files))}"
    shown = "".join(f"; {Reject(**row)}" for row in facts["rejects"])
    advice = "fix these rows, or set bad_rows to 'skip' to leave them out" if len(shard) else "none is usable"
    by_reason = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{name}: {sum(reasons.values())} of {facts['rows']} rows cannot be used ({by_reason}){shown}; {advice}"


def find_or_make(
    root: Path, source: PlannedSource, readers: Readers, shared: Mapping[str, Any], progress: Callable[[int], None]
) -> Shard:
    """Return the shard of a source in the folder `root`, made if it is missing; it appears only when complete.

    `progress` is called with the number of rows of each block. Raises `DataError` for files that cannot be read.
    """
    final = root / _key(source, shared)
    if (final / _FACTS).is_file():
        return Shard(final)
    part = root / f".{final.name}.{uuid4().hex}.part"  # runs on several machines may share the folder
    part.mkdir(parents=True)
    try:
        with ShardWriter(part) as writer:
            for block in readers.map(_raw_blocks(source, writer)):
                writer.add(block)
                progress(len(block.keys) + len(block.rejects))
        if not (final / _FACTS).is_file():  # else another run has made it meanwhile
            shutil.rmtree(final, ignore_errors=True)
            part.replace(final)
    except OSError:
        if not (final / _FACTS).is_file():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Shard(final)


def _key(source: PlannedSource, shared: Mapping[str, Any]) -> str:
    """Return the name of the shard: a hash of all that its content depends on. `shared`: what all sources share."""
    files = [[str(file), digest] for file, digest in zip(source.files, source.digests, strict=True)]
    config = source.config
    reading: list[Any] = [source.kind, source.layout, sorted(config.columns.items()), source.limit]
    if config.safe_values:
        reading += [sorted(config.safe_values), sorted(config.unsafe_values)]
    if config.leave_out:
        reading.append(sorted(config.leave_out))
    if source.deep is not None:
        reading.append(repr(source.deep))
    if config.leave_out or source.deep is not None:
        reading.append(RefusalJudge().version)
    versions = [SHARD_VERSION, __version__, *map(metadata.version, ("pyarrow", "rensa", "tokenizers"))]
    content = json.dumps([versions, files, reading, shared], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def remove_leftovers(root: Path) -> None:
    """Remove incomplete shards in which nothing was written for a day, of killed runs on any machine."""
    for part in root.glob(".*.part"):
        with suppress(OSError):  # as another run removes or finishes it
            if max(path.stat().st_mtime for path in (part, *part.iterdir())) < time.time() - _ABANDONED_S:
                shutil.rmtree(part, ignore_errors=True)


def _raw_blocks(source: PlannedSource, writer: ShardWriter) -> Iterator[RawBlock]:
    config = source.config
    reading: dict[str, Any] = {"columns": config.columns, "leave_out": config.leave_out, "deep": source.deep}
    reading["labels"] = LabelWords.of(config.safe_values, config.unsafe_values)
    for file in source.files:
        reader = reader_of(file, layout=source.layout, kind=source.kind, **reading)
        writer.start_file(file, reader)
        rows: list[tuple[int, Mapping[str, object]]] = []
        chars = 0
        for number, row in enumerate(raw_rows(file, source.config.columns, reader, writer.notes)):
            if source.limit is not None and number >= source.limit:
                break
            if isinstance(row, Reject):
                writer.reject(row)
                continue
            assert reader is not None  # a file with a row of columns has a reader
            rows.append(row)
            chars += _size(row[1])
            if len(rows) >= _BLOCK_ROWS or chars >= _BLOCK_CHARS:
                yield RawBlock(reader, rows)
                rows, chars = [], 0
        if rows and reader is not None:
            yield RawBlock(reader, rows)


def _size(value: object) -> int:
    """Return about how many characters a value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 8


class ShardWriter:
    """Writes a shard block by block, keeping none in memory. Its facts are written last and mark it as complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = ExitStack()
        self._open = {
            name: self._files.enter_context((path / name).open("wb"))
            for name in (_ROWS, _KEYS, _BANDS, _SKETCHES, _REJECTS, _HITS)
        }
        self._stream = self._files.enter_context(pyarrow.ipc.new_stream(self._open[_ROWS], SCHEMA))
        self._num_usable = self._num_rejected = self._num_categories = 0
        self._widths = (0, 0)
        self._reasons: Counter[str] = Counter()
        self._suites: Counter[str] = Counter()
        self._contaminated = 0
        self._shown: list[Reject] = []
        self._layouts: dict[str, str] = {}
        self._starts: list[tuple[str, int]] = []
        self.notes = FileNotes()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._files.close()
        if error is None:
            facts = {
                "rows": self._num_usable + self._num_rejected,
                "usable": self._num_usable,
                "rejected_by_reason": dict(self._reasons.most_common()),
                "rejects": [reject.as_row() for reject in self._shown],
                "contaminated": self._contaminated,
                "hits_by_suite": dict(sorted(self._suites.items())),
                "layouts": self._layouts,
                "files": self._starts,
                "categories": self._num_categories,
                "num_bands": self._widths[0],
                "num_permutations": self._widths[1],
                **self.notes.facts(),
            }
            (self._path / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    def start_file(self, file: Path, reader: RowReader | None) -> None:
        """Record the layout of a file, and which usable row is its first."""
        self._starts.append((str(file), self._num_usable))
        if reader is not None:
            self._layouts[str(file)] = reader.layout

    def reject(self, reject: Reject) -> None:
        """Record a row that cannot be used; the first of each reason is shown, and the first few."""
        is_new = not self._reasons[reject.reason]
        self._reasons[reject.reason] += 1
        self._num_rejected += 1
        if is_new or len(self._shown) < _SHOWN_REJECTS:
            self._shown.append(reject)
        self._write_json(_REJECTS, [reject.as_row()])

    def add(self, block: Block) -> None:
        """Write a block."""
        for reject in block.rejects:
            self.reject(reject)
        if not len(block.keys):
            return
        self._stream.write_batch(block.batch)
        self._num_categories += sum(bool(name) for name in block.batch.column("category").to_pylist())
        self._open[_KEYS].write(block.keys.tobytes())
        self._open[_BANDS].write(block.bands.tobytes())
        self._open[_SKETCHES].write(block.sketches.tobytes())
        self._widths = (block.bands.shape[1], block.sketches.shape[1])
        for found in block.hits:
            self._contaminated += 1
            self._suites.update(hit.suite for hit in found.hits)
            place = {"file": block.file, "line": found.line, "id": found.row_id}
            self._write_json(_HITS, [{**asdict(hit), **place} for hit in found.hits])
        self._num_usable += len(block.keys)

    def _write_json(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._open[name].write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
