"""STAGE: sources -> pairs and completions in fixed splits, with a data card and a manifest (`bfpo prepare`)."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bfpo.config import PrepareConfig
from bfpo.core.console import Plan
from bfpo.core.errors import DataError, DiskFullError, RunError
from bfpo.core.files import file_digest, is_disk_full
from bfpo.core.progress import CountProgress
from bfpo.preparation.card import card_head, card_sections, data_lines, describe_data, draw_data
from bfpo.preparation.compliance import unsafe_prompts
from bfpo.preparation.mixture import Mixed, mix
from bfpo.preparation.parts import Part
from bfpo.preparation.plan import PlannedSource, Suite, plan_source, read_suite
from bfpo.preparation.rows import BlockReader
from bfpo.preparation.shards import find_or_make, problem_of, remove_leftovers
from bfpo.preparation.workers import Readers
from bfpo.preparation.write import Written, make_manifest, output_facts, write_lists, write_stream
from bfpo.runs.folder import RunFolder

__all__ = ["preview", "run"]

logger = logging.getLogger(__name__)

MANIFEST, _WORK = "manifest.json", "work"
_PREVIEW_ROWS = 2000
_NOT_OF_THE_DATA = {"executor", "cache", "alpha", "language_sample", "tokenizer"}  # settings that change no row


def run(config: PrepareConfig, folder: RunFolder) -> None:
    """Write `<stream>/<split>.parquet`, `manifest.json`, `data.json`, figure, card and lists of what was left out.

    Every file appears only when complete, the manifest after all data: a folder without one is not finished. A resumed
    run reuses the sources that were read. Raises `DataError` and `LabelError` for data that cannot be used,
    `DiskFullError`.
    """
    suites = [read_suite(suite) for suite in config.decontaminate]
    sources = [plan_source(source) for source in config.sources]
    for source in sources:
        folder.add_data(_data_name(source), source.files)
    for suite in suites:
        folder.add_data(f"decontaminate {suite.name}", suite.files)
    folder.file(MANIFEST).unlink(missing_ok=True)
    work = Path(config.cache) if config.cache is not None else folder.folder(_WORK)
    try:
        work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(work)
        mixed = mix(_read(config, sources, suites, work), config)
        _write(config, folder, sources, suites, mixed)
    except OSError as error:
        raise _disk_error(folder, work, error) from error
    if config.cache is None:
        shutil.rmtree(work, ignore_errors=True)


def preview(config: PrepareConfig) -> Plan:
    """Return what a sample shows: the first 2,000 rows of each file, all used and none drawn; nothing is written."""
    all_rows = {"count": None, "weight": None, "oversample": False}
    undrawn = [source.model_copy(update=all_rows) for source in config.sources]
    config = config.model_copy(update={"sources": undrawn, "total": None})
    suites = [read_suite(suite) for suite in config.decontaminate]
    sources = [plan_source(source, limit=_PREVIEW_ROWS) for source in config.sources]
    with tempfile.TemporaryDirectory() as name:
        mixed = mix(_read(config, sources, suites, Path(name)), config)
        data = describe_data(mixed, sources, suites, config, {})
    lines = [f"a sample: at most the first {_PREVIEW_ROWS} rows of each file, all usable rows of them"]
    return Plan([*lines, *data_lines(data)], {"most_rows_per_file": _PREVIEW_ROWS, "data": data})


def _read(config: PrepareConfig, sources: Sequence[PlannedSource], suites: Sequence[Suite], work: Path) -> list[Part]:
    """Return the units of each source.

    Raises `DataError` for every source with no usable row, or with bad rows if those are an error.
    """
    tokenizer = _tokenizer_file(config.tokenizer)
    make = partial(
        BlockReader,
        {suite.name: suite.prompts for suite in suites},
        near=config.near_duplicates,
        contained_words=config.contained_words,
        tokenizer_file=tokenizer,
    )
    shared = {
        "near": None if config.near_duplicates is None else config.near_duplicates.model_dump(),
        "suites": [[suite.name, suite.digest] for suite in suites],
        "contained_words": config.contained_words if suites else None,
        "tokenizer": None if tokenizer is None else file_digest(tokenizer),
    }
    shards = []
    with Readers(make, config.executor) as readers:
        for source in sources:
            with CountProgress(f"reading {source.config.name}", None, logger) as progress:
                shards.append(find_or_make(work, source, readers, shared, progress.advance))
    read = list(zip(sources, shards, strict=True))
    problems = [text for source, shard in read if (text := problem_of(source, shard))]
    if problems:
        raise DataError("\n".join(problems))
    return [Part.of(source.config, shard, is_pairs=source.gives_pairs) for source, shard in read]


def _tokenizer_file(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError.at(file, None, "no such file; tokenizer takes a tokenizer.json or the folder that holds one")
    return str(file)


def _write(
    config: PrepareConfig, folder: RunFolder, sources: Sequence[PlannedSource], suites: Sequence[Suite], mixed: Mixed
) -> None:
    outputs: dict[str, dict[str, Any]] = {}
    written: dict[str, Written] = {}
    harmful = unsafe_prompts(mixed.parts)
    for stream in mixed.streams:
        shutil.rmtree(folder.file(stream), ignore_errors=True)  # of an interrupted run
        made = write_stream(
            folder.file(stream),
            mixed.of_stream(stream),
            samples=config.language_sample,
            seed=config.seed,
            unsafe_prompts=harmful,
        )
        files = [folder.file(stream) / f"{split}.parquet" for split, rows in made.rows.items() if rows]
        outputs |= output_facts(folder.path, files, made.rows)
        written[stream] = made
    data = describe_data(mixed, sources, suites, config, written)
    write_lists(folder.path, mixed)
    folder.write_json("data.json", data)
    figures = draw_data(data.streams)
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
        sources=[source.as_row(folder.record["data"][_data_name(source)]) for source in sources],
        suites={suite.name: folder.record["data"][f"decontaminate {suite.name}"] for suite in suites},
        outputs=outputs,
    )
    folder.write_json(MANIFEST, manifest)
    for line in data_lines(data):
        logger.info("%s", line)


def _data_name(source: PlannedSource) -> str:
    return f"{source.config.stream} {source.config.name}"


def _disk_error(folder: RunFolder, work: Path, error: OSError) -> RunError | DiskFullError:
    folder.kept = "sources that were read completely are kept"
    if is_disk_full(error):
        return folder.disk_full(work)
    return RunError(
        f"{error.filename or work}: cannot be read or written ({error.strerror or error}); check permissions and free "
        "space"
    )
