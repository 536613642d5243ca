"""What a prepared folder holds: the chosen rows as Parquet, the lists of what was left out, and the manifest.

The same rows give the same bytes; one row group is in memory at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet

from bfpo._version import __version__
from bfpo.core.files import file_digest, open_whole
from bfpo.data.fields import FINISHED
from bfpo.preparation.compliance import count_compliances, pairs_to_read
from bfpo.preparation.mixture import Mixed, sample
from bfpo.preparation.parts import SPLITS, Part
from bfpo.preparation.rows import SCHEMA
from bfpo.preparation.shards import SHARD_VERSION

__all__ = ["make_manifest", "output_facts", "write_lists", "write_stream"]

_COMPLETIONS = pyarrow.schema(
    [
        SCHEMA.field("id"),
        SCHEMA.field("prompt"),
        ("completion", pyarrow.string()),
        ("is_safe", pyarrow.float64()),
        ("kind", pyarrow.string()),
        SCHEMA.field("category"),
        ("finished", pyarrow.bool_()),
    ]
)
_ROWS_PER_GROUP = 8192
_SETTINGS = {"compression": "zstd", "compression_level": 3, "use_dictionary": False, "version": "2.6"}
_FORMAT = 1
_PACKAGES = ("numpy", "pyarrow", "rensa")  # their versions affect the bytes too


# --------------------------------------------------------------------------------------------------------- rows


class Written:
    """What was written of a stream: rows by split, the rows of a sample, and pairs that prefer to comply by kind."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys(SPLITS, 0)
        self.sample: list[dict[str, Any]] = []
        self.compliances: Counter[str] = Counter()
        self.candidates: dict[str, int] = {}


def write_stream(
    folder: Path, parts: Sequence[Part], *, samples: int, seed: int, unsafe_prompts: npt.NDArray[np.uint64]
) -> Written:
    """Write `train.parquet`, `validation.parquet` and `test.parquet` of one stream, whole; only splits with rows.

    Rows are in the order of the mixture and of the files. Columns of cut completions and of categories are written only
    where there are any. Rows that hold `samples` completions are returned for languages and style, drawn by a hash, and
    pairs that hold as many are read for answers that are preferred to a refusal. `unsafe_prompts`: sorted hashes of
    prompts that have an unsafe answer. Raises `OSError`.
    """
    are_pairs = parts[0].source.stream != "sft"
    left_out = set() if any(part.shard.facts["categories"] for part in parts) else {"category"}
    if are_pairs and not any(part.num_cut() for part in parts):
        left_out.update(FINISHED)
    schema = pyarrow.schema([field for field in (SCHEMA if are_pairs else _COMPLETIONS) if field.name not in left_out])
    written = Written()
    to_read: list[npt.NDArray[np.bool_]] = []
    sampled_rows = samples / (2 if are_pairs else 1)
    if are_pairs and samples:
        to_read, num = pairs_to_read(parts, unsafe_prompts, ceil(sampled_rows))
        written.candidates = {"read": int(sum(mask.sum() for mask in to_read)), "candidates": num}
    share = [int(part.copies.astype(bool).sum()) for part in parts]
    present = {number for part in parts for number in np.unique(part.split[part.copies > 0]).tolist()}
    with ExitStack() as stack:
        files = {
            number: stack.enter_context(_split_file(folder / f"{SPLITS[number]}.parquet", schema))
            for number in sorted(present)
        }
        for number_of_part, (part, own) in enumerate(zip(parts, share, strict=True)):
            wanted = sample(part, ceil(sampled_rows * own / max(1, sum(share))), seed=seed)
            for batch, units in _batches(part):
                made = _pairs_of(part, batch, units) if are_pairs else _completions_of(part, batch, units)
                rows = made.select(schema.names)
                if to_read and (read := to_read[number_of_part][units]).any():
                    some_rows = rows.filter(pyarrow.array(read)).to_pylist()
                    written.compliances += count_compliances(some_rows, part.copies[units][read].tolist())
                written.sample += rows.filter(pyarrow.array(wanted[units])).to_pylist()
                for number, file in files.items():
                    some = np.flatnonzero(part.split[units] == number)
                    copies = part.copies[units[some]]
                    if copies.any():
                        taken = _copied(rows, some, copies)
                        written.rows[SPLITS[number]] += len(taken)
                        file.add(taken)
    return written


def _batches(part: Part) -> Iterator[tuple[Any, npt.NDArray[np.int64]]]:
    """Yield Arrow batches with the places of their units."""
    first_row = first_unit = 0
    for batch in part.shard.batches():
        last_unit = int(np.searchsorted(part.row, first_row + len(batch), "left"))
        yield batch, np.arange(first_unit, last_unit)
        first_row, first_unit = first_row + len(batch), last_unit


def _names(part: Part, ids: Any, rows: npt.NDArray[np.uint32], ends: Any = None) -> Any:
    """Return ids that begin with the source's name; a repeated id made from content ends with a number."""
    pieces = [pyarrow.scalar(f"{part.source.name}:"), ids]
    if len(rows) and len(part.repeated):
        begin, end = np.searchsorted(part.repeated[:, 0], [rows[0], int(rows[-1]) + 1])
        if end > begin:
            nth = {row: f"-{number}" for row, number in part.repeated[begin:end].tolist()}
            pieces.append(pyarrow.array([nth.get(row, "") for row in rows.tolist()]))
    return pc.binary_join_element_wise(*pieces, *([] if ends is None else [ends]), "")


