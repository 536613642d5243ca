"""STAGE: sources -> pairs and completions in fixed splits, with a data card and a manifest (`bfpo prepare`)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import PrepareConfig
from bfpo.core.errors import DataError, DiskFullError, RunError
from bfpo.core.files import file_digest, is_disk_full, open_whole
from bfpo.core.progress import CountProgress
from bfpo.preparation.card import card_head, card_sections, draw_data, source_lines, stream_lines
from bfpo.preparation.mixture import Mixed, mix
from bfpo.preparation.parts import Policy
from bfpo.preparation.plan import PlannedSource, Suite, describe_data, plan_source, read_suite
from bfpo.preparation.rows import make_reader
from bfpo.preparation.shards import Shard, find_or_make, remove_leftovers
from bfpo.preparation.sketches import SketchSettings
from bfpo.preparation.workers import Readers
from bfpo.preparation.write import (
    contaminated_rows,
    contradictory_rows,
    make_manifest,
    output_facts,
    rejected_rows,
    write_stream,
)
from bfpo.runs.folder import RunFolder

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

MANIFEST, _WORK = "manifest.json", "work"
_PREVIEW_ROWS = 2000
_NOT_OF_THE_DATA = {"processes", "cache", "alpha", "language_sample", "tokenizer"}  # settings that change no row


def run(config: PrepareConfig, folder: RunFolder) -> None:
    """Write `<stream>/<split>.parquet`, `manifest.json`, `data.json`, figure, card and lists of what was left out.

    Every file appears whole, the manifest last of the data: a folder without one is not finished. A resumed run finds
    what was read of the sources. Raises `DataError` and `LabelError` for data that cannot be used, `DiskFullError`.
    """
    if not folder.is_writer:
        return
    suites = _read_suites(config)
    sources = _plan(config)
    for source in sources:
        folder.add_data(f"{source.stream} {source.name}", source.files)
    for suite in suites:
        folder.add_data(f"decontaminate {suite.name}", suite.files)
    folder.file(MANIFEST).unlink(missing_ok=True)
    work = Path(config.cache) if config.cache is not None else folder.folder(_WORK)
    try:
        work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(work)
        shards = _read(config, sources, suites, work)
        _check_rejects(sources, shards)
        mixed = _mix(config, sources, shards)
        _write(config, folder, sources, suites, mixed)
    except OSError as error:
        raise _disk_error(folder, work, error) from error
    if config.cache is None:
        shutil.rmtree(work, ignore_errors=True)


def preview(config: PrepareConfig) -> list[str]:
    """Return what a sample shows: the first 2,000 rows of each file, all used and none drawn; nothing is written."""
    suites = _read_suites(config)
    sources = _plan(config, limit=_PREVIEW_ROWS)
    with tempfile.TemporaryDirectory() as name:
        shards = _read(config, sources, suites, Path(name))
        _check_rejects(sources, shards)
        mixed = _mix(config, sources, shards, draws=False)
        data = describe_data(
            mixed, sources, suites, alpha=config.alpha, with_tokens=config.tokenizer is not None, languages={}
        )
    lines = [f"a sample: at most the first {_PREVIEW_ROWS} rows of each file, all that can be used of them"]
    return [*lines, *_told(data)]


# ------------------------------------------------------------------------------------------------------- the steps


def _read_suites(config: PrepareConfig) -> list[Suite]:
    return [
        read_suite(suite.name, [Path(file) for file in suite.files], suite.columns) for suite in config.decontaminate
    ]


def _plan(config: PrepareConfig, limit: int | None = None) -> list[PlannedSource]:
    return [
        plan_source(
            Policy(
                name=source.name,
                stream=source.stream,
                use=source.use or "all",
                count=source.count,
                weight=source.weight,
                oversample=source.oversample,
                unknown_label=source.unknown_label,
            ),
            paths=None if source.files is None else [Path(file) for file in source.files],
            layout=source.layout,
            columns=source.columns,
            revision=source.revision,
            licence=source.licence,
            bad_rows=source.bad_rows,
            limit=limit,
        )
        for source in config.sources
    ]


def _sketch(config: PrepareConfig) -> SketchSettings | None:
    return None if config.near_duplicates is None else SketchSettings(**config.near_duplicates.model_dump())


def _read(config: PrepareConfig, sources: Sequence[PlannedSource], suites: Sequence[Suite], work: Path) -> list[Shard]:
    tokenizer = _tokenizer_file(config.tokenizer)
    make = partial(
        make_reader,
        {suite.name: suite.prompts for suite in suites},
        contained_words=config.contained_words,
        sketch=_sketch(config),
        tokenizer_file=tokenizer,
    )
    shared = {
        "near": None if config.near_duplicates is None else config.near_duplicates.model_dump(),
        "suites": [[suite.name, suite.digest] for suite in suites],
        "contained_words": config.contained_words if suites else None,
        "tokenizer": None if tokenizer is None else file_digest(tokenizer),
    }
    shards = []
    with Readers(make, config.processes or os.cpu_count() or 1) as readers:
        for source in sources:
            with _RowCount(source.name) as progress:
                shards.append(find_or_make(work, source.reading, readers, shared, progress.advance))
    return shards


def _tokenizer_file(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError.at(file, None, "no such file; tokenizer takes a tokenizer.json or the folder that holds one")
    return str(file)


class _RowCount:
    """Shows how many rows of a source were read; how many there are is not known before."""

    def __init__(self, name: str) -> None:
        self._progress = CountProgress(f"reading {name}", 1 << 62, logger)

    def __enter__(self) -> CountProgress:
        return self._progress.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)


def _check_rejects(sources: Sequence[PlannedSource], shards: Sequence[Shard]) -> None:
    """Raise `DataError` for every source that holds nothing usable, or bad rows where those are an error."""
    problems = [text for source, shard in zip(sources, shards, strict=True) if (text := source.problem(shard))]
    if problems:
        raise DataError("\n".join(problems))


def _mix(
    config: PrepareConfig, sources: Sequence[PlannedSource], shards: Sequence[Shard], *, draws: bool = True
) -> Mixed:
    policies = [source.policy if draws else source.undrawn for source in sources]
    kinds = [source.reading.kind == "pairs" for source in sources]
    return mix(
        list(zip(policies, shards, kinds, strict=True)),
        total=config.total if draws else None,
        fractions=config.splits.model_dump(),
        seed=config.seed,
        sketch=_sketch(config),
        drop_duplicates=config.duplicates == "drop",
        drop_contradictory=config.contradictory_labels == "drop",
    )


def _write(
    config: PrepareConfig, folder: RunFolder, sources: Sequence[PlannedSource], suites: Sequence[Suite], mixed: Mixed
) -> None:
    outputs: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for stream in mixed.streams:
        shutil.rmtree(folder.file(stream), ignore_errors=True)  # of an interrupted run
        written = write_stream(
            folder.file(stream), mixed.of_stream(stream), samples=config.language_sample, seed=config.seed
        )
        files = [folder.file(stream) / f"{split}.parquet" for split, rows in written.rows.items() if rows]
        outputs |= output_facts(folder.path, files, written.rows)
        texts[stream] = written.texts
    data = describe_data(
        mixed, sources, suites, alpha=config.alpha, with_tokens=config.tokenizer is not None, languages=texts
    )
    _write_lists(folder, mixed)
    folder.write_json("data.json", data)
    figures = draw_data(data["streams"])
    for name, content in figures.items():
        folder.write_bytes(name, content)
    folder.write_card(
        "Prepared data",
        card_sections(data, has_figure=bool(figures)),
        head=card_head(data, list(outputs)),
    )
    settings = {key: value for key, value in config.resolved().items() if key not in _NOT_OF_THE_DATA}
    manifest = make_manifest(
        settings=settings,
        sources=[source.as_row(folder.record["data"][f"{source.stream} {source.name}"]) for source in sources],
        suites={suite.name: folder.record["data"][f"decontaminate {suite.name}"] for suite in suites},
        outputs=outputs,
    )
    folder.write_json(MANIFEST, manifest)
    for line in _told(data):
        logger.info("%s", line)


def _told(data: Mapping[str, Any]) -> Iterator[str]:
    yield from source_lines(data["sources"])
    for name, facts in data["streams"].items():
        yield from stream_lines(name, facts)
    for name, found in data["decontamination"].items():
        yield f"decontaminated against {name}: {found['rows']} rows removed ({found['prompts']} prompts)"
    for text in data["warnings"]:
        yield f"warning: {text}"


def _write_lists(folder: RunFolder, mixed: Mixed) -> None:
    lists: dict[str, Callable[[Mixed], Iterable[Mapping[str, Any]]]] = {
        "rejects.jsonl": rejected_rows,
        "contamination.jsonl": contaminated_rows,
        "contradictory.jsonl": contradictory_rows,
    }
    for name, rows_of in lists.items():
        with open_whole(folder.file(name)) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows_of(mixed))


def _disk_error(folder: RunFolder, work: Path, error: OSError) -> RunError | DiskFullError:
    folder.kept = "what was read of whole sources is kept"
    if is_disk_full(error):
        return folder.disk_full(work)
    return RunError(
        f"{error.filename or work}: cannot be read or written ({error.strerror or error}); check rights and space"
    )
