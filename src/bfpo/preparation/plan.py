"""What is read for a mixture: the sources with their files, the evaluation suites, and what is told of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError, SettingError
from bfpo.core.files import file_digest
from bfpo.core.inputs import expand_files
from bfpo.core.schema import Prompt
from bfpo.data.prompts import read_prompts
from bfpo.data.rejects import BadRows, Reject
from bfpo.data.sources import SOURCES, SourceKind, resolve_files
from bfpo.preparation.card import alpha_warning, languages_of, stream_facts
from bfpo.preparation.mixture import Mixed
from bfpo.preparation.parts import Policy
from bfpo.preparation.reading import AUTO, kind_of_layout, reader_of
from bfpo.preparation.shards import Shard, SourceFiles

__all__ = ["PlannedSource", "Suite", "describe_data", "plan_source", "read_suite"]


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of the mixture with its files found."""

    policy: Policy
    reading: SourceFiles
    bad_rows: BadRows
    hub_id: str | None
    revision: str | None
    licence: str | None

    @property
    def name(self) -> str:
        """Its name in the mixture."""
        return self.policy.name

    @property
    def stream(self) -> str:
        """Where its rows go."""
        return self.policy.stream

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files on this machine."""
        return self.reading.files

    @property
    def undrawn(self) -> Policy:
        """The policy that uses all rows."""
        return replace(self.policy, count=None, weight=None, oversample=False)

    def problem(self, shard: Shard) -> str | None:
        """Return what is wrong with its rows, where it holds none that can be used or bad ones that are an error."""
        reasons: dict[str, int] = shard.facts["rejected_by_reason"]
        num_bad, rows = sum(reasons.values()), shard.facts["rows"]
        if len(shard) and (not num_bad or self.bad_rows == "skip"):
            return None
        if not rows:
            return f"{self.name}: no row was read from {', '.join(map(str, self.files))}"
        shown = "".join(f"; {Reject(**row)}" for row in shard.facts["rejects"])
        advice = "mend these rows, or set bad_rows to 'skip' to go on without them" if len(shard) else "none is usable"
        by_reason = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        return f"{self.name}: {num_bad} of {rows} rows cannot be used ({by_reason}){shown}; {advice}"

    def as_row(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the manifest tells of it; `files` with hash and size by path."""
        return {
            "name": self.name,
            "stream": self.stream,
            "hub_id": self.hub_id,
            "revision": self.revision,
            "licence": self.licence,
            "files": {self._place_of(file): facts for file, facts in files.items()},
        }

    def _place_of(self, file: str) -> str:
        """Return the path of a file, inside its data set where it is the hub's: the same on every machine."""
        parts = Path(file).parts
        return "/".join(parts[parts.index(self.revision) + 1 :]) if self.revision in parts else file


def plan_source(
    policy: Policy,
    *,
    paths: Sequence[Path] | None,
    layout: str | None,
    columns: Mapping[str, str],
    revision: str | None,
    licence: str | None,
    bad_rows: BadRows,
    limit: int | None,
) -> PlannedSource:
    """Find the files of a source: those at `paths`, else where the table of data sets says.

    Raises `SettingError` for a name, layout or stream that cannot be, `DataError` for files that cannot be had.
    """
    row = SOURCES.get(policy.name)
    hub_id, commit = None if row is None else row.hub_id, None
    if paths is None:
        resolved = resolve_files(policy.name, revision=revision)  # or says which names there are
        files, commit = list(resolved.files), resolved.revision
    else:
        if revision is not None:
            raise SettingError(f"{policy.name}: revision {revision!r} is not read beside files; leave one of them out")
        files = expand_files(paths)
    for file in files:
        if not file.is_file():
            raise DataError.at(file, None, f"no such file; it is named in the mixture under {policy.name}")
    layout = layout or (AUTO if row is None else row.layout)
    kind = kind_of_layout(layout) or ("pairs" if policy.stream != "sft" else _kind_of_file(files[0], columns))
    if kind == "completions" and policy.stream != "sft":
        raise SettingError(f"{policy.name}: holds completions, the {policy.stream} stream takes pairs; set stream: sft")
    if kind == "completions" and policy.use == "chosen":
        raise SettingError(f"{policy.name}: use: chosen picks from pairs, and it holds completions; set all or safe")
    digests = tuple(_digest_of(file, policy.name) for file in files)
    return PlannedSource(
        policy,
        SourceFiles(tuple(files), digests, kind, layout, dict(columns), limit),
        bad_rows,
        hub_id,
        commit,
        licence or (None if row is None else row.licence),
    )


def _kind_of_file(file: Path, columns: Mapping[str, str]) -> SourceKind:
    reader = reader_of(file, layout=AUTO, columns=columns)
    return "pairs" if reader is None else reader.kind


def _digest_of(file: Path, name: str) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise DataError.at(file, None, f"cannot be read ({error.strerror}); it is named under {name}") from error


@dataclass(frozen=True, slots=True)
class Suite:
    """Evaluation prompts of one name."""

    name: str
    files: list[Path]
    prompts: list[Prompt]
    digest: str


def read_suite(name: str, files: Sequence[Path], columns: Mapping[str, str]) -> Suite:
    """Read the prompts of a suite; raises `DataError` where a file cannot be read or there is none."""
    prompts = [prompt for file in files for prompt in read_prompts(file, columns=columns)]
    if not prompts:
        raise DataError(f"decontaminate: {name} holds no prompt ({', '.join(map(str, files))})")
    content = repr([(prompt.id, prompt.messages) for prompt in prompts])
    return Suite(name, list(files), prompts, hashlib.sha256(content.encode()).hexdigest())


def describe_data(
    mixed: Mixed,
    sources: Sequence[PlannedSource],
    suites: Sequence[Suite],
    *,
    alpha: float,
    with_tokens: bool,
    languages: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return what `data.json` holds. `languages`: texts by stream whose language is guessed."""
    streams = {name: stream_facts(mixed.of_stream(name), with_tokens=with_tokens) for name in mixed.streams}
    for name, texts in languages.items():
        if texts:
            streams[name]["languages"] = languages_of(texts)
    warnings = [text for name, facts in streams.items() if (text := alpha_warning(name, facts, alpha))]
    rows = [
        {
            **source.as_row({str(file): None for file in source.files}),
            "files": [str(file) for file in source.files],
            "layouts": part.shard.facts["layouts"],
            "rows": part.shard.facts["rows"],
            "rejected": part.shard.facts["rejected_by_reason"],
            "units": part.counts(),
            "available": part.available,
        }
        for source, part in zip(sources, mixed.parts, strict=True)
    ]
    hits = {
        suite.name: {
            "prompts": len(suite.prompts),
            "rows": sum(part.shard.facts["hits_by_suite"].get(suite.name, 0) for part in mixed.parts),
        }
        for suite in suites
    }
    return {
        "sources": rows,
        "streams": streams,
        "alpha": alpha,
        "warnings": warnings,
        "decontamination": hits,
        **mixed.counts,
    }