def _pairs_of(part: Part, batch: Any, units: npt.NDArray[np.int64]) -> Any:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["id"] = _names(part, columns["id"], part.row[units])
    columns["source"] = _sources(part, columns["source"])
    if part.source.unknown_label == "safe":
        for name in ("chosen_is_safe", "rejected_is_safe"):
            columns[name] = pc.fill_null(columns[name], 1.0)
    return pyarrow.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _completions_of(part: Part, batch: Any, units: npt.NDArray[np.int64]) -> Any:
    rows, sides = part.row[units], part.side[units]
    taken = batch.take(pyarrow.array(rows - rows[0])) if len(rows) else batch.slice(0, 0)
    is_pair = bool(part.side.any()) or bool(taken.column("rejected").null_count < len(taken))
    ends = pyarrow.array([":rejected" if side else ":chosen" for side in sides.tolist()]) if is_pair else None
    is_second = pyarrow.array(sides.astype(bool))
    columns = [
        _names(part, taken.column("id"), rows, ends),
        taken.column("prompt"),
        pc.if_else(is_second, taken.column("rejected"), taken.column("chosen")),
        pc.if_else(is_second, taken.column("rejected_is_safe"), taken.column("chosen_is_safe")),
        _sources(part, taken.column("source")),
        taken.column("category"),
        pc.if_else(is_second, taken.column("rejected_finished"), taken.column("chosen_finished")),
    ]
    return pyarrow.record_batch(columns, schema=_COMPLETIONS)


def _sources(part: Part, sources: Any) -> Any:
    """Return the source of each row: its own, else the name in the mixture."""
    return pc.if_else(pc.equal(sources, ""), part.source.name, sources)


def _copied(rows: Any, places: npt.NDArray[np.int64], copies: npt.NDArray[np.uint16]) -> Any:
    """Return the rows at `places`, each as often as `copies` says; a copy's id ends with its number."""
    taken = rows.take(pyarrow.array(np.repeat(places, copies)))
    if copies.max() == 1:
        return taken
    numbers = np.concatenate([np.arange(count) for count in copies.tolist()])
    ends = pyarrow.array([f"#{number + 1}" if number else "" for number in numbers.tolist()])
    return taken.set_column(0, "id", pc.binary_join_element_wise(taken.column("id"), ends, ""))


class _SplitFile:
    """A Parquet file whose row groups do not depend on the batches that rows come in."""

    def __init__(self, stream: BinaryIO, schema: Any) -> None:
        self._writer = pyarrow.parquet.ParquetWriter(stream, schema, **_SETTINGS)
        self._schema = schema
        self._waiting: list[Any] = []
        self._num_waiting = 0

    def add(self, batch: Any) -> None:
        self._waiting.append(batch)
        self._num_waiting += len(batch)
        while self._num_waiting >= _ROWS_PER_GROUP:
            self._write_group(_ROWS_PER_GROUP)

    def close(self) -> None:
        if self._num_waiting:
            self._write_group(self._num_waiting)
        self._writer.close()

    def drop(self) -> None:
        """Close an unfinished file without writing the rest."""
        with suppress(Exception):
            self._writer.close()

    def _write_group(self, num: int) -> None:
        table = pyarrow.Table.from_batches(self._waiting, self._schema)
        rest = table.slice(num)
        # One chunk a column: the earlier cuts between rows must not affect the bytes.
        self._writer.write_table(table.slice(0, num).combine_chunks(), row_group_size=num)
        self._waiting, self._num_waiting = rest.to_batches(), len(rest)


@contextmanager
def _split_file(path: Path, schema: Any) -> Iterator[_SplitFile]:
    with open_whole(path) as stream:
        file = _SplitFile(stream, schema)
        try:
            yield file
        except BaseException:
            file.drop()
            raise
        file.close()


# -------------------------------------------------------------------------------------------- what was left out


def write_lists(folder: Path, mixed: Mixed) -> None:
    """Write the rows that cannot be used, those that match an evaluation prompt, and the contradictory ones."""
    lists = {
        "rejects.jsonl": ((part, row) for part in mixed.parts for row in _rejects(part)),
        "contamination.jsonl": ((part, row) for part in mixed.parts for row in part.shard.hits),
        "contradictory.jsonl": _contradictory_rows(mixed),
    }
    for name, rows in lists.items():
        with open_whole(folder / name) as file:
            for part, row in rows:
                named = {"stream": part.source.stream, "source": part.source.name, **row}
                file.write((json.dumps(named, ensure_ascii=False) + "\n").encode())


def _rejects(part: Part) -> Iterator[dict[str, Any]]:
    yield from part.shard.rejects
    yield from (reject.as_row() for reject in part.repeated_ids())


def _contradictory_rows(mixed: Mixed) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Yield the pairs that hold a completion which is labelled both safe and unsafe."""
    pair_parts = [part for part in mixed.parts if part.source.stream != "sft"]
    for part, found in zip(pair_parts, mixed.contradictory, strict=True):
        start = 0
        for batch in part.shard.batches():
            places = np.flatnonzero(found[start : start + len(batch)])
            start += len(batch)
            for row in batch.take(places).to_pylist():
                yield part, {name: row[name] for name in ("id", "chosen_is_safe", "rejected_is_safe")}


# ----------------------------------------------------------------------------------------------------- manifest


def make_manifest(
    *,
    settings: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    suites: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the manifest; nothing in it depends on the time, the output folder or the number of processes."""
    return {
        "format": _FORMAT,
        "made_by": "bfpo prepare",
        "versions": {
            "bfpo": __version__,
            "rows": str(SHARD_VERSION),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
        "settings": dict(settings),
        "sources": list(sources),
        "decontaminated": dict(suites),
        "files": dict(outputs),
    }


def output_facts(folder: Path, files: Iterable[Path], rows: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return hash, size and rows of each file by its path in the folder."""
    return {
        file.relative_to(folder).as_posix(): {
            "sha256": file_digest(file),
            "bytes": file.stat().st_size,
            "rows": rows[file.stem],
        }
        for file in files
    }
